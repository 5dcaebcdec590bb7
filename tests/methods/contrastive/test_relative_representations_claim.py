"""The experiment: what each arm shares with the others, that it gives the same numbers again, and the larger scales."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.catalog import read_card
from headgate.errors import DataError, HeadgateError
from headgate.methods.contrastive.relative_representations import claim, digits, images, pretrained
from headgate.methods.contrastive.relative_representations.claim import SCALES, measure
from headgate.methods.contrastive.relative_representations.digits import DigitsScale, digits_world
from headgate.methods.contrastive.relative_representations.exchange import (
    ARMS,
    anchors_of_models,
    communication,
    exchange,
    frozen_codes,
)
from headgate.methods.contrastive.relative_representations.images import ImagesScale
from headgate.methods.contrastive.relative_representations.pretrained import PretrainedScale

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")
FROZEN = {"posthoc_same", "posthoc_stitched"}
AUTOENCODER = {"ae_same", "ae_stitched", "ae_stitched_log10", "ae_mrr"}


def measured(arm: str, scale: str) -> set[str]:
    """The metrics that an arm reports at a scale."""
    trained = arm in ("relative", "absolute")
    if scale in ("smoke", "laptop"):
        return FROZEN | (AUTOENCODER | {"same", "stitched", "cosine"} if trained else set())
    return FROZEN | (AUTOENCODER if trained and scale == "cifar10" else set())


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale in SCALES:
        assert set(ARMS) == {arm.name for arm in CARD.claim.arms_at(scale)}


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_every_criterion_s_metrics_are_measured_at_its_scales(scale: str) -> None:
    assert CARD.claim.criteria_at(scale)
    for criterion in CARD.claim.criteria_at(scale):
        assert criterion.metric in measured(criterion.arm, scale)
        if criterion.against is not None:
            assert (criterion.against_metric or criterion.metric) in measured(criterion.against, scale)


def test_criteria_of_the_laptop_are_those_of_the_card() -> None:
    found = {
        criterion.name: (criterion.arm, criterion.against, criterion.value, criterion.margin)
        for criterion in CARD.claim.criteria_at("laptop")
    }
    assert found == {
        "stitching-keeps-accuracy": ("relative", "relative", None, -0.03),
        "frozen-stitching-keeps-accuracy": ("relative", "relative", None, -0.03),
        "absolute-fails": ("absolute", None, 0.25, 0),
        "frozen-absolute-fails": ("absolute", None, 0.25, 0),
        "anchors-must-correspond": ("other_anchors", None, 0.25, 0),
        "decoders-can-be-exchanged": ("relative", "absolute", None, pytest.approx(np.log10(5), abs=1e-5)),
    }


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="arm must be one of relative, absolute, procrustes, noise_anchors, other_anch"
    ):
        measure("affine", 0, "smoke")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop, cifar10, paper, got 'huge'"):
        measure("relative", 0, "huge")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADGATE_CACHE", str(tmp_path_factory.mktemp("models")))
        return {arm: measure(arm, 100, "smoke") for arm in ARMS}


def test_every_arm_reports_its_metrics(smoke: dict[str, Any]) -> None:
    for arm, measurement in smoke.items():
        assert set(measurement.metrics) == measured(arm, "smoke")
        assert set(measurement.metrics) <= set(CARD.claim.metrics)
    assert smoke["relative"].pictures["reconstructions"].shape == (3 * 52, 10 * 52, 3)


def test_a_cell_is_the_same_when_measured_again_and_leaves_the_random_state_alone(smoke: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    for arm in ("relative", "procrustes", "other_anchors"):
        again = measure(arm, 100, "smoke")
        assert again.metrics == smoke[arm].metrics
        assert again.curves == smoke[arm].curves
    assert torch.equal(before, torch.get_rng_state())
    assert measure("other_anchors", 101, "smoke").metrics != smoke["other_anchors"].metrics


def test_rotated_and_plain_absolute_arms_differ_in_the_rotation_alone(smoke: dict[str, Any]) -> None:
    assert smoke["procrustes"].metrics["posthoc_same"] == smoke["absolute"].metrics["posthoc_same"]
    assert smoke["procrustes"].metrics["posthoc_stitched"] > smoke["absolute"].metrics["posthoc_stitched"] + 0.3


def test_a_curve_goes_through_the_metric_at_the_claim_s_number_of_anchors(smoke: dict[str, Any]) -> None:
    settings = SCALES["smoke"]
    assert isinstance(settings, DigitsScale)
    for arm in ("relative", "procrustes"):
        curve = smoke[arm].curves["frozen encoders"]
        place = list(curve.x).index(settings.anchors)
        assert curve.y[place] == smoke[arm].metrics["posthoc_stitched"]


def test_the_laptop_draws_other_seeds_than_those_that_the_architecture_was_changed_after(
    smoke: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, laptop = SCALES["smoke"], SCALES["laptop"]
    assert isinstance(settings, DigitsScale)
    assert isinstance(laptop, DigitsScale)
    assert laptop.first_seed >= CARD.claim.scale("laptop").seeds
    monkeypatch.setitem(SCALES, "smoke", dataclasses.replace(settings, first_seed=97))
    moved = measure("other_anchors", 3, "smoke")
    assert moved.metrics == smoke["other_anchors"].metrics
    assert moved.notes["drawn with seed"] == smoke["other_anchors"].notes["drawn with seed"] == 100


def test_digits_are_split_as_the_card_says() -> None:
    world, other = digits_world(0), digits_world(1)
    assert len(world.train) == 1300
    assert len(world.test) == 497
    assert not torch.equal(world.test, other.test)
    assert world.train.min() == 0
    assert world.train.max() == 1


def test_arms_start_from_the_same_encoders_and_read_the_same_anchors() -> None:
    settings = SCALES["smoke"]
    assert isinstance(settings, DigitsScale)
    models = digits._Models(settings, digits_world(0), 0)
    relative, absolute = models._code("relative"), models._code("absolute")
    assert isinstance(relative, nn.Module)
    pair = [models._classifier(arm, 1).code for arm in ("relative", "absolute")]
    for ours, theirs in zip(pair[0].encoder.parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert sum(p.numel() for p in absolute.parameters()) == 64 * 128 + 128 + 128 * 32 + 32
    first, second = (models._classifier("absolute", model).code for model in (0, 1))
    assert not torch.equal(first[0].weight, second[0].weight)


def test_anchors_are_shared_drawn_apart_or_noise() -> None:
    inputs = torch.arange(40.0)[:, None]
    noise = torch.full((5, 1), -1.0)
    drawn = {arm: anchors_of_models(arm, inputs, 5, 3, 7, lambda count: noise[:count]) for arm in ARMS}
    for arm in ("relative", "procrustes", "absolute"):
        assert all(torch.equal(anchors, drawn["relative"][0]) for anchors in drawn[arm])
    assert all(torch.equal(anchors, noise) for anchors in drawn["noise_anchors"])
    assert torch.equal(drawn["other_anchors"][0], drawn["relative"][0])
    assert len({tuple(anchors.flatten().tolist()) for anchors in drawn["other_anchors"]}) == 3


def test_exchange_of_rotated_encoders_is_perfect_with_shared_anchors_and_not_with_others() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 6, generator=generator)
    encoders: list[nn.Module] = []
    for _ in range(3):
        layer = nn.Linear(6, 6, bias=False)
        layer.weight.data = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
        encoders.append(layer)
    codes = frozen_codes(encoders, [inputs[:10]] * 3)
    reader = nn.Linear(10, 4)
    labels = codes[0](inputs).matmul(reader.weight.T).add(reader.bias).argmax(dim=1)
    assert exchange(codes, [reader] * 3, inputs, labels).off_diagonal == 1
    assert communication(codes, inputs)["mrr"] == 1
    assert communication(encoders, inputs)["mrr"] < 0.5
    apart = frozen_codes(encoders, [inputs[k : k + 10] for k in (0, 10, 20)])
    assert exchange(apart, [reader] * 3, inputs, labels).off_diagonal < 0.8
    plain = nn.Linear(6, 4)
    wanted = plain(encoders[0](inputs)).argmax(dim=1)
    rotated = exchange(encoders, [plain] * 3, inputs, wanted, rotate_on=inputs)
    assert rotated.scores[1, 0] > 0.95


def test_tiles_are_enlarged_and_framed() -> None:
    rows = [torch.tensor([[0.0, 1.0], [0.5, 2.0]]), torch.zeros(2, 2)]
    picture = digits.tile(rows, lambda row: row[:, None, :], zoom=3)
    assert picture.shape == (2 * 7, 2 * 10, 3)
    assert (picture[0] == 255).all()
    assert picture[2, 2].tolist() == [0, 0, 0]
    assert picture[2, 5].tolist() == [255, 255, 255]
    assert picture[2, 12].tolist() == [128, 128, 128]


# --- the larger scales ----------------------------------------------------------------------------------------------


class FakeCifar:
    """Stands for the reader: random images whose class shows in their colour."""

    def __init__(self, folder: Path, split: str, labels: str = "fine") -> None:
        generator = torch.Generator().manual_seed(len(split))
        count = 60 if split == "train" else 30
        self.labels = torch.arange(count) % 4
        noise = torch.randint(60, (count, 3, 32, 32), generator=generator)
        colour = (torch.arange(3) == self.labels[:, None]).long()
        self.images = (noise + 150 * colour[:, :, None, None]).to(torch.uint8)
        self.class_names = ("a", "b", "c", "d")

    def __len__(self) -> int:
        return len(self.labels)


def test_the_images_scale_runs_with_absolute_encoders_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    monkeypatch.setattr(images, "Cifar", FakeCifar)
    tiny = dataclasses.replace(
        SCALES["cifar10"],
        anchors=8,
        steps=2,
        head_steps=2,
        hidden_dims=(2, 3),
        batch_size=8,
        head_batch_size=16,
        known=40,
    )
    assert isinstance(tiny, ImagesScale)
    monkeypatch.setitem(SCALES, "cifar10", tiny)
    found = {arm: measure(arm, 0, "cifar10") for arm in ARMS}
    for arm, measurement in found.items():
        assert set(measurement.metrics) == measured(arm, "cifar10")
    assert found["procrustes"].metrics["posthoc_same"] == found["absolute"].metrics["posthoc_same"]
    assert found["relative"].pictures["reconstructions"].shape == (3 * 68, 10 * 68, 3)
    again = measure("relative", 0, "cifar10")
    assert again.metrics == found["relative"].metrics
    metrics = found["absolute"].metrics
    assert metrics["ae_stitched_log10"] == pytest.approx(np.log10(metrics["ae_stitched"]))


class _Pretrained(nn.Module):
    """Stands for a timm model: mean colours, rotated."""

    def __init__(self, name: str, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        seed = sum(map(ord, name))
        self.register_buffer("turn", torch.randn(48, num_features, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1) @ self.turn


def fake_timm() -> Any:
    module: Any = types.SimpleNamespace()
    widths = {"one": 48, "two": 48, "three": 64}
    module.create_model = lambda name, pretrained, num_classes: _Pretrained(name, widths[name])
    config = {
        "input_size": (3, 24, 24),
        "crop_pct": 0.75,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
    }
    module.data = types.SimpleNamespace(resolve_data_config=lambda options, model: config)
    return module


def test_the_paper_s_scale_runs_with_features_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_CIFAR100", str(tmp_path))
    monkeypatch.setattr(pretrained, "Cifar", FakeCifar)
    monkeypatch.setattr(pretrained, "_timm", fake_timm)
    tiny = dataclasses.replace(SCALES["paper"], names=("one", "two", "three"), anchors=12, batch_size=10, rate=1e-2)
    assert isinstance(tiny, PretrainedScale)
    monkeypatch.setitem(SCALES, "paper", tiny)
    found = {arm: measure(arm, 0, "paper") for arm in ARMS}
    for measurement in found.values():
        assert set(measurement.metrics) == FROZEN
    assert found["relative"].notes["pairs that cannot be stitched"] == 0
    # Only the two models of equal width can be stitched absolutely.
    assert found["absolute"].notes["pairs that cannot be stitched"] == 4
    assert found["relative"].metrics["posthoc_same"] > 0.6
    assert found["relative"].metrics["posthoc_stitched"] > found["other_anchors"].metrics["posthoc_stitched"]


def test_images_are_enlarged_cropped_and_standardised_for_a_pretrained_model() -> None:
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[1] = 255
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.mean(dim=(2, 3))

    config = {"input_size": (3, 48, 48), "crop_pct": 0.75, "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.2, 0.1)}
    found = pretrained._embed(model, pixels, config | {"interpolation": "bicubic"})  # type: ignore[arg-type]
    assert seen[0].shape == (2, 3, 48, 48)
    torch.testing.assert_close(found, torch.tensor([[-1.0, -2.0, -3.0], [1.0, 3.0, 7.0]]), rtol=1e-4, atol=1e-4)


def test_weighted_f1_is_that_of_scikit_learn_by_hand() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # class 0: precision 2/3, recall 1; class 1: precision 1, recall 1/2; two items each
    assert pretrained._weighted_f1(torch.tensor([0, 0, 1, 1]), scores) == pytest.approx(0.5 * 0.8 + 0.5 * 2 / 3)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADGATE_CIFAR10", "HEADGATE_CIFAR100", "HEADGATE_SHARED"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="cifar10 was not found; set HEADGATE_CIFAR10"):
        measure("relative", 0, "cifar10")
    with pytest.raises(DataError, match="set HEADGATE_CIFAR100"):
        measure("relative", 0, "paper")
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path / "none"))
    with pytest.raises(DataError, match="none is no folder"):
        measure("relative", 0, "cifar10")

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(pretrained.importlib, "import_module", absent)
    with pytest.raises(HeadgateError, match="pip install timm"):
        pretrained._timm()
