"""Small training runs that several test files share, and that a subprocess can be told to make.

``python -m tests.train.runs '{"folder": …}'`` makes the run of :func:`small_run` and writes its history to
``<folder>/history-<process>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from headgate.train import History, epoch_batches, fit, make_optimizer, seeded, warmup_cosine

INPUTS, CLASSES, SIZE = 6, 3, 40


class NoisyPoints(Dataset[tuple[Tensor, Tensor]]):
    """Points with augmentation from PyTorch's global generator, as in a user's data set."""

    def __init__(self, noise: float = 0.1) -> None:
        self.points, self.labels = points()
        self.noise = noise

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index] + self.noise * torch.randn(INPUTS), self.labels[index]


def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SIZE, INPUTS, generator=generator)
    return inputs, inputs[:, :CLASSES].argmax(dim=1)


def small_model(dropout: float = 0.3, norm: bool = True) -> nn.Module:
    with seeded(11):
        return nn.Sequential(
            nn.Linear(INPUTS, 16),
            nn.BatchNorm1d(16) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, CLASSES),
        )


def small_batches(kind: str, batch_size: int = 8) -> Any:
    """Five batches an epoch: a function of the step, a list, or one of several data loaders."""
    inputs, labels = points()
    if kind == "function":
        return epoch_batches([inputs, labels], batch_size, seed=3)
    if kind == "list":
        return list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))
    if kind == "loader":
        return DataLoader(NoisyPoints(), batch_size, shuffle=True)
    if kind == "loader-generator":
        return DataLoader(NoisyPoints(), batch_size, shuffle=True, generator=torch.Generator().manual_seed(9))
    if kind == "loader-workers":
        return DataLoader(NoisyPoints(), batch_size, shuffle=True, num_workers=2)
    if kind == "loader-persistent":
        return DataLoader(NoisyPoints(noise=0.0), batch_size, shuffle=True, num_workers=1, persistent_workers=True)
    if kind == "loader-distributed":
        processes, process = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        sampler = DistributedSampler(NoisyPoints(), processes, process, shuffle=True, seed=1)
        return DataLoader(NoisyPoints(noise=0.0), batch_size, sampler=sampler)
    raise ValueError(kind)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch[0])
    return functional.cross_entropy(logits, batch[1]), {"accuracy": (logits.argmax(1) == batch[1]).float().mean()}


def accuracy(model: nn.Module, step: int) -> dict[str, float]:
    inputs, labels = points()
    return {"accuracy": (model(inputs).argmax(dim=1) == labels).float().mean().item()}


def small_run(
    batches: str = "function",
    optimizer: str = "adamw",
    steps: int = 24,
    model: nn.Module | None = None,
    given: Any = None,
    dropout: float = 0.3,
    norm: bool = True,
    batch_size: int = 8,
    slow: float = 0.0,
    **settings: Any,
) -> tuple[nn.Module, History]:
    """Train for ``steps`` steps with a schedule over 24 steps; ``slow`` seconds are spent in every loss."""
    model = model or small_model(dropout, norm)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(slow)
        return cross_entropy(model, batch)

    history = fit(
        model,
        given or small_batches(batches, batch_size),
        loss,
        steps=steps,
        optimizer=make_optimizer(model, optimizer, learning_rate=0.05, weight_decay=0.1),
        schedule=warmup_cosine(24, warmup=4),
        **{"seed": 2, "clip_norm": 1.0, **settings},
    )
    return model, history


def main() -> None:
    settings = json.loads(sys.argv[1])
    folder = Path(settings.pop("folder"))
    _stall_at(settings.pop("stall_at", None))
    _, history = small_run(checkpoints=folder / "checkpoints", log=folder / "log.jsonl", **settings)
    process = os.environ.get("RANK", "0")
    (folder / f"history-{process}.json").write_text(json.dumps({"losses": history.losses}))


def _stall_at(name: str | None) -> None:
    """Hold a checkpoint of this name back before it is moved into place, long enough to be killed there."""
    replace = os.replace

    def slow_replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            time.sleep(600)
        replace(source, target)

    os.replace = slow_replace


if __name__ == "__main__":
    main()
