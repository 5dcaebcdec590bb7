"""The claim: gates learned together with the heads choose better exits than a threshold on heads trained by themselves.

For every λ of a grid JEI-DNN decides by itself what it spends. Every other arm is then held to that mean cost on the test
inputs, by moving its one threshold (labels are not looked at), so all are compared at equal cost: accuracy, calibration, and
conformal sets of the answers that are given.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from headgate.evaluate import ExitConformal, conformal_score, early_exit_score, exits_at_cost, random_exits
from headgate.measurement import Curve, Measurement
from headgate.methods.routing.jei_dnn.experiments import Bench, Readiness, Scale
from headgate.methods.routing.jei_dnn.heads import ExitHeads
from headgate.methods.routing.jei_dnn.losses import HeadWeighting
from headgate.methods.routing.jei_dnn.worlds import cifar_task, digits_task, easy_hard_task, published_task

__all__ = ["SCALES", "measure"]

ARMS = ("jei", "threshold", "entropy", "uniform", "raw", "jei_threshold", "random")
ALPHA = 0.05

_DIFFICULTIES = 10
_LOSSES: dict[str, HeadWeighting] = {"uniform": "uniform", "raw": "raw"}
_LAMS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_RATES = {"heads": 0.4, "exit_prob": 0.1, "uniform": 0.4, "raw": 0.4}
_DIGIT_RATES = {"heads": 0.1, "exit_prob": 0.15, "uniform": 0.15, "raw": 0.15}
_PAPER_RATES = {"heads": 0.01, "exit_prob": 0.01, "uniform": 0.01, "raw": 0.01}

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        task=partial(easy_hard_task, counts=(1_280, 300, 400), depth=3, epochs=2),
        lams=(0.1, 0.8),
        low=(0.8,),
        warmup_epochs=1,
        epochs=1,
        switch_every=2,
        learning_rates=_RATES,
    ),
    "laptop": Scale(
        task=partial(easy_hard_task, counts=(20_000, 4_000, 6_000), depth=6, epochs=15),
        lams=_LAMS,
        low=(0.4, 0.8),
        warmup_epochs=4,
        epochs=8,
        switch_every=20,
        learning_rates=_RATES,
        first_seed=10,
    ),
    "digits": Scale(
        task=partial(digits_task, depth=6, epochs=15),
        lams=_LAMS,
        low=(0.4, 0.8),
        warmup_epochs=4,
        epochs=8,
        switch_every=10,
        learning_rates=_DIGIT_RATES,
    ),
    "cifar10": Scale(
        task=partial(cifar_task, dim=96, depth=6, epochs=10),
        lams=_LAMS,
        low=(0.4, 0.8),
        warmup_epochs=4,
        epochs=11,
        switch_every=50,
        learning_rates=_RATES,
    ),
    "paper": Scale(
        task=published_task,
        lams=(0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 7.0),
        low=(4.0, 7.0),
        warmup_epochs=3,
        epochs=12,
        switch_every=200,
        learning_rates=_PAPER_RATES,
        warmup_rate=0.01,
        batch_size=64,
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    Args:
        arm: one of the card's arms.
        seed: decides data, backbone, initial weights and order of batches, alike for all arms.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    bench = Bench(scale, settings, seed + settings.first_seed)
    points = [_point(arm, bench, lam) for lam in settings.lams]
    return _measurement(bench, points)


class _Point(NamedTuple):
    """One arm at the mean cost that JEI-DNN chose for one λ.

    Attributes:
        accuracy: of the answers given.
        cost: their mean cost.
        calibration_error: of their greatest probability.
        set_size: mean size of their conformal sets.
        coverage: share of those sets that hold the truth.
        own_accuracy: with the exits that the gates themselves choose, at a cost of their own.
        own_cost: that cost.
        left: ``(n,)`` where the test inputs left.
        exit_coverage: ``(G + 1,)`` coverage of the inputs that left at each exit; nan where none did.
    """

    accuracy: float
    cost: float
    calibration_error: float
    set_size: float
    coverage: float
    own_accuracy: float
    own_cost: float
    left: Int[np.ndarray, " n"]
    exit_coverage: Float[np.ndarray, " exits"]


def _point(arm: str, bench: Bench, lam: float) -> _Point:
    task, costs = bench.task, np.asarray(bench.task.costs)
    ours = bench.jei(lam, "exit_prob")
    gated, gated_before = (bench.ask(ours, part, "gate").gated for part in (task.test, task.validation))
    exits, readiness = _network(arm, bench, ours, lam)
    new, held = (bench.ask(exits, part, readiness) for part in (task.test, task.validation))
    if arm == "jei":
        left, left_before = gated, gated_before
    elif arm == "random":
        generator = np.random.default_rng([bench.seed, round(1000 * lam)])
        left, left_before = random_exits(gated, generator), random_exits(gated_before, generator)
    else:
        left, threshold = exits_at_cost(new.readiness, costs, float(costs[gated].mean()))
        left_before = _leave(held.readiness, threshold)
    truth = task.test.target.numpy()
    score = early_exit_score(new.probabilities, left, truth, costs)
    own = early_exit_score(new.probabilities, new.gated, truth, costs)
    conformal = ExitConformal(ALPHA).calibrate(held.probabilities, left_before, task.validation.target.numpy())
    sets = conformal.predict_sets(new.probabilities[left, np.arange(len(left))], left)
    found = conformal_score(sets, truth)
    hit = sets[np.arange(len(truth)), truth]
    return _Point(
        score.accuracy,
        score.cost,
        score.calibration_error,
        found.size,
        found.coverage,
        own.accuracy,
        own.cost,
        left,
        np.array([hit[left == exit].mean() if (left == exit).any() else np.nan for exit in range(len(costs))]),
    )


def _network(arm: str, bench: Bench, ours: ExitHeads, lam: float) -> tuple[ExitHeads, Readiness]:
    """The heads of an arm, and what decides where inputs leave."""
    if arm in ("threshold", "entropy"):
        return bench.heads(), "max_prob" if arm == "threshold" else "entropy"
    if arm in _LOSSES:
        return bench.jei(lam, _LOSSES[arm]), "gate"
    return ours, "max_prob" if arm == "jei_threshold" else "gate"


def _leave(readiness: Float[np.ndarray, "exits n"], threshold: float) -> Int[np.ndarray, " n"]:
    takes = np.concatenate([readiness[:-1] > threshold, np.ones((1, readiness.shape[1]), dtype=bool)])
    return np.asarray(takes.argmax(axis=0))


def _measurement(bench: Bench, points: list[_Point]) -> Measurement:
    settings, lams = bench.settings, list(bench.settings.lams)
    low = [lams.index(lam) for lam in settings.low]
    table = {
        name: np.array([getattr(point, name) for point in points])
        for name in ("accuracy", "cost", "calibration_error", "set_size", "coverage", "own_accuracy", "own_cost")
    }
    metrics = {f"{name}_low": float(values[low].mean()) for name, values in table.items()}
    metrics |= {f"{name}_mean": float(values.mean()) for name, values in table.items()}
    metrics["exit_coverage_low"] = float(np.nanmin([points[place].exit_coverage for place in low]))
    curves = {
        "accuracy at the cost of JEI-DNN": Curve(lams, table["accuracy"].tolist(), "λ", "accuracy", log_x=True),
        "calibration error": Curve(lams, table["calibration_error"].tolist(), "λ", "ECE", log_x=True),
        "conformal sets": Curve(lams, table["set_size"].tolist(), "λ", "mean size at α = 0.05", log_x=True),
        "accuracy over cost": _over_cost(table),
        "where inputs leave": _shares(points[low[0]], len(bench.task.costs)),
    }
    if bench.task.difficulty is not None:
        curves["cost over difficulty"] = _over_difficulty(bench, points[low[0]])
    return Measurement(
        metrics,
        curves=curves,
        notes={f"cost at λ = {lam:g}": point.cost for lam, point in zip(lams, points, strict=True)},
        base_seconds=bench.base_seconds,
    )


def _over_cost(table: dict[str, Float[np.ndarray, " lams"]]) -> Curve:
    order = np.argsort(table["cost"], kind="stable")
    return Curve(table["cost"][order].tolist(), table["accuracy"][order].tolist(), "mean cost", "accuracy")


def _shares(point: _Point, exits: int) -> Curve:
    shares = np.bincount(point.left, minlength=exits) / len(point.left)
    return Curve(list(range(1, exits + 1)), shares.tolist(), "exit", "share of inputs")


def _over_difficulty(bench: Bench, point: _Point) -> Curve:
    assert bench.task.difficulty is not None
    place = np.minimum((bench.task.difficulty.numpy() * _DIFFICULTIES).astype(np.int64), _DIFFICULTIES - 1)
    costs = np.asarray(bench.task.costs)[point.left]
    kept = [part for part in range(_DIFFICULTIES) if (place == part).any()]
    return Curve(
        [(part + 0.5) / _DIFFICULTIES for part in kept],
        [float(costs[place == part].mean()) for part in kept],
        "difficulty",
        "mean cost",
    )
