"""Samplers against closed forms and diffusers; guidance; losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from headgate.nn.diffusion import (
    EDM,
    VP,
    Guidance,
    LinearFlow,
    denoising_loss,
    edm_loss,
    edm_sigmas,
    sample_ddim,
    sample_edm,
    sample_ode,
    sample_sde,
)


def gaussian_velocity(deviation):
    """v(x, t) of a linear flow whose data are N(0, deviation²): the exact one."""

    def velocity(x, t):
        t = t.reshape(-1, 1)
        variance = (1 - t) ** 2 * deviation**2 + t**2
        return x * (t - (1 - t) * deviation**2) / variance

    return velocity


def test_heun_is_of_second_and_euler_of_first_order():
    def error(method, steps):
        times = [k / steps for k in range(steps + 1)]
        start = torch.ones(1, 1, dtype=torch.float64)
        return abs(float(sample_ode(lambda x, t: -x, start, times, method)) - math.exp(-1))

    assert 3.7 < error("heun", 20) / error("heun", 40) < 4.3
    assert 1.9 < error("euler", 20) / error("euler", 40) < 2.1


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_samples_have_the_deviation_of_the_data(kind):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    times = [1 - k / 250 for k in range(251)]
    if kind == "ode":
        found = sample_ode(gaussian_velocity(0.5), start, times, "heun")
    else:
        found = sample_sde(gaussian_velocity(0.5), LinearFlow(), start, times, generator=generator)
    assert float(found.std()) == pytest.approx(0.5, abs=0.015)
    assert float(found.mean()) == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_that_of_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def predict(x, t):
        return 0.3 * x + 0.001 * t.reshape(-1, 1, 1, 1)

    x, noise = start, torch.Generator().manual_seed(2)
    for time in scheduler.timesteps:
        x = scheduler.step(predict(x, time.expand(2)), time, x, eta=eta, generator=noise).prev_sample
    ours = sample_ddim(predict, VP.linear(), start, 20, eta, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


def test_euler_equals_flow_matching_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(7)
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    x = start
    for time in scheduler.timesteps:
        x = scheduler.step(0.5 * x + time / 1000, time, x).prev_sample
    ours = sample_ode(lambda x, t: 0.5 * x + t.reshape(-1, 1), start, scheduler.sigmas.tolist())
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_edm_reaches_the_data_of_a_gaussian():
    path = EDM(0.5)
    start = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def zero(x, t):  # for data of deviation σ_d the best F is 0
        return torch.zeros_like(x)

    found = sample_edm(zero, path, start, edm_sigmas(100))
    assert float(found.std()) == pytest.approx(0.5, abs=0.01)
    churned = sample_edm(zero, path, start, edm_sigmas(100), churn=20, generator=torch.Generator().manual_seed(1))
    assert float(churned.std()) == pytest.approx(0.5, abs=0.01)
    levels = edm_sigmas(18)
    assert levels[[0, -2, -1]].tolist() == pytest.approx([80, 0.002, 0])


def test_one_generator_gives_one_sample():
    start = torch.randn(4, 2, generator=torch.Generator().manual_seed(3))
    first, second = (
        sample_ddim(lambda x, t: 0.1 * x, VP.linear(), start, 10, 1.0, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_steps_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divide"):
        sample_ddim(lambda x, t: x, VP.linear(), torch.zeros(1, 1), 7)
    with pytest.raises(ValueError, match="at least two"):
        sample_ode(lambda x, t: x, torch.zeros(1, 1), [1.0])
    with pytest.raises(ValueError, match="fall"):
        sample_edm(lambda x, t: x, EDM(), torch.zeros(1, 1), [1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="shape of x"):
        sample_ode(lambda x, t: x[:, :1], torch.zeros(1, 2), [1.0, 0.0])


def test_guidance_mixes_both_predictions_within_its_interval():
    def predict(x, t, c):
        return x + 10.0 * c.reshape(-1, 1)

    x, c, null = torch.zeros(2, 1), torch.tensor([1.0, 2.0]), torch.zeros(2)
    t = torch.full((2,), 0.5)
    assert torch.equal(Guidance(predict, c, null, 1.0)(x, t), predict(x, t, c))
    assert torch.equal(Guidance(predict, c, None)(x, t), predict(x, t, c))
    assert Guidance(predict, c, null, 3.0)(x, t).flatten().tolist() == [30, 60]
    assert Guidance(predict, c, null, 0.0)(x, t).flatten().tolist() == [0, 0]
    assert Guidance(predict, c, null, 3.0, (0.0, 0.4))(x, t).flatten().tolist() == [10, 20]
    with pytest.raises(ValueError, match="null"):
        Guidance(predict, c, None, 2.0)


@pytest.mark.parametrize(("target", "wanted"), [("noise", 2.0), ("x0", 1.0), ("velocity", 1.0), ("vp_v", 1.25)])
def test_the_loss_is_the_squared_error_of_its_target(target, wanted):
    x0, noise, t = torch.full((1, 1), 1.0), torch.full((1, 1), 2.0), torch.tensor([0.25])
    loss = denoising_loss(lambda x, t: torch.zeros_like(x), LinearFlow(), x0, noise, t, target)
    assert float(loss) == pytest.approx(wanted**2)


def test_the_loss_shows_the_network_noisy_samples_and_its_times():
    seen = {}

    def predict(x, t):
        seen.update(x=x, t=t)
        return torch.cat([x, x], dim=1)

    path = VP.linear(network_scale=0.001)
    errors = denoising_loss(predict, path, torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 500]), "x0", "none")
    alpha = path.coefficients(torch.tensor([0, 500])).alpha.float()
    torch.testing.assert_close(seen["x"].flatten(), alpha)
    torch.testing.assert_close(seen["t"], torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(errors, (alpha - 1).square())
    with pytest.raises(ValueError, match="target"):
        denoising_loss(predict, path, torch.ones(2, 1), torch.zeros(2, 1), torch.tensor([0, 1]), "eps")


def test_edm_loss_of_a_silent_network_is_that_of_skipping():
    x0, noise, sigma = torch.full((1, 1), 1.0), torch.full((1, 1), 2.0), torch.tensor([0.5])
    loss = edm_loss(lambda x, t: torch.zeros_like(x), EDM(0.5), x0, noise, sigma)
    # D = 0.5 · (1 + 0.5 · 2) = 1, which is x0.
    assert float(loss) == pytest.approx(0, abs=1e-12)
    loss = edm_loss(lambda x, t: torch.ones_like(x), EDM(0.5), x0, noise, sigma)
    assert float(loss) == pytest.approx(1, rel=1e-6)
