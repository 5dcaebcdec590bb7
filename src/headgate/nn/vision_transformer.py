r"""The vision transformer, as DeiT trains it: what new vision layers are measured against.

Dosovitskiy et al., "An image is worth 16×16 words" (arXiv 2010.11929); sizes and start of Touvron et al., "Training
data-efficient image transformers" (DeiT, arXiv 2012.12877). An image is cut into squares of p × p pixels, each becomes a
vector, positions are added, and L blocks follow:

.. math:: x \leftarrow x + \mathrm{drop}(\mathrm{attention}(\mathrm{norm}(x))), \qquad
          x \leftarrow x + \mathrm{drop}(\mathrm{mlp}(\mathrm{norm}(x)))

The classifier reads a learned class token that stands before the patches, or the mean over the patches. Any image of whole
patches will do: the learned positions are resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.nn.attention import MultiHeadAttention
from headgate.nn.drop_path import DropPath
from headgate.nn.feed_forward import FeedForward
from headgate.nn.patch_embedding import resize_positions
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["ExplicitAttention", "TransformerBlock", "VisionTransformer", "deit_base", "deit_small", "deit_tiny"]

Pool = Literal["token", "avg"]


class ExplicitAttention(MultiHeadAttention):
    """:class:`MultiHeadAttention` that writes out all weights: the same values, in memory quadratic in the length.

    For costs as they were before fused kernels, and for looking at the weights. Arguments and parameters are those of
    :class:`MultiHeadAttention`, without ``causal``.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide ``dim``.
        bias: whether the fused projection has a bias. The output projection always has one.
        dropout: rate on the attention weights in training.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__(dim, num_heads, bias=bias, dropout=dropout)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:  # type: ignore[override]
        """Attend within every sequence of ``x`` ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        weights, v = self._weights(x)
        y = nn.functional.dropout(weights, self.dropout, self.training) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def weights(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch heads length length"]:
        """How much every token (row) takes from every token (column) of ``x``; rows sum to one."""
        return self._weights(x)[0]

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.qkv.weight.dtype)
        q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1), v


class TransformerBlock(nn.Module):
    """Pre-norm residual block of a token mixer and a token-wise network, each behind a layer norm.

    Args:
        dim: channels.
        mixer: maps ``(batch, length, dim)`` to the same shape, along the sequence.
        mlp: the same, token by token.
        drop_path: stochastic depth rate of both branches.
        norm_eps: ε of the norms.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        check_positive(dim=dim, norm_eps=norm_eps)
        self.mixer_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        """One block on tokens ``(batch, length, dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.mixer_norm.normalized_shape[0]), "batch, length, dim")
        check_floating("x", x, like=self.mixer_norm.weight.dtype)
        x = x + self.drop_path(self.mixer(self.mixer_norm(x)))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


class VisionTransformer(nn.Module):
    """Image classifier and feature extractor of plain attention over patches.

    Linear layers, class token and positions start from a normal of deviation 0.02 cut at ±2, biases at 0; the patch
    embedding as a convolution of PyTorch does.

    Args:
        dim: channels.
        depth: blocks.
        num_heads: heads; must divide ``dim``.
        img_size: pixels, a number or (height, width), whose grid of patches has a learned position per patch. For
            images of other sizes they are resized.
        patch_size: p, side of a patch in pixels; 1 makes every pixel a token.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier, so that pooled features are returned.
        class_token: whether a learned token stands before the patches.
        class_position: whether the class token has a learned position, too (without, it is a position by itself).
        global_pool: what the classifier reads: ``"token"``, the class token, or ``"avg"``, the mean over the patches;
            default: the class token where there is one.
        mlp_dim: inner size of the token-wise networks; default ``4 * dim``.
        qkv_bias: whether queries, keys and values have biases.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        norm_eps: ε of all norms.
        explicit_attention: write out all attention weights (:class:`ExplicitAttention`) in place of PyTorch's fused
            attention. The weights of a model fit either way.

    Raises:
        ValueError: a size does not fit, or ``global_pool="token"`` without a class token.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        class_token: bool = True,
        class_position: bool = True,
        global_pool: Pool | None = None,
        mlp_dim: int | None = None,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        explicit_attention: bool = False,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, patch_size=patch_size, in_chans=in_chans)
        check_probability(drop_path_rate=drop_path_rate)
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        self.num_features = self.embed_dim = dim
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.in_chans = in_chans
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self._grid("img_size", height, width)
        self.patch_embedding = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        self.class_position = class_token and class_position
        places = self.class_position + self.grid[0] * self.grid[1]
        self.position_embedding = nn.Parameter(torch.empty(1, places, dim))
        attention = ExplicitAttention if explicit_attention else MultiHeadAttention
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                attention(dim, num_heads, bias=qkv_bias),
                FeedForward(dim, mlp_dim),
                drop_path=drop_path_rate * index / max(1, depth - 1),
                norm_eps=norm_eps,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head: nn.Module = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.global_pool = self._pool(global_pool)
        self._init_weights()

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Classify images.

        Args:
            images: standardised, ``(batch, in_chans, height, width)`` with sides of whole patches.

        Returns:
            Logits ``(batch, num_classes)``, or pooled features ``(batch, dim)`` without a classifier.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or sides that are no whole patches.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch tokens dim"]:
        """The normed tokens behind the last block: the class token, if there is one, then the patches in raster order."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(
        self, features: Float[Tensor, "batch tokens dim"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Pool tokens and classify.

        Args:
            features: what :meth:`forward_features` returned.
            pre_logits: return the pooled features ``(batch, dim)``.

        Returns:
            Logits ``(batch, num_classes)``.
        """
        if self.global_pool == "token":
            pooled = features[:, 0]
        else:
            pooled = features[:, self._first_patch :].mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward_maps(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Feature maps for dense prediction; what lies behind the last one is not computed.

        Args:
            images: as of :meth:`forward`.
            indices: positions of the blocks whose outputs are wanted, or n for the last n; default all.

        Returns:
            Maps ``(batch, dim, rows, columns)`` of the patches, without a norm, in rising order.

        Raises:
            ValueError: a block that does not exist.
        """
        return self._run(images, self._choose(indices))[1]

    def forward_intermediates(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], list[Float[Tensor, "batch dim rows columns"]]]:
        """What :meth:`forward_features` and :meth:`forward_maps` return, from one pass.

        Args:
            images: as of :meth:`forward`.
            indices: as of :meth:`forward_maps`.
        """
        chosen = self._choose(indices)
        x, maps = self._run(images, [*chosen, len(self.blocks) - 1])
        return self.norm(x), maps[: len(chosen)]

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Put a fresh classifier in place of the last layer.

        Args:
            num_classes: classes; 0 for no classifier.
            global_pool: what it reads; default: what the last one did.

        Raises:
            ValueError: ``num_classes`` is negative, or the model has no class token to read.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        self.global_pool = self._pool(global_pool or self.global_pool)
        weight = self.norm.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            _init_linear(self.head)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights of a layer, for recipes that spare them weight decay."""
        return {"position_embedding"} | ({"class_token"} if self.class_token is not None else set())

    @property
    def _first_patch(self) -> int:
        """Where the patches begin among the tokens."""
        return 0 if self.class_token is None else 1

    def _run(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The tokens behind the last of the blocks ``indices``, and the maps of all of those."""
        x = self._embed(images)
        rows, columns = (side // self.patch_size for side in images.shape[2:])
        maps = []
        for index, block in enumerate(self.blocks[: indices[-1] + 1]):
            x = block(x)
            if index in indices:
                maps.append(x[:, self._first_patch :].transpose(1, 2).unflatten(2, (rows, columns)))
        return x, maps

    def _embed(self, images: Tensor) -> Float[Tensor, "batch tokens dim"]:
        check_shape("images", images, (None, self.in_chans, None, None), "batch, channels, height, width")
        check_floating("images", images, like=self.patch_embedding.weight.dtype)
        grid = self._grid("images", images.shape[2], images.shape[3])
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        of_class, of_patches = self.position_embedding.tensor_split((int(self.class_position),), dim=1)
        x = x + resize_positions(of_patches, self.grid, grid)
        if self.class_token is None:
            return x
        first = self.class_token + of_class if self.class_position else self.class_token
        return torch.cat([first.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)

    def _grid(self, name: str, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(f"{name} must be whole patches of {p} pixels high and wide, got {height}×{width}")
        return height // p, width // p

    def _pool(self, global_pool: Pool | None) -> Pool:
        if global_pool is None:
            return "avg" if self.class_token is None else "token"
        if global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg', got {global_pool!r}")
        if global_pool == "token" and self.class_token is None:
            raise ValueError("global_pool='token' needs class_token=True")
        return global_pool

    def _choose(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.blocks)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices must be at least 1 and at most the {count} blocks there are, got {indices}")
            return list(range(count - indices, count))
        chosen = sorted(index + count if index < 0 else index for index in indices)
        if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
            raise ValueError(f"indices must name different ones of {count} blocks, got {list(indices)}")
        return chosen

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
        for parameter in (self.class_token, self.position_embedding):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)


def deit_tiny(**options: Any) -> VisionTransformer:
    """DeiT-T: 192 channels, 3 heads, 12 blocks.

    Args:
        **options: keywords of :class:`VisionTransformer`, in place of the preset's.
    """
    return VisionTransformer(**{"dim": 192, "num_heads": 3, **options})


def deit_small(**options: Any) -> VisionTransformer:
    """DeiT-S: 384 channels, 6 heads, 12 blocks.

    Args:
        **options: keywords of :class:`VisionTransformer`, in place of the preset's.
    """
    return VisionTransformer(**{"dim": 384, "num_heads": 6, **options})


def deit_base(**options: Any) -> VisionTransformer:
    """DeiT-B: 768 channels, 12 heads, 12 blocks.

    Args:
        **options: keywords of :class:`VisionTransformer`, in place of the preset's.
    """
    return VisionTransformer(**{"dim": 768, "num_heads": 12, **options})


def _init_linear(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
