"""The backbone of the language models: token embedding, blocks, final norm. It needs no positions: the gates tell time.

(Yang et al., arXiv 2312.06635, section 4.4.) With an output layer, ``generate`` and checkpoints in the form that
transformers reads, it is :class:`GLAForCausalLM`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.sequence.gla.block import GLABlock
from headgate.methods.sequence.gla.cache import GLACache
from headgate.methods.sequence.gla.initialization import initialize
from headgate.methods.sequence.gla.padding import read_padding
from headgate.nn import RMSNorm
from headgate.validate import check_floating, check_integer, check_positive, check_shape

__all__ = ["GLAModel", "GLAModelOutput"]


class GLAModelOutput(NamedTuple):
    """The features, and what enters every block, the features themselves last (empty unless asked for)."""

    features: Float[Tensor, "batch length dim"]
    hidden_states: tuple[Float[Tensor, "batch length dim"], ...]


class GLAModel(nn.Module):
    """Gated linear attention language model without its output layer.

    Args:
        vocab_size: number of token ids.
        dim: channels of the residual stream.
        depth: number of blocks.
        num_heads: heads.
        hidden_dim: width of the SwiGLU; default ``256 · ceil(⌊8 dim / 3⌋ / 256)``.
        norm_eps: ε of all norms.
        padding_idx: id whose embedding gets no gradient; ``None`` for none.
        **attention: further keywords of :class:`GatedLinearAttention`, for all blocks.

    Raises:
        ValueError: a number is not positive, or an option of the layer is not on offer.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        dim: int = 1024,
        depth: int = 24,
        num_heads: int = 4,
        hidden_dim: int | None = None,
        *,
        norm_eps: float = 1e-6,
        padding_idx: int | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        check_positive(vocab_size=vocab_size, dim=dim, depth=depth)
        self.dim = dim
        self.depth = depth
        self.embeddings = nn.Embedding(vocab_size, dim, padding_idx)
        self.layers = nn.ModuleList(
            GLABlock(dim, num_heads, hidden_dim, norm_eps, layer_idx=index, **attention) for index in range(depth)
        )
        self.norm = RMSNorm(dim, eps=norm_eps)
        initialize(self.embeddings)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights anew.

        Args:
            std: standard deviation of linear layers and embeddings.
        """
        self.apply(functools.partial(initialize, std=std))

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        cache: GLACache | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """The normed features of every token.

        Args:
            tokens: token ids ``(batch, length)``.
            attention_mask: 1 (or true) at real tokens and 0 at padding, ``(batch, length)``; padding is removed before
                the first block. With a cache, columns for the tokens before may stand in front.
            cache: the states of the sequences, read and updated in place.
            cu_seqlens: ``(sequences + 1,)`` rising boundaries of sequences packed in one batch row, in place of a mask.

        Returns:
            ``(batch, length, dim)``; zeros at padding.

        Raises:
            TypeError: ``tokens`` are no integers.
            ValueError: wrong shape or mask, no tokens, or a cache of another batch.
        """
        check_shape("tokens", tokens, (None, None), "batch, length")
        check_integer("tokens", tokens)
        return self.encode(self.embeddings(tokens), attention_mask, cache, cu_seqlens).features

    def encode(
        self,
        inputs_embeds: Float[Tensor, "batch length dim"],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        cache: GLACache | None = None,
        cu_seqlens: Int[Tensor, " sequences_plus_one"] | None = None,
        *,
        return_hidden_states: bool = False,
    ) -> GLAModelOutput:
        """The same from embedded tokens, with what stands between the blocks.

        Args:
            inputs_embeds: ``(batch, length, dim)``.
            attention_mask: as in :meth:`forward`.
            cache: as in :meth:`forward`.
            cu_seqlens: as in :meth:`forward`.
            return_hidden_states: whether to return what enters every block.
        """
        check_shape("inputs_embeds", inputs_embeds, (None, None, self.dim), "batch, length, dim")
        check_floating("inputs_embeds", inputs_embeds, like=self.norm.weight.dtype)
        if inputs_embeds.shape[1] == 0:
            raise ValueError(f"tokens must hold at least one per sequence, got {tuple(inputs_embeds.shape[:2])}")
        padding, packing = read_padding(inputs_embeds, attention_mask, cu_seqlens, continued=cache is not None)
        hidden = inputs_embeds if padding is None else padding.pack(inputs_embeds)
        entering = []
        for block in self._blocks():
            if return_hidden_states:
                entering.append(hidden)
            if block.gradient_checkpointing and self.training and torch.is_grad_enabled():
                hidden = block.recomputed(hidden, cache, packing)
            else:
                hidden = block(hidden, cache=cache, packing=packing)
        states = [*entering, self.norm(hidden)]
        if padding is not None:
            states = [padding.unpack(state) for state in states]
        return GLAModelOutput(states[-1], tuple(states) if return_hidden_states else ())

    def set_gradient_checkpointing(self, enable: bool = True, every: int = 1) -> None:
        """Compute the insides of blocks a second time in the backward pass, in place of keeping them, or stop doing so.

        Args:
            enable: whether to do so.
            every: of which blocks: every one, every second one …
        """
        check_positive(every=every)
        for index, block in enumerate(self._blocks()):
            block.gradient_checkpointing = enable and index % every == 0

    def state_size(self, length: int) -> int:
        """Floats kept to go on after ``length`` tokens, over all blocks."""
        return sum(block.state_size(length) for block in self._blocks())

    def _blocks(self) -> list[GLABlock]:
        return [block for block in self.layers if isinstance(block, GLABlock)]
