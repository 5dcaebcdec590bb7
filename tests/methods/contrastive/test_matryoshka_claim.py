"""The experiment: its data, what each arm may and may not see, and that it gives the same numbers again."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from headgate.catalog import read_card
from headgate.errors import DataError
from headgate.methods.contrastive.matryoshka import claim, imagenet, worlds
from headgate.methods.contrastive.matryoshka.claim import ARMS, SCALES, measure

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "models"))


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(ARMS) == {arm.name for arm in CARD.claim.arms}
    assert set(SCALES) == set(CARD.claim.scales)


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_every_criterion_s_metrics_are_measured_at_its_scales(scale: str) -> None:
    settings = SCALES[scale]
    measured = {f"{kind}_{size}" for kind in ("head", "nn") for size in settings.dims}
    measured |= {"nn_short", "map_full", "map_short", "map_adaptive", "cascade_accuracy", "cascade_share"}
    for criterion in CARD.claim.criteria_at(scale):
        assert {criterion.metric, criterion.against_metric or criterion.metric} <= measured
    assert settings.short in settings.dims
    assert settings.shortlist_dim in settings.dims


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="arm must be one of mrl, mrl_e, ff, slice, svd, permuted, got 'pca'"):
        measure("pca", 0, "smoke")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop, synthetic, cifar10, paper, got 'huge'"):
        measure("mrl", 0, "huge")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADGATE_CACHE", str(tmp_path_factory.mktemp("models")))
        return {arm: measure(arm, 100, "smoke") for arm in ARMS}


def test_a_cell_is_the_same_when_measured_again_from_scratch(smoke: dict[str, Any]) -> None:
    for arm in ("mrl", "svd", "permuted"):
        again = measure(arm, 100, "smoke")
        assert again.metrics == smoke[arm].metrics
        assert again.curves == smoke[arm].curves
        np.testing.assert_array_equal(again.pictures["neighbours"], smoke[arm].pictures["neighbours"])


def test_measuring_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    measure("slice", 100, "smoke")
    assert torch.equal(before, torch.get_rng_state())


def test_cuts_of_one_embedding_agree_at_its_full_size(smoke: dict[str, Any]) -> None:
    for one, other in (("slice", "svd"), ("mrl", "permuted")):
        for metric in ("head_64", "nn_64", "map_full"):
            # A rotation or permutation changes no distance and no logit, but for rounding.
            assert smoke[one].metrics[metric] == pytest.approx(smoke[other].metrics[metric], abs=2 / 597)
    assert smoke["slice"].metrics["head_64"] == smoke["ff"].metrics["head_64"]


def test_numbers_are_shares_and_the_cascade_s_last_point_is_its_metric(smoke: dict[str, Any]) -> None:
    for measurement in smoke.values():
        assert all(0 <= value <= 1 for value in measurement.metrics.values())
        curve = measurement.curves["cascade"]
        assert curve.y[-1] == measurement.metrics["cascade_accuracy"]
        assert curve.x[-1] / 64 == pytest.approx(measurement.metrics["cascade_share"])
        assert curve.x[0] == 2
        assert list(measurement.curves["1-NN"].x) == [2, 4, 8, 16, 32, 64]
        assert measurement.metrics["nn_short"] == measurement.metrics["nn_2"]


def test_budgets_match_and_the_rates_come_from_the_grid(smoke: dict[str, Any]) -> None:
    encoder = 64 * 32 + 32 + 32 * 64 + 64
    heads = {"mrl": 10 * 126 + 60, "mrl_e": 10 * 64 + 10, "slice": 10 * 64 + 10}
    for arm, head in heads.items():
        assert smoke[arm].notes["parameters"] == encoder + head
    assert smoke["ff"].notes["parameters"] == 6 * encoder + 10 * 126 + 60
    for measurement in smoke.values():
        rates = [float(rate) for rate in measurement.notes["learning rates"].split(", ")]
        assert set(rates) <= set(SCALES["smoke"].learning_rates)
    assert len(smoke["ff"].notes["learning rates"].split(", ")) == 6


def test_the_picture_frames_right_neighbours_green_and_wrong_ones_red(smoke: dict[str, Any]) -> None:
    picture = smoke["ff"].pictures["neighbours"]
    side = 3 * 8 + 4
    assert picture.shape == (10 * side, 7 * side, 3)
    frames = {tuple(picture[row * side, column * side]) for row in range(10) for column in range(1, 7)}
    assert frames <= {(26, 127, 55), (207, 34, 46)}
    assert (26, 127, 55) in frames


def test_digits_parts_are_disjoint_and_standardised_by_training_pixels() -> None:
    world = worlds.digits_world(3, (64, 16, 64))
    sizes = {part: len(items.labels) for part, items in world.parts.items()}
    assert sizes == {"train": 960, "validation": 240, "test": 597}
    rows = torch.cat([items.inputs for items in world.parts.values()])
    known = torch.unique(rows, dim=0)
    assert len(known) > 1780  # the 1,797 images are almost all different, and none stands in two parts
    assert abs(float(world.parts["train"].inputs.mean())) < 1e-5
    assert float(world.parts["train"].inputs.std()) == pytest.approx(1)
    other = worlds.digits_world(4, (64, 16, 64))
    assert not torch.equal(other.parts["test"].inputs, world.parts["test"].inputs)


def test_procedural_world_has_the_card_s_classes_and_scales() -> None:
    world = worlds.procedural_world(0, (96, 8, 64))
    for part, count in (("train", 60), ("validation", 20), ("test", 40)):
        inputs, labels = world.parts[part]  # type: ignore[index]
        assert inputs.shape == (48 * count, 96)
        assert torch.bincount(labels).tolist() == [count] * 48
    # tanh of W1 (24→128, deviation 2/√24) applied to unit-scale latents, then 128 terms of deviation 1.
    assert 7 < float(world.parts["train"].inputs.std()) < 11.3
    centres = torch.stack(
        [world.parts["train"].inputs[world.parts["train"].labels == c].mean(dim=0) for c in range(48)]
    )
    distances = torch.cdist(centres, centres)
    group = torch.arange(48) // 4
    same = (group[:, None] == group) & ~torch.eye(48, dtype=torch.bool)
    assert distances[same].mean() < distances[group[:, None] != group].mean()
    again = worlds.procedural_world(0, (96, 8, 64))
    assert torch.equal(again.parts["test"].inputs, world.parts["test"].inputs)


def test_patch_features_are_the_pooled_rectified_responses_of_whitened_patches() -> None:
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layer = worlds._PatchFeatures(images, filters=5)
    features = layer(images[:3])
    assert features.shape == (3, 2 * 4 * 5)
    pixels = images[1].double() / 255
    sums = torch.zeros(2, 2, 2, 5, dtype=torch.float64)
    for row in range(14):
        for column in range(14):
            patch = pixels[:, 2 * row : 2 * row + 6, 2 * column : 2 * column + 6].flatten()
            centred = patch - patch.mean()
            normal = centred / math.sqrt(float(centred.var()) + 10 / 255**2)
            response = normal @ layer.weight.double() + layer.bias.double()
            sums[0, row // 7, column // 7] += (response - 0.25).clamp_min(0) / 49
            sums[1, row // 7, column // 7] += (-response - 0.25).clamp_min(0) / 49
    torch.testing.assert_close(features[1].double(), sums.flatten(), rtol=1e-4, atol=1e-5)


class FakeCifar:
    """60 + 30 images whose mean colour tells the class."""

    def __init__(self, path: Path, split: str) -> None:
        count, seed = (60, 0) if split == "train" else (30, 1)
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 10
        noise = torch.randint(40, (count, 3, 32, 32), generator=generator)
        self.images = (self.labels[:, None, None, None] * 20 + noise).to(torch.uint8)


def test_cifar_features_are_made_once_and_split_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"stands for the data")
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    monkeypatch.setattr(worlds, "Cifar", FakeCifar)
    monkeypatch.setattr(worlds, "_CIFAR_COUNTS", {"train": 60, "test": 30})
    first = worlds.cifar_world(0, (16, 8, 64), filters=4, dropout=0.1, gallery=20)
    monkeypatch.setattr(worlds, "Cifar", None)
    second = worlds.cifar_world(1, (16, 8, 64), filters=4, dropout=0.1, gallery=20)
    assert first.base_seconds == second.base_seconds > 0
    assert torch.equal(first.parts["test"].inputs, second.parts["test"].inputs)
    assert not torch.equal(first.parts["validation"].inputs, second.parts["validation"].inputs)
    sizes = {part: len(items.labels) for part, items in first.parts.items()}
    assert sizes == {"train": 54, "validation": 6, "test": 30}
    # Whitened with training statistics: no feature beats another by orders of magnitude, and none is off centre.
    known = torch.cat([first.parts["train"].inputs, first.parts["validation"].inputs])
    assert known.mean(dim=0).abs().max() < 1e-2
    gallery = first.embed(first.encoder().eval(), "train")
    assert gallery.inputs.shape == (20, 64)


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADGATE_CIFAR10", "HEADGATE_SHARED", "HEADGATE_IMAGENET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="set HEADGATE_CIFAR10"):
        measure("mrl", 0, "cifar10")
    with pytest.raises(DataError, match="set HEADGATE_IMAGENET"):
        measure("mrl", 0, "paper")
    monkeypatch.setenv("HEADGATE_SHARED", str(tmp_path))
    with pytest.raises(DataError, match="cifar10 is no folder"):
        measure("mrl", 0, "cifar10")
    monkeypatch.setenv("HEADGATE_IMAGENET", str(tmp_path))
    with pytest.raises(DataError, match="train is no folder"):
        measure("mrl", 0, "paper")


def write_images(folder: Path, classes: int = 3, train: int = 6, val: int = 5) -> Path:
    """A small ImageNet: images of one colour per class, of different sizes."""
    draws = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            home = folder / part / f"n{label:08d}"
            home.mkdir(parents=True)
            for index in range(count):
                shape = (40 + 7 * index, 50, 3)
                colour = np.zeros(3)
                colour[label] = 200
                pixels = (colour + draws.integers(40, size=shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(home / f"{index}.png")
    return folder


def tiny_imagenet(folder: Path, seed: int) -> imagenet.ImageNetWorld:
    return imagenet.ImageNetWorld(folder, seed, calibration=6, layers=(1, 1, 1, 1), width=2, evaluation_size=32)


@pytest.mark.parametrize("arm", ["mrl", "svd"])
def test_the_paper_s_experiment_runs_on_class_folders(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "images")
    paper = dataclasses.replace(
        SCALES["paper"],
        world=lambda seed: tiny_imagenet(folder, seed),
        dims=(8, 16, 64),
        steps=3,
        batch_size=9,
        learning_rates=(0.01,),
        shortlist=12,
    )
    monkeypatch.setitem(SCALES, "paper", paper)
    measured = measure(arm, 0, "paper").metrics
    assert {"head_8", "head_64", "nn_16", "map_adaptive", "cascade_share"} <= set(measured)
    assert measured["nn_64"] > 1 / 3  # colours are told apart even by an almost untrained network


def test_training_crops_depend_on_seed_and_step_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "train_resolution", lambda epoch: 24)
    folder = write_images(tmp_path / "images")
    batches = tiny_imagenet(folder, 0).batches(4, seed=7)
    images, labels = batches(5)
    batches(1)
    again = tiny_imagenet(folder, 0).batches(4, seed=7)(5)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert images.shape == (4, 3, 24, 24)
    assert not torch.equal(images, tiny_imagenet(folder, 0).batches(4, seed=8)(5)[0])
    # The strongest channel tells the class.
    std, mean = torch.tensor(imagenet._STD)[:, None, None], torch.tensor(imagenet._MEAN)[:, None, None]
    assert ((images * std + mean).mean(dim=(2, 3)).argmax(dim=1) == labels).all()


def test_an_epoch_shows_every_training_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = imagenet._open
    monkeypatch.setattr(imagenet, "train_resolution", lambda epoch: 8)
    monkeypatch.setattr(imagenet, "_open", lambda path: seen.append(str(path)) or original(path))
    batches = tiny_imagenet(write_images(tmp_path / "images"), 0).batches(6, seed=7)
    for step in range(3):
        batches(step)
    assert len(seen) == len(set(seen)) == 18


def test_calibration_and_test_images_are_disjoint_and_cover_the_validation_folder(tmp_path: Path) -> None:
    world = tiny_imagenet(write_images(tmp_path / "images"), 0)
    held, test = ({path for path, _ in world.files[part]} for part in ("validation", "test"))  # type: ignore[index]
    assert (len(held), len(test)) == (6, 9)
    assert not held & test


def test_broken_image_folders_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    with pytest.raises(DataError, match="more than 15 images, got 15"):
        imagenet.ImageNetWorld(folder, 0, calibration=15)
    (folder / "train" / "n99999999").mkdir()
    with pytest.raises(DataError, match="same classes, got 4, 3"):
        tiny_imagenet(folder, 0)
    (folder / "train" / "n99999999").rmdir()
    (folder / "train" / "n00000000" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png cannot be decoded"):
        tiny_imagenet(folder, 0).embed(torch.nn.Flatten(), "train")


def test_schedule_and_resolution_follow_the_published_recipe() -> None:
    factor = imagenet.imagenet_schedule(400)
    assert factor(0) == 1e-4
    assert factor(10) == pytest.approx((1 + 1e-4) / 2)
    assert factor(20) == 1
    assert factor(210) == pytest.approx(0.5)
    assert factor(400) == 0
    assert [imagenet.train_resolution(epoch) for epoch in (0, 29, 30, 33, 34, 39)] == [160, 160, 160, 192, 192, 192]
