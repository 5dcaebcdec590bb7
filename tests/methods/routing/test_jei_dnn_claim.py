"""The experiment: its data, what each arm shares with JEI-DNN, and that it gives the same numbers again."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headgate.catalog import read_card
from headgate.errors import DataError
from headgate.methods.routing.jei_dnn import claim, worlds
from headgate.methods.routing.jei_dnn.claim import ARMS, SCALES, measure
from headgate.methods.routing.jei_dnn.experiments import Bench
from tests.methods.routing.test_jei_dnn_official import official_state

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADGATE_CACHE", str(tmp_path_factory.mktemp("models")))
        return {arm: measure(arm, 100, "smoke") for arm in ARMS}


def test_arms_scales_and_metrics_are_those_of_the_card(smoke: dict[str, Any]) -> None:
    assert set(ARMS) == {arm.name for arm in CARD.claim.arms}
    assert set(SCALES) == set(CARD.claim.scales)
    for measurement in smoke.values():
        assert set(CARD.claim.metrics) <= set(measurement.metrics)
    for settings in SCALES.values():
        assert set(settings.low) <= set(settings.lams)
        assert list(settings.lams) == sorted(settings.lams)


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="arm must be one of jei, threshold, entropy, uniform, raw, jei_threshold, random"
    ):
        measure("oracle", 0, "smoke")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop, digits, cifar10, paper, got 'huge'"):
        measure("jei", 0, "huge")


@pytest.mark.parametrize("arm", ["jei", "uniform", "random"])
def test_a_cell_is_the_same_when_measured_again_from_scratch(arm: str, smoke: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    again = measure(arm, 100, "smoke")
    assert again.metrics == smoke[arm].metrics
    assert again.curves == smoke[arm].curves
    assert torch.equal(before, torch.get_rng_state())


def test_all_arms_spend_what_jei_spends(smoke: dict[str, Any]) -> None:
    ours = smoke["jei"]
    assert ours.metrics["own_cost_mean"] == ours.metrics["cost_mean"]
    for arm, measurement in smoke.items():
        # One input that leaves one exit earlier or later moves the mean by a third of 1/400; ties move a few at once.
        assert measurement.metrics["cost_mean"] == pytest.approx(ours.metrics["cost_mean"], abs=0.01), arm
    assert smoke["random"].metrics["cost_mean"] == pytest.approx(ours.metrics["cost_mean"])
    shares = [smoke[arm].curves["where inputs leave"].y for arm in ("jei", "random")]
    assert shares[0] == shares[1]
    assert sum(shares[0]) == pytest.approx(1)


def test_numbers_stay_in_their_range(smoke: dict[str, Any]) -> None:
    for measurement in smoke.values():
        for name, value in measurement.metrics.items():
            assert 0 <= value <= (10 if name.startswith("set_size") else 1), name
        difficulty = measurement.curves["cost over difficulty"]
        assert list(difficulty.x) == pytest.approx([0.05 + 0.1 * part for part in range(10)])


def test_arms_share_data_backbone_and_warm_up(smoke: dict[str, Any]) -> None:
    bench = Bench("smoke", SCALES["smoke"], 100)
    warm = bench._warm()
    heads, ours, plain = bench.heads(), bench.jei(0.8, "exit_prob"), bench.jei(0.8, "uniform")
    assert not torch.equal(ours.heads[0].weight, bench.jei(0.8, "raw").heads[0].weight)
    assert all(torch.equal(part.weight, warm.gates[0].linear.weight) for part in [heads.gates[0].linear])
    for trained in (heads, ours, plain):
        assert not torch.equal(trained.heads[0].weight, warm.heads[0].weight)
        assert (trained.heads[0].weight - warm.heads[0].weight).norm() < warm.heads[0].weight.norm()
    assert torch.equal(Bench("smoke", SCALES["smoke"], 100).jei(0.8, "uniform").heads[0].weight, plain.heads[0].weight)


def test_easy_hard_is_what_it_says() -> None:
    parts = worlds.easy_hard(3, (4000, 200, 3000))
    x, target, difficulty = parts["train"]
    assert (len(x), len(parts["validation"].x), len(parts["test"].x)) == (4000, 200, 3000)
    hard = difficulty > 0.6
    assert float(hard.double().mean()) == pytest.approx(0.4, abs=0.03)
    assert int(target[hard].max()) == 7
    assert torch.bincount(target[~hard], minlength=10).min() > 180
    # A linear classifier on the easiest inputs tells classes apart, on the hard ones it is at chance.
    easiest = difficulty < 0.3
    centres = torch.stack([x[easiest & (target == label)].mean(dim=0) for label in range(10)])
    new, truth, how_hard = parts["test"]
    answers = (new @ centres.T - centres.square().sum(dim=1) / 2).argmax(dim=1)
    right = (answers == truth).double()
    assert right[how_hard < 0.3].mean() > 0.8
    hard_centres = torch.stack([x[hard & (target == label)].mean(dim=0) for label in range(8)])
    guesses = (new @ hard_centres.T).argmax(dim=1) == truth
    assert guesses[how_hard > 0.6].double().mean() < 0.2
    assert not torch.equal(worlds.easy_hard(4, (10, 10, 10))["train"].x, worlds.easy_hard(3, (10, 10, 10))["train"].x)


def test_hard_codes_are_pairs_of_signs() -> None:
    parts = worlds.easy_hard(5, (300, 10, 10))
    x, target, difficulty = parts["train"]
    generator = worlds.stream_generator(5, "easy-hard")
    worlds.portable_normal((10, 64), generator)
    directions = worlds.portable_normal((64, 6), generator)
    for row in (difficulty > 0.6).nonzero().flatten().tolist():
        signs = (x[row] @ directions > 0).tolist()
        code = sum(2**bit for bit in range(3) if signs[2 * bit] != signs[2 * bit + 1])
        assert code == int(target[row])


def test_digits_are_split_before_they_are_drawn_with_noise() -> None:
    task = worlds.digits_task(0, depth=2, epochs=1, copies=2)
    assert task.train is not None
    assert [len(part.target) for part in (task.train, task.validation, task.test)] == [1920, 480, 1194]
    assert task.costs == pytest.approx((0.5, 1.0))
    assert task.difficulty is not None
    assert 0 <= float(task.difficulty.min()) < 0.01 < 0.99 < float(task.difficulty.max()) <= 1


class FakeCifar:
    """100 + 40 images whose mean colour tells the class."""

    def __init__(self, path: Path, split: str, mean: Any = None, std: Any = None) -> None:
        count = 100 if split == "train" else 40
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.arange(count) % 10
        self.images = self.labels[:, None, None, None] / 10 + 0.1 * torch.rand(count, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: torch.Tensor, augment: torch.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[rows], self.labels[rows]


def test_the_cifar_scale_runs_on_features_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    monkeypatch.setattr(worlds, "Cifar", FakeCifar)
    tiny = dataclasses.replace(
        SCALES["cifar10"],
        task=partial(worlds.cifar_task, dim=32, depth=3, epochs=1, limit=100),
        lams=(0.1, 0.8),
        low=(0.8,),
        warmup_epochs=1,
        epochs=1,
        switch_every=1,
        batch_size=30,
    )
    monkeypatch.setitem(SCALES, "cifar10", tiny)
    monkeypatch.setattr(worlds, "_CIFAR_COUNTS", (100, 40))
    found = measure("jei", 0, "cifar10")
    assert 0 < found.metrics["cost_low"] <= 1
    monkeypatch.setattr(worlds, "Cifar", None)
    again = measure("threshold", 0, "cifar10")  # everything of the images comes from the cache
    assert again.metrics["cost_low"] == pytest.approx(found.metrics["cost_low"], abs=0.02)


def test_the_paper_s_scale_trains_through_the_published_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    monkeypatch.setattr(worlds, "Cifar", FakeCifar)
    state = {name: tensor for name, tensor in official_state().items() if "gates" not in name and "interm" not in name}
    state["module.head.weight"], state["module.head.bias"] = torch.randn(10, 128) / 11, torch.zeros(10)
    torch.save({"net": state, "acc": 94.95}, tmp_path / "ckpt.pth")
    monkeypatch.setenv("HEADGATE_T2T_CIFAR10", str(tmp_path / "ckpt.pth"))
    tiny = dataclasses.replace(SCALES["paper"], lams=(0.1, 7.0), low=(7.0,), warmup_epochs=1, epochs=1, switch_every=1)
    monkeypatch.setitem(SCALES, "paper", tiny)
    ours, plain = measure("jei", 0, "paper"), measure("threshold", 0, "paper")
    assert 0 < ours.metrics["cost_low"] <= 1
    assert np.isfinite(plain.metrics["accuracy_mean"])
    task = worlds.published_task(0)
    assert task.live is not None
    assert task.costs[-1] == 1
    rates = [block.drop_path.rate for block in task.live.model.backbone[1].blocks]  # type: ignore[index,union-attr]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADGATE_CIFAR10", "HEADGATE_SHARED", "HEADGATE_T2T_CIFAR10"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="set HEADGATE_CIFAR10"):
        measure("jei", 0, "cifar10")
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    with pytest.raises(DataError, match="set HEADGATE_T2T_CIFAR10"):
        measure("jei", 0, "paper")
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere is no folder"):
        measure("jei", 0, "cifar10")
