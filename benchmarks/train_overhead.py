"""What `headgate.train.fit` costs over a loop written by hand, per step of a very small model.

The model is an MLP with two layers of 64 units (16 inputs, 8 classes), the batch has 32 entries, on one CPU thread: hardly
any work per step, so the loop itself weighs as much as it ever can. Both sides have the same fused AdamW, the same cosine
schedule set by hand, the same batches, and collect every loss without reading it inside the loop. They run in turns inside
one process; the figures are medians over the rounds, and the ratio is the median of the rounds' ratios.

    python benchmarks/train_overhead.py [--steps 1000] [--rounds 31]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from headgate.train import epoch_batches, fit, make_optimizer, seeded, warmup_cosine
from headgate.train.batches import EpochBatches

LIMIT = 1.10


def build() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def data() -> EpochBatches:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096, 16, generator=generator)
    return epoch_batches([inputs, inputs[:, :8].argmax(dim=1)], batch_size=32, seed=0)


def by_hand(steps: int) -> tuple[float, list[float]]:
    model, batches = build(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    began = time.perf_counter()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        inputs, target = batches(step)
        loss = functional.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()
    return time.perf_counter() - began, values


def by_fit(steps: int) -> tuple[float, list[float]]:
    model, batches = build(), data()
    optimizer = make_optimizer(model, learning_rate=1e-3, weight_decay=0.01, decay_norms_and_biases=True)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, target = batch
        return functional.cross_entropy(model(inputs), target)

    began = time.perf_counter()
    history = fit(model, batches, loss, steps=steps, optimizer=optimizer, schedule=warmup_cosine(steps))
    return time.perf_counter() - began, history.losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    by_hand(200), by_fit(200)
    sides = {"by hand": by_hand, "fit": by_fit}
    micros: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {}
    for turn in range(arguments.rounds):
        # Each side goes first in every other round.
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            seconds, losses[name] = sides[name](arguments.steps)
            micros[name].append(seconds / arguments.steps * 1e6)
    if losses["by hand"] != losses["fit"]:
        raise SystemExit("the two sides did different work: their losses differ")

    print(f"{arguments.rounds} rounds of {arguments.steps} steps, one thread, torch {torch.__version__}")
    print(f"{'':10}{'median':>12}{'fastest':>12}")
    for name, values in micros.items():
        print(f"{name:10}{statistics.median(values):9.1f} µs{min(values):9.1f} µs")
    ratio = statistics.median(b / a for a, b in zip(*micros.values(), strict=True))
    verdict = "within" if ratio <= LIMIT else "beyond"
    print(f"ratio {ratio:.3f}, {verdict} the limit of {LIMIT:.2f}")


if __name__ == "__main__":
    main()
