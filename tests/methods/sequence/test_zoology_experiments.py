"""Training, sweeps, the published grids, and the claim."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.catalog import load_methods
from headgate.data.recall import IGNORED, RecallData, mqar
from headgate.errors import MissingExtraError
from headgate.methods.sequence.zoology import SparseLookups, claim, mqar_sweep, training, zoology_model
from headgate.methods.sequence.zoology.claim import SCALES, _RandomLookups, measure
from headgate.methods.sequence.zoology.experiments import GRIDS, RecallSegment, RecallSetting, _data
from headgate.methods.sequence.zoology.models import MIXERS
from headgate.methods.sequence.zoology.training import RecallRun, predict, score, train_recall
from headgate.nn import MixerLM, MultiHeadAttention
from headgate.train import History

CARD = load_methods()["zoology"]
TASK = RecallSegment(16, 2, 48)
SETTING = RecallSetting(train=(TASK,), test=(TASK,), batch_size=16, vocab_size=24)


def draw(seed: int, count: int = 48, length: int = 16) -> RecallData:
    return mqar(24, count, length, 2, random_non_queries=False, seed=seed)


def attention(dim: int, length: int, layer: int) -> nn.Module:
    return MultiHeadAttention(dim, causal=True)


class Foreign(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = MultiHeadAttention(dim, causal=True)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        return self.inner(hidden_states), None, None


def foreign(dim: int, length: int, layer: int) -> nn.Module:
    return Foreign(dim)


class Copies(nn.Module):
    """Answers every query of which the value stands in a table, the others with token 0."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = nn.Parameter(answers, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.answers[: tokens.shape[0]]
        return nn.functional.one_hot(rows.long(), 24).float()


def test_the_score_is_the_share_of_answered_queries() -> None:
    data = draw(0)
    right = torch.where(data.labels == IGNORED, 0, data.labels)
    assert score(Copies(right.float()), data) == 1
    right[:12] = 0
    assert score(Copies(right.float()), data) == pytest.approx(36 / 48)
    assert torch.equal(predict(Copies(right.float()), data), right)


def test_training_learns_stops_early_and_is_deterministic() -> None:
    train = draw(1, 256)
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = zoology_model("conv_attention", 32, 16, 24)
        runs.append(
            train_recall(
                model, [train], [train], epochs=40, batch_size=32, learning_rate=1e-2, stop_accuracy=0.9, seed=3
            )
        )
    assert runs[0] == runs[1]
    run = runs[0]
    assert run.accuracies[-1] > 0.9
    assert all(accuracy <= 0.9 for accuracy in run.accuracies[:-1])
    assert len(run.accuracies) < 40
    assert run.steps == len(run.losses) == 8 * len(run.accuracies)
    assert run.accuracies[-1] == pytest.approx(score(model.eval(), train))


def test_training_follows_the_published_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.update(options, batches=batches, loss=loss)
        return History(metrics={0: {"accuracy": 0.0}, 3: {"accuracy": 0.5}}, steps=3)

    monkeypatch.setattr(training, "fit", fit)
    torch.manual_seed(0)
    model = zoology_model("conv_lookups", 16, 16, 24)
    model.blocks[1].mixer.mixer.penalty = 0.5
    run = train_recall(model, [draw(1)], [draw(2)], epochs=4, batch_size=16, learning_rate=0.01)
    assert run.accuracies == (0.5,)
    assert given["steps"] == 12
    factors = [given["schedule"](step) for step in range(12)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * (step // 3) / 4)) / 2 for step in range(12)])
    for group in given["optimizer"].param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)
    assert given["evaluate_every"] == 3
    assert given["stop"]({"accuracy": 0.991})
    assert not given["stop"]({"accuracy": 0.99})
    tokens, labels = given["batches"](0)
    model.blocks[0].dropout1.p = 0.0
    logits, aux_loss = model(tokens, return_aux=True)
    assert aux_loss > 0
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + aux_loss
    torch.testing.assert_close(given["loss"](model, (tokens, labels)), expected)


def test_training_takes_data_sets_of_different_lengths() -> None:
    torch.manual_seed(0)
    model = zoology_model("based", 16, 32, 24)
    parts = [draw(1, 40, 16), draw(2, 33, 20)]
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape)) if module.training else None
    )
    run = train_recall(model, parts, parts, epochs=2, batch_size=16, learning_rate=1e-3)
    assert run.steps == 12
    assert sorted(seen) == sorted(2 * [(16, 16), (16, 16), (8, 16), (16, 20), (16, 20), (1, 20)])


