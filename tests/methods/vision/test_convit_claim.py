"""The claim's experiments: networks and data of every arm, what is measured where, the choice of rates, the paper's recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from headgate.catalog import read_card
from headgate.errors import DataError
from headgate.methods.vision.convit import GPSA, claim, experiments
from headgate.methods.vision.convit.claim import RATES, SCALES, PaperScale, SmallScale, choose_rate, measure
from headgate.methods.vision.convit.experiments import (
    ARM_OPTIONS,
    ImageData,
    Training,
    accuracy,
    build_classifier,
    digit_images,
    random_shift,
    train_classifier,
)
from headgate.nn import VisionTransformer
from headgate.train import DivergedError, History, count_parameters

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")
TINY = {
    "img_size": 4, "patch_size": 2, "in_chans": 1, "num_classes": 2, "embed_dim": 8, "depth": 2, "num_heads": 4,
    "local_up_to_layer": 1, "drop_path_rate": 0.0,
}  # fmt: skip


def bright(count: int = 60) -> ImageData:
    """Two classes: images that are dark above and those that are dark below."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (count,), generator=draws)
    images = torch.rand(count, 1, 4, 4, generator=draws)
    images[labels == 1, :, :2] += 1
    images[labels == 0, :, 2:] += 1
    return ImageData(images[:40], labels[:40], images[40:], labels[40:], lambda x, draw: x, lambda x: x - 1)


def small(**changes: Any) -> SmallScale:
    settings = SmallScale(
        data=lambda seed: bright(),
        counts=(8, 20),
        decisive=8,
        network=TINY,
        training=Training(steps=lambda count: 3, batch_size=8),
        rates=dict.fromkeys(ARM_OPTIONS, 1e-2),
        held_out=10,
    )
    return dataclasses.replace(settings, **changes)


def arms_at(scale: str) -> set[str]:
    settings = SCALES[scale]
    return set(settings.rates if isinstance(settings, SmallScale) else settings.models)


def measured_at(scale: str) -> dict[str, set[str]]:
    """Arm → the metrics that it reports."""
    settings = SCALES[scale]
    common = {"decisive", "few", "full", "cost_of_few"}
    if isinstance(settings, PaperScale):
        shares = {f"accuracy_{round(100 * share)}_percent" for share in settings.shares}
        return dict.fromkeys(settings.models, common | shares)
    common |= {f"accuracy_{count}_images" for count in settings.counts} | {"distance_start", "distance"}
    metrics = {
        arm: common | ({"gate"} if "local_up_to_layer" not in ARM_OPTIONS[arm] else set()) for arm in settings.rates
    }
    if "no_locality" in metrics:
        metrics["no_locality"] = metrics["no_locality"] | {"half_mark"}
    for arm in settings.once:
        metrics[arm] -= {"few", "full", "cost_of_few"}
        metrics[arm] -= {f"accuracy_{count}_images" for count in settings.counts if count != settings.decisive}
    return metrics


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale in SCALES:
        assert arms_at(scale) == {arm.name for arm in CARD.claim.arms_at(scale)}


@pytest.mark.parametrize("scale", SCALES)
def test_every_criterion_s_metrics_are_measured_at_its_scales(scale: str) -> None:
    criteria = CARD.claim.criteria_at(scale)
    assert len(criteria) >= 3
    for criterion in criteria:
        assert criterion.metric in measured_at(scale)[criterion.arm]
        assert criterion.against is not None
        assert (criterion.against_metric or criterion.metric) in measured_at(scale)[criterion.against]
        for control in criterion.controls:
            assert criterion.metric in measured_at(scale)[control]
    for metrics in measured_at(scale).values():
        assert metrics <= set(CARD.claim.metrics)


