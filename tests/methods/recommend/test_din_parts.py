"""Dice, the activation unit and the mini-batch aware penalty, against their definitions in the plainest form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from headgate import Dice, FixedPooling, LocalActivationUnit, MiniBatchAwareL2, occurrence_counts


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lengths(*counts: int, longest: int = 6) -> torch.Tensor:
    return torch.arange(longest) < torch.tensor(counts)[:, None]


# Dice


def test_dice_is_its_formula_on_batch_statistics_and_then_on_moving_averages() -> None:
    dice = Dice(3)
    with torch.no_grad():
        dice.alpha.copy_(torch.tensor([0.5, -1.0, 0.0]))
    x = normal(8, 3) * 2 + 1
    mean, variance = x.mean(dim=0), x.var(dim=0, correction=0)
    p = 1 / (1 + torch.exp(-(x - mean) / torch.sqrt(variance + 1e-8)))
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)
    torch.testing.assert_close(dice.running_mean, 0.1 * mean)
    torch.testing.assert_close(dice.running_var, 0.9 + 0.1 * x.var(dim=0, correction=1))
    dice.eval()
    p = torch.sigmoid((x - dice.running_mean) / torch.sqrt(dice.running_var + 1e-8))
    torch.testing.assert_close(dice(x), p * x + (1 - p) * dice.alpha * x)


def test_dice_begins_as_swish_of_the_standardised_input_and_is_the_identity_at_alpha_one() -> None:
    dice, x = Dice(4), normal(5, 4)
    standard = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    torch.testing.assert_close(dice(x), x * torch.sigmoid(standard), atol=1e-6, rtol=1e-5)
    nn.init.ones_(dice.alpha)
    torch.testing.assert_close(dice(x), x)


def test_dice_on_another_axis_is_dice_on_the_rows() -> None:
    x = normal(4, 5, 3)
    rows, channels_first = Dice(3), Dice(3, channel_dim=1)
    expected = rows(x.reshape(20, 3)).reshape(4, 5, 3)
    torch.testing.assert_close(channels_first(x.movedim(-1, 1)).movedim(1, -1), expected)
    torch.testing.assert_close(rows.running_var, channels_first.running_var)


def test_masked_rows_change_neither_statistics_nor_gradients_of_the_others() -> None:
    mask = lengths(6, 3, 1)
    x = normal(3, 6, 2)
    packed, padded = Dice(2, affine=True), Dice(2, affine=True)
    real = x[mask].requires_grad_()
    filled = torch.where(mask[..., None], x, 1e3).requires_grad_()
    expected, actual = packed(real), padded(filled, mask)
    torch.testing.assert_close(actual[mask], expected)
    torch.testing.assert_close(padded.running_mean, packed.running_mean)
    torch.testing.assert_close(padded.running_var, packed.running_var)
    expected.square().sum().backward()
    actual[mask].square().sum().backward()
    assert real.grad is not None
    assert filled.grad is not None
    torch.testing.assert_close(filled.grad[mask], real.grad)
    assert (filled.grad[~mask] == 0).all()


def test_dice_in_training_needs_two_rows() -> None:
    dice = Dice(2)
    with pytest.raises(ValueError, match="at least 2 rows to average over in training, got 1"):
        dice(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="at least 2 rows to average over in training, got 1"):
        dice(torch.zeros(3, 2), torch.tensor([True, False, False]))
    assert dice.eval()(torch.ones(1, 2)).shape == (1, 2)


# The activation unit


def slow_unit(unit: LocalActivationUnit, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One candidate and one behaviour at a time, with the four vectors side by side."""
    pooled = torch.zeros(query.shape[0], keys.shape[2])
    for row in range(query.shape[0]):
        scores = []
        for key, real in zip(keys[row], mask[row], strict=True):
            if real:
                v = query[row]
                hidden = torch.cat([v, key, v - key, v * key])[None]
                for layer, activation in zip([unit.first, *unit.layers], unit.activations, strict=True):
                    hidden = activation(layer(hidden))
                scores.append(unit.score(hidden)[0, 0])
        real_keys = keys[row][mask[row]]
        if len(scores):
            weights = torch.stack(scores)
            if unit.normalize == "scaled_softmax":
                weights = weights / math.sqrt(unit.embed_dim)
            if unit.normalize is not None:
                weights = weights.exp() / weights.exp().sum()
            pooled[row] = (weights[:, None] * real_keys).sum(dim=0)
    return pooled