def test_a_sweep_reports_the_best_learning_rate_per_mixer_width_and_task() -> None:
    settings = (SETTING, RecallSetting((TASK,), (TASK, RecallSegment(20, 3, 32)), 16, 24, random_non_queries=True))
    table = mqar_sweep({"attention": attention, "foreign": foreign}, (8, 12), settings, (1e-12, 2e-2), epochs=6)
    assert len(table) == 2 * 2 * 3
    assert list(table.columns) == [
        "mixer", "dim", "setting", "length", "num_kv_pairs", "accuracy", "learning_rate", "parameters", "state_bytes",
        "epochs",
    ]  # fmt: skip
    assert table["accuracy"].between(0, 1).all()
    ours, theirs = table[table["mixer"] == "attention"], table[table["mixer"] == "foreign"]
    assert (ours["state_bytes"] == 4 * 2 * 2 * ours["length"] * ours["dim"]).all()
    assert theirs["state_bytes"].isna().all()
    # The model with positions has a row of `dim` numbers per position more.
    longest = np.where(ours["setting"] == 0, 16, 20)
    assert (ours["parameters"].to_numpy() - theirs["parameters"].to_numpy() == longest * ours["dim"]).all()
    again = mqar_sweep({"foreign": foreign}, (8,), settings[:1], (2e-2,), epochs=6)
    single = theirs[(theirs["dim"] == 8) & (theirs["setting"] == 0)]
    if single["learning_rate"].item() == 2e-2:
        assert again["accuracy"].item() == single["accuracy"].item()
    else:
        assert again["accuracy"].item() <= single["accuracy"].item()


