"""The claim's experiments: arms and their networks, drawn tokens, steps, and the paper's recipe in small."""

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
from headgate.data.imagenet import ImageFolders
from headgate.errors import DataError
from headgate.evaluate import layerwise_report
from headgate.methods.vision.crate import claim, denoising, experiments, imagenet
from headgate.methods.vision.crate.claim import SCALES, NetworkScale, PaperScale, measure
from headgate.methods.vision.crate.denoising import (
    Mixture,
    SparseCoding,
    code_signals,
    draw_tokens,
    energy_shares,
    unit,
)
from headgate.methods.vision.crate.experiments import ARMS, ImageData, Sizes, Training, build_network, rate_layers
from headgate.methods.vision.crate.recipe import RECIPES
from headgate.train import History, count_parameters

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")
TINY = Sizes(dim=16, depth=2, heads=2, narrow_dim=8, patch_size=4)
NETWORK_METRICS = {"accuracy", "rate_depth", "rate_depth_before", "rate_last"}
NONZERO_METRICS = {"nonzero_depth", "nonzero_depth_before", "nonzero_last"}
STEP_METRICS = {
    *("own_share", "own_gain", "union_share", "union_gain"),
    *(f"{what}_change_{how}" for what in ("rate", "reduction") for how in ("raw", "unit")),
}
CODING_METRICS = {"objective_rise", "objective_left", "zeros_gain"}


def measured_at(scale: str, arm: str) -> set[str]:
    settings = SCALES[scale]
    metrics: set[str] = set()
    if settings.networks and arm in settings.networks.rates:
        metrics |= NETWORK_METRICS | (NONZERO_METRICS if arm not in ("vit", "vit_narrow", "mlp") else set())
    if settings.operator and arm in denoising.STEPS:
        metrics |= STEP_METRICS
    if settings.operator and arm in ("crate", "no_threshold"):
        metrics |= CODING_METRICS
    return metrics


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale, settings in SCALES.items():
        assert set(settings.arms()) == {arm.name for arm in CARD.claim.arms_at(scale)}


@pytest.mark.parametrize("scale", SCALES)
def test_every_criterion_s_metrics_are_measured_at_its_scales(scale: str) -> None:
    criteria = CARD.claim.criteria_at(scale)
    assert criteria
    for criterion in criteria:
        for arm in (criterion.arm, *criterion.controls):
            assert criterion.metric in measured_at(scale, arm)
        if criterion.against is not None:
            assert (criterion.against_metric or criterion.metric) in measured_at(scale, criterion.against)


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"scale must be one of smoke, operator, laptop, .*, got 'huge'"):
        measure("crate", 0, "huge")
    with pytest.raises(ValueError, match="arm must be one of crate, vit_narrow at scale longer, got 'vit'"):
        measure("vit", 0, "longer")


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    return {arm: measure(arm, 100, "smoke") for arm in SCALES["smoke"].arms()}


def test_a_cell_holds_the_metrics_of_the_card(smoke: dict[str, Any]) -> None:
    for arm, measurement in smoke.items():
        assert set(measurement.metrics) == measured_at("smoke", arm), arm
        assert set(measurement.metrics) <= set(CARD.claim.metrics)
        assert all(np.isfinite(value) for value in measurement.metrics.values())
    assert set(smoke["crate"].pictures) == {"attention"}


