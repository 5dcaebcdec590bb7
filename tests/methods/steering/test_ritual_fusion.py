"""Fusing logits by hand, the plausibility mask, the schedules, VCD's noise, and the published settings."""

from __future__ import annotations

import math

import pytest
import torch

from headgate.methods.steering.ritual import (
    RECIPES,
    WEIGHTS,
    fuse_logits,
    m3id_weight,
    noise_image,
    plausible,
    signal_share,
    view_weights,
)
from headgate.methods.steering.ritual.official import official_plausibility, official_weight

INF = math.inf


def test_scores_are_the_weighted_sum_and_implausible_tokens_are_left_out_whatever_the_view_says() -> None:
    base = torch.tensor([[2.0, 1.0, -0.2, -1.0]])
    view = torch.tensor([[0.5, 1.0, 3.0, 9.0]])
    # log 0.1 = -2.303: tokens below -0.303 go.
    expected = torch.tensor([[2.0 + 1.5, 1.0 + 3.0, -0.2 + 9.0, -INF]])
    torch.testing.assert_close(fuse_logits(base, [view], (1, 3)), expected)
    torch.testing.assert_close(fuse_logits(base, [view], (1, 3), normalize=True), expected / 4)
    torch.testing.assert_close(fuse_logits(base, [view], (2, -1)), torch.tensor([[3.5, 1.0, -3.4, -INF]]))
    torch.testing.assert_close(fuse_logits(base, [view], (1, 3), None), base + 3 * view)
    torch.testing.assert_close(fuse_logits(base, [], (1,), 1.0), torch.tensor([[2.0, -INF, -INF, -INF]]))


def test_the_mask_keeps_tokens_with_a_tenth_of_the_best_probability_and_is_the_same_for_log_probabilities() -> None:
    logits = torch.tensor([0.5, 0.06, 0.04, 0.4]).log()
    assert plausible(logits).tolist() == [True, True, False, True]
    assert plausible(logits + 7.0).tolist() == [True, True, False, True]
    assert plausible(logits, 1.0).tolist() == [True, False, False, False]
    half = torch.tensor([8.0, 5.7, 5.69], dtype=torch.bfloat16)
    assert plausible(half).tolist() == (half.float() >= math.log(0.1) + 8.0).tolist()


def test_half_precision_is_fused_in_float32_and_float64_stays() -> None:
    base = torch.tensor([[8.0, 7.5]], dtype=torch.bfloat16)
    scores = fuse_logits(base, [torch.tensor([[0.01, 0.02]])], (1, 3))
    torch.testing.assert_close(scores, torch.tensor([[8.03, 7.56]]))
    assert fuse_logits(base.double(), [base], (1, 1)).dtype == torch.float64


def test_tokens_that_an_earlier_processor_ruled_out_stay_out() -> None:
    base = torch.tensor([[-INF, 0.0, 1.0]])
    view = torch.tensor([[5.0, 0.0, 1.0]])
    torch.testing.assert_close(fuse_logits(base, [view], (1, 3)), torch.tensor([[-INF, 0.0, 4.0]]))
    both = torch.tensor([[-INF, 0.0, 1.0]])
    torch.testing.assert_close(fuse_logits(base, [both], (2, -1)), torch.tensor([[-INF, 0.0, 1.0]]))


def test_views_add_up_in_their_deviations_from_the_base() -> None:
    generator = torch.Generator().manual_seed(0)
    base, turned, noised, blind = torch.randn(4, 3, 7, generator=generator)
    weights = view_weights([3.0, -1.0, m3id_weight(0.5)], step=2)
    gamma = math.exp(-1.0)
    expected = base + 3 * turned + (base - noised) + (base - blind) * (1 - gamma) / gamma
    scores = fuse_logits(base, [turned, noised, blind], weights, 1e-6)
    torch.testing.assert_close(scores, expected)


def test_m3id_begins_with_the_plain_model_and_trusts_the_picture_more_with_every_token() -> None:
    weight = m3id_weight()
    assert weight(0) == 0
    gamma = math.exp(-0.02 * 10)
    assert weight(10) == pytest.approx(-(1 - gamma) / gamma)
    assert view_weights([weight], 10) == pytest.approx((1 / gamma, 1 - 1 / gamma))
    assert WEIGHTS["ritual"] == 3.0
    assert WEIGHTS["vcd"] == -1.0
    assert view_weights([3.0, -1.0], 5) == (2.0, 3.0, -1.0)


