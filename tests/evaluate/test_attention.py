from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headgate.evaluate.attention import attention_distance, attention_entropy, attention_nmi
from headgate.evaluate.attention_reference import (
    attention_distance_reference,
    attention_entropy_reference,
    attention_nmi_reference,
)


def maps(seed: int = 0, images: int = 5, heads: int = 3, tokens: int = 12, sharpness: float = 2.0) -> np.ndarray:
    logits = sharpness * np.random.default_rng(seed).standard_normal((images, heads, tokens, tokens))
    weights = np.exp(logits)
    return weights / weights.sum(axis=-1, keepdims=True)


def over_images(reference: Any, attention: np.ndarray, *arguments: Any) -> np.ndarray:
    return np.array([[reference(head, *arguments) for head in image] for image in attention]).mean(axis=0)


def test_diagnostics_equal_their_definitions() -> None:
    attention = maps()
    attention[0, 0] = np.eye(12)[::-1]  # exact zeros
    distance = over_images(attention_distance_reference, attention, (3, 4))
    assert attention_distance(attention, (3, 4)) == pytest.approx(distance)
    assert attention_nmi(attention) == pytest.approx(over_images(attention_nmi_reference, attention))
    assert attention_entropy(attention) == pytest.approx(over_images(attention_entropy_reference, attention))


def test_distance_of_a_hand_computed_case() -> None:
    # two rows of one column: query 0 stays, query 1 sends half one patch up
    attention = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    assert attention_distance(attention, (2, 1)) == pytest.approx([0.25])
    assert attention_distance(attention, (2, 1), patch_size=16) == pytest.approx([4.0])
    diagonal = np.zeros((1, 4, 4))
    diagonal[0, :, 3] = 1  # all patches of a 2 × 2 grid look at the last one
    assert attention_distance(diagonal, (2, 2)) == pytest.approx([(np.sqrt(2) + 1 + 1 + 0) / 4])


def test_grid_is_read_row_by_row() -> None:
    attention = np.zeros((1, 6, 6))
    attention[0, np.arange(6), [3, 4, 5, 0, 1, 2]] = 1
    assert attention_distance(attention, (2, 3)) == pytest.approx([1.0])
    assert attention_distance(attention, (3, 2))[0] > 1.2


def test_local_heads_are_near_and_uniform_heads_are_at_the_value_of_uniform_attention() -> None:
    tokens = np.arange(16)
    positions = np.stack(np.divmod(tokens, 4), axis=1)
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    both = np.stack([np.eye(16), np.full((16, 16), 1 / 16)])
    assert attention_distance(both, (4, 4)) == pytest.approx([0.0, distances.mean()])


def test_prefix_tokens_have_no_position_and_are_left_out() -> None:
    patches = maps(1, tokens=4)
    with_class = np.zeros((5, 3, 5, 5))
    with_class[..., 0, 0] = 1.0  # the class token attends to itself
    with_class[..., 1:, 0] = 0.3
    with_class[..., 1:, 1:] = 0.7 * patches
    found = attention_distance(with_class, (2, 2), prefix_tokens=1)
    assert found == pytest.approx(attention_distance(patches, (2, 2)))


def test_patches_that_see_prefix_tokens_alone_are_left_out_of_the_mean() -> None:
    attention = np.zeros((1, 2, 3, 3))
    attention[0, :, 0, 0] = 1
    attention[0, 0, 1:, 0] = 1  # head 0: all mass on the class token
    attention[0, 1, 1, 0] = 1
    attention[0, 1, 2, 1] = 1
    with pytest.warns(RuntimeWarning, match="all patches of head 0 attend to prefix tokens alone"):
        found = attention_distance(attention, (1, 2), prefix_tokens=1)
    assert np.isnan(found[0])
    assert found[1] == 1.0


def test_nmi_limits() -> None:
    permutation = np.eye(7)[np.random.default_rng(0).permutation(7)]
    same_row = np.tile(maps(2, tokens=7)[0, 0, :1], (7, 1))
    one_key = np.zeros((7, 7))
    one_key[:, 3] = 1
    heads = np.stack([permutation, np.full((7, 7), 1 / 7), same_row, one_key])
    assert attention_nmi(heads) == pytest.approx([1.0, 0.0, 0.0, 0.0], abs=1e-12)
    assert attention_nmi(np.ones((2, 1, 1))).tolist() == [0.0, 0.0]


