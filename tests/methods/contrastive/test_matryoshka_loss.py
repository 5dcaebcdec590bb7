"""The nested loss in its three forms, its weights, its draws of sizes, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import headgate as hg
from headgate.methods.contrastive.matryoshka import MatryoshkaContrastiveLoss, MatryoshkaLoss, truncate

DIMS = (2, 4, 8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_and_target(batch: int = 6, classes: int = 5) -> tuple[tuple[Tensor, ...], Tensor]:
    target = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(9))
    return tuple(normal(batch, classes, seed=seed) for seed in range(3)), target


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(dim=1)


def test_the_sum_over_sizes_is_weighted_and_not_divided_by_their_number() -> None:
    logits, target = logits_and_target()
    terms = [F.cross_entropy(entry, target) for entry in logits]
    torch.testing.assert_close(MatryoshkaLoss(DIMS)(logits, target), terms[0] + terms[1] + terms[2])
    weighted = MatryoshkaLoss(dims=DIMS, weights=(2.0, 0.0, 0.5))(logits, target)
    torch.testing.assert_close(weighted, 2 * terms[0] + 0.5 * terms[2])


def test_logits_may_come_as_tuple_mapping_or_stacked_tensor() -> None:
    logits, target = logits_and_target()
    loss = hg.MatryoshkaLoss(list(DIMS))
    expected = loss(logits, target)
    mapping = dict(reversed(list(zip(DIMS, logits, strict=True))))
    for form in (list(logits), torch.stack(logits), mapping):
        assert loss(form, target).item() == expected.item()


def test_label_smoothing_comes_with_the_base_loss() -> None:
    logits, target = logits_and_target()
    loss = MatryoshkaLoss(nn.CrossEntropyLoss(label_smoothing=0.1), DIMS)(logits, target)
    by_hand = 0.0
    for entry in logits:
        log_probabilities = entry.log_softmax(dim=1)
        own = log_probabilities[torch.arange(6), target]
        by_hand -= (0.9 * own + 0.1 * log_probabilities.mean(dim=1)).mean()
    torch.testing.assert_close(loss, by_hand)


def test_a_target_may_be_class_probabilities() -> None:
    logits, target = logits_and_target()
    soft = F.one_hot(target, 5).float()
    torch.testing.assert_close(MatryoshkaLoss(DIMS)(logits, soft), MatryoshkaLoss(DIMS)(logits, target))


def test_reductions_agree_for_the_default_and_for_a_base_loss_per_item() -> None:
    logits, target = logits_and_target()
    each = MatryoshkaLoss(dims=DIMS, reduction="none")(logits, target)
    assert each.shape == (6,)
    torch.testing.assert_close(each, sum(F.cross_entropy(entry, target, reduction="none") for entry in logits))
    own = nn.CrossEntropyLoss(reduction="none")
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum()), ("none", each)):
        for base in (None, own):
            torch.testing.assert_close(MatryoshkaLoss(base, DIMS, reduction=reduction)(logits, target), expected)


def test_a_base_loss_that_has_averaged_cannot_be_summed_any_more() -> None:
    logits, target = logits_and_target()
    for reduction in ("sum", "none"):
        loss = MatryoshkaLoss(nn.CrossEntropyLoss(), DIMS, reduction=reduction)
        with pytest.raises(ValueError, match="one value per item"):
            loss(logits, target)


def test_both_sides_of_a_pair_are_cut_and_normalised_after_the_cut() -> None:
    a, b = normal(5, 8), normal(5, 8, seed=1)
    plain = MatryoshkaLoss(squared_distance, DIMS)(a, b)
    torch.testing.assert_close(plain, sum((a[:, :m] - b[:, :m]).square().sum(dim=1).mean() for m in DIMS))
    cosine = MatryoshkaLoss(squared_distance, DIMS, normalize=True)(a, b)
    # ‖â − b̂‖² = 2 − 2 cos(a, b)
    by_hand = sum((2 - 2 * F.cosine_similarity(a[:, :size], b[:, :size])).mean() for size in DIMS)
    torch.testing.assert_close(cosine, by_hand)
    before = MatryoshkaLoss(squared_distance, DIMS)(F.normalize(a), F.normalize(b))
    assert not torch.allclose(cosine, before)


def test_the_scale_of_an_embedding_does_not_matter_where_slices_are_normalised() -> None:
    a, b = normal(5, 8), normal(5, 8, seed=1)
    loss = MatryoshkaLoss(squared_distance, DIMS, normalize=True)
    torch.testing.assert_close(loss(a, b), loss(7 * a, 0.01 * b))


def test_three_embeddings_and_labels_reach_the_base_loss() -> None:
    seen: list[tuple[tuple[int, ...], ...]] = []

    def base(anchor: Tensor, positive: Tensor, negative: Tensor, target: Tensor, *, soft: Tensor) -> Tensor:
        seen.append((anchor.shape, positive.shape, negative.shape, target.shape, soft.shape))
        return anchor.sum() + positive.sum() + negative.sum()

    target = torch.zeros(5, dtype=torch.int64)
    MatryoshkaLoss(base, DIMS)(normal(5, 8), normal(5, 8), normal(3, 8), target, soft=normal(5, 8))
    assert seen == [((5, m), (5, m), (3, m), (5,), (5, 8)) for m in DIMS]


def test_coordinate_gradients_are_the_sum_over_the_sizes_that_hold_them() -> None:
    # With base(z) = Σ z the gradient of coordinate j counts the sizes above j.
    z = normal(1, 8).requires_grad_()
    MatryoshkaLoss(lambda part: part.sum(), DIMS)(z).backward()
    assert z.grad is not None
    assert z.grad[0].tolist() == [3, 3, 2, 2, 1, 1, 1, 1]


def test_a_zero_slice_stays_zero_and_gets_a_finite_gradient() -> None:
    a, b = normal(3, 8), normal(3, 8, seed=1)
    a[1, :4] = 0
    a.requires_grad_()
    loss = MatryoshkaLoss(squared_distance, DIMS, normalize=True, reduction="none")(a, b)
    torch.testing.assert_close(loss[1], 1 + 1 + (F.normalize(a[1], dim=0) - F.normalize(b[1], dim=0)).square().sum())
    loss.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad.abs().max() < 100


def test_nan_in_an_embedding_gives_a_nan_loss() -> None:
    a, b = normal(3, 8), normal(3, 8, seed=1)
    a[2, 7] = float("nan")
    each = MatryoshkaLoss(squared_distance, DIMS, normalize=True, reduction="none")(a, b)
    assert each.isnan().tolist() == [False, False, True]


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, target = logits_and_target()
    half = tuple(entry.bfloat16() for entry in logits)
    loss = MatryoshkaLoss(DIMS)(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, MatryoshkaLoss(DIMS)(tuple(entry.float() for entry in half), target))


def test_weights_are_a_buffer_that_moves_and_is_saved() -> None:
    loss = MatryoshkaLoss(dims=DIMS, weights=(1.0, 0.5, 0.25))
    assert loss.state_dict()["weights"].tolist() == [1.0, 0.5, 0.25]
    assert loss.double().weights.dtype == torch.float64
    other = MatryoshkaLoss(DIMS)
    other.load_state_dict(loss.state_dict())
    assert other.weights.tolist() == [1.0, 0.5, 0.25]


def recorder(sizes: list[int]) -> Any:
    def base(part: Tensor) -> Tensor:
        sizes.append(part.shape[1])
        return part.sum()

    return base


def drawn(loss: MatryoshkaLoss, sizes: list[int], calls: int) -> list[tuple[int, ...]]:
    result = []
    for _ in range(calls):
        sizes.clear()
        loss(normal(2, 8))
        result.append(tuple(sizes))
    return result


def test_draws_of_sizes_depend_on_the_seed_and_the_call_alone() -> None:
    sizes: list[int] = []
    first = drawn(MatryoshkaLoss(recorder(sizes), DIMS, dims_per_step=2, seed=4), sizes, 12)
    torch.manual_seed(5)
    assert drawn(MatryoshkaLoss(recorder(sizes), DIMS, dims_per_step=2, seed=4), sizes, 12) == first
    assert drawn(MatryoshkaLoss(recorder(sizes), DIMS, dims_per_step=2, seed=5), sizes, 12) != first
    assert all(len(draw) == 2 and draw[0] < draw[1] for draw in first)
    assert len(set(first)) == 3


def test_draws_go_on_where_a_saved_loss_left_them() -> None:
    sizes: list[int] = []
    loss = MatryoshkaLoss(recorder(sizes), DIMS, dims_per_step=1)
    drawn(loss, sizes, 5)
    resumed = MatryoshkaLoss(recorder(sizes), DIMS, dims_per_step=1)
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    assert drawn(resumed, sizes, 8) == drawn(loss, sizes, 8)


def test_the_mean_over_all_draws_is_the_full_sum() -> None:
    a, b = normal(4, 8), normal(4, 8, seed=1)
    full = MatryoshkaLoss(squared_distance, DIMS, (1.0, 3.0, 0.5))(a, b)
    sampled = MatryoshkaLoss(squared_distance, DIMS, (1.0, 3.0, 0.5), dims_per_step=2)
    values = {round(value.item(), 4): value for value in (sampled(a, b) for _ in range(40))}
    assert len(values) == 3  # the pairs of three sizes
    torch.testing.assert_close(torch.stack(list(values.values())).mean(), full)


def test_evaluation_mode_takes_all_sizes() -> None:
    a, b = normal(4, 8), normal(4, 8, seed=1)
    sampled = MatryoshkaLoss(squared_distance, DIMS, dims_per_step=1).eval()
    torch.testing.assert_close(sampled(a, b), MatryoshkaLoss(squared_distance, DIMS)(a, b))


def test_all_sizes_per_step_is_the_full_sum() -> None:
    a, b = normal(4, 8), normal(4, 8, seed=1)
    sampled = MatryoshkaLoss(squared_distance, DIMS, dims_per_step=3)
    torch.testing.assert_close(sampled(a, b), MatryoshkaLoss(squared_distance, DIMS)(a, b))


def test_contrastive_loss_is_the_symmetric_cross_entropy_of_cosines_at_every_size() -> None:
    a, b = normal(6, 8), normal(6, 8, seed=1)
    loss = MatryoshkaContrastiveLoss(DIMS, (1.0, 0.5, 2.0), temperature=0.2)(a, b)
    pairs = torch.arange(6)
    by_hand = torch.zeros(())
    for weight, size in zip((1.0, 0.5, 2.0), DIMS, strict=True):
        similarity = truncate(a, size) @ truncate(b, size).T / 0.2
        by_hand += weight * (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2
    torch.testing.assert_close(loss, by_hand)


def test_contrastive_temperature_is_trained_only_if_wanted() -> None:
    a, b = normal(6, 8), normal(6, 8, seed=1)
    learned = MatryoshkaContrastiveLoss(DIMS)
    learned(a, b).backward()
    (temperature,) = learned.parameters()
    assert temperature.grad is not None
    assert temperature.grad.abs() > 0
    fixed = MatryoshkaContrastiveLoss(DIMS, learn_temperature=False)
    assert [parameter.requires_grad for parameter in fixed.parameters()] == [False]
    with pytest.raises(ValueError, match="temperature must be positive"):
        MatryoshkaContrastiveLoss(DIMS, temperature=0.0)


class SentenceModel(nn.Module):
    """Answers as a sentence-transformers model does: it adds its outputs to the features it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 8)
        self.calls = 0

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        features["token_embeddings"] = self.projection(features["tokens"])
        features["sentence_embedding"] = features["token_embeddings"].mean(dim=1)
        return features


