from __future__ import annotations

import math

import pytest
import torch

from headgate.train import one_cycle, warmup_cosine, warmup_linear

BASE = 0.3


def torch_factors(make, steps: int, every: int = 1) -> list[float]:
    """Factors that a PyTorch scheduler gives, stepped after each ``every`` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = make(optimizer)
    factors = []
    for step in range(steps):
        factors.append(optimizer.param_groups[0]["lr"] / BASE)
        optimizer.step()
        if (step + 1) % every == 0 and step + 1 < steps:
            scheduler.step()
    return factors


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_equals_torch(floor: float) -> None:
    expected = torch_factors(
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=floor * BASE), 50
    )
    schedule = warmup_cosine(50, floor=floor)
    assert [schedule(step) for step in range(50)] == pytest.approx(expected, abs=1e-12)


def test_cosine_per_epoch_equals_torch_stepped_per_epoch() -> None:
    expected = torch_factors(lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6), 42, every=7)
    schedule = warmup_cosine(42, every=7)
    assert [schedule(step) for step in range(42)] == pytest.approx(expected, abs=1e-12)


def test_warmup_rises_in_equal_parts_to_one_and_the_fall_begins_at_one() -> None:
    for make in (warmup_cosine, warmup_linear):
        schedule = make(20, warmup=4)
        assert [schedule(step) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_warmup_per_epoch_rises_once_an_epoch() -> None:
    schedule = warmup_linear(12, warmup=6, every=3)
    assert [schedule(step) for step in range(12)] == pytest.approx([0.5] * 3 + [1.0] * 3 + [1.0] * 3 + [0.5] * 3)


def test_values_computed_by_hand() -> None:
    cosine, linear = warmup_cosine(10, warmup=2, floor=0.2), warmup_linear(10, warmup=2, floor=0.2)
    assert cosine(4) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert linear(4) == pytest.approx(0.2 + 0.8 * 0.75)


def test_factors_stay_at_the_floor_beyond_the_last_step() -> None:
    for make in (warmup_cosine, warmup_linear):
        assert make(10, warmup=3, floor=0.1)(10) == pytest.approx(0.1)
        assert make(10, warmup=3, floor=0.1)(1000) == pytest.approx(0.1)


def test_a_run_that_is_all_warmup_rises_to_the_end() -> None:
    schedule = warmup_cosine(4, warmup=4)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("steps", [3, 10, 57, 200])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("rise", "start", "final"), [(0.3, 25.0, 1e4), (0.5, 10.0, 100.0), (0.05, 4.0, 2.0)])
def test_one_cycle_equals_torch(steps: int, linear: bool, rise: float, start: float, final: float) -> None:
    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=BASE,
            total_steps=steps,
            pct_start=rise,
            div_factor=start,
            final_div_factor=final,
            anneal_strategy="linear" if linear else "cos",
            cycle_momentum=False,
        )

    schedule = one_cycle(steps, rise=rise, start_divisor=start, final_divisor=final, linear=linear)
    assert [schedule(step) for step in range(steps)] == pytest.approx(torch_factors(make, steps), rel=1e-9)
    assert schedule(steps + 5) == pytest.approx(1 / (start * final), rel=1e-9)


def test_one_cycle_without_a_rise_or_with_one_of_a_single_step_begins_at_the_top() -> None:
    # PyTorch divides by zero where the rise is one step long.
    assert [one_cycle(10, rise=0.1)(step) for step in (0, 9)] == pytest.approx([1.0, 1 / 25e4])
    assert one_cycle(1)(0) == pytest.approx(1 / 25e4)
    falling = one_cycle(5, rise=0.0, linear=True, start_divisor=1.0, final_divisor=2.0)
    assert [falling(step) for step in range(5)] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: warmup_cosine(0), "steps"),
        (lambda: warmup_cosine(10, warmup=11), "warmup"),
        (lambda: warmup_cosine(10, warmup=-1), "warmup"),
        (lambda: warmup_cosine(10, floor=1.5), "floor"),
        (lambda: warmup_linear(10, every=0), "every"),
        (lambda: one_cycle(0), "steps"),
        (lambda: one_cycle(10, rise=1.2), "rise"),
        (lambda: one_cycle(10, start_divisor=0), "start_divisor"),
    ],
)
def test_numbers_outside_their_range_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
