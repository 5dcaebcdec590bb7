"""What a model keeps of the tokens it has read: one matrix per layer and head, however many tokens there were."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from headgate.ops.gated_linear_attention import GatedLinearAttentionState

__all__ = ["GLACache", "GLAState"]


class GLAState(NamedTuple):
    """What one layer keeps.

    Attributes:
        memory: S after the last token, ``(batch, heads, key, value)`` in float32 (float64 in a float64 model).
        recent: with short convolutions, the last ``conv_size - 1`` inputs of those of the queries, keys and values,
            each ``(batch, conv_size - 1, channels)``; else empty.
    """

    memory: Float[Tensor, "batch heads key value"]
    recent: tuple[Float[Tensor, "batch span channels"], ...] = ()


class GLACache:
    """The states of all layers of a model, updated in place by every call that is handed it.

    A new one is empty. A prompt is read in one call or in several, then token by token::

        cache = GLACache()
        model(prompt, cache=cache)
        logits = model(next_token, cache=cache)

    The states hang in the autograd graph when gradients are on. For truncated backpropagation through time, cut them
    off between the segments of a long text; this is how the paper trains on 24k tokens as 12 segments of 2k::

        cache = GLACache()
        for segment in text.split(2048, dim=1):
            loss = model(segment, labels=segment, cache=cache).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            cache.detach()

    It takes part in ``generate`` of transformers in the place of that library's caches.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def __len__(self) -> int:
        """The number of layers that have written to it."""
        return len(self._layers)

    def __getitem__(self, layer_idx: int) -> GLAState | None:
        """The state of a layer; ``None`` before its first token."""
        layer = self._layers.get(layer_idx)
        return None if layer is None else layer.state

    @property
    def batch_size(self) -> int | None:
        """The number of sequences; ``None`` while it is empty."""
        for layer in self._layers.values():
            return layer.state.memory.shape[0]
        return None

    @property
    def is_linear(self) -> list[bool]:
        """For ``generate``, which then takes a prompt together with the tokens that the cache has seen already."""
        return [False] * max(len(self._layers), 1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens a layer has seen per sequence, padding included; of packed sequences, all together."""
        layer = self._layers.get(layer_idx)
        return 0 if layer is None else layer.tokens

    def write(self, layer_idx: int, state: GLAState, tokens: int) -> None:
        """Replace a layer's state by the one after ``tokens`` more tokens, padding included."""
        self._layers[layer_idx] = _Layer(state, self.get_seq_length(layer_idx) + tokens)

    def step(
        self,
        layer_idx: int,
        q: Float[Tensor, "batch heads key"],
        k: Float[Tensor, "batch heads key"],
        v: Float[Tensor, "batch heads value"],
        log_gate: Float[Tensor, "batch heads key"],
        recent: tuple[Tensor, ...],
    ) -> Float[Tensor, "batch heads value"]:
        """Fade, write and read a layer's memory in place: one token, without gradients.

        Args:
            layer_idx: the layer; it must have a state.
            q: queries ``(batch, heads, key)``.
            k: keys, shaped like ``q``.
            v: values ``(batch, heads, value)``.
            log_gate: logarithm of the gates, shaped like ``q``.
            recent: the convolutions' inputs after this token.

        Returns:
            ``(batch, heads, value)``.
        """
        layer = self._layers[layer_idx]
        output = layer.decoder().step(q, k, v, log_gate)
        layer.recent = recent
        layer.tokens += 1
        return output

    def select(self, rows: Int[Tensor, " selected"]) -> GLACache:
        """A new cache with the states of some sequences, in the order of ``rows``, which may name one repeatedly."""
        chosen = GLACache()
        for layer_idx, layer in self._layers.items():
            chosen._layers[layer_idx] = layer.select(rows)
        return chosen

    def reorder_cache(self, beam_idx: Int[Tensor, " selected"]) -> None:
        """Replace the states by those of some sequences; beam search calls this."""
        self._layers = self.select(beam_idx)._layers

    def detach(self) -> None:
        """Cut the states off from the autograd graph: what comes later sends no gradient back to what came before."""
        for layer in self._layers.values():
            layer.memory = layer.memory.detach()
            layer.recent = tuple(part.detach() for part in layer.recent)

    def reset(self) -> None:
        """Forget everything."""
        self._layers.clear()


class _Layer:
    """The state of one layer, and the decoder that changes its memory in place once tokens come one at a time."""

    def __init__(self, state: GLAState, tokens: int) -> None:
        self.memory = state.memory
        self.recent = state.recent
        self.tokens = tokens
        self._decoder: GatedLinearAttentionState | None = None

    @property
    def state(self) -> GLAState:
        return GLAState(self.memory, self.recent)

    def decoder(self) -> GatedLinearAttentionState:
        if self._decoder is None or self._decoder.value is not self.memory:
            self._decoder = GatedLinearAttentionState(self.memory)
            self.memory = self._decoder.value
        return self._decoder

    def select(self, rows: Tensor) -> _Layer:
        rows = rows.to(self.memory.device)
        recent = tuple(part.index_select(0, rows) for part in self.recent)
        return _Layer(GLAState(self.memory.index_select(0, rows), recent), self.tokens)