class RankingLoss(nn.Module):
    """Calls its model itself, as the losses of sentence-transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sentence_features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        first, second = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return F.cross_entropy(first @ second.T, labels)


def test_a_sentence_transformers_loss_sees_truncated_embeddings_and_its_model_runs_once_per_column() -> None:
    model = SentenceModel()
    features = [{"tokens": normal(4, 5, 3)}, {"tokens": normal(4, 5, 3, seed=1)}]
    labels = torch.arange(4)
    loss = MatryoshkaLoss(RankingLoss(model), DIMS, normalize=True)(features, labels)
    assert model.calls == 2
    first, second = (model(dict(entry))["sentence_embedding"] for entry in features)
    by_hand = sum(F.cross_entropy(truncate(first, m) @ truncate(second, m).T, labels) for m in DIMS)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert model.projection.weight.grad is not None
    assert "forward" not in vars(model)


def test_the_model_of_a_sentence_transformers_loss_is_given_back_after_an_error() -> None:
    model = SentenceModel()
    loss = MatryoshkaLoss(RankingLoss(model), DIMS)
    with pytest.raises(ValueError, match="not enough values"):
        loss([{"tokens": normal(4, 5, 3)}], torch.arange(4))
    assert "forward" not in vars(model)


def test_a_gradient_caching_loss_is_refused() -> None:
    class Cached(RankingLoss):
        mini_batch_size = 2

        def calculate_loss(self) -> None: ...

    with pytest.raises(TypeError, match="Cached caches gradients"):
        MatryoshkaLoss(Cached(SentenceModel()), DIMS)


def test_features_need_a_loss_that_holds_its_model() -> None:
    with pytest.raises(TypeError, match="holds its model"):
        MatryoshkaLoss(squared_distance, DIMS)([{"tokens": normal(1, 2, 3)}])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dims": None}, TypeError, "dims must be given"),
        ({"dims": ()}, ValueError, "at least one size"),
        ({"dims": (4, 2)}, ValueError, "strictly increasing"),
        ({"dims": DIMS, "weights": (1.0, 1.0)}, ValueError, "each of the 3 dims, got 2"),
        ({"dims": DIMS, "weights": (1.0, -1.0, 1.0)}, ValueError, "not negative"),
        ({"dims": DIMS, "weights": (1.0, float("nan"), 1.0)}, ValueError, "finite"),
        ({"dims": DIMS, "weights": (0.0, 0.0, 0.0)}, ValueError, "not all be zero"),
        ({"dims": DIMS, "dims_per_step": 0}, ValueError, r"dims_per_step must lie in \[1, 3\]"),
        ({"dims": DIMS, "dims_per_step": 4}, ValueError, r"dims_per_step must lie in \[1, 3\]"),
        ({"dims": DIMS, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"dims": DIMS, "reduction": "max"}, ValueError, "reduction must be"),
        ({"dims": DIMS, "base_loss": 3}, TypeError, "base_loss must be a function or a module"),
        ({"dims": DIMS, "base_loss": [1, 2]}, TypeError, "base_loss must be a function or a module"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MatryoshkaLoss(**arguments)


def test_wrong_logits_are_refused() -> None:
    logits, target = logits_and_target()
    loss = MatryoshkaLoss(DIMS)
    with pytest.raises(ValueError, match="each of the 3 dims, got 2"):
        loss(logits[:2], target)
    with pytest.raises(ValueError, match="each of the 3 dims, got 2"):
        loss(torch.stack(logits[:2]), target)
    with pytest.raises(ValueError, match=r"logits for the dims \[2, 4, 8\], got \[2, 4, 9\]"):
        loss(dict(zip((2, 4, 9), logits, strict=True)), target)
    with pytest.raises(ValueError, match="one shape"):
        loss((*logits[:2], normal(6, 4)), target)
    with pytest.raises(TypeError, match="floating"):
        loss((*logits[:2], torch.zeros(6, 5, dtype=torch.int64)), target)
    with pytest.raises(TypeError, match="got float"):
        loss(1.0, target)
    with pytest.raises(ValueError, match="must be logits per size"):
        loss(logits[0], target)
    with pytest.raises(TypeError, match="int64 labels"):
        loss(logits, target.int())
    with pytest.raises(ValueError, match="labels for logits"):
        loss(logits, target[:4])
    with pytest.raises(ValueError, match="normalize applies to embeddings"):
        MatryoshkaLoss(nn.CrossEntropyLoss(), DIMS, normalize=True)(logits, target)


def test_embeddings_of_another_size_or_dtype_are_refused() -> None:
    loss = MatryoshkaLoss(squared_distance, DIMS)
    with pytest.raises(ValueError, match="inputs must have dim=8"):
        loss(normal(4, 7), normal(4, 7))
    with pytest.raises(ValueError, match="args must have dim=8"):
        loss(normal(4, 8), normal(4, 9))
    with pytest.raises(TypeError, match="inputs must be floating"):
        loss(torch.zeros(4, 8, dtype=torch.int64), normal(4, 8))
    with pytest.raises(TypeError, match="args must be floating"):
        loss(normal(4, 8), torch.zeros(4, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="hold the same pairs"):
        MatryoshkaContrastiveLoss(DIMS)(normal(4, 8), normal(3, 8))
