"""The experiments of the ViG claim on images: digits, CIFAR-10, ImageNet."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from headgate.errors import DataError
from headgate.methods.vision.vig import claim, experiments, imagenet
from headgate.methods.vision.vig.claim import SCALES, PaperScale, measure
from headgate.methods.vision.vig.experiments import (
    ImageData,
    Sizes,
    Training,
    image_accuracy,
    train_images,
)
from headgate.train import History

TINY = Sizes(dim=12, depth=1, mlp_dim=16, vit_mlp_dim=20)


def test_digits_are_split_by_seed_and_a_choice_leaves_the_test_images_alone() -> None:
    data, choosing = experiments.digit_images(3, False), experiments.digit_images(3, True)
    assert (len(data.train), len(data.test)) == (1200, 597)
    assert (len(choosing.train), len(choosing.test)) == (960, 240)
    assert data.train.shape[1:] == (1, 8, 8)
    known = {image.numpy().tobytes() for image in data.train}
    assert all(image.numpy().tobytes() in known for part in (choosing.train, choosing.test) for image in part)
    standard = data.standardize(data.train)
    assert float(standard.mean()) == pytest.approx(0, abs=1e-5)
    assert float(standard.std()) == pytest.approx(1, abs=1e-5)
    assert not torch.equal(experiments.digit_images(4, False).test, data.test)
    assert not data.augmented


class FakeCifar:
    """60 + 30 images whose mean colour tells the class; the first pixel tells the place."""

    def __init__(self, path: Path, split: str, cache: Path) -> None:
        count = 60 if split == "train" else 30
        self.labels = torch.arange(count) % 10
        self.images = (self.labels[:, None, None, None] * 20).expand(count, 3, 32, 32).to(torch.uint8).clone()
        self.images[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8)[:, None]

    def __len__(self) -> int:
        return len(self.labels)


@pytest.fixture
def fake_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    monkeypatch.setattr(experiments, "Cifar", FakeCifar)


@pytest.mark.usefixtures("fake_cifar")
def test_cifar_images_are_a_subset_by_seed() -> None:
    data, other = (experiments.cifar_images(seed, False, count=20) for seed in (0, 1))
    assert (data.train.shape, data.test.shape) == ((20, 3, 32, 32), (30, 3, 32, 32))
    places = data.train[:, 0, 0, 0]
    assert len(places.unique()) == 20
    assert torch.equal(places.long() % 10, data.train_labels)
    assert not torch.equal(places, other.train[:, 0, 0, 0])
    assert data.augmented
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = (torch.tensor(120 / 255) - mean) / std
    white = data.standardize(torch.full((1, 3, 1, 1), 120, dtype=torch.uint8))
    torch.testing.assert_close(white[0, :, 0, 0], expected)


@pytest.mark.usefixtures("fake_cifar")
def test_a_choice_on_cifar_is_made_on_training_images_that_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "_NUM_HELD_OUT", 15)
    data = experiments.cifar_images(0, True, count=45)
    train, held = set(data.train[:, 0, 0, 0].tolist()), set(data.test[:, 0, 0, 0].tolist())
    assert (len(train), len(held)) == (45, 15)
    assert train | held == set(range(60))


def test_missing_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADGATE_CIFAR10", "HEADGATE_SHARED", "HEADGATE_IMAGENET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="set HEADGATE_CIFAR10"):
        measure("vig", 0, "cifar10")
    with pytest.raises(DataError, match="set HEADGATE_IMAGENET"):
        measure("vig", 0, "paper")
    monkeypatch.setenv("HEADGATE_SHARED", str(tmp_path))
    with pytest.raises(DataError, match="cifar10 is no folder"):
        measure("vig", 0, "cifar10")
    monkeypatch.setenv("HEADGATE_IMAGENET", str(tmp_path))
    with pytest.raises(DataError, match="train is no folder"):
        measure("vig", 0, "paper")


def bright(count: int, augmented: bool = False) -> ImageData:
    """Two classes: dark and bright images of 4 × 4 pixels."""
    labels = torch.arange(count) % 2
    images = labels[:, None, None, None] * 100.0 + torch.rand(
        count, 1, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    mean, std = torch.full((1, 1, 1), 50.0), torch.full((1, 1, 1), 50.0)
    return ImageData(images, labels, images[:10], labels[:10], mean, std, 2, augmented)


@pytest.mark.parametrize("arm", ["vig", "vit"])
def test_images_are_learned(arm: str) -> None:
    data = bright(40)
    model, losses = train_images(arm, TINY, Training(8), 1e-2, 12, data, 2, seed=1)
    assert len(losses) == 12 * 5
    assert image_accuracy(model, data) == 1
    again, _ = train_images(arm, TINY, Training(8), 1e-2, 12, data, 2, seed=1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))


def test_order_and_shifts_of_images_depend_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.append((model, batches, loss))
        return History(losses=[1.0] * options["steps"])

    monkeypatch.setattr(experiments, "fit", fit)
    data = bright(40, augmented=True)
    training = Training(8, label_smoothing=0.2)
    for arm, seed in (("vig", 1), ("vit", 1), ("vig", 2)):
        train_images(arm, TINY, training, 1e-2, 3, data, 2, seed)
    (model, batches, loss), (_, others, _), (_, elsewhere, _) = given
    images, labels = batches(7)
    batches(2)
    for ours, theirs in zip((images, labels), others(7), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(images, elsewhere(7)[0])
    epoch = torch.cat([batches(step)[1] for step in range(5)])
    assert int(epoch.sum()) == 20  # every image once
    assert float(images.min()) == -1  # zeros moved in before the images were standardised
    logits = model(images)
    smooth = 0.8 * nn.functional.one_hot(labels, 2) + 0.1
    torch.testing.assert_close(loss(model, (images, labels)), -(smooth * logits.log_softmax(1)).sum(1).mean())


def test_a_cell_of_images_reports_accuracy_and_the_course_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = dataclasses.replace(
        SCALES["digits"],
        data=lambda seed, choosing: bright(40),
        patch_size=2,
        epochs=4,
        sizes=TINY,
        training=Training(8),
    )
    monkeypatch.setitem(SCALES, "digits", tiny)
    measurement = measure("no_2d", 0, "digits")
    assert set(measurement.metrics) == {"accuracy"}
    assert measurement.curves["training loss"].x[-1] == pytest.approx(4)
    assert measurement.notes["training images"] == 40


def test_the_loss_curve_averages_stretches_of_the_run() -> None:
    curve = claim._loss_curve([float(step) for step in range(40)], "epoch", 0.5)
    assert len(curve.x) == 20
    assert (curve.x[0], curve.x[-1]) == (1.0, 20.0)
    assert (curve.y[0], curve.y[-1]) == (0.5, 38.5)
    assert claim._loss_curve([3.0, 1.0], "step", 1.0).y == [3.0, 1.0]


def test_cifar_s_schedule_is_vig_s_in_short() -> None:
    factor = claim._recipe(300)
    assert factor(0) == pytest.approx(1 / 20)
    assert factor(20) == 1
    assert factor(300) == pytest.approx(0.005)


# --- cost -----------------------------------------------------------------------------------------------------------


def write_images(folder: Path, classes: int = 3, train: int = 6, val: int = 5) -> Path:
    """A small ImageNet: images of one colour per class, of different sizes."""
    draws = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            home = folder / part / f"n{label:08d}"
            home.mkdir(parents=True)
            for index in range(count):
                colour = np.zeros(3)
                colour[label] = 200
                noise = draws.integers(40, size=(40 + 7 * index, 50, 3))
                Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(home / f"{index}.png")
    return folder


@pytest.mark.parametrize("arm", ["vig", "vit", "no_2d"])
def test_the_paper_s_experiment_runs_on_class_folders(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADGATE_IMAGENET", str(write_images(tmp_path)))
    settings = SCALES["paper"]
    assert isinstance(settings, PaperScale)
    paper = dataclasses.replace(
        settings,
        recipe=dataclasses.replace(settings.recipe, epochs=3, warmup_epochs=1, batch_size=9),
        train_size=32,
        test_sizes=(32, 48),
        options={"dim": 12, "depth": 1, "img_size": 32, "mlp_dim": 16},
    )
    monkeypatch.setitem(SCALES, "paper", paper)
    measurement = measure(arm, 0, "paper")
    assert set(measurement.metrics) == {"accuracy", "accuracy_48"}
    assert list(measurement.curves["accuracy by image size"].x) == [32, 48]
    assert len(measurement.curves["training loss"].y) == 6
    assert measurement.notes["learning rate"] == (1e-3 if arm == "vit" else 2e-3)


def test_imagenet_batches_are_augmented_and_mixed_by_seed_and_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.update(options, batches=batches, loss=loss)
        return History(losses=[1.0])

    monkeypatch.setattr(imagenet, "fit", fit)
    train, _ = imagenet.open_splits(write_images(tmp_path))
    recipe = dataclasses.replace(claim.RECIPES["vig_tiny"], epochs=30, batch_size=6)
    model = imagenet.build_classifier("vit", dim=12, depth=1, img_size=32, num_classes=3)
    imagenet.train_classifier(model, train, recipe, 2e-3, 32, seed=4)
    batches = given["batches"]
    images, targets = batches(5)
    batches(0)
    for ours, theirs in zip((images, targets), batches(5), strict=True):
        assert torch.equal(ours, theirs)
    assert images.shape == (6, 3, 32, 32)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert not torch.equal(images, batches(8)[0])  # the same place of the next epoch
    logits = model(images)
    torch.testing.assert_close(
        given["loss"](model, (images, targets)), -(targets * logits.log_softmax(1)).sum(1).mean()
    )
    assert given["steps"] == 30 * 3
    assert given["clip_norm"] == 5
    assert given["schedule"](20 * 3) == 1  # 20 epochs of warm-up
    assert given["schedule"](90) == pytest.approx(1e-5 / 2e-3)
    undecayed = {id(p) for g in given["optimizer"].param_groups if not g["weight_decay"] for p in g["params"]}
    assert {id(model.position_embedding), id(model.class_token)} <= undecayed


def test_accuracy_on_imagenet_counts_central_crops(tmp_path: Path) -> None:
    _, test = imagenet.open_splits(write_images(tmp_path))

    class Colour(nn.Module):
        """The strongest channel; class 2 is taken for class 0."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            strength = images.mean(dim=(2, 3)) * self.scale
            return torch.stack(
                [strength.amax(1) * (strength.argmax(1) != 1), strength[:, 1], 0 * strength[:, 2]], dim=1
            )

    assert imagenet.accuracy_at(Colour(), test, 24, batch_size=4) == pytest.approx(2 / 3)


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path)
    (folder / "train" / "n99999999").mkdir()
    with pytest.raises(DataError, match="same classes, got 4 and 3"):
        imagenet.open_splits(folder)
