"""The MQAR task and the marking of recalled tokens."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from headgate.data.recall import IGNORED, RecallData, frequent_bigrams, mqar, query_distance, recall_mask

STREAMS = pytest.mark.parametrize("legacy", [False, True])


def draw(legacy: bool, **options: Any) -> RecallData:
    setting = {"vocab_size": 40, "num_examples": 300, "input_seq_len": 24, "num_kv_pairs": 4, "seed": 1}
    return mqar(**{**setting, **options}, legacy_rng=legacy)


@STREAMS
def test_every_row_shows_pairs_and_asks_for_each_once(legacy: bool) -> None:
    data = draw(legacy, random_non_queries=False)
    for tokens, labels in zip(data.inputs.tolist(), data.labels.tolist(), strict=True):
        keys, values = tokens[0:8:2], tokens[1:8:2]
        assert len(set(keys)) == 4
        assert len(set(values)) == 4
        assert all(1 <= key < 20 for key in keys)
        assert all(20 <= value < 40 for value in values)
        answers = dict(zip(keys, values, strict=True))
        asked = [place for place, token in enumerate(tokens[8:], start=8) if token]
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        assert all(place % 2 == 0 for place in asked)
        assert all(labels[place] == (answers[tokens[place]] if place in asked else IGNORED) for place in range(24))
    assert data.slices == {"num_kv_pairs": 4, "input_seq_len": 24}


@STREAMS
def test_fillers_change_nothing_but_the_zeros(legacy: bool) -> None:
    plain, filled = draw(legacy, random_non_queries=False), draw(legacy)
    kept = plain.inputs != 0
    assert torch.equal(filled.inputs[kept], plain.inputs[kept])
    assert torch.equal(filled.labels, plain.labels)
    fillers = filled.inputs[~kept]
    assert fillers.min() == 0
    assert fillers.max() == 39
    assert fillers.double().mean().item() == pytest.approx(19.5, abs=0.6)


@STREAMS
def test_one_seed_gives_one_data_set_and_leaves_global_random_state_alone(legacy: bool) -> None:
    numpy_before, torch_before = np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    first, second, other = draw(legacy), draw(legacy), draw(legacy, seed=2)
    assert torch.equal(first.inputs, second.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert np.random.get_state()[1].tobytes() == numpy_before  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_the_legacy_stream_is_numpys_global_one_drawn_row_by_row() -> None:
    data = draw(True, num_examples=5, filler_seed=9)
    before = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(1)  # noqa: NPY002
        keys = np.stack([np.random.choice(np.arange(1, 20), 4, replace=False) for _ in range(5)])  # noqa: NPY002
    finally:
        np.random.set_state(before)  # noqa: NPY002
    assert np.array_equal(data.inputs[:, 0:8:2].numpy(), keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        fillers = torch.randint(40, (5, 24))
    zeros = draw(True, num_examples=5, random_non_queries=False).inputs == 0
    assert torch.equal(data.inputs[zeros], fillers[zeros])


@STREAMS
@pytest.mark.parametrize("power_a", [0.01, 1.0])
def test_distances_follow_the_power_law(legacy: bool, power_a: float) -> None:
    # With one pair the place of the query is one draw from the stated weights.
    data = draw(legacy, num_kv_pairs=1, num_examples=4000, power_a=power_a, random_non_queries=False)
    gaps = (data.labels != IGNORED).long().argmax(1).sub(2).div(2, rounding_mode="floor")
    observed = torch.bincount(gaps, minlength=11).double() / 4000
    weights = torch.arange(1, 12, dtype=torch.float64) ** (power_a - 1)
    expected = weights / weights.sum()
    chi_squared = 4000 * ((observed - expected) ** 2 / expected).sum().item()
    assert chi_squared < 29.6  # 99.9% quantile at 10 degrees of freedom


def test_both_streams_draw_from_one_distribution() -> None:
    # Several pairs: how often a place is asked for depends on how draws without replacement follow each other.
    places = [(draw(legacy, num_examples=3000).labels != IGNORED).double().mean(0) for legacy in (False, True)]
    assert (places[0] - places[1]).abs().max().item() < 5 * (0.5 / 3000) ** 0.5


def test_keys_and_values_are_uniform_and_in_random_order() -> None:
    data = draw(False, num_examples=6000)
    for place in range(4):
        for offset, size, low in ((0, 19, 1), (1, 20, 20)):
            counts = torch.bincount(data.inputs[:, 2 * place + offset] - low, minlength=size).double()
            chi_squared = ((counts - 6000 / size) ** 2 / (6000 / size)).sum().item()
            assert chi_squared < 46  # 99.9% quantile at 19 degrees of freedom is 43.8, over eight tests


def test_a_generator_takes_the_place_of_the_seed() -> None:
    first = draw(False, generator=torch.Generator().manual_seed(3))
    again = draw(False, generator=torch.Generator().manual_seed(3), seed=99)
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, draw(False).inputs)


def test_as_many_pairs_as_fit() -> None:
    data = draw(False, input_seq_len=16, num_kv_pairs=4, vocab_size=18, random_non_queries=False)
    assert ((data.labels != IGNORED).sum(1) == 4).all()
    assert (data.inputs[:, 9::2] == 0).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"input_seq_len": 23}, "must be even"),
        ({"vocab_size": 24}, "vocab_size > input_seq_len"),
        ({"num_kv_pairs": 7}, r"4 \* num_kv_pairs <= input_seq_len"),
        ({"num_kv_pairs": 0}, "num_kv_pairs must be positive"),
        ({"power_a": 0.0}, "power_a must be positive"),
        ({"filler_seed": 3}, "needs legacy_rng=True"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_inequality(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        draw(False, **options)


def test_a_generator_and_the_legacy_stream_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        draw(True, generator=torch.Generator())


def test_more_pairs_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_kv_pairs < vocab_size // 2"):
        mqar(vocab_size=5, num_examples=1, input_seq_len=4, num_kv_pairs=2)


def test_the_distance_of_a_query_is_how_far_back_its_value_stands() -> None:
    inputs = torch.tensor([[2, 8, 4, 7, 0, 0, 4, 0, 2, 0]])
    labels = torch.full_like(inputs, IGNORED)
    labels[0, 6], labels[0, 8] = 7, 8
    data = RecallData(inputs, labels, {"num_kv_pairs": 2, "input_seq_len": 10})
    assert query_distance(data).tolist() == [[0, 0, 0, 0, 0, 0, 3, 0, 7, 0]]


def by_hand(tokens: list[int], frequent: set[tuple[int, int]], documents: list[int]) -> list[bool]:
    seen: set[tuple[int, int, int]] = set()
    marks = [False]
    for place in range(1, len(tokens)):
        bigram = (tokens[place - 1], tokens[place])
        within = documents[place - 1] == documents[place]
        marks.append(within and (documents[place], *bigram) in seen and bigram not in frequent)
        if within:
            seen.add((documents[place], *bigram))
    return marks


def test_a_recalled_token_ends_a_bigram_that_stood_there_before() -> None:
    tokens = torch.tensor([[5, 6, 5, 6, 6, 6, 5, 6]])
    #                       -  -  -  x  -  x  x  x
    assert recall_mask(tokens).tolist() == [[False, False, False, True, False, True, True, True]]
    assert recall_mask(tokens, torch.tensor([[5, 6]])).tolist() == [[False] * 5 + [True, True, False]]


@pytest.mark.parametrize("seed", range(4))
def test_recall_marks_equal_a_search_by_hand(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, (6, 40), generator=generator)
    documents = torch.randint(3, (6, 8), generator=generator).repeat_interleave(5, dim=1)
    frequent = torch.tensor([[0, 1], [2, 2], [4, 9]])
    expected = [
        by_hand(row, {(0, 1), (2, 2)}, ids) for row, ids in zip(tokens.tolist(), documents.tolist(), strict=True)
    ]
    assert recall_mask(tokens, frequent, documents).tolist() == expected
    assert recall_mask(tokens).tolist() == [by_hand(row, set(), [0] * 40) for row in tokens.tolist()]


def test_large_ids_do_not_collide() -> None:
    big = 2**40
    tokens = torch.tensor([[big, 1, big + 1, 1, big, 1]])
    assert recall_mask(tokens).tolist() == [[False] * 5 + [True]]


def test_recall_of_nothing() -> None:
    assert recall_mask(torch.zeros(2, 1, dtype=torch.int64)).tolist() == [[False], [False]]
    with pytest.raises(ValueError, match="at least 0"):
        recall_mask(torch.tensor([[1, -1, 2]]))
    with pytest.raises(ValueError, match="document_ids must have length=3"):
        recall_mask(torch.tensor([[1, 1, 2]]), document_ids=torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match="frequent must have"):
        recall_mask(torch.tensor([[1, 1, 2]]), torch.tensor([[1, 2, 3]]))
    with pytest.raises(TypeError, match="tokens"):
        recall_mask(torch.zeros(2, 4))


def test_frequent_bigrams_are_counted_within_rows() -> None:
    tokens = torch.randint(4, (50, 30), generator=torch.Generator().manual_seed(0))
    counts = Counter(pair for row in tokens.tolist() for pair in pairwise(row))
    expected = sorted(pair for pair, count in counts.items() if count >= 95)
    assert 0 < len(expected) < 16
    assert frequent_bigrams(tokens, 95).tolist() == [list(pair) for pair in expected]
    with pytest.raises(ValueError, match="min_count"):
        frequent_bigrams(tokens, 0)