def test_nmi_of_a_hand_computed_case() -> None:
    # A = [[1, 0], [½, ½]]: p(k) = ¾, ¼; I = ½ log(4/3) + ¼ log(2/3) + ¼ log 2
    information = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    key_entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    attention = np.array([[[1.0, 0.0], [0.5, 0.5]]])
    assert attention_nmi(attention) == pytest.approx([information / np.sqrt(np.log(2) * key_entropy)])


def test_entropy_limits() -> None:
    heads = np.stack([np.eye(9), np.full((9, 9), 1 / 9)])
    assert attention_entropy(heads) == pytest.approx([0.0, np.log(9)])


@pytest.mark.parametrize("measure", [attention_nmi, attention_entropy])
def test_order_of_patches_does_not_matter_where_positions_do_not(measure: Any) -> None:
    attention = maps(3)
    order = np.random.default_rng(1).permutation(12)
    assert measure(attention[..., order, :][..., order]) == pytest.approx(measure(attention))


def test_distance_is_unchanged_by_turning_the_grid() -> None:
    attention = maps(4)
    turned = np.arange(12).reshape(3, 4).T.reshape(-1)
    expected = attention_distance(attention, (3, 4))
    assert attention_distance(attention[..., turned, :][..., turned], (4, 3)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "measure", [lambda a, **o: attention_distance(a, (3, 4), **o), attention_nmi, attention_entropy]
)
def test_images_are_averaged_whatever_the_chunk_the_order_and_the_leading_axes(measure: Any) -> None:
    attention = maps(5, images=6)
    base = measure(attention)
    assert base.shape == (3,)
    for chunk in (1, 4, 6):
        assert measure(attention, chunk=chunk) == pytest.approx(base, rel=1e-12)
    assert measure(attention[::-1]) == pytest.approx(base)
    assert measure(attention.reshape(2, 3, 3, 12, 12)) == pytest.approx(base)
    assert np.mean([measure(image) for image in attention], axis=0) == pytest.approx(base)
    assert measure(torch.from_numpy(attention).requires_grad_()) == pytest.approx(base)


def test_half_precision_attention_is_renormalised() -> None:
    attention = torch.from_numpy(maps(6)).bfloat16()
    exact = attention_entropy(maps(6))
    assert attention_entropy(attention) == pytest.approx(exact, rel=0.01)
    assert attention_nmi(torch.full((1, 2, 50, 50), 1 / 50, dtype=torch.bfloat16)) == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize(
    "measure", [lambda a, **o: attention_distance(a, (3, 4), **o), attention_nmi, attention_entropy]
)
def test_diagnostics_refuse_what_is_no_attention(measure: Any) -> None:
    attention = maps(7)
    with pytest.raises(ValueError, match="attention must sum to 1 over keys, got a row with sum 2"):
        measure(2 * attention)
    negative = attention.copy()
    negative[0, 0, 0, :2] += [-1, 1]
    with pytest.raises(ValueError, match="attention must not be negative"):
        measure(negative)
    broken = attention.copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="attention must be finite, got NaN in row 3"):
        measure(broken, chunk=2)
    with pytest.raises(TypeError, match="attention must be floating point, got int64"):
        measure(np.ones((1, 12, 12), dtype=np.int64))
    with pytest.raises(TypeError, match="attention must be a NumPy array or a torch tensor"):
        measure("attention")
    with pytest.raises(ValueError, match="attention must have shape"):
        measure(attention[0, 0])
    with pytest.raises(ValueError, match="attention must have shape"):
        measure(attention[:0])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        measure(attention, chunk=0)


def test_distance_refuses_a_grid_that_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"\(…, heads, 13, 13\) for grid=\(3, 4\) and prefix_tokens=1, got \(5, 3, 12, 12\)"
    ):
        attention_distance(maps(), (3, 4), prefix_tokens=1)
    with pytest.raises(ValueError, match="grid must be at least 1"):
        attention_distance(maps(), (0, 4))
    with pytest.raises(ValueError, match="patch_size must be positive"):
        attention_distance(maps(), (3, 4), patch_size=0)