@pytest.mark.parametrize("scale", ["laptop", "longer"])
def test_criteria_on_digits_are_those_of_the_paper_s_card(scale: str) -> None:
    criteria = CARD.claim.criteria_at(scale)
    margins = {(c.metric, c.against, c.against_metric, c.relation): c.margin for c in criteria}
    assert margins == {
        **{(f"accuracy_{count}_images", "deit", None, "above"): 0.05 for count in (50, 100, 300)},
        ("decisive", "no_locality", "half_mark", "above"): 0.0,
        ("decisive", "no_locality", None, "above"): 0.0,
        ("cost_of_few", "deit", None, "below"): 0.0,
        ("full", "deit", None, "above"): -0.01,
    }
    assert {c.arm for c in criteria} == {"convit"}
    assert [c.controls for c in criteria if c.metric == "accuracy_100_images"] == [("content_only",)]


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="arm must be one of convit, deit at scale paper, got 'no_locality'"):
        measure("no_locality", 0, "paper")
    with pytest.raises(ValueError, match=r"scale must be one of smoke, laptop, .*, got 'huge'"):
        measure("convit", 0, "huge")


# --- networks --------------------------------------------------------------------------------------------------------


def test_arms_are_equally_large() -> None:
    for scale in ("laptop", "longer", "published_start", "cifar10", "cifar100"):
        settings = SCALES[scale]
        assert isinstance(settings, SmallScale)
        with torch.device("meta"):
            sizes = [count_parameters(build_classifier(arm, 0, **settings.network)) for arm in settings.rates]
        assert max(sizes) < 1.01 * min(sizes)


def gpsa_layers(arm: str) -> list[GPSA]:
    return [layer for layer in build_classifier(arm, 0, **TINY).modules() if isinstance(layer, GPSA)]


def test_arms_differ_in_what_they_say() -> None:
    (convit,), (drawn,) = gpsa_layers("convit"), gpsa_layers("no_locality")
    assert torch.equal(convit.v.weight, torch.eye(8))
    assert not torch.equal(drawn.v.weight, torch.eye(8))
    assert torch.equal(drawn.gating_param, convit.gating_param)
    assert float(drawn.pos_proj.weight.abs().max()) < 0.1
    assert gpsa_layers("deit") == gpsa_layers("strong_positions") == []
    weak, strong = (build_classifier(arm, 0, **TINY).pos_embed for arm in ("deit", "strong_positions"))
    assert weak is not None
    assert strong is not None
    assert float(weak.detach().std()) < 0.05 < 0.5 < float(strong.detach().std())


def test_a_wider_start_changes_no_arm_s_own() -> None:
    wide = {**TINY, "position_std": 0.7, "embed_dim": 64}
    convit, drawn, deit = (build_classifier(arm, 0, **wide) for arm in ("convit", "no_locality", "deit"))
    published = build_classifier("convit", 0, **{**TINY, "embed_dim": 64})
    local, random = convit.blocks[0].attn, drawn.blocks[0].attn
    for name in ("pos_proj.weight", "v.weight", "gating_param"):
        assert torch.equal(local.state_dict()[name], published.blocks[0].attn.state_dict()[name])
    for layer in (local.qk, random.qk, random.v, random.proj, deit.blocks[0].attn.qkv, deit.blocks[1].mlp.fc1):
        assert float(layer.weight.detach().std()) == pytest.approx(0.125, rel=0.1)
    assert float(random.pos_proj.weight.detach().abs().max()) < 0.1
    for model in (convit, drawn, deit):
        assert model.pos_embed is not None
        assert float(model.pos_embed.detach().std()) == pytest.approx(0.7, rel=0.2)


@pytest.mark.parametrize(("arm", "gate"), [("content_only", 0.0), ("position_only", 1.0)])
def test_held_gates_stay_where_they_are(arm: str, gate: float) -> None:
    model = build_classifier(arm, 0, **TINY)
    before = model.blocks[0].attn.pos_proj.weight.detach().clone()
    train_classifier(model, bright(), 20, Training(steps=lambda count: 5, weight_decay=0.0), 1e-2, seed=0)
    assert model.gates().tolist() == [[gate] * 4]
    moved = not torch.equal(before, model.blocks[0].attn.pos_proj.weight)
    assert moved == (gate == 1.0)
    assert all(bool(parameter.isfinite().all()) for name, parameter in model.named_parameters() if "gating" not in name)


# --- data and training -----------------------------------------------------------------------------------------------


