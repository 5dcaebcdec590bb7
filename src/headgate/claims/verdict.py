"""From measurements to verdicts.

Per criterion, with the effect of each seed (its sign turned for ``below``) and the 95% interval of their mean:

- **reproduced**: the whole interval lies above the margin;
- **explained by a control**: the same, but a control arm in the method's place is reproduced as well;
- **contradicted**: the whole interval lies on the wrong side of zero (of the margin, where the margin is negative: such a
  criterion says "not worse by more than", and an effect within it is no contradiction);
- **inconclusive**: anything else, a missing measurement or a single seed included.

The claim's verdict is the weakest of its criteria: contradicted, then explained by a control, then inconclusive. At scale
``smoke`` everything is inconclusive: it shows that the code runs, and is too small to say more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from headgate.catalog import Claim, Criterion
from headgate.claims.statistics import Interval, mean_interval

__all__ = [
    "CONTRADICTED",
    "EXPLAINED",
    "INCONCLUSIVE",
    "REPRODUCED",
    "SMOKE",
    "CriterionResult",
    "judge",
    "overall_verdict",
]

REPRODUCED = "reproduced"
EXPLAINED = "explained by a control"
INCONCLUSIVE = "inconclusive"
CONTRADICTED = "contradicted"
SMOKE = "smoke"

Table = Mapping[str, Mapping[int, Mapping[str, float | None]]]
"""arm → seed → metric → value."""


@dataclass(frozen=True)
class CriterionResult:
    """The verdict on one criterion.

    Attributes:
        name: the criterion's name in the card.
        statement: its sentence.
        verdict: one of the four verdicts.
        margin: the effect that must be passed.
        effects: seed → effect.
        interval: their mean and 95% interval; ``None`` where nothing could be paired.
        explained_by: names of the controls that show the same effect.
        reason: why the verdict is inconclusive, in words.
    """

    name: str
    statement: str
    verdict: str
    margin: float
    effects: Mapping[int, float]
    interval: Interval | None
    explained_by: tuple[str, ...] = ()
    reason: str | None = None


def judge(claim: Claim, scale: str, table: Table, seeds: Sequence[int]) -> list[CriterionResult]:
    """Judge every criterion of ``claim`` at ``scale``.

    Args:
        claim: the claim.
        scale: the scale that was measured.
        table: arm → seed → metric → value, with cells that failed left out.
        seeds: the seeds that were asked for.
    """
    results = [_judge_one(criterion, table, seeds) for criterion in claim.criteria_at(scale)]
    if scale == SMOKE:
        return [replace(result, verdict=INCONCLUSIVE, explained_by=()) for result in results]
    return results


def overall_verdict(results: Iterable[CriterionResult]) -> str:
    """The weakest verdict among ``results``; inconclusive where there are none."""
    verdicts = {result.verdict for result in results}
    for verdict in (CONTRADICTED, EXPLAINED, INCONCLUSIVE):
        if verdict in verdicts:
            return verdict
    return REPRODUCED if verdicts else INCONCLUSIVE


def _judge_one(criterion: Criterion, table: Table, seeds: Sequence[int]) -> CriterionResult:
    effects = _effects(criterion, criterion.arm, table, seeds)
    interval = mean_interval(list(effects.values())) if effects else None
    verdict = _verdict(interval, criterion.margin)
    reason = None
    if len(effects) < len(seeds):
        missing = [seed for seed in seeds if seed not in effects]
        reason = f"not measured with seed {', '.join(map(str, missing))}"
        verdict = INCONCLUSIVE
    elif interval is not None and interval.n == 1:
        reason = "one seed gives no interval"
    explained = []
    if verdict == REPRODUCED:
        for control in criterion.controls:
            same = _effects(criterion, control, table, seeds)
            if len(same) < len(seeds):
                verdict, reason = INCONCLUSIVE, f"the control {control!r} was not measured with every seed"
            elif _verdict(mean_interval(list(same.values())), criterion.margin) == REPRODUCED:
                explained.append(control)
        if explained:
            verdict = EXPLAINED
    return CriterionResult(
        criterion.name, criterion.statement, verdict, criterion.margin, effects, interval, tuple(explained), reason
    )


def _effects(criterion: Criterion, arm: str, table: Table, seeds: Sequence[int]) -> dict[int, float]:
    """seed → effect, for the seeds with which both sides were measured."""
    sign = 1.0 if criterion.relation == "above" else -1.0
    effects = {}
    for seed in seeds:
        ours = table.get(arm, {}).get(seed, {}).get(criterion.metric)
        if criterion.against is None:
            theirs = criterion.value
        else:
            theirs = table.get(criterion.against, {}).get(seed, {}).get(criterion.against_metric or criterion.metric)
        if ours is not None and theirs is not None:
            effects[seed] = sign * (ours - theirs)
    return effects


def _verdict(interval: Interval | None, margin: float) -> str:
    if interval is None or interval.low is None or interval.high is None:
        return INCONCLUSIVE
    if interval.low > margin:
        return REPRODUCED
    if interval.high < min(0.0, margin):
        return CONTRADICTED
    return INCONCLUSIVE
