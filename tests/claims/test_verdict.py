from __future__ import annotations

import pytest

from headgate.catalog import Arm, Claim, Criterion, Metric, Scale
from headgate.claims.verdict import judge, overall_verdict


def claim(**fields) -> Claim:
    arms = tuple(
        Arm(name, role, name, name)
        for name, role in (("ours", "method"), ("theirs", "baseline"), ("cut", "ablation"), ("wide", "control"))
    )
    options = {"name": "c", "statement": "s", "metric": "m", "arm": "ours", "relation": "above", "against": "theirs"}
    criterion = Criterion(**{**options, **fields})
    metrics = {"m": Metric("m", "m", "", "higher"), "n": Metric("n", "n", "", "higher")}
    return Claim("s", "t", "m", arms, metrics, (criterion,), {"laptop": Scale("laptop", 3, "x")})


def table(**arms):
    return {name: {seed: {"m": value} for seed, value in enumerate(values)} for name, values in arms.items()}


def result(criterion: dict, measured, seeds=(0, 1, 2)):
    return judge(claim(**criterion), "laptop", measured, list(seeds))[0]


def test_an_interval_above_the_margin_is_reproduced():
    found = result({"margin": 0.2}, table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52, 0.51]))
    assert found.verdict == "reproduced"
    assert found.effects == {0: pytest.approx(0.4), 1: pytest.approx(0.39), 2: pytest.approx(0.41)}


def test_an_effect_smaller_than_the_margin_is_inconclusive():
    assert result({"margin": 0.5}, table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52, 0.51])).verdict == "inconclusive"


def test_an_interval_across_the_margin_is_inconclusive():
    assert result({}, table(ours=[0.9, 0.2, 0.5], theirs=[0.5, 0.4, 0.3])).verdict == "inconclusive"


def test_an_interval_below_zero_is_contradicted():
    assert result({"margin": 0.1}, table(ours=[0.1, 0.11, 0.12], theirs=[0.5, 0.52, 0.51])).verdict == "contradicted"


def test_below_turns_the_sign():
    found = result({"relation": "below", "margin": 0.2}, table(ours=[0.1, 0.11, 0.12], theirs=[0.5, 0.52, 0.51]))
    assert found.verdict == "reproduced"
    assert found.effects[0] == pytest.approx(0.4)


def test_an_absolute_value_stands_in_for_the_other_arm():
    measured = table(ours=[0.96, 0.961, 0.962])
    assert result({"against": None, "value": 0.95, "margin": -0.01}, measured).verdict == "reproduced"
    assert result({"against": None, "value": 0.99}, measured).verdict == "contradicted"


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.495, 0.494, 0.496], "reproduced"),  # worse, but by less than the margin allows
        ([0.48, 0.486, 0.489], "inconclusive"),
        ([0.40, 0.41, 0.42], "contradicted"),
    ],
)
def test_not_worse_by_more_than_a_negative_margin(ours, verdict):
    assert result({"margin": -0.015}, table(ours=ours, theirs=[0.5, 0.5, 0.5])).verdict == verdict


def test_pairing_by_seed_removes_what_seeds_share():
    shared = [0.1, 0.5, 0.9]
    measured = table(ours=[value + 0.05 for value in shared], theirs=shared)
    assert result({"margin": 0.04}, measured).verdict == "reproduced"


def test_another_metric_of_the_same_arm_can_be_compared():
    measured = {"ours": {seed: {"m": 0.5 + seed / 100, "n": 0.3 + seed / 100} for seed in range(3)}}
    found = result({"against": "ours", "against_metric": "n", "margin": 0.1}, measured)
    assert found.verdict == "reproduced"
    assert found.effects[2] == pytest.approx(0.2)


def test_a_control_that_shows_the_same_effect_explains_it():
    measured = table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52, 0.51], wide=[0.88, 0.9, 0.89])
    found = result({"margin": 0.2, "controls": ("wide",)}, measured)
    assert (found.verdict, found.explained_by) == ("explained by a control", ("wide",))


def test_a_control_without_the_effect_changes_nothing():
    measured = table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52, 0.51], wide=[0.55, 0.5, 0.6])
    found = result({"margin": 0.2, "controls": ("wide",)}, measured)
    assert (found.verdict, found.explained_by) == ("reproduced", ())


def test_a_control_that_was_not_measured_leaves_it_open():
    measured = table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52, 0.51], wide=[0.5])
    found = result({"margin": 0.2, "controls": ("wide",)}, measured)
    assert found.verdict == "inconclusive"
    assert "control 'wide'" in found.reason


def test_a_missing_seed_leaves_it_open_and_is_named():
    measured = table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52])
    found = result({}, measured)
    assert found.verdict == "inconclusive"
    assert found.reason == "not measured with seed 2"
    assert found.effects.keys() == {0, 1}


def test_an_undefined_metric_counts_as_missing():
    assert result({}, table(ours=[0.9, None, 0.92], theirs=[0.5, 0.52, 0.5])).reason == "not measured with seed 1"


def test_one_seed_is_never_enough():
    found = result({}, table(ours=[0.9], theirs=[0.1]), seeds=[0])
    assert found.verdict == "inconclusive"
    assert found.reason == "one seed gives no interval"


def test_nothing_measured_is_inconclusive():
    found = result({}, {})
    assert found.verdict == "inconclusive"
    assert found.interval is None


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["reproduced", "reproduced"], "reproduced"),
        (["reproduced", "inconclusive"], "inconclusive"),
        (["inconclusive", "explained by a control"], "explained by a control"),
        (["explained by a control", "contradicted", "reproduced"], "contradicted"),
        ([], "inconclusive"),
    ],
)
def test_the_claims_verdict_is_the_weakest(verdicts, expected):
    base = result({}, {})
    results = [type(base)("c", "s", verdict, 0.0, {}, None) for verdict in verdicts]
    assert overall_verdict(results) == expected


def test_criteria_of_other_scales_do_not_count():
    assert judge(claim(scales=("paper",)), "laptop", {}, [0]) == []


def test_smoke_scale_gives_no_verdict():
    measured = table(ours=[0.9, 0.91, 0.92], theirs=[0.5, 0.52, 0.51])
    assert judge(claim(), "laptop", measured, [0, 1, 2])[0].verdict == "reproduced"
    (found,) = judge(claim(), "smoke", measured, [0, 1, 2])
    assert found.verdict == "inconclusive"
    assert found.interval.mean == pytest.approx(0.4)
