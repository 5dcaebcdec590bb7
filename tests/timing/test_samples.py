from __future__ import annotations

import pytest

from headgate.timing import Summary, growth_exponent, paired_ratios, summarize


def test_median_and_quartiles_interpolate_between_samples():
    assert summarize([5.0, 1.0, 3.0, 2.0, 4.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert summarize([1.0, 2.0, 3.0, 4.0]) == Summary(2.5, 1.75, 3.25, 4)


def test_rounds_without_a_sample_do_not_count():
    assert summarize([2.0, None, 4.0, None]) == Summary(3.0, 2.5, 3.5, 2)
    assert summarize([7.0, None]) == Summary(7.0, 7.0, 7.0, 1)


def test_nothing_measured_has_no_median():
    with pytest.raises(ValueError, match="values must hold at least one number"):
        summarize([None, None])


def test_ratios_pair_the_samples_of_a_round():
    slow, fast = [10.0, 40.0, 30.0], [1.0, 2.0, 3.0]
    assert paired_ratios(slow, fast) == (10.0, 20.0, 10.0)
    assert summarize(paired_ratios(slow, fast)).median == 10.0
    # The ratio of the medians would be 15: the second round was slow for both, and more so for one.
    assert summarize(slow).median / summarize(fast).median == 15.0


def test_rounds_in_which_one_rested_give_no_ratio():
    assert paired_ratios([10.0, None, 30.0, 40.0], [1.0, 2.0, None]) == (10.0,)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    sizes = [196, 784, 1764, 4096]
    assert growth_exponent(sizes, [3e-5 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_the_exponent_over_two_sizes_is_the_slope_between_them():
    assert growth_exponent([4, 16], [1.0, 8.0]) == pytest.approx(1.5)


@pytest.mark.parametrize(("sizes", "values"), [([1], [1.0]), ([2, 2], [1.0, 2.0]), ([1, 2], [1.0])])
def test_an_exponent_needs_two_sizes(sizes, values):
    with pytest.raises(ValueError, match="two distinct numbers"):
        growth_exponent(sizes, values)
