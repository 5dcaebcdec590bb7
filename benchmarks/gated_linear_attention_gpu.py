"""Gated linear attention on a GPU: the Triton backend beside its peers, side by side in one run.

    python benchmarks/gated_linear_attention_gpu.py [--lengths 2048 8192 32768] [--batch 4] [--heads 8] [--key 64]
                                                    [--value 128] [--dtype bfloat16] [--repeats 31]

It needs a GPU that Triton and PyTorch's CUDA (or ROCm) build can use, and says so where there is none. The peers are
flash-linear-attention's ``chunk_gla``, where the package ``fla`` can be imported, and PyTorch's causal
``scaled_dot_product_attention`` with the same queries, keys and values, which it gets in its own layout. Before anything is
timed, ours must agree with the chunkwise PyTorch form on the card, values and gradients; a length at which it does not
ends the run.

All sides take turns in every repeat; a figure is the median over the repeats, in milliseconds between two events on the
device, after two runs to compile and warm up. The second table holds the peak of the memory that a forward and backward
pass allocates beyond its inputs. Both are printed as Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from headgate.ops import gated_linear_attention

Run = Callable[[], object]
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
"""Largest root mean square of the deviations from the chunkwise form in float32, relative to its own."""

WARM_UPS = 2


def draw(batch: int, length: int, heads: int, key: int, value: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, log-gates as a fresh layer makes them, and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(channels: int) -> Tensor:
        return torch.randn(batch, length, heads, channels, generator=generator, device=device)

    log_gate = functional.logsigmoid(normal(key)) / 16
    return [x.to(dtype) for x in (normal(key), normal(key), normal(value), log_gate, normal(value))]


def ours(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    return gated_linear_attention(q, k, v, log_gate, backend="triton").output


def flash_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla

    output: Tensor = chunk_gla(q, k, v, log_gate)[0]
    return output


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def peers() -> dict[str, Callable[..., Tensor]]:
    sides: dict[str, Callable[..., Tensor]] = {"headgate": ours}
    if importlib.util.find_spec("fla") is not None:
        sides["flash-linear-attention"] = flash_linear_attention
    return sides | {"softmax attention": softmax_attention}


def agree(inputs: list[Tensor], dtype: str) -> None:
    """Compare ours with the chunkwise form in float32 on the same, already rounded numbers."""
    *tokens, doutput = inputs
    results = []
    for backend, wide in (("triton", False), ("chunk", True)):
        leaves = [(x.float() if wide else x).detach().requires_grad_() for x in tokens]
        output = gated_linear_attention(*leaves, backend=backend).output  # type: ignore[arg-type]
        results.append((output, *torch.autograd.grad(output, leaves, doutput.to(output.dtype))))
    for name, found, exact in zip(("output", "dq", "dk", "dv", "dlog_gate"), *results, strict=True):
        error = ((found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(
                f"{name} is off by {error:.1e} at length {doutput.shape[1]}, {dtype}; allowed are {TOLERANCE[dtype]:.0e}: "
                "nothing was timed"
            )


def passes(side: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Run]:
    """The forward pass alone, and forward with backward."""
    if side is softmax_attention:
        inputs = [x.transpose(1, 2).contiguous() for x in inputs]
    *tokens, doutput = inputs
    leaves = [x.detach().requires_grad_() for x in (tokens[:3] if side is softmax_attention else tokens)]

    def forward() -> object:
        with torch.no_grad():
            return side(*tokens)

    def both() -> object:
        output = side(*leaves, *tokens[len(leaves) :])
        return torch.autograd.grad(output, leaves, doutput)

    return {"forward": forward, "forward + backward": both}


def milliseconds(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def mebibytes(run: Run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(runs: dict[str, Run], repeats: int) -> dict[str, tuple[float, float] | None]:
    """Median time and peak memory of every run; ``None`` where the card's memory is too small."""
    memory: dict[str, float] = {}
    for name, run in runs.items():
        try:
            for _ in range(WARM_UPS):
                run()
            memory[name] = mebibytes(run)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in memory}
    for _ in range(repeats):
        for name, spent in times.items():
            spent.append(milliseconds(runs[name]))
    return {name: (statistics.median(times[name]), memory[name]) if name in memory else None for name in runs}


def table(title: str, sides: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = [f"**{title}**", "", f"| | {' | '.join(sides)} |", "|---|" + "---:|" * len(sides)]
    return "\n".join([*lines, *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key", type=int, default=64)
    parser.add_argument("--value", type=int, default=128)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "this benchmark needs a GPU, and torch.cuda finds none; `headgate bench gla` measures the other backends"
        )

    sides = peers()
    times: list[tuple[str, list[str]]] = []
    memory: list[tuple[str, list[str]]] = []
    for length in arguments.lengths:
        dtype = getattr(torch, arguments.dtype)
        sizes = (arguments.batch, length, arguments.heads, arguments.key, arguments.value)
        inputs = draw(*sizes, dtype, device="cuda")
        agree(inputs, arguments.dtype)
        runs = {name: passes(side, inputs) for name, side in sides.items()}
        for part in ("forward", "forward + backward"):
            found = measure({name: runs[name][part] for name in sides}, arguments.repeats)
            cells = ["out of memory" if x is None else f"{x[0]:.3f}" for x in found.values()]
            times.append((f"L = {length:,}, {part}", cells))
            if part == "forward + backward":
                cells = ["out of memory" if x is None else f"{x[1]:,.0f}" for x in found.values()]
                memory.append((f"L = {length:,}", cells))

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype},", end=" ")
    print(f"batch {arguments.batch}, {arguments.heads} heads, key {arguments.key}, value {arguments.value},", end=" ")
    print(f"medians of {arguments.repeats} repeats")
    if "flash-linear-attention" not in sides:
        print("\nflash-linear-attention is not installed and was left out.")
    print("\n" + table("Milliseconds", list(sides), times))
    print("\n" + table("Peak memory of forward + backward beyond the inputs, MiB", list(sides), memory))


if __name__ == "__main__":
    main()
