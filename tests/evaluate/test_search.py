from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.neighbors import NearestNeighbors

from headgate.errors import MissingExtraError
from headgate.evaluate import build_index, index_recall, search
from headgate.evaluate.search import Exclusion, search_excluding
from headgate.evaluate.search_reference import search_reference

METRICS = ("cosine", "l2", "ip")


def random(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def test_the_ranking_of_a_hand_made_gallery_is_right_under_every_metric() -> None:
    gallery = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    query = np.array([[1.0, 0.0]])
    ids, scores = search(query, gallery, 4, metric="cosine")
    assert ids.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_allclose(scores, [[1, 0.5**0.5, 0, -1]])
    ids, scores = search(query, gallery, 4, metric="l2")
    assert ids.tolist() == [[1, 0, 3, 2]]
    np.testing.assert_allclose(scores, [[-1, -2, -2, -(5**0.5)]])
    ids, scores = search(query, gallery, 4, metric="ip")
    assert ids.tolist() == [[0, 1, 2, 3]]
    np.testing.assert_allclose(scores, [[3, 1, 0, -1]])


@pytest.mark.parametrize("metric", ["l2", "ip"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whole_numbers_with_many_ties_are_ranked_as_by_the_definition(metric: str, data: st.DataObject) -> None:
    dim = data.draw(st.integers(1, 4))
    numbers = st.integers(-2, 2)
    gallery = data.draw(arrays(np.float32, st.tuples(st.integers(1, 30), st.just(dim)), elements=numbers))
    queries = data.draw(arrays(np.float32, st.tuples(st.integers(1, 5), st.just(dim)), elements=numbers))
    k = data.draw(st.integers(1, len(gallery)))
    chunk = data.draw(st.integers(1, 40))
    ids, scores = search(queries, gallery, k, metric=metric, chunk=chunk)
    expected_ids, expected_scores = search_reference(queries, gallery, k, metric)
    assert ids.tolist() == expected_ids
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 10, 150])
def test_real_numbers_are_ranked_as_by_the_definition(metric: str, k: int) -> None:
    queries, gallery = random(20, 17), random(150, 17, seed=1)
    ids, scores = search(queries, gallery, k, metric=metric, chunk=64)
    expected_ids, expected_scores = search_reference(queries, gallery, k, metric)
    assert ids.tolist() == expected_ids
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("metric", "theirs"), [("cosine", "cosine"), ("l2", "euclidean")])
def test_neighbours_are_those_of_scikit_learn(metric: str, theirs: str) -> None:
    queries, gallery = random(30, 8).astype(np.float64), random(500, 8, seed=1).astype(np.float64)
    model = NearestNeighbors(n_neighbors=12, metric=theirs, algorithm="brute").fit(gallery)
    assert (search(queries, gallery, 12, metric=metric).ids == model.kneighbors(queries)[1]).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 7, 180])