def test_bad_logits_weights_and_thresholds_are_refused() -> None:
    base = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one of the base and one of each view, got 1 for 1"):
        fuse_logits(base, [base], (3,))
    with pytest.raises(ValueError, match=r"views\[0\] must have"):
        fuse_logits(base, [torch.zeros(2, 4)], (1, 3))
    with pytest.raises(ValueError, match=r"views\[1\] must have"):
        fuse_logits(base, [base, torch.zeros(1, 3)], (1, 3, 1))
    with pytest.raises(TypeError, match="base must be floating point"):
        fuse_logits(base.long(), [base], (1, 3))
    for bad in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"plausibility must lie in \(0, 1\]"):
            fuse_logits(base, [base], (1, 3), bad)
    with pytest.raises(ValueError, match="plausibility must be given"):
        fuse_logits(base, [base], (2, -1), None)
    for bad in (math.nan, INF, -INF):
        view = base.clone()
        view[1, 2] = bad
        with pytest.raises(ValueError, match=r"views\[0\] must be finite"):
            fuse_logits(base, [view], (1, 3))
    with pytest.raises(ValueError, match="base must have a finite logit"):
        fuse_logits(torch.tensor([[math.nan, 0.0]]), [], (1,))
    with pytest.raises(ValueError, match="base must have a finite logit"):
        fuse_logits(torch.full((1, 2), -INF), [], (1,))
    with pytest.raises(ValueError, match="positive sum"):
        fuse_logits(base, [base], (1, -1), normalize=True)
    with pytest.raises(ValueError, match="decay must be positive"):
        m3id_weight(0.0)


def test_noise_keeps_the_variance_and_drowns_the_picture_with_growing_steps() -> None:
    share = signal_share()
    assert share.shape == (1000,)
    assert bool((share.diff() < 0).all())
    rates = [1 / (1 + math.exp(6 - 12 * s / 999)) * (5e-3 - 1e-5) + 1e-5 for s in range(501)]
    assert float(share[500]) == pytest.approx(math.prod(1 - rate for rate in rates), rel=1e-4)
    image, noise = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
    a = float(share[500])
    expected = torch.full((2, 3), 2 * a**0.5 - (1 - a) ** 0.5)
    torch.testing.assert_close(noise_image(image, 500, noise=noise), expected)
    drawn = noise_image(torch.zeros(100, 100), 999, torch.Generator().manual_seed(0))
    assert float(drawn.var()) == pytest.approx(1 - float(share[999]), rel=0.05)
    again = noise_image(torch.zeros(100, 100), 999, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    assert noise_image(image.bfloat16(), 3, noise=noise).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"step must lie in \[0, 999\], got 1000"):
        noise_image(image, 1000, noise=noise)
    with pytest.raises(ValueError, match="exactly one of generator and noise"):
        noise_image(image, 5)
    with pytest.raises(ValueError, match="shape of image"):
        noise_image(image, 5, noise=noise[:1])


def test_the_published_settings_are_read_under_both_of_their_names() -> None:
    config = {"alpha_pos": 2.0, "alpha_neg": 0.5, "plausibility_beta": 0.2, "m3id_lambda": 0.1}
    assert official_weight("ritual", config) == 2.0
    assert official_weight("vcd", config) == -0.5
    weight = official_weight("m3id", config)
    assert callable(weight)
    assert weight(3) == pytest.approx(-(math.exp(0.3) - 1))
    assert official_plausibility(config) == 0.2
    assert official_weight("ritual", {"ritual_alpha_pos": 1.0}) == 1.0
    assert (official_weight("ritual", {}), official_plausibility({"ritual_beta": 0.3})) == (3.0, 0.3)
    with pytest.raises(ValueError, match="ritual, vcd, m3id, got 'opera'"):
        official_weight("opera", {})
    chair = RECIPES["chair"]
    assert (chair.alpha, chair.contrast, chair.plausibility, chair.temperature) == (3.0, 1.0, 0.1, 1.0)
    assert (chair.max_new_tokens, chair.examples, chair.prompt) == (64, 500, "Please describe this image in detail.")