def test_digits_are_permuted_by_the_seed_and_the_last_600_are_for_testing() -> None:
    data, other = digit_images(3), digit_images(4)
    assert (len(data.train), len(data.test)) == (1197, 600)
    every = {image.numpy().tobytes() for image in torch.cat([data.train, data.test])}
    assert every == {image.numpy().tobytes() for image in torch.cat([other.train, other.test])}
    assert not torch.equal(data.test, other.test)
    assert torch.equal(digit_images(3).train, data.train)
    assert data.train_labels[:50].unique().numel() >= 8
    standard = data.standardize(data.train)
    assert (float(standard.min()), float(standard.max())) == (-1, 1)


def test_shifts_move_an_image_by_up_to_a_pixel_and_zeros_in() -> None:
    images = torch.arange(1, 10.0).view(1, 1, 3, 3).expand(200, 1, 3, 3)
    shifted = random_shift(images, torch.Generator().manual_seed(0))
    kinds = {image.numpy().tobytes() for image in shifted}
    assert len(kinds) == 9
    padded = nn.functional.pad(images[:1], (1, 1, 1, 1))
    expected = {padded[0, :, y : y + 3, x : x + 3].contiguous().numpy().tobytes() for y in range(3) for x in range(3)}
    assert kinds == expected


class FakeCifar:
    """60 + 30 images whose first pixel tells the place."""

    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)

    def __init__(self, path: Path, split: str, cache: Path) -> None:
        count = 60 if split == "train" else 30
        self.labels = torch.arange(count) % 10
        self.images = torch.full((count, 3, 32, 32), 51, dtype=torch.uint8)
        self.images[:, :, 0, 0] = torch.arange(count, dtype=torch.uint8)[:, None]

    def __len__(self) -> int:
        return len(self.labels)


def test_cifar_images_come_in_an_order_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))
    monkeypatch.setattr(experiments, "Cifar", FakeCifar)
    data, other = experiments.cifar_images(0), experiments.cifar_images(1)
    places = data.train[:, 0, 0, 0].long()
    assert sorted(places.tolist()) == list(range(60))
    assert torch.equal(places % 10, data.train_labels)
    assert not torch.equal(places, other.train[:, 0, 0, 0].long())
    assert torch.equal(data.test, other.test)
    white = data.standardize(data.test[:1])[0, :, 1, 1]
    torch.testing.assert_close(white, torch.tensor([-1.2, -1.0, -1.0]))
    changed = data.augment(data.train, torch.Generator().manual_seed(0))
    assert changed.shape == data.train.shape
    assert bool((changed == 0).any())


