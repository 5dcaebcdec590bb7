"""Projections that keep their anchors, the scikit-learn transformer, and the choice of anchors."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

from headgate.evaluate import Relative, Shuffled, stitching_matrix
from headgate.methods.contrastive.relative_representations import (
    RelativeProjection,
    RelativeRepresentation,
    check_same_anchors,
    select_anchors,
)

K, D = 5, 6
LABELS = torch.tensor([0, 1, 2, 0, 1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, ANCHORS = normal(7, D), normal(K, D, seed=1)
COSINES = nn.functional.normalize(X, dim=1) @ nn.functional.normalize(ANCHORS, dim=1).T


def test_fit_then_call_gives_similarities_to_the_anchors_as_tensor_and_as_array() -> None:
    rel = RelativeProjection().fit(ANCHORS)
    torch.testing.assert_close(rel(X), COSINES)
    torch.testing.assert_close(rel.transform(X), COSINES)
    for array in (rel(X.numpy()), rel.transform(X.numpy()), RelativeProjection().fit(ANCHORS.numpy())(X.numpy())):
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, COSINES.numpy(), rtol=1e-5, atol=1e-6)
    doubled = RelativeProjection(ANCHORS.double().numpy()).transform(X.numpy())
    assert doubled.dtype == np.float64
    torch.testing.assert_close(RelativeProjection().fit_transform(ANCHORS).diagonal(), torch.ones(K))


def test_only_the_tensor_s_way_has_gradients_and_transform_leaves_the_modes_alone() -> None:
    rel = RelativeProjection(ANCHORS, out_norm="batchnorm").train()
    x = X.clone().requires_grad_()
    assert rel(x).requires_grad
    running = rel.block.out_norm.running_mean.clone()
    assert not rel.transform(x).requires_grad
    assert rel.training
    assert rel.block.out_norm.training
    assert torch.equal(rel.block.out_norm.running_mean, running)


def test_later_changes_of_the_given_anchors_do_not_matter() -> None:
    given = ANCHORS.clone()
    rel = RelativeProjection(given)
    given.zero_()
    torch.testing.assert_close(rel(X), COSINES)


def test_anchors_ids_and_classes_go_through_a_state_dict_into_a_projection_without_sizes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"aggregate": "class", "groups": 2, "out_norm": "layernorm", "center": True}
    rel = RelativeProjection(**options).fit(ANCHORS, LABELS, ids=torch.tensor([9, 3, 5, 0, 7])).eval()
    nn.init.normal_(rel.block.out_norm.weight)
    save_file(rel.state_dict(), tmp_path / "rel.safetensors")
    state = load_file(tmp_path / "rel.safetensors")
    for other in (
        RelativeProjection(**options),
        RelativeProjection(num_anchors=K, dim=D, num_classes=3, **options),
        RelativeProjection(-ANCHORS, anchor_labels=LABELS, **options),
    ):
        other.load_state_dict(state)
        torch.testing.assert_close(other.eval()(X), rel(X), rtol=0, atol=0)
        check_same_anchors(rel, other)
    nested, holder = nn.Sequential(rel), nn.Sequential(RelativeProjection(**options))
    holder.load_state_dict(nested.state_dict())
    torch.testing.assert_close(holder.eval()(X), rel(X), rtol=0, atol=0)


def test_a_projection_without_parameters_can_be_fitted_again_to_other_sizes() -> None:
    rel = RelativeProjection(ANCHORS).fit(normal(3, 4))
    assert rel(normal(2, 4)).shape == (2, 3)
    fixed = RelativeProjection(ANCHORS, out_norm="layernorm").fit(-ANCHORS)
    torch.testing.assert_close(fixed(X), nn.functional.layer_norm(-COSINES, (K,)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"anchors must have shape \(5, 6\), that of the parameters, got \(3, 6\)"):
        fixed.fit(ANCHORS[:3])


def test_subspaces_and_quantisation_are_those_of_the_block() -> None:
    rel = RelativeProjection(ANCHORS, subspaces=2, pool="mean", quantize="round", bin_size=0.2)
    parts = [RelativeProjection(ANCHORS[:, part])(X[:, part]) for part in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(rel(X), sum((part / 0.2).round() * 0.2 for part in parts) / 2)
    assert rel.out_dim == K


def test_published_quirks_are_behind_their_argument() -> None:
    smooth = [RelativeProjection(ANCHORS, quantize="smooth", bin_size=0.5, official_quirks=q)(X) for q in (False, True)]
    torch.testing.assert_close(smooth[1], COSINES - torch.sin(2 * torch.pi * COSINES) / (2 * torch.pi))
    assert (smooth[0] - smooth[1]).abs().max() > 0.05


def test_repeated_anchors_of_a_basis_change_give_a_warning() -> None:
    with pytest.warns(UserWarning, match="anchors hold an item twice"):
        RelativeProjection(ANCHORS[[0, 1, 0]], similarity="basis_change")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RelativeProjection(ANCHORS[[0, 1, 0]])(X).shape == (7, 3)


def test_zero_vectors_are_an_error_unless_they_are_to_be_ignored() -> None:
    zeros = torch.cat([X, torch.zeros(1, D)])
    with pytest.raises(ValueError, match="X must hold no zero vector for the cosine, got one in row 7"):
        RelativeProjection(ANCHORS).transform(zeros)
    with pytest.raises(ValueError, match="anchors must hold no zero vector for the cosine, got one in row 7"):
        RelativeProjection(zeros)
    assert not RelativeProjection(ANCHORS, zero="ignore").transform(zeros)[7].any()
    assert not RelativeProjection(ANCHORS)(zeros)[7].any()
    with pytest.raises(ValueError, match="X must hold no zero vector"):
        RelativeProjection(ANCHORS, center=True).transform(ANCHORS.mean(dim=0, keepdim=True))
    assert RelativeProjection(ANCHORS, similarity="euclidean").transform(zeros).shape == (8, K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bin_size": 0.1}, "bin_size and cluster_threshold need quantize"),
        ({"quantize": "round", "bin_size": 0}, "bin_size must be positive"),
        ({"quantize_on": "anchors"}, "quantize_on must be one of"),
        ({"zero": "skip"}, "zero must be one of"),
        ({"subspaces": 0}, "subspaces must be positive"),
        ({"pool": "min"}, "pool must be one of"),
        ({"num_classes": 3}, "num_classes needs aggregate='class'"),
        ({"num_anchors": 3}, "num_anchors and dim must be given together"),
        ({"anchors": ANCHORS, "num_anchors": 5, "dim": 6}, "num_anchors and dim must be given together, and without"),
        ({"anchor_ids": torch.arange(3)}, "anchor_labels and anchor_ids need anchors"),
        ({"num_anchors": 3, "dim": 2, "aggregate": "class"}, "num_classes must be given to reserve place"),
        ({"anchors": ANCHORS, "aggregate": "class"}, "labels must hold the anchors' classes"),
        ({"anchors": ANCHORS, "subspaces": 4}, "subspaces must divide dim, got dim=6, subspaces=4"),
        ({"anchors": torch.zeros(0, 3)}, r"anchors must have shape \(n, dim\) with n > 0"),
        ({"anchors": torch.full((2, 3), float("nan"))}, "anchors must be finite, got NaN in row 0"),
    ],
)
def test_bad_options_and_anchors_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativeProjection(**options)


def test_bad_labels_items_and_projections_without_anchors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got 0 to 2"):
        RelativeProjection(aggregate="class", num_classes=2).fit(ANCHORS, LABELS)
    with pytest.raises(ValueError, match="ids must have one entry per row: expected 5, got 4"):
        RelativeProjection().fit(ANCHORS, ids=torch.arange(4))
    with pytest.raises(ValueError, match="anchors must be given with fit before sizes are known"):
        RelativeProjection()(X)
    with pytest.raises(ValueError, match="anchors must be given with fit, or by a state dict"):
        RelativeProjection(num_anchors=K, dim=D)(X)
    rel = RelativeProjection(ANCHORS)
    with pytest.raises(ValueError, match="X must have dim=6"):
        rel.transform(X[:, :4])
    with pytest.raises(ValueError, match="X must be finite, got NaN in row 2"):
        rel.transform(torch.where(torch.arange(7)[:, None] == 2, float("nan"), X))


# --- the same anchors -----------------------------------------------------------------------------------------------


def test_models_with_other_anchors_are_told_apart_by_their_ids() -> None:
    first = RelativeProjection().fit(ANCHORS, ids=torch.tensor([9, 3, 5, 0, 7]))
    check_same_anchors(first, copy.deepcopy(first))
    turned = RelativeProjection().fit(ANCHORS, ids=torch.tensor([9, 5, 3, 0, 7]))
    with pytest.raises(ValueError, match="in another order: anchor 1 is item 3 in model 0 and item 5 in model 1; 2"):
        check_same_anchors(first, turned)
    with pytest.raises(ValueError, match="other items: anchor 0 is item 9 in model 0 and item 0 in model 2"):
        check_same_anchors(first, first, RelativeProjection(ANCHORS))
    with pytest.raises(ValueError, match="got 5 in model 0, 3 in 1"):
        check_same_anchors(first, RelativeProjection(ANCHORS[:3]))
    with pytest.raises(ValueError, match="at least two"):
        check_same_anchors(first)
    with pytest.raises(TypeError, match=r"must keep anchor_ids .* got a Linear without"):
        check_same_anchors(first, nn.Linear(1, 1))


# --- choosing them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["uniform", "stratified", "fps", "kmeans"])
def test_anchors_are_different_items_of_the_kind_of_the_data_and_the_same_for_a_seed(strategy: Any) -> None:
    items, labels = normal(40, 3), torch.arange(40) % 4
    chosen = select_anchors(items, labels, 15, strategy, seed=3)
    assert isinstance(chosen, Tensor)
    assert len(set(chosen.tolist())) == 15
    assert (chosen >= 0).all()
    assert (chosen < 40).all()
    again = select_anchors(items.numpy(), labels.numpy(), 15, strategy, seed=3)
    assert isinstance(again, np.ndarray)
    assert again.tolist() == chosen.tolist()
    assert select_anchors(items, labels, 15, strategy, seed=4).tolist() != chosen.tolist()


def test_fewer_uniform_anchors_are_the_first_of_more() -> None:
    assert select_anchors(range(50), k=5).tolist() == select_anchors(range(50), k=20).tolist()[:5]


def test_stratified_anchors_take_classes_in_turn_until_one_is_used_up() -> None:
    labels = np.array([2, 0, 2, 2, 0, 2, 1])
    chosen = select_anchors(labels, labels, 7, "stratified", seed=1)
    assert labels[chosen].tolist() == [0, 1, 2, 0, 2, 2, 2]
    assert labels[select_anchors(labels, labels, 4, "stratified")].tolist() == [0, 1, 2, 0]


def test_farthest_points_are_farthest_from_those_before() -> None:
    items = normal(30, 2)
    chosen = select_anchors(items, k=6, strategy="fps", metric="euclidean").tolist()
    for count in range(1, 6):
        distances = torch.cdist(items, items[chosen[:count]]).amin(dim=1)
        assert int(distances.argmax()) == chosen[count]
    by_angle = select_anchors(items, k=6, strategy="fps").tolist()
    assert by_angle == select_anchors(items * torch.linspace(0.1, 9, 30)[:, None], k=6, strategy="fps").tolist()


def test_kmeans_anchors_stand_one_in_each_of_separate_clusters() -> None:
    centres = 10 * torch.eye(4)
    items = centres.repeat_interleave(10, dim=0) + 0.1 * normal(40, 4)
    chosen = select_anchors(items, k=4, strategy="kmeans", metric="euclidean")
    assert sorted((chosen // 10).tolist()) == [0, 1, 2, 3]
    for index in chosen.tolist():
        mean = items[index // 10 * 10 : index // 10 * 10 + 10].mean(dim=0)
        assert int((items - mean).norm(dim=1).argmin()) == index
    assert len(set(select_anchors(torch.ones(6, 2), k=6, strategy="kmeans").tolist())) == 6
    assert len(set(select_anchors(torch.ones(6, 2), k=6, strategy="fps").tolist())) == 6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 8}, ValueError, "k must be at most n_samples = 7, got 8"),
        ({"k": 2.0}, TypeError, "k must be an integer"),
        ({"k": 2, "strategy": "first"}, ValueError, "strategy must be one of"),
        ({"k": 2, "strategy": "stratified"}, ValueError, "y must hold the items' classes"),
        ({"k": 2, "strategy": "stratified", "y": np.zeros(3, dtype=int)}, ValueError, "y must have one entry per row"),
        ({"k": 2, "metric": "l1"}, ValueError, "metric must be 'cosine' or 'euclidean'"),
        ({"k": 2, "seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_choices_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_anchors(X, **arguments)
    with pytest.raises(TypeError, match="X must be an array of embeddings for strategy='fps', got range"):
        select_anchors(range(9), k=2, strategy="fps")


# --- the estimator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        RelativeRepresentation(),
        RelativeRepresentation(similarity="euclidean", center=True, out_norm="layernorm"),
        RelativeRepresentation(similarity="inner", quantize="round", bin_size=0.5, out_norm="l2"),
    ],
)
def test_the_transformer_passes_the_checks_of_scikit_learn(estimator: RelativeRepresentation) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks that do not apply are skipped with a warning
        results = check_estimator(estimator, on_fail=None)
    assert [result["check_name"] for result in results if result["status"] == "failed"] == []
    assert sum(result["status"] == "passed" for result in results) > 30


def test_the_transformer_chooses_its_anchors_out_of_the_rows() -> None:
    rows, labels = normal(40, D).numpy(), np.array(list("abca" * 10))
    fitted = RelativeRepresentation(8, strategy="stratified", random_state=2).fit(rows, labels)
    codes = np.unique(labels, return_inverse=True)[1]
    np.testing.assert_array_equal(fitted.anchor_indices_, select_anchors(rows, codes, 8, "stratified", 2))
    np.testing.assert_array_equal(fitted.anchors_, rows[fitted.anchor_indices_])
    np.testing.assert_allclose(fitted.transform(X.numpy()), RelativeProjection(fitted.anchors_)(X.numpy()))
    assert fitted.get_feature_names_out().tolist() == [f"relativerepresentation{i}" for i in range(8)]
    chosen = RelativeRepresentation(anchors=[3, 1]).fit(rows)
    np.testing.assert_array_equal(chosen.anchors_, rows[[3, 1]])
    assert isinstance(chosen.transform(X), Tensor)
    np.testing.assert_array_equal(chosen.transform(X).numpy(), chosen.transform(X.numpy()))
    means = RelativeRepresentation(aggregate="class", groups=2).fit(rows, labels)
    assert means.transform(X.numpy()).shape == (7, 6)
    assert means.get_feature_names_out().shape == (6,)
    assert means.classes_.tolist() == ["a", "b", "c"]


def test_the_transformer_refuses_what_makes_no_sense() -> None:
    rows = normal(10, D).numpy()
    for arguments, message in (
        ({"n_anchors": 11}, "k must be at most n_samples = 10"),
        ({"n_anchors": 2, "anchors": [1]}, "n_anchors must be None where anchors are given"),
        ({"anchors": [10]}, r"anchors must lie in \[0, n_samples = 10\)"),
        ({"anchors": []}, "anchors must be a list of row numbers"),
        ({"strategy": "stratified", "n_anchors": 2}, "y must hold the classes of the rows"),
        ({"aggregate": "class"}, "y must hold the classes of the rows"),
        ({"out_norm": "batchnorm"}, "out_norm must be None, 'l2' or 'layernorm'"),
        ({"pool": "linear"}, "pool must not be 'linear'"),
    ):
        with pytest.raises(ValueError, match=message):
            RelativeRepresentation(**arguments).fit(rows)


def test_the_transformer_in_a_pipeline_reads_a_rotated_space() -> None:
    rows = normal(200, 8, seed=4)
    labels = (rows[:, 0] > 0).long().numpy()
    turned = rows @ torch.linalg.qr(normal(8, 8, seed=5)).Q
    model = make_pipeline(RelativeRepresentation(64), LogisticRegression(C=10, max_iter=2000)).fit(rows.numpy(), labels)
    other = clone(model[0]).fit(turned.numpy())
    direct = model.score(rows.numpy(), labels)
    assert model[1].score(other.transform(turned.numpy()), labels) == pytest.approx(direct, abs=0.01)
    assert direct > model.score(turned.numpy(), labels) + 0.1


def test_the_transformer_is_a_translation_for_stitching() -> None:
    rows, labels = normal(120, 8, seed=4), (torch.arange(120) % 3).numpy()
    turns = [torch.linalg.qr(normal(8, 8, seed=seed)).Q for seed in (5, 6)]
    encoders = [lambda items, turn=turn: items @ turn for turn in turns]
    anchors = rows[:20]

    def scores(translation: Any) -> np.ndarray:
        heads = []
        for encoder in encoders:
            own = translation.own(encoder(rows).double().numpy(), encoder(anchors).double().numpy())
            fitted = LogisticRegression(max_iter=500).fit(own, labels)
            heads.append(lambda codes, fitted=fitted: fitted.predict(codes.numpy()))
        return stitching_matrix(encoders, heads, rows, labels, transform=translation, anchors=anchors).scores

    ours = scores(RelativeRepresentation())
    np.testing.assert_allclose(ours, scores(Relative()))
    assert np.ptp(ours) < 0.02
    assert np.ptp(scores(Shuffled(RelativeRepresentation()))) > 0.1
    assert np.ptp(scores(RelativeRepresentation(similarity="angular", subspaces=1))) < 0.02
    with pytest.raises(ValueError, match="aggregate must be None to translate"):
        RelativeRepresentation(aggregate="class").own(rows.numpy(), anchors.numpy())


def test_the_transformer_leaves_zero_rows_zero_unless_they_are_an_error() -> None:
    rows = torch.cat([X, torch.zeros(1, D)]).numpy()
    assert not RelativeRepresentation().fit(X.numpy()).transform(rows)[7].any()
    with pytest.raises(ValueError, match="X must hold no zero vector for the cosine, got one in row 7"):
        RelativeRepresentation(zero="error").fit(X.numpy()).transform(rows)
