from __future__ import annotations

import numpy as np
import pytest
import torch

from headgate.evaluate import funnel, rerank, search, spatial_search
from headgate.evaluate.search_reference import spatial_reference


def random(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim))


def test_a_funnel_keeps_the_first_of_the_current_order_and_reorders_them() -> None:
    queries, gallery = random(5, 16), random(100, 16, seed=1)
    result = funnel(queries, gallery, start_dim=2, dims=(4, 16), shortlist=(30, 10))
    first = search(queries[:, :2], gallery[:, :2], 30)
    assert (result.stages[0].ids == first.ids).all()
    assert [stage.ids.shape for stage in result.stages] == [(5, 30), (5, 30), (5, 10)]
    for row in range(5):
        assert set(result.stages[1].ids[row]) == set(first.ids[row])
        assert set(result.stages[2].ids[row]) == set(result.stages[1].ids[row, :10])
        kept = np.sort(result.stages[1].ids[row, :10])
        expected = kept[search(queries[[row]], gallery[kept], 10).ids[0]]
        assert result.stages[2].ids[row].tolist() == expected.tolist()
    assert result.cost == 2 * 100 + 30 * 4 + 10 * 16


def test_a_shortlist_of_everything_gives_the_full_search() -> None:
    queries, gallery = random(5, 16), random(60, 16, seed=1)
    for metric in ("cosine", "l2", "ip"):
        result = funnel(queries, gallery, start_dim=2, dims=(16,), shortlist=(60,), metric=metric)
        full = search(queries, gallery, 60, metric=metric)
        assert (result.stages[-1].ids == full.ids).all()
        np.testing.assert_allclose(result.stages[-1].scores, full.scores, atol=1e-12)


def test_the_cost_of_a_graph_search_grows_with_the_logarithm_of_the_gallery() -> None:
    queries, gallery = random(5, 16), random(64, 16, seed=1)
    result = funnel(queries, gallery, start_dim=4, dims=(16,), shortlist=(10,), index="hnsw")
    assert result.cost == 4 * 6 + 10 * 16


def test_reordering_puts_equal_scores_in_the_order_of_the_gallery() -> None:
    gallery = np.ones((6, 3))
    found = rerank(np.ones((1, 3)), gallery, np.array([[4, 0, 5, 2]]))
    assert found.ids.tolist() == [[0, 2, 4, 5]]


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_reordering_does_not_depend_on_the_chunk_or_the_kind_of_array(metric: str) -> None:
    queries, gallery = random(7, 5), random(40, 5, seed=1)
    ids = search(queries[:, :2], gallery[:, :2], 20).ids
    copy = ids.copy()
    whole = rerank(queries, gallery, ids, dim=4, metric=metric)
    for chunk in (1, 5):
        found = rerank(torch.from_numpy(queries), torch.from_numpy(gallery), ids, dim=4, metric=metric, chunk=chunk)
        assert (found.ids == whole.ids).all()
        assert (found.scores == whole.scores).all()
    assert (ids == copy).all()


def test_missing_candidates_stay_at_the_end() -> None:
    gallery = random(10, 3)
    found = rerank(gallery[[3]], gallery, np.array([[7, 3, -1, -1]]))
    assert found.ids.tolist() == [[3, 7, -1, -1]]
    assert np.isneginf(found.scores[0, 2:]).all()


def test_a_bad_candidate_is_named_by_its_row_and_others_are_not_read() -> None:
    gallery = random(10, 3)
    gallery[4] = np.nan
    with pytest.raises(ValueError, match="gallery must be finite, got a NaN or infinity in row 4"):
        rerank(random(1, 3), gallery, np.array([[1, 4]]))
    assert rerank(random(1, 3), gallery, np.array([[1, 5]])).ids.shape == (1, 2)
    gallery[4] = 0
    with pytest.raises(ValueError, match="zero vector"):
        rerank(random(1, 3), gallery, np.array([[1, 4]]))
    ignored = rerank(random(1, 3), gallery, np.array([[1, 4]]), zero="ignore")
    assert ignored.scores[ignored.ids == 4] == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dims": (1,)}, "dims must not fall from start_dim on"),
        ({"dims": (8, 4), "shortlist": (5, 5)}, "dims must not fall"),
        ({"dims": (4, 8), "shortlist": (5, 6)}, "shortlist must not rise"),
        ({"dims": (4, 8)}, "dims and shortlist must have one equal, positive length"),
        ({"dims": (), "shortlist": ()}, "dims and shortlist"),
        ({"dims": (9,)}, r"dims must be in \[1, 8\]"),
        ({"shortlist": (21,)}, r"shortlist must be in \[1, 20\]"),
        ({"start_dim": 0}, r"start_dim must be in \[1, 8\]"),
    ],
)
def test_a_funnel_that_does_not_narrow_is_refused(changes: dict, match: str) -> None:
    arguments = {"start_dim": 2, "dims": (8,), "shortlist": (5,)}
    with pytest.raises(ValueError, match=match):
        funnel(random(2, 8), random(20, 8, seed=1), **{**arguments, **changes})


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (np.array([[0, 20]]), ValueError, r"ids must lie in \[-1, 19\], got 0 to 20"),
        (np.array([[0.0]]), TypeError, "ids must hold integers"),
        (np.array([[0], [1]]), ValueError, "q=1"),
    ],
)
def test_candidates_that_cannot_be_are_refused(ids: np.ndarray, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rerank(random(1, 8), random(20, 8, seed=1), ids)


def test_spatial_distances_of_a_hand_made_pair_are_right_and_not_symmetric() -> None:
    query = np.array([[[0.0, 0.0], [3.0, 4.0]]])
    reference = np.array([[[0.0, 0.0]], [[0.0, 1.0]]])
    np.testing.assert_allclose(spatial_search(query, reference), [[2.5, (1 + 18**0.5) / 2]])
    assert spatial_search(reference[:1], query).tolist() == [[0.0]]


def test_spatial_distances_equal_their_definition_for_every_chunk() -> None:
    queries = np.random.default_rng(0).normal(size=(3, 5, 4))
    references = np.random.default_rng(1).normal(size=(7, 14, 4))
    expected = spatial_reference(queries, references)
    for chunk in (1, 20, 2048):
        np.testing.assert_allclose(spatial_search(queries, torch.from_numpy(references), chunk=chunk), expected)


def test_an_image_is_at_distance_zero_of_itself_and_of_any_image_that_holds_its_patches() -> None:
    patches = np.random.default_rng(0).normal(size=(4, 6, 30)).astype(np.float32)
    assert (np.diag(spatial_search(patches, patches)) == 0).all()
    assert (np.diag(spatial_search(patches[:, :2], patches[:, ::-1])) == 0).all()


def test_bad_patches_are_refused() -> None:
    good = np.ones((2, 3, 4))
    with pytest.raises(ValueError, match="query_patches must have shape"):
        spatial_search(good[0], good)
    with pytest.raises(ValueError, match="the same dim, got 4, 3"):
        spatial_search(good, good[..., :3])
    bad = good.copy()
    bad[1, 2, 0] = np.inf
    with pytest.raises(ValueError, match="gallery_patches must be finite, got infinite value in row 1"):
        spatial_search(good, bad)
