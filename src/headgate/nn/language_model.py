r"""A small pre-norm language model around any sequence mixer: the skeleton in which Zoology compares mixers.

With hidden state h, residual stream r and LN a layer norm, block l computes

.. math:: r \leftarrow r + \mathrm{drop}(h),\quad h \leftarrow \mathrm{mixer}_l(\mathrm{LN}(r)),\quad
          r \leftarrow r + \mathrm{drop}(h),\quad h \leftarrow \mathrm{state\_mixer}_l(\mathrm{LN}(r)),

and after the last block :math:`r \leftarrow r + h`, logits :math:`= E\,\mathrm{LN}(r)` with the tied embedding E.
Without a state mixer the second step is the identity, so each block also adds LN(r) to the residual stream; the
published numbers were made this way (Arora et al., arXiv 2312.04927).

**One interface for all mixers.** A mixer is a module that maps ``(batch, length, dim)`` to the same shape. It may
return a tuple whose first entry is that tensor (the layers of flash-linear-attention do). Three optional promises:

- ``state_size(length) -> int``: floats kept to go on after ``length`` tokens;
- ``needs_tokens = True``: ``forward`` takes the token ids as ``tokens=``;
- ``has_aux_loss = True``: ``forward`` takes ``return_aux=True`` and then returns ``(tensor, scalar)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.nn.drop_path import DropPath
from headgate.validate import check_integer, check_positive, check_probability, check_shape

__all__ = ["MixerBlock", "MixerLM", "MixerLMOutput"]


class MixerLMOutput(NamedTuple):
    """Logits, and the sum of what the mixers ask to be added to the loss (a scalar; zero where none asks)."""

    logits: Float[Tensor, "batch length vocab"]
    aux_loss: Float[Tensor, ""]


class MixerBlock(nn.Module):
    """One block of :class:`MixerLM`: a sequence mixer and a state mixer, each behind a layer norm.

    Args:
        dim: channels.
        mixer: maps ``(batch, length, dim)`` to the same shape, along the sequence.
        state_mixer: the same, token by token; ``None`` for the identity.
        first_dropout: dropout rate on what enters the block.
        dropout: dropout rate on what the mixer returns.
        drop_path: stochastic depth rate on both.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        state_mixer: nn.Module | None = None,
        first_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_probability(first_dropout=first_dropout, dropout=dropout)
        self.mixer = mixer
        self.state_mixer = nn.Identity() if state_mixer is None else state_mixer
        self.dropout1 = nn.Dropout(first_dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        hidden: Float[Tensor, "batch length dim"],
        residual: Float[Tensor, "batch length dim"] | None,
        tokens: Int[Tensor, "batch length"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block.

        Args:
            hidden: what the block before returned, not yet added to the residual stream.
            residual: the residual stream; ``None`` before the first block.
            tokens: the token ids, for mixers that look at them.

        Returns:
            The new hidden state, the new residual stream, and the mixer's auxiliary loss (a scalar).
        """
        dropped = self.drop_path(self.dropout1(hidden))
        residual = dropped if residual is None else residual + dropped
        hidden, aux_loss = _mix(self.mixer, self.norm1(residual), tokens)
        residual = residual + self.drop_path(self.dropout2(hidden))
        hidden, _ = _mix(self.state_mixer, self.norm2(residual), tokens)
        return hidden, residual, aux_loss


class MixerLM(nn.Module):
    """Embedding, blocks of a sequence mixer and a state mixer, and the tied output layer.

    Linear layers and embeddings, the mixers' included, start from N(0, 0.02) with zero biases; weights named
    ``out_proj`` or ``fc2``, which write into the residual stream, from N(0, 0.02 / √(2 · depth)). Everything else keeps
    the start that its own module gave it.

    Args:
        dim: channels of the residual stream.
        depth: number of blocks.
        vocab_size: number of token ids.
        mixer: called with the block's index 0 … depth - 1, returns its sequence mixer (see the module's docstring).
        state_mixer: called with the block's index, returns its state mixer; ``None`` for none.
        max_positions: longest sequence for learned positions; 0 for no positions.
        embedding_dropout: dropout rate on what enters the first block.
        dropout: dropout rate on what enters the other blocks, on what the mixers return, and before the last norm.
        drop_path: stochastic depth rate of the branches.
        norm_eps: ε of the last layer norm.
        learn_embedding: whether the token embedding is trained.
        vocab_multiple: ``vocab_size`` is rounded up to a multiple of this; the padding ids get logits too.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        vocab_size: int,
        mixer: Callable[[int], nn.Module],
        state_mixer: Callable[[int], nn.Module] | None = None,
        *,
        max_positions: int = 0,
        embedding_dropout: float = 0.1,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        learn_embedding: bool = True,
        vocab_multiple: int = 1,
    ) -> None:
        super().__init__()
        check_positive(dim=dim, depth=depth, vocab_size=vocab_size, vocab_multiple=vocab_multiple)
        if max_positions < 0:
            raise ValueError(f"max_positions must be 0 (no positions) or more, got {max_positions}")
        self.dim = dim
        self.depth = depth
        self.vocab_size = -(-vocab_size // vocab_multiple) * vocab_multiple
        self.max_positions = max_positions
        self.embedding = nn.Embedding(self.vocab_size, dim)
        self.embedding.weight.requires_grad_(learn_embedding)
        self.positions = nn.Embedding(max_positions, dim) if max_positions else None
        self.blocks = nn.ModuleList(
            MixerBlock(
                dim,
                mixer(index),
                None if state_mixer is None else state_mixer(index),
                first_dropout=embedding_dropout if index == 0 else dropout,
                dropout=dropout,
                drop_path=drop_path,
            )
            for index in range(depth)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self._init_weights()

    def forward(
        self, tokens: Int[Tensor, "batch length"], return_aux: bool = False
    ) -> Float[Tensor, "batch length vocab"] | MixerLMOutput:
        """Score every next token.

        Args:
            tokens: token ids ``(batch, length)`` in [0, vocab_size).
            return_aux: whether to return the mixers' auxiliary loss beside the logits, for training.

        Returns:
            Logits ``(batch, length, vocab_size)``; with ``return_aux`` a :class:`MixerLMOutput`.

        Raises:
            TypeError: ``tokens`` are no integers.
            ValueError: wrong shape, or a sequence longer than ``max_positions``.
        """
        hidden, aux_loss = self._features(tokens)
        logits = F.linear(hidden, self.embedding.weight)
        return MixerLMOutput(logits, aux_loss) if return_aux else logits

    def forward_features(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """The normed hidden state ``(batch, length, dim)`` that the logits are read from."""
        return self._features(tokens)[0]

    def state_size(self, length: int) -> int | None:
        """Floats kept to go on after ``length`` tokens, over all blocks; ``None`` where a mixer does not tell.

        A state mixer without ``state_size`` looks at one token alone and counts as zero.
        """
        total = 0
        for block in self.blocks:
            assert isinstance(block, MixerBlock)
            size = _state_size(block.mixer, length)
            if size is None:
                return None
            total += size + (_state_size(block.state_mixer, length) or 0)
        return total

    def _features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("tokens", tokens, (None, None), "batch, length")
        check_integer("tokens", tokens)
        hidden = self.embedding(tokens)
        if self.positions is not None:
            length = tokens.shape[1]
            if length > self.max_positions:
                raise ValueError(f"tokens must have length <= max_positions={self.max_positions}, got length={length}")
            hidden = hidden + self.positions(torch.arange(length, device=tokens.device))
        residual, total = None, hidden.new_zeros(())
        for block in self.blocks:
            hidden, residual, aux_loss = block(hidden, residual, tokens)
            total = total + aux_loss
        return self.norm(residual + self.dropout(hidden)), total

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.depth))


def _mix(mixer: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What ``mixer`` makes of ``x``, and its auxiliary loss."""
    options = {"tokens": tokens} if getattr(mixer, "needs_tokens", False) else {}
    if getattr(mixer, "has_aux_loss", False):
        hidden, aux_loss = mixer(x, return_aux=True, **options)
        return hidden, aux_loss
    output = mixer(x, **options)
    return (output[0] if isinstance(output, tuple) else output), x.new_zeros(())


def _state_size(mixer: nn.Module, length: int) -> int | None:
    tell = getattr(mixer, "state_size", None)
    if not callable(tell):
        return None
    size = tell(length)
    return None if size is None else int(size)
