"""The residual block of both backbones: it maps a feature map to one of equal shape."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.methods.vision.vig.layer import BidirectionalGLA
from headgate.methods.vision.vig.lean import advance, may_overwrite
from headgate.nn import DropPath

__all__ = ["ViGBlock", "drop_path_rates", "to_map", "to_tokens"]


class ViGBlock(nn.Module):
    """``x = x + drop(mixer(norm(x)))``, then ``x = x + drop(mlp(norm(x)))``.

    Args:
        mixer: mixes the tokens.
        mlp: maps every token by itself.
        norm: called with the number of channels, makes each of the two norms.
        drop_path: stochastic depth rate of both branches.
    """

    def __init__(
        self, mixer: BidirectionalGLA, mlp: SwiGLU, norm: Callable[[int], nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.mixer_norm = norm(mixer.dim)
        self.mixer = mixer
        self.mlp_norm = norm(mlp.dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def advance(self, features: Float[Tensor, "batch dim rows columns"], *, in_place: bool) -> Tensor:
        """:meth:`forward`; ``in_place`` allows it to write the result over ``features``, to save memory."""
        return advance(self, features, in_place=True) if in_place else self(features)

    def forward(self, features: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        """One block on a map ``(batch, dim, rows, columns)``; the result lies in channels-last order."""
        if may_overwrite(self, features):
            return advance(self, features, in_place=False)
        return self.by_modules(features)

    def by_modules(self, features: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        """:meth:`forward` part by part, which gradients, compilers and hooks see through."""
        grid = (features.shape[2], features.shape[3])
        x = to_tokens(features)
        x = x + self.drop_path(self.mixer(self.mixer_norm(x), grid))
        x = x + self.drop_path(self.mlp(self.mlp_norm(x)))
        return to_map(x, grid)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth rates that rise linearly from 0 in the first block to ``rate`` in the last one."""
    return [rate * index / max(1, depth - 1) for index in range(depth)]


def to_map(tokens: Float[Tensor, "batch length dim"], grid: tuple[int, int]) -> Float[Tensor, "batch dim rows columns"]:
    """Tokens in raster order as a feature map in channels-last order; nothing is copied."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(features: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch length dim"]:
    """A feature map as tokens in raster order; nothing is copied where it lies in channels-last order."""
    return features.permute(0, 2, 3, 1).flatten(1, 2)
