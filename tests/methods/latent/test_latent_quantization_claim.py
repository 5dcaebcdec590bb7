"""The experiment: its data, what the arms share, and that it gives the same numbers again."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from headgate.catalog import read_card
from headgate.errors import DataError
from headgate.evaluate import infomec
from headgate.methods.latent.latent_quantization import claim, experiments, qlae, worlds
from headgate.methods.latent.latent_quantization.claim import SCALES, measure
from headgate.methods.latent.latent_quantization.experiments import ARMS
from headgate.train import count_parameters, seeded

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADGATE_CACHE", str(tmp_path_factory.mktemp("models")))
        return {arm.name: measure(arm.name, 100, "smoke") for arm in CARD.claim.arms_at("smoke")}


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(ARMS) == {arm.name for arm in CARD.claim.arms}
    assert set(SCALES) == set(CARD.claim.scales)
    for scale, settings in SCALES.items():
        named = {arm.name for arm in CARD.claim.arms_at(scale)}
        assert {claim._trained_as(arm) for arm in named} | {"ae_binned"} == {*settings.rates, "ae_binned"}
        assert set(settings.decays) == set(settings.rates)


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"arm must be one of qlae, ae, ae_decay, .* got 'pca'"):
        measure("pca", 0, "smoke")
    with pytest.raises(ValueError, match=r"arm must be one of qlae, .*, ae_early, got 'vq_vae'"):
        measure("vq_vae", 0, "laptop")
    with pytest.raises(ValueError, match=r"scale must be one of smoke, laptop, .*paper, got 'huge'"):
        measure("qlae", 0, "huge")


@pytest.mark.parametrize(("side", "radii"), [(12, (0.2, 0.26, 0.32)), (16, None)])
def test_the_world_is_the_full_grid_of_six_factors(side: int, radii: tuple[float, float, float] | None) -> None:
    images = worlds.scene_images(side, radii)
    assert (images.size, images.shape) == (8100, (3, side, side))
    factors = images.factors(torch.arange(8100))
    assert [int(column.max()) + 1 for column in factors.T] == [3, 3, 5, 5, 6, 6]
    assert len(torch.unique(factors, dim=0)) == 8100
    pixels = images.pixels(torch.arange(8100))
    assert len(torch.unique(pixels.flatten(1), dim=0)) == 8100
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1


@pytest.mark.parametrize(("scale", "product"), [("laptop", 0.3), ("longer", 4.0)])
def test_rate_times_decay_times_steps_is_the_same_for_every_arm_that_decays(scale: str, product: float) -> None:
    settings = SCALES[scale]
    for arm, rate in settings.rates.items():
        is_decayed = arm in ("qlae", "ae_decay", "shared_codebook", "ae_early")
        assert rate * settings.decays[arm] * settings.steps == pytest.approx(product if is_decayed else 0.0)
        assert rate in claim.RATES


@pytest.mark.parametrize("arm", ["qlae", "ae_binned", "ql_infowgan"])
def test_a_cell_is_the_same_when_measured_again(arm: str, smoke: dict[str, Any]) -> None:
    again = measure(arm, 100, "smoke")
    np.testing.assert_equal(dict(again.metrics), dict(smoke[arm].metrics))  # modularity is NaN, see below
    assert again.curves == smoke[arm].curves
    for name, picture in again.pictures.items():
        np.testing.assert_array_equal(picture, smoke[arm].pictures[name])


def test_measuring_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    measure("ql_infowgan", 100, "smoke")
    assert torch.equal(before, torch.get_rng_state())


def test_arms_begin_with_the_same_weights_and_see_the_same_batches() -> None:
    settings = SCALES["smoke"]
    images = settings.images()
    models = {}
    for arm in ("qlae", "ae", "shared_codebook", "infowgan"):
        with seeded(5):
            models[arm] = experiments.build(arm, settings.sizes, images)
    for part in ("encoder", "decoder"):
        states = [dict(model.get_submodule(part).named_parameters()) for model in models.values()]
        assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])
    seen: dict[str, list[torch.Tensor]] = {"qlae": [], "ae": []}
    for arm, indices in seen.items():
        watched = dataclasses.replace(images, pixels=functools.partial(_note, images, indices))
        experiments.train(models[arm], watched, steps=3, batch_size=8, learning_rate=1e-3, weight_decay=0.0, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(seen["qlae"], seen["ae"], strict=True))
    assert len(seen["qlae"]) == 3


def _note(images: worlds.Images, kept: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    kept.append(index)
    return images.pixels(index)


def test_the_encoder_s_last_weights_are_scaled_in_every_arm() -> None:
    images = worlds.scene_images()
    for arm in ("qlae", "ae", "ql_infowgan"):
        with seeded(1):
            plain = experiments.build(arm, experiments.Sizes(experiments.dense_networks(8), 3, 4), images)
        with seeded(1):
            scaled = experiments.build(arm, experiments.Sizes(experiments.dense_networks(8), 3, 4, 8.0), images)
        torch.testing.assert_close(scaled.encoder.head.weight, 8 * plain.encoder.head.weight)
        torch.testing.assert_close(scaled.encoder.head.bias, plain.encoder.head.bias)


def test_budgets_match() -> None:
    settings = SCALES["laptop"]
    counts = {}
    for arm in settings.rates:
        counts[arm] = count_parameters(experiments.build(arm, settings.sizes, settings.images()))
    networks = 2 * (128 * 128 + 128) + (432 * 128 + 128) + (128 * 12 + 12) + (12 * 128 + 128) + (128 * 432 + 432)
    assert counts["ae"] == counts["ae_decay"] == counts["ae_early"] == networks
    assert counts["qlae"] == counts["qlae_no_decay"] == networks + 12 * 8
    assert counts["shared_codebook"] == networks + 8


def test_the_control_reads_the_very_model_of_its_baseline(smoke: dict[str, Any]) -> None:
    assert smoke["ae_binned"].curves["training loss"] == smoke["ae_decay"].curves["training loss"]
    assert smoke["ae_binned"].metrics["infoe"] != smoke["ae_decay"].metrics["infoe"]
    assert smoke["ae_binned"].base_seconds == smoke["ae_decay"].base_seconds > 0


def test_the_other_control_stops_as_soon_as_it_reconstructs_well_enough() -> None:
    images = worlds.scene_images()
    settings = {"steps": 60, "batch_size": 32, "learning_rate": 4e-3, "weight_decay": 0.1, "seed": 0}
    lengths, reached = [], []
    for target in (12.5, 14.0, 99.0):
        with seeded(3):
            model = experiments.build("ae_early", SCALES["smoke"].sizes, images)
        lengths.append(len(experiments.train(model, images, **settings, stop_psnr=target)))
        reached.append(experiments.read(model, images, torch.arange(0, 8100, 9)).psnr)
    assert lengths[0] < lengths[1] < lengths[2] == 60
    assert all(length % 10 == 0 for length in lengths)
    assert reached[0] > 12.3
    assert reached[1] > 13.8


class Summary(torch.nn.Module):
    """Encodes an image by the mean and the maximum of its pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.flatten(1).mean(dim=1), x.flatten(1).amax(dim=1)], dim=1)


