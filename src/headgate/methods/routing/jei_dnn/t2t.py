r"""T2T-ViT, the backbone of the paper's experiments (Yuan et al., "Tokens-to-Token ViT", ICCV 2021, arXiv 2101.11986).

An image becomes tokens in three soft splits: patches that overlap are unfolded into tokens, attended to, and put back into
an image, which is split again. The attention in between is the Performer's (Choromanski et al., arXiv 2009.14794), linear
in the number of tokens, with positive random features

.. math:: \phi(x) = \exp\bigl(W x - \tfrac12 \lVert x \rVert^2\bigr) / \sqrt m, \qquad
          y_i = \frac{\sum_j \phi(q_i) \cdot \phi(k_j)\, v_j}{\sum_j \phi(q_i) \cdot \phi(k_j) + \varepsilon}

Plain transformer blocks on the tokens follow, with fixed sinusoidal positions and a class token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.heads import Head
from headgate.methods.routing.jei_dnn.model import EarlyExit
from headgate.nn import FeedForward, MultiHeadAttention, TransformerBlock
from headgate.ops.autocast import without_autocast
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["T2TViT", "early_exit_t2t_vit"]

# Kernel, stride and padding of the three soft splits; the sides shrink by their product, 16.
_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
_STRIDE = 16


class T2TViT(nn.Module, HubModel):
    """Image classifier on soft-split tokens. The defaults are T2T-ViT-7.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` keep it as safetensors and a JSON of its arguments.

    Args:
        dim: channels of the tokens, D.
        depth: blocks, L.
        num_heads: heads; must divide ``dim``.
        mlp_dim: inner size of the token-wise networks; default ``2 * dim``.
        img_size: side of the square images in pixels, a multiple of 16.
        in_chans: channels of the images.
        num_classes: C; 0 for no classifier.
        token_dim: channels of the tokens between the splits.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.

    Raises:
        ValueError: a size does not fit.
    """

    def __init__(
        self,
        dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        *,
        mlp_dim: int | None = None,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        token_dim: int = 64,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, in_chans=in_chans, token_dim=token_dim)
        check_probability(drop_path_rate=drop_path_rate)
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        if img_size < _STRIDE or img_size % _STRIDE:
            raise ValueError(f"img_size must be a multiple of {_STRIDE} pixels, got {img_size}")
        self.num_features = self.embed_dim = dim
        self.num_classes = num_classes
        self.img_size = img_size
        self.in_chans = in_chans
        first, between, last = (kernel**2 for kernel, _, _ in _SPLITS)
        self.attention1 = PerformerAttention(in_chans * first, token_dim)
        self.attention2 = PerformerAttention(token_dim * between, token_dim)
        self.project = nn.Linear(token_dim * last, dim)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        positions = _sinusoids((img_size // _STRIDE) ** 2 + 1, dim)
        self.position_embedding = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                MultiHeadAttention(dim, num_heads, bias=False),
                FeedForward(dim, 2 * dim if mlp_dim is None else mlp_dim),
                drop_path=drop_path_rate * index / max(1, depth - 1),
                norm_eps=1e-5,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, images: Float[Tensor, "batch chans side side"]) -> Float[Tensor, "batch classes"]:
        """Classify standardised images ``(batch, in_chans, img_size, img_size)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Float[Tensor, "batch chans side side"]) -> Float[Tensor, "batch tokens dim"]:
        """The normed tokens behind the last block, the class token first."""
        check_shape(
            "images", images, (None, self.in_chans, self.img_size, self.img_size), "batch, channels, side, side"
        )
        check_floating("images", images, like=self.project.weight.dtype)
        x = self.project(self._tokens(images))
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(
        self, features: Float[Tensor, "batch tokens dim"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Classify by the class token.

        Args:
            features: what :meth:`forward_features` returned.
            pre_logits: return the class token ``(batch, dim)`` itself.
        """
        return features[:, 0] if pre_logits else self.head(features[:, 0])

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier in place of the last layer; 0 classes for none.

        Raises:
            ValueError: ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        self.num_classes = num_classes
        self._remember(num_classes=num_classes)
        self.head = nn.Identity()
        if num_classes:
            weight = self.norm.weight
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _tokens(self, images: Tensor) -> Float[Tensor, "batch patches token_dim"]:
        side, maps = self.img_size, images
        for (kernel, stride, padding), attention in zip(_SPLITS, (self.attention1, self.attention2), strict=False):
            side = side // stride
            tokens = attention(F.unfold(maps, kernel, padding=padding, stride=stride).transpose(1, 2))
            maps = tokens.transpose(1, 2).unflatten(2, (side, side))
        kernel, stride, padding = _SPLITS[-1]
        return F.unfold(maps, kernel, padding=padding, stride=stride).transpose(1, 2)


class PerformerAttention(nn.Module):
    """Single-head linear attention that changes the number of channels, and a token-wise network behind it.

    Args:
        dim: channels in.
        out_dim: channels out; half as many random features.
        dropout: rate on both branches in training.
    """

    def __init__(self, dim: int, out_dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.kqv = nn.Linear(dim, 3 * out_dim)
        self.out_proj = nn.Linear(out_dim, out_dim)
        self.mlp = FeedForward(out_dim, out_dim)
        self.dropout = nn.Dropout(dropout)
        features = max(1, out_dim // 2)
        directions = nn.init.orthogonal_(torch.empty(features, out_dim)) * math.sqrt(features)
        self.directions = nn.Parameter(directions, requires_grad=False)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length out_dim"]:
        """Attend, then transform every token; the values themselves are the residual branch.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.kqv.in_features), "batch, length, dim")
        check_floating("x", x, like=self.kqv.weight.dtype)
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self._features(k), self._features(q)
        wide = v.to(k.dtype)
        memory = k.transpose(1, 2) @ wide
        total = q @ k.sum(dim=1).unsqueeze(2)
        # ε of the official code.
        y = (q @ memory / (total + 1e-8)).to(v.dtype)
        y = v + self._drop(self.out_proj(y))
        return y + self._drop(self.mlp(self.norm2(y)))

    def _drop(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        # The gradient comes transposed from the next split; a compiled backward of dropout needs it in rows of tokens.
        return self.dropout(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _features(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length features"]:
        """φ of the module docstring, in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            x, directions = x.to(wide), self.directions.to(wide)
            shift = x.square().sum(dim=-1, keepdim=True) / 2
            return torch.exp(x @ directions.T - shift) / math.sqrt(len(directions))


def early_exit_t2t_vit(
    dim: int = 256,
    depth: int = 7,
    num_heads: int = 4,
    *,
    mlp_dim: int | None = None,
    img_size: int = 224,
    num_classes: int = 10,
    drop_path_rate: float = 0.1,
    head: Head = nn.Linear,
) -> EarlyExit:
    """The network of the paper: T2T-ViT with exits behind all blocks but the last, which read the normed class token.

    Args:
        dim: as in :class:`T2TViT`.
        depth: as there; G is one less.
        num_heads: as there.
        mlp_dim: as there.
        img_size: as there.
        num_classes: C.
        drop_path_rate: as there; it stays on while heads and gates are trained.
        head: as in :class:`ExitHeads`.
    """
    backbone = T2TViT(
        dim,
        depth,
        num_heads,
        mlp_dim=mlp_dim,
        img_size=img_size,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
    )
    return EarlyExit(backbone, blocks="blocks", norm="norm", pool="token", head=head)


def _sinusoids(length: int, dim: int) -> Float[Tensor, "1 length dim"]:
    """Sines in even channels, cosines in odd ones; the pair i turns by 10000^(−2i/D) per position."""
    pair = torch.arange(dim, dtype=torch.float64) // 2
    angle = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0 ** (-2 * pair / dim)
    odd = torch.arange(dim) % 2 == 1
    return torch.where(odd, angle.cos(), angle.sin()).float()[None]
