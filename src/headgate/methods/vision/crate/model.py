"""CRATE, the white-box transformer (arXiv 2311.13110): every layer compresses tokens onto subspaces and sparsifies them.

Patches are normed, projected and normed again; a class token stands before them and learned positions are added; blocks
follow, and a layer norm and a linear layer read the class token or the mean over all tokens. Parameters have the names of
the published code (``transformer.layers.0.0.fn.qkv.weight``), so that its weights load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.evaluate import LayerModules
from headgate.methods.vision.crate.attention import MSSA
from headgate.methods.vision.crate.block import CRATEBlock
from headgate.nn import resize_positions
from headgate.nn.indices import choose_indices
from headgate.train.hub import HubModel
from headgate.validate import check_floating, check_positive, check_probability, check_shape

__all__ = ["CRATE", "crate_base", "crate_large", "crate_small", "crate_tiny"]

Pool = Literal["cls", "mean"]


class CRATE(nn.Module, HubModel):
    """Image classifier and feature extractor of white-box layers.

    Class token and positions start from N(0, 1) as published, large beside the usual 0.02.

    Args:
        image_size: pixels, a number or (height, width), whose grid of patches has a learned position per patch. For
            images of other sizes they are resized.
        patch_size: side of a patch in pixels.
        num_classes: classes; 0 for no classifier, so that pooled features are returned.
        dim: channels.
        depth: layers.
        heads: subspaces of every layer.
        dim_head: their dimension; default ``dim / heads``.
        pool: what the classifier reads: ``"cls"``, the class token, or ``"mean"``, the mean over all tokens, the class
            token included.
        in_chans: channels of the images.
        dropout: of every :class:`MSSA`.
        embedding_dropout: rate on the embedded tokens, in training.
        step_size: η of every sparsification (``ista`` of the published code).
        lambd: λ of every sparsification.
        nonnegative: of every :class:`CRATEBlock`.
        tie_output: of every :class:`CRATEBlock`.
        skip: of every :class:`CRATEBlock`.
        expansion: of every :class:`CRATEBlock`.

    Raises:
        ValueError: a size does not fit, or a number or name is out of range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        dim_head: int | None = None,
        pool: Pool = "cls",
        *,
        in_chans: int = 3,
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        nonnegative: bool = True,
        tie_output: bool = False,
        skip: bool = False,
        expansion: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(patch_size=patch_size, dim=dim, depth=depth, in_chans=in_chans)
        check_probability(embedding_dropout=embedding_dropout)
        self.num_features = self.embed_dim = dim
        self.num_classes = _checked_classes(num_classes)
        self.pool = _checked_pool(pool)
        self.patch_size = patch_size
        self.in_chans = in_chans
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = self._grid("image_size", height, width)
        patch_dim = in_chans * patch_size**2
        self.to_patch_embedding = nn.Sequential(
            Patchify(patch_size), nn.LayerNorm(patch_dim), nn.Linear(patch_dim, dim), nn.LayerNorm(dim)
        )
        self.pos_embedding = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.dropout = nn.Dropout(embedding_dropout)
        self.transformer = nn.Module()
        self.transformer.layers = nn.ModuleList(
            CRATEBlock(
                dim,
                heads,
                dim_head,
                dropout=dropout,
                step_size=step_size,
                lambd=lambd,
                nonnegative=nonnegative,
                tie_output=tie_output,
                skip=skip,
                expansion=expansion,
            )
            for _ in range(depth)
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes) if num_classes else nn.Identity())
        nn.init.normal_(self.pos_embedding)
        nn.init.normal_(self.cls_token)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks, first to last."""
        layers = self.transformer.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

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
        """The sparse tokens behind the last layer: the class token, then the patches in raster order; not normed.

        Args:
            images: as of :meth:`forward`.

        Returns:
            ``(batch, 1 + patches, dim)``.
        """
        x = self._embed(images)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward_head(
        self, features: Float[Tensor, "batch tokens dim"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Pool tokens, norm, and classify.

        Args:
            features: what :meth:`forward_features` returned.
            pre_logits: return the pooled, normed features ``(batch, dim)``.

        Returns:
            Logits ``(batch, num_classes)``.
        """
        norm, classifier = self.mlp_head
        pooled = norm(features.mean(dim=1) if self.pool == "mean" else features[:, 0])
        return pooled if pre_logits else classifier(pooled)

    def forward_maps(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """Feature maps for dense prediction; what lies behind the last one is not computed.

        Args:
            images: as of :meth:`forward`.
            indices: positions of the layers whose outputs are wanted, or n for the last n; default all.

        Returns:
            Maps ``(batch, dim, rows, columns)`` of the patches, in rising order.

        Raises:
            ValueError: a layer that does not exist.
        """
        return self._maps(images, choose_indices("indices", indices, len(self.layers)))[1]

    def forward_intermediates(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], list[Float[Tensor, "batch dim rows columns"]]]:
        """What :meth:`forward_features` and :meth:`forward_maps` return, from one pass.

        Args:
            images: as of :meth:`forward`.
            indices: as of :meth:`forward_maps`.
        """
        chosen = choose_indices("indices", indices, len(self.layers))
        x, maps = self._maps(images, [*chosen, len(self.layers) - 1])
        return x, maps[: len(chosen)]

    def attention(
        self, images: Float[Tensor, "batch chans height width"], layer: int = -1
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """The attention weights of one layer; row 0, without its first entry, is the class token's view of the patches.

        Args:
            images: as of :meth:`forward`.
            layer: which one, counted from the end where negative.

        Returns:
            ``(batch, heads, 1 + patches, 1 + patches)``; rows sum to one.

        Raises:
            ValueError: a layer that does not exist.
        """
        depth = len(self.layers)
        if not -depth <= layer < depth:
            raise ValueError(f"layer must be one of {depth}, got {layer}")
        x = self._embed(images)
        for block in self.layers[: layer % depth]:
            x = block(x)
        compress = self.layers[layer][0]  # type: ignore[index]
        return compress.fn.weights(compress.norm(x))

    def rate_layers(self) -> dict[str, LayerModules]:
        """Where :func:`headgate.evaluate.layerwise_report` reads this model: the projections, and the layers' outputs."""
        names = {}
        for index, block in enumerate(self.layers):
            attention = block[0].fn  # type: ignore[index]
            assert isinstance(attention, MSSA)
            place = f"transformer.layers.{index}"
            names[f"layer {index + 1}"] = LayerModules(f"{place}.0.fn.qkv", attention.num_heads, f"{place}.1")
        return names

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.mlp_head[1]

    def reset_classifier(self, num_classes: int, pool: Pool | None = None) -> None:
        """Put a fresh classifier in place of the last layer.

        Args:
            num_classes: classes; 0 for no classifier.
            pool: what it reads; default: what the last one did.

        Raises:
            ValueError: ``num_classes`` is negative, or ``pool`` unknown.
        """
        self.num_classes = _checked_classes(num_classes)
        self.pool = self.pool if pool is None else _checked_pool(pool)
        like: Mapping[str, Any] = {"device": self.cls_token.device, "dtype": self.cls_token.dtype}
        self.mlp_head[1] = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()
        self._remember(num_classes=num_classes, pool=self.pool)

    def _maps(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The tokens behind the last of the layers ``indices``, and the maps of all of those."""
        x, maps = self._embed(images), []
        rows, columns = (side // self.patch_size for side in images.shape[2:])
        for index, layer in enumerate(self.layers[: indices[-1] + 1]):
            x = layer(x)
            if index in indices:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)))
        return x, maps

    def _embed(self, images: Tensor) -> Float[Tensor, "batch tokens dim"]:
        check_shape("images", images, (None, self.in_chans, None, None), "batch, channels, height, width")
        check_floating("images", images, like=self.cls_token.dtype)
        grid = self._grid("images", images.shape[2], images.shape[3])
        of_class, of_patches = self.pos_embedding.split((1, self.grid[0] * self.grid[1]), dim=1)
        x = self.to_patch_embedding(images)
        x = x + resize_positions(of_patches, self.grid, grid)
        first = (self.cls_token + of_class).to(x.dtype).expand(x.shape[0], -1, -1)
        return self.dropout(torch.cat([first, x], dim=1))

    def _grid(self, name: str, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            raise ValueError(f"{name} must be whole patches of {p} pixels high and wide, got {height}×{width}")
        return height // p, width // p


class Patchify(nn.Module):
    """Cut images into squares and write out each one row by row, pixel by pixel, channel by channel.

    Args:
        patch_size: side of a patch in pixels.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch patches patch_dim"]:
        """``(batch, chans, rows · p, columns · p)`` → ``(batch, rows · columns, p · p · chans)``."""
        p = self.patch_size
        batch, chans, height, width = images.shape
        cut = images.reshape(batch, chans, height // p, p, width // p, p)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _checked_classes(num_classes: int) -> int:
    if num_classes < 0:
        raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
    return num_classes


def _checked_pool(pool: Pool) -> Pool:
    if pool not in ("cls", "mean"):
        raise ValueError(f"pool must be 'cls' or 'mean', got {pool!r}")
    return pool


def crate_tiny(**options: Any) -> CRATE:
    """CRATE-T: 384 channels, 6 heads, 12 layers.

    Args:
        **options: keywords of :class:`CRATE`, in place of the preset's.
    """
    return CRATE(**{"dim": 384, "depth": 12, "heads": 6, **options})


def crate_small(**options: Any) -> CRATE:
    """CRATE-S: 576 channels, 12 heads, 12 layers.

    Args:
        **options: keywords of :class:`CRATE`, in place of the preset's.
    """
    return CRATE(**{"dim": 576, "depth": 12, "heads": 12, **options})


def crate_base(**options: Any) -> CRATE:
    """CRATE-B: 768 channels, 12 heads, 12 layers.

    Args:
        **options: keywords of :class:`CRATE`, in place of the preset's.
    """
    return CRATE(**{"dim": 768, "depth": 12, "heads": 12, **options})


def crate_large(**options: Any) -> CRATE:
    """CRATE-L: 1024 channels, 16 heads, 24 layers.

    Args:
        **options: keywords of :class:`CRATE`, in place of the preset's.
    """
    return CRATE(**{"dim": 1024, "depth": 24, "heads": 16, **options})