def test_a_sweep_over_nothing_or_without_pandas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="widths must not be empty"):
        mqar_sweep({"attention": attention}, (), (SETTING,), (1e-3,))
    load = builtins.__import__

    def without_pandas(name: str, *arguments: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return load(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(MissingExtraError, match=r"headgate\[files\]"):
        mqar_sweep({"attention": attention}, (8,), (SETTING,), (1e-3,))


def test_the_published_data_sets_come_from_the_published_seeds() -> None:
    setting = RecallSetting((TASK, RecallSegment(20, 3, 8)), (TASK,), vocab_size=24)
    train, test = _data(setting, 123, True)
    stream = np.random.RandomState(123)
    seeds = stream.randint(0, 2**31, size=2)
    expected = mqar(24, 8, 20, 3, random_non_queries=False, seed=int(seeds[1]), legacy_rng=True)
    assert torch.equal(train[1].inputs, expected.inputs)
    last = int(stream.randint(2**31, 2**32, size=1, dtype=np.int64)[0])
    assert torch.equal(test[0].labels, mqar(24, 48, 16, 2, random_non_queries=False, seed=last, legacy_rng=True).labels)


def test_the_grid_of_the_main_figure_has_448_runs() -> None:
    grid = GRIDS["figure_2"]
    assert grid.num_runs == 448
    assert [setting.batch_size for setting in grid.settings] == [512, 512, 256, 128]
    assert [round(rate, 7) for rate in grid.learning_rates] == [1e-4, 4.642e-4, 2.1544e-3, 1e-2]
    assert [(s.train[0].input_seq_len, s.train[0].num_kv_pairs) for s in grid.settings] == [
        (64, 4), (128, 8), (256, 16), (512, 64),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="a factory for mamba"):
        grid.arguments(MIXERS)
    arguments = grid.arguments({**MIXERS, "mamba": foreign})
    assert list(arguments["mixers"]) == list(grid.mixers)
    assert arguments["epochs"] == 64


def test_the_later_grid_trains_on_a_mixture_and_tests_beyond_it() -> None:
    grid = GRIDS["state_size"]
    (setting,) = grid.settings
    assert setting.length == 1024
    assert sum(segment.num_examples for segment in setting.train) == 180_000
    assert max(segment.num_kv_pairs for segment in setting.train) == 64
    assert setting.test[-1] == RecallSegment(1024, 256, 1_000)
    assert grid.arguments(MIXERS)["epochs"] == 32
    for name in grid.mixers:
        with torch.device("meta"):
            first = MIXERS[name](64, setting.length, 0)
        assert first.mixer.state_size(setting.length) == 64 * 3, "every mixer stands behind a short convolution"


def test_models_of_the_grid_have_the_counted_parameters() -> None:
    dim, length, vocab = 64, 128, 8192
    skeleton = vocab * dim + 2 * 4 * dim + 2 * dim
    linear = dim * dim + dim
    expected = {
        "attention": length * dim + 2 * 4 * linear,
        "base_conv": 2 * linear + 4 * dim + (3 * 16 + 16 + 16 * dim + dim),
        "based": linear + 4 * dim + 2 * 8 * dim + 2 * dim * dim,
        "rwkv": 2 * (4 * dim * dim + 5 * dim),
        "hyena": 2 * (4 * linear + 12 * dim + dim + 3 * length + (4 * 64 + 2 * (64 * 64 + 64) + 64 * dim) + 64),
        "h3": 2 * (4 * linear + 2 * dim * length + dim + dim // 2 * (2 + length // 2 * 6)),
    }
    for mixer, count in expected.items():
        with torch.device("meta"):
            model = zoology_model(mixer, dim, length, vocab)
        assert sum(parameter.numel() for parameter in model.parameters()) == skeleton + count, mixer


def test_scales_are_those_of_the_card_and_the_paper_scale_is_the_published_grid() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    paper, grid = SCALES["paper"], GRIDS["figure_2"]
    assert paper.widths == grid.widths
    assert paper.learning_rates == pytest.approx(grid.learning_rates)
    for task, batch_size, setting in zip(paper.tasks, paper.batch_sizes, grid.settings, strict=True):
        assert task == (setting.train[0].input_seq_len, setting.train[0].num_kv_pairs)
        assert batch_size == setting.batch_size
        assert paper.num_train == setting.train[0].num_examples
        assert paper.num_test == setting.test[0].num_examples
    assert paper.vocab_size == 8192
    assert paper.epochs == grid.epochs
    for settings in SCALES.values():
        steps = settings.epochs * -(-settings.num_train // settings.batch_sizes[0])
        if settings is not SCALES["smoke"]:
            assert settings.lookup_penalty == pytest.approx(1e-3 * 12_500 / steps, rel=0.05)


@pytest.mark.parametrize("arm", [arm.name for arm in CARD.claim.arms])
def test_every_arm_is_measured_the_same_twice(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(arm, 0, "smoke")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "another"))  # the second time it is trained again
    second = measure(arm, 0, "smoke")
    assert first.metrics == second.metrics
    assert first.curves == second.curves
    assert first.notes == second.notes
    assert set(first.metrics) == set(CARD.claim.metrics)
    assert all(0 <= value <= 1 for value in first.metrics.values())
    assert first.metrics["accuracy"] == first.curves["accuracy by width (16 tokens, 2 pairs)"].y[0]
    assert first.metrics["accuracy_widest"] == first.curves["accuracy by width (16 tokens, 2 pairs)"].y[-1]
    assert first.notes["width"] == (32 if arm == "wide_conv" else 16)


def test_an_arm_reports_its_best_learning_rate_on_examples_that_chose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, reported, penalties = [], [], []

    def train(model: MixerLM, data: Any, validation: Any, *, learning_rate: float, **options: Any) -> RecallRun:
        chosen.extend([*data, *validation])
        penalties.extend(part.penalty for part in model.modules() if isinstance(part, SparseLookups))
        return RecallRun((0.9, {3e-3: 0.6, 1e-2: 0.2}[learning_rate]), 1, (0.0,))

    def look(model: nn.Module, data: RecallData) -> Tensor:
        reported.append(data)
        return predict(model, data)

    monkeypatch.setattr(claim, "train_recall", train)
    monkeypatch.setattr(claim, "predict", look)
    assert measure("lookups", 5, "smoke").notes["learning rate"] == 3e-3
    assert set(penalties) == {SCALES["smoke"].lookup_penalty}
    seen = {tuple(row) for data in chosen for row in data.inputs.tolist()}
    assert reported
    assert not seen & {tuple(row) for data in reported for row in data.inputs.tolist()}


def test_the_ablation_evaluates_the_model_of_the_lookups() -> None:
    chosen, random = measure("lookups", 1, "smoke"), measure("random_lookups", 1, "smoke")
    assert chosen.notes == random.notes


def test_random_lookups_attend_from_equally_many_positions_that_no_input_chose() -> None:
    torch.manual_seed(0)
    lookups = SparseLookups(8).eval()
    random = _RandomLookups(lookups, torch.Generator().manual_seed(0))
    x = torch.randn(200, 20, 8)
    moved = (random(x) != x).any(-1)
    assert (moved.sum(1) == math.ceil(math.sqrt(20))).all()
    assert (moved.double().mean(0) - 5 / 20).abs().max() < 4 * (0.25 * 0.75 / 200) ** 0.5
    assert (lookups(x) != x).any(-1).sum(1).eq(5).all()


def test_unknown_arms_and_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="arm must be one of attention, base_conv"):
        measure("magic", 0, "smoke")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop"):
        measure("attention", 0, "magic")


def test_a_sweep_model_is_the_published_skeleton() -> None:
    with torch.device("meta"):
        model = MixerLM(64, 2, 8192, mixer=lambda layer: MIXERS["base_conv"](64, 128, layer))
        assert sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in zoology_model("base_conv", 64, 128).parameters()
        )
