"""DeiT's recipe: schedule, repeated augmentation, batches by seed and step, accuracy of central crops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from headgate.data.imagenet import ImageFolders
from headgate.train import History, image_recipe
from headgate.train.image_recipe import ImageRecipe, RepeatedBatches, image_accuracy, train_image_classifier


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> ImageFolders:
    """Two classes of six images: dark red, bright blue."""
    home = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for label, colour in enumerate(((60, 0, 0), (0, 0, 220))):
        folder = home / f"n{label:08d}"
        folder.mkdir()
        for index in range(6):
            noise = draws.integers(30, size=(20 + index, 24, 3))
            Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(folder / f"{index}.png")
    return ImageFolders(home)


TINY = ImageRecipe(batch_size=4, epochs=6, warmup_epochs=1, cooldown_epochs=1, size=16, precision="fp32")


class Colours(nn.Module):
    """A linear classifier of mean colours, with a vector that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.place = nn.Parameter(torch.zeros(1, 3))

    def no_weight_decay(self) -> set[str]:
        return {"place"}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean(dim=(2, 3)) + self.place)


def test_the_learning_rate_grows_with_the_batch() -> None:
    assert ImageRecipe().learning_rate == 5e-4
    assert ImageRecipe(batch_size=1024).learning_rate == 1e-3
    assert ImageRecipe().total_epochs == 310


def test_the_learning_rate_rises_falls_and_stays_epoch_by_epoch() -> None:
    recipe = ImageRecipe()
    factor = recipe.schedule(10)
    rates = [5e-4 * factor(10 * epoch) for epoch in range(312)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[2] == pytest.approx(1e-6 + 0.4 * (5e-4 - 1e-6))
    # The cosine runs from epoch 0 on, beneath the rise.
    assert rates[5] == pytest.approx(1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2)
    assert rates[150] == pytest.approx((5e-4 + 1e-5) / 2)
    assert rates[300:] == pytest.approx([1e-5] * 12)
    assert factor(59) == factor(50)
    with pytest.raises(ValueError, match="steps_per_epoch must be positive"):
        recipe.schedule(0)


def test_places_come_three_times_in_a_row_from_a_third_of_the_set() -> None:
    batches = RepeatedBatches(20, 4, seed=1)
    assert batches.steps_per_epoch == 5
    epoch = torch.cat([batches(step) for step in range(5)])
    assert len(epoch.unique()) == 7
    assert torch.equal(epoch, epoch[::3].repeat_interleave(3)[:20])
    later = torch.cat([batches(step) for step in range(5, 10)])
    assert not torch.equal(later, epoch)
    assert torch.equal(RepeatedBatches(20, 4, seed=1)(7), batches(7))
    assert torch.equal(batches(0), epoch[:4])
    assert not torch.equal(RepeatedBatches(20, 4, seed=2)(0), epoch[:4])


def test_without_repeats_an_epoch_meets_every_place_once() -> None:
    batches = RepeatedBatches(12, 4, seed=0, repeats=1)
    assert sorted(torch.cat([batches(step) for step in range(3)]).tolist()) == list(range(12))


def test_places_that_fill_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="count must fill one batch, got 3 for batch_size=4"):
        RepeatedBatches(3, 4, seed=0)
    with pytest.raises(ValueError, match="repeats must be positive"):
        RepeatedBatches(8, 4, seed=0, repeats=0)


def test_batches_depend_on_seed_and_step_alone(folders: ImageFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.append({**options, "batches": batches, "loss": loss})
        return History(losses=[1.0])

    monkeypatch.setattr(image_recipe, "fit", fit)
    model = Colours()
    for seed in (3, 3, 4):
        train_image_classifier(model, folders, TINY, seed)
    images, targets = given[0]["batches"](5)
    given[0]["batches"](0)
    for ours, theirs in zip((images, targets), given[1]["batches"](5), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(images, given[2]["batches"](5)[0])
    assert images.shape == (4, 3, 16, 16)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    logits = model(images)
    torch.testing.assert_close(
        given[0]["loss"](model, (images, targets)), -(targets * logits.log_softmax(1)).sum(1).mean()
    )
    assert given[0]["steps"] == 7 * 3
    assert (given[0]["clip_norm"], given[0]["mixed_precision"], given[0]["seed"]) == (None, "no", 3)
    rates = {id(p): group["weight_decay"] for group in given[0]["optimizer"].param_groups for p in group["params"]}
    assert [rates[id(p)] for p in (model.head.weight, model.head.bias, model.place)] == [0.05, 0, 0]
    assert given[0]["optimizer"].param_groups[0]["lr"] == pytest.approx(5e-4 * 4 / 512)


def test_only_the_chosen_places_are_trained_on(folders: ImageFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    crops = ImageFolders.random_crops

    def note(self: ImageFolders, indices: Any, *rest: Any) -> Tensor:
        seen.extend(indices)
        return crops(self, indices, *rest)

    monkeypatch.setattr(ImageFolders, "random_crops", note)
    history = train_image_classifier(Colours(), folders, TINY, 0, places=torch.tensor([1, 2, 7, 8]))
    assert set(seen) == {1, 2, 7, 8}
    assert history.steps == 7


def test_a_classifier_of_colours_learns_and_is_scored(folders: ImageFolders) -> None:
    torch.manual_seed(0)
    model = Colours().train()
    recipe = dataclasses.replace(
        TINY, base_learning_rate=6.0, epochs=12, random_erasing=0.0, rand_augment_magnitude=0.0, repeats=1
    )
    train_image_classifier(model, folders, recipe, seed=0)
    assert image_accuracy(model, folders, 16, batch_size=5) == 1
    assert model.training
    with torch.no_grad():
        model.head.weight.neg_()
        model.head.bias.neg_()
    assert image_accuracy(model, folders, 16) == 0
