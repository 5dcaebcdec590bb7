"""The quantiser: nearest values, straight-through gradients, what moves what, sampling."""

from __future__ import annotations

import pytest
import torch

from headgate import LatentQuantizer


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.4


def test_each_latent_takes_the_nearest_value_of_its_own_codebook() -> None:
    quantizer = LatentQuantizer(2, 3)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[-1.0, 0.0, 3.0], [0.5, -0.5, 9.0]]))
    out = quantizer(torch.tensor([[-0.4, -0.4], [1.6, 0.1], [-9.0, 5.0]]))
    assert out.indices.tolist() == [[1, 1], [2, 0], [0, 2]]
    assert out.indices.dtype == torch.int64
    assert out.quantized.tolist() == [[0.0, -0.5], [3.0, 0.5], [-1.0, 9.0]]
    torch.testing.assert_close(out.z_hat, out.quantized)


def test_codebooks_begin_evenly_spread_and_the_first_of_two_nearest_values_wins() -> None:
    quantizer = LatentQuantizer(3, [2, 3, 5])
    expected = ([-0.5, 0.5], [-0.5, 0.0, 0.5], [-0.5, -0.25, 0.0, 0.25, 0.5])
    for values, numbers in zip(quantizer.values, expected, strict=True):
        torch.testing.assert_close(values, torch.tensor(numbers))
    assert quantizer(torch.tensor([[0.0, 0.25, 0.125]])).indices.tolist() == [[0, 1, 2]]


def test_padding_is_never_chosen_and_ragged_codebooks_equal_separate_ones() -> None:
    levels = [2, 7, 4]
    z = latents(50, 3)
    out = LatentQuantizer(3, levels)(z)
    for latent, count in enumerate(levels):
        alone = LatentQuantizer(1, count)(z[:, latent : latent + 1])
        assert torch.equal(out.indices[:, latent], alone.indices[:, 0])
        assert int(out.indices[:, latent].max()) == count - 1
    assert LatentQuantizer(2, [2, 5])(torch.zeros(1, 2)).indices.tolist() == [[0, 2]]


def test_losses_and_gradients_equal_their_definition() -> None:
    quantizer = LatentQuantizer(3, 4, commitment_weight=0.3, quantization_weight=0.7)
    z = latents(5, 3).requires_grad_()
    out = quantizer(z)
    distance = (z.detach() - out.quantized.detach()).square().mean(dim=1)
    torch.testing.assert_close(out.quantization_loss, distance)
    torch.testing.assert_close(out.commitment_loss, distance)
    torch.testing.assert_close(out.loss_per_sample, distance)
    torch.testing.assert_close(out.loss, distance.mean())
    out.loss.backward()
    difference = (z - out.quantized).detach()
    torch.testing.assert_close(z.grad, 0.3 * 2 * difference / 15)
    expected = torch.zeros(3, 4)
    for row in range(5):
        for latent in range(3):
            expected[latent, out.indices[row, latent]] -= 0.7 * 2 * difference[row, latent] / 15
    torch.testing.assert_close(quantizer.codebook.grad, expected)


def test_what_reads_z_hat_moves_the_encoder_unchanged_and_no_codebook() -> None:
    quantizer = LatentQuantizer(3, 4)
    z, weights = latents(5, 3).requires_grad_(), latents(5, 3, seed=1)
    (quantizer(z).z_hat * weights).sum().backward()
    assert torch.equal(z.grad, weights)
    assert quantizer.codebook.grad is None


def test_a_frozen_codebook_gets_no_gradient_but_the_encoder_is_still_held_to_it() -> None:
    quantizer = LatentQuantizer(3, 4, learnable=False)
    z = latents(5, 3).requires_grad_()
    quantizer(z).loss.backward()
    assert quantizer.codebook.grad is None
    assert z.grad.abs().sum() > 0


def test_a_shared_codebook_is_one_row_that_all_latents_move() -> None:
    shared, own = LatentQuantizer(3, 4, shared=True), LatentQuantizer(3, 4)
    z = latents(6, 3)
    first, second = shared(z), own(z)
    assert torch.equal(first.indices, second.indices)
    first.loss.backward()
    second.loss.backward()
    assert shared.codebook.shape == (1, 4)
    torch.testing.assert_close(shared.codebook.grad, own.codebook.grad.sum(dim=0, keepdim=True))
    assert [values.tolist() for values in shared.values] == [values.tolist() for values in own.values]


