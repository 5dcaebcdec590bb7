"""The claim as an experiment: pooling per candidate against fixed pooling, and what keeps fine-grained ids from overfitting.

All arms of one seed share data, their order, tower and budget; they differ in how the history is pooled, in the size of the
embeddings, or in the penalty on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data.click_log import ClickLogSettings
from headgate.evaluate import gauc
from headgate.measurement import Curve, Measurement
from headgate.methods.recommend.din.activation_unit import FixedPooling, LocalActivationUnit
from headgate.methods.recommend.din.dice import Activation
from headgate.methods.recommend.din.model import DIN
from headgate.methods.recommend.din.regularization import MiniBatchAwareL2, occurrence_counts
from headgate.methods.recommend.din.worlds import Rows, World, amazon_world, click_world, movielens_world
from headgate.train import DivergedError, count_parameters, epoch_batches, fit, make_optimizer, seeded

__all__ = ["ARMS", "RATES", "SCALES", "choose", "measure"]

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""The grid of learning rates."""

PENALTIES = {"batch": (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2), "table": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
"""The grids of λ. A penalty on the whole table acts at every step, the other one only where an id occurs."""


@dataclass(frozen=True)
class Arm:
    """What an arm changes.

    Attributes:
        pooling: ``"mean"``, ``"attention"``, or ``"blind"``: attention that asks with the mean of the history.
        normalize: of the activation unit; ``"own"`` is the scale's softmax.
        dice: Dice in place of the scale's activation, in tower and activation unit.
        wide: the scale's wide embeddings.
        penalty: on the embeddings of items and categories: of the batch's ids, of the whole table, or none.
        long: many epochs without decay of the learning rate.
    """

    pooling: Literal["mean", "attention", "blind"] = "mean"
    normalize: Literal["own"] | None = None
    dice: bool = False
    wide: bool = False
    penalty: Literal["batch", "table"] | None = None
    long: bool = False


ARMS: dict[str, Arm] = {
    "softmax": Arm("attention", "own"),
    "raw": Arm("attention"),
    "dice": Arm("attention", "own", dice=True),
    "base": Arm(),
    "blind": Arm("blind", "own"),
    "wide": Arm(wide=True),
    "none": Arm(wide=True, long=True),
    "mba": Arm(wide=True, long=True, penalty="batch"),
    "l2": Arm(wide=True, long=True, penalty="table"),
}


@dataclass(frozen=True)
class Settings:
    """How large an experiment is.

    Attributes:
        world: seed → data.
        rates: arm → learning rates; where there are several, impressions that the world sets aside choose one.
        dims: input → size of its embedding.
        wide_dims: the same for the wide arms.
        mlp: widths of the tower.
        attention: widths of the activation unit.
        epochs: over the training impressions.
        long_epochs: of the long arms.
        batch_size: impressions per update.
        activation: of tower and activation unit.
        softmax: what the scale's softmax is.
        options: further arguments of :class:`DIN`.
        decay: progress in epochs, steps so far → factor of the learning rate.
        optimizer: its name.
        clip_norm: largest norm of the gradient.
        epoch: which epoch's model is reported: the last; the one that chosen impressions prefer; or, as published figures
            are, the one that is best on the test.
        penalties: arm → λ.
        first_seed: what seed 0 stands for, where lower seeds were seen before something was changed.
    """

    world: Callable[[int], World]
    rates: Mapping[str, tuple[float, ...]]
    dims: Mapping[str, int]
    wide_dims: Mapping[str, int]
    epochs: int
    long_epochs: int = 0
    mlp: tuple[int, ...] = (64, 32)
    attention: tuple[int, ...] = (36,)
    batch_size: int = 256
    activation: Literal["prelu", "sigmoid"] = "prelu"
    softmax: Literal["softmax", "scaled_softmax"] = "softmax"
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: Callable[[int, int], float] = lambda epoch, step: 0.6**epoch
    optimizer: str = "adamw"
    clip_norm: float | None = None
    epoch: Literal["last", "chosen", "best"] = "last"
    penalties: Mapping[str, float] = field(default_factory=dict)
    first_seed: int = 0


@lru_cache(maxsize=1)
def _click_world(seed: int, settings: str | ClickLogSettings) -> World:
    """All arms of a seed are measured one after another, on one log."""
    return click_world(seed, settings)


_SHORT_ARMS = ("softmax", "raw", "dice", "base", "blind", "wide")
# As in the published network the tower sees u ⊙ v, too, in every arm: without it the base model can hardly compare the two.
_PRODUCT = {"interaction": True}
_PUBLISHED = {"interaction": True, "batch_norm": True, "project": True, "item_bias": "item"}

SCALES: dict[str, Settings] = {
    "smoke": Settings(
        world=lambda seed: _click_world(seed, ClickLogSettings(num_users=80, num_items=200, num_categories=12)),
        rates=dict.fromkeys(ARMS, (4e-3,)),
        dims={"item": 6, "category": 6, "tier": 4},
        wide_dims={"item": 24, "category": 24, "tier": 4},
        epochs=1,
        long_epochs=2,
        options=_PRODUCT,
        penalties={"mba": 10.0, "l2": 1e-2},
    ),
    "laptop": Settings(
        world=lambda seed: _click_world(seed, "interests"),
        rates={
            "softmax": (1.6e-2,),
            "raw": (8e-3,),
            "dice": (8e-3,),
            "base": (8e-3,),
            "blind": (8e-3,),
            "wide": (4e-3,),
            "none": (1e-3,),
            "mba": (2e-3,),
            "l2": (4e-3,),
        },
        dims={"item": 6, "category": 6, "tier": 4},
        wide_dims={"item": 24, "category": 24, "tier": 4},
        epochs=4,
        long_epochs=15,
        options=_PRODUCT,
        penalties={"mba": 10.0, "l2": 1e-2},
        first_seed=10,
    ),
    "movielens": Settings(
        world=movielens_world,
        rates=dict.fromkeys(_SHORT_ARMS, (1e-3, 4e-3)),
        dims={"item": 8, "category": 8},
        wide_dims={"item": 32, "category": 32},
        epochs=4,
        options=_PRODUCT,
        epoch="chosen",
    ),
    "paper": Settings(
        world=amazon_world,
        rates=dict.fromkeys(_SHORT_ARMS, (1.0,)),
        dims={"item": 64, "category": 64},
        wide_dims={"item": 256, "category": 256},
        epochs=10,
        mlp=(80, 40),
        attention=(80, 40),
        batch_size=32,
        activation="sigmoid",
        softmax="scaled_softmax",
        options=_PUBLISHED,
        decay=lambda epoch, step: 1.0 if step < 336_000 else 0.1,
        optimizer="sgd",
        clip_norm=5.0,
        epoch="best",
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    Args:
        arm: one of the card's arms at that scale.
        seed: decides the data or its split, the initial weights and the order of batches, alike for all arms.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    settings = _settings(arm, scale)
    seed += settings.first_seed
    world = settings.world(seed)
    runs = [_train(world, arm, settings, rate, settings.penalties.get(arm, 0.0), seed) for rate in settings.rates[arm]]
    run = runs[int(np.argmax([max(run.chosen, default=0.0) for run in runs]))]
    return _measurement(world, run, settings, seed)


def choose(
    arm: str,
    scale: str,
    seeds: Sequence[int] = (100,),
    rates: Sequence[float] = RATES,
    weights: Sequence[float] | None = None,
) -> dict[tuple[float, float], float]:
    """Measure an arm over a grid of learning rates and, where it has a penalty, of λ, on seeds that are not reported.

    This is how the rates and penalties in :data:`SCALES` were chosen. Every seed draws a log of its own, so the test
    impressions of these seeds are no others' test.

    Args:
        arm: one of :data:`ARMS`.
        scale: a scale with a single rate per arm.
        seeds: to average over, none of those that :func:`measure` is called with.
        rates: learning rates.
        weights: λ; default: the grid of the arm's penalty.

    Returns:
        (learning rate, λ) → GAUC of the last epoch; 0 for a training that diverged.
    """
    settings = _settings(arm, scale)
    penalty = ARMS[arm].penalty
    found: dict[tuple[float, float], float] = {}
    if weights is None:
        weights = (0.0,) if penalty is None else PENALTIES[penalty]
    for rate in rates:
        for weight in weights:
            scores = []
            for seed in seeds:
                try:
                    scores.append(_train(settings.world(seed), arm, settings, rate, weight, seed).curve[-1])
                except DivergedError:
                    scores.append(0.0)
            found[rate, weight] = float(np.mean(scores))
    return found


class _Run(NamedTuple):
    """A training: after every epoch the GAUC on test and on chosen impressions, and the test scores.

    Attributes:
        model: after the last epoch.
        rate: its learning rate.
        weight: λ.
        curve: GAUC on test.
        chosen: GAUC on the impressions that choose; empty where there are none.
        scores: logits on test.
    """

    model: DIN
    rate: float
    weight: float
    curve: list[float]
    chosen: list[float]
    scores: list[np.ndarray]


class _BlindUnit(nn.Module):
    """An activation unit that asks with the mean of the history, whatever the candidate is."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit
        self.mean = FixedPooling("mean")

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        pooled: Tensor = self.unit(self.mean(query, keys, mask), keys, mask)
        return pooled


def _settings(arm: str, scale: str) -> Settings:
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    if arm not in settings.rates:
        raise ValueError(f"arm must be one of {', '.join(settings.rates)} at scale {scale}, got {arm!r}")
    return settings


def _build(world: World, arm: Arm, settings: Settings, seed: int) -> DIN:
    activation: Activation = "dice" if arm.dice else settings.activation

    def build(pooling: Literal["attention", "mean"]) -> DIN:
        with seeded(seed):
            return DIN(
                world.fields(settings.wide_dims if arm.wide else settings.dims),
                world.history,
                world.target,
                settings.mlp,
                activation,
                pooling=pooling,
                attention=settings.attention,
                normalize=settings.softmax if arm.normalize else None,
                **settings.options,
            )

    model = build("mean" if arm.pooling == "mean" else "attention")
    # Tables and tower begin alike in all arms of one size.
    model.load_state_dict(build("mean").state_dict(), strict=False)
    if arm.pooling == "blind":
        model.pool = _BlindUnit(model.pool)
    return model


def _train(world: World, name: str, settings: Settings, rate: float, weight: float, seed: int) -> _Run:
    arm = ARMS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _build(world, arm, settings, seed).to(device)
    penalty = _penalty(world, model, arm, weight)
    penalty.to(device)
    batches = epoch_batches(world.train, settings.batch_size, seed)
    per_epoch = batches.steps_per_epoch
    run = _Run(model, rate, weight, [], [], [])

    def loss(wrapped: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(wrapped(batch), batch["clicked"]) + penalty(model, batch)

    def evaluate(trained: nn.Module, step: int) -> dict[str, float]:
        if step == 0:
            return {}
        run.scores.append(_scores(trained, world, world.test))
        run.curve.append(gauc(world.test.clicked, run.scores[-1], world.test.user))
        if world.choose is not None:
            run.chosen.append(gauc(world.choose.clicked, _scores(trained, world, world.choose), world.choose.user))
        return {"gauc": run.curve[-1]}

    fit(
        model,
        lambda step: world.batch(Rows(*batches(step))),
        loss,
        steps=per_epoch * (settings.long_epochs if arm.long else settings.epochs),
        optimizer=make_optimizer(model, settings.optimizer, rate, momentum=0.0),
        schedule=None if arm.long else lambda step: settings.decay(step // per_epoch, step),
        clip_norm=settings.clip_norm,
        evaluate=evaluate,
        evaluate_every=per_epoch,
        seed=seed,
    )
    model.cpu().eval()
    return run


class _NoPenalty(nn.Module):
    def forward(self, model: DIN, batch: Mapping[str, Tensor]) -> float:
        return 0.0


class _BatchPenalty(nn.Module):
    """Mini-batch aware regularisation of the ids."""

    def __init__(self, penalty: MiniBatchAwareL2) -> None:
        super().__init__()
        self.penalty = penalty

    def forward(self, model: DIN, batch: Mapping[str, Tensor]) -> Tensor:
        ids = model.table_ids(batch)
        result: Tensor = self.penalty({name: ids[name] for name in self.penalty.tables})
        return result


class _TablePenalty(nn.Module):
    """Half the sum of squares of the whole tables, times λ."""

    def __init__(self, tables: Mapping[str, nn.Embedding], weight: float) -> None:
        super().__init__()
        self.tables, self.weight = nn.ModuleDict(tables), weight

    def forward(self, model: DIN, batch: Mapping[str, Tensor]) -> Tensor:
        squares = [table.weight.square().sum() for table in self.tables.values() if isinstance(table, nn.Embedding)]
        return 0.5 * self.weight * torch.stack(squares).sum()


def _penalty(world: World, model: DIN, arm: Arm, weight: float) -> nn.Module:
    """The penalty on all tables of an arm; n_j counts candidates and behaviours of the training impressions."""
    tables = {name: table for name, table in model.tables.items() if isinstance(table, nn.Embedding)}
    if arm.penalty is None:
        return _NoPenalty()
    if arm.penalty == "table":
        return _TablePenalty(tables, weight)
    counts = {name: torch.zeros(table.num_embeddings, dtype=torch.int64) for name, table in tables.items()}
    for rows in _chunks(world.train):
        ids = model.table_ids(world.batch(rows))
        for name, count in counts.items():
            count += occurrence_counts(ids[name], len(count))
    return _BatchPenalty(MiniBatchAwareL2(tables, counts, weight))


def _chunks(rows: Rows, size: int = 4096) -> list[Rows]:
    return [rows.take(slice(start, start + size)) for start in range(0, len(rows.item), size)]


@torch.no_grad()
def _scores(model: nn.Module, world: World, rows: Rows) -> Float[np.ndarray, " n"]:
    device = next(model.parameters()).device
    parts = []
    for chunk in _chunks(rows):
        parts.append(model({name: value.to(device) for name, value in world.batch(chunk).items()}).cpu())
    return torch.cat(parts).double().numpy()


def _measurement(world: World, run: _Run, settings: Settings, seed: int) -> Measurement:
    curve = run.curve
    place = {"last": -1, "best": int(np.argmax(curve)), "chosen": int(np.argmax(run.chosen or curve))}[settings.epoch]
    scores, user, clicked = run.scores[place], world.test.user.numpy(), world.test.clicked.numpy()
    metrics = {
        "gauc": curve[place],
        "peak": max(curve),
        "drop": max(curve) - curve[-1],
        "halfway": (max(curve) + curve[-1]) / 2,
    }
    epochs = list(range(1, len(curve) + 1))
    curves = {"GAUC by epoch": Curve(epochs, curve, "epochs", "GAUC")}
    notes: dict[str, float | int | str] = {
        "learning rate": run.rate,
        "parameters": count_parameters(run.model),
        "epoch": epochs[place],
    }
    if run.weight:
        notes["λ"] = run.weight
    if world.oracle is not None:
        notes["GAUC of the true probabilities"] = gauc(clicked, world.oracle, user)
    if world.num_interests is not None:
        interests = world.num_interests[user]

        def among(low: int, high: int) -> float:
            rows = (interests >= low) & (interests <= high)
            return gauc(clicked[rows], scores[rows], user[rows])

        metrics["gauc_one"], metrics["gauc_many"] = among(1, 1), among(5, 6)
        metrics["contrast"] = metrics["gauc_many"] - 2 * metrics["gauc_one"]
        by_interests = [among(count, count) for count in range(1, 7)]
        curves["GAUC by number of interests"] = Curve(list(range(1, 7)), by_interests, "interests of a user", "GAUC")
    pictures = {}
    if isinstance(run.model.pool, LocalActivationUnit):
        pictures["weights"] = _picture(run.model, world, seed)
    return Measurement(metrics, curves, pictures, notes)


@torch.no_grad()
def _picture(model: DIN, world: World, seed: int) -> UInt8[np.ndarray, "height width 3"]:
    """The weights of one user's history: a row per candidate, a column per behaviour, both sorted by category."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = (world.test.end - world.test.start).clamp_max(world.max_history)
    if world.num_interests is not None:
        lengths = lengths * torch.from_numpy(world.num_interests)[world.test.user].ge(4)
    user = world.test.user[int(lengths.argmax())]
    rows = world.test.take(world.test.user == user)
    rows = rows.take(slice(0, 24))
    kinds = world.ids["category"][1]
    rows = rows.take(kinds[rows.item].argsort(stable=True))
    history, mask = world.history_of(rows)
    weights = model.attention_weights(world.batch(rows))
    shown = int(mask[0].sum())
    order = kinds[history[0, :shown]].argsort(stable=True)
    table = weights[:, order].numpy()
    figure = Figure(figsize=(9.5, 4.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    reach = float(np.abs(table).max()) or 1.0
    image = axis.imshow(table, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    axis.set_xticks(range(shown), [str(int(kinds[item])) for item in history[0, order]], fontsize=6.5, rotation=90)
    names = [
        f"{int(kinds[item])}{' ✓' if clicked else ''}" for item, clicked in zip(rows.item, rows.clicked, strict=True)
    ]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("behaviours, by category")
    axis.set_ylabel("candidates, by category (✓ clicked)")
    axis.set_title("How much each behaviour counts for each candidate: one user", fontsize=10)
    figure.colorbar(image, ax=axis, label="weight")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
