"""Relative representations of subspaces: equal blocks of coordinates, a relative block for each, their results pooled.

A space that differs from another by a rotation within each block alone, or that holds several factors side by side, is
described block by block (``MultiheadRelativeAttention`` of the published code).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations.attention import RelativeAttention, RelativeEncoding
from headgate.validate import check_divides, check_shape

__all__ = ["Pool", "SubspaceRelativeAttention", "check_pool"]

Pool = Literal["concat", "sum", "mean", "max", "linear"]


class SubspaceRelativeAttention(nn.Module):
    """A :class:`RelativeAttention` for each of S equal blocks of the coordinates.

    Args:
        num_anchors: K.
        dim: size d of the embeddings.
        subspaces: S, which divides d.
        pool: ``"concat"`` (block by block), ``"sum"``, ``"mean"``, ``"max"``, or ``"linear"``: a learned map of the
            concatenation to the size of one block's result.
        device: of the parameters.
        dtype: of the parameters.
        **options: of every :class:`RelativeAttention`.

    Raises:
        ValueError: S does not divide d, an unknown ``pool``, or as :class:`RelativeAttention`.
    """

    def __init__(
        self,
        num_anchors: int,
        dim: int,
        *,
        subspaces: int,
        pool: Pool = "concat",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_divides(subspaces=subspaces, dim=dim)
        check_pool(pool)
        self.num_anchors, self.dim, self.subspaces, self.pool = num_anchors, dim, subspaces, pool
        self.blocks = nn.ModuleList(
            RelativeAttention(num_anchors, dim // subspaces, device=device, dtype=dtype, **options)
            for _ in range(subspaces)
        )
        width = self._first.out_dim
        self.pooling = nn.Linear(subspaces * width, width, device=device, dtype=dtype) if pool == "linear" else None

    @property
    def out_dim(self) -> int:
        """Size of the result."""
        return self._first.out_dim * (self.subspaces if self.pool == "concat" else 1)

    def forward(
        self,
        x: Float[Tensor, "batch dim"],
        anchors: Float[Tensor, "anchors dim"],
        anchor_labels: Int[Tensor, " anchors"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """Relative representation of ``x``; arguments and errors as of :meth:`RelativeAttention.forward`."""
        return self.decode(self.encode(x, anchors, anchor_labels))

    def encode(
        self,
        x: Float[Tensor, "batch dim"],
        anchors: Float[Tensor, "anchors dim"],
        anchor_labels: Int[Tensor, " anchors"] | None = None,
    ) -> tuple[RelativeEncoding, ...]:
        """The encoder's side, one for each block."""
        if anchor_labels is not None and not torch.compiler.is_compiling():
            self.check_labels(anchor_labels)
        return self.encode_trusted(x, anchors, anchor_labels)

    def check_labels(self, anchor_labels: Int[Tensor, " anchors"]) -> None:
        """As :meth:`RelativeAttention.check_labels`."""
        self._first.check_labels(anchor_labels)

    def encode_trusted(
        self,
        x: Float[Tensor, "batch dim"],
        anchors: Float[Tensor, "anchors dim"],
        anchor_labels: Int[Tensor, " anchors"] | None = None,
    ) -> tuple[RelativeEncoding, ...]:
        """As :meth:`RelativeAttention.encode_trusted`, one for each block."""
        check_shape("x", x, (None, self.dim), "batch, dim")
        check_shape("anchors", anchors, (self.num_anchors, self.dim), "anchors, dim")
        size = self.dim // self.subspaces
        return tuple(
            block.encode_trusted(items, references, anchor_labels)  # type: ignore[operator]
            for block, items, references in zip(
                self.blocks, x.split(size, dim=1), anchors.split(size, dim=1), strict=True
            )
        )

    def decode(self, encoding: tuple[RelativeEncoding, ...]) -> Float[Tensor, "batch out"]:
        """The decoder's side: each block's result, pooled."""
        parts = [block.decode(part) for block, part in zip(self.blocks, encoding, strict=True)]  # type: ignore[operator]
        if self.pool == "concat":
            return torch.cat(parts, dim=1)
        if self.pooling is not None:
            pooled: Tensor = self.pooling(torch.cat(parts, dim=1))
            return pooled
        stacked = torch.stack(parts, dim=1)
        if self.pool == "max":
            return stacked.amax(dim=1)
        return stacked.sum(dim=1) if self.pool == "sum" else stacked.mean(dim=1)

    @property
    def _first(self) -> RelativeAttention:
        first = self.blocks[0]
        assert isinstance(first, RelativeAttention)
        return first


def check_pool(pool: str) -> None:
    """Check the name of a way to join the results of subspaces.

    Raises:
        ValueError: an unknown one.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
