from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.evaluate import Split, dense_probe, linear_probe, mean_iou
from headgate.evaluate.probes_reference import mean_iou_reference


def scenes(images: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of 4 x 4 places whose features tell their class with noise."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, (images, 4, 4))
    centres = np.random.default_rng(7).normal(size=(3, 5)) * 2
    return centres[labels] + generator.normal(size=(images, 4, 4, 5)), labels


X, Y = scenes()
SPLIT = Split(np.arange(15), np.arange(15, 20), np.arange(20, 30))


def test_overlap_of_a_hand_made_segmentation() -> None:
    truth, found = np.array([[0, 0, 1], [1, 1, 2]]), np.array([[0, 1, 1], [1, 0, 2]])
    result = mean_iou(truth, found)
    assert result.per_class == {0: 1 / 3, 1: 0.5, 2: 1.0}
    assert result.mean_iou == pytest.approx((1 / 3 + 0.5 + 1) / 3)
    assert result.pixel_accuracy == pytest.approx(4 / 6)


def test_a_class_in_neither_truth_nor_prediction_is_skipped_and_one_in_either_counts() -> None:
    assert mean_iou(np.array([0, 5]), np.array([0, 5])).mean_iou == 1.0
    assert mean_iou(np.array([0, 5]), np.array([0, 0])).per_class == {0: 0.5, 5: 0.0}
    assert mean_iou(np.array([0, 0]), np.array([0, 9])).per_class == {0: 0.5, 9: 0.0}


def test_ignored_pixels_count_for_nothing() -> None:
    result = mean_iou(torch.tensor([0, 1, 255, 255]), torch.tensor([0, 1, 2, 0]), ignore=255)
    assert result.per_class == {0: 1.0, 1: 1.0}
    assert result.pixel_accuracy == 1.0


@settings(max_examples=80, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_overlap_equals_its_definition(pairs: list[tuple[int, int]]) -> None:
    truth, found = zip(*pairs, strict=True)
    assert mean_iou(np.array(truth), np.array(found)).mean_iou == pytest.approx(mean_iou_reference(truth, found))


@pytest.mark.parametrize(
    ("truth", "found", "error", "match"),
    [
        (np.zeros(2), np.zeros(2, int), TypeError, "must hold integers"),
        (np.zeros(2, int), np.zeros(3, int), ValueError, "must have one shape"),
        (np.full(2, 255), np.zeros(2, int), ValueError, "at least one pixel"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(
    truth: np.ndarray, found: np.ndarray, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        mean_iou(truth, found, ignore=255)


def test_the_dense_probe_is_the_linear_probe_of_single_places() -> None:
    result = dense_probe(X, Y, SPLIT, C=(0.1,))
    flat = Split(np.arange(15 * 16), np.zeros(0, int), np.arange(20 * 16, 30 * 16))
    linear = linear_probe(X.reshape(-1, 5), Y.ravel(), flat, C=0.1)
    assert result.predictions.shape == (10, 4, 4)
    assert (result.predictions.ravel() == linear.predictions).all()
    assert result.pixel_accuracy == linear.accuracy
    assert result.mean_iou == mean_iou(Y[20:], result.predictions).mean_iou
    assert result.converged
    patches = dense_probe(torch.from_numpy(X.reshape(30, 16, 5)), torch.from_numpy(Y.reshape(30, 16)), SPLIT, C=(0.1,))
    assert (patches.predictions.reshape(10, 4, 4) == result.predictions).all()


def test_the_regularisation_is_chosen_by_overlap_on_the_validation_images() -> None:
    result = dense_probe(X, Y, SPLIT, C=(1e-7, 1.0))
    on_validation = Split(SPLIT.train, np.zeros(0, int), SPLIT.val)
    overlaps = {C: dense_probe(X, Y, on_validation, C=(C,)).mean_iou for C in (1e-7, 1.0)}
    assert max(overlaps, key=overlaps.__getitem__) == result.C == 1.0


def test_ignored_places_are_neither_fitted_nor_scored() -> None:
    labels = Y.copy()
    labels[:, 0] = 255
    result = dense_probe(X, labels, SPLIT, C=(1.0,), ignore=255)
    assert 255 not in result.predictions
    assert 255 not in result.per_class
    poisoned = X.copy()
    poisoned[:20, 0] = 1e3
    again = dense_probe(poisoned, labels, SPLIT, C=(1.0,), ignore=255)
    assert (again.predictions == result.predictions).all()


def test_training_places_are_drawn_by_the_seed_where_there_are_many() -> None:
    first, again, other = (dense_probe(X, Y, SPLIT, C=(1.0,), max_pixels=40, seed=seed) for seed in (0, 0, 1))
    assert (first.predictions == again.predictions).all()
    assert (first.predictions != other.predictions).any()
    assert first.mean_iou > 0.5


def test_random_features_give_the_overlap_of_chance() -> None:
    noise = np.random.default_rng(1).normal(size=(60, 16, 5))
    labels = np.random.default_rng(2).integers(0, 3, (60, 16))
    result = dense_probe(noise, labels, Split(np.arange(30), np.zeros(0, int), np.arange(30, 60)), C=(1.0,))
    assert abs(result.pixel_accuracy - 1 / 3) < 3 * np.sqrt(2 / 9 / 480)
    assert result.mean_iou < 0.25


def test_a_class_that_training_never_saw_is_an_error() -> None:
    labels = Y.copy()
    labels[25, 0, 0] = 8
    with pytest.warns(UserWarning, match=r"\[8\] are absent from train"):
        result = dense_probe(X, labels, SPLIT, C=(1.0,))
    assert result.absent == (8,)
    assert result.per_class[8] == 0.0


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"X": X[:, 0, 0]}, ValueError, r"X must have shape \(n, ..., dim\)"),
        ({"y": Y[:, :3]}, ValueError, "y must have one label per place"),
        ({"y": Y * 1.0}, TypeError, "y must hold integers"),
        ({"y": np.zeros_like(Y)}, ValueError, "at least two classes"),
        ({"X": np.full_like(X, np.inf)}, ValueError, "X must be finite, got infinite value in row 0"),
        ({"C": ()}, ValueError, "C must be positive"),
        (
            {"split": Split(np.arange(15), np.zeros(0, int), np.array([20])), "C": (1.0, 2.0)},
            ValueError,
            "validation images",
        ),
        ({"max_pixels": 0}, ValueError, "max_pixels must be at least 1"),
    ],
)
def test_bad_arguments_are_named(changes: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        dense_probe(**{"X": X, "y": Y, "split": SPLIT, "C": (1.0,), **changes})
