r"""The local activation unit: a history summed with weights that depend on the candidate (paper, Section 4.3, Equation 3).

With behaviours e_1 … e_T, candidate v and a small network a(·)::

    u(v) = Σ_j a(e_j, v) e_j                a(e, v) = MLP([v, e, v - e, v ⊙ e])

The paper sums the raw scores, so that many matching behaviours make a long u; the published code takes their softmax.

The first layer W = [W_v, W_e, W_d, W_p] on the four parts is computed as
``(W_v + W_d) v + (W_e - W_d) e + W_p (v ⊙ e)``: of the three products, one needs the candidates alone and one the history
alone. The latter is kept by :meth:`LocalActivationUnit.prepare` for all further candidates of a user. On a CPU only real
behaviours are scored: histories are mostly padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.recommend.din.dice import Activation, activate, make_activation
from headgate.methods.recommend.din.fields import real_places
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["FixedPooling", "LocalActivationUnit", "PreparedHistory"]


class PreparedHistory(NamedTuple):
    """A history with what the first layer makes of it, ready for any number of candidates.

    Attributes:
        keys: ``(batch, length, dim)``.
        products: ``(batch, length, hidden)``, (W_e - W_d) e and the bias.
        mask: ``(batch, length)``, True for a behaviour.
    """

    keys: Float[Tensor, "batch length dim"]
    products: Float[Tensor, "batch length hidden"]
    mask: Bool[Tensor, "batch length"]


class LocalActivationUnit(nn.Module):
    """Weigh behaviours by how they go with a candidate, and sum them.

    Args:
        embed_dim: size E of behaviours and candidates.
        hidden: widths of the hidden layers of a(·), one at least.
        activation: between them: ``"dice"``, ``"prelu"``, ``"sigmoid"``, ``"relu"``, or a function from a width to a module.
        normalize: ``None`` takes the scores as weights, ``"softmax"`` their softmax over the behaviours, and
            ``"scaled_softmax"`` that of the scores over √E, as the published code does.
        scale: factor of every score. Raw weights add up over the history: 1/T keeps them small where it is long.
        official_quirks: as published code, let padding take part in Dice's batch statistics, and give an empty history
            uniform weights over its padding under a softmax.

    Raises:
        ValueError: a size is not positive, ``hidden`` is empty, or an unknown ``normalize`` or ``activation``.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: Sequence[int] = (64, 16),
        activation: Activation = "dice",
        normalize: Literal["softmax", "scaled_softmax"] | None = None,
        *,
        scale: float = 1.0,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        check_positive(embed_dim=embed_dim, scale=scale)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must hold one positive width at least, got {list(hidden)}")
        if normalize not in (None, "softmax", "scaled_softmax"):
            raise ValueError(f"normalize must be None, 'softmax' or 'scaled_softmax', got {normalize!r}")
        self.embed_dim = embed_dim
        self.normalize = normalize
        self.scale = scale * (embed_dim**-0.5 if normalize == "scaled_softmax" else 1.0)
        self.official_quirks = official_quirks
        self.first = nn.Linear(4 * embed_dim, hidden[0])
        self.layers = nn.ModuleList(nn.Linear(size, after) for size, after in itertools.pairwise(hidden))
        self.activations = nn.ModuleList(make_activation(activation, width) for width in hidden)
        self.score = nn.Linear(hidden[-1], 1)

    @overload
    def forward(
        self, query: Tensor, keys: Tensor, mask: Tensor, *, return_weights: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, query: Tensor, keys: Tensor, mask: Tensor, *, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        query: Float[Tensor, "batch *candidates dim"],
        keys: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"],
        *,
        return_weights: bool = False,
    ) -> (
        Float[Tensor, "batch *candidates dim"]
        | tuple[Float[Tensor, "batch *candidates dim"], Float[Tensor, "batch *candidates length"]]
    ):
        """Pool the history for each candidate.

        Args:
            query: the candidates, ``(batch, dim)`` or ``(batch, candidates, dim)``.
            keys: the behaviours, ``(batch, length, dim)``; what stands in padding does not matter.
            mask: ``(batch, length)``, True for a behaviour, anywhere in the row.
            return_weights: give the weights, too; 0 at padding.

        Returns:
            u, of the shape of ``query``, zero where the history is empty; with ``return_weights`` also the weights
            ``(batch, length)`` or ``(batch, candidates, length)``.

        Raises:
            TypeError: ``query`` or ``keys`` is not of the module's floating dtype, or ``mask`` not boolean.
            ValueError: another shape.
        """
        pooled, weights = self._pool(query, self.prepare(keys, mask))
        return (pooled, weights) if return_weights else pooled

    def prepare(self, keys: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"]) -> PreparedHistory:
        """Compute what depends on the history alone.

        Raises:
            TypeError: ``keys`` is not of the module's floating dtype, or ``mask`` not boolean.
            ValueError: another shape.
        """
        check_history(keys, mask, self.embed_dim)
        check_floating("keys", keys, self.first.weight.dtype)
        # Padding may hold anything; zeroed, it cannot make a product that is not finite.
        keys = keys.masked_fill(~mask.unsqueeze(-1), 0.0) if not self.official_quirks else keys
        _, of_key, of_difference, _ = self.first.weight.chunk(4, dim=1)
        return PreparedHistory(keys, F.linear(keys, of_key - of_difference, self.first.bias), mask)

    def pool(
        self, query: Float[Tensor, "batch *candidates dim"], history: PreparedHistory
    ) -> Float[Tensor, "batch *candidates dim"]:
        """Pool a prepared history for further candidates; see :meth:`forward`."""
        return self._pool(query, history)[0]

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"{self.embed_dim}, normalize={self.normalize!r}"

    def _pool(self, query: Tensor, history: PreparedHistory) -> tuple[Tensor, Tensor]:
        check_query(query, history.keys)
        check_floating("query", query, self.first.weight.dtype)
        candidates = query if query.dim() == 3 else query.unsqueeze(1)
        weights = self._weights(candidates, history)
        pooled = torch.matmul(weights, history.keys)
        if query.dim() == 2:
            pooled, weights = pooled.squeeze(1), weights.squeeze(1)
        return pooled, weights

    def _weights(
        self, candidates: Float[Tensor, "batch candidates dim"], history: PreparedHistory
    ) -> Float[Tensor, "batch candidates length"]:
        keys, mask = history.keys, history.mask.unsqueeze(1)
        scores = self._scores(candidates, history) * self.scale
        if self.normalize is not None:
            wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
            scores = wide.masked_fill(~mask, torch.finfo(wide.dtype).min).softmax(dim=-1)
        if self.normalize is None or not self.official_quirks:
            scores = scores.masked_fill(~mask, 0.0)  # an empty history has no weights
        return scores.to(keys.dtype)

    def _scores(
        self, candidates: Float[Tensor, "batch candidates dim"], history: PreparedHistory
    ) -> Float[Tensor, "batch candidates length"]:
        """a(e_j, v) for every pair of a candidate and a real behaviour; what stands at padding is no score."""
        of_query, _, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        batch, count, _ = candidates.shape
        length = history.mask.shape[1]
        # Published code lets padding take part in Dice's statistics.
        place = None if self.official_quirks else real_places(history.mask)
        pairs = _beside_candidates(history.keys, place) * _beside_behaviours(candidates, place, length)
        hidden = F.linear(pairs, of_product) + _beside_candidates(history.products, place)
        hidden = hidden + _beside_behaviours(F.linear(candidates, of_query + of_difference), place, length)
        rows = hidden.flatten(0, -2)
        real: Tensor | None = None
        if place is None and not self.official_quirks:
            real = history.mask.unsqueeze(2).expand(batch, length, count).flatten()
        for index, activation in enumerate(self.activations):
            if index:
                rows = self.layers[index - 1](rows)
            rows = activate(activation, rows, real)
        scores = self.score(rows).view(-1, count)
        if place is not None:
            scores = scores.new_zeros(batch * length, count).index_copy(0, place, scores)
        return scores.view(batch, length, count).transpose(1, 2)


class FixedPooling(nn.Module):
    """The sum or mean of the history, whatever the candidate: the pooling of the paper's base model.

    Args:
        reduction: ``"sum"`` or ``"mean"``.

    Raises:
        ValueError: another reduction.
    """

    def __init__(self, reduction: Literal["sum", "mean"] = "mean") -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.reduction = reduction

    def forward(
        self,
        query: Float[Tensor, "batch *candidates dim"],
        keys: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch *candidates dim"]:
        """Pool the history; of ``query``, only the shape counts.

        Returns:
            Of the shape of ``query``, zero where the history is empty.

        Raises:
            TypeError: ``query`` or ``keys`` is not floating point, or ``mask`` not boolean.
            ValueError: another shape.
        """
        check_shape("keys", keys, (None, None, None), "batch, length, dim")
        check_history(keys, mask, keys.shape[2])
        check_query(query, keys)
        check_floating("query", query)
        check_floating("keys", keys)
        real = mask.unsqueeze(-1)
        total = keys.masked_fill(~real, 0.0).sum(dim=1)
        if self.reduction == "mean":
            total = total / real.sum(dim=1).clamp_min(1)
        return total if query.dim() == 2 else total.unsqueeze(1).expand(query.shape)

    def pool_rows(
        self,
        query: Float[Tensor, "batch *candidates dim"],
        rows: Float[Tensor, "real dim"],
        owner: Int64[Tensor, " real"],
    ) -> Float[Tensor, "batch *candidates dim"]:
        """Pool histories that come without padding, as one long row of behaviours.

        Args:
            query: as in :meth:`forward`.
            rows: behaviours.
            owner: to which entry of the batch each belongs.

        Returns:
            As :meth:`forward`.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros(len(query), rows.shape[1], dtype=wide).index_add(0, owner, rows.to(wide))
        if self.reduction == "mean":
            total = total / owner.bincount(minlength=len(query)).clamp_min(1).unsqueeze(1)
        total = total.to(rows.dtype)
        return total if query.dim() == 2 else total.unsqueeze(1).expand(query.shape)


def check_history(keys: Tensor, mask: Tensor, dim: int) -> None:
    """Check behaviours and their mask at the door of a pooling.

    Raises:
        TypeError: ``mask`` is not boolean.
        ValueError: another shape.
    """
    check_shape("keys", keys, (None, None, dim), "batch, length, dim")
    check_shape("mask", mask, tuple(keys.shape[:2]), "batch, length")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True for a behaviour, got {mask.dtype}")


def check_query(query: Tensor, keys: Tensor) -> None:
    """Check candidates against the behaviours.

    Raises:
        ValueError: another shape than ``(batch, dim)`` or ``(batch, candidates, dim)``.
    """
    batch, dim = keys.shape[0], keys.shape[2]
    if isinstance(query, Tensor) and query.dim() == 2:
        check_shape("query", query, (batch, dim), "batch, dim")
    else:
        check_shape("query", query, (batch, None, dim), "batch, candidates, dim")


def _beside_candidates(
    values: Float[Tensor, "batch length width"], place: Int64[Tensor, " real"] | None
) -> Float[Tensor, "*behaviours 1 width"]:
    """Behaviours to be combined with candidates: ``(real, 1, width)`` or, where all count, ``(batch, length, 1, width)``."""
    return (values if place is None else values.flatten(0, 1).index_select(0, place)).unsqueeze(-2)


def _beside_behaviours(
    values: Float[Tensor, "batch candidates width"], place: Int64[Tensor, " real"] | None, length: int
) -> Float[Tensor, "*behaviours candidates width"]:
    """The candidates that belong to each behaviour."""
    return values.unsqueeze(1) if place is None else values.index_select(0, place // length)
