"""One interface for image sets with known factors, drawn or read from files.

A set whose images are the full grid of its factors, row-major with the last factor running fastest, needs to tell no more
than images and sizes: :class:`FactorGrid` does the arithmetic of places, neighbours and traversals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from headgate.data.seeding import BatchLoader

__all__ = ["FactorDataset", "FactorGrid", "FactorSubset", "Indices"]

Indices = int | Sequence[int] | Tensor


@runtime_checkable
class FactorDataset(Protocol):
    """Images with known factors."""

    factor_names: tuple[str, ...]
    factor_sizes: tuple[int, ...]

    def __len__(self) -> int: ...

    def images(self, index: Indices) -> UInt8[Tensor, "count height width channels"]:
        """Give images, uint8 with the channels last."""
        ...

    def factors(self, index: Indices) -> Int[Tensor, "count factors"]:
        """Give the factors of images as int64 indices."""
        ...

    def index(self, factors: Int[Tensor, "count factors"]) -> Int[Tensor, " count"]:
        """Give the place of factors in the row-major grid."""
        ...

    def unravel(self, index: Indices) -> Int[Tensor, "count factors"]:
        """Give the factors at a place of the grid."""
        ...


class FactorGrid:
    """The arithmetic of a full row-major grid; a base for image sets.

    Args:
        factor_names: names, the slowest first.
        factor_sizes: number of values of each.
        cyclic: factors whose last value is followed by the first, such as a full turn.
    """

    def __init__(self, factor_names: Sequence[str], factor_sizes: Sequence[int], cyclic: Sequence[str] = ()) -> None:
        self.factor_names = tuple(factor_names)
        self.cyclic = frozenset(cyclic)
        self.factor_sizes = tuple(int(size) for size in factor_sizes)

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    def factors(self, index: Indices) -> Int[Tensor, "count factors"]:
        """Give the factors of images as int64 indices."""
        return self.unravel(index)

    def index(self, factors: Int[Tensor, "count factors"]) -> Int[Tensor, " count"]:
        """Give the place of factors in the grid.

        Raises:
            TypeError: another dtype than int64.
            ValueError: another number of factors, or values out of range.
        """
        if factors.dtype != torch.int64:
            raise TypeError(f"factors must be int64, got {factors.dtype}")
        sizes = torch.tensor(self.factor_sizes)
        if factors.shape[-1] != len(sizes) or bool(((factors < 0) | (factors >= sizes)).any()):
            raise ValueError(
                f"factors must have a last axis of {len(sizes)} with values below {self.factor_sizes}, "
                f"got shape {tuple(factors.shape)}"
            )
        place = torch.zeros(factors.shape[:-1], dtype=torch.int64)
        for column, size in enumerate(self.factor_sizes):
            place = place * size + factors[..., column]
        return place

    def unravel(self, index: Indices) -> Int[Tensor, "count factors"]:
        """Give the factors at places of the grid; the inverse of :meth:`index`.

        Raises:
            ValueError: outside the grid.
        """
        place = self.places(index)
        columns = []
        for size in reversed(self.factor_sizes):
            columns.append(place % size)
            place = place // size
        return torch.stack(columns[::-1], dim=-1)

    def places(self, index: Indices) -> Int[Tensor, " count"]:
        """Bring one index or several to a checked int64 vector.

        Raises:
            TypeError: not integers.
            ValueError: outside the grid.
        """
        place = torch.as_tensor(index)
        if place.is_floating_point() or place.dtype == torch.bool:
            raise TypeError(f"index must hold integers, got {place.dtype}")
        place = place.to(torch.int64).reshape(-1)
        if place.numel() and not (int(place.min()) >= 0 and int(place.max()) < len(self)):
            raise ValueError(f"index must lie in [0, {len(self)}), got {int(place.min())} to {int(place.max())}")
        return place

    def traverse(self, index: int, factor: str) -> Int[Tensor, " values"]:
        """Give the places at which one factor takes each of its values in turn and the others stay as at ``index``.

        Raises:
            ValueError: unknown factor, or outside the grid.
        """
        column = self._column(factor)
        stride = math.prod(self.factor_sizes[column + 1 :])
        start = int(self.places(index)) - int(self.unravel(index)[0, column]) * stride
        return start + stride * torch.arange(self.factor_sizes[column])

    def neighbours(self, index: int, factor: str) -> Int[Tensor, " neighbours"]:
        """Give the places one step of a factor below and above ``index``: two, or one at the end of a range.

        A cyclic factor has two everywhere.

        Raises:
            ValueError: unknown factor, or outside the grid.
        """
        line = self.traverse(index, factor)
        value = int(self.unravel(index)[0, self._column(factor)])
        steps = [value - 1, value + 1]
        if factor in self.cyclic:
            steps = [step % len(line) for step in steps]
        return line[[step for step in dict.fromkeys(steps) if 0 <= step < len(line) and step != value]]

    def _column(self, factor: str) -> int:
        if factor not in self.factor_names:
            raise ValueError(f"factor must be one of {', '.join(self.factor_names)}, got {factor!r}")
        return self.factor_names.index(factor)


class FactorSubset(Dataset[dict[str, Tensor]]):
    """Some images of a factor data set as training examples: ``image`` (channels first) and ``factors``.

    Args:
        dataset: any :class:`FactorDataset`.
        indices: which images, in this order.
        out: ``"float32"`` or ``"uint8"``.
        range: ``"01"``, or ``"-11"`` for float images in [-1, 1].

    Raises:
        ValueError: no index, an unknown dtype or range, or uint8 with the range -1 to 1.
    """

    def __init__(self, dataset: FactorDataset, indices: Indices, out: str = "float32", range: str = "01") -> None:
        if (out, range) not in (("float32", "01"), ("float32", "-11"), ("uint8", "01")):
            raise ValueError(f"out must be 'float32', or 'uint8' with range '01', got out={out!r}, range={range!r}")
        self.dataset = dataset
        self.indices = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if self.indices.numel() == 0:
            raise ValueError("indices must name at least one image, got none")
        self.out = out
        self.range = range

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not -len(self) <= item < len(self):
            raise IndexError(f"item must lie in [0, {len(self)}), got {item}")
        return {name: value[0] for name, value in self.take([item % len(self)]).items() if name != "index"}

    def __getitems__(self, items: Sequence[int]) -> list[dict[str, Tensor]]:
        """Give several examples in one go; a DataLoader asks for a batch like this."""
        batch = self.take(items)
        return [{"image": batch["image"][row], "factors": batch["factors"][row]} for row in torch.arange(len(items))]

    def take(self, items: Indices) -> dict[str, Tensor]:
        """Give examples by their place in the subset, with a batch axis; ``index`` is their place in the data set."""
        index = self.indices[torch.as_tensor(items, dtype=torch.int64).reshape(-1)]
        image = self.dataset.images(index).permute(0, 3, 1, 2).contiguous()
        if self.out == "float32":
            image = image / 255.0 if self.range == "01" else image / 127.5 - 1.0
        return {"image": image, "factors": self.dataset.factors(index), "index": index}

    def batch(self, count: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Draw examples, each independently of the others."""
        return self.take(torch.randint(len(self), (count,), generator=generator))

    def loader(self, batch_size: int, steps: int, seed: int = 0, stream: int | str = 0, start: int = 0) -> BatchLoader:
        """Give an iterable of batches; the same (seed, stream, step) is the same batch on any machine."""
        return BatchLoader(self.batch, batch_size, steps, seed, stream, start)