def test_reading_measures_psnr_and_bins_are_equally_wide() -> None:
    images, index = worlds.scene_images(), torch.arange(0, 8100, 20)
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 768), torch.nn.Unflatten(1, (3, 16, 16)))
    torch.nn.init.zeros_(decoder[0].weight)
    torch.nn.init.zeros_(decoder[0].bias)
    model = experiments.PlainAE(Summary(), decoder)
    plain = experiments.read(model, images, index)
    pixels = images.pixels(index)
    assert plain.psnr == pytest.approx(-10 * math.log10(float((pixels - 0.5).square().mean())), abs=1e-3)
    torch.testing.assert_close(plain.latents, Summary()(pixels))
    assert plain.inputs is not None
    assert not plain.discrete
    binned = experiments.read(model, images, index, bins=4)
    low, high = plain.latents.min(dim=0).values, plain.latents.max(dim=0).values
    place = (plain.latents - low) / (high - low) * 4
    assert binned.discrete
    # A value at an edge may round to either side of it.
    inside = (place - place.round()).abs() > 1e-4
    assert torch.equal(binned.latents[inside], place.floor().clamp(max=3).long()[inside])
    assert set(binned.latents.unique().tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(binned.inputs, low + (binned.latents + 0.5) * (high - low) / 4)


def test_metrics_are_those_of_infomec_and_a_dead_code_counts_as_not_modular() -> None:
    factors = torch.cartesian_prod(torch.arange(3), torch.arange(4)).repeat(10, 1)
    scores = infomec(factors, factors, discrete=True)
    metrics = claim._metrics(scores)
    assert metrics["infom"] == pytest.approx(1)
    assert metrics["active"] == 2
    with pytest.warns(RuntimeWarning, match="undefined"):
        dead = infomec(factors, torch.zeros_like(factors), discrete=True, zero="ignore")
    assert claim._metrics(dead) == {"infom": 0.0, "infoe": pytest.approx(0, abs=1e-6), "infoc": 0.0, "active": 0.0}
    curve = claim._information_curve(scores)
    assert curve.y == pytest.approx([1, 0], abs=1e-9)


def test_an_untrained_model_fails_it_has_no_modularity_and_says_what_it_would_have_been(smoke: dict[str, Any]) -> None:
    for measurement in smoke.values():
        assert measurement.metrics["trained"] == 0
        assert math.isnan(measurement.metrics["infom"])
        assert math.isnan(measurement.metrics["infoc"])
        assert measurement.metrics["infoe"] < 0.3
        assert 0 <= measurement.notes["untrained, its InfoM"] <= 1


def test_the_guard_looks_at_explicitness_and_at_reconstruction() -> None:
    factors = torch.cartesian_prod(torch.arange(3), torch.arange(4)).repeat(10, 1)
    scores = infomec(factors, factors, discrete=True)
    for infoe, psnr, trained in ((1.0, 16.9, 0), (1.0, 17.1, 1), (0.29, 17.1, 0), (0.31, 17.1, 1)):
        graded = dataclasses.replace(scores, infoe=infoe)
        metrics = claim._guarded(graded, experiments.Reading(factors, True, factors, psnr))
        assert metrics["trained"] == trained
        assert math.isnan(metrics["infom"]) == math.isnan(metrics["infoc"]) == (not trained)
        assert (metrics["infoe"], metrics["psnr"]) == (infoe, psnr)


def test_the_laptop_draws_other_seeds_than_those_that_its_setting_was_changed_after(
    smoke: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SCALES["laptop"].first_seed >= CARD.claim.scale("laptop").seeds
    monkeypatch.setitem(SCALES, "smoke", dataclasses.replace(SCALES["smoke"], first_seed=98))
    moved = measure("qlae", 2, "smoke")
    np.testing.assert_equal(dict(moved.metrics), dict(smoke["qlae"].metrics))
    assert moved.notes["drawn with seed"] == smoke["qlae"].notes["drawn with seed"] == 100


def test_pictures_show_every_latent_in_use_and_its_values(smoke: dict[str, Any]) -> None:
    for measurement in smoke.values():
        active = int(measurement.metrics["active"])
        assert measurement.pictures["traversals"].shape == ((1 + active) * 17 * 2, 8 * 17 * 2, 3)
        assert measurement.pictures["information"].min() < 100
    values = claim._values(torch.tensor([0.5, -0.5, 0.5]), torch.tensor([3, 1, 3]), discrete=True)
    assert values.tolist() == [-0.5, 0.5]
    assert claim._values(torch.tensor([0.0, 7.0]), torch.tensor([0.0, 7.0]), discrete=False).tolist() == list(range(8))


def test_choosing_a_rate_keeps_the_decay_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(model: Any, images: Any, settings: Any, rate: float, decay: float, seed: int) -> list[float]:
        seen.append((rate, rate * decay, seed))
        return [0.0]

    monkeypatch.setattr(claim, "_fit", note)
    found = claim.choose_rate("qlae", "smoke", seeds=(100, 101))
    assert found == dict.fromkeys(claim.RATES, 0.0)
    assert [entry[0] for entry in seen] == [rate for rate in claim.RATES for _ in range(2)]
    assert all(entry[1] == pytest.approx(2e-4) for entry in seen)
    assert [entry[2] for entry in seen] == [100, 101] * 3


def write_shapes3d(path: Path) -> None:
    """The layout of 3dshapes.h5 with 2 values per factor: images of 16 pixels whose colours are the hues."""
    grid = np.stack(np.unravel_index(np.arange(64), (2,) * 6), axis=1)
    images = np.zeros((64, 16, 16, 3), dtype=np.uint8)
    images[:, 8:] = 100 * grid[:, None, None, 0:3]
    images[:, :8] = 100 * grid[:, None, None, 3:6]
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, grid.astype(np.float64)


@pytest.mark.parametrize("arm", ["qlae", "beta_vae", "tc_vae", "bio_ae", "vq_vae", "ql_infowgan", "infowgan"])
def test_the_paper_s_experiment_runs_on_shapes3d_s_file(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADGATE_SHAPES3D", raising=False)
    with pytest.raises(DataError, match="set HEADGATE_SHAPES3D"):
        measure(arm, 0, "paper")
    write_shapes3d(tmp_path / "3dshapes.h5")
    monkeypatch.setenv("HEADGATE_SHAPES3D", str(tmp_path / "3dshapes.h5"))
    images = worlds.shapes3d_images()
    assert (images.size, images.shape) == (64, (3, 16, 16))
    assert float(images.pixels(torch.tensor([63]))[0, 0, 0, 0]) == pytest.approx(100 / 255)
    paper = dataclasses.replace(SCALES["paper"], steps=2, scored=64, batch_size=4, gan_batch_size=4)
    monkeypatch.setitem(SCALES, "paper", paper)
    monkeypatch.setattr(experiments, "image_networks", _small_networks)
    measured = measure(arm, 0, "paper")
    assert {"infom", "infoe", "infoc", "psnr", "active", "trained"} == set(measured.metrics)
    assert measured.notes["weight decay"] == SCALES["paper"].decays[arm]
    # The decoder of a VQ-VAE reads 64 numbers per latent.
    assert ("traversals" in measured.pictures) == (arm != "vq_vae")


def _small_networks(inputs: int, img_size: int, in_chans: int, **options: Any) -> Any:
    return qlae.image_networks(inputs, img_size, in_chans, "small", **options)