@pytest.mark.parametrize("normalize", [None, "softmax", "scaled_softmax"])
@pytest.mark.parametrize("activation", ["dice", "prelu", "sigmoid", "relu"])
def test_the_fused_unit_is_the_network_on_four_vectors_side_by_side(activation: Any, normalize: Any) -> None:
    torch.manual_seed(0)
    unit = LocalActivationUnit(4, (7, 5), activation, normalize).eval()
    query, keys, mask = normal(5, 4), normal(5, 6, 4, seed=1), lengths(6, 4, 1, 2, 0)
    mask[1, 0] = False  # a gap counts as padding does
    expected = slow_unit(unit, query, keys, mask)
    torch.testing.assert_close(unit(query, keys, mask), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalize", [None, "softmax"])
def test_candidates_are_pooled_alike_one_by_one_together_and_from_a_prepared_history(normalize: Any) -> None:
    torch.manual_seed(1)
    unit = LocalActivationUnit(4, (7,), "dice", normalize).eval()
    query, keys, mask = normal(3, 5, 4), normal(3, 6, 4, seed=1), lengths(6, 4, 0)
    together, weights = unit(query, keys, mask, return_weights=True)
    one_by_one = torch.stack([unit(query[:, index], keys, mask) for index in range(5)], dim=1)
    torch.testing.assert_close(together, one_by_one)
    torch.testing.assert_close(unit.pool(query[:, 2], unit.prepare(keys, mask)), together[:, 2])
    torch.testing.assert_close(torch.einsum("bnt,bte->bne", weights, keys), together)
    assert (weights[~mask[:, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("normalize", [None, "softmax", "scaled_softmax"])
def test_an_empty_history_gives_zeros_and_finite_gradients(normalize: Any) -> None:
    torch.manual_seed(2)
    unit = LocalActivationUnit(4, (7,), "prelu", normalize)
    query, keys = normal(2, 4).requires_grad_(), normal(2, 6, 4, seed=1)
    keys[1] = float("inf")  # whatever stands in padding
    pooled = unit(query, keys, lengths(3, 0))
    assert (pooled[1] == 0).all()
    pooled.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert query.grad[0].abs().sum() > 0


def test_padding_changes_nothing_in_training_unless_the_published_quirks_are_asked_for() -> None:
    query, keys, mask = normal(3, 4), normal(3, 6, 4, seed=1), lengths(6, 2, 1)
    other = torch.where(mask[..., None], keys, 50.0)
    for quirks in (False, True):
        torch.manual_seed(3)
        unit = LocalActivationUnit(4, (7,), "dice", official_quirks=quirks)
        same = torch.allclose(unit(query, keys, mask), unit(query, other, mask), atol=1e-6)
        assert same is not quirks
    uniform = LocalActivationUnit(4, (7,), "relu", "softmax", official_quirks=True)
    torch.testing.assert_close(uniform(query, keys, lengths(6, 2, 0))[2], keys[2].mean(dim=0))


def test_raw_weights_keep_the_intensity_that_a_softmax_loses() -> None:
    torch.manual_seed(4)
    once, query = normal(1, 2, 4, seed=1), normal(1, 4)
    twice = torch.cat([once, once], dim=1)
    for normalize, factor in ((None, 2.0), ("softmax", 1.0)):
        unit = LocalActivationUnit(4, (7,), "relu", normalize)  # type: ignore[arg-type]
        short, long = (unit(query, keys, torch.ones(keys.shape[:2], dtype=torch.bool)) for keys in (once, twice))
        torch.testing.assert_close(long, factor * short)


def test_scale_multiplies_the_scores() -> None:
    query, keys, mask = normal(2, 4), normal(2, 6, 4, seed=1), lengths(6, 3)
    pooled = []
    for scale in (1.0, 0.25):
        torch.manual_seed(5)
        pooled.append(LocalActivationUnit(4, (7,), "relu", scale=scale)(query, keys, mask))
    torch.testing.assert_close(pooled[1], 0.25 * pooled[0])


def test_fixed_pooling_is_sum_or_mean_of_the_real_behaviours_for_any_candidate() -> None:
    keys, mask = normal(3, 6, 4), lengths(6, 2, 0)
    for reduction in ("sum", "mean"):
        pooled = FixedPooling(reduction)(normal(3, 2, 4, seed=1), keys, mask)  # type: ignore[arg-type]
        expected = torch.stack([keys[0].sum(0), keys[1, :2].sum(0), torch.zeros(4)])
        if reduction == "mean":
            expected = expected / torch.tensor([6.0, 2.0, 1.0])[:, None]
        torch.testing.assert_close(pooled, expected[:, None].expand(3, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be positive"),
        ({"hidden": ()}, "hidden must hold one positive width"),
        ({"normalize": "sparsemax"}, "normalize must be None, 'softmax' or 'scaled_softmax', got 'sparsemax'"),
        ({"activation": "gelu"}, "activation must be one of dice, prelu, relu, sigmoid or a function, got 'gelu'"),
    ],
)
def test_an_impossible_unit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalActivationUnit(**{"embed_dim": 4, **arguments})


# The penalty


def test_the_gradient_of_the_penalty_is_the_paper_s_update_and_touches_the_batch_s_ids_alone() -> None:
    torch.manual_seed(6)
    table = nn.Embedding(9, 3)
    counts = torch.tensor([5, 2, 0, 7, 1, 1, 3, 4, 2])
    penalty = MiniBatchAwareL2({"item": table}, {"item": counts}, weight=0.3)
    history, candidate = torch.tensor([[1, 1, 3], [2, -1, -1]]), torch.tensor([3, 8])
    loss = penalty({"item": [history, candidate]})
    loss.backward()
    expected = torch.zeros(9, 3)
    for index in (1, 2, 3, 8):
        expected[index] = 0.3 * table.weight[index].detach() / max(1, int(counts[index]))
    torch.testing.assert_close(table.weight.grad, expected)
    rows = table.weight.detach()[[1, 2, 3, 8]].square().sum(dim=1)
    assert loss.item() == pytest.approx(0.15 * float((rows / torch.tensor([2.0, 1.0, 7.0, 2.0])).sum()), rel=1e-6)


def test_over_an_epoch_of_single_ids_the_penalties_add_up_to_the_full_l2() -> None:
    torch.manual_seed(7)
    table = nn.Embedding(5, 3)
    stream = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4])
    penalty = MiniBatchAwareL2({"item": table}, {"item": occurrence_counts(stream, 5)}, weight=0.2)
    total = sum(penalty({"item": one}).item() for one in stream.split(1))
    assert total == pytest.approx(0.1 * float(table.weight.detach().square().sum()), rel=1e-5)


def test_sparse_tables_get_sparse_gradients_of_the_same_values() -> None:
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(8)
        table = nn.Embedding(9, 3, sparse=sparse)
        MiniBatchAwareL2({"item": table})({"item": torch.tensor([4, 4, 0])}).backward()
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse is sparse
        gradients.append(table.weight.grad.to_dense())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_stream_is_counted_as_it_comes() -> None:
    penalty = MiniBatchAwareL2({"a": nn.Embedding(4, 2), "b": nn.Embedding(3, 2)})
    penalty.observe({"a": torch.tensor([[0, 1], [1, -1]]), "b": [torch.tensor([2]), torch.tensor([2, 0])]})
    penalty.observe({"a": torch.tensor([1]), "b": torch.tensor([-1])})
    assert penalty.get_buffer("counts_a").tolist() == [1, 3, 0, 0]
    assert penalty.get_buffer("counts_b").tolist() == [1, 0, 2]
    assert occurrence_counts([torch.tensor([0, -1]), torch.tensor([[3, 0]])], 4).tolist() == [2, 0, 0, 1]


def test_an_impossible_penalty_is_refused() -> None:
    table = nn.Embedding(4, 2)
    for error, message, arguments in (
        (ValueError, "tables must not be empty", ({},)),
        (ValueError, "weight must not be negative", ({"a": table}, None, -1.0)),
        (ValueError, "counts must have the names of tables", ({"a": table}, {"b": torch.zeros(4).long()})),
        (ValueError, r"counts\['a'\] must have shape \(4,\), got \(3,\)", ({"a": table}, {"a": torch.zeros(3).long()})),
        (ValueError, "must not be negative, got -1", ({"a": table}, {"a": torch.tensor([0, -1, 2, 3])})),
        (TypeError, "must be an nn.Embedding, got Linear", ({"a": nn.Linear(2, 2)},)),
        (TypeError, "must be int64 or int32", ({"a": table}, {"a": torch.zeros(4)})),
    ):
        with pytest.raises(error, match=message):
            MiniBatchAwareL2(*arguments)  # type: ignore[arg-type]
