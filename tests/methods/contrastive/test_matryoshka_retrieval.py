"""Adaptive and funnel retrieval against a loop over all pairs, with every index, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from headgate.errors import MissingExtraError
from headgate.methods.contrastive.matryoshka import AdaptiveRetriever, FunnelRetriever


def vectors(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Embeddings whose first coordinates weigh most, so that a short prefix finds most of the neighbours."""
    draws = np.random.default_rng(seed).normal(size=(count, dim)) * np.linspace(2, 0.3, dim)
    return draws.astype(np.float32)


def order_by_hand(query: np.ndarray, database: np.ndarray, ids: Sequence[int], dim: int) -> list[int]:
    """Candidates by the cosine of their first ``dim`` coordinates, equal ones by id."""

    def cosine(row: np.ndarray) -> float:
        a, b = query[:dim].astype(float), row[:dim].astype(float)
        return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))

    return sorted(ids, key=lambda position: (-cosine(database[position]), position))


def funnel_by_hand(
    queries: np.ndarray, database: np.ndarray, dims: Sequence[int], counts: Sequence[int]
) -> list[list[int]]:
    found = []
    for query in queries:
        order = order_by_hand(query, database, range(len(database)), dims[0])
        for dim, count in zip(dims[1:], counts, strict=True):
            order = order_by_hand(query, database, order[:count], dim)
        found.append(order)
    return found


def test_funnel_keeps_the_first_of_the_order_and_reorders_them_with_more_coordinates() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    dims, counts = (2, 4, 8, 16), (40, 20, 5)
    result = FunnelRetriever(dims, counts).fit(database).search(queries)
    assert result.ids.tolist() == funnel_by_hand(queries, database, dims, counts)
    assert result.ids.shape == (7, 5)


def test_adaptive_retrieval_reorders_one_shortlist() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    result = AdaptiveRetriever(4, 16, 30).fit(database).search(queries, k=6)
    assert result.ids.tolist() == [row[:6] for row in funnel_by_hand(queries, database, (4, 16), (30,))]
    for query, ids, scores in zip(queries, result.ids, result.scores, strict=True):
        unit = query / np.linalg.norm(query)
        expected = [unit @ row / np.linalg.norm(row) for row in database[ids]]
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        assert (np.diff(scores) <= 0).all()


def test_a_shortlist_of_the_whole_database_is_the_full_search() -> None:
    database, queries = vectors(50), vectors(7, seed=1)
    result = AdaptiveRetriever(2, 16, 50).fit(database).search(queries)
    assert result.ids.tolist() == [order_by_hand(query, database, range(50), 16)[:10] for query in queries]


def test_stages_show_the_ranking_after_each_size() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    stages = FunnelRetriever((2, 4, 16), (40, 20)).fit(database).stages(queries)
    assert [stage.ids.shape for stage in stages] == [(7, 40), (7, 40), (7, 20)]
    assert stages[0].ids.tolist() == [order_by_hand(query, database, range(80), 2)[:40] for query in queries]


def test_equal_scores_stand_in_the_order_of_the_ids() -> None:
    row = vectors(1)[0]
    database = np.stack([row * scale for scale in (1.0, 2.0, 0.5, 4.0, 8.0)] + [vectors(1, seed=3)[0]])
    result = AdaptiveRetriever(4, 16, 5).fit(database).search(row[None], k=5)
    assert result.ids.tolist() == [[0, 1, 2, 3, 4]]


def test_a_query_s_length_and_how_it_was_normalised_do_not_matter() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    retriever = AdaptiveRetriever(4, 16, 30).fit(database)
    plain = retriever.search(queries)
    for other in (queries * 50, queries / np.linalg.norm(queries, axis=1, keepdims=True)):
        assert retriever.search(other).ids.tolist() == plain.ids.tolist()


def test_wider_vectors_than_the_last_size_are_cut() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    cut = FunnelRetriever((2, 4, 8), (40, 20)).fit(database).search(queries)
    short = FunnelRetriever((2, 4, 8), (40, 20)).fit(database[:, :8]).search(queries[:, :8])
    assert cut.ids.tolist() == short.ids.tolist()


def test_tensors_half_precision_and_memory_mapped_files_are_taken(tmp_path: Path) -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    expected = AdaptiveRetriever(4, 16, 30).fit(database).search(queries)
    path = tmp_path / "database.npy"
    np.save(path, database)
    mapped = np.load(path, mmap_mode="r")
    retriever = AdaptiveRetriever(4, 16, 30).fit(mapped)
    assert retriever.database is mapped
    assert retriever.search(queries).ids.tolist() == expected.ids.tolist()
    tensors = AdaptiveRetriever(4, 16, 30).fit(torch.from_numpy(database)).search(torch.from_numpy(queries))
    assert tensors.ids.tolist() == expected.ids.tolist()
    half = database.astype(np.float16)
    rounded = AdaptiveRetriever(4, 16, 30).fit(half.astype(np.float32)).search(queries)
    assert AdaptiveRetriever(4, 16, 30).fit(half).search(queries).ids.tolist() == rounded.ids.tolist()


