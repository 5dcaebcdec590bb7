from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from headgate.evaluate import (
    build_index,
    map_at_k,
    metric_by_name,
    paired_bootstrap,
    rank_by_label,
    retrieval_report,
    retrieve,
    search,
)


def random(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim))


def test_without_ids_the_result_is_that_of_the_search() -> None:
    queries, gallery = random(5, 3), random(20, 3, seed=1)
    found, expected = retrieve(queries, gallery, 4), search(queries, gallery, 4)
    assert (found.ids == expected.ids).all()
    assert (found.scores == expected.scores).all()
    assert retrieve(queries, gallery).ids.shape == (5, 20)


def test_the_order_of_the_gallery_does_not_matter_even_among_equal_rows() -> None:
    rows = random(15, 4)
    gallery = np.concatenate([rows, rows, rows])
    ids = np.random.default_rng(0).permutation(1000)[:45]
    order = np.random.default_rng(1).permutation(45)
    queries = random(6, 4, seed=2)
    for metric in ("cosine", "l2", "ip"):
        found = retrieve(queries, gallery, 45, metric, gallery_ids=ids)
        shuffled = retrieve(queries, torch.from_numpy(gallery[order]), 45, metric, gallery_ids=ids[order])
        assert (found.ids == shuffled.ids).all()
        np.testing.assert_allclose(found.scores, shuffled.scores, rtol=1e-12, atol=1e-12)
        same = found.scores[:, :-1] == found.scores[:, 1:]
        assert same.sum() >= 6 * 30
        assert (np.diff(found.ids, axis=1)[same] > 0).all()


def test_a_query_is_left_out_by_its_id_and_not_by_its_position() -> None:
    gallery = random(6, 3)
    gallery_ids = np.array([40, 10, 30, 20, 60, 50])
    queries, query_ids = gallery[[0, 3]], np.array([40, 20])
    with_self = retrieve(queries, gallery, 6, gallery_ids=gallery_ids)
    assert with_self.ids[:, 0].tolist() == [40, 20]
    found = retrieve(queries, gallery, 6, exclude="self", query_ids=query_ids, gallery_ids=gallery_ids)
    assert found.ids[:, :-1].tolist() == with_self.ids[:, 1:].tolist()
    assert found.ids[:, -1].tolist() == [-1, -1]
    strangers = retrieve(queries, gallery, 6, exclude="self", query_ids=np.array([7, 8]), gallery_ids=gallery_ids)
    assert (strangers.ids == with_self.ids).all()


