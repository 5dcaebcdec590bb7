"""The claim's parts: what is measured, on whose terms, and that it repeats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headgate.catalog import load_methods
from headgate.errors import DataError
from headgate.methods.generative.diffusion_classification import ADMUNet, HeadRecipe, claim, experiments
from headgate.methods.generative.diffusion_classification.experiments import (
    Grid,
    PictureNet,
    Rows,
    open_gates,
    probe_table,
)
from headgate.nn.diffusion import DiT


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path))


def test_the_best_cell_is_chosen_on_validation_and_told_on_test():
    validation = np.array([[0.5, 0.2], [0.6, 0.1], [0.9, 0.9]])
    test = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    grid = Grid((1, 2, 3), (0.0, 0.5), validation, test)
    assert grid.best() == (2, 0)
    assert grid.accuracy() == 0.5
    assert grid.accuracy(layers=(1,)) == 0.3
    assert grid.accuracy(times=[1]) == 0.6


def test_a_table_averages_over_draws():
    rows = Rows(40, 20, 20)
    labels = torch.arange(80) % 2
    clear = labels[:, None].float()
    dark = torch.zeros(80, 1)
    grids = probe_table(
        [lambda x: {("a", 0.0): clear[: len(x)]}, lambda x: {("a", 0.0): dark[: len(x)]}], clear, {"y": labels}, rows
    )
    assert grids["y"].test[0, 0] == pytest.approx(0.75, abs=0.01)
    assert grids["y"].validation[0, 0] == pytest.approx(0.75, abs=0.01)


def test_opened_gates_let_the_blocks_act():
    torch.manual_seed(0)
    model = DiT(8, 2, 8, 32, 2, 2, num_classes=3)
    x, t = torch.randn(1, 16, 32), torch.randn(1, 32)
    assert torch.equal(model.blocks[0](x, t), x)
    open_gates(model, 0)
    assert not torch.allclose(model.blocks[0](x, t), x)
    assert model.blocks[1].adaLN_modulation[1].bias.mean().item() == 0.5
    assert model.blocks[1].adaLN_modulation[1].weight.std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("arm", ["trained", "raw", "untrained"])
def test_a_measurement_repeats(arm):
    first, again = claim.measure(arm, 0, "smoke"), claim.measure(arm, 0, "smoke")
    assert first.metrics == again.metrics
    assert claim.measure(arm, 1, "smoke").metrics != first.metrics


def test_every_arm_gives_the_metrics_that_criteria_ask_for():
    method = load_methods()["diffusion-classification"]
    found = {arm: claim.measure(arm, 0, "smoke").metrics for arm in claim.SCALES["smoke"].arms}
    asked = 0
    for criterion in method.claim.criteria:
        if criterion.scales and "smoke" not in criterion.scales:
            continue
        assert criterion.metric in found[criterion.arm]
        asked += 1
        if criterion.against:
            assert (criterion.against_metric or criterion.metric) in found[criterion.against]
    assert asked == 9


def test_rivals_of_the_full_scale_are_measured(monkeypatch):
    tiny = replace(claim.SCALES["smoke"], rival_steps=1, arms=claim.SCALES["full"].arms)
    monkeypatch.setitem(claim.SCALES, "full", tiny)
    for arm in ("unet", "gan"):
        metrics = claim.measure(arm, 0, "full").metrics
        assert 0 <= metrics["shape"] <= 1


def test_the_gan_is_about_as_large_as_the_transformer():
    def size(model):
        return sum(p.numel() for p in model.parameters())

    transformer = DiT(8, 2, 8, 64, 4, 4, num_classes=16)
    players = size(PictureNet([1], (48, 96, 160))) + size(experiments._Generator())
    assert 0.9 < players / size(transformer) < 1.1


def test_unknown_arms_and_scales_are_refused():
    with pytest.raises(ValueError, match="smoke"):
        claim.measure("trained", 0, "huge")
    with pytest.raises(ValueError, match="untrained"):
        claim.measure("gan", 0, "laptop")


def test_every_arm_of_the_card_is_measured_at_its_scales():
    method = load_methods()["diffusion-classification"]
    for scale, settings in claim.SCALES.items():
        named = {arm.name for arm in method.claim.arms if not arm.scales or scale in arm.scales}
        assert named == set(settings.arms)


def test_photographs_are_read_by_a_public_network(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "ddpm"
    torch.manual_seed(0)
    diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    ).save_pretrained(folder)
    monkeypatch.setenv("HEADGATE_DDPM_CIFAR10", str(folder))
    monkeypatch.setenv("HEADGATE_CIFAR10", str(tmp_path))

    class Photographs:
        def __init__(self, path, split):
            generator = torch.Generator().manual_seed(len(split))
            self.images = torch.randint(256, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
            self.labels = torch.arange(60) % 10

        def __len__(self):
            return 60

    monkeypatch.setattr(claim, "Cifar", Photographs)
    monkeypatch.setitem(
        claim.SCALES, "cifar10", replace(claim.SCALES["cifar10"], rows=Rows(40, 10, 20), steps=(0, 500))
    )
    for arm in ("trained", "untrained", "raw"):
        assert 0 <= claim.measure(arm, 0, "cifar10").metrics["shape"] <= 1


def test_the_paper_scale_trains_both_heads(monkeypatch, tmp_path):
    class Folders:
        class_names = ("a", "b", "c")

        def __init__(self, path):
            self.labels = torch.arange(12) % 3

        def central_crops(self, indices, size, share):
            generator = torch.Generator().manual_seed(len(indices))
            return torch.randn(len(indices), 3, 16, 16, generator=generator)

    monkeypatch.setattr(claim, "ImageFolders", Folders)
    monkeypatch.setattr(claim, "imagenet_folder", lambda: tmp_path)
    monkeypatch.setattr(claim, "ADMUNet", lambda: ADMUNet(16, 3, 32, 6, 1, (2,), (1, 2), num_head_channels=32))
    quick = {name: HeadRecipe(epochs=1, batch_size=4) for name in ("linear", "attention")}
    monkeypatch.setitem(claim.SCALES, "paper", replace(claim.SCALES["paper"], classes=2, block=2, recipes=quick))
    metrics = claim.measure("untrained", 0, "paper").metrics
    assert metrics["shape"] == max(metrics["linear2_shape"], metrics["attention_shape"])
    monkeypatch.setenv("HEADGATE_ADM_256", str(tmp_path))
    with pytest.raises(DataError, match="256x256_diffusion_uncond"):
        claim.measure("trained", 0, "paper")
