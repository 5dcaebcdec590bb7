"""Lag recall: say what the input was τ steps ago, for noise that tells nothing else.

    inputs   x_1 x_2 … x_L      independent normal numbers, one channel
    targets  x_{t-τ}            for the last steps t

Whoever hands information on from step to step must carry the last τ inputs along; one hop back suffices. Beside the
networks of the experiment stand two views into them: how far gradients reach, and which lags an answer listens to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.data import portable_normal, stream_generator
from headgate.methods.sequence.pgn.cell import PGN
from headgate.methods.sequence.pgn.history import past

__all__ = ["LagBatch", "OneHop", "RecallNet", "build_cell", "gradient_by_lag", "lag_batch", "response_by_lag"]


class LagBatch(NamedTuple):
    """Sequences and what to say about their last steps.

    Attributes:
        inputs: ``(batch, length, 1)``.
        targets: ``(batch, steps)``.
    """

    inputs: Float[Tensor, "batch length 1"]
    targets: Float[Tensor, "batch steps"]


class OneHop(nn.Module):
    """The linear map of all earlier steps alone: PGN without its gate.

    Args:
        hidden_size: outputs at each step.
        window: steps of a sequence.
    """

    def __init__(self, hidden_size: int, window: int) -> None:
        super().__init__()
        self.history = nn.Conv1d(1, hidden_size, window - 1)

    def forward(self, x: Float[Tensor, "batch window 1"]) -> Float[Tensor, "batch window hidden_size"]:
        """Map ``x`` ``(batch, window, 1)``."""
        return past(x.transpose(1, 2), self.history.weight, self.history.bias).transpose(1, 2)


class RecallNet(nn.Module):
    """A cell, and a linear read-out of its last steps.

    Args:
        arm: see :func:`build_cell`.
        hidden_size: of the cell.
        length: steps of a sequence.
        steps: how many of the last steps are read.
    """

    def __init__(self, arm: str, hidden_size: int, length: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.cell = build_cell(arm, hidden_size, length)
        self.read = nn.Linear(hidden_size, 1)

    def encode(self, x: Float[Tensor, "batch length 1"]) -> Float[Tensor, "batch length hidden_size"]:
        """The cell's outputs."""
        outputs = self.cell(x)
        return outputs[0] if isinstance(self.cell, nn.RNNBase) else outputs

    def forward(self, x: Float[Tensor, "batch length 1"]) -> Float[Tensor, "batch steps"]:
        """Answers ``(batch, steps)``."""
        return self.read(self.encode(x)[:, -self.steps :]).squeeze(2)


def build_cell(arm: str, hidden_size: int, length: int, short: int = 16) -> nn.Module:
    """The cell of an arm: ``pgn``, ``gru``, ``lstm``, ``truncated`` (PGN that sees ``short`` lags) or ``no_gate``."""
    if arm == "pgn":
        return PGN(1, hidden_size, length)
    if arm == "truncated":
        return PGN(1, hidden_size, length, lags=short)
    if arm == "no_gate":
        return OneHop(hidden_size, length)
    return {"gru": nn.GRU, "lstm": nn.LSTM}[arm](1, hidden_size, batch_first=True)


def lag_batch(batch_size: int, length: int, lag: int, steps: int, seed: int, stream: str, step: int = 0) -> LagBatch:
    """Draw sequences; the inputs depend on seed, stream and step alone, so that all lags see the same ones."""
    inputs = portable_normal((batch_size, length), stream_generator(seed, stream, step))
    return LagBatch(inputs[:, :, None], inputs[:, length - steps - lag : length - lag])


def gradient_by_lag(net: RecallNet, x: Float[Tensor, "batch length 1"]) -> Float[Tensor, " lags"]:
    """The size of ``∂ out_L / ∂ x_{L-τ}`` for τ = 1, 2, …: root of the sum over outputs of its squares, mean over ``x``."""
    x = x.clone().requires_grad_()
    squares = torch.zeros(x.shape[:2])
    for output in net.encode(x)[:, -1].sum(dim=0):
        squares += _gradient(output, x).square()
    return squares.sqrt().mean(dim=0).flip(0)[1:]


def response_by_lag(net: RecallNet, x: Float[Tensor, "batch length 1"]) -> Float[Tensor, " lags"]:
    """The size of ``∂ answer_L / ∂ x_{L-τ}`` for τ = 1, 2, …, mean over ``x``: 1 at the lag that is asked, else 0, if right."""
    x = x.clone().requires_grad_()
    return _gradient(net(x)[:, -1].sum(), x).abs().mean(dim=0).flip(0)[1:]


def _gradient(output: Float[Tensor, ""], x: Float[Tensor, "batch length 1"]) -> Float[Tensor, "batch length"]:
    (gradient,) = torch.autograd.grad(output, x, retain_graph=True)
    return gradient[..., 0]