def test_it_works_on_the_last_axis_of_any_shape() -> None:
    quantizer = LatentQuantizer(3, 5)
    z = latents(2, 4, 6, 3)
    out, flat = quantizer(z), quantizer(z.reshape(-1, 3))
    assert torch.equal(out.indices.reshape(-1, 3), flat.indices)
    assert out.loss_per_sample.shape == (2, 4, 6)
    torch.testing.assert_close(out.loss, flat.loss)
    assert quantizer(z[0, 0, 0]).loss_per_sample.shape == ()


def test_codes_invert_indices_and_carry_gradients() -> None:
    quantizer = LatentQuantizer(3, [2, 3, 4])
    out = quantizer(latents(7, 3))
    codes = quantizer.codes(out.indices)
    assert torch.equal(codes, out.quantized)
    assert torch.equal(quantizer(codes.detach()).indices, out.indices)
    codes.sum().backward()
    assert float(quantizer.codebook.grad.sum()) == 21


def test_samples_are_uniform_over_each_codebook_repeatable_and_carry_gradients() -> None:
    quantizer = LatentQuantizer(3, [2, 3, 5])
    draws = quantizer.sample(6000, torch.Generator().manual_seed(0))
    for latent, count in enumerate(quantizer.levels):
        values, frequency = draws[:, latent].detach().unique(return_counts=True)
        torch.testing.assert_close(values, quantizer.values[latent].detach())
        assert (frequency / 6000 - 1 / count).abs().max() < 0.025
    assert torch.equal(draws, quantizer.sample(6000, torch.Generator().manual_seed(0)))
    draws.sum().backward()
    assert float(quantizer.codebook.grad.sum()) == 18000


def test_gradient_descent_on_the_loss_alone_brings_codebooks_to_the_means_of_their_latents() -> None:
    quantizer = LatentQuantizer(1, 2, quantization_weight=1.0)
    z = torch.tensor([[-0.9], [-0.7], [0.3], [0.5]])
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
    torch.testing.assert_close(quantizer.codebook.detach(), torch.tensor([[-0.8, 0.4]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_latents": 0}, "num_latents must be positive"),
        ({"num_latents": 2, "levels": 1}, "levels must be at least 2, got 1"),
        ({"num_latents": 2, "levels": [3, 1]}, "levels must be at least 2"),
        ({"num_latents": 2, "levels": [3, 3, 3]}, "one number or num_latents=2 of them, got 3"),
        ({"num_latents": 2, "levels": [3, 4], "shared": True}, "levels must be equal with shared=True"),
        ({"num_latents": 2, "commitment_weight": -1.0}, "commitment_weight must not be negative"),
        ({"num_latents": 2, "quantization_weight": -1.0}, "quantization_weight must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentQuantizer(**arguments)


def test_bad_latents_and_indices_are_named() -> None:
    quantizer = LatentQuantizer(2, [3, 4])
    with pytest.raises(ValueError, match="z must have latent=2"):
        quantizer(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="z must have shape"):
        quantizer(torch.tensor(0.0))
    with pytest.raises(TypeError, match="z must be floating point"):
        quantizer(torch.zeros(5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="z must be finite, got 2 values of 6"):
        quantizer(torch.tensor([[0.0, torch.nan], [torch.inf, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"lie in \[0, 3\) for latent 0, got 0 to 3"):
        quantizer.codes(torch.tensor([[0, 3], [3, 0]]))
    with pytest.raises(TypeError, match="indices must be int64"):
        quantizer.codes(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="n must be positive"):
        quantizer.sample(0)


def test_without_the_check_nan_is_not_silent_in_what_a_decoder_reads() -> None:
    out = LatentQuantizer(2, 3, check_finite=False)(torch.tensor([[torch.nan, 0.1], [torch.inf, 0.1]]))
    assert out.z_hat[:, 0].isnan().all()
    assert out.z_hat[:, 1].isfinite().all()
