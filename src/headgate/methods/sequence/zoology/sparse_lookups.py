r"""Input-dependent sparse attention (Arora et al., arXiv 2312.04927, section 5): only few tokens look things up.

With causal attention a and scores s from a selector (:mod:`.selectors`), training mixes softly,

.. math:: y_t = x_t + s_t\, a_t(x),

and evaluation lets only the selected tokens attend, :math:`y_t = x_t` for all others. Queries of the others are never
computed, so a forward pass with k selected tokens costs O(k · length). The sigmoid selector is held to few tokens by
the auxiliary loss

.. math:: \lambda\,\mathrm{relu}\!\left(\mathrm{mean}_t(s_t) - n / L\right),\qquad n = \sqrt L \text{ or } \texttt{num\_lookups}.

**Which tokens are selected in evaluation.** ``"topk"`` (as published): the ⌈√L⌉ (or ``num_lookups``) highest scores of
the sequence. That compares with later tokens, which is fine for scoring and wrong for generation. ``"prefix"``: a token
whose score is among the ⌈√t⌉ (or ``num_lookups``) highest of the first t tokens, itself included. ``"threshold"``: a
score above ``threshold``. The last two look back only, so what a prefix gives does not change when the sequence goes
on.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headgate.methods.sequence.zoology.selectors import (
    RepeatSelector,
    SequenceSoftmaxSelector,
    SigmoidSelector,
    SoftmaxPairSelector,
)
from headgate.nn import MultiHeadAttention
from headgate.validate import check_floating, check_integer, check_positive, check_shape

__all__ = ["SparseLookups"]

_SELECTORS = {
    "sigmoid": SigmoidSelector,
    "sma": SoftmaxPairSelector,
    "softmax": SequenceSoftmaxSelector,
    "repeat": RepeatSelector,
}


class SparseLookups(nn.Module):
    """Attention from few tokens that the input chooses.

    Args:
        dim: channels in and out.
        num_heads: heads of the attention; must divide ``dim``.
        selector: ``"sigmoid"`` (SigmoidLookups), ``"sma"``, ``"softmax"`` (SelectiveLookups: over the sequence, not
            causal), ``"repeat"`` (tokens that occurred before; ``forward`` then needs ``tokens``), or a module that
            maps ``(x, tokens)`` to scores ``(batch, length)``.
        num_lookups: how many tokens look up; default the square root of the length. Not with ``"repeat"``.
        selection: ``"topk"``, ``"prefix"`` or ``"threshold"`` (see above); default ``"threshold"`` with ``"repeat"``,
            else ``"topk"``.
        threshold: of the selection ``"threshold"``.
        penalty: λ of the auxiliary loss; used with ``"sigmoid"`` alone.
        bias: whether the fused projection of the attention has a bias.
        dropout: rate on the attention weights in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        selector: Literal["sigmoid", "sma", "softmax", "repeat"] | nn.Module = "sigmoid",
        num_lookups: int | None = None,
        selection: Literal["topk", "prefix", "threshold"] | None = None,
        threshold: float = 0.5,
        penalty: float = 1e-3,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(selector, str):
            if selector not in _SELECTORS:
                raise ValueError(f"selector must be one of {', '.join(_SELECTORS)}, or a module, got {selector!r}")
            selector = RepeatSelector() if selector == "repeat" else _SELECTORS[selector](dim)
        repeat = isinstance(selector, RepeatSelector)
        selection = ("threshold" if repeat else "topk") if selection is None else selection
        if selection not in ("topk", "prefix", "threshold"):
            raise ValueError(f"selection must be 'topk', 'prefix' or 'threshold', got {selection!r}")
        if repeat and (num_lookups is not None or selection != "threshold"):
            raise ValueError(
                "selector 'repeat' lets every repeated token look up: leave num_lookups out and selection at "
                f"'threshold', got num_lookups={num_lookups}, selection={selection!r}"
            )
        if num_lookups is not None:
            check_positive(num_lookups=num_lookups)
        if penalty < 0:
            raise ValueError(f"penalty must not be negative, got {penalty}")
        self.dim = dim
        self.attention = MultiHeadAttention(dim, num_heads, causal=True, bias=bias, dropout=dropout)
        self.selector = selector
        self.num_lookups = num_lookups
        self.selection = selection
        self.threshold = threshold
        self.penalty = penalty if isinstance(selector, SigmoidSelector) else 0.0

    @property
    def needs_tokens(self) -> bool:
        """Whether ``forward`` needs the token ids."""
        return bool(getattr(self.selector, "needs_tokens", False))

    @property
    def has_aux_loss(self) -> bool:
        """Whether there is an auxiliary loss to ask for."""
        return self.penalty > 0

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        tokens: Int[Tensor, "batch length"] | None = None,
        *,
        positions: Int[Tensor, "batch lookups"] | None = None,
        return_aux: bool = False,
    ) -> Float[Tensor, "batch length dim"] | tuple[Float[Tensor, "batch length dim"], Float[Tensor, ""]]:
        """Mix ``x``.

        Args:
            x: ``(batch, length, dim)``.
            tokens: token ids ``(batch, length)``, for a selector that looks at them.
            positions: in evaluation, let these tokens look up in place of the selected ones, e.g. random ones for an
                ablation; ``(batch, lookups)`` in [0, length), each at most once per row. Their scores still weigh what
                they find.
            return_aux: whether to return the auxiliary loss beside the mixed tokens. It is zero in evaluation.

        Returns:
            ``(batch, length, dim)``, or a pair of it and a scalar.

        Raises:
            TypeError: wrong dtype, or ``tokens`` missing.
            ValueError: wrong shape.
        """
        check_shape("x", x, (None, None, self.dim), "batch, length, dim")
        check_floating("x", x, like=self.attention.qkv.weight.dtype)
        scores = self.selector(x, tokens)
        aux_loss = x.new_zeros(())
        if self.training:
            y = x + scores[..., None] * self.attention(x)
            length = x.shape[1]
            budget = math.sqrt(length) if self.num_lookups is None else self.num_lookups
            if self.penalty:
                aux_loss = self.penalty * torch.relu(scores.mean() - budget / length)
        else:
            if positions is None:
                positions, scores = self._select(scores)
            else:
                check_shape("positions", positions, (x.shape[0], None), "batch, lookups")
                check_integer("positions", positions)
            positions = positions.long()
            found = scores.gather(1, positions)[..., None] * self.attention(x, positions)
            y = x.scatter_add(1, positions[..., None].expand(-1, -1, self.dim), found.to(x.dtype))
        return (y, aux_loss) if return_aux else y

    def selected(
        self, x: Float[Tensor, "batch length dim"], tokens: Int[Tensor, "batch length"] | None = None
    ) -> Bool[Tensor, "batch length"]:
        """Which tokens look up in evaluation."""
        positions, scores = self._select(self.selector(x, tokens))
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter(1, positions, scores.gather(1, positions) > 0)

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens: keys and values of all tokens, ``2 * length * dim``."""
        return 2 * length * self.dim

    def _select(
        self, scores: Float[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "batch lookups"], Float[Tensor, "batch length"]]:
        """Positions that look up, and the scores with those of all others set to zero.

        Rows that select fewer tokens than the fullest row are filled up with positions of score zero.
        """
        length = scores.shape[1]
        if self.selection == "topk":
            wanted = math.ceil(math.sqrt(length)) if self.num_lookups is None else self.num_lookups
            return scores.topk(min(wanted, length), dim=1).indices, scores
        if self.selection == "prefix":
            chosen = self._among_the_highest_so_far(scores)
        else:
            chosen = scores > self.threshold
        # The count depends on the data; a traced program needs a fixed one and takes all positions.
        count = length if torch.compiler.is_compiling() else int(chosen.sum(1).max()) if chosen.numel() else 0
        positions = chosen.to(scores.dtype).topk(count, dim=1).indices
        return positions, torch.where(chosen, scores, torch.zeros_like(scores))

    def _among_the_highest_so_far(self, scores: Float[Tensor, "batch length"]) -> Bool[Tensor, "batch length"]:
        length = scores.shape[1]
        higher = (scores[:, None, :] > scores[:, :, None]).tril().sum(-1)
        if self.num_lookups is not None:
            return higher < self.num_lookups
        budget = torch.arange(1, length + 1, device=scores.device).sqrt().ceil()
        return higher < budget