def test_the_result_does_not_depend_on_the_chunk_even_with_equal_rows(metric: str, k: int) -> None:
    rows = random(60, 33)
    gallery = np.concatenate([rows, rows[::-1], rows])
    queries = rows[:20] + 0.1 * random(20, 33, seed=1)
    whole = search(queries, gallery, k, metric=metric)
    for chunk in (1, 7, 59, 200):
        ids, scores = search(queries, gallery, k, metric=metric, chunk=chunk)
        assert (ids == whole.ids).all()
        np.testing.assert_allclose(scores, whole.scores, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_stand_in_the_order_of_the_gallery_however_many_tie(metric: str) -> None:
    gallery = np.tile(random(1, 19), (100, 1))
    ids, _ = search(random(3, 19, seed=2), gallery, 5, metric=metric, chunk=16)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_distances_far_from_the_origin_keep_their_order_and_a_row_is_at_distance_zero_of_itself() -> None:
    rows = random(40, 6).astype(np.float64)
    shifted = rows + 1e6
    ids, scores = search(shifted, shifted, 40, metric="l2", chunk=8)
    assert ids.tolist() == search_reference(shifted, shifted, 40, "l2")[0]
    assert (scores[:, 0] == 0).all()


def test_tensors_half_precision_and_memory_maps_give_the_result_of_their_values(tmp_path: Path) -> None:
    gallery = random(50, 5).astype(np.float16)
    queries = random(4, 5, seed=1)
    expected = search(queries, gallery.astype(np.float64), 6, chunk=16)
    np.save(tmp_path / "gallery.npy", gallery)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    for form in (gallery, mapped, torch.from_numpy(gallery), torch.from_numpy(gallery).requires_grad_()):
        result = search(torch.from_numpy(queries), form, 6, chunk=16)
        assert (result.ids == expected.ids).all()
        assert (result.scores == expected.scores).all()


def test_the_cosine_does_not_see_the_length_of_vectors() -> None:
    queries, gallery = random(5, 9), random(40, 9, seed=1)
    scale = np.exp(random(40, 1, seed=2))
    assert (search(queries, gallery, 40).ids == search(queries * 7, gallery * scale, 40).ids).all()


def test_inputs_are_left_as_they_are() -> None:
    queries, gallery = random(5, 9), random(40, 9, seed=1)
    copies = queries.copy(), gallery.copy()
    search(queries, gallery, 3, chunk=4)
    assert (queries == copies[0]).all()
    assert (gallery == copies[1]).all()


@pytest.mark.parametrize("chunk", [3, 1000])
def test_what_is_excluded_is_not_found_and_the_rest_keeps_its_order(chunk: int) -> None:
    queries, gallery = random(6, 4), random(20, 4, seed=1)
    mask = np.random.default_rng(2).random((6, 20)) < 0.5
    own = np.array([0, -1, 5, 19, 7, -1])
    whole = search(queries, gallery, 20).ids
    found = search_excluding(queries, gallery, 20, Exclusion(own, mask), chunk=chunk)
    for row in range(6):
        kept = [item for item in whole[row] if not mask[row, item] and item != own[row]]
        assert found.ids[row].tolist() == kept + [-1] * (20 - len(kept))
        assert np.isneginf(found.scores[row, len(kept) :]).all()
    counts = Exclusion(own, mask).count(6)
    assert counts.tolist() == [int((row < 0).sum()) for row in found.ids]


def test_fewer_items_than_asked_for_leave_minus_one_at_the_end() -> None:
    mask = np.array([[True, True, False]])
    ids, scores = search_excluding(np.ones((1, 2)), np.ones((3, 2)), 2, Exclusion(mask=mask))
    assert ids.tolist() == [[2, -1]]
    assert scores[0, 1] == -np.inf


@pytest.mark.parametrize("name", ["queries", "gallery"])
def test_a_bad_value_is_refused_with_its_row_in_the_whole_matrix(name: str) -> None:
    arguments = {"queries": random(30, 3), "gallery": random(30, 3, seed=1)}
    arguments[name][23, 1] = np.nan
    with pytest.raises(ValueError, match=f"{name} must be finite, got NaN in row 23"):
        search(**arguments, k=2, chunk=5)


@pytest.mark.parametrize("name", ["queries", "gallery"])
def test_zero_vectors_are_refused_under_the_cosine_or_given_cosine_zero(name: str) -> None:
    arguments = {"queries": random(30, 3), "gallery": random(30, 3, seed=1)}
    arguments[name][23] = 0
    with pytest.raises(ValueError, match=f"{name} must hold no zero vector for the cosine, got one in row 23"):
        search(**arguments, k=30, chunk=5)
    found = search(**arguments, k=30, chunk=5, zero="ignore")
    zero_scores = found.scores[23] if name == "queries" else found.scores[found.ids == 23]
    assert (zero_scores == 0).all()
    search(**arguments, k=30, metric="l2")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"k": 0}, ValueError, r"k must be in \[1, 4\]"),
        ({"k": 5}, ValueError, r"k must be in \[1, 4\]"),
        ({"k": 1.0}, TypeError, "k must be an integer"),
        ({"metric": "dot"}, ValueError, "metric must be one of"),
        ({"index": "ivf"}, ValueError, "index must be one of"),
        ({"index": object()}, TypeError, "faiss index, got object"),
        ({"gallery": None}, ValueError, "gallery must be given"),
        ({"gallery": np.ones((4, 3))}, ValueError, "queries=2, gallery=3"),
        ({"gallery": np.ones((0, 2))}, ValueError, "n > 0"),
        ({"queries": np.ones(2)}, ValueError, "queries must have shape"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1"),
    ],
)
def test_bad_arguments_are_named(changes: dict, error: type[Exception], match: str) -> None:
    arguments = {"queries": np.ones((2, 2)), "gallery": np.ones((4, 2)), "k": 2}
    with pytest.raises(error, match=match):
        search(**{**arguments, **changes})