def test_the_caller_s_arrays_stay_as_they_are() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    before = database.copy(), queries.copy()
    FunnelRetriever((2, 4, 16), (40, 20), index="faiss").fit(database).search(queries)
    np.testing.assert_array_equal(database, before[0])
    np.testing.assert_array_equal(queries, before[1])


def test_results_do_not_depend_on_the_block_size() -> None:
    database, queries = vectors(200), vectors(30, seed=1)
    results = [AdaptiveRetriever(4, 16, 50, chunk=chunk).fit(database).search(queries).ids for chunk in (1, 7, 2048)]
    assert results[0].tolist() == results[1].tolist() == results[2].tolist()


INDEXES: list[Callable[[], Any]] = [
    lambda: "faiss",
    lambda: "hnsw",
    lambda: faiss.IndexFlatL2(4),
    lambda: faiss.IndexFlatIP(4),
    lambda: faiss.IndexHNSWFlat(4, 32),
    lambda: faiss.IndexIVFFlat(faiss.IndexFlatL2(4), 4, 1),
]


@pytest.mark.parametrize("make", INDEXES)
def test_every_index_finds_what_the_exact_search_finds(make: Callable[[], Any]) -> None:
    # The graph and the one-cell inverted file look at every item of a database this small.
    database, queries = vectors(300), vectors(20, seed=1)
    exact = AdaptiveRetriever(4, 16, 60).fit(database).search(queries)
    found = AdaptiveRetriever(4, 16, 60, index=make()).fit(database).search(queries)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, exact.ids, strict=True)]) > 0.97


def test_a_filled_faiss_index_is_used_as_it_is() -> None:
    database, queries = vectors(80), vectors(7, seed=1)
    index = faiss.IndexFlatIP(4)
    index.add(database[:, :4] / np.linalg.norm(database[:, :4], axis=1, keepdims=True))
    found = AdaptiveRetriever(4, 16, 30, index=index).fit(database).search(queries)
    assert index.ntotal == 80
    assert found.ids.tolist() == AdaptiveRetriever(4, 16, 30).fit(database).search(queries).ids.tolist()


def test_the_retriever_becomes_one_faiss_index(tmp_path: Path) -> None:
    database, queries = vectors(300), vectors(20, seed=1)
    retriever = AdaptiveRetriever(4, 16, 60).fit(database)
    path = str(tmp_path / "refined.index")
    faiss.write_index(retriever.to_faiss(k=10), path)
    index = faiss.read_index(path)
    assert isinstance(index, faiss.IndexRefineFlat)
    scores, ids = index.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), 10)
    expected = retriever.search(queries, k=10)
    assert ids.tolist() == expected.ids.tolist()
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-4)


def test_costs_are_those_of_the_paper_s_formula() -> None:
    database = vectors(80)
    cost = AdaptiveRetriever(4, 16, 30).fit(database).search(vectors(1)).cost
    assert cost.multiply_adds == 4 * 80 + 30 * 16
    assert cost.full_multiply_adds == 16 * 80
    assert (cost.index_bytes, cost.vector_bytes) == (4 * 4, 4 * 16)
    graph = AdaptiveRetriever(4, 16, 30, index="hnsw").fit(database).cost
    assert graph.multiply_adds == 4 * math.log2(80) + 30 * 16
    funnel = FunnelRetriever((2, 4, 16), (40, 20), index="faiss").fit(database).cost
    assert funnel.multiply_adds == 2 * 80 + 40 * 4 + 20 * 16
    assert AdaptiveRetriever(4, 16, 30, index=faiss.IndexFlatL2(4)).fit(database).cost.multiply_adds == 4 * 80 + 480


