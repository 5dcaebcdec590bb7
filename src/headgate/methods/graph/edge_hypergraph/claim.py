"""The claim: message passing among edges, on the dual hypergraph, finds and keeps what edges say, at a cost linear in them.

Marked edges that lie apart or around one node ask for the structure among the edges, and for a selection that keeps what counts. Colours
of edges are compressed to a few clusters: smooth ones under noise, and independent ones. The scale ``cost`` measures time on stars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from headgate.data import GraphSet, coloured_graphs, moon_graphs, star_graphs
from headgate.errors import HeadgateError
from headgate.measurement import Curve, Measurement
from headgate.methods.graph.edge_hypergraph.cost import star_step
from headgate.methods.graph.edge_hypergraph.experiments import (
    CLASSIFIERS,
    COMPRESSORS,
    DROPPERS,
    Training,
    compressor,
    edge_accuracy,
    edge_loss,
    foreign_clusters,
    graph_accuracy,
    graph_loss,
    kept_share,
    star_classifier,
    train,
)
from headgate.methods.graph.edge_hypergraph.recipe import RECIPES, Recipe
from headgate.methods.graph.edge_hypergraph.tu_training import train_fold
from headgate.timing import Effort, compare, growth_exponent, summarize
from headgate.train import count_parameters, seeded

__all__ = ["RATES", "SCALES", "measure"]

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""The learning rates that every arm chooses from, for each task."""


@dataclass(frozen=True)
class WorldScale:
    """The procedural worlds.

    Attributes:
        stars: graphs of marked edges to learn from, and to be tested on.
        star_training: of their classifiers.
        drop_training: of those that drop edges, which take longer.
        moons: graphs of smooth colours to learn from, and to be tested on; as many of independent colours.
        moon_training: of the auto-encoders of smooth colours.
        colour_training: of those of independent colours.
        star_rates: arm → learning rate, chosen from :data:`RATES` on seeds 100 and above.
        moon_rates: the same for smooth colours.
        colour_rates: the same for independent colours.
        hidden: channels.
        moon_ratio: clusters as a share of the edges, smooth colours.
        colour_ratio: the same for independent colours.
    """

    stars: tuple[int, int]
    star_training: Training
    drop_training: Training
    moons: tuple[int, int]
    moon_training: Training
    colour_training: Training
    star_rates: Mapping[str, float]
    moon_rates: Mapping[str, float]
    colour_rates: Mapping[str, float]
    hidden: int = 32
    moon_ratio: float = 0.15
    colour_ratio: float = 0.25


@dataclass(frozen=True)
class CostScale:
    """One convolution among the edges of stars.

    Attributes:
        edges: arm → edges of the stars, where the work outweighs the calls.
        effort: how long is timed.
        channels: of the edges.
    """

    edges: Mapping[str, tuple[int, ...]]
    effort: Effort
    channels: int = 32


@dataclass(frozen=True)
class PaperScale:
    """Ten-fold cross-validation on a TU set; a seed is a fold.

    Attributes:
        name: of the set.
        recipe: what all arms share.
        hidden: channels.
        ratio: share of edges, or nodes, that each drop keeps.
    """

    name: str
    recipe: Recipe
    hidden: int
    ratio: float


PAPER_ARMS = ("hyperdrop", "keep_all", "random_keep", "mlp_scores", "no_edges", "node_drop")

_STAR_RATES = {
    "dual": 1e-3, "nodes": 3e-3, "no_edges": 3e-3, "edge_mlp": 3e-3,
    "hyperdrop": 1e-2, "keep_all": 3e-3, "random_keep": 1e-2, "mlp_scores": 1e-2,
}  # fmt: skip
_MOON_RATES = {"dual": 3e-3, "nodes": 1e-2, "edge_mlp": 3e-3}
_COLOUR_RATES = {"dual": 1e-2, "nodes": 3e-3, "edge_mlp": 3e-3}

