"""The claim as an experiment: recall of attention, of gated convolutions, and of a few lookups, at equal width.

All arms share the skeleton, the data, its order and the dropout seed; each gets its own best learning rate of one small
grid, chosen on validation examples. What is reported comes from test examples that chose nothing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from headgate.data.recall import IGNORED, RecallData, mqar, query_distance
from headgate.data.seeding import stream_generator
from headgate.measurement import Curve, Measurement
from headgate.methods.sequence.zoology.hybrid import HybridMixer
from headgate.methods.sequence.zoology.models import MIXERS
from headgate.methods.sequence.zoology.sparse_lookups import SparseLookups
from headgate.methods.sequence.zoology.training import predict, train_recall
from headgate.nn import MixerLM
from headgate.train import base_model, count_parameters, seeded

__all__ = ["SCALES", "measure"]


@dataclass(frozen=True)
class Settings:
    """The sizes of one scale.

    Attributes:
        tasks: (length, pairs) of the tasks, the one that ``accuracy`` speaks of last.
        widths: channels of the residual stream; ``accuracy`` speaks of the first.
        vocab_size: number of token ids.
        num_train: training examples; ``num_test`` more each choose the learning rate and give the result.
        num_test: see there.
        batch_sizes: examples per step, for every task.
        epochs: passes over the training data, at most.
        learning_rates: tried for every arm alike.
        lookup_penalty: λ of the lookups' auxiliary loss. Published: 1e-3 over about 12,500 steps; a run of s steps
            takes 1e-3 · 12,500 / s, so that the gates are pushed down as much in all.
        accelerate: whether to train on a GPU where there is one.
    """

    tasks: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    vocab_size: int
    num_train: int
    num_test: int
    batch_sizes: tuple[int, ...]
    epochs: int
    learning_rates: tuple[float, ...]
    lookup_penalty: float
    accelerate: bool = False


SCALES = {
    "smoke": Settings(
        tasks=((16, 2),),
        widths=(16, 24),
        vocab_size=32,
        num_train=64,
        num_test=32,
        batch_sizes=(32,),
        epochs=2,
        learning_rates=(3e-3, 1e-2),
        lookup_penalty=1e-2,
    ),
    "laptop": Settings(
        tasks=((32, 4),),
        widths=(32,),
        vocab_size=256,
        num_train=4_000,
        num_test=500,
        batch_sizes=(64,),
        epochs=16,
        learning_rates=(3e-3, 1e-2),
        lookup_penalty=1.2e-2,
    ),
    "wider": Settings(
        tasks=((64, 8),),
        widths=(32, 64, 128),
        vocab_size=256,
        num_train=8_000,
        num_test=500,
        batch_sizes=(64,),
        epochs=16,
        learning_rates=(3e-3, 1e-2),
        lookup_penalty=6e-3,
    ),
    "paper": Settings(
        tasks=((64, 4), (128, 8), (256, 16), (512, 64)),
        widths=(64, 128, 256, 512),
        vocab_size=8192,
        num_train=100_000,
        num_test=3_000,
        batch_sizes=(512, 512, 256, 128),
        epochs=64,
        learning_rates=(1e-4, 4.641588833612782e-4, 2.154434690031882e-3, 1e-2),
        lookup_penalty=1e-3,
        accelerate=True,
    ),
}

_MIXER_OF_ARM = {
    "attention": "conv_attention",
    "base_conv": "base_conv",
    "based": "based",
    "lookups": "conv_lookups",
    "random_lookups": "conv_lookups",
    "wide_conv": "base_conv",
    "hyena": "hyena",
}
_WIDTH_FACTOR = {"wide_conv": 2}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Train one arm with one seed at every width and task, and measure what it recalls.

    Args:
        arm: an arm of the card.
        seed: of data, initial weights, order and dropout.
        scale: a key of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
    """
    if arm not in _MIXER_OF_ARM:
        raise ValueError(f"arm must be one of {', '.join(_MIXER_OF_ARM)}, got {arm!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    widths = [_WIDTH_FACTOR.get(arm, 1) * width for width in settings.widths]
    curves: dict[str, Curve] = {}
    for task, (length, pairs) in enumerate(settings.tasks):
        results = [_measure_one(arm, width, task, settings, seed) for width in widths]
        accuracies = [result.accuracy for result in results]
        if len(widths) > 1:
            curves[f"accuracy by width ({length} tokens, {pairs} pairs)"] = Curve(
                widths, accuracies, "width", "recall accuracy", log_x=True
            )
    first = results[0]
    metrics = {"accuracy": accuracies[0]}
    if len(widths) > 1:
        metrics["accuracy_widest"] = accuracies[-1]
    curves["accuracy by distance"] = _by_distance(first)
    if arm != "random_lookups":
        course = first.trained.course
        curves["validation accuracy by epoch"] = Curve(
            list(range(1, len(course) + 1)), course, "epoch", "recall accuracy"
        )
    return Measurement(
        metrics=metrics,
        curves=curves,
        notes={
            "learning rate": first.trained.learning_rate,
            "parameters": count_parameters(first.trained.model),
            "state size in bytes": 4 * (first.trained.model.state_size(settings.tasks[-1][0]) or 0),
            "steps": first.trained.steps,
            "width": widths[0],
        },
        base_seconds=sum(result.trained.seconds for result in results) if arm in ("lookups", "random_lookups") else 0.0,
    )


@dataclass(frozen=True)
class _Trained:
    """The model of the learning rate that the validation examples chose, and the course of its training."""

    model: MixerLM
    learning_rate: float
    course: list[float]
    steps: int
    seconds: float


@dataclass(frozen=True)
class _Result:
    accuracy: float
    hits: Tensor
    distances: Tensor
    trained: _Trained


def _measure_one(arm: str, width: int, task: int, settings: Settings, seed: int) -> _Result:
    """Train ``arm`` on one task and score it on the test examples."""
    trained = _train(_MIXER_OF_ARM[arm], width, task, settings, seed)
    model = copy.deepcopy(trained.model).eval()
    if arm == "random_lookups":
        for part in list(model.modules()):
            if isinstance(part, HybridMixer) and isinstance(part.mixer, SparseLookups):
                part.mixer = _RandomLookups(part.mixer, stream_generator(seed, "positions", task))
    test = _draw("test", task, settings, seed)
    asked = test.labels != IGNORED
    hits = (predict(model, test) == test.labels)[asked].double()
    return _Result(float(hits.mean()), hits, query_distance(test)[asked], trained)


class _Kept(nn.Module):
    """A model with the course of its training, so that the cache of shared models keeps them together."""

    learning_rate: Tensor
    course: Tensor
    steps: Tensor

    def __init__(self, model: MixerLM, epochs: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("learning_rate", torch.zeros((), dtype=torch.float64))
        self.register_buffer("course", torch.full((epochs,), math.nan, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def _train(mixer: str, width: int, task: int, settings: Settings, seed: int) -> _Trained:
    """Train with every learning rate and keep the best; the ablation evaluates the very model of another arm."""
    length, pairs = settings.tasks[task]

    def fresh() -> MixerLM:
        with seeded(seed):
            model = MixerLM(width, 2, settings.vocab_size, mixer=lambda layer: MIXERS[mixer](width, length, layer))
        for part in model.modules():
            if isinstance(part, SparseLookups):
                part.penalty = settings.lookup_penalty
        return model

    def search(kept: _Kept) -> None:
        train, validation = (_draw(name, task, settings, seed) for name in ("train", "validation"))
        best = -1.0
        for rate in settings.learning_rates:
            model = fresh()
            run = train_recall(
                model.to("cuda" if settings.accelerate and torch.cuda.is_available() else "cpu"),
                [train],
                [validation],
                epochs=settings.epochs,
                batch_size=settings.batch_sizes[task],
                learning_rate=rate,
                seed=seed,
            )
            if run.accuracies[-1] > best:
                best = run.accuracies[-1]
                kept.model.load_state_dict(model.state_dict())
                kept.learning_rate.fill_(rate)
                kept.steps.fill_(run.steps)
                kept.course.fill_(math.nan)
                kept.course[: len(run.accuracies)] = torch.tensor(run.accuracies, dtype=torch.float64)

    recipe = {**asdict(settings), "mixer": mixer, "width": width, "task": task, "seed": seed}
    name = f"zoology-{mixer}-{width}-{length}-{pairs}"
    kept, seconds = base_model(name, lambda: _Kept(fresh(), settings.epochs), search, recipe)
    course = [value for value in kept.course.tolist() if not math.isnan(value)]
    return _Trained(kept.model, float(kept.learning_rate), course, int(kept.steps), seconds)


def _draw(split: str, task: int, settings: Settings, seed: int) -> RecallData:
    length, pairs = settings.tasks[task]
    count = settings.num_train if split == "train" else settings.num_test
    generator = stream_generator(seed, split, task)
    return mqar(settings.vocab_size, count, length, pairs, random_non_queries=False, generator=generator)


class _RandomLookups(nn.Module):
    """Trained lookups that attend from random positions, equally many as their input would choose."""

    def __init__(self, lookups: SparseLookups, generator: torch.Generator) -> None:
        super().__init__()
        self.lookups = lookups
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        order = torch.rand(batch, length, generator=self.generator).argsort(1)
        y = self.lookups(x, positions=order[:, : math.ceil(math.sqrt(length))].to(x.device))
        assert isinstance(y, Tensor)
        return y


def _by_distance(result: _Result) -> Curve:
    """Accuracy over how far back the answer stands, in bins that double: 1, 2, 3-4, 5-8, 9-16, …, named by their ends."""
    bins = result.distances.double().log2().ceil().long()
    kinds = bins.unique().tolist()
    accuracy = [float(result.hits[bins == kind].mean()) for kind in kinds]
    ends = [2.0**kind for kind in kinds]
    return Curve(ends, accuracy, "tokens between answer and query, at most", "recall accuracy", log_x=True)
