from __future__ import annotations

import numpy as np
import pytest
import torch

from headgate.evaluate import cross_modal_recall, zero_shot_accuracy, zero_shot_classifier


def angles(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_an_image_hits_with_any_of_its_captions_and_a_caption_with_its_one_image() -> None:
    images = angles(0, 90)
    # Image 0 has captions at 80 and 10 degrees, image 1 one at 20 degrees.
    texts, owner = angles(80, 10, 20), np.array([0, 0, 1])
    recall = cross_modal_recall(images, texts, owner, ks=(1, 2))
    # From 0 degrees: 10 (own). From 90: 80, 20 (own).
    assert recall.image_to_text == {1: 0.5, 2: 1.0}
    # 80 finds image 1 first, 10 finds image 0, 20 finds image 0 first.
    assert recall.text_to_image == {1: pytest.approx(1 / 3), 2: 1.0}
    assert recall.mean == pytest.approx((0.5 + 1 + 1 / 3 + 1) / 4)
    assert recall.dropped == 0


def test_an_image_without_a_caption_is_a_candidate_and_no_query() -> None:
    recall = cross_modal_recall(angles(0, 90, 45), angles(40, 91), np.array([0, 1]), ks=(1,))
    assert recall.dropped == 1
    assert recall.image_to_text == {1: 1.0}
    assert recall.text_to_image == {1: 0.5}


def test_recall_does_not_depend_on_order_chunk_scale_or_rotation() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(20, 6))
    owner = generator.integers(0, 20, 50)
    texts = images[owner] + generator.normal(size=(50, 6))
    expected = cross_modal_recall(images, texts, owner)
    order = generator.permutation(50)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    assert cross_modal_recall(images, texts[order], owner[order], chunk=7) == expected
    assert cross_modal_recall(torch.from_numpy(3 * images @ rotation), texts @ rotation, owner) == expected


def test_random_embeddings_are_recalled_by_chance() -> None:
    generator = np.random.default_rng(1)
    recall = cross_modal_recall(
        generator.normal(size=(500, 32)), generator.normal(size=(500, 32)), np.arange(500), ks=(50,)
    )
    error = np.sqrt(0.1 * 0.9 / 500)
    assert abs(recall.image_to_text[50] - 0.1) < 3 * error
    assert abs(recall.text_to_image[50] - 0.1) < 3 * error


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_of_text": np.array([0, 2])}, r"rows of images in \[0, 1\], got 0 to 2"),
        ({"image_of_text": np.array([0])}, "expected 2, got 1"),
        ({"ks": (3,)}, r"ks must be in \[1, 2\], got 3"),
        ({"ks": ()}, "ks must hold at least one cut"),
        ({"texts": np.ones((2, 3))}, "same dim"),
        ({"texts": np.zeros((2, 2))}, "zero vector"),
    ],
)
def test_bad_pairs_are_refused(changes: dict, match: str) -> None:
    arguments = {"images": angles(0, 90), "texts": angles(0, 90), "image_of_text": np.array([0, 1]), "ks": (1,)}
    with pytest.raises(ValueError, match=match):
        cross_modal_recall(**{**arguments, **changes})


def test_a_class_vector_is_the_unit_mean_of_unit_prompts() -> None:
    prompts = np.array([[[10.0, 0.0], [0.0, 0.1]], [[1.0, 0.0], [1.0, 0.0]]])
    half = 0.5**0.5
    np.testing.assert_allclose(zero_shot_classifier(prompts), [[half, half], [1, 0]])
    ragged = zero_shot_classifier([torch.tensor([[10.0, 0.0], [0.0, 0.1]]), np.array([[5.0, 0.0]])])
    np.testing.assert_allclose(ragged, [[half, half], [1, 0]], rtol=1e-6)


def test_zero_shot_accuracy_counts_the_nearest_class_and_gives_ties_to_the_smallest() -> None:
    prompts = angles(0, 90)[:, None]
    images = angles(10, 80, 44, 46, 45)
    assert zero_shot_accuracy(images, prompts, np.array([0, 1, 0, 1, 0])) == 1.0
    assert zero_shot_accuracy(images, prompts, np.array([1, 1, 0, 0, 0]), chunk=2) == pytest.approx(3 / 5)
    tied = np.array([[1.0, 1.0]])
    assert zero_shot_accuracy(tied, np.eye(2)[:, None], np.array([0])) == 1.0


def test_prompts_that_cancel_or_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="mean of class_prompts must hold no zero vector for the cosine, got one in row 1"
    ):
        zero_shot_classifier(np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]))
    with pytest.raises(ValueError, match=r"class_prompts\[1\] must have dim=2 like the classes before it, got 3"):
        zero_shot_classifier([np.ones((1, 2)), np.ones((1, 3))])
    with pytest.raises(ValueError, match=r"class_prompts\[0\] must be finite, got NaN in row 1"):
        zero_shot_classifier(np.array([[[1.0], [np.nan]]]))
    with pytest.raises(ValueError, match="shape"):
        zero_shot_classifier(np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least one class"):
        zero_shot_classifier([])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\] for 2 classes"):
        zero_shot_accuracy(np.ones((1, 2)), np.ones((2, 1, 2)), np.array([2]))
