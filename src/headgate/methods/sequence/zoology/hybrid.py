"""Hybrids over depth: block l of a model uses mixer l mod n of a list (not a sum of mixers)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["HybridMixer"]


class HybridMixer(nn.Module):
    """The mixer of block ``layer`` out of a list that repeats over depth.

    ``HybridMixer([lambda: BaseConv(64, 256), lambda: Based(64)], layer)`` is a short convolution in even blocks and
    linear attention in odd ones. Only the chosen mixer is built.

    Args:
        mixers: functions without arguments that build a mixer each.
        layer: index of the block.
    """

    def __init__(self, mixers: Sequence[Callable[[], nn.Module]], layer: int) -> None:
        super().__init__()
        if not mixers:
            raise ValueError("mixers must hold at least one function that builds a mixer, got none")
        if layer < 0:
            raise ValueError(f"layer must be the block's index, 0 or more, got {layer}")
        self.mixer = mixers[layer % len(mixers)]()

    @property
    def needs_tokens(self) -> bool:
        """Whether ``forward`` needs the token ids."""
        return bool(getattr(self.mixer, "needs_tokens", False))

    @property
    def has_aux_loss(self) -> bool:
        """Whether ``forward`` knows ``return_aux``."""
        return bool(getattr(self.mixer, "has_aux_loss", False))

    def forward(self, x: Float[Tensor, "batch length dim"], **options: Any) -> Any:
        """What the chosen mixer makes of ``x`` ``(batch, length, dim)``."""
        return self.mixer(x, **options)

    def state_size(self, length: int) -> int | None:
        """What the chosen mixer says; ``None`` where it does not tell."""
        tell = getattr(self.mixer, "state_size", None)
        return tell(length) if callable(tell) else None
