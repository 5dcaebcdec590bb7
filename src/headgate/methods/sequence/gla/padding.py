"""Padding is removed before tokens are mixed: the real tokens of a batch, one sequence behind the other in one row.

A padded token that is merely zeroed would still fade the memory by its gate and push real tokens out of a short
convolution's sight; a removed one does neither, wherever it stands: in front, behind, or in between::

    mask      0 0 1 1 1        a b c
              1 1 0 1 1   →    d e · f g      →    a b c d e f g,   cu_seqlens 0 3 7
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headgate.validate import check_integer, check_shape

__all__ = ["Packing", "Padding", "read_padding"]


@dataclass(frozen=True)
class Packing:
    """Where the sequences lie that stand behind each other in one batch row.

    Attributes:
        cu_seqlens: rising boundaries ``(sequences + spare + 1,)`` from 0 to the length of the row.
        spare: 1 where behind the real sequences lies one more that nobody asks for, else 0.
        columns: tokens per sequence before the padding was removed; ``None`` where none was.
    """

    cu_seqlens: Int[Tensor, " boundaries"]
    spare: int = 0
    columns: int | None = None

    @property
    def sequences(self) -> int:
        """The number of real sequences."""
        return self.cu_seqlens.shape[0] - 1 - self.spare


class Padding:
    """Removes the padded tokens of a batch and puts them back.

    In eager mode the row holds the real tokens alone. While a graph is captured, shapes must not depend on values:
    there, the padded tokens lie behind the real ones as a spare sequence.

    Args:
        mask: true at real tokens, ``(batch, length)``.

    Attributes:
        mask: the same.
        packing: the boundaries of the sequences.
    """

    def __init__(self, mask: Bool[Tensor, "batch length"]) -> None:
        self.mask = mask
        flat = mask.flatten()
        bounds = F.pad(mask.sum(dim=1).cumsum(0), (1, 0))
        self._order = torch.argsort((~flat).to(torch.uint8), stable=True)
        if torch.compiler.is_compiling():
            bounds = F.pad(bounds, (0, 1), value=flat.shape[0])
            self.packing = Packing(bounds, spare=1, columns=mask.shape[1])
        else:
            self._order = self._order[: int(bounds[-1])]
            self.packing = Packing(bounds, columns=mask.shape[1])

    @property
    def is_full(self) -> bool:
        """Whether it is known that there is no padding."""
        return self.packing.spare == 0 and self._order.shape[0] == self.mask.numel()

    def pack(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "1 tokens dim"]:
        """The real tokens of ``x`` in one row, in the order of batch, then time."""
        return x.flatten(0, 1)[self._order][None]

    def unpack(self, x: Float[Tensor, "1 tokens dim"]) -> Float[Tensor, "batch length dim"]:
        """The tokens at their places again; zeros where there is padding."""
        batch, length = self.mask.shape
        flat = x.new_zeros(batch * length, x.shape[-1]).index_copy(0, self._order, x[0])
        padded = flat.unflatten(0, (batch, length))
        return padded.masked_fill(~self.mask[..., None], 0.0) if self.packing.spare else padded


def read_padding(
    x: Float[Tensor, "batch length dim"],
    attention_mask: Int[Tensor, "batch seen"] | None,
    cu_seqlens: Int[Tensor, " sequences_plus_one"] | None,
    *,
    continued: bool,
) -> tuple[Padding | None, Packing | None]:
    """What a padding mask or boundaries say about ``x``.

    Args:
        x: the tokens.
        attention_mask: 1 (or true) at real tokens and 0 at padding, ``(batch, length)``, or ``None``.
        cu_seqlens: boundaries of sequences packed in one batch row, or ``None``.
        continued: whether columns for earlier tokens may stand in front of the mask.

    Returns:
        The padding, ``None`` where there is none to remove; and where the sequences lie once it is removed, ``None``
        where every row is one.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape or values, or both are given.
    """
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens must not both be given: packed sequences have no padding")
        _check_boundaries(cu_seqlens, x.shape[0], x.shape[1])
        return None, Packing(cu_seqlens)
    if attention_mask is None:
        return None, None
    padding = Padding(_check_mask(attention_mask, x.shape[0], x.shape[1], continued).to(x.device))
    return (None, None) if padding.is_full else (padding, padding.packing)


def _check_boundaries(cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Check boundaries before a convolution takes them for places; their values on a CPU and outside of graph capture."""
    check_shape("cu_seqlens", cu_seqlens, (None,), "sequences + 1")
    check_integer("cu_seqlens", cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens packs all sequences in one batch row, so x must have batch=1, got batch={batch}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {bounds}")


def _check_mask(mask: Tensor, batch: int, length: int, continued: bool) -> Bool[Tensor, "batch length"]:
    """The mask's last ``length`` columns as booleans.

    Values are looked at on a CPU and outside of graph capture only; a look at a GPU's memory would stop its queue.
    """
    if isinstance(mask, Tensor) and mask.dim() > 2:
        raise ValueError(
            f"attention_mask must be a padding mask of shape (batch, length), got {tuple(mask.shape)}: "
            "a recurrence cannot hide single pairs of tokens"
        )
    check_shape("attention_mask", mask, (batch, None if continued else length), "batch, length")
    if mask.shape[1] < length:
        raise ValueError(f"attention_mask must have length>={length}, got {tuple(mask.shape)} for (batch, length)")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"attention_mask must hold booleans or integers 0 and 1, got {mask.dtype}")
    mask = mask[:, mask.shape[1] - length :]
    if mask.dtype != torch.bool and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = mask[(mask != 0) & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"attention_mask must hold 0 at padding and 1 at real tokens, got {int(wrong[0])}")
    return mask.bool()
