"""POPE, CHAIR and MME by hand."""

from __future__ import annotations

import pytest

from headgate.methods.steering.ritual import (
    COCO_OBJECTS,
    MME_HALLUCINATION,
    chair_scores,
    mentioned_objects,
    mme_answer,
    mme_scores,
    pope_answer,
    pope_scores,
)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes, there is a dog.", True),
        ("No.", False),
        ("no, none", False),
        ("There is not a dog", False),
        ("There isn't a dog.", False),
        ("NO", False),
        ("nothing here", True),
        ("Nobody knows", True),
        ("I cannot tell", True),
        ("", True),
    ],
)
def test_an_answer_is_no_only_with_a_negative_word(text: str, yes: bool) -> None:
    assert pope_answer(text) is yes


def test_pope_counts_yes_as_the_positive_class() -> None:
    scores = pope_scores(["yes", "Yes.", "yes", "no", "No, none"], ["yes", "yes", "no", "yes", "no"])
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 3)
    assert scores.f1 == pytest.approx(2 / 3)
    assert scores.yes_ratio == pytest.approx(3 / 5)
    never = pope_scores([False, False], [True, False])
    assert (never.accuracy, never.precision, never.recall, never.f1, never.yes_ratio) == (0.5, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="one positive length, got 1 and 2"):
        pope_scores(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="'yes' or 'no', got 'maybe'"):
        pope_scores(["yes"], ["maybe"])


def test_objects_are_found_by_synonyms_plurals_and_the_longest_phrase() -> None:
    caption = (
        "Two men and a woman's dog eat hot dogs near the traffic lights, with knives, wine glasses and a fire truck."
    )
    assert mentioned_objects(caption) == [
        "person", "person", "dog", "hot dog", "traffic light", "knife", "wine glass", "truck",
    ]  # fmt: skip
    assert mentioned_objects("Teddy bears, skis, buses, sheep and puppies on benches") == [
        "teddy bear", "skis", "bus", "sheep", "dog", "bench",
    ]  # fmt: skip
    assert mentioned_objects("The sky is blue.") == []


def test_chair_counts_sentences_mentions_and_recall() -> None:
    captions = ["A cat and a cat on a couch.", "A man with a dog.", "Nothing at all."]
    scores = chair_scores(captions, [{"cat"}, ["person", "dog", "car"], ["bird"]])
    assert scores.sentence == pytest.approx(1 / 3)
    assert scores.instance == pytest.approx(1 / 5)
    assert scores.recall == pytest.approx(3 / 5)
    own = chair_scores(["a red thing, a blob"], [["thing"]], {"thing": ("item",), "blob": ()})
    assert (own.sentence, own.instance, own.recall) == (1.0, 0.5, 1.0)
    with pytest.raises(ValueError, match="keys of synonyms, got unicorn"):
        chair_scores(["a"], [["unicorn"]])
    with pytest.raises(ValueError, match="one positive length"):
        chair_scores([], [])


def test_the_table_of_objects_is_cocos_and_no_word_means_two_things() -> None:
    assert len(COCO_OBJECTS) == 80
    words = [*COCO_OBJECTS, *(word for others in COCO_OBJECTS.values() for word in others)]
    assert len(words) == len(set(words))
    assert all(word == word.lower().strip() for word in words)
    for word in words:
        assert len(mentioned_objects(word)) == 1


def test_mme_gives_points_for_answers_and_for_pictures_with_both_right() -> None:
    assert [mme_answer(text) for text in ("Yes, it is", " no.", "Nope", "Perhaps", "I say yes", "Not")] == [
        "yes", "no", "no", "other", "other", "no",
    ]  # fmt: skip
    pairs = [
        [("Yes", "yes"), ("No", "no")],
        [("Yes", "yes"), ("Yes", "no")],
        [("Perhaps", "no"), ("No", "yes")],
        [("Yes", "Yes"), ("no", "No")],
    ]
    scores = mme_scores(pairs)
    assert scores.accuracy == pytest.approx(5 / 8)
    assert scores.accuracy_plus == pytest.approx(2 / 4)
    assert scores.score == pytest.approx(112.5)
    assert mme_scores([[("yes", "yes"), ("no", "no")]]).score == 200
    assert MME_HALLUCINATION == ("existence", "count", "position", "color")
    with pytest.raises(ValueError, match="two questions each"):
        mme_scores([[("yes", "yes")]])
