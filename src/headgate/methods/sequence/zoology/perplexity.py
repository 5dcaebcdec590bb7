"""Perplexity of recalled and of other tokens (Arora et al., arXiv 2312.04927, section 3): where language models differ."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from headgate.data.recall import recall_mask
from headgate.validate import check_floating, check_shape

__all__ = ["recall_perplexity"]


def recall_perplexity(
    logits: Float[Tensor, "batch length vocab"],
    tokens: Int[Tensor, "batch length"],
    frequent_bigrams: Int[Tensor, "bigrams 2"] | None = None,
    document_ids: Int[Tensor, "batch length"] | None = None,
) -> dict[str, float]:
    """Split a language model's perplexity by whether the context holds the answer.

    A token counts as recalled where its bigram (the token before it, itself) stood in the same document before and is
    not one of ``frequent_bigrams``; see :func:`headgate.data.recall.recall_mask`.

    Args:
        logits: ``(batch, length, vocab)``; those at position t score token t + 1.
        tokens: token ids ``(batch, length)``.
        frequent_bigrams: bigrams of the training set that do not count as recall, as
            :func:`headgate.data.recall.frequent_bigrams` returns them; ``None`` for none.
        document_ids: which document a token belongs to; ``None`` where every row is one. Predictions across a border
            count as ``other``.

    Returns:
        Perplexity (e to the mean cross-entropy in nats) of ``all``, ``recall`` and ``other`` tokens; nan for a group
        without a token.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape.
    """
    check_shape("logits", logits, (None, None, None), "batch, length, vocab")
    check_floating("logits", logits)
    check_shape("tokens", tokens, tuple(logits.shape[:2]), "batch, length")
    recalled = recall_mask(tokens, frequent_bigrams, document_ids)[:, 1:]
    targets = tokens[:, 1:].long()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), targets.flatten(), reduction="none")
    losses = losses.view_as(targets)
    groups = {"all": losses.flatten(), "recall": losses[recalled], "other": losses[~recalled]}
    return {name: float(group.mean().exp()) for name, group in groups.items()}
