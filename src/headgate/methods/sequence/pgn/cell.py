r"""PGN, the parallel gated network: a gated layer that sees all earlier steps at once (arXiv 2409.17703).

.. math::
    H_t &= W_{hie}\,[x_{t-L+1}; …; x_{t-1}] + b_{hie} \\
    G_t &= \sigma(W_g\,[x_t; H_t] + b_g) \\
    \hat H_t &= \tanh(W_h\,[x_t; H_t] + b_h) \\
    out_t &= G_t \odot H_t + (1 - G_t) \odot \hat H_t

Where a recurrent layer hands information on from step to step, one hop leads from every earlier step to every later one,
and all steps are computed at once. Nothing of the output is fed back.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.sequence.pgn.checks import check_finite
from headgate.methods.sequence.pgn.history import past
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["PGN"]


class PGN(nn.Module):
    """A layer in the place of a GRU, for windows of a fixed length; batch first.

    Weights start as PyTorch's convolutions do.

    Args:
        input_size: values at each step.
        hidden_size: outputs at each step.
        window: steps of a window, L ≥ 2.
        extra_features: further values at each step that all groups see, such as time marks.
        groups: values and outputs are cut into so many groups of neighbours, each with its own weights, which see
            themselves and the extra features alone.
        lags: how many steps back the layer sees; default all, ``window - 1``. From 511 lags on it uses the FFT.

    Raises:
        ValueError: a size out of range, or groups that do not divide both sizes.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        window: int,
        extra_features: int = 0,
        groups: int = 1,
        *,
        lags: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(input_size=input_size, hidden_size=hidden_size, groups=groups)
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        if extra_features < 0:
            raise ValueError(f"extra_features must not be negative, got {extra_features}")
        check_divides(groups=groups, input_size=input_size)
        check_divides(groups=groups, hidden_size=hidden_size)
        lags = window - 1 if lags is None else lags
        if not 1 <= lags < window:
            raise ValueError(f"lags must lie in [1, {window - 1}] for window={window}, got {lags}")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.window = window
        self.extra_features = extra_features
        self.groups = groups
        self.lags = lags
        features = input_size + groups * extra_features
        self.history = nn.Conv1d(features, hidden_size, lags, groups=groups)  # W_hie
        self.gate = nn.Conv1d(features + hidden_size, 2 * hidden_size, 1, groups=groups)  # per group [W_g; W_h]

    def forward(
        self,
        x: Float[Tensor, "batch window input_size"],
        marks: Float[Tensor, "batch window extra_features"] | None = None,
    ) -> Float[Tensor, "batch window hidden_size"]:
        """Encode windows.

        Args:
            x: values ``(batch, window, input_size)``, finite.
            marks: extra features ``(batch, window, extra_features)``, finite; needed where the layer has any.

        Returns:
            ``(batch, window, hidden_size)``; step t depends on the steps up to t alone.

        Raises:
            TypeError: an argument is not of the module's floating dtype.
            ValueError: a wrong shape, marks that are missing or not expected, or a value that is not finite (looked at
                outside ``torch.compile`` and ``torch.export``).
        """
        features = self._features(x, marks)
        history = self._past(features)
        both = torch.cat([features, history.unflatten(1, (self.groups, -1))], dim=2).flatten(1, 2)
        gate, candidate = self.gate(both).unflatten(1, (self.groups, 2, -1)).unbind(dim=2)
        gate, candidate = torch.sigmoid(gate).flatten(1, 2), torch.tanh(candidate).flatten(1, 2)
        return (gate * history + (1 - gate) * candidate).transpose(1, 2)

    def extract_history(
        self,
        x: Float[Tensor, "batch window input_size"],
        marks: Float[Tensor, "batch window extra_features"] | None = None,
    ) -> Float[Tensor, "batch window hidden_size"]:
        """Give H alone, before the gate; arguments and errors as for :meth:`forward`.

        Returns:
            ``(batch, window, hidden_size)``; step t depends on the steps before t alone, the first is the bias.
        """
        return self._past(self._features(x, marks)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        parts = [f"{self.input_size}, {self.hidden_size}, window={self.window}, lags={self.lags}"]
        parts += [f"extra_features={self.extra_features}"] * bool(self.extra_features)
        parts += [f"groups={self.groups}"] * (self.groups > 1)
        return ", ".join(parts)

    def _past(self, features: Float[Tensor, "batch groups group_features window"]) -> Tensor:
        return past(features.flatten(1, 2), self.history.weight, self.history.bias, self.groups)

    def _features(self, x: Tensor, marks: Tensor | None) -> Float[Tensor, "batch groups group_features window"]:
        """Check the input; each group's values, then the extra features."""
        dtype = self.gate.weight.dtype
        check_shape("x", x, (None, self.window, self.input_size), "batch, window, input_size")
        check_floating("x", x, like=dtype)
        check_finite("x", x)
        features = x.transpose(1, 2).unflatten(1, (self.groups, -1))
        if marks is None:
            if self.extra_features:
                raise ValueError(
                    f"marks must be given, of shape (batch, window, extra_features={self.extra_features}), got None"
                )
            return features
        check_shape("marks", marks, (x.shape[0], self.window, self.extra_features), "batch, window, extra_features")
        check_floating("marks", marks, like=dtype)
        check_finite("marks", marks)
        shared = marks.transpose(1, 2)[:, None].expand(-1, self.groups, -1, -1)
        return torch.cat([features, shared], dim=2)
