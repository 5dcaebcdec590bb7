"""Sweeps over mixers, widths and tasks, and the published grids as presets.

mqar_sweep(**GRIDS["figure_2"].arguments({**MIXERS, "mamba": my_mamba}), device="cuda", jobs=4)
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from headgate.data.recall import RecallData, mqar
from headgate.data.seeding import stream_generator
from headgate.errors import MissingExtraError
from headgate.methods.sequence.zoology.models import WITH_POSITIONS, MixerFactory
from headgate.methods.sequence.zoology.training import score, train_recall
from headgate.nn import MixerLM
from headgate.train import count_parameters, seeded
from headgate.validate import check_positive

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GRIDS", "RecallSegment", "RecallSetting", "SweepGrid", "mqar_sweep"]


@dataclass(frozen=True)
class RecallSegment:
    """A data set of one length and number of pairs."""

    input_seq_len: int
    num_kv_pairs: int
    num_examples: int


@dataclass(frozen=True)
class RecallSetting:
    """What one model is trained and tested on.

    Attributes:
        train: data sets to train on.
        test: data sets to test on, each with an accuracy of its own.
        batch_size: examples per step.
        vocab_size: number of token ids.
        random_non_queries: whether fillers are random tokens.
        power_a: of the distribution of distances.
    """

    train: tuple[RecallSegment, ...]
    test: tuple[RecallSegment, ...]
    batch_size: int = 512
    vocab_size: int = 8192
    random_non_queries: bool = False
    power_a: float = 0.01

    @property
    def length(self) -> int:
        """The longest sequence."""
        return max(segment.input_seq_len for segment in (*self.train, *self.test))


@dataclass(frozen=True)
class SweepGrid:
    """A published grid: every mixer at every width, in every setting, with every learning rate.

    Attributes:
        mixers: names of the mixers.
        widths: channels of the residual stream.
        settings: tasks.
        learning_rates: tried for each of them; the best counts.
        epochs: passes over the training data.
    """

    mixers: tuple[str, ...]
    widths: tuple[int, ...]
    settings: tuple[RecallSetting, ...]
    learning_rates: tuple[float, ...]
    epochs: int

    @property
    def num_runs(self) -> int:
        """How many models are trained."""
        return len(self.mixers) * len(self.widths) * len(self.settings) * len(self.learning_rates)

    def arguments(self, mixers: Mapping[str, MixerFactory]) -> dict[str, Any]:
        """The keywords of :func:`mqar_sweep`.

        Args:
            mixers: name → factory; must hold every mixer of the grid.

        Raises:
            ValueError: one is missing, such as one that this library does not hold.
        """
        missing = [name for name in self.mixers if name not in mixers]
        if missing:
            raise ValueError(f"mixers must hold a factory for {', '.join(missing)}, got {', '.join(mixers)}")
        return {
            "mixers": {name: mixers[name] for name in self.mixers},
            "widths": self.widths,
            "settings": self.settings,
            "learning_rates": self.learning_rates,
            "epochs": self.epochs,
        }


def mqar_sweep(
    mixers: Mapping[str, MixerFactory],
    widths: Sequence[int],
    settings: Sequence[RecallSetting],
    learning_rates: Sequence[float],
    *,
    epochs: int = 64,
    depth: int = 2,
    with_positions: Collection[str] = WITH_POSITIONS,
    weight_decay: float = 0.1,
    stop_accuracy: float = 0.99,
    seed: int = 0,
    legacy_rng: bool = False,
    device: str | torch.device = "cpu",
    jobs: int = 1,
) -> pd.DataFrame:
    """Train every mixer at every width in every setting, and report its accuracy at the best learning rate.

    As published, training ends early on, and the learning rate is chosen by, the accuracy on the test data.

    Args:
        mixers: name → function of (dim, length, layer) that builds the mixer of a block. The mixer may return a tuple,
            as those of flash-linear-attention do: ``lambda dim, length, layer: GatedLinearAttention(hidden_size=dim)``.
        widths: channels of the residual stream.
        settings: what a model is trained and tested on.
        learning_rates: tried for every model.
        epochs: passes over the training data, at most.
        depth: number of blocks.
        with_positions: names of the mixers whose models get learned positions.
        weight_decay: of AdamW.
        stop_accuracy: training ends above this accuracy.
        seed: of data, initial weights, order and dropout.
        legacy_rng: whether to draw the published data sets, integer for integer, ``seed`` being that of the data
            configuration (published: 123).
        device: where models train.
        jobs: how many models train at the same time, in processes of their own.

    Returns:
        One row per mixer, width, setting and test data set: ``mixer``, ``dim``, ``setting`` (its index), ``length``,
        ``num_kv_pairs``, ``accuracy``, ``learning_rate`` (the best one), ``parameters``, ``state_bytes`` (at this
        length; nan where the mixer does not tell), ``epochs`` (of that run).

    Raises:
        ValueError: something to sweep over is empty, or no setting fits its task's conditions.
        MissingExtraError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError("pandas", "files", "mqar_sweep") from error
    from joblib import Parallel, delayed

    given = {"mixers": mixers, "widths": widths, "settings": settings, "learning_rates": learning_rates}
    for name, values in given.items():
        if not values:
            raise ValueError(f"{name} must not be empty")
    check_positive(epochs=epochs, depth=depth, jobs=jobs)
    cells = [(name, width, index) for name in mixers for width in widths for index in range(len(settings))]
    runs = Parallel(n_jobs=jobs)(
        delayed(_run)(
            mixers[name],
            width,
            settings[index],
            rate,
            epochs=epochs,
            depth=depth,
            positions=name in with_positions,
            weight_decay=weight_decay,
            stop_accuracy=stop_accuracy,
            seed=seed,
            legacy_rng=legacy_rng,
            device=device,
        )
        for name, width, index in cells
        for rate in learning_rates
    )
    rows = []
    for place, (name, width, index) in enumerate(cells):
        candidates = runs[place * len(learning_rates) : (place + 1) * len(learning_rates)]
        best = max(candidates, key=lambda run: sum(part["accuracy"] for part in run))
        rows += [{"mixer": name, "dim": width, "setting": index, **part} for part in best]
    return pd.DataFrame(rows)