def test_a_mask_follows_the_gallery_when_its_ids_are_out_of_order() -> None:
    queries, gallery = random(4, 3), random(9, 3, seed=1)
    ids = np.array([8, 3, 5, 1, 0, 7, 2, 6, 4])
    mask = np.random.default_rng(2).random((4, 9)) < 0.4
    found = retrieve(queries, gallery, 9, exclude="mask", mask=mask, gallery_ids=ids)
    for row in range(4):
        assert not set(found.ids[row]) & set(ids[mask[row]])
        assert (found.ids[row] >= 0).sum() == (~mask[row]).sum()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"exclude": "self"}, "query_ids must be given with exclude='self'"),
        ({"exclude": "mask"}, "mask and exclude='mask' must be given together"),
        ({"mask": np.zeros((2, 4), bool)}, "mask and exclude='mask' must be given together"),
        ({"exclude": "mask", "mask": np.zeros((2, 3), bool)}, "mask must be booleans of shape"),
        ({"exclude": "others"}, "exclude must be one of"),
        ({"gallery_ids": np.array([0, 1, 1, 2])}, "gallery_ids must be unique, got 1 2 times"),
        ({"gallery_ids": np.array([0, 1, -1, 2])}, "gallery_ids must be at least 0"),
        ({"k": 0}, r"k must be in \[1, 4\]"),
    ],
)
def test_bad_arguments_are_named(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        retrieve(**{"queries": random(2, 3), "gallery": random(4, 3), "k": 2, **changes})


def test_a_ready_index_needs_rising_ids() -> None:
    gallery = random(5, 3)
    index = build_index(gallery, kind="flat")
    found = retrieve(random(2, 3), gallery, 3, index=index, gallery_ids=np.array([1, 3, 5, 7, 9]))
    assert (found.ids % 2 == 1).all()
    with pytest.raises(ValueError, match="gallery_ids must be rising"):
        retrieve(random(2, 3), gallery, 3, index=index, gallery_ids=np.array([9, 3, 5, 7, 1]))


def classes(per_class: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(5), per_class)
    centres = np.random.default_rng(99).normal(size=(5, 8))
    return centres[labels] + spread * generator.normal(size=(len(labels), 8)), labels


@pytest.mark.parametrize("chunk", [3, 20, 2048])
def test_a_report_in_blocks_is_that_of_one_ranking(chunk: int) -> None:
    gallery, labels = classes(12, 1.0)
    queries, wanted = classes(7, 1.0, seed=1)
    names = ("map_full", "cmc@1", "recall@5", "ndcg")
    report = retrieval_report(queries, gallery, wanted, labels, names, chunk=chunk)
    ranking = rank_by_label(search(queries, gallery, 60).ids, wanted, labels)
    for name in names:
        np.testing.assert_allclose(report.per_query[name], metric_by_name(name)(ranking))
        assert report.values[name] == pytest.approx(metric_by_name(name)(ranking).mean())
    assert report.query_rows.tolist() == list(range(35))


def test_queries_that_can_find_nothing_are_dropped_in_every_block() -> None:
    gallery, labels = classes(4, 0.1)
    queries, wanted = classes(2, 0.1, seed=1)
    wanted = wanted.copy()
    wanted[[0, 1, 2, 9]] = 77
    report = retrieval_report(queries, gallery, wanted, labels, ("cmc@1",), k=1, chunk=1)
    assert report.dropped == 4
    assert report.query_rows.tolist() == [3, 4, 5, 6, 7, 8]
    assert report.values["cmc@1"] == 1.0
    with pytest.raises(ValueError, match="at least one query must have a relevant item, got none of 10"):
        retrieval_report(queries, gallery, np.full(10, 77), labels)


def test_leaving_one_out_works_in_blocks_and_with_ids_out_of_order() -> None:
    rows, labels = classes(6, 1.0)
    ids = np.random.default_rng(3).permutation(100)[:30]
    arguments: dict[str, Any] = {"exclude": "self", "query_ids": ids, "gallery_ids": ids}
    report = retrieval_report(rows, rows, labels, labels, chunk=10, **arguments)
    one = retrieval_report(rows, rows, labels, labels, **arguments)
    assert report.values == one.values
    expected = []
    for row in range(30):
        others = np.delete(np.arange(30), row)
        others = others[np.argsort(ids[others])]
        found = others[search(rows[[row]], rows[others], 29).ids[0]]
        relevant = labels[found] == labels[row]
        expected.append((np.cumsum(relevant) / np.arange(1, 30))[relevant].mean())
    np.testing.assert_allclose(report.per_query["map_full"], expected)


def test_a_mask_in_a_report_takes_relevant_items_away() -> None:
    rows, labels = classes(6, 1.0)
    mask = labels[:, None] == labels
    mask[:, 0] = False
    report = retrieval_report(rows, rows, labels, labels, ("recall@30",), exclude="mask", mask=mask, chunk=8)
    assert report.query_rows.tolist() == list(range(6))
    assert report.values["recall@30"] == 1.0
    partly = np.random.default_rng(1).random((30, 30)) < 0.3
    straight = retrieval_report(rows, rows, labels, labels, exclude="mask", mask=partly)
    order = np.random.default_rng(2).permutation(30)
    turned = retrieval_report(
        rows, rows[order], labels, labels[order], exclude="mask", mask=partly[:, order], gallery_ids=order
    )
    assert turned.values == straight.values


def test_metrics_may_be_functions() -> None:
    rows, labels = classes(6, 1.0)
    metric = functools.partial(map_at_k.per_query, k=3, norm="k")
    report = retrieval_report(rows, rows, labels, labels, {"mine": metric}, k=3)
    assert report.values["mine"] == map_at_k(rank_by_label(search(rows, rows, 3).ids, labels, labels), 3, norm="k")


def test_the_cost_stands_beside_the_accuracy() -> None:
    rows, labels = classes(6, 1.0)
    cost = retrieval_report(rows.astype(np.float32), rows.astype(np.float16), labels, labels, ("cmc@1",), k=1).cost
    assert cost.bytes_per_item == 16
    assert cost.flops_per_query == 2 * 8 * 30
    assert cost.seconds > 0
    assert cost.threads == torch.get_num_threads()
    graph = retrieval_report(rows, rows, labels, labels, ("cmc@1",), k=1, index="hnsw").cost
    assert graph.flops_per_query == pytest.approx(2 * 8 * np.log2(30))
    assert graph.bytes_per_item > 8 * 4 + 2 * 32 * 4


def test_random_features_and_shuffled_labels_find_their_class_by_chance() -> None:
    labels = np.repeat(np.arange(10), 40)
    rows = random(400, 16)
    at_chance = retrieval_report(
        rows, rows, labels, labels, exclude="self", query_ids=np.arange(400), gallery_ids=np.arange(400)
    ).values
    chance = 39 / 399
    assert abs(at_chance["cmc@1"] - chance) < 3 * np.sqrt(chance * (1 - chance) / 400)
    assert abs(at_chance["map_full"] - chance) < 0.02
    clustered, labels = classes(40, 0.3)
    shuffled = np.random.default_rng(5).permutation(labels)
    found = retrieval_report(clustered[:100], clustered[100:], shuffled[:100], shuffled[100:], ("cmc@1",), k=1)
    assert abs(found.values["cmc@1"] - 0.2) < 3 * np.sqrt(0.2 * 0.8 / 100)


def test_values_per_query_feed_the_paired_bootstrap() -> None:
    gallery, labels = classes(20, 1.5)
    queries, wanted = classes(20, 1.5, seed=1)
    good = retrieval_report(queries, gallery, wanted, labels)
    bad = retrieval_report(queries[:, :2], gallery[:, :2], wanted, labels)
    effect = paired_bootstrap(good.per_query["map_full"], bad.per_query["map_full"])
    assert effect.mean == pytest.approx(good.values["map_full"] - bad.values["map_full"])
    assert effect.low > 0
