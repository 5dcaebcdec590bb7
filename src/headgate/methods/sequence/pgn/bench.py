"""What ``headgate bench pgn`` measures: PGN against PyTorch's GRU and LSTM of the same width, over the window's length.

Forward with backward, of the input and all weights. Nothing is judged: how far apart they are depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headgate.methods.sequence.pgn.cell import PGN
from headgate.methods.sequence.pgn.history import history_by_convolution, history_by_fft
from headgate.timing import Contender, Plan, Task, Workload

__all__ = ["QUICK", "Settings", "build", "plan"]

_CONTENDERS = (
    Contender("pgn", "PGN"),
    Contender("history_convolution", "PGN's history, one convolution", agrees="history"),
    Contender("history_fft", "PGN's history, FFT", agrees="history"),
    Contender("gru", "nn.GRU"),
    Contender("lstm", "nn.LSTM"),
)


@dataclass(frozen=True)
class Settings:
    """What a user may change.

    Attributes:
        lengths: steps of a window.
        batch: windows.
        input_size: values at each step.
        hidden_size: outputs at each step.
        device: ``"cpu"``, or a GPU such as ``"cuda"``.
    """

    lengths: tuple[int, ...] = (64, 256, 1024)
    batch: int = 32
    input_size: int = 1
    hidden_size: int = 32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths must be at least 2, got {self.lengths}")
        for name in ("batch", "input_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")


QUICK = Settings(lengths=(16, 32), batch=2)


def plan(settings: Settings) -> Plan:
    """The benchmark: all contenders at all lengths."""
    sizes = {"batch": settings.batch, "input_size": settings.input_size, "hidden_size": settings.hidden_size}
    lengths = tuple(sorted(set(settings.lengths)))
    task = Task(
        name="training",
        label="forward + backward",
        size_label="length",
        sizes=lengths,
        contenders=_CONTENDERS,
        ours="pgn",
        build=f"{__name__}:build",
        arguments={**sizes, "device": settings.device},
        warm_up_size=min(16, lengths[0]),
        memory_sizes=lengths[-1:],
        work=lambda length: settings.batch * length,
        work_unit="steps",
    )
    described = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items())
    return Plan(
        title=f"PGN over the length of the window ({described}, float32)",
        tasks=(task,),
        floors=lambda results: [],
        notes=("PGN's kernel grows with the window, the recurrent layers' weights do not.",),
        device=settings.device,
    )


def build(
    contender: str, size: int, *, batch: int = 32, input_size: int = 1, hidden_size: int = 32, device: str = "cpu"
) -> Workload:
    """The work of ``contender`` on windows of ``size`` steps: outputs, and the gradients of input and weights."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        call, weights = _layer(contender, size, input_size, hidden_size, device)

    def inputs() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, size, input_size, generator=generator).to(device).requires_grad_()
        return x, torch.randn(batch, size, hidden_size, generator=generator).to(device)

    def run(x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        output = call(x)
        return output.detach(), *torch.autograd.grad(output, (x, *weights), gradient)

    return Workload(inputs, run, device)


def _layer(
    contender: str, size: int, input_size: int, hidden_size: int, device: str
) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
    if contender in ("gru", "lstm"):
        kind = nn.GRU if contender == "gru" else nn.LSTM
        layer = kind(input_size, hidden_size, batch_first=True).to(device)
        return lambda x: layer(x)[0], tuple(layer.parameters())
    cell = PGN(input_size, hidden_size, size).to(device)
    if contender == "pgn":
        return cell, tuple(cell.parameters())
    path = {"history_convolution": history_by_convolution, "history_fft": history_by_fft}[contender]
    weight, bias = cell.history.weight, cell.history.bias
    return lambda x: path(x.transpose(1, 2), weight, bias).transpose(1, 2), (weight, *(() if bias is None else (bias,)))
