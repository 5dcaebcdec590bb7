"""One call that judges features by several tasks over several seeds, and a report to keep."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from headgate.evaluate.checks import as_labels, as_seed
from headgate.evaluate.controls import probe_controls
from headgate.evaluate.features import Features, Split
from headgate.evaluate.knn import knn_probe
from headgate.evaluate.low_data import few_shot
from headgate.evaluate.probes import linear_probe, mlp_probe, ridge_classifier_probe, svm_probe
from headgate.evaluate.rank import effective_rank
from headgate.evaluate.retrieval import retrieval_report
from headgate.evaluate.statistics import MIN_SEEDS, Summary, summarize
from headgate.files import write_text

__all__ = ["TASKS", "Report", "Task", "evaluate"]

Task: TypeAlias = Callable[[Features, Split, int], Mapping[str, float]]


@dataclass(frozen=True)
class Report(Mapping[str, Summary]):
    """Metric → mean, standard deviation, number and interval over seeds; a read-only dictionary.

    Attributes:
        metrics: metric → summary.
        per_seed: metric → one value per seed.
        seeds: the seeds.
        meta: what was judged: number of items, width, and the features' own record.
    """

    metrics: dict[str, Summary]
    per_seed: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]
    meta: dict[str, Any]

    def __getitem__(self, name: str) -> Summary:
        return self.metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def to_json(self) -> str:
        """Return the report as JSON; numbers that are undefined become null."""
        metrics = {
            name: {
                "mean": _or_null(summary.mean),
                "std": _or_null(summary.std),
                "n": summary.n,
                "low": _or_null(summary.low),
                "high": _or_null(summary.high),
                "values": [_or_null(value) for value in self.per_seed[name]],
            }
            for name, summary in self.metrics.items()
        }
        return json.dumps({"meta": self.meta, "seeds": list(self.seeds), "metrics": metrics}, indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """Return the report as a table in Markdown."""
        lines = ["| metric | mean | std | n | 95% interval |", "|---|---:|---:|---:|---|"]
        for name, summary in self.metrics.items():
            interval = f"[{summary.low:.4g}, {summary.high:.4g}]" if math.isfinite(summary.low) else "–"
            std = f"{summary.std:.2g}" if math.isfinite(summary.std) else "–"
            lines.append(f"| {name} | {summary.mean:.4g} | {std} | {summary.n} | {interval} |")
        if len(self.seeds) < MIN_SEEDS:
            lines += ["", f"Fewer than {MIN_SEEDS} seeds: too few for a claim."]
        return "\n".join(lines) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report whole or not at all: Markdown where the name ends in ``.md``, else JSON.

        Raises:
            HeadgateError: the file cannot be written.
        """
        markdown = os.fspath(path).endswith(".md")
        write_text(path, self.to_markdown() if markdown else self.to_json() + "\n")


def evaluate(
    features: Features,
    tasks: Sequence[str | Task] = ("linear", "knn"),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    split: Split | None = None,
) -> Report:
    """Judge features by every task with every seed.

    Args:
        features: with integer labels.
        tasks: names of :data:`TASKS`, or functions ``task(features, split, seed)`` that return metric → value.
        seeds: different integers; a claim needs at least three. Without ``split`` a seed also draws the split.
        split: rows to fit, to choose and to test on; default :meth:`Split.random` by seed. With a fixed split a task
            that draws nothing gives one number for all seeds, and the standard deviation says nothing about the data.

    Returns:
        The report. A metric that is undefined for a seed (nan) is undefined in the summary.

    Raises:
        ValueError: no labels, no task or seed, an unknown task, or two tasks with one metric.
    """
    if features.y is None:
        raise ValueError("features must carry labels to be judged, got y=None")
    labels = as_labels("features.y", features.y)
    numbers = [as_seed("seeds", seed) for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must be different integers, at least one, got {list(seeds)}")
    if len(tasks) == 0:
        raise ValueError(f"tasks must name at least one of {', '.join(TASKS)}, got none")
    functions = [_task(task) for task in tasks]
    values: dict[str, list[float]] = {}
    for done, seed in enumerate(numbers):
        rows = Split.random(labels, seed=seed) if split is None else split
        found: dict[str, float] = {}
        for function in functions:
            for name, value in function(features, rows, seed).items():
                if name in found:
                    raise ValueError(f"tasks must not share metrics, got {name!r} twice")
                found[name] = float(value)
        if done and set(found) != set(values):
            raise ValueError(
                f"tasks must return the same metrics for every seed, got {sorted(set(found) ^ set(values))}"
            )
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return Report(
        metrics={name: _summary(per_seed) for name, per_seed in values.items()},
        per_seed={name: tuple(per_seed) for name, per_seed in values.items()},
        seeds=tuple(numbers),
        meta={"items": len(features), "shape": list(features.X.shape[1:]), "features": dict(features.meta)},
    )


def _linear(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    result = linear_probe(features.X, _labels(features), split, seed=seed)
    return {"linear/accuracy": result.accuracy, "linear/mean_per_class": result.mean_per_class}


def _svm(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    result = svm_probe(features.X, _labels(features), split, seed=seed)
    return {"svm/accuracy": result.accuracy, "svm/mean_per_class": result.mean_per_class}


def _ridge(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    result = ridge_classifier_probe(features.X, _labels(features), split)
    return {"ridge/accuracy": result.accuracy, "ridge/mean_per_class": result.mean_per_class}


def _mlp(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    result = mlp_probe(features.X, _labels(features), split, seed=seed)
    return {"mlp/accuracy": result.mlp.accuracy, "mlp/gain_over_linear": result.gain}


def _knn(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    result = knn_probe(features.X, _labels(features), split, k=min(20, len(split.train)))
    return {"knn/accuracy": result.accuracy, "knn/mean_per_class": result.mean_per_class}


def _few_shot(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    labels = _labels(features)
    smallest = int(np.unique(labels[split.train], return_counts=True)[1].min())
    shots = [size for size in (1, 5, 10, 25) if size <= smallest]
    result = few_shot(features.X, labels, split, shots, seed=seed)
    return {f"few_shot/{size}": summary.mean for size, summary in result.summary.items()}


def _retrieval(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    labels = _labels(features)
    report = retrieval_report(features.X[split.test], features.X[split.train], labels[split.test], labels[split.train])
    return {f"retrieval/{name}": value for name, value in report.values.items()}


def _controls(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    result = probe_controls(features.X, _labels(features), split, seed=seed)
    return {
        "controls/shuffled": result.shuffled,
        "controls/chance": result.chance,
        "controls/shuffled_at_chance": float(result.shuffled_at_chance),
    }


def _rank(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    return {"rank/effective_rank": effective_rank(features.X[split.train])}


TASKS: dict[str, Task] = {
    "linear": _linear,
    "svm": _svm,
    "ridge": _ridge,
    "mlp": _mlp,
    "knn": _knn,
    "few_shot": _few_shot,
    "retrieval": _retrieval,
    "controls": _controls,
    "rank": _rank,
}
"""The tasks that :func:`evaluate` knows by name; retrieval searches the training rows with the test rows."""


def _task(task: str | Task) -> Task:
    if callable(task):
        return task
    if task not in TASKS:
        raise ValueError(f"tasks must be functions or among {', '.join(TASKS)}, got {task!r}")
    return TASKS[task]


def _labels(features: Features) -> np.ndarray:
    assert features.y is not None
    return features.y


def _summary(values: Sequence[float]) -> Summary:
    if all(map(math.isfinite, values)):
        return summarize(values)
    return Summary(math.nan, math.nan, len(values), math.nan, math.nan)


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