def test_missing_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADGATE_CIFAR10", "HEADGATE_CIFAR100", "HEADGATE_SHARED", "HEADGATE_IMAGENET"):
        monkeypatch.delenv(name, raising=False)
    for scale, variable in (("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("paper", "IMAGENET")):
        with pytest.raises(DataError, match=f"set HEADGATE_{variable} to"):
            measure("convit", 0, scale)


@pytest.mark.parametrize("arm", ["convit", "deit"])
def test_classes_are_learned_alike_whenever_they_are(arm: str) -> None:
    data, training = bright(), Training(steps=lambda count: 60, batch_size=16)
    models = [build_classifier(arm, 1, **TINY) for _ in range(2)]
    losses = [train_classifier(model, data, 40, training, 1e-2, seed=1) for model in models]
    assert losses[0] == losses[1] < 0.2
    assert accuracy(models[0], data, data.test, data.test_labels) > 0.9
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_order_and_augmentation_depend_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.append({**options, "batches": batches, "loss": loss, "model": model})
        return History(losses=[3.0] * 18 + [1.0, 2.0])

    monkeypatch.setattr(experiments, "fit", fit)
    data = bright()._replace(augment=random_shift)
    training = Training(steps=lambda count: 2 * count, batch_size=16, label_smoothing=0.2)
    for arm, seed in (("convit", 1), ("deit", 1), ("convit", 2)):
        assert train_classifier(build_classifier(arm, 0, **TINY), data, 10, training, 1e-2, seed) == 1.5
    images, labels = given[0]["batches"](7)
    given[0]["batches"](0)
    for ours, theirs in zip((images, labels), given[1]["batches"](7), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(images, given[2]["batches"](7)[0])
    assert given[0]["steps"] == 20
    # All ten images of the ten, in another order.
    assert sorted(labels.tolist()) == sorted(data.train_labels[:10].tolist())
    model = given[0]["model"]
    logits = model(images)
    smooth = 0.8 * nn.functional.one_hot(labels, 2) + 0.1
    torch.testing.assert_close(
        given[0]["loss"](model, (images, labels)), -(smooth * logits.log_softmax(1)).sum(1).mean()
    )
    undecayed = {id(p) for g in given[0]["optimizer"].param_groups if not g["weight_decay"] for p in g["params"]}
    assert {id(model.pos_embed), id(model.cls_token), id(model.blocks[0].attn.gating_param)} <= undecayed
    assert given[0]["schedule"](1) == 1


# --- what a cell reports ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["convit", "deit", "content_only"])
def test_a_cell_reports_accuracies_gates_and_distances(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "laptop", small())
    measurement = measure(arm, 0, "laptop")
    metrics = measurement.metrics
    assert set(metrics) == measured_at("laptop")[arm]
    few, full = metrics["accuracy_8_images"], metrics["accuracy_20_images"]
    assert (metrics["decisive"], metrics["few"], metrics["full"]) == (few, few, full)
    assert metrics["cost_of_few"] == pytest.approx(full - few)
    assert list(measurement.curves["accuracy"].y) == [few, full]
    assert len(measurement.curves["attention distance after training"].y) == 2
    assert measure(arm, 0, "laptop").metrics == metrics
    if arm == "deit":
        assert not measurement.pictures
        return
    gates = measurement.curves["share of position after training"].y
    assert gates == pytest.approx([metrics["gate"]])
    assert (metrics["gate"] == 0) == (arm == "content_only")
    picture = measurement.pictures["heads"]
    assert picture.dtype == np.uint8
    assert picture.std() > 10


def test_a_scale_s_first_seed_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "laptop", small())
    expected = measure("deit", 7, "laptop")
    monkeypatch.setitem(SCALES, "laptop", small(first_seed=5))
    assert measure("deit", 2, "laptop").metrics == expected.metrics
    assert measure("deit", 7, "laptop").curves != expected.curves


def test_some_arms_are_trained_with_the_decisive_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "laptop", small(once=("position_only",), decisive=20))
    measurement = measure("position_only", 0, "laptop")
    assert set(measurement.metrics) == {"decisive", "accuracy_20_images", "gate", "distance_start", "distance"}
    assert list(measurement.curves["accuracy"].x) == [20]
    assert measurement.metrics["gate"] == 1


def test_half_of_the_gap_is_marked_by_a_deit_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "laptop", small())
    asked: list[tuple[str, int]] = []
    scores = iter([0.5, 0.7, 0.42])

    def trained(arm: str, seed: int, settings: SmallScale, data: ImageData, count: int) -> tuple[nn.Module, float]:
        asked.append((arm, count))
        return build_classifier(arm, seed, **settings.network), 0.0

    monkeypatch.setattr(claim, "_trained", trained)
    monkeypatch.setattr(claim, "accuracy", lambda *given: next(scores))
    metrics = measure("no_locality", 5, "laptop").metrics
    assert asked == [("no_locality", 8), ("no_locality", 20), ("deit", 8)]
    # Half of the way from 0.42 to 0.58 is 0.5.
    assert metrics["half_mark"] == pytest.approx(0.58)


