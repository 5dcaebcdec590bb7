"""The definitions behind :mod:`headgate.evaluate.adaptive`, one item at a time; slow, for tests and reading."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["calibration_reference", "cascade_reference", "oracle_reference", "thresholds_reference"]


def thresholds_reference(
    confidence: Sequence[Sequence[float]], correct: Sequence[Sequence[bool]], grid: Sequence[float]
) -> list[float]:
    """For every pair of neighbouring stages the smallest threshold with the greatest accuracy of the pair."""
    chosen = []
    for stage in range(len(confidence) - 1):
        best, best_hits = grid[0], -1
        for threshold in grid:
            hits = 0
            for item in range(len(confidence[0])):
                stays = confidence[stage][item] > threshold
                hits += bool(correct[stage][item] if stays else correct[stage + 1][item])
            if hits > best_hits:
                best, best_hits = threshold, hits
        chosen.append(best)
    return chosen


def cascade_reference(
    correct: Sequence[Sequence[bool]],
    confidence: Sequence[Sequence[float]],
    cost: Sequence[float],
    thresholds: Sequence[float],
) -> tuple[float, float]:
    """Accuracy and mean cost of a cascade."""
    hits, spent = 0, 0.0
    items = len(correct[0])
    for item in range(items):
        stage = 0
        while stage < len(thresholds) and not confidence[stage][item] > thresholds[stage]:
            stage += 1
        hits += bool(correct[stage][item])
        spent += cost[stage]
    return hits / items, spent / items


def oracle_reference(correct: Sequence[Sequence[bool]], cost: Sequence[float], last: int) -> tuple[float, float]:
    """Accuracy and mean cost where each item stops at the cheapest right stage up to ``last``, else at the first."""
    hits, spent = 0, 0.0
    items = len(correct[0])
    for item in range(items):
        right = [stage for stage in range(last + 1) if correct[stage][item]]
        hits += bool(right)
        spent += cost[right[0]] if right else cost[0]
    return hits / items, spent / items


def calibration_reference(confidence: Sequence[float], correct: Sequence[bool], bins: int) -> tuple[float, float]:
    """Expected calibration error over bins of equal count (confidences without ties), and Brier score."""
    items = sorted(zip(confidence, correct, strict=True))
    size, larger = divmod(len(items), bins)
    error, start = 0.0, 0
    for number in range(bins):
        part = items[start : start + size + (number < larger)]
        start += len(part)
        if part:
            mean_confidence = sum(score for score, _ in part) / len(part)
            accuracy = sum(bool(right) for _, right in part) / len(part)
            error += len(part) / len(items) * abs(accuracy - mean_confidence)
    brier = sum((score - bool(right)) ** 2 for score, right in items) / len(items)
    return error, brier
