"""Overwrite-recall: what a query asks for, and how often things happen."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from headgate.data.overwrite_recall import OverwriteRecallData, label_overwrites, overwrite_recall
from headgate.data.recall import IGNORED


def by_dictionary(keys: list[int], values: list[int], num_values: int) -> list[tuple[int, int, int]]:
    """(target, age, writes) of every step, from a dictionary that is overwritten."""
    memory: dict[int, tuple[int, int]] = {}
    writes: dict[int, int] = {}
    found = []
    for step, (key, value) in enumerate(zip(keys, values, strict=True)):
        if value < num_values:
            memory[key] = (value, step)
            writes[key] = writes.get(key, 0) + 1
            found.append((IGNORED, 0, 0))
        elif key in memory:
            found.append((memory[key][0], step - memory[key][1], writes[key]))
        else:
            found.append((IGNORED, 0, 0))
    return found


def test_the_example_in_the_docstring_is_labelled_as_drawn() -> None:
    data = label_overwrites(
        torch.tensor([[2, 1, 2, 1, 2, 0, 2, 2, 1]]), torch.tensor([[7, 4, 9, 4, 5, 9, 3, 9, 9]]), num_values=9
    )
    assert data.targets.tolist() == [[-100, -100, 7, -100, -100, -100, -100, 3, 4]]
    assert data.ages.tolist() == [[0, 0, 2, 0, 0, 0, 0, 1, 5]]
    assert data.writes.tolist() == [[0, 0, 1, 0, 0, 0, 0, 3, 2]]


def test_a_query_before_any_write_has_no_target_even_where_the_key_is_written_later() -> None:
    data = label_overwrites(torch.tensor([[0, 0, 0]]), torch.tensor([[2, 1, 2]]), num_values=2)
    assert data.targets.tolist() == [[-100, -100, 1]]


def test_rows_know_nothing_of_each_other() -> None:
    data = label_overwrites(torch.tensor([[0, 0], [0, 0]]), torch.tensor([[1, 3], [3, 3]]), num_values=3)
    assert data.targets.tolist() == [[-100, 1], [-100, -100]]


def test_the_same_value_written_again_counts_as_a_write() -> None:
    data = label_overwrites(torch.tensor([[5, 5, 5]]), torch.tensor([[1, 1, 4]]), num_values=4)
    assert data.ages.tolist() == [[0, 0, 1]]
    assert data.writes.tolist() == [[0, 0, 2]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length": 192},
        {"length": 1},
        {"num_keys": 1},
        {"num_values": 1},
        {"query_share": 0.9},
        {"num_keys": 100, "length": 30},
    ],
)
def test_targets_ages_and_counts_equal_a_loop_over_a_dictionary(options: dict[str, Any]) -> None:
    data = overwrite_recall(40, **options, seed=3)
    num_values = options.get("num_values", 16)
    for row in range(40):
        expected = by_dictionary(data.keys[row].tolist(), data.values[row].tolist(), num_values)
        found = torch.stack((data.targets[row], data.ages[row], data.writes[row]), dim=1)
        assert [tuple(step) for step in found.tolist()] == expected


def test_steps_are_queries_with_the_given_probability_and_keys_and_values_are_uniform() -> None:
    data = overwrite_recall(400, 50, num_keys=5, num_values=7, query_share=0.3, seed=1)
    assert (data.values == 7).double().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 20_000) ** 0.5)
    for numbers, size in ((data.keys, 5), (data.values[data.values < 7], 7)):
        counts = torch.bincount(numbers.flatten(), minlength=size).double()
        expected = numbers.numel() / size
        assert ((counts - expected) ** 2 / expected).sum().item() < 22.5  # 99.9% quantile at 6 degrees of freedom


@pytest.mark.parametrize(("share", "queries"), [(0.0, 0), (1.0, 60)])
def test_writes_alone_and_queries_alone_leave_nothing_to_answer(share: float, queries: int) -> None:
    data = overwrite_recall(3, 20, query_share=share)
    assert int((data.values == 16).sum()) == queries
    assert (data.targets == IGNORED).all()


def test_one_seed_gives_the_same_bytes_on_every_machine() -> None:
    data = overwrite_recall(64, seed=5)
    whole = b"".join(part.numpy().astype("<i8").tobytes() for part in data)
    assert hashlib.sha256(whole).hexdigest() == "3f76a345ce7d8c15c5394ce9bc3cf93ac8854fb4ad99e1efcf7489e557b1585f"


def test_seeds_differ_a_generator_takes_their_place_and_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    first, other = overwrite_recall(4, seed=1), overwrite_recall(4, seed=2)
    drawn, again = (overwrite_recall(4, seed=seed, generator=torch.Generator().manual_seed(9)) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.keys, other.keys)
    assert equal(drawn, again)
    assert not equal(drawn, first)


def equal(one: OverwriteRecallData, other: OverwriteRecallData) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_examples": 0}, "num_examples must be positive, got num_examples=0"),
        ({"length": 0}, "length must be positive"),
        ({"num_keys": 0}, "num_keys must be positive"),
        ({"num_values": -1}, "num_values must be positive"),
        ({"query_share": 1.5}, r"query_share must lie in \[0, 1\], got query_share=1.5"),
        ({"query_share": float("nan")}, "query_share must lie"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        overwrite_recall(**{"num_examples": 2, **options})


@pytest.mark.parametrize(
    ("keys", "values", "error", "match"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(2, 4).long(), ValueError, "values must have length=3"),
        (torch.zeros(3).long(), torch.zeros(3).long(), ValueError, "keys must have shape"),
        (torch.zeros(0, 3).long(), torch.zeros(0, 3).long(), ValueError, "at least one step"),
        (torch.zeros(1, 3), torch.zeros(1, 3).long(), TypeError, "keys must be int64"),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3), TypeError, "values must be int64"),
        (torch.full((1, 3), -1), torch.zeros(1, 3).long(), ValueError, "keys must be at least 0, got -1"),
        (torch.zeros(1, 3).long(), torch.full((1, 3), 5), ValueError, "num_values], got 5 to 5, num_values=4"),
        (torch.zeros(1, 3).long(), torch.full((1, 3), -1), ValueError, "got -1 to -1"),
    ],
)
def test_bad_sequences_are_refused_by_name(
    keys: torch.Tensor, values: torch.Tensor, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        label_overwrites(keys, values, 4)


def test_int32_sequences_are_taken_and_come_back_as_int64() -> None:
    data = label_overwrites(torch.tensor([[0, 0]], dtype=torch.int32), torch.tensor([[1, 2]], dtype=torch.int32), 2)
    assert data.targets.tolist() == [[-100, 1]]
    assert all(part.dtype == torch.int64 for part in data)
