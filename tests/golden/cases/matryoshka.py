"""RAIVNLab/MRL: nested heads and their loss, adaptive classification, adaptive and funnel retrieval, its metrics."""

from __future__ import annotations

import numpy as np
from torch import nn

from headgate.evaluate import cmc_at_k, map_at_k, precision_at_k, rank_by_label, search
from headgate.methods.contrastive.matryoshka import (
    AdaptiveRetriever,
    FunnelRetriever,
    MatryoshkaCascade,
    MatryoshkaLoss,
)
from headgate.methods.contrastive.matryoshka.official import head_from_official
from tests.golden.harness import Golden, golden_case


@golden_case("mrl_head")
def check_mrl_head(golden: Golden) -> None:
    """Logits at every size, the plain and the weighted loss, and their gradients."""
    config = golden.config
    dims = config["nesting_list"]
    head = head_from_official(golden.state("param."), dims)
    golden.assert_equal("tied", head.tied, bool(config["efficient"]) and len(dims) > 1)
    golden.assert_equal("names", sorted(head.state_dict()), sorted(golden.json["official_parameters"]))
    base = nn.CrossEntropyLoss(label_smoothing=config.get("label_smoothing") or 0.0)
    target = golden.tensors["target"]
    for name, weights in (("uniform", None), ("weighted", config.get("relative_importance"))):
        if f"loss_{name}" not in golden.tensors:
            continue
        x = golden.tensors["x"].requires_grad_()
        logits = head(x[:, : dims[-1]])
        for size, entry in zip(dims, logits, strict=True):
            golden.assert_close(f"logits at {size}", entry, f"logits_{size}")
        loss = MatryoshkaLoss(base, dims, weights)(logits, target)
        golden.assert_close(f"{name} loss", loss, f"loss_{name}")
        loss.backward()
        golden.assert_close(f"gradient of the {name} loss", x.grad, f"grad_x_{name}")


@golden_case("mrl_e_head")
def check_mrl_e_head(golden: Golden) -> None:
    """The same with tied weights; the code is the same."""
    check_mrl_head(golden)


@golden_case("adaptive_classification")
def check_adaptive_classification(golden: Golden) -> None:
    """Thresholds, the size used for every test item, accuracy and expected size."""
    softmax, target = golden.tensors["softmax"], golden.tensors["target"]
    calibration, test = golden.tensors["calibration_index"], golden.tensors["test_index"]
    dims, stated = golden.config["dims"], golden.json["tolerance"]
    cascade = MatryoshkaCascade(dims).fit(softmax[:, calibration], target[calibration])
    golden.assert_close("thresholds", cascade.thresholds, "thresholds", rtol=0, atol=stated["thresholds"])
    answer = cascade.predict(softmax[:, test])
    # The file holds the position of the size in the nesting set.
    golden.assert_close("size used", np.searchsorted(dims, answer.used_dim), "granularity_used")
    result = golden.json["result"]
    accuracy = float((answer.labels == target[test].numpy()).mean())
    _expect("accuracy", accuracy, result["accuracy"], stated["accuracy"], golden)
    _expect("expected size", float(answer.used_dim.mean()), result["expected_dim"], 1e-9, golden)
    for stage, single in enumerate(result["single_accuracy"]):
        # Single accuracies were averaged in float32.
        alone = float((softmax[stage, test].argmax(dim=1) == target[test]).double().mean())
        _expect(f"accuracy at size {dims[stage]} alone", alone, single, 1e-6, golden)


@golden_case("adaptive_retrieval")
def check_adaptive_retrieval(golden: Golden) -> None:
    """Neighbours of the prefix, of all coordinates, after reranking and after the funnel; the paper's metrics."""
    config = golden.config
    database, queries = golden.tensors["database"], golden.tensors["queries"]
    start, length = config["shortlist_prefix"], config["shortlist_len"]
    # The published code takes what there is where a shortlist is longer than what was retrieved.
    reranked = min(config["rerank_shortlist"], length)
    funnel = [min(count, length) for count in config["funnel_shortlists"]]
    found = {
        "neighbors_prefix": search(queries[:, :start], database[:, :start], length).ids,
        "neighbors_full": search(queries, database, length).ids,
        "neighbors_reranked": AdaptiveRetriever(start, config["rerank_dim"], reranked)
        .fit(database)
        .search(queries, k=None)
        .ids,
        "neighbors_funnel": FunnelRetriever([start, *config["funnel_dims"]], funnel).fit(database).search(queries).ids,
    }
    for name, ids in found.items():
        golden.assert_close(name, ids, name)
    tolerance = golden.json["tolerance"]["metrics"]
    query_labels, labels = golden.tensors["query_labels"], golden.tensors["database_labels"]
    for key, stored in golden.json["metrics"].items():
        name, _, cut = key.partition("@")
        ranking = rank_by_label(found[name], query_labels, labels)
        golden.assert_equal(f"{key}: dropped queries", ranking.dropped, 0)
        hits = ranking.relevance[:, : int(cut)].sum(axis=1)
        ours = {
            "mAP": map_at_k(ranking, int(cut), norm="k"),
            "precision": precision_at_k(ranking, int(cut)),
            "topk": cmc_at_k(ranking, int(cut)),
            "recall_with_denominator_1300": float((hits / 1300).mean()),
        }
        for metric, value in stored.items():
            _expect(f"{metric} of {key}", ours[metric], value, tolerance, golden)


def _expect(name: str, ours: float, expected: float, tolerance: float, golden: Golden) -> None:
    if abs(ours - expected) > tolerance:
        raise AssertionError(f"{name}: ours is {ours!r}, golden is {expected!r} (tolerance {tolerance:g})")
    golden.assert_equal(name, True, True)
