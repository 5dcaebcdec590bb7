"""Each similarity against its formula, what it is blind to, its gradients, and the quantisations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headgate.methods.contrastive.relative_representations import RelativeAttention, RelativeQuantizer
from headgate.methods.contrastive.relative_representations.classes import class_means, draw_anchors
from headgate.methods.contrastive.relative_representations.norm import AcrossBatchNorm
from headgate.methods.contrastive.relative_representations.quantize import cluster_means
from headgate.methods.contrastive.relative_representations.similarity import SIMILARITIES, unit_vectors

ITEMS, ANCHORS, DIM = 7, 5, 6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(dim: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q.to(dtype)


def relative(x: Tensor, anchors: Tensor, **options: Any) -> Tensor:
    return RelativeAttention(anchors.shape[0], anchors.shape[1], **options).eval()(x, anchors)


def by_hand(similarity: str, x: np.ndarray, a: np.ndarray) -> float:
    cosine = x @ a / math.sqrt(x @ x) / math.sqrt(a @ a)
    values = {
        "cosine": cosine,
        "inner": x @ a / math.sqrt(len(x)),
        "euclidean": -math.sqrt(((x - a) ** 2).sum()),
        "l1": -np.abs(x - a).sum(),
        "angular": 1 - math.acos(cosine) / math.pi,
    }
    return float(values[similarity])


@pytest.mark.parametrize("similarity", ["cosine", "inner", "euclidean", "l1", "angular"])
def test_a_similarity_is_its_formula(similarity: Any) -> None:
    x, anchors = normal(ITEMS, DIM), normal(ANCHORS, DIM, seed=1)
    expected = [[by_hand(similarity, item, anchor) for anchor in anchors.numpy()] for item in x.numpy()]
    np.testing.assert_allclose(relative(x, anchors, similarity=similarity).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [3, 6, 9])
def test_a_basis_change_is_the_least_squares_solution_of_least_norm(count: int) -> None:
    x, anchors = normal(ITEMS, DIM), normal(count, DIM, seed=1)
    found = relative(x, anchors, similarity="basis_change")
    expected = np.linalg.lstsq(anchors.numpy().T, x.numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert found.shape == (ITEMS, count)
    normalized = relative(x, anchors, similarity="basis_change", normalize=True)
    unit = [np.array(v) / np.linalg.norm(v, axis=1, keepdims=True) for v in (x.numpy(), anchors.numpy())]
    np.testing.assert_allclose(normalized.numpy(), np.linalg.lstsq(unit[1].T, unit[0].T, rcond=None)[0].T, rtol=1e-9)


def test_a_repeated_anchor_shares_its_coordinate() -> None:
    x, anchors = normal(ITEMS, DIM, dtype=torch.float32), normal(4, DIM, seed=1, dtype=torch.float32)
    once = relative(x, anchors, similarity="basis_change")
    twice = relative(x, torch.cat([anchors, anchors[:1]]), similarity="basis_change")
    torch.testing.assert_close(twice[:, 0], once[:, 0] / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice[:, 4], once[:, 0] / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(twice[:, 1:4], once[:, 1:], rtol=1e-4, atol=1e-5)


def test_normalised_inner_product_is_the_cosine() -> None:
    x, anchors = normal(ITEMS, DIM), normal(ANCHORS, DIM, seed=1)
    assert torch.equal(relative(x, anchors, similarity="inner", normalize=True), relative(x, anchors))


@pytest.mark.parametrize("trial", range(5))
def test_cosine_is_blind_to_rotation_and_scale_and_not_to_an_offset(trial: int) -> None:
    x, anchors = normal(200, 32, seed=trial, dtype=torch.float32), normal(64, 32, seed=50 + trial, dtype=torch.float32)
    turn, scale = rotation(32, seed=100 + trial, dtype=torch.float32), 10.0 ** (trial - 2)
    plain = relative(x, anchors)
    torch.testing.assert_close(relative(scale * x @ turn, scale * anchors @ turn), plain, rtol=0, atol=1e-5)
    moved = relative(x @ turn + 1, anchors @ turn + 1)
    assert (moved - plain).abs().max() > 0.1
    centred = relative(scale * x @ turn + 1, scale * anchors @ turn + 1, center=True)
    torch.testing.assert_close(centred, relative(x, anchors, center=True), rtol=0, atol=2e-4)


BLIND = {
    "cosine": {"rotation", "scale"},
    "angular": {"rotation", "scale"},
    "inner": {"rotation"},
    "basis_change": {"rotation", "scale", "linear"},
    "euclidean": {"rotation", "offset"},
    "l1": {"offset"},
}


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_are_blind_to_what_the_text_says_and_to_no_more(similarity: Any) -> None:
    x, anchors = normal(ITEMS, DIM), normal(9, DIM, seed=1)
    linear = normal(DIM, DIM, seed=2)
    changes = {
        "rotation": lambda v: v @ rotation(DIM),
        "scale": lambda v: 3 * v,
        "offset": lambda v: v + torch.linspace(1, 2, DIM, dtype=v.dtype),
        "linear": lambda v: v @ linear,
    }
    plain = relative(x, anchors, similarity=similarity)
    seen = {
        name
        for name, change in changes.items()
        if torch.allclose(relative(change(x), change(anchors), similarity=similarity), plain, rtol=1e-8, atol=1e-8)
    }
    assert seen == BLIND[similarity]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_gradients_are_those_of_finite_differences(similarity: Any) -> None:
    x = normal(3, DIM).requires_grad_()
    anchors = normal(4, DIM, seed=1).requires_grad_()
    block = RelativeAttention(4, DIM, similarity=similarity, center=True)
    assert torch.autograd.gradcheck(block, (x, anchors))


@pytest.mark.parametrize("similarity", ["cosine", "angular", "euclidean"])
def test_an_item_that_is_an_anchor_and_a_zero_vector_have_finite_gradients(similarity: Any) -> None:
    anchors = normal(4, DIM, dtype=torch.float32)
    x = torch.cat([anchors[:1], -anchors[1:2], torch.zeros(1, DIM)]).requires_grad_()
    found = relative(x, anchors, similarity=similarity)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    if similarity != "euclidean":
        nothing = {"cosine": 0.0, "angular": 0.5}[similarity]
        torch.testing.assert_close(found[2], torch.full((4,), nothing))
        torch.testing.assert_close(found[0, 0], torch.tensor(1.0))
        torch.testing.assert_close(found[1, 1], torch.tensor({"cosine": -1.0, "angular": 0.0}[similarity]))


def test_unit_vectors_of_very_small_and_large_vectors_have_length_one() -> None:
    for scale in (1e-38, 1e-20, 1e20, 1e38):
        lengths = unit_vectors(scale * torch.tensor([[1.0, 2.0, -2.0]])).norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones(1))


# --- quantisation ---------------------------------------------------------------------------------------------------


def gradient(quantizer: RelativeQuantizer, values: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    values = values.clone().requires_grad_()
    result = quantizer(values)
    result.backward(cotangent)
    assert values.grad is not None
    return result.detach(), values.grad


def test_roundings_share_their_values_and_differ_in_their_gradients() -> None:
    values = torch.tensor([[0.12, -0.26, 0.31]])
    cotangent = torch.tensor([[1.3, -0.04, 0.25]])
    binned = torch.tensor([[0.1, -0.3, 0.3]])
    for quantizer, expected in (
        (RelativeQuantizer("round", 0.1), cotangent),
        (RelativeQuantizer("round", 0.1, has_gradient=False), torch.zeros(1, 3)),
        (RelativeQuantizer("round_gradient", 0.1), torch.tensor([[1.3, 0.0, 0.2]])),
    ):
        result, found = gradient(quantizer, values, cotangent)
        torch.testing.assert_close(result, binned)
        torch.testing.assert_close(found, expected)


def test_smooth_steps_are_fixed_at_the_bins_and_steepest_between_them() -> None:
    quantizer = RelativeQuantizer("smooth", 0.5)
    values = torch.tensor([[0.0, 0.5, 1.0, 0.25, 0.1]], dtype=torch.float64)
    result, slope = gradient(quantizer, values, torch.ones(1, 5, dtype=torch.float64))
    last = 0.1 - 0.5 * math.sin(2 * math.pi * 0.2) / (2 * math.pi)
    torch.testing.assert_close(result, torch.tensor([[0.0, 0.5, 1.0, 0.25, last]], dtype=torch.float64))
    wanted = torch.tensor([[0.0, 0.0, 0.0, 2.0, 1 - math.cos(0.4 * math.pi)]], dtype=torch.float64)
    torch.testing.assert_close(slope, wanted)
    published = values - torch.sin(2 * torch.pi * values) / (2 * torch.pi)
    torch.testing.assert_close(RelativeQuantizer("smooth")(values), published)


def test_clusters_become_their_means() -> None:
    rows = torch.tensor([[0.0, 0.0], [5.0, 5.0], [0.2, 0.0], [5.0, 5.4]])
    expected = torch.tensor([[0.1, 0.0], [5.0, 5.2], [0.1, 0.0], [5.0, 5.2]])
    torch.testing.assert_close(cluster_means(rows, 1.0), expected)
    torch.testing.assert_close(cluster_means(rows, 100.0), rows.mean(dim=0).expand(4, 2))
    assert torch.equal(cluster_means(rows[:1], 1.0), rows[:1])


def test_clusters_of_similarities_work_where_anchors_outnumber_dimensions() -> None:
    x, anchors = normal(8, 3), normal(9, 3, seed=1)
    quantizer = RelativeQuantizer("cluster", cluster_threshold=1.5)
    plain, found = relative(x, anchors), relative(x, anchors, quantizer=quantizer)
    torch.testing.assert_close(found, cluster_means(plain, 1.5))
    assert 1 < len(torch.unique(found, dim=0)) < 8


def test_rounding_embeddings_has_a_gradient_unless_the_published_code_is_asked_for() -> None:
    rounding = RelativeQuantizer("round", 0.1)
    gradients = []
    for quirks in (False, True):
        x = normal(ITEMS, DIM).requires_grad_()
        relative(x, normal(ANCHORS, DIM, seed=1), absolute_quantizer=rounding, official_quirks=quirks).sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0.1
    assert gradients[1] is None or not gradients[1].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "floor"}, "quantize must be None or one of round, round_gradient, smooth, cluster, got 'floor'"),
        ({"mode": "round"}, "bin_size must be given for quantize='round', got None"),
        ({"mode": "round", "bin_size": 0.0}, "bin_size must be positive"),
        ({"mode": "smooth", "bin_size": -1.0}, "bin_size must be positive"),
        ({"mode": "cluster"}, "cluster_threshold must be given for quantize='cluster'"),
        ({"mode": "cluster", "bin_size": 0.1, "cluster_threshold": 1.0}, "bin_size is not used by quantize='cluster'"),
        ({"mode": "round", "bin_size": 0.1, "cluster_threshold": 1.0}, "and for no other mode"),
        ({"mode": "cluster", "cluster_threshold": 0.0}, "cluster_threshold must be positive"),
    ],
)
def test_quantisers_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativeQuantizer(**arguments)


# --- classes and norms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_class_means_are_those_of_a_loop(groups: int) -> None:
    labels = torch.tensor([2, 0, 2, 2, 0, 3, 2])
    similarities = normal(5, 7)
    expected = torch.zeros(5, 4 * groups, dtype=torch.float64)
    for label in range(4):
        members = [k for k in range(7) if labels[k] == label]
        for group in range(groups):
            chosen = members[group::groups]
            if chosen:
                expected[:, label + 4 * group] = similarities[:, chosen].mean(dim=1)
    torch.testing.assert_close(class_means(similarities, labels, 4, groups), expected)


def test_anchors_are_drawn_from_their_own_class() -> None:
    labels = torch.tensor([1, 0, 1, 2, 1])
    anchors = normal(5, 3)
    torch.manual_seed(0)
    drawn, classes = draw_anchors(anchors, labels, 3, 40, "stratified", random=True)
    assert classes.tolist() == [0] * 40 + [1] * 40 + [2] * 40
    for label in range(3):
        own = {tuple(row) for row in anchors[labels == label].tolist()}
        assert {tuple(row) for row in drawn[classes == label].tolist()} == own
    in_turn, _ = draw_anchors(anchors, labels, 3, 4, "stratified", random=False)
    assert torch.equal(in_turn, anchors[[1, 1, 1, 1, 0, 2, 4, 0, 3, 3, 3, 3]])


def test_gaussian_anchors_have_the_mean_and_spread_of_their_class() -> None:
    labels = torch.tensor([1, 0, 1, 1, 1])
    anchors = normal(5, 3)
    torch.manual_seed(0)
    drawn, classes = draw_anchors(anchors, labels, 2, 20_000, "gaussian", random=True)
    own = anchors[labels == 1]
    torch.testing.assert_close(drawn[classes == 1].mean(dim=0), own.mean(dim=0), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn[classes == 1].std(dim=0), own.std(dim=0), rtol=0.05, atol=0)
    torch.testing.assert_close(drawn[classes == 0], anchors[1].expand(20_000, 3))
    still, _ = draw_anchors(anchors, labels, 2, 2, "gaussian", random=False)
    torch.testing.assert_close(still, torch.stack([anchors[1], anchors[1], own.mean(dim=0), own.mean(dim=0)]))


def test_norm_over_the_batch_is_instance_norm_of_the_transposed_matrix() -> None:
    x = normal(6, 4)
    ours, theirs = AcrossBatchNorm(4, dtype=torch.float64), torch.nn.InstanceNorm1d(4, affine=True, dtype=torch.float64)
    for module in (ours, theirs):
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x.T).T)
    with pytest.raises(ValueError, match="x must hold at least 2 items to be normalised over the batch"):
        ours(x[:1])
