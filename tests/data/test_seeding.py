"""Seeds, streams and portable normal numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from headgate.data.seeding import (
    hashed_normal,
    portable_normal,
    splitmix64,
    splitmix64_array,
    splitmix64_fold,
    stream_generator,
)


def test_splitmix64_of_one_integer_is_the_published_generator() -> None:
    # First outputs of the reference implementation with state 0, and its second output (the state after one addition).
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


def test_splitmix64_depends_on_every_value_and_on_their_order() -> None:
    hashes = {splitmix64(*values) for values in [(1,), (1, 0), (0, 1), (1, 2), (2, 1), (1, 2, 3), (1, 3, 2), (-1, 2)]}
    assert len(hashes) == 8


def test_splitmix64_counts_negative_integers_modulo_2_to_the_64() -> None:
    assert splitmix64(-1) == splitmix64(2**64 - 1)


def test_splitmix64_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one integer"):
        splitmix64()


@pytest.mark.parametrize("prefix", [(), (7,), (7, -3)])
def test_splitmix64_array_equals_the_scalar_hash(prefix: tuple[int, ...]) -> None:
    values = torch.tensor([[0, 1, 2], [-5, 2**40, 2**63 - 1]])
    expected = [[splitmix64(*prefix, int(value)) for value in row] for row in values]
    assert splitmix64_array(values, *prefix).tolist() == expected
    assert splitmix64_array(values.numpy(), *prefix).tolist() == expected


def test_splitmix64_array_leaves_its_input_alone() -> None:
    values = np.arange(4, dtype=np.uint64)
    splitmix64_array(values, 1)
    assert values.tolist() == [0, 1, 2, 3]


def test_splitmix64_array_is_uniform_modulo_ten() -> None:
    counts = np.bincount((splitmix64_array(torch.arange(100_000), 3) % np.uint64(10)).astype(np.int64), minlength=10)
    assert abs(counts - 10_000).max() < 400  # over 4 standard deviations of 95


def test_streams_repeat_for_the_same_numbers_and_differ_otherwise() -> None:
    def draw(*numbers: int | str) -> tuple[int, ...]:
        return tuple(torch.randint(2**62, (4,), generator=stream_generator(*numbers)).tolist())  # type: ignore[arg-type]

    names: list[tuple[int | str, ...]] = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, "train", 0), (0, "test", 0)]
    draws = [draw(*numbers) for numbers in names]
    assert len(set(draws)) == len(names)
    assert draws == [draw(*numbers) for numbers in names]


def test_streams_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    portable_normal((5,), stream_generator(3))
    assert torch.equal(before, torch.random.get_rng_state())


def test_portable_normal_has_the_moments_and_tails_of_a_normal() -> None:
    draws = portable_normal((200_000,), stream_generator(0)).double()
    assert abs(float(draws.mean())) < 0.01
    assert abs(float(draws.var()) - 1) < 0.015
    assert abs(float((draws**4).mean()) - 3) < 0.1
    assert abs(float((draws.abs() > 1.959964).double().mean()) - 0.05) < 0.002


def test_portable_normal_is_the_same_bits_everywhere() -> None:
    draws = portable_normal((1000,), stream_generator(0))
    digest = hashlib.sha256(draws.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "261a8bd9c3d7e63e329f3e4f9d8be7eeda74410e5efda84adcc19e597f2707f9"


def test_splitmix64_fold_continues_the_scalar_hash() -> None:
    rows, columns = torch.tensor([[3], [-1]]), torch.tensor([[0, 9, 2**50]])
    folded = splitmix64_fold(splitmix64_array(rows, 5), columns)
    assert folded.tolist() == [[splitmix64(5, int(row), int(column)) for column in columns[0]] for row in rows]


def test_hashed_normal_gives_a_key_the_same_numbers_in_any_company() -> None:
    together = hashed_normal(torch.tensor([4, 9, 4, 11]), 500)
    assert torch.equal(together[1], hashed_normal(torch.tensor([9]), 500)[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together[:, :100], hashed_normal(torch.tensor([4, 9, 4, 11]), 100))


def test_hashed_normal_is_standard_normal_and_uncorrelated_between_keys() -> None:
    draws = hashed_normal(torch.arange(400), 1000).double()
    assert abs(float(draws.mean())) < 0.01
    assert abs(float(draws.var()) - 1) < 0.01
    assert float(torch.corrcoef(draws[:30]).fill_diagonal_(0).abs().max()) < 0.2