def _run(
    mixer: MixerFactory,
    width: int,
    setting: RecallSetting,
    learning_rate: float,
    *,
    epochs: int,
    depth: int,
    positions: bool,
    weight_decay: float,
    stop_accuracy: float,
    seed: int,
    legacy_rng: bool,
    device: str | torch.device,
) -> list[dict[str, Any]]:
    """Train one model; one dictionary per test data set."""
    train, test = _data(setting, seed, legacy_rng)
    length = setting.length
    with seeded(seed):
        model = MixerLM(
            width,
            depth,
            setting.vocab_size,
            mixer=lambda layer: mixer(width, length, layer),
            max_positions=length if positions else 0,
        ).to(device)
    run = train_recall(
        model,
        train,
        test,
        epochs=epochs,
        batch_size=setting.batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        stop_accuracy=stop_accuracy,
        seed=seed,
    )
    model.eval()
    parts = []
    for data in test:
        state = model.state_size(data.slices["input_seq_len"])
        parts.append(
            {
                "length": data.slices["input_seq_len"],
                "num_kv_pairs": data.slices["num_kv_pairs"],
                "accuracy": score(model, data),
                "learning_rate": learning_rate,
                "parameters": count_parameters(model),
                "state_bytes": float("nan") if state is None else 4 * state,
                "epochs": len(run.accuracies),
            }
        )
    return parts


@functools.lru_cache(maxsize=2)
def _data(setting: RecallSetting, seed: int, legacy_rng: bool) -> tuple[tuple[RecallData, ...], tuple[RecallData, ...]]:
    """The training and test data of a setting; runs of one setting share them."""
    if legacy_rng:
        # The published data configuration draws the seeds of its data sets from these two ranges, in this order.
        stream = np.random.RandomState(seed)
        seeds = {
            "train": stream.randint(0, 2**31, size=len(setting.train), dtype=np.int64),
            "test": stream.randint(2**31, 2**32, size=len(setting.test), dtype=np.int64),
        }

    def draw(split: str, index: int, segment: RecallSegment) -> RecallData:
        options: dict[str, Any] = (
            {"seed": int(seeds[split][index]), "legacy_rng": True}
            if legacy_rng
            else {"generator": stream_generator(seed, split, index)}
        )
        return mqar(
            setting.vocab_size,
            segment.num_examples,
            segment.input_seq_len,
            segment.num_kv_pairs,
            power_a=setting.power_a,
            random_non_queries=setting.random_non_queries,
            **options,
        )

    train = tuple(draw("train", index, segment) for index, segment in enumerate(setting.train))
    return train, tuple(draw("test", index, segment) for index, segment in enumerate(setting.test))


def _figure_2_setting(length: int, pairs: int) -> RecallSetting:
    batch_size = {256: 256, 512: 128}.get(length, 512)
    train, test = RecallSegment(length, pairs, 100_000), RecallSegment(length, pairs, 3_000)
    return RecallSetting((train,), (test,), batch_size)


_STATE_SIZE_SETTING = RecallSetting(
    train=(
        RecallSegment(64, 4, 100_000),
        RecallSegment(128, 8, 20_000),
        RecallSegment(256, 16, 20_000),
        RecallSegment(256, 32, 20_000),
        RecallSegment(256, 64, 20_000),
    ),
    test=tuple(
        RecallSegment(length, pairs, 1_000)
        for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    ),
    batch_size=256,
    random_non_queries=True,
)

GRIDS: Mapping[str, SweepGrid] = {
    "figure_2": SweepGrid(
        mixers=("attention", "hyena", "rwkv", "base_conv", "h3", "based", "mamba"),
        widths=(64, 128, 256, 512),
        settings=tuple(_figure_2_setting(*task) for task in ((64, 4), (128, 8), (256, 16), (512, 64))),
        learning_rates=tuple(float(rate) for rate in np.logspace(-4, -2, 4)),
        epochs=64,
    ),
    "state_size": SweepGrid(
        mixers=("conv_attention", "conv_sliding_attention", "based", "conv_retention"),
        widths=(64, 128, 256),
        settings=(_STATE_SIZE_SETTING,),
        learning_rates=tuple(float(rate) for rate in np.logspace(-3, -1.5, 4)),
        epochs=32,
    ),
}
"""Name → grid. ``figure_2`` is that of the main figure, 448 runs; this library holds no Mamba, so its factory has to be
given. ``state_size`` is the later one of the published repository, which sets accuracy against the state size: one
model per width, trained on a mixture of tasks and tested on harder and longer ones, every mixer behind a short convolution."""
