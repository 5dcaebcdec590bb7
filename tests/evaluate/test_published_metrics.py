"""The figures that the published code of bt2 and matryoshka computes for stored inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headgate.evaluate import (
    cascade,
    cascade_thresholds,
    cmc_at_k,
    compatibility_report,
    funnel,
    map_at_k,
    precision_at_k,
    rank_by_label,
    recall_at_k,
    retrieval_report,
    search,
)


def load(shared: Path, slug: str, case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    path = shared / "golden" / slug / case
    if not path.with_suffix(".json").is_file():
        pytest.skip(f"no golden file {path}")
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


@pytest.fixture
def adaptive_retrieval(shared_dir: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return load(shared_dir, "matryoshka", "adaptive_retrieval")


def test_neighbours_after_shortlist_reordering_and_funnel_are_those_of_matryoshka(adaptive_retrieval: Any) -> None:
    case, stored = adaptive_retrieval
    config, queries, gallery = case["config"], stored["queries"], stored["database"]
    start, shortlist = config["shortlist_prefix"], config["shortlist_len"]
    assert (search(queries[:, :start], gallery[:, :start], shortlist).ids == stored["neighbors_prefix"]).all()
    assert (search(queries, gallery, shortlist, chunk=100).ids == stored["neighbors_full"]).all()
    reranked = funnel(
        queries, gallery, start_dim=start, dims=[config["rerank_dim"]], shortlist=[config["rerank_shortlist"]]
    )
    assert (reranked.stages[-1].ids == stored["neighbors_reranked"]).all()
    narrowed = funnel(
        queries, gallery, start_dim=start, dims=config["funnel_dims"], shortlist=config["funnel_shortlists"]
    )
    assert (narrowed.stages[-1].ids == stored["neighbors_funnel"]).all()


@pytest.mark.parametrize("ranking", ["prefix", "full", "reranked", "funnel"])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_metrics_are_those_of_matryoshka(adaptive_retrieval: Any, ranking: str, k: int) -> None:
    case, stored = adaptive_retrieval
    judged = rank_by_label(stored[f"neighbors_{ranking}"], stored["query_labels"], stored["database_labels"])
    expected = case["metrics"][f"neighbors_{ranking}@{k}"]
    assert map_at_k(judged, k, norm="k") == pytest.approx(expected["mAP"], abs=1e-9)
    assert precision_at_k(judged, k) == pytest.approx(expected["precision"], abs=1e-9)
    assert recall_at_k(judged, k, denominator=1300) == pytest.approx(expected["recall_with_denominator_1300"], abs=1e-9)
    assert cmc_at_k(judged, k) == pytest.approx(expected["topk"], abs=1e-9)


def test_the_cascade_is_that_of_matryoshka(shared_dir: Path) -> None:
    case, stored = load(shared_dir, "matryoshka", "adaptive_classification")
    confidence = stored["softmax"].max(axis=2)
    correct = stored["softmax"].argmax(axis=2) == stored["target"]
    held_out, test = stored["calibration_index"], stored["test_index"]
    thresholds = cascade_thresholds(confidence[:, held_out], correct[:, held_out])
    np.testing.assert_allclose(thresholds, stored["thresholds"], atol=1e-6)
    result = cascade(correct[:, test], confidence[:, test], np.array(case["config"]["dims"]), thresholds)
    assert (result.stage == stored["granularity_used"]).all()
    assert result.accuracy == pytest.approx(case["result"]["accuracy"], abs=1e-9)
    assert result.cost == pytest.approx(case["result"]["expected_dim"], abs=1e-9)


@pytest.mark.parametrize("chunk", [11, 2048])
def test_metrics_across_versions_are_those_of_bt2(shared_dir: Path, chunk: int) -> None:
    case, stored = load(shared_dir, "bt2", "retrieval_metrics")
    old, new, labels = stored["old"], stored["new"], stored["label"]
    unit = new / np.linalg.norm(new, axis=1, keepdims=True)
    ids = np.arange(len(labels))
    pairs = {"old_old": (old, old), "new_old": (new[:, : old.shape[1]], old), "new_new": (unit, unit)}
    for name, (queries, gallery) in pairs.items():
        values = retrieval_report(
            queries, gallery, labels, labels, ("cmc@1", "cmc@5", "map_full"),
            metric="ip", exclude="self", query_ids=ids, gallery_ids=ids, chunk=chunk,
        ).values  # fmt: skip
        expected = case["metrics"][name]
        assert values["cmc@1"] == pytest.approx(expected["cmc_top1"], abs=1e-6)
        assert values["cmc@5"] == pytest.approx(expected["cmc_top5"], abs=1e-6)
        assert values["map_full"] == pytest.approx(expected["mAP"], abs=1e-6)


def test_the_compatibility_report_holds_the_figures_of_bt2(shared_dir: Path) -> None:
    case, stored = load(shared_dir, "bt2", "retrieval_metrics")
    old, new, labels = stored["old"], stored["new"], stored["label"]
    ids = np.arange(len(labels))
    report = compatibility_report(
        new, new, old, old, new, new, labels, metric="ip", exclude="self", query_ids=ids, gallery_ids=ids
    )
    score = report.scores["map_full"]
    assert score.old_old == pytest.approx(case["metrics"]["old_old"]["mAP"], abs=1e-6)
    assert score.new_old == pytest.approx(case["metrics"]["new_old"]["mAP"], abs=1e-6)
    assert score.compatible
    assert report.compatible_dim == old.shape[1]
