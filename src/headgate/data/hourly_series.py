"""An hourly series that needs no download: a daily profile, weekly modulation, a slow trend, and noise with a memory.

``x_t = weight[weekday(t)] · profile[hour(t)] + slope · t / length + noise_t``. The profile is a smooth random day, the
weights are those of the seven days around 1, and the noise is autoregressive of order one.

Only additions, multiplications, divisions and square roots of tabulated normal numbers are used, each of which IEEE 754
rounds in one way: the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import math

import numpy as np

from headgate.data.seeding import portable_normal, stream_generator
from headgate.data.series import TimeSeries
from headgate.validate import check_positive

__all__ = ["hourly_series"]

_HOURS, _DAYS = 24, 7
_SMOOTHING = (1.0, 2.0, 3.0, 4.0, 3.0, 2.0, 1.0)
_START = np.datetime64("2020-01-06T00:00:00", "s")  # a Monday


def hourly_series(
    length: int,
    seed: int,
    *,
    amplitude: float = 0.7,
    weekly: float = 0.3,
    trend: float = 0.5,
    noise: float = 0.3,
    memory: float = 0.7,
) -> TimeSeries:
    """Draw one series.

    Args:
        length: hours, from Monday 2020-01-06 00:00 on.
        seed: of profile, weights, direction of the trend, and noise.
        amplitude: standard deviation of the daily profile over its 24 hours.
        weekly: standard deviation of the weights of the days, around 1.
        trend: rise or fall over the whole series; the seed decides which.
        noise: standard deviation of the noise.
        memory: correlation of the noise with itself one hour later, in [0, 1).

    Returns:
        A series with the one channel ``value``, float64 of shape (length, 1).

    Raises:
        ValueError: ``length`` is not positive, a size is negative, or ``memory`` outside its range.
    """
    check_positive(length=length)
    for name, size in (("amplitude", amplitude), ("weekly", weekly), ("noise", noise)):
        if not size >= 0:
            raise ValueError(f"{name} must not be negative, got {name}={size}")
    if not 0 <= memory < 1:
        raise ValueError(f"memory must lie in [0, 1), got {memory}")
    profile = amplitude * _smooth_day(seed)
    weights = 1 + weekly * _normal(seed, "week", _DAYS)
    direction = 1.0 if _normal(seed, "trend", 1)[0] > 0 else -1.0
    hours = np.arange(length)
    values = weights[hours // _HOURS % _DAYS] * profile[hours % _HOURS] + direction * trend * hours / length
    values = values + noise * _autoregression(_normal(seed, "noise", length), memory)
    return TimeSeries(_START + hours.astype("timedelta64[h]"), ("value",), values[:, None])


def _normal(seed: int, stream: str, count: int) -> np.ndarray:
    return portable_normal((count,), stream_generator(seed, f"hourly {stream}")).double().numpy()


def _smooth_day(seed: int) -> np.ndarray:
    """24 hours that go round, with mean 0 and deviation 1."""
    raw = _normal(seed, "day", _HOURS)
    reach = len(_SMOOTHING) // 2
    smooth = np.zeros(_HOURS)
    for shift, weight in enumerate(_SMOOTHING, start=-reach):
        smooth += weight * np.roll(raw, shift)
    smooth -= math.fsum(smooth) / _HOURS
    return smooth / math.sqrt(math.fsum(smooth * smooth) / _HOURS)


def _autoregression(innovations: np.ndarray, memory: float) -> np.ndarray:
    """``e_t = memory · e_{t-1} + sqrt(1 - memory²) · innovation_t``, of deviation 1 from the first step on."""
    scale = math.sqrt(1 - memory * memory)
    state, noise = float(innovations[0]), np.empty(len(innovations))
    noise[0] = state
    for step, innovation in enumerate(innovations[1:].tolist(), start=1):
        state = memory * state + scale * innovation
        noise[step] = state
    return noise