def test_a_cell_is_the_same_when_measured_again(smoke: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    for arm in ("crate", "vit", "opposite"):
        again = measure(arm, 100, "smoke")
        assert again.metrics == smoke[arm].metrics
        assert again.curves == smoke[arm].curves
    assert torch.equal(before, torch.get_rng_state())
    assert measure("opposite", 101, "smoke").metrics != smoke["opposite"].metrics


# --- networks -------------------------------------------------------------------------------------------------------


def test_baselines_have_the_budgets_of_the_card() -> None:
    counts = {}
    for scale, shape in (
        ("laptop", (1, 8, 8)),
        ("longer", (1, 8, 8)),
        ("cifar10", (3, 32, 32)),
        ("cifar10_full", (3, 32, 32)),
    ):
        settings = SCALES[scale].networks
        assert isinstance(settings, NetworkScale)
        with torch.device("meta"):
            counts[scale] = {
                arm: count_parameters(build_network(arm, settings.sizes, shape, 10)) for arm in settings.rates
            }
        assert abs(counts[scale]["vit_narrow"] / counts[scale]["crate"] - 1) < 0.03, counts[scale]
    assert counts["laptop"]["crate"] == counts["laptop"]["no_threshold"] == counts["laptop"]["frozen"] == 44_706
    assert 3.5 < counts["laptop"]["vit"] / counts["laptop"]["crate"] < 4
    assert abs(counts["laptop"]["mlp"] / counts["laptop"]["crate"] - 1) < 0.02


def test_the_networks_of_a_seed_share_their_shell() -> None:
    states = []
    for arm in ARMS:
        torch.manual_seed(3)
        state = build_network(arm, TINY, (1, 8, 8), 10).state_dict()
        states.append({name: value for name, value in state.items() if not name.startswith("transformer.")})
    for arm, state in zip(ARMS, states, strict=True):
        assert set(state) == set(states[0])
        for name in state:
            assert arm == "vit_narrow" or torch.equal(state[name], states[0][name]), (arm, name)


def test_ablations_change_what_they_are_named_for() -> None:
    crate, frozen, free, mlp, plain = (
        build_network(arm, TINY, (1, 8, 8), 10) for arm in ("crate", "frozen", "no_threshold", "mlp", "attention")
    )
    fixed = {name for name, p in frozen.named_parameters() if not p.requires_grad}
    assert fixed == {f"transformer.layers.{i}.1.fn.weight" for i in range(2)}
    assert all(p.requires_grad for p in crate.parameters())
    assert [layer[1].fn.lambd for layer in free.layers] == [0, 0]
    assert [layer[1].skip for layer in mlp.layers] == [True, True]
    assert [layer[1].skip for layer in plain.layers] == [False, False]
    assert isinstance(plain.layers[0][0].fn, experiments.MultiHeadAttention)
    assert isinstance(mlp.layers[0][0].fn, experiments.MSSA)


@pytest.mark.parametrize("arm", ARMS)
def test_layers_of_every_arm_can_be_measured(arm: str) -> None:
    torch.manual_seed(0)
    model = build_network(arm, TINY, (1, 8, 8), 10)
    x = torch.randn(5, 1, 8, 8)
    report = layerwise_report(model, x, rate_layers(arm, model))
    model.eval()
    with torch.no_grad():
        z = model.layers[0](model._embed(x))
    assert report.rows["layer 1"].zeros == pytest.approx(float((z == 0).float().mean()))
    assert (report.rows["layer 1"].zeros > 0) == (arm not in ("vit", "vit_narrow", "mlp"))
    assert all(rate > 0 for rate in report.column("coding_rate"))


def test_training_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.update(options, model=model, batches=batches, loss=loss)
        return History(losses=[1.0] * options["steps"])

    monkeypatch.setattr(experiments, "fit", fit)
    settings = SCALES["laptop"].networks
    assert isinstance(settings, NetworkScale)
    data = settings.data(0, False)
    assert (len(data.train), len(data.test)) == (1197, 600)
    model, untrained, losses = experiments.train_network("crate", settings.sizes, settings.training, 2e-3, data, 0)
    assert len(losses) == given["steps"] == 300
    for name, value in model.state_dict().items():
        assert torch.equal(value, untrained.state_dict()[name])
    assert given["schedule"](0) == 1
    assert given["schedule"](150) == pytest.approx(0.5)
    groups = given["optimizer"].param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(2e-3, 0.0), (2e-3, 0.05)}
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {id(model.cls_token), id(model.pos_embedding), id(model.mlp_head[0].weight)} <= spared
    assert id(model.layers[0][1].fn.weight) not in spared
    pixels, labels = given["batches"](3)
    assert pixels.shape == (96, 1, 8, 8)
    torch.testing.assert_close(
        given["loss"](model, (pixels, labels)), nn.functional.cross_entropy(model(pixels), labels)
    )


