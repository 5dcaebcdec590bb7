"""Learning-rate schedules as plain functions: step → factor of the base learning rate.

A schedule holds no state, so a resumed run needs nothing but the step. Steps are counted from 0; beyond the last one the
factor stays at its final value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from headgate.validate import check_positive, check_probability

__all__ = ["Schedule", "one_cycle", "warmup_cosine", "warmup_linear"]

Schedule = Callable[[int], float]


def warmup_cosine(steps: int, warmup: int = 0, floor: float = 0.0, every: int = 1) -> Schedule:
    """Rise linearly to 1 over ``warmup`` steps, then fall along half a cosine to ``floor``.

    Step s of the rise has the factor (s + 1) / warmup; behind it, with p the share of the remaining steps that is over,
    floor + (1 - floor) · (1 + cos(πp)) / 2 (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, without restarts).

    Args:
        steps: length of the whole run, ≥ 1.
        warmup: steps of the rise, in [0, steps].
        floor: final factor, in [0, 1].
        every: the factor changes only each ``every`` steps, as it does when a schedule is stepped once an epoch.

    Returns:
        step → factor.

    Raises:
        ValueError: a number lies outside its range.
    """
    return _warmup_then(steps, warmup, floor, every, lambda progress: (1 + math.cos(math.pi * progress)) / 2)


def warmup_linear(steps: int, warmup: int = 0, floor: float = 0.0, every: int = 1) -> Schedule:
    """Rise linearly to 1 over ``warmup`` steps, then fall linearly to ``floor``.

    Args:
        steps: length of the whole run, ≥ 1.
        warmup: steps of the rise, in [0, steps].
        floor: final factor, in [0, 1].
        every: the factor changes only each ``every`` steps.

    Returns:
        step → factor.

    Raises:
        ValueError: a number lies outside its range.
    """
    return _warmup_then(steps, warmup, floor, every, lambda progress: 1 - progress)


def one_cycle(
    steps: int,
    rise: float = 0.3,
    start_divisor: float = 25.0,
    final_divisor: float = 1e4,
    linear: bool = False,
) -> Schedule:
    """Rise from a small factor to 1, then fall to a tiny one (Smith and Topin, "Super-Convergence", 2017).

    The values are those of :class:`torch.optim.lr_scheduler.OneCycleLR` with ``max_lr`` the base learning rate and its two
    phases; momentum is left alone (``cycle_momentum=False`` there).

    Args:
        steps: length of the whole run, ≥ 1 (``total_steps`` there).
        rise: share of the run that rises, in [0, 1] (``pct_start``).
        start_divisor: the first factor is 1 / start_divisor (``div_factor``).
        final_divisor: the last factor is 1 / (start_divisor · final_divisor) (``final_div_factor``).
        linear: straight lines in place of half cosines (``anneal_strategy="linear"``).

    Returns:
        step → factor.

    Raises:
        ValueError: a number lies outside its range.
    """
    check_positive(steps=steps, start_divisor=start_divisor, final_divisor=final_divisor)
    check_probability(rise=rise)
    start = 1 / start_divisor
    final = start / final_divisor
    top = rise * steps - 1
    last = steps - 1

    def between(first: float, second: float, share: float) -> float:
        weight = share if linear else (1 - math.cos(math.pi * share)) / 2
        return first + (second - first) * weight

    def factor(step: int) -> float:
        step = min(step, last)
        if step <= top:
            return between(start, 1.0, step / top if top > 0 else 1.0)
        return between(1.0, final, (step - top) / (last - top) if last > top else 1.0)

    return factor


def _warmup_then(steps: int, warmup: int, floor: float, every: int, fall: Callable[[float], float]) -> Schedule:
    check_positive(steps=steps, every=every)
    check_probability(floor=floor)
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie in [0, steps], got warmup={warmup}, steps={steps}")
    # Everything is counted in units of `every` steps, so that every=steps_per_epoch is the schedule stepped per epoch.
    rise, length = warmup / every, steps / every

    def factor(step: int) -> float:
        position = step // every
        if position < rise:
            return min(1.0, (position + 1) / rise)
        progress = min(1.0, (position - rise) / (length - rise)) if length > rise else 1.0
        return floor + (1 - floor) * fall(progress)

    return factor
