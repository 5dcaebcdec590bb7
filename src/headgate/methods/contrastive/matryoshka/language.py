"""Nested prefixes for masked language models (paper, Section 4.1: BERT).

The hidden state is cut before the tied vocabulary projection, which is MRL-E with the embedding matrix E as classifier::

    logits_m = E[:, :m] h_{1:m} + b            h ∈ R^d hidden state, E ∈ R^{V×d}, b ∈ R^V
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.contrastive.matryoshka.head import nested_logits
from headgate.methods.contrastive.matryoshka.loss import MatryoshkaLoss
from headgate.methods.contrastive.matryoshka.sizes import check_dims
from headgate.validate import check_floating, check_integer, check_shape

__all__ = ["MatryoshkaMaskedLM"]


class MatryoshkaMaskedLM(nn.Module):
    """Vocabulary logits at every size, through the model's own token embedding.

    Args:
        vocabulary: the model's input embedding ``(tokens, dims[-1])``, whose matrix is shared; or a number of tokens,
            for a matrix of its own.
        dims: sizes in increasing order; the last one is the hidden size d.
        bias: add one bias per token, the same at every size; it starts at zero.
        weights: c_m of the loss; ``None`` is all 1.
        ignore_index: label of the positions that are not to be predicted.

    Raises:
        ValueError: ``dims`` is no nesting set, or its last size is not that of ``vocabulary``.
    """

    def __init__(
        self,
        vocabulary: nn.Embedding | int,
        dims: Sequence[int],
        *,
        bias: bool = True,
        weights: Sequence[float] | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.dims = check_dims(dims)
        if isinstance(vocabulary, int):
            vocabulary = nn.Embedding(vocabulary, self.dims[-1])
        if vocabulary.embedding_dim != self.dims[-1]:
            raise ValueError(
                f"dims must end with the embedding's size {vocabulary.embedding_dim}, got {list(self.dims)}"
            )
        self.vocabulary = vocabulary
        self.bias = nn.Parameter(vocabulary.weight.new_zeros(vocabulary.num_embeddings)) if bias else None
        self.criterion = MatryoshkaLoss(nn.CrossEntropyLoss(ignore_index=ignore_index), self.dims, weights)
        self.ignore_index = ignore_index

    def forward(self, hidden: Float[Tensor, "batch length dim"]) -> tuple[Float[Tensor, "batch length tokens"], ...]:
        """Compute the logits of every position at every size.

        Args:
            hidden: last hidden states, ``(batch, length, dims[-1])``.

        Returns:
            One tensor ``(batch, length, tokens)`` per size, in the order of ``dims``.

        Raises:
            TypeError: not floating, or of another dtype than the embedding.
            ValueError: another shape.
        """
        self._check(hidden)
        return nested_logits(hidden, self.vocabulary.weight, self.bias, self.dims)

    def loss(self, hidden: Float[Tensor, "batch length dim"], labels: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """The masked-language-modelling loss, summed over the sizes; logits are computed at labelled positions only.

        Args:
            hidden: last hidden states, ``(batch, length, dims[-1])``.
            labels: token ids, ``ignore_index`` where nothing is to be predicted.

        Returns:
            A scalar: per size the mean over the labelled positions (0 where there is none), then ``Σ c_m``.

        Raises:
            TypeError: ``hidden`` is not floating, or ``labels`` not integer.
            ValueError: shapes do not fit.
        """
        self._check(hidden)
        check_shape("labels", labels, hidden.shape[:2], "batch, length")
        check_integer("labels", labels)
        wanted = labels != self.ignore_index
        # Half of the cost of pre-training a small model is this projection, and some 85 % of the positions are unlabelled.
        logits = nested_logits(hidden[wanted], self.vocabulary.weight, self.bias, self.dims)
        if logits[0].shape[0] == 0:
            return torch.stack([entry.sum() for entry in logits]).sum()
        return self.criterion(logits, labels[wanted].long())

    def _check(self, hidden: Tensor) -> None:
        check_shape("hidden", hidden, (None, None, self.dims[-1]), "batch, length, dim")
        check_floating("hidden", hidden, like=self.vocabulary.weight.dtype)
