"""Adaptive classification: thresholds, answers, sizes used, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from headgate.methods.contrastive.matryoshka import MatryoshkaCascade, MatryoshkaHead

DIMS = (2, 4, 8)


def random_probabilities(items: int = 60, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three stages that know more and more of the label."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(classes, size=items)
    logits = draws.normal(size=(3, items, classes)) + np.array([0.7, 1.5, 3.0])[:, None, None] * np.eye(classes)[labels]
    probs = np.exp(logits)
    return probs / probs.sum(axis=2, keepdims=True), labels


def thresholds_by_hand(probs: np.ndarray, labels: np.ndarray) -> list[float]:
    chosen = []
    for stage in range(len(probs) - 1):
        best, best_accuracy = 0.0, -1.0
        for threshold in np.linspace(0.1, 1, 100):
            right = 0
            for item, label in enumerate(labels):
                used = stage if probs[stage, item].max() > threshold else stage + 1
                right += probs[used, item].argmax() == label
            if right / len(labels) > best_accuracy:
                best, best_accuracy = threshold, right / len(labels)
        chosen.append(best)
    return chosen


def answers_by_hand(probs: np.ndarray, thresholds: list[float], last: int) -> tuple[list[int], list[int]]:
    labels, sizes = [], []
    for item in range(probs.shape[1]):
        stage = 0
        while stage < last and not probs[stage, item].max() > thresholds[stage]:
            stage += 1
        labels.append(int(probs[stage, item].argmax()))
        sizes.append(DIMS[stage])
    return labels, sizes


@pytest.mark.parametrize("seed", range(4))
def test_thresholds_and_answers_are_those_of_the_definition(seed: int) -> None:
    probs, labels = random_probabilities(seed=seed)
    cascade = MatryoshkaCascade(DIMS).fit(probs[:, :30], labels[:30])
    by_hand = thresholds_by_hand(probs[:, :30], labels[:30])
    np.testing.assert_allclose(cascade.thresholds, by_hand)
    for last, max_dim in enumerate(DIMS):
        answer = cascade.predict(probs[:, 30:], max_dim)
        expected, sizes = answers_by_hand(probs[:, 30:], by_hand, last)
        assert answer.labels.tolist() == expected
        assert answer.used_dim.tolist() == sizes
    assert cascade.predict(probs).labels.tolist() == cascade.predict(probs, 8).labels.tolist()


def test_the_smallest_of_equally_good_thresholds_is_taken() -> None:
    # Size 2 is right about the first item (confidence 0.5) and wrong about the second (0.4), size 4 the other way
    # round: every threshold from 0.4 to just below 0.5 answers both.
    probs = np.array([[[0.5, 0.3, 0.2], [0.3, 0.3, 0.4]], [[0.1, 0.8, 0.1], [0.05, 0.9, 0.05]]])
    labels = np.array([0, 1])
    cascade = MatryoshkaCascade((2, 4), grid=(0.1, 0.3, 0.4, 0.45, 0.49, 0.5, 0.6)).fit(probs, labels)
    assert cascade.thresholds.tolist() == [0.4]
    assert cascade.predict(probs).labels.tolist() == [0, 1]
    assert cascade.predict(probs).used_dim.tolist() == [2, 4]


def test_expected_size_and_accuracy_of_each_cap_stand_on_the_curve() -> None:
    probs, labels = random_probabilities()
    cascade = MatryoshkaCascade(DIMS).fit(probs[:, :30], labels[:30])
    curve = cascade.curve(probs[:, 30:], labels[30:])
    assert curve.max_dim.tolist() == list(DIMS)
    assert curve.expected_dim[0] == 2
    assert curve.accuracy[0] == (probs[0, 30:].argmax(axis=1) == labels[30:]).mean()
    for point, max_dim in enumerate(DIMS):
        answer = cascade.predict(probs[:, 30:], max_dim)
        assert curve.expected_dim[point] == answer.used_dim.mean()
        assert curve.accuracy[point] == (answer.labels == labels[30:]).mean()
    assert (np.diff(curve.expected_dim) >= 0).all()


def test_tensors_and_arrays_give_the_same_answers() -> None:
    probs, labels = random_probabilities()
    with_arrays = MatryoshkaCascade(DIMS).fit(probs, labels)
    with_tensors = MatryoshkaCascade(DIMS).fit(torch.from_numpy(probs), torch.from_numpy(labels))
    assert with_tensors.thresholds.tolist() == with_arrays.thresholds.tolist()
    assert (
        with_tensors.predict(torch.from_numpy(probs)).used_dim.tolist() == with_arrays.predict(probs).used_dim.tolist()
    )


@pytest.mark.parametrize("tied", [False, True])
def test_classifying_step_by_step_gives_the_same_answers_from_fewer_rows(tied: bool) -> None:
    torch.manual_seed(0)
    head = MatryoshkaHead(DIMS, 4, tied=tied)
    z = torch.randn(80, 8) * 3
    probs = torch.stack([logits.double().softmax(dim=1) for logits in head(z)]).detach()
    labels = probs[2].argmax(dim=1)
    cascade = MatryoshkaCascade(DIMS).fit(probs, labels)
    rows: list[int] = []
    original = head.classifier

    def counted(size: int) -> nn.Linear:
        layer = original(size)
        layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        return layer

    head.classifier = counted  # type: ignore[method-assign]
    for max_dim in (None, 4):
        rows.clear()
        answer, expected = cascade.classify(head, z, max_dim), cascade.predict(probs, max_dim)
        assert answer.labels.tolist() == expected.labels.tolist()
        assert answer.used_dim.tolist() == expected.used_dim.tolist()
        assert rows == [int((expected.used_dim >= size).sum()) for size in DIMS if size <= (max_dim or 8)]
    assert rows[1] < 80


def fitted() -> MatryoshkaCascade:
    return MatryoshkaCascade(DIMS).fit(*random_probabilities())


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (random_probabilities()[0] * 0.9, random_probabilities()[1], "must sum to 1"),
        (random_probabilities()[0][:2], random_probabilities()[1], "size, item, class"),
        (random_probabilities()[0][:, :0], np.zeros(0, dtype=np.int64), "none of them 0"),
        (random_probabilities()[0], np.zeros(60, dtype=np.int64), "at least two classes"),
        (random_probabilities()[0], random_probabilities()[1] + 1, r"y must lie in \[0, 4\)"),
        (random_probabilities()[0], random_probabilities()[1][:50], "one entry per row"),
        (random_probabilities()[0] - 0.5, random_probabilities()[1], r"must lie in \[0, 1\]"),
        (np.full((3, 60, 4), np.nan), random_probabilities()[1], "NaN"),
    ],
)
def test_calibration_refuses(probs: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatryoshkaCascade(DIMS).fit(probs, labels)


def test_labels_that_are_no_integers_are_refused() -> None:
    probs, labels = random_probabilities()
    with pytest.raises(TypeError, match="y must hold integers"):
        MatryoshkaCascade(DIMS).fit(probs, labels.astype(np.float64))


def test_a_cascade_needs_two_sizes_and_a_calibration() -> None:
    probs, _ = random_probabilities()
    with pytest.raises(ValueError, match="at least two sizes"):
        MatryoshkaCascade((8,))
    with pytest.raises(RuntimeError, match="fit must be called"):
        MatryoshkaCascade(DIMS).predict(probs)
    with pytest.raises(ValueError, match=r"max_dim must be one of \[2, 4, 8\], got 3"):
        fitted().predict(probs, 3)


@pytest.mark.parametrize(
    ("head", "z", "message"),
    [
        (MatryoshkaHead((2, 8), 4), torch.zeros(2, 8), "head must have the dims"),
        (MatryoshkaHead(DIMS, 4), torch.full((2, 8), float("nan")), "z must be finite"),
    ],
)
def test_classifying_refuses(head: MatryoshkaHead, z: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted().classify(head, z)
