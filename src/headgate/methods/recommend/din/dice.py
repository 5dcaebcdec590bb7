r"""Dice: an activation whose point of rectification follows the data (paper, Section 5.2, Equations 8 and 9).

Per channel, with mean and variance of the batch in training, and their moving averages in evaluation::

    p(s) = sigmoid((s - E[s]) / sqrt(Var[s] + ε))          f(s) = p(s) s + (1 - p(s)) α s

PReLU is the case of a hard p with its step at 0. At α = 0, where training begins, ``f(s) = s p(s)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_probability

__all__ = ["Activation", "Dice", "activate", "make_activation"]

Activation: TypeAlias = Literal["dice", "prelu", "relu", "sigmoid"] | Callable[[int], nn.Module]
"""The name of an activation, or a function from a number of channels (on the last axis) to a module."""


class Dice(nn.Module):
    """The data adaptive activation.

    Args:
        num_features: channels C.
        eps: ε, added to the variance.
        momentum: weight of a new batch in the moving averages, in [0, 1].
        affine: scale and shift the standardised input by two learned vectors, as DeepCTR-Torch does; the paper does not.
        channel_dim: the axis of the channels; all others are averaged over.

    Raises:
        ValueError: ``num_features`` or ``eps`` is not positive, or ``momentum`` lies outside [0, 1].
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-8,
        momentum: float = 0.1,
        affine: bool = False,
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        check_positive(num_features=num_features, eps=eps)
        check_probability(momentum=momentum)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.channel_dim = channel_dim
        self.alpha = nn.Parameter(torch.zeros(num_features))
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def reset_parameters(self) -> None:
        """Begin anew: α = 0, no scale or shift, moving averages of a standard distribution."""
        nn.init.zeros_(self.alpha)
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1.0)

    def forward(self, x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*rows"] | None = None) -> Float[Tensor, "*shape"]:
        """Activate.

        Args:
            x: any shape with ``num_features`` on the axis ``channel_dim`` and one axis more at least.
            mask: of the shape of ``x`` without its channels, True where ``x`` is real: in training, padding has no part
                in mean and variance. ``None`` counts everything, as published implementations do.

        Returns:
            Of the shape of ``x``.

        Raises:
            TypeError: ``x`` is not of the module's floating dtype, or ``mask`` not boolean.
            ValueError: another number of channels or shape of ``mask``; or, in training, fewer than two rows to average
                over. (Where values cannot be looked at, under ``torch.compile`` and on accelerators, a mask with a single
                row makes the moving averages NaN.)
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        axis = self.channel_dim
        if x.dim() < 2 or not -x.dim() <= axis < x.dim() or x.shape[axis] != self.num_features:
            raise ValueError(
                f"x must have {self.num_features} channels on axis {axis} and another axis, got {tuple(x.shape)}"
            )
        check_floating("x", x, self.alpha.dtype)
        channels_last = x.movedim(axis, -1)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool, got {mask.dtype}")
            if mask.shape != channels_last.shape[:-1]:
                raise ValueError(f"mask must have shape {tuple(channels_last.shape[:-1])}, got {tuple(mask.shape)}")
        # Statistics of half-precision inputs are taken in float32.
        rows = channels_last.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, variance = self._batch_statistics(rows.reshape(-1, self.num_features), mask)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = torch.rsqrt(variance.to(rows.dtype) + self.eps)
        shift = -mean.to(rows.dtype) * scale
        if self.weight is not None and self.bias is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        p = torch.sigmoid(torch.addcmul(shift, rows, scale))
        result = rows * (self.alpha + p * (1 - self.alpha))
        return result.to(x.dtype).movedim(-1, axis)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"

    def _batch_statistics(
        self, rows: Float[Tensor, "n channels"], mask: Bool[Tensor, "*rows"] | None
    ) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
        """Mean and variance of the batch, which also go into the moving averages."""
        count: Tensor | int
        if mask is None:
            count = rows.shape[0]
            _check_count(count)
            variance, mean = torch.var_mean(rows, dim=0, correction=0)
        else:
            weight = mask.reshape(-1, 1).to(rows.dtype)
            count = weight.sum()
            if not torch.compiler.is_compiling() and mask.device.type == "cpu":
                _check_count(int(count))
            mean = (rows * weight).sum(dim=0) / count
            variance = ((rows - mean).square() * weight).sum(dim=0) / count
        with torch.no_grad():
            for average, value in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                average.lerp_(value.to(average.dtype), self.momentum)
        return mean, variance


def make_activation(activation: Activation, width: int) -> nn.Module:
    """Build an activation for ``width`` channels on the last axis of a matrix.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a function.
    """
    if callable(activation):
        return activation(width)
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name or a function of the width, got {type(activation).__name__}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} or a function, got {activation!r}")
    return _ACTIVATIONS[activation](width)


def activate(layer: nn.Module, rows: Float[Tensor, "n width"], mask: Bool[Tensor, " n"] | None) -> Tensor:
    """Apply an activation to rows, of which Dice averages only those that are real."""
    result: Tensor = layer(rows, mask) if isinstance(layer, Dice) else layer(rows)
    return result


_ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "dice": Dice,
    "prelu": nn.PReLU,
    "relu": lambda width: nn.ReLU(),
    "sigmoid": lambda width: nn.Sigmoid(),
}


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"x must have at least 2 rows to average over in training, got {count}")
