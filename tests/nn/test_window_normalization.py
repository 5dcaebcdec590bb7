"""Windows lose their level and spread on the way in, and get them back on the way out."""

from __future__ import annotations

import pytest
import torch

from headgate.nn import window_statistics


def test_mean_and_biased_deviation_are_those_of_each_window_and_channel() -> None:
    x = torch.tensor([[[1.0, 10.0], [3.0, 10.0]], [[0.0, -1.0], [4.0, 1.0]]])
    found = window_statistics(x, eps=1e-5)
    assert found.mean[:, 0].tolist() == [[2, 10], [2, 0]]
    torch.testing.assert_close(found.std[:, 0], torch.tensor([[1.0, 0.0], [2.0, 1.0]]).square().add(1e-5).sqrt())


def test_restoring_undoes_normalising_for_any_horizon() -> None:
    x = 5 + 3 * torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(0))
    found = window_statistics(x)
    scaled = found.normalize(x)
    torch.testing.assert_close(scaled.mean(dim=1), torch.zeros(3, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.var(dim=1, correction=0), torch.ones(3, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.restore(scaled), x)
    torch.testing.assert_close(found.restore(torch.zeros(3, 4, 2)), x.mean(dim=1, keepdim=True).expand(3, 4, 2))


def test_a_constant_window_becomes_zeros_and_has_finite_gradients() -> None:
    x = torch.full((1, 5, 1), 7.0, requires_grad=True)
    found = window_statistics(x)
    scaled = found.normalize(x)
    assert (scaled == 0).all()
    assert found.std.item() == pytest.approx(1e-5**0.5)
    (scaled * torch.arange(5.0)[None, :, None]).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_flow_through_mean_and_deviation() -> None:
    x = torch.randn(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: window_statistics(t).normalize(t), x)
    assert torch.autograd.gradcheck(lambda t: window_statistics(t).restore(t[:, :3]), x)


def test_half_precision_is_measured_in_float32_and_handed_back_as_it_came() -> None:
    x = (1000 + torch.arange(6.0))[None, :, None].bfloat16()
    found = window_statistics(x)
    assert found.mean.dtype == torch.float32
    assert found.mean.item() == pytest.approx(x.float().mean().item())
    assert found.normalize(x).dtype == found.restore(x).dtype == torch.bfloat16


def test_what_is_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="x must have shape"):
        window_statistics(torch.zeros(4, 3))
    with pytest.raises(TypeError, match="x must be floating point"):
        window_statistics(torch.zeros(1, 4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one step"):
        window_statistics(torch.zeros(1, 0, 3))
    with pytest.raises(ValueError, match="eps must be positive"):
        window_statistics(torch.zeros(1, 4, 3), eps=0.0)
