r"""ConViT: a vision transformer whose first blocks start as convolutions (d'Ascoli et al., arXiv 2103.10697).

The image is cut into patches, learned positions are added, and L pre-norm blocks follow. The first ``local_up_to_layer``
of them attend by gated positional self-attention (:class:`GPSA`), the others by plain self-attention (:class:`MHSA`). The
class token joins in front of the patches just before the first plain block, so that GPSA never meets it; without GPSA
blocks it joins before the first block, and the network is DeiT. The classifier reads the class token.

Modules and parameters have the published names: weights of facebookresearch/convit and of timm load as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.evaluate import attention_distance
from headgate.methods.vision.convit.attention import GPSA, MHSA
from headgate.nn import DropPath, FeedForward
from headgate.nn.indices import choose_indices
from headgate.nn.patch_embedding import resize_positions
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["ConViT"]

Grid = tuple[int, int]
Pool = Literal["token", "avg"]


class Block(nn.Module):
    """Pre-norm residual block: attention, then a token-wise network.

    Args:
        dim: channels.
        attn: what mixes the tokens.
        mlp_dim: inner size of the token-wise network.
        drop: dropout rate inside and behind that network.
        drop_path: stochastic depth rate of both branches.
        norm_eps: ε of the norms.
    """

    def __init__(
        self, dim: int, attn: GPSA | MHSA, mlp_dim: int, drop: float, drop_path: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = FeedForward(dim, mlp_dim, activation=nn.Sequential(nn.GELU(), nn.Dropout(drop)))
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)
        _init_linear(self.mlp.fc1)
        _init_linear(self.mlp.fc2)

    def forward(self, x: Float[Tensor, "batch tokens dim"], grid_size: Grid) -> Float[Tensor, "batch tokens dim"]:
        """One block on tokens that lie on the grid ``grid_size``, behind a class token where attention is plain."""
        mixed = self.norm1(x)
        mixed = self.attn(mixed, grid_size) if isinstance(self.attn, GPSA) else self.attn(mixed)
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.drop(self.mlp(self.norm2(x))))


class ConViT(nn.Module, HubModel):
    """Image classifier and feature extractor.

    Linear layers, class token and positions start from a normal of deviation 0.02 cut at ±2, biases at 0, the patch
    embedding as a convolution of PyTorch does; then GPSA layers take their local start.

    Args:
        img_size: pixels, a number or (height, width), whose grid of patches has a learned position per patch. For
            images of other sizes they are resized.
        patch_size: side of a patch in pixels; 1 makes every pixel a token.
        in_chans: channels of the images.
        num_classes: classes; 0 for no classifier, so that pooled features are returned.
        embed_dim: channels, of all heads together.
        depth: blocks.
        num_heads: heads; must divide ``embed_dim``. A square number gives every head an offset of a filter.
        mlp_ratio: inner size of the token-wise networks, in multiples of ``embed_dim``.
        qkv_bias: whether queries, keys and values have biases.
        drop_rate: dropout on the embedded patches, in the token-wise networks and behind every attention.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 in the first.
        local_up_to_layer: the first blocks that have GPSA, in [0, depth); 0 makes a DeiT.
        locality_strength: α of every :class:`GPSA`.
        local_init: whether GPSA layers start local.
        use_pos_embed: whether there are learned absolute positions.
        global_pool: what the classifier reads: ``"token"``, the class token, or ``"avg"``, the mean over the patches.
        norm_eps: ε of all norms.

    Raises:
        ValueError: a size does not fit, or ``local_up_to_layer`` leaves no block that the class token could join.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        local_init: bool = True,
        use_pos_embed: bool = True,
        global_pool: Pool = "token",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, depth=depth, patch_size=patch_size, in_chans=in_chans, mlp_ratio=mlp_ratio)
        check_probability(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        if not 0 <= local_up_to_layer < depth:
            raise ValueError(
                "local_up_to_layer must lie in [0, depth): the class token joins before the first plain block, "
                f"got local_up_to_layer={local_up_to_layer}, depth={depth}"
            )
        self.num_features = self.embed_dim = embed_dim
        self.num_classes = _count_classes(num_classes)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_heads = num_heads
        self.local_up_to_layer = local_up_to_layer
        self.global_pool = _pool(global_pool)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = self._grid("img_size", height, width)
        self.patch_embed = nn.Sequential(
            OrderedDict(proj=nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size))
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = None
        if use_pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        shared: dict[str, Any] = {"qkv_bias": qkv_bias, "attn_drop": attn_drop_rate, "proj_drop": drop_rate}
        local: dict[str, Any] = {
            "locality_strength": locality_strength,
            "local_init": local_init,
            "grid_size": self.grid_size,
        }
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                GPSA(embed_dim, num_heads, **shared, **local)
                if index < local_up_to_layer
                else MHSA(embed_dim, num_heads, **shared),
                int(embed_dim * mlp_ratio),
                drop_rate,
                drop_path_rate * index / max(1, depth - 1),
                norm_eps,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Classify images.

        Args:
            images: standardised, ``(batch, in_chans, height, width)`` with sides of whole patches.

        Returns:
            Logits ``(batch, num_classes)``, or pooled features ``(batch, embed_dim)`` without a classifier.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or sides that are no whole patches.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch tokens dim"]:
        """The normed tokens behind the last block: the class token, then the patches in raster order."""
        x, grid = self._embed(images)
        for index in range(len(self.blocks)):
            x = self._step(index, x, grid)
        return self.norm(x)

    def forward_head(
        self, features: Float[Tensor, "batch tokens dim"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Pool tokens and classify.

        Args:
            features: what :meth:`forward_features` returned.
            pre_logits: return the pooled features ``(batch, embed_dim)``.

        Returns:
            Logits ``(batch, num_classes)``.
        """
        pooled = features[:, 0] if self.global_pool == "token" else features[:, 1:].mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward_maps(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Feature maps for dense prediction; what lies behind the last one is not computed.

        Args:
            images: as of :meth:`forward`.
            indices: positions of the blocks whose outputs are wanted, or n for the last n; default all.

        Returns:
            Maps ``(batch, embed_dim, rows, columns)`` of the patches, without a norm, in rising order.

        Raises:
            ValueError: a block that does not exist.
        """
        chosen = choose_indices("indices", indices, len(self.blocks))
        return self._maps(images, chosen)[1]

    def forward_intermediates(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], list[Float[Tensor, "batch dim rows columns"]]]:
        """What :meth:`forward_features` and :meth:`forward_maps` return, from one pass.

        Args:
            images: as of :meth:`forward`.
            indices: as of :meth:`forward_maps`.
        """
        chosen = choose_indices("indices", indices, len(self.blocks))
        x, maps = self._maps(images, [*chosen, len(self.blocks) - 1])
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
            ValueError: ``num_classes`` is negative, or an unknown ``global_pool``.
        """
        self.num_classes = _count_classes(num_classes)
        self.global_pool = _pool(global_pool or self.global_pool)
        weight = self.norm.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            _init_linear(self.head)
        self._remember(num_classes=num_classes, global_pool=self.global_pool)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights of a layer, for recipes that spare them weight decay."""
        return {"cls_token"} | ({"pos_embed"} if self.pos_embed is not None else set())

    def gates(self) -> Float[Tensor, "layers heads"]:
        """σ(λ), the share of positional attention, of every head of the GPSA layers; 1 is a convolution, 0 a ViT."""
        gates = [layer.gate for layer in self._attention_layers() if isinstance(layer, GPSA)]
        return torch.stack(gates) if gates else self.norm.weight.new_empty(0, self.num_heads)

    def attentions(
        self, images: Float[Tensor, "batch chans height width"]
    ) -> list[Float[Tensor, "batch heads tokens tokens"]]:
        """Attention weights of every block; in blocks from ``local_up_to_layer`` on the first token is the class token."""
        weights = []

        def note(attn: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(attn, GPSA | MHSA)
            weights.append(attn.attention(*inputs))

        hooks = [layer.register_forward_pre_hook(note) for layer in self._attention_layers()]
        try:
            self.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        return weights

    @torch.no_grad()
    def attention_distances(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "depth heads"]:
        """How far patches look, in patches, per block and head (:meth:`GPSA.attention_distance`).

        Returns:
            ``(depth, num_heads)``, float64 on the CPU. What plain blocks attend to the class token has no distance and is
            left out.
        """
        grid = self._grid("images", *images.shape[-2:])
        patches = grid[0] * grid[1]
        distances = [
            attention_distance(weights, grid, prefix_tokens=weights.shape[-1] - patches)
            for weights in self.attentions(images)
        ]
        return torch.stack([torch.from_numpy(distance) for distance in distances])

    def _attention_layers(self) -> list[GPSA | MHSA]:
        return [cast(Block, block).attn for block in self.blocks]

    def _embed(self, images: Tensor) -> tuple[Float[Tensor, "batch patches dim"], Grid]:
        """The patches with their positions, in raster order, and the grid on which they lie."""
        check_shape("images", images, (None, self.in_chans, None, None), "batch, channels, height, width")
        check_floating("images", images, like=self.cls_token.dtype)
        grid = self._grid("images", images.shape[2], images.shape[3])
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, self.grid_size, grid)
        return self.pos_drop(x), grid

    def _step(self, index: int, x: Tensor, grid: Grid) -> Float[Tensor, "batch tokens dim"]:
        """The tokens behind block ``index``; the class token joins before the first plain one."""
        if index == self.local_up_to_layer:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return self.blocks[index](x, grid)

    def _maps(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The tokens behind the last of the blocks ``indices``, and the maps of all of those."""
        x, grid = self._embed(images)
        maps = []
        for index in range(indices[-1] + 1):
            x = self._step(index, x, grid)
            if index in indices:
                patches = x[:, x.shape[1] - grid[0] * grid[1] :]
                maps.append(patches.transpose(1, 2).unflatten(2, grid))
        return x, maps

    def _grid(self, name: str, height: int, width: int) -> Grid:
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(f"{name} must be whole patches of {p} pixels high and wide, got {height}×{width}")
        return height // p, width // p

    def _init_weights(self) -> None:
        if isinstance(self.head, nn.Linear):
            _init_linear(self.head)
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)


def _count_classes(num_classes: int) -> int:
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
    return num_classes


def _pool(global_pool: Pool) -> Pool:
    if global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool must be 'token' or 'avg', got {global_pool!r}")
    return global_pool


def _init_linear(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
