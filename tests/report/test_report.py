from __future__ import annotations

import re

import numpy as np
import pytest

import toy
from headgate.catalog import Criterion, Metric, read_card
from headgate.claims.cells import Cell, CellRecord
from headgate.claims.evidence import Evidence
from headgate.claims.statistics import mean_interval
from headgate.claims.verdict import judge, overall_verdict
from headgate.measurement import Curve, Measurement
from headgate.report.figure import draw_figure
from headgate.report.format import criterion_rule, interval_text, mean_text, number_text
from headgate.report.markdown import method_page, method_table

PERCENT = Metric("score", "Score", "%", "higher")
PLAIN = Metric("loss", "Loss", "", "lower")


@pytest.fixture
def method(tmp_path):
    return read_card(toy.write_toy(tmp_path) / "card.toml", "toy_lab.methods.toys.toy_gate")


@pytest.fixture
def evidence(method):
    cells = []
    for arm, base in (("toy", 0.9), ("nothing", 0.5), ("shut", 0.6)):
        for seed in range(3):
            score = base + 0.01 * seed
            curve = Curve([1, 2, 4], [0.1, 0.3, score], "steps", "score", log_x=True)
            measured = Measurement({"score": score}, curves={"score over steps": curve})
            cells.append(CellRecord.of(Cell("toy-gate", "laptop", arm, seed), "f", measured, 2.0))
    found = Evidence("toy-gate", "laptop", "reproduced", [], (0, 1, 2), cells, [], {"quick": "a", "method": "b", "shared": "c"},
                     {"torch": "2"}, {"processor": "P", "cores": 2}, 2, 1, 18.0, "2026-01-01")  # fmt: skip
    results = judge(method.claim, "laptop", found.table(), [0, 1, 2])
    return Evidence(**{**found.__dict__, "criteria": results, "verdict": overall_verdict(results)})


@pytest.mark.parametrize(
    ("value", "metric", "signed", "text"),
    [
        (0.1234, PERCENT, False, "12.3"),
        (0.1234, PERCENT, True, "+12.3"),
        (-0.0012, PLAIN, True, "-0.0012"),
        (12345.6, PLAIN, False, "12,346"),
        (3.14159, PLAIN, False, "3.14"),
    ],
)
def test_numbers_read_in_their_unit(value, metric, signed, text):
    assert number_text(value, metric, signed) == text


def test_means_and_intervals_read_as_people_write_them():
    assert mean_text([0.5, 0.6], PERCENT) == "55.0 ± 7.1"
    assert mean_text([0.5], PERCENT) == "50.0"
    assert mean_text([], PERCENT) == "–"
    assert interval_text(mean_interval([0.2, 0.2]), PERCENT) == "+20.0 [+20.0, +20.0]"
    assert interval_text(None, PERCENT) == "–"


def test_criteria_read_as_inequalities(method):
    def rule(**fields):
        return criterion_rule(Criterion("c", "s", "score", "toy", **fields), method.claim)

    assert rule(relation="above", value=0.95) == "score(toy) > 95.0 %"
    assert rule(relation="below", value=0.4) == "score(toy) < 40.0 %"
    assert rule(relation="above", against="nothing", margin=-0.015) == "score(toy) > score(nothing) − 1.5 %"
    assert rule(relation="below", against="nothing", margin=0.15) == "score(toy) < score(nothing) − 15.0 %"


def test_the_figure_shows_every_arm_criterion_and_curve(method, evidence, tmp_path):
    path = draw_figure(method, evidence, tmp_path / "figure.svg")
    drawn = " ".join(re.findall(r"<!-- (.*?) -->", path.read_text(), flags=re.DOTALL))
    for arm in method.claim.arms:
        assert arm.label in drawn
    assert "The toy is 20 points above nothing" in drawn
    assert "reproduced" in drawn
    assert "Score over steps" in drawn
    assert "The toy beats nothing at all." in drawn


def test_the_figure_is_a_picture_of_decent_size(method, evidence, tmp_path):
    from PIL import Image

    picture = np.asarray(Image.open(draw_figure(method, evidence, tmp_path / "figure.png")).convert("L"))
    assert picture.shape[1] > 1000
    assert 0.005 < (picture < 200).mean() < 0.5


def test_a_figure_with_missing_cells_says_so(method, evidence, tmp_path):
    cells = [record for record in evidence.cells if record.cell.arm != "nothing"]
    results = judge(method.claim, "laptop", Evidence(**{**evidence.__dict__, "cells": cells}).table(), [0, 1, 2])
    partial = Evidence(**{**evidence.__dict__, "cells": cells, "criteria": results, "verdict": "inconclusive"})
    path = draw_figure(method, partial, tmp_path / "figure.svg")
    assert "not measured" in path.read_text()


def test_the_method_table_takes_its_verdict_from_the_evidence(method, evidence, tmp_path):
    from headgate.claims.fingerprint import quick_fingerprint

    folder = tmp_path / "evidence"
    fresh = Evidence(
        **{**evidence.__dict__, "fingerprint": {"quick": quick_fingerprint(method), "method": "", "shared": ""}}
    )
    assert "– not measured" in method_table([method], [folder])
    fresh.write(folder)
    row = method_table([method], [folder]).splitlines()[2]
    assert row.startswith("| [toy-gate](docs/methods/toy-gate.md) |")
    assert "✔ reproduced (2 of 2 criteria) | 3 | 0.3 min |" in row


def test_the_method_page_holds_use_claim_evidence_and_citation(method, evidence, tmp_path):
    evidence.write(tmp_path / "evidence")
    page = method_page(method, [tmp_path / "evidence"])
    for expected in (
        "# A toy gate", "gate = 2", "`headgate.ToyGate`", "| Toy | 91.0 ± 1.0 |", "`score(toy) > score(nothing) + 20.0 %`",
        "![The claim of toy-gate, measured](../../evidence/toy-gate-laptop.png)", "@inproceedings{", "headgate reproduce toy-gate",
        "An open gate is all it takes.",
    ):  # fmt: skip
        assert expected in page, expected
