"""What ``headgate bench vig`` measures: ViG-T against DeiT-T, whole models over the image's size, and single blocks.

DeiT-T (Touvron et al., "Training data-efficient image transformers", arXiv 2012.12877) is a plain vision transformer of
the same width, depth and heads: patches of 16 pixels, 192 channels, 12 blocks, 3 heads, a class token.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.methods.vision.vig.vig import vig_tiny
from headgate.nn import deit_tiny
from headgate.timing import Contender, Floor, Plan, Results, Task, TaskResults, Workload

__all__ = ["QUICK", "Settings", "build_block", "build_model", "multiply_adds", "plan"]

_DIM, _HEADS, _PATCH = 192, 3, 16
_LARGE, _USUAL = 1024, 224
_TOKENS = (196, 784, 1764, 4096)
Relation = Literal["at least", "at most"]
_BLOCKS = {
    "vig": "ViG-T block",
    "deit": "DeiT-T block, fused attention",
    "explicit": "DeiT-T block, explicit attention",
}


@dataclass(frozen=True)
class Settings:
    """What a user may change.

    Attributes:
        image_sizes: sides of square images in pixels, multiples of 16.
        block_tokens: numbers of tokens that a single block gets, square numbers.
        batch: images.
        device: ``"cpu"``, or a GPU such as ``"cuda"``.
    """

    image_sizes: tuple[int, ...] = (224, 384, 512, 1024)
    block_tokens: tuple[int, ...] = _TOKENS
    batch: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for size in self.image_sizes:
            if size < _PATCH or size % _PATCH:
                raise ValueError(f"image_sizes must be multiples of {_PATCH} pixels, got {size}")
        for count in self.block_tokens:
            if count < 1 or math.isqrt(count) ** 2 != count:
                raise ValueError(f"block_tokens must be square numbers, got {count}")
        if self.batch < 1:
            raise ValueError(f"batch must be positive, got batch={self.batch}")


QUICK = Settings(image_sizes=(32, 64), block_tokens=(16, 64))


def plan(settings: Settings) -> Plan:
    """The benchmark: inference of the models, then single blocks with all sizes side by side."""
    sizes = tuple(sorted(set(settings.image_sizes)))
    tokens = tuple(sorted(set(settings.block_tokens)))
    common: dict[str, int | str] = {"batch": settings.batch, "device": settings.device}
    inference = Task(
        name="inference",
        label="inference",
        size_label="image size",
        sizes=sizes,
        contenders=(Contender("vig", "ViG-T"), Contender("deit", "DeiT-T, fused attention")),
        ours="vig",
        build=f"{__name__}:build_model",
        arguments=common,
        warm_up_size=32,
        memory_sizes=sizes,
        work=lambda size: settings.batch,
        work_unit="images",
        columns={
            "GMACs": lambda name, size: f"{multiply_adds(name, size) / 1e9:.2f}",
            "GMACs, paper's count": lambda name, size: f"{multiply_adds(name, size, as_paper=True) / 1e9:.2f}",
        },
    )

    def scores(count: int) -> float:
        return 2.2 * settings.batch * _HEADS * count**2 * 4

    block = Task(
        name="block",
        label="one block",
        size_label="tokens",
        sizes=tokens,
        contenders=tuple(
            Contender(name, label, needs=scores if name == "explicit" else None) for name, label in _BLOCKS.items()
        ),
        ours="vig",
        build=f"{__name__}:build_block",
        arguments=common,
        warm_up_size=16,
        memory_sizes=tokens,
        rounds_over="everything",
        work=lambda count: settings.batch * count,
        work_unit="tokens",
    )
    standard = common == {"batch": 1, "device": "cpu"}
    notes = [
        f"float32, {settings.batch} image{'s' * (settings.batch != 1)} at a time, on {settings.device}, random weights; "
        "peak memory does not hold the weights, which are there before the inputs.",
        "Fused attention is PyTorch's scaled_dot_product_attention; explicit attention writes out all N × N weights.",
        "GMACs are 10⁹ multiply-adds. The paper's count leaves out SwiGLU's output projection; DeiT's are counted in full in both columns.",
    ]
    if not standard:
        notes.append("The floors are stated for one image at a time on a CPU, so they are not judged here.")
    return Plan(
        title="ViG-T against DeiT-T: inference over the image's size",
        tasks=(inference, block),
        floors=lambda results: _floors(results) if standard else [],
        notes=tuple(notes),
        device=settings.device,
    )


def build_model(contender: str, size: int, *, batch: int = 1, device: str = "cpu") -> Workload:
    """Inference of a whole model on images of ``size`` × ``size`` pixels."""
    model = _model(contender, size).to(device)

    def inputs() -> tuple[Tensor, ...]:
        return (_normal(batch, 3, size, size).to(device),)

    return Workload(inputs, _inference(model), device)


def build_block(contender: str, size: int, *, batch: int = 1, device: str = "cpu") -> Workload:
    """Inference of one block on ``size`` tokens."""
    side = math.isqrt(size)
    options: dict[str, bool | int] = {"depth": 1, "img_size": _PATCH * side, "num_classes": 0}
    with _seeded():
        model = (
            vig_tiny(**options)
            if contender == "vig"
            else deit_tiny(**options, explicit_attention=contender == "explicit")
        )
    block = model.blocks[0].to(device).eval()

    def inputs() -> tuple[Tensor, ...]:
        tokens = _normal(batch, size, _DIM).to(device)
        # A map in channels-last order, as the block gets it within the model.
        return (tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2) if contender == "vig" else tokens,)

    return Workload(inputs, _inference(block), device)


@functools.cache
def multiply_adds(contender: str, size: int, as_paper: bool = False) -> int:
    """Multiply-adds of a model on one image of ``size`` × ``size`` pixels, counted operator by operator.

    Args:
        contender: ``"vig"`` or ``"deit"``.
        size: pixels.
        as_paper: leave out SwiGLU's output projection, which stood in a function that the paper's counter did not see.
    """
    with torch.device("meta"):
        model = _model(contender, size)
        images = torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(images)
    total = counter.get_total_flops() // 2
    if as_paper and contender == "vig":
        tokens = (size // _PATCH) ** 2
        total -= sum(tokens * mlp.hidden_dim * mlp.dim for mlp in model.modules() if isinstance(mlp, SwiGLU))
    return total


def _model(contender: str, size: int) -> nn.Module:
    with _seeded():
        model = (vig_tiny if contender == "vig" else deit_tiny)(img_size=size)
    return model.eval()


@contextmanager
def _seeded() -> Iterator[None]:
    """The same weights every time, and the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _inference(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def _floors(results: Results) -> list[Floor]:
    """The table of floors, each computed from this run, and the cost curve of single blocks."""
    inference, block = results.tasks["inference"], results.tasks["block"]
    return [
        _faster(inference, _LARGE, 4.0, "× faster"),
        _memory(inference, "vig", "deit", _LARGE, 0.5, "at most"),
        *_counts(),
        _faster(inference, _USUAL, 1.0, "× as fast"),
        _exponent(block, "vig", _TOKENS, 1.2, "at most"),
        _exponent(block, "explicit", _TOKENS[-2:], 1.6, "at least"),
        _memory(block, "explicit", "vig", _TOKENS[-1], 5.0, "at least"),
    ]


def _faster(task: TaskResults, size: int, limit: float, unit: str) -> Floor:
    ratio = task.ratio(("deit", size), ("vig", size))
    return Floor(
        name=f"time-{size}",
        statement=f"ViG-T at {size} × {size} against DeiT-T on PyTorch's fused attention, time of inference",
        value=None if ratio is None else ratio.median,
        limit=limit,
        relation="at least",
        unit=unit,
        reason="" if ratio else task.why_missing("vig", size) or task.why_missing("deit", size),
    )


def _memory(task: TaskResults, above: str, below: str, size: int, limit: float, relation: Relation) -> Floor:
    over, under = task.peak(above, size), task.peak(below, size)
    found = over is not None and under is not None
    return Floor(
        name=f"memory-{task.name}-{size}",
        statement=f"peak memory of {task.contenders[above]} over that of {task.contenders[below]}, "
        f"{task.label}, {task.size_label} {size}",
        value=over.peak_bytes / under.peak_bytes if over is not None and under is not None else None,
        limit=limit,
        relation=relation,
        reason="" if found else task.why_missing(above, size, "memory") or task.why_missing(below, size, "memory"),
    )


def _counts() -> list[Floor]:
    """The counts at 1024 × 1024 against the published ones."""
    deit = multiply_adds("deit", _LARGE)
    patches = 3 * _PATCH**2 * _DIM * (_LARGE // _PATCH) ** 2
    whole = f"{deit / 1e9:.1f} with it"
    counts = {
        "flops-full": ("ViG-T, all", multiply_adds("vig", _LARGE), 25.0, ""),
        "flops-paper": ("ViG-T, as the paper counted", multiply_adds("vig", _LARGE, as_paper=True), 20.2, ""),
        "flops-deit": ("DeiT-T, all but its patch embedding", deit - patches, 99.1, whole),
    }
    return [
        Floor(name, f"multiply-adds at {_LARGE} × {_LARGE}: {what}", count / 1e9, limit, "equals", "G", reason, 0.05)
        for name, (what, count, limit, reason) in counts.items()
    ]


def _exponent(task: TaskResults, name: str, sizes: tuple[int, ...], limit: float, relation: Relation) -> Floor:
    value = task.exponent(name, sizes)
    missing = next((reason for size in sizes if (reason := task.why_missing(name, size))), "")
    return Floor(
        name=f"exponent-{name}",
        statement=f"exponent of time in tokens, {task.contenders[name]}, from {sizes[0]} to {sizes[-1]}",
        value=value,
        limit=limit,
        relation=relation,
        unit="",
        reason="" if value is not None else missing,
    )