@pytest.mark.parametrize("metric", METRICS)
def test_a_flat_faiss_index_gives_the_exact_result(metric: str) -> None:
    queries, gallery = random(10, 16), random(300, 16, seed=1)
    index = build_index(gallery, kind="flat", metric=metric, chunk=77)
    exact = search(queries, gallery, 8, metric=metric)
    for given_gallery in (gallery, None):
        found = search(queries, given_gallery, 8, metric=metric, index=index, chunk=3)
        assert (found.ids == exact.ids).all()
        np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-4, atol=1e-5)


def test_a_graph_index_finds_nearly_all_neighbours_and_its_recall_is_reported() -> None:
    queries, gallery = random(40, 8), random(1000, 8, seed=1)
    exact = search(queries, gallery, 10)
    found = search(queries, gallery, 10, index="hnsw")
    assert 0.9 < index_recall(found.ids, exact.ids) <= 1
    assert (found.ids == search(queries, gallery, 10, index="hnsw").ids).all()


def test_recall_against_the_exact_result_counts_what_exists() -> None:
    exact = np.array([[1, 2, 3], [4, 5, -1]])
    assert index_recall(np.array([[3, 9, 1], [5, -1, -1]]), exact) == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="one shape"):
        index_recall(exact, exact[:, :2])


def test_exclusion_works_through_faiss() -> None:
    queries, gallery = random(5, 4), random(30, 4, seed=1)
    exclusion = Exclusion(own=np.array([0, 1, 2, -1, 4]), mask=np.random.default_rng(0).random((5, 30)) < 0.6)
    index = build_index(gallery, kind="flat")
    exact = search_excluding(queries, gallery, 15, exclusion)
    found = search_excluding(queries, gallery, 15, exclusion, index=index)
    assert (found.ids == exact.ids).all()


def test_the_missing_ids_of_faiss_stay_missing() -> None:
    faiss = pytest.importorskip("faiss")
    gallery = random(40, 4)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(4), 4, 20, faiss.METRIC_L2)
    index.train(gallery)
    index.add(gallery)
    index.nprobe = 1
    ids, scores = search(random(3, 4, seed=1), gallery, 30, metric="l2", index=index)
    assert (ids[:, -1] == -1).all()
    assert (np.isneginf(scores) == (ids == -1)).all()
    assert (np.diff(scores[:, :2], axis=1) <= 0).all()


def test_an_index_that_does_not_fit_is_refused() -> None:
    gallery = random(20, 4)
    index = build_index(gallery, kind="flat", metric="l2")
    with pytest.raises(ValueError, match="index must compare by metric='cosine'"):
        search(gallery, gallery, 1, index=index)
    with pytest.raises(ValueError, match="dim=5, got 4"):
        search(random(2, 5), None, 1, metric="l2", index=index)
    with pytest.raises(ValueError, match="the gallery's 10 rows, got 20"):
        search(gallery, gallery[:10], 1, metric="l2", index=index)
    with pytest.raises(ValueError, match="kind must be one of"):
        build_index(gallery, kind="ivf")


def test_without_faiss_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'headgate\[retrieval\]'"):
        search(random(2, 3), random(5, 3), 1, index="hnsw")
    assert search(random(2, 3), random(5, 3), 1).ids.shape == (2, 1)
