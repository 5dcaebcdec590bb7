"""Paths: identities, end points, and the schedules that papers give."""

from __future__ import annotations

import math

import pytest
import torch

from headgate.nn.diffusion import (
    EDM,
    VP,
    CosineFlow,
    LinearFlow,
    OTFlow,
    cosine_betas,
    linear_betas,
    path_from_scheduler,
    scaled_linear_betas,
)

PATHS = {
    "vp": (VP.linear(), torch.tensor([0, 90, 999])),
    "vp-cosine": (VP.cosine(100), torch.tensor([0, 50, 98])),
    "edm": (EDM(), torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)),
    "linear": (LinearFlow(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)),
    "ot": (OTFlow(0.01), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)),
    "cosine": (CosineFlow(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)),
}


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("name", PATHS)
def test_data_and_noise_come_back_from_every_form(name):
    path, t = PATHS[name]
    x0, noise = samples()
    x_t, v = path.add_noise(x0, noise, t), path.velocity(x0, noise, t)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(path.x0_from_velocity(x_t, v, t), x0, **close)
    torch.testing.assert_close(path.noise_from_velocity(x_t, v, t), noise, **close)
    torch.testing.assert_close(path.x0_from_noise(x_t, noise, t), x0, **close)
    torch.testing.assert_close(path.noise_from_x0(x_t, x0, t), noise, **close)
    torch.testing.assert_close(path.velocity_from_noise(x_t, noise, t), v, **close)
    torch.testing.assert_close(path.velocity_from_x0(x_t, x0, t), v, **close)
    torch.testing.assert_close(path.x0_from_vp_v(x_t, path.vp_v(x0, noise, t), t), x0, **close)
    sigma = path.coefficients(t).sigma[:, None, None]
    torch.testing.assert_close(path.score(noise, t), -noise / sigma, **close)


@pytest.mark.parametrize("name", ["linear", "ot", "cosine", "edm"])
def test_derivatives_are_those_of_alpha_and_sigma(name):
    path, t = PATHS[name]
    h = 1e-6
    after, before, here = path.coefficients(t + h), path.coefficients(t - h), path.coefficients(t)
    torch.testing.assert_close(here.alpha_dot, (after.alpha - before.alpha) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(here.sigma_dot, (after.sigma - before.sigma) / (2 * h), rtol=1e-6, atol=1e-8)


def test_ends_are_data_and_noise():
    ends = torch.tensor([0.0, 1.0])
    assert LinearFlow().coefficients(ends).alpha.tolist() == [1, 0]
    assert LinearFlow().coefficients(ends).sigma.tolist() == [0, 1]
    assert OTFlow().coefficients(ends).alpha.tolist() == [0, 1]
    assert OTFlow(0.1).coefficients(ends).sigma.tolist() == pytest.approx([1, 0.1])
    assert CosineFlow().coefficients(ends).sigma.tolist() == [0, 1]
    assert CosineFlow().coefficients(ends).alpha.tolist() == pytest.approx([1, 0], abs=1e-15)


def test_vp_is_the_published_schedule():
    path = VP.linear()
    betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    alpha_bar = math.prod(1 - beta for beta in betas[:91])
    found = path.coefficients(torch.tensor([90]))
    assert float(found.alpha) == pytest.approx(math.sqrt(alpha_bar), rel=1e-12)
    assert float(found.sigma) == pytest.approx(math.sqrt(1 - alpha_bar), rel=1e-12)
    assert path.network_time(torch.tensor([90])).tolist() == [90]
    assert VP.linear(network_scale=1e-3).network_time(torch.tensor([90])).tolist() == pytest.approx([0.09])


def test_betas_begin_and_end_where_they_should():
    assert linear_betas(10)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert scaled_linear_betas(10)[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
    root = scaled_linear_betas(5).sqrt()
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(4))
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)
    want = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(alpha_bar[499]) == pytest.approx(want, rel=1e-9)
    assert float(cosine_betas(1000).max()) == 0.999


def test_edm_preconditioning_keeps_unit_variance():
    path = EDM(0.5)
    skip, out, scale = path.preconditioning(torch.tensor([0.5]))
    assert float(skip) == pytest.approx(0.5)
    assert float(out) == pytest.approx(0.25 / math.sqrt(0.5))
    assert float(scale) == pytest.approx(1 / math.sqrt(0.5))
    assert float(path.network_time(torch.tensor([math.e]))) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("path", "t", "error", "match"),
    [
        (VP.linear(), torch.tensor([1000]), ValueError, r"0\.\.999"),
        (VP.linear(), torch.tensor([-1]), ValueError, r"0\.\.999"),
        (VP.linear(), torch.tensor([0.5]), TypeError, "integer"),
        (LinearFlow(), torch.tensor([1.1]), ValueError, r"\[0, 1\]"),
        (LinearFlow(), torch.tensor([1]), TypeError, "floating"),
        (EDM(), torch.tensor([0.0]), ValueError, "σ > 0"),
        (LinearFlow(), torch.tensor([0.1, 0.2]), ValueError, "one time per sample"),
    ],
)
def test_times_outside_the_domain_are_refused(path, t, error, match):
    with pytest.raises(error, match=match):
        path.add_noise(torch.zeros(1, 2), torch.zeros(1, 2), t)


def test_low_precision_samples_are_mixed_in_float32():
    mixed = LinearFlow().add_noise(torch.ones(1, 2).bfloat16(), torch.zeros(1, 2).bfloat16(), torch.tensor([0.3]))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, torch.full((1, 2), 0.7))


def test_schedulers_of_diffusers_give_their_paths():
    diffusers = pytest.importorskip("diffusers")
    ours = path_from_scheduler(
        diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    torch.testing.assert_close(ours.alphas_bar, VP.scaled_linear().alphas_bar, rtol=1e-4, atol=1e-6)
    x0, noise = (part.float() for part in samples())
    t = torch.tensor([3, 500, 999])
    theirs = diffusers.DDPMScheduler().add_noise(x0, noise, t)
    torch.testing.assert_close(path_from_scheduler(diffusers.DDPMScheduler()).add_noise(x0, noise, t), theirs)
    assert isinstance(path_from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler()), LinearFlow)
    edm = path_from_scheduler(diffusers.EDMEulerScheduler(sigma_data=0.3))
    assert isinstance(edm, EDM)
    assert edm.sigma_data == 0.3
    with pytest.raises(TypeError, match="scheduler"):
        path_from_scheduler(object())
