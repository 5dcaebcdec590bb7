r"""Mini-batch aware regularisation: an L2 penalty that costs what the batch costs (paper, Section 5.1, Equations 4 to 7).

The sum of squares of an embedding table, written as a sum over samples and approximated batch by batch: with α_mj = 1 if
id j occurs in batch m and n_j its occurrences in the training set::

    L_m = λ/2 Σ_j (α_mj / n_j) ‖w_j‖²          gradient of w_j: λ (α_mj / n_j) w_j

Only rows of ids in the batch are touched, and rare ids are penalised more strongly each time they occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.recommend.din.fields import may_look
from headgate.validate import check_integer, check_positive

__all__ = ["Ids", "MiniBatchAwareL2", "occurrence_counts"]

Ids: TypeAlias = Tensor | Sequence[Tensor]
"""Ids of one table: int64 tensors of any shape, one for every field that shares the table; below 0 where there is none."""


class MiniBatchAwareL2(nn.Module):
    """The penalty as a term of the loss.

    It holds the tables themselves, not copies: training the model changes what it sees.

    Args:
        tables: name → embedding table.
        counts: name → n_j, ``(vocabulary,)`` integers; see :func:`occurrence_counts`. ``None`` begins at 0 everywhere and
            counts what :meth:`observe` sees. An id that was never counted has n_j = 1.
        weight: λ, ≥ 0.

    Raises:
        TypeError: a table is no ``nn.Embedding``, or counts are no integers.
        ValueError: no table, a negative ``weight``, names or lengths of ``counts`` that do not fit, or a negative count.
    """

    def __init__(
        self, tables: Mapping[str, nn.Embedding], counts: Mapping[str, Tensor] | None = None, weight: float = 0.01
    ) -> None:
        super().__init__()
        if not tables:
            raise ValueError("tables must not be empty")
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        if counts is not None and set(counts) != set(tables):
            raise ValueError(f"counts must have the names of tables {sorted(tables)}, got {sorted(counts)}")
        for name, table in tables.items():
            if not isinstance(table, nn.Embedding):
                raise TypeError(f"tables[{name!r}] must be an nn.Embedding, got {type(table).__name__}")
            size = table.num_embeddings
            given = torch.zeros(size, dtype=torch.int64) if counts is None else counts[name]
            check_integer(f"counts[{name!r}]", given)
            if given.shape != (size,):
                raise ValueError(f"counts[{name!r}] must have shape ({size},), got {tuple(given.shape)}")
            if not given.is_meta and bool((given < 0).any()):
                raise ValueError(f"counts[{name!r}] must not be negative, got {int(given.min())}")
            self.register_buffer(f"counts_{name}", given.clone().long())
        self.weight = weight
        self.tables = nn.ModuleDict(tables)

    def forward(self, ids: Mapping[str, Ids]) -> Float[Tensor, ""]:
        """Penalise the rows of the batch's ids, each different one once.

        Args:
            ids: name of a table → its ids in the batch, from all fields that share it, candidates and histories. Mark
                padding by -1.

        Returns:
            ``λ/2 Σ_j ‖w_j‖² / n_j`` over all tables.

        Raises:
            TypeError: ids that are not int64 or int32.
            ValueError: names that are not those of the tables, or an id beyond the vocabulary.
        """
        total: Tensor | None = None
        for name, table, flat in self._each(ids):
            # Sorted, an id is new where it differs from the one before: unlike unique, this has a fixed shape.
            ordered = flat.sort().values
            new = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])
            kept = new & (ordered >= 0)
            if may_look(ordered):
                ordered, kept = ordered[kept], kept[kept]
            row = ordered.clamp_min(0)
            vectors = F.embedding(row, table.weight, sparse=table.sparse)
            vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            count = self.get_buffer(f"counts_{name}")[row].clamp_min(1)
            squares = vectors.square().sum(dim=1) / count
            term = torch.where(kept, squares, torch.zeros_like(squares)).sum()
            total = term if total is None else total + term
        assert total is not None
        return 0.5 * self.weight * total

    @torch.no_grad()
    def observe(self, ids: Mapping[str, Ids]) -> None:
        """Add a batch's occurrences to the counts, for a stream whose length is not known.

        Raises:
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`.
        """
        for name, _, flat in self._each(ids):
            counts = self.get_buffer(f"counts_{name}")
            counts.scatter_add_(0, flat.clamp_min(0), (flat >= 0).to(counts.dtype))

    def _each(self, ids: Mapping[str, Ids]) -> list[tuple[str, nn.Embedding, Int64[Tensor, " n"]]]:
        if not isinstance(ids, Mapping):
            raise TypeError(f"ids must map the names of tables to ids, got {type(ids).__name__}")
        if set(ids) != set(self.tables):
            raise ValueError(f"ids must have the names of tables {sorted(self.tables)}, got {sorted(ids)}")
        checked = []
        for name, table in self.tables.items():
            assert isinstance(table, nn.Embedding)
            checked.append((name, table, _flatten(f"ids[{name!r}]", ids[name], table.num_embeddings)))
        return checked


def occurrence_counts(ids: Ids, vocabulary: int) -> Int64[Tensor, " vocabulary"]:
    """Count how often every id occurs.

    Args:
        ids: those of a whole training set; below 0 where there is none.
        vocabulary: number of ids.

    Returns:
        n_j, on the device of ``ids``.

    Raises:
        TypeError: ids that are not int64 or int32.
        ValueError: no tensor, or an id beyond the vocabulary.
    """
    check_positive(vocabulary=vocabulary)
    flat = _flatten("ids", ids, vocabulary)
    return torch.bincount(flat[flat >= 0], minlength=vocabulary)


def check_ids(name: str, ids: Tensor, vocabulary: int, *, lowest: int) -> None:
    """Check the dtype of ids, and their range where values can be looked at for free.

    On accelerators and under ``torch.compile`` the embedding's own assertion refuses ids out of range.

    Raises:
        TypeError: not int64 or int32.
        ValueError: an id below ``lowest`` or beyond the vocabulary.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of ids, got {type(ids).__name__}")
    check_integer(name, ids)
    if not may_look(ids) or ids.numel() == 0:
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < lowest or most >= vocabulary:
        raise ValueError(f"{name} must lie in [{max(lowest, 0)}, {vocabulary}), got {least} to {most}")


def _flatten(name: str, ids: Ids, vocabulary: int) -> Int64[Tensor, " n"]:
    parts = [ids] if isinstance(ids, Tensor) else list(ids)
    if not parts:
        raise ValueError(f"{name} must hold a tensor at least, got none")
    for part in parts:
        check_ids(name, part, vocabulary, lowest=torch.iinfo(torch.int64).min)
    return torch.cat([part.flatten().long() for part in parts])
