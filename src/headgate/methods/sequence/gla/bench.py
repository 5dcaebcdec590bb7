"""What ``headgate bench gla`` measures: the operator against its definition, against softmax attention, and against fla.

Forward, and forward with backward, over the length. All contenders get float32 inputs of the same sizes; the ones of
gated linear attention the same values, too, and their results are compared before they are timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.ops import gated_linear_attention, gated_linear_attention_backends
from headgate.timing import Contender, Floor, Plan, Results, Task, TaskResults, Workload

__all__ = ["QUICK", "Settings", "build", "plan"]

FORWARD, TRAINING = "forward", "training"
GROWTH = {FORWARD: "growth", TRAINING: "growth-training"}
_LABELS = {FORWARD: "forward", TRAINING: "forward + backward"}
_FLOPS = {FORWARD: 5, TRAINING: 17}
"""Per token, head, and entry of the state. Forward: fade 1, write 2, read 2. Backward: the state again 3, its gradient 3,
and 2 each for the gradients of queries, keys and values; that of the gates follows from them."""
_LONG = 4096
"""From this length on the growth and the arithmetic rate are judged."""


@dataclass(frozen=True)
class Settings:
    """What a user may change.

    Attributes:
        lengths: tokens.
        memory_lengths: those of the lengths at which peak memory is measured.
        backends: of ours; the reference loop takes part anyway.
        batch: sequences.
        heads: heads.
        key_dim: channels of queries, keys and gates in a head.
        value_dim: channels of values in a head.
        device: ``"cpu"``, or a GPU such as ``"cuda"``.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    memory_lengths: tuple[int, ...] = (4096, 16384, 65536)
    backends: tuple[str, ...] = ("native", "chunk")
    batch: int = 1
    heads: int = 4
    key_dim: int = 64
    value_dim: int = 128
    device: str = "cpu"

    def __post_init__(self) -> None:
        known = [name for name in gated_linear_attention_backends(self.device) if name != "reference"]
        for name in self.backends:
            if name not in known:
                raise ValueError(f"backends must be among {', '.join(known)}, got {name!r}")
        for name in ("lengths", "memory_lengths"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("batch", "heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {name}={getattr(self, name)}")


QUICK = Settings(lengths=(64, 128, 256), memory_lengths=(256,))


def plan(settings: Settings) -> Plan:
    """The benchmark: both tasks over all lengths, and ours alone over the lengths side by side."""
    lengths = tuple(sorted(set(settings.lengths)))
    backends = tuple(dict.fromkeys(settings.backends))
    ours = "native" if "native" in backends else backends[0]
    tasks = [_task(name, name, settings, lengths, _contenders(name, settings, backends), ours) for name in _LABELS]
    long = tuple(length for length in lengths if length >= _LONG)
    if len(long) > 1:
        for name in _LABELS:
            only = tuple(contender for contender in tasks[0].contenders if contender.name == ours)
            tasks.append(_task(GROWTH[name], name, settings, long, only, ours))
    standard = _sizes(settings) == _sizes(Settings())
    sizes = f"B={settings.batch}, H={settings.heads}, dk={settings.key_dim}, dv={settings.value_dim}"
    notes = [
        f"float32, {sizes}, on {settings.device}; arithmetic of forward: 5·dk·dv a token and head, of forward + backward: "
        "17·dk·dv (the recurrence, whatever a contender does)."
    ]
    if _splits(settings):
        notes.append(
            "PyTorch's fused attention on a CPU takes equal widths of keys and values alone; as called with these sizes "
            "it falls back to one that writes out all scores. The fused contender pads queries and keys with zeros."
        )
    if not standard:
        notes.append("The floors are stated for B=1, H=4, dk=64, dv=128 on a CPU, so they are not judged here.")
    return Plan(
        title=f"Gated linear attention over the length ({sizes}, float32)",
        tasks=tuple(tasks),
        floors=lambda results: _floors(results, ours, lengths, settings) if standard else [],
        notes=tuple(notes),
        device=settings.device,
    )


def build(
    contender: str,
    size: int,
    *,
    backward: bool,
    batch: int = 1,
    heads: int = 4,
    key_dim: int = 64,
    value_dim: int = 128,
    device: str = "cpu",
) -> Workload:
    """The work of ``contender`` at length ``size``: the operator, and its five tensors' gradients if ``backward``."""
    operator = _operator(contender)
    heads_first = contender.startswith("sdpa")

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)

        def normal(width: int) -> Tensor:
            return torch.randn(batch, size, heads, width, generator=generator)

        q, k, v = normal(key_dim), normal(key_dim), normal(value_dim)
        log_gate = F.logsigmoid(normal(key_dim)) / 16
        tensors = [q, k, v, normal(value_dim)] if heads_first else [q, k, v, log_gate, normal(value_dim)]
        if heads_first:
            tensors = [tensor.transpose(1, 2).contiguous() for tensor in tensors]
        *leaves, gradient = (tensor.to(device) for tensor in tensors)
        if not backward:
            return tuple(leaves)
        return (*(leaf.requires_grad_() for leaf in leaves), gradient)

    def forward(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return operator(*tensors)

    def training(*tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, gradient = tensors
        output = operator(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, gradient)

    return Workload(inputs, training if backward else forward, device)


def _operator(contender: str) -> Callable[..., Tensor]:
    """Tensors → output."""
    if contender == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if contender == "sdpa_fused":
        return _padded_attention
    if contender == "autograd":
        from headgate.ops.gated_linear_attention.chunkwise import recurrence_chunkwise_autograd

        return lambda q, k, v, log_gate: recurrence_chunkwise_autograd(q, k, v, log_gate, q.shape[-1] ** -0.5)[0]
    if contender == "fla":
        from fla.ops.gla import chunk_gla

        return lambda q, k, v, log_gate: chunk_gla(q, k, v, log_gate)[0]
    backend: Any = contender
    return lambda q, k, v, log_gate: gated_linear_attention(q, k, v, log_gate, backend=backend).output


def _padded_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention in PyTorch's fused kernel: zeros in queries and keys change no score."""
    width = max(q.shape[-1], v.shape[-1])
    wide_q, wide_k, wide_v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    output = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True, scale=q.shape[-1] ** -0.5)
    return output[..., : v.shape[-1]]


def _splits(settings: Settings) -> bool:
    """Whether PyTorch's fused kernel does not take these sizes as they are."""
    return settings.device == "cpu" and settings.key_dim != settings.value_dim


def _contenders(name: str, settings: Settings, backends: Sequence[str]) -> tuple[Contender, ...]:
    pairs = settings.batch * settings.heads
    state = pairs * settings.key_dim * settings.value_dim * 4
    matrices = {FORWARD: 2.5, TRAINING: 3.1}[name]
    reasons = gated_linear_attention_backends(settings.device)

    def scores(length: int) -> float:
        """Bytes of the scores of all pairs of tokens; what each contender makes of them is measured."""
        return pairs * length**2 * 4.0

    found = [
        Contender(
            backend,
            f"Headgate, {backend}",
            unavailable=reasons[backend],
            needs=(lambda length: 5 * settings.key_dim * scores(length)) if backend == "parallel" else None,
            agrees="gla",
        )
        for backend in backends
    ]
    # Autograd through the loop keeps every state.
    kept = (lambda length: 1.25 * length * state) if name == TRAINING else None
    found.append(Contender("reference", "reference loop", needs=kept, agrees="gla"))
    if name == TRAINING:
        found.append(Contender("autograd", "chunkwise, autograd", agrees="gla"))
    unfused = _splits(settings)
    label = "SDPA causal, as called" if unfused else "SDPA causal"
    found.append(
        Contender(
            "sdpa", label, needs=(lambda length: matrices * scores(length)) if unfused else None, agrees="softmax"
        )
    )
    if unfused:
        found.append(Contender("sdpa_fused", "SDPA causal, fused", agrees="softmax"))
    found.append(Contender("fla", "flash-linear-attention", unavailable=_no_fla(settings.device), agrees="gla"))
    return tuple(found)


def _no_fla(device: str) -> str:
    if device == "cpu":
        return "its kernels are written in Triton, for GPUs; on a CPU it can be imported, not used"
    return "" if importlib.util.find_spec("fla") else "the package flash-linear-attention is not installed"


def _task(
    key: str, name: str, settings: Settings, lengths: tuple[int, ...], contenders: tuple[Contender, ...], ours: str
) -> Task:
    grows = key != name
    shape = settings.batch * settings.heads * settings.key_dim * settings.value_dim
    return Task(
        name=key,
        label=f"{_LABELS[name]}, the lengths side by side" if grows else _LABELS[name],
        size_label="length",
        sizes=lengths,
        contenders=contenders,
        ours=ours,
        build=f"{__name__}:build",
        arguments={"backward": name == TRAINING, **_sizes(settings)},
        warm_up_size=64,
        memory_sizes=() if grows else tuple(length for length in lengths if length in settings.memory_lengths),
        rounds_over="everything" if grows else "contenders",
        work=lambda length: settings.batch * length,
        work_unit="tokens",
        arithmetic=lambda length: _FLOPS[name] * shape * length,
        drawn=not grows,
    )


def _sizes(settings: Settings) -> dict[str, int | str]:
    names = ("batch", "heads", "key_dim", "value_dim", "device")
    return {name: getattr(settings, name) for name in names}


def _floors(results: Results, ours: str, lengths: Sequence[int], settings: Settings) -> list[Floor]:
    """The table of floors, each computed from this run."""
    forward, training = results.tasks[FORWARD], results.tasks[TRAINING]
    floors = [_faster(forward, "reference", ours, 4096, 60)]
    for task, limits in ((forward, {4096: 5, 16384: 25}), (training, {4096: 4, 16384: 20})):
        if task is training:
            floors.append(_faster(training, "autograd", ours, 4096, 5))
        for rival in [name for name in ("sdpa", "sdpa_fused") if name in task.contenders]:
            floors += [_faster(task, rival, ours, length, limit) for length, limit in limits.items()]
    floors.append(_rate(forward, ours, results.sgemm, lengths))
    floors.append(_memory(training, ours))
    floors += [_growth(results, name, ours, lengths) for name in _LABELS]
    return floors


def _faster(task: TaskResults, rival: str, ours: str, length: int, limit: float) -> Floor:
    ratio = task.ratio((rival, length), (ours, length))
    missing = task.why_missing(ours, length) or task.why_missing(rival, length)
    return Floor(
        name=f"{task.name}-{rival}-{length}",
        statement=f"{task.label}, L={length}, against {task.contenders[rival]}",
        value=None if ratio is None else ratio.median,
        limit=limit,
        relation="at least",
        unit="× faster",
        reason="" if ratio else missing,
    )


def _rate(task: TaskResults, ours: str, sgemm: float, lengths: Sequence[int]) -> Floor:
    """The worst of the long lengths."""
    times = {length: task.seconds(ours, length) for length in lengths if length >= _LONG}
    rates = {length: task.arithmetic[length] / t / sgemm for length, t in times.items() if t is not None}
    worst = min(rates, key=lambda length: rates[length], default=None)
    return Floor(
        name="arithmetic-rate",
        statement="forward arithmetic rate (5·dk·dv a token and head) over sgemm in this run, worst from L=4096 on",
        value=None if worst is None else rates[worst],
        limit=0.5,
        relation="at least",
        unit="",
        reason="no length from 4096 on was measured" if worst is None else f"at L={worst}",
    )


def _memory(task: TaskResults, ours: str) -> Floor:
    """The worst of the long lengths: at short ones the resolution of the measurement counts."""
    ratios = {size: peak.ratio for name, size, peak in task.peaks if name == ours and size >= _LONG}
    worst = max(ratios, key=lambda length: ratios[length], default=None)
    return Floor(
        name="memory",
        statement="peak memory of forward + backward over inputs, outputs and their gradients",
        value=None if worst is None else ratios[worst],
        limit=2.5,
        relation="at most",
        reason="not measured from L=4096 on" if worst is None else f"worst at L={worst}",
    )


def _growth(results: Results, name: str, ours: str, lengths: Sequence[int]) -> Floor:
    """The worst doubling, each a median of the rounds' ratios."""
    task = results.tasks.get(GROWTH[name])
    found: dict[int, float] = {}
    for length in lengths:
        ratio = None if task is None else task.ratio((ours, 2 * length), (ours, length))
        if ratio is not None:
            found[length] = ratio.median
    worst = max(found, key=lambda length: found[length], default=None)
    return Floor(
        name=GROWTH[name],
        statement=f"time(2L) / time(L), {_LABELS[name]}, from 4k to 64k",
        value=None if worst is None else found[worst],
        limit=2.15,
        relation="at most",
        reason="no two lengths L and 2L from 4096 on" if worst is None else f"worst from {worst} to {2 * worst}",
    )