def test_rates_are_chosen_on_held_out_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCALES, "laptop", small(counts=(8, 20, 30), decisive=20))
    seen: list[tuple[int, int, float]] = []
    data = bright()

    class Answer(nn.Module):
        def __init__(self, right: bool) -> None:
            super().__init__()
            self.right, self.weight = right, nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            label = (images[:, 0, :2].mean((1, 2)) > images[:, 0, 2:].mean((1, 2))).long()
            return nn.functional.one_hot(label if self.right else 1 - label, 2).float()

    def trained(arm: str, seed: int, settings: Any, data: Any, count: int, rate: float) -> tuple[nn.Module, float]:
        seen.append((seed, count, rate))
        if rate == RATES[-1] and seed == 101:
            raise DivergedError("the loss is nan")
        return Answer(rate != RATES[0]), 0.0

    monkeypatch.setattr(claim, "_trained", trained)
    scored: list[Tensor] = []
    score = claim.accuracy

    def note(model: nn.Module, data: ImageData, images: Tensor, labels: Tensor) -> float:
        scored.append(images)
        return score(model, data, images, labels)

    monkeypatch.setattr(claim, "accuracy", note)
    rates = choose_rate("convit", "laptop", seeds=(100, 101))
    assert rates == {RATES[0]: 0.0, **dict.fromkeys(RATES[1:-1], 1.0), RATES[-1]: 0.5}
    assert {cell[:2] for cell in seen} == {(100, 20), (101, 20)}
    assert all(torch.equal(images, data.train[30:]) for images in scored)


@pytest.mark.parametrize("scale", ["laptop", "cifar10"])
def test_held_out_images_are_not_among_the_few(scale: str) -> None:
    settings = SCALES[scale]
    assert isinstance(settings, SmallScale)
    assert settings.decisive + settings.held_out <= {"laptop": 1197, "cifar10": 50_000}[scale]
    assert set(settings.rates.values()) <= set(RATES)


# --- ImageNet --------------------------------------------------------------------------------------------------------


def write_images(folder: Path, classes: int = 3, train: int = 8, val: int = 4) -> Path:
    """A small ImageNet: images of one colour per class."""
    draws = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            home = folder / part / f"n{label:08d}"
            home.mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(40, size=(36, 40, 3))
                pixels[..., label] += 200
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(home / f"{index}.png")
    return folder


@pytest.mark.parametrize("arm", ["convit", "deit"])
def test_the_paper_s_experiment_runs_on_class_folders(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADGATE_IMAGENET", str(write_images(tmp_path)))
    settings = SCALES["paper"]
    assert isinstance(settings, PaperScale)
    recipe = dataclasses.replace(settings.recipe, epochs=2, cooldown_epochs=1, batch_size=6, size=32, precision="fp32")
    options: dict[str, Any] = {"depth": 2, "img_size": 32}
    options |= {"embed_dim": 18, "local_up_to_layer": 1} if arm == "convit" else {"dim": 18}
    tiny = dataclasses.replace(settings, shares=(0.5, 1.0), decisive=0.5, recipe=recipe, options=options)
    monkeypatch.setitem(SCALES, "paper", tiny)
    places: list[list[int]] = []
    train = claim.train_image_classifier

    def note(*given: Any, **named: Any) -> History:
        places.append(named["places"].tolist())
        return train(*given, **named)

    monkeypatch.setattr(claim, "train_image_classifier", note)
    measurement = measure(arm, 0, "paper")
    assert places == [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], list(range(24))]
    assert set(measurement.metrics) == {
        *("decisive", "few", "full", "cost_of_few", "accuracy_50_percent", "accuracy_100_percent")
    }
    assert ("share of position after training" in measurement.curves) == (arm == "convit")


def test_the_paper_s_models_and_recipe_are_the_published_ones() -> None:
    settings = SCALES["paper"]
    assert isinstance(settings, PaperScale)
    with torch.device("meta"):
        convit, deit = settings.models["convit"](), settings.models["deit"]()
    assert isinstance(deit, VisionTransformer)
    assert (count_parameters(convit), deit.num_features, len(deit.blocks)) == (27777322, 384, 12)
    assert convit.blocks[-1].drop_path.rate == deit.blocks[-1].drop_path.rate == 0.1
    assert settings.recipe.learning_rate == pytest.approx(5e-4 * settings.recipe.batch_size / 512)
    assert (settings.recipe.epochs, settings.recipe.warmup_epochs, settings.recipe.cooldown_epochs) == (300, 5, 10)