def test_choosing_leaves_the_test_images_alone() -> None:
    data, choosing = experiments.digit_images(4, False), experiments.digit_images(4, True)
    assert (len(choosing.train), len(choosing.test)) == (957, 240)

    def rows(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    assert not rows(choosing.test) & rows(data.test)
    assert not rows(choosing.train) & rows(choosing.test)


def test_augmentation_depends_on_the_seed_and_the_step_alone() -> None:
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, again, later = (experiments._rand_augment(images, 5, step) for step in (2, 2, 3))
    assert torch.equal(one, again)
    assert not torch.equal(one, later)
    assert one.shape == images.shape
    assert not torch.equal(one, images)


def test_cifar_is_read_and_trained_on(monkeypatch: pytest.MonkeyPatch, shared_dir: Path) -> None:
    monkeypatch.setenv("HEADGATE_SHARED", str(shared_dir))
    monkeypatch.delenv("HEADGATE_CIFAR10", raising=False)
    generator = torch.Generator().manual_seed(0)

    class Few:
        """Stands for the reader, which takes seconds to decode 60,000 images."""

        def __init__(self, folder: Path, split: str, cache: Path) -> None:
            assert folder == shared_dir / "data" / "cifar10"
            count = 5040 if split == "train" else 20
            self.images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
            self.labels = torch.arange(count) % 10

        def __len__(self) -> int:
            return len(self.labels)

    monkeypatch.setattr(experiments, "Cifar", Few)
    data = experiments.cifar_images(0, True, count=32)
    assert (len(data.train), len(data.test), data.augmentation) == (32, 5000, "rand")
    assert len(experiments.cifar_images(0, False, count=32).test) == 20
    small = data._replace(test=data.test[:10], test_labels=data.test_labels[:10])
    sizes = dataclasses.replace(TINY, patch_size=8)
    model, _, losses = experiments.train_network("crate", sizes, Training(batch_size=16, steps=2), 1e-3, small, 0)
    assert len(losses) == 2
    expected = (model(small.standardize(small.test)).argmax(1) == small.test_labels).double().mean()
    assert experiments.image_accuracy(model, small) == pytest.approx(float(expected))


def test_missing_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HEADGATE_SHARED", "HEADGATE_CIFAR10", "HEADGATE_IMAGENET"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(DataError, match="HEADGATE_CIFAR10"):
        measure("crate", 0, "cifar10")
    with pytest.raises(DataError, match="HEADGATE_IMAGENET"):
        measure("crate", 0, "paper")


# --- tokens and signals ---------------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_the_card_says() -> None:
    tokens = draw_tokens(Mixture(), 0)
    assert tokens.z.shape == (256, 32)
    torch.testing.assert_close(tokens.z.norm(dim=1), torch.ones(256, dtype=torch.float64))
    for bases in (tokens.bases, tokens.other_bases):
        columns = bases.permute(1, 0, 2).flatten(1)
        torch.testing.assert_close(columns.T @ columns, torch.eye(16, dtype=torch.float64))
    assert not torch.equal(tokens.bases, tokens.other_bases)
    clean = draw_tokens(Mixture(noise=0.0), 0)
    assert energy_shares(clean.z, clean) == pytest.approx((1, 1))
    assert energy_shares(-7 * tokens.z, tokens) == pytest.approx(energy_shares(tokens.z, tokens))


def test_energy_of_a_hand_computed_token() -> None:
    bases = torch.eye(4, dtype=torch.float64)[:, [0, 1]].T[:, :, None]
    tokens = denoising.Tokens(torch.zeros(1, 4), bases, torch.tensor([1]), bases)
    z = torch.tensor([[1.0, 2.0, 2.0, 4.0]], dtype=torch.float64)
    assert energy_shares(z, tokens) == pytest.approx((4 / 25, 5 / 25))


def test_steps_are_what_they_are_named_for() -> None:
    mixture = Mixture(num_tokens=20)
    tokens = draw_tokens(mixture, 1)
    moved = {name: denoising.step(name, tokens, mixture) for name in denoising.STEPS}
    torch.testing.assert_close(moved["shrink"], tokens.z / 2)
    # A step and its opposite lie on either side of the tokens.
    torch.testing.assert_close(moved["crate"] + moved["opposite"], 2 * tokens.z)
    inside = torch.einsum("hdp,hep->de", tokens.bases, tokens.bases)
    torch.testing.assert_close(moved["uniform"], tokens.z / 2 + 0.5 * (tokens.z.mean(0) @ inside).expand(20, -1))
    swapped = tokens._replace(bases=tokens.other_bases)
    torch.testing.assert_close(moved["random_subspaces"], denoising.step("crate", swapped, mixture))
    with pytest.raises(ValueError, match="name must be one of crate, random_subspaces"):
        denoising.step("none", tokens, mixture)


def test_shrinking_lowers_the_rate_of_any_tokens_but_moves_no_energy() -> None:
    mixture = Mixture()
    tokens = draw_tokens(mixture, 2)
    raw = denoising.step("shrink", tokens, mixture)
    assert denoising.rates(raw, tokens, 0.05)[0] < denoising.rates(tokens.z, tokens, 0.05)[0] - 1
    torch.testing.assert_close(unit(raw), tokens.z)
    assert energy_shares(raw, tokens) == pytest.approx(energy_shares(tokens.z, tokens))


def test_signals_are_coded_from_themselves_and_the_objective_is_followed() -> None:
    coding = SparseCoding(num_signals=50, steps=4)
    objective, zeros = code_signals(coding, 0, 0.1)
    assert (len(objective), len(zeros)) == (5, 4)
    assert objective == sorted(objective, reverse=True)
    # Without noise and threshold the codes themselves are found, to the share of zeros with which they were drawn.
    long = SparseCoding(num_signals=400, noise=0.0, steps=400)
    objective, _ = code_signals(long, 0, 0.0)
    assert objective[-1] < 1e-9 * objective[0]
    assert code_signals(long, 0, 0.05)[1][-1] == pytest.approx(0.9, abs=0.02)


# --- the paper's own setting ----------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label in range(2):
            folder = tmp_path / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize("arm", ["crate", "vit_narrow"])
def test_the_paper_s_setting_runs_in_small(arm: str, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADGATE_IMAGENET", str(photographs))
    recipe = dataclasses.replace(RECIPES["imagenet"], epochs=2, batch_size=4, warmup_epochs=1)
    size = {"img_size": 32} if arm == "vit_narrow" else {"image_size": 32}
    tiny = {"dim": 12, "depth": 2, **({"num_heads": 2} if arm == "vit_narrow" else {"heads": 2})}
    settings = PaperScale({"crate": 1e-3, "vit_narrow": 1e-3}, recipe, 32, 4, {**size, **tiny})
    monkeypatch.setitem(SCALES, "paper", claim.Settings(settings))
    found = measure(arm, 0, "paper")
    assert set(found.metrics) == measured_at("paper", arm)
    assert 0 <= found.metrics["accuracy"] <= 1
    assert len(found.curves["coding rate by layer, after training"].y) == 2
    assert measure(arm, 0, "paper").metrics == found.metrics


def test_a_recipe_s_augmentation_reaches_the_crops(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def change(image: Any, generator: torch.Generator, **options: Any) -> Any:
        given.append(options)
        return image

    monkeypatch.setattr(imagenet, "rand_augment", change)
    train, _ = imagenet.open_folders(photographs)
    for name, seen in (("imagenet", 0), ("fine_grained", 4)):
        given.clear()
        recipe = dataclasses.replace(RECIPES[name], epochs=1, batch_size=4)
        model = imagenet.build_classifier("crate", 2, image_size=32, dim=12, depth=1, heads=2)
        imagenet.train_classifier(model, train, recipe, 1e-3, 32, seed=0)
        assert len(given) == seen * 3
    assert given[0] == {"magnitude": 14 / 3, "deviation": 0.0, "operations": 2, "probability": 1.0}


def test_the_paper_s_models_are_the_presets() -> None:
    with torch.device("meta"):
        assert count_parameters(imagenet.build_classifier("crate", 1000)) == 6_090_856
        assert count_parameters(imagenet.build_classifier("vit_narrow", 1000)) == 5_717_416


def test_folders_of_different_classes_are_refused(photographs: Path) -> None:
    train, test = imagenet.open_folders(photographs)
    assert isinstance(train, ImageFolders)
    assert (len(train), len(test)) == (12, 6)
    (photographs / "val" / "class1").rename(photographs / "val" / "class2")
    with pytest.raises(DataError, match="must hold the same classes"):
        imagenet.open_folders(photographs)


def test_images_are_standardised() -> None:
    data = ImageData(
        torch.full((1, 1, 2, 2), 4),
        torch.zeros(1),
        torch.zeros(1),
        torch.zeros(1),
        torch.tensor(2.0),
        torch.tensor(0.5),
    )
    assert data.standardize(data.train).tolist() == [[[[4.0, 4.0], [4.0, 4.0]]]]