@pytest.mark.parametrize(
    ("dims", "shortlist", "error", "message"),
    [
        ((4, 2), (20,), ValueError, r"dims must not fall, got \[4, 2\]"),
        ((0, 2), (20,), ValueError, "dims must be at least 1"),
        ((2, 4, 8), (10, 20), ValueError, r"shortlist must not increase, got \[10, 20\]"),
        ((2, 4, 8), (10,), ValueError, "3 dims and 1 entries"),
        ((2,), (), ValueError, "at least one length"),
        ((2, 4), (0,), ValueError, "shortlist must be at least 1"),
        ((2, 4), (2.5,), TypeError, "shortlist must be an integer"),
    ],
)
def test_wrong_stages_are_refused(dims: Any, shortlist: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunnelRetriever(dims, shortlist)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rerank_dim must be at least shortlist_dim, got 8 and 16"):
        AdaptiveRetriever(16, 8)
    with pytest.raises(ValueError, match="index must be 'flat'"):
        AdaptiveRetriever(4, 16, index="tree")
    with pytest.raises(TypeError, match="index must be 'flat', 'faiss', 'hnsw' or a faiss index, got int"):
        AdaptiveRetriever(4, 16, 30, index=3).fit(vectors(80))
    with pytest.raises(ValueError, match="index must have size 4"):
        AdaptiveRetriever(4, 16, 30, index=faiss.IndexFlatL2(5)).fit(vectors(80))
    with pytest.raises(ValueError, match="inner product or L2"):
        AdaptiveRetriever(4, 16, 30, index=faiss.IndexFlat(4, faiss.METRIC_L1)).fit(vectors(80))
    full = faiss.IndexFlatL2(4)
    full.add(vectors(3, 4))
    with pytest.raises(ValueError, match="hold the database's 80 rows, got 3"):
        AdaptiveRetriever(4, 16, 30, index=full).fit(vectors(80))


def test_databases_that_cannot_be_searched_are_refused() -> None:
    retriever = AdaptiveRetriever(4, 16, 30)
    with pytest.raises(ValueError, match="shortlist must not exceed the database's 20 rows, got 30"):
        retriever.fit(vectors(20))
    with pytest.raises(ValueError, match="database must have at least 16 columns"):
        retriever.fit(vectors(80, 12))
    with pytest.raises(ValueError, match="database must have shape"):
        retriever.fit(vectors(80)[0])
    broken = vectors(80)
    broken[5, 2] = np.nan
    with pytest.raises(ValueError, match="database must be finite, got NaN in row 5"):
        retriever.fit(broken)


def test_queries_that_cannot_be_searched_with_are_refused() -> None:
    retriever = AdaptiveRetriever(4, 16, 30).fit(vectors(80))
    with pytest.raises(ValueError, match="k must not exceed the last shortlist, 30, got 31"):
        retriever.search(vectors(2), k=31)
    with pytest.raises(ValueError, match="queries must have at least 16 columns"):
        retriever.search(vectors(2, 8))
    broken = vectors(2)
    broken[1, 0] = np.nan
    with pytest.raises(ValueError, match="queries must be finite, got NaN in row 1"):
        retriever.search(broken)
    with pytest.raises(RuntimeError, match="fit must be called"):
        AdaptiveRetriever(4, 16, 30).search(vectors(2))
    with pytest.raises(RuntimeError, match="fit must be called"):
        AdaptiveRetriever(4, 16, 30).to_faiss()


def test_nan_beyond_the_first_size_is_found_when_its_row_is_read() -> None:
    database = vectors(80)
    database[5, 12] = np.nan
    retriever = AdaptiveRetriever(4, 16, 80).fit(database)
    with pytest.raises(ValueError, match="row 5"):
        retriever.search(vectors(2, seed=1))


@pytest.mark.parametrize("index", ["flat", "faiss", "hnsw"])
def test_a_slice_of_zeros_is_refused_or_gets_cosine_zero(index: str) -> None:
    database, queries = vectors(80), vectors(3, seed=1)
    database[9, :4] = 0
    with pytest.raises(ValueError, match="row 9"):
        AdaptiveRetriever(4, 16, 30, index=index).fit(database)
    ignoring = AdaptiveRetriever(4, 16, 80, index=index, zero="ignore").fit(database)
    first = ignoring.stages(queries)[0]
    rows = (first.ids == 9).any(axis=1)
    assert (first.scores[first.ids == 9] == 0).all()
    assert rows.all() or index == "hnsw"
    queries[1, :4] = 0
    with pytest.raises(ValueError, match="queries must hold no zero vector"):
        AdaptiveRetriever(4, 16, 30, index=index).fit(vectors(80)).search(queries)


def test_without_faiss_the_exact_search_works_and_the_others_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    database, queries = vectors(80), vectors(7, seed=1)
    retriever = AdaptiveRetriever(4, 16, 30).fit(database)
    assert retriever.search(queries, k=6).ids.tolist() == [
        row[:6] for row in funnel_by_hand(queries, database, (4, 16), (30,))
    ]
    for index in ("faiss", "hnsw"):
        with pytest.raises(MissingExtraError, match=r"headgate\[retrieval\]"):
            AdaptiveRetriever(4, 16, 30, index=index).fit(database)
    with pytest.raises(MissingExtraError, match=r"headgate\[retrieval\]"):
        retriever.to_faiss()
