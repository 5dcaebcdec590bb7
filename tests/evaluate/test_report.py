from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from headgate.evaluate import TASKS, Features, Report, Split, evaluate, knn_probe, linear_probe

DIGITS, LABELS = load_digits(return_X_y=True)
FEATURES = Features(DIGITS[:300, :32], LABELS[:300], np.arange(300), {"layer": "raw", "pool": "none"})


def size(features: Features, split: Split, seed: int) -> Mapping[str, float]:
    return {"size/train": len(split.train), "size/seed": seed}


def test_every_seed_draws_its_split_and_the_report_is_the_mean() -> None:
    report = evaluate(FEATURES, ["knn", size], seeds=(3, 4, 5))
    expected = [
        knn_probe(FEATURES.X, LABELS[:300], Split.random(LABELS[:300], seed=seed)).accuracy for seed in (3, 4, 5)
    ]
    assert report.per_seed["knn/accuracy"] == tuple(expected)
    assert report["knn/accuracy"].mean == pytest.approx(np.mean(expected))
    assert report["knn/accuracy"].std == pytest.approx(np.std(expected, ddof=1))
    assert report["knn/accuracy"].n == 3
    assert report["size/seed"].mean == 4
    assert list(report) == ["knn/accuracy", "knn/mean_per_class", "size/train", "size/seed"]
    assert len(report) == 4
    assert report.meta == {"items": 300, "shape": [32], "features": {"layer": "raw", "pool": "none"}}


def test_a_given_split_is_used_for_every_seed() -> None:
    split = Split.random(LABELS[:300], seed=9)
    report = evaluate(FEATURES, ["linear"], split=split)
    assert report["linear/accuracy"].std == 0
    assert report["linear/accuracy"].mean == linear_probe(FEATURES.X, LABELS[:300], split).accuracy


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"mlp", "few_shot"}))
def test_every_named_task_gives_finite_numbers_under_its_name_and_the_same_again(task: str) -> None:
    first, again = (evaluate(FEATURES, [task], seeds=(0,)) for _ in range(2))
    assert all(name.startswith(f"{task}/") for name in first)
    assert all(math.isfinite(summary.mean) for summary in first.values())
    assert first.per_seed == again.per_seed


def test_named_tasks_tell_good_features_from_noise() -> None:
    noise = Features(np.random.default_rng(0).normal(size=(300, 32)), LABELS[:300], np.arange(300))
    for task, metric in (
        ("linear", "linear/accuracy"),
        ("knn", "knn/accuracy"),
        ("svm", "svm/accuracy"),
        ("ridge", "ridge/accuracy"),
        ("retrieval", "retrieval/cmc@1"),
    ):
        good, bad = (evaluate(features, [task], seeds=(0,))[metric].mean for features in (FEATURES, noise))
        assert bad < 0.3 < 0.6 < good, task


def test_slow_tasks_report_their_names() -> None:
    small = Features(DIGITS[:120, 20:30], LABELS[:120], np.arange(120))
    report = evaluate(small, ["few_shot", "mlp"], seeds=(0,))
    assert list(report) == ["few_shot/1", "few_shot/5", "mlp/accuracy", "mlp/gain_over_linear"]
    assert report["few_shot/5"].mean > report["few_shot/1"].mean


def test_the_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    report = evaluate(FEATURES, [size], seeds=(0, 1, 2))
    report.save(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["seeds"] == [0, 1, 2]
    assert written["meta"] == report.meta
    summary = report["size/seed"]
    assert written["metrics"]["size/seed"] == {
        "mean": 1.0,
        "std": 1.0,
        "n": 3,
        "low": summary.low,
        "high": summary.high,
        "values": [0.0, 1.0, 2.0],
    }
    report.save(tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[0] == "| metric | mean | std | n | 95% interval |"
    assert lines[3] == f"| size/seed | 1 | 1 | 3 | [{summary.low:.4g}, {summary.high:.4g}] |"
    assert "claim" not in report.to_markdown()


def test_fewer_than_three_seeds_are_called_too_few() -> None:
    report = evaluate(FEATURES, [size], seeds=(0,))
    assert "Fewer than 3 seeds: too few for a claim." in report.to_markdown()
    assert "| size/seed | 0 | – | 1 | – |" in report.to_markdown()
    assert json.loads(report.to_json())["metrics"]["size/seed"]["std"] is None


def test_a_metric_that_is_undefined_for_one_seed_is_undefined() -> None:
    def sometimes(features: Features, split: Split, seed: int) -> Mapping[str, float]:
        return {"value": math.nan if seed == 1 else 1.0}

    report = evaluate(FEATURES, [sometimes], seeds=(0, 1, 2))
    assert math.isnan(report["value"].mean)
    assert report["value"].n == 3
    assert json.loads(report.to_json())["metrics"]["value"]["values"] == [1.0, None, 1.0]


def test_bad_requests_are_refused() -> None:
    def changing(features: Features, split: Split, seed: int) -> Mapping[str, float]:
        return {f"value{seed}": 1.0}

    with pytest.raises(ValueError, match="features must carry labels"):
        evaluate(Features(DIGITS[:10], None, np.arange(10)))
    with pytest.raises(TypeError, match=r"features\.y must hold integers"):
        evaluate(Features(DIGITS[:10], np.zeros(10), np.arange(10)))
    with pytest.raises(ValueError, match="seeds must be different integers"):
        evaluate(FEATURES, seeds=(1, 1))
    with pytest.raises(ValueError, match="seeds must be different integers"):
        evaluate(FEATURES, seeds=())
    with pytest.raises(ValueError, match="tasks must name at least one of linear"):
        evaluate(FEATURES, [])
    with pytest.raises(ValueError, match=r"tasks must be functions or among linear, .* got 'speed'"):
        evaluate(FEATURES, ["speed"])
    with pytest.raises(ValueError, match="tasks must not share metrics, got 'size/train' twice"):
        evaluate(FEATURES, [size, size])
    with pytest.raises(ValueError, match="the same metrics for every seed"):
        evaluate(FEATURES, [changing], seeds=(0, 1))


def test_a_report_is_a_read_only_mapping() -> None:
    report = evaluate(FEATURES, [size], seeds=(0,))
    assert isinstance(report, Report)
    assert isinstance(report, Mapping)
    with pytest.raises(KeyError):
        report["nothing"]
    with pytest.raises(TypeError):
        report["size/seed"] = 1