SCALES: dict[str, WorldScale | CostScale | PaperScale] = {
    "smoke": WorldScale(
        stars=(16, 16),
        star_training=Training(2, 8, 1),
        drop_training=Training(2, 8, 1),
        moons=(8, 8),
        moon_training=Training(2, 4, 1),
        colour_training=Training(2, 4, 1),
        star_rates=_STAR_RATES,
        moon_rates=_MOON_RATES,
        colour_rates=_COLOUR_RATES,
    ),
    "laptop": WorldScale(
        stars=(600, 400),
        star_training=Training(400, 64, 40),
        drop_training=Training(800, 64, 80),
        moons=(300, 150),
        moon_training=Training(500, 32, 50),
        colour_training=Training(1500, 32, 150),
        star_rates=_STAR_RATES,
        moon_rates=_MOON_RATES,
        colour_rates=_COLOUR_RATES,
    ),
    "cost": CostScale(
        edges={"dual": (4096, 8192, 16384, 32768, 65536), "line_graph": (128, 256, 512, 1024)},
        effort=Effort(rounds=7, sample_seconds=0.05),
    ),
    "paper": PaperScale("PROTEINS", RECIPES["hyperdrop_proteins"], hidden=128, ratio=0.65),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    Args:
        arm: one of the card's arms at that scale.
        seed: decides the data, the initial weights and the order of the graphs, alike for all arms; at scale ``paper``, the
            fold.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    known = arms_at(settings)
    if arm not in known:
        raise ValueError(f"arm must be one of {', '.join(known)} at scale {scale}, got {arm!r}")
    if isinstance(settings, CostScale):
        return _measure_cost(arm, settings)
    if isinstance(settings, PaperScale):
        accuracy, by_epoch = train_fold(
            arm, settings.name, seed % 10, settings.recipe, hidden=settings.hidden, ratio=settings.ratio
        )
        curve = Curve(list(by_epoch), list(by_epoch.values()), "epoch", "accuracy")
        return Measurement({"accuracy": accuracy}, {"validation": curve})
    return _measure_worlds(arm, seed, settings)


def arms_at(settings: WorldScale | CostScale | PaperScale) -> tuple[str, ...]:
    """The arms that are measured with these settings."""
    if isinstance(settings, CostScale):
        return tuple(settings.edges)
    return PAPER_ARMS if isinstance(settings, PaperScale) else (*CLASSIFIERS, *DROPPERS)


def _measure_worlds(arm: str, seed: int, settings: WorldScale) -> Measurement:
    model, accuracy, by_step, held = train_stars(arm, seed, settings, settings.star_rates[arm])
    metrics = {"accuracy": accuracy}
    curves = {"marked edges": _curve(by_step)}
    notes: dict[str, float | int | str] = {
        "parameters": count_parameters(model),
        "learning_rate": settings.star_rates[arm],
    }
    pictures = {}
    if arm in DROPPERS:
        with seeded(seed):  # random edges are drawn here, too
            metrics["kept"] = kept_share(model, held)
    if arm in COMPRESSORS:
        model, held, by_step = train_moons(arm, seed, settings, settings.moon_rates[arm])
        metrics["moons"], metrics["moons_foreign"] = _reconstruct(model, held)
        curves["smooth colours"] = _curve(by_step)
        notes["parameters_moons"] = count_parameters(model)
        notes["learning_rate_moons"] = settings.moon_rates[arm]
        if seed == 0:
            pictures["colours"] = _draw_moons(model, seed, settings)
        model, held, by_step = train_colours(arm, seed, settings, settings.colour_rates[arm])
        metrics["colours"], metrics["colours_foreign"] = _reconstruct(model, held)
        curves["independent colours"] = _curve(by_step)
        notes["learning_rate_colours"] = settings.colour_rates[arm]
    return Measurement(metrics, curves, pictures, notes)


def train_stars(
    arm: str, seed: int, settings: WorldScale, rate: float
) -> tuple[nn.Module, float, dict[int, float], GraphSet]:
    """A classifier of graphs of marked edges, its accuracy on the test graphs, that by step, and these graphs."""
    known = star_graphs(settings.stars[0], seed=seed, stream="train")
    held = star_graphs(settings.stars[1], seed=seed, stream="test")

    def build() -> nn.Module:
        return star_classifier(arm, settings.hidden, known.edge_attr.shape[1])

    training = settings.drop_training if arm in DROPPERS else settings.star_training
    model, by_step = train(build, known, held, graph_loss, graph_accuracy, training, rate, seed)
    return model, by_step[training.steps], by_step, held


def train_moons(arm: str, seed: int, settings: WorldScale, rate: float) -> tuple[nn.Module, GraphSet, dict[int, float]]:
    """An auto-encoder of smooth colours, the test graphs, and its accuracy on them by step."""
    known, _ = moon_graphs(settings.moons[0], seed=seed, stream="train")
    held, _ = moon_graphs(settings.moons[1], seed=seed, stream="test")
    return _train_compressor(arm, known, held, settings.moon_ratio, settings.moon_training, settings.hidden, rate, seed)


def train_colours(
    arm: str, seed: int, settings: WorldScale, rate: float
) -> tuple[nn.Module, GraphSet, dict[int, float]]:
    """An auto-encoder of independent colours, the test graphs, and its accuracy on them by step."""
    known = coloured_graphs(settings.moons[0], seed=seed, stream="train")
    held = coloured_graphs(settings.moons[1], seed=seed, stream="test")
    return _train_compressor(
        arm, known, held, settings.colour_ratio, settings.colour_training, settings.hidden, rate, seed
    )


def _train_compressor(
    arm: str, known: GraphSet, held: GraphSet, ratio: float, training: Training, hidden: int, rate: float, seed: int
) -> tuple[nn.Module, GraphSet, dict[int, float]]:
    colours, mean_edges = known.edge_attr.shape[1], float(known.num_edges.double().mean())

    def build() -> nn.Module:
        return compressor(arm, colours, ratio, mean_edges, hidden)

    model, by_step = train(build, known, held, edge_loss, edge_accuracy, training, rate, seed)
    return model, held, by_step


def _reconstruct(model: nn.Module, held: GraphSet) -> tuple[float, float]:
    """Accuracy on the test graphs, with their own clusters and with those of another graph."""
    own = edge_accuracy(model, held)
    with foreign_clusters(model):
        return own, edge_accuracy(model, held)


def _curve(by_step: Mapping[int, float]) -> Curve:
    return Curve(list(by_step), [100 * value for value in by_step.values()], "step", "test accuracy (%)")


def _measure_cost(arm: str, settings: CostScale) -> Measurement:
    calls: dict[Any, Callable[[], Tensor]] = {
        edges: star_step(arm, edges, settings.channels) for edges in settings.edges[arm]
    }
    outcomes = compare(calls, settings.effort)
    for edges, outcome in outcomes.items():
        if outcome.reason:
            raise HeadgateError(
                f"a star of {edges} edges could not be timed: {outcome.reason}\n{outcome.trace}".strip()
            )
    sizes = list(settings.edges[arm])
    seconds = [summarize(outcomes[edges].samples).median for edges in sizes]
    curve = Curve(
        sizes,
        [float(np.log10(1e3 * value)) for value in seconds],
        "edges of the star",
        "log₁₀ of milliseconds",
        log_x=True,
    )
    return Measurement(
        {"time_exponent": growth_exponent(sizes, seconds), "microseconds_per_edge": 1e6 * seconds[-1] / sizes[-1]},
        {"time of a convolution": curve},
    )


def _draw_moons(model: nn.Module, seed: int, settings: WorldScale) -> UInt8[np.ndarray, "height width 3"]:
    """The first test graph: the colours that are seen, the true ones, and those that come back from the clusters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held, points = moon_graphs(1, seed=seed, stream="test")
    batch = held.batch(torch.tensor([0]))
    with torch.no_grad():
        guess = model(batch).argmax(dim=1)
    panels = {
        "seen (40 % replaced)": batch.edge_attr.argmax(dim=1),
        "true": batch.edge_y,
        f"from clusters: {100 * float((guess == batch.edge_y).double().mean()):.0f} % right": guess,
    }
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#444444")
    figure = Figure(figsize=(9.6, 2.7), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    for axis, (title, colours) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for (a, b), colour in zip(batch.edge_index.T.tolist(), colours.tolist(), strict=True):
            axis.plot(*points[[a, b]].T.tolist(), color=palette[colour], lw=2.2, solid_capstyle="round")
        axis.plot(*points.T.tolist(), "o", color="#222222", ms=2.5)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
        axis.set_aspect("equal")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
