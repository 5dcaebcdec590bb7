"""Small denoisers: trained once, the same every time, and they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headgate.data.patch_codecs import PatchPCA
from headgate.data.seeding import stream_generator
from headgate.data.shape_pictures import shape_pictures
from headgate.nn.diffusion import DiT, LinearFlow, denoising_loss
from headgate.train import seeded
from headgate.train.denoisers import ToyRecipe, toy_dit, train_denoiser

TINY = ToyRecipe(steps=30, batch_size=16, num_images=200, depth=1, dim=32, num_heads=2)


def test_a_toy_is_trained_once_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path))
    first = toy_dit(TINY)
    again = toy_dit(TINY)
    assert again.seconds == first.seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    assert not first.model.training
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 1
    toy_dit(replace(TINY, seed=1, steps=1))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == 2


def test_training_lowers_the_loss_on_other_pictures():
    pictures = shape_pictures(400, 0)
    latents = PatchPCA(pictures.images).encode(pictures.images)
    with seeded(0):
        model = DiT(8, 2, 8, 32, 1, 2, num_classes=16)

    def held_out():
        noise, t = torch.randn(200, 8, 8, 8, generator=stream_generator(1)), torch.linspace(0, 1, 200)
        null = torch.full((200,), 16)
        with torch.no_grad():
            return float(denoising_loss(lambda x, t: model(x, t, null), LinearFlow(), latents[200:], noise, t))

    before = held_out()
    history = train_denoiser(model, latents[:200], pictures.label[:200], replace(TINY, steps=120, decay=0.9))
    assert len(history.losses) == 120
    assert held_out() < 0.85 * before


def test_labels_cannot_be_dropped_without_a_null():
    model = torch.nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match="null_label"):
        train_denoiser(model, torch.zeros(4, 8, 8, 8), torch.zeros(4, dtype=torch.int64), TINY)
