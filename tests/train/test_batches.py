from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from headgate.errors import DataError
from headgate.train import epoch_batches, seeded
from headgate.train.batches import BatchStream, batch_stream
from tests.train.runs import NoisyPoints


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def numbers_of(batches: list[tuple[torch.Tensor, ...]]) -> list[int]:
    return [int(number) for (batch,) in batches for number in batch]


def test_every_epoch_holds_every_entry_once_in_another_order() -> None:
    batches = epoch_batches(torch.arange(12), batch_size=4, seed=0)
    assert batches.steps_per_epoch == 3
    first = numbers_of([batches(step) for step in range(3)])
    second = numbers_of([batches(step) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second != list(range(12))


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    forward, backward = (epoch_batches(torch.arange(12), 5, seed=1) for _ in range(2))
    expected = {step: forward(step)[0].tolist() for step in range(8)}
    assert {step: backward(step)[0].tolist() for step in reversed(range(8))} == expected
    other = epoch_batches(torch.arange(12), 5, seed=2)
    assert [other(step)[0].tolist() for step in range(8)] != list(expected.values())


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_batches(torch.arange(8), 8, seed=0)(0)[0].tolist() == [4, 2, 6, 7, 5, 3, 1, 0]


def test_drop_last_decides_on_the_rest() -> None:
    assert epoch_batches(torch.arange(10), 4, seed=0).steps_per_epoch == 2
    kept = epoch_batches(torch.arange(10), 4, seed=0, drop_last=False)
    assert [len(kept(step)[0]) for step in range(4)] == [4, 4, 2, 4]


def test_tensors_are_cut_along_together() -> None:
    batches = epoch_batches([torch.arange(9), torch.arange(9) * 10], 3, seed=4)
    left, right = batches(5)
    assert (left * 10).tolist() == right.tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 1, 0), ValueError, "must not be empty"),
        (([torch.zeros(3), torch.zeros(4)], 1, 0), ValueError, r"same first size, got \[3, 4\]"),
        ((torch.zeros(3), 4, 0), ValueError, "fill one batch"),
        ((torch.zeros(0), 1, 0), ValueError, "fill one batch"),
        ((torch.zeros(3), 0, 0), ValueError, "batch_size"),
        (([[1, 2]], 1, 0), TypeError, "must be tensors"),
        ((torch.zeros(3), 1.5, 0), TypeError, "batch_size must be an integer, got float"),
    ],
)
def test_bad_tensors_are_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        epoch_batches(*arguments)


def test_processes_share_a_function_a_list_and_a_loader_in_the_same_way() -> None:
    def rows(batches: object, process: int) -> list[int]:
        stream = batch_stream(batches, process, 2)  # type: ignore[arg-type]
        return [int(stream(index)) for index in range(6)]

    for process, expected in ((0, [0, 2, 4, 1, 3, 0]), (1, [1, 3, 0, 2, 4, 1])):
        assert rows(lambda index: index % 5, process) == expected
        assert rows(list(range(5)), process) == expected
        assert rows(DataLoader(Numbers(5), batch_size=1), process) == expected


def test_a_loader_that_gives_each_process_its_share_is_read_whole_and_told_the_epoch() -> None:
    seen: list[list[int]] = []
    for process in range(2):
        sampler = DistributedSampler(Numbers(8), 2, process, shuffle=True, seed=0)
        stream = batch_stream(DataLoader(Numbers(8), batch_size=2, sampler=sampler), process, 2)
        seen.append([int(number) for index in range(4) for number in stream(index)])
    first, second = [left[:4] + right[:4] for left, right in [seen]], [left[4:] + right[4:] for left, right in [seen]]
    assert sorted(first[0]) == sorted(second[0]) == list(range(8))
    assert first != second  # set_epoch was called, so the second epoch is shuffled anew


def test_a_loader_that_each_process_would_shuffle_by_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="DistributedSampler"):
        batch_stream(DataLoader(Numbers(8), shuffle=True), 0, 2)


def test_a_batch_sampler_over_a_shuffling_sampler_is_refused_too() -> None:
    shuffling = BatchSampler(RandomSampler(Numbers(8)), batch_size=2, drop_last=False)
    with pytest.raises(ValueError, match="DataLoader with a RandomSampler"):
        batch_stream(DataLoader(Numbers(8), batch_sampler=shuffling), 0, 2)
    ordered = BatchSampler(SequentialSampler(Numbers(8)), batch_size=2, drop_last=False)
    assert batch_stream(DataLoader(Numbers(8), batch_sampler=ordered), 1, 2)(0).tolist() == [2, 3]


def test_a_position_among_other_batches_is_refused() -> None:
    def stream_of(*numbers: int, generator: torch.Generator | None = None) -> BatchStream:
        return batch_stream(DataLoader(Numbers(len(numbers)), batch_size=1, shuffle=True, generator=generator))

    by_step, whole = batch_stream([1, 2]), stream_of(0, 1, 2, 3)
    assert [len(whole(index)) for index in range(3)] == [1, 1, 1]
    with seeded():
        with pytest.raises(DataError, match="iterated over its batches, this run names each step"):
            by_step.move_to(whole.position())
        with pytest.raises(DataError, match="batches that name their step, this run iterates over them"):
            whole.move_to(by_step.position())
        with pytest.raises(DataError, match="behind batch 3 of an epoch, this run's epochs are shorter"):
            stream_of(0, 1).move_to(whole.position())
        with pytest.raises(DataError, match="holds 0 generators of the batches' own, this run has 1"):
            stream_of(0, 1, 2, 3, generator=torch.Generator()).move_to(whole.position())


def test_set_epoch_is_called_on_the_batches_themselves() -> None:
    class Epochs:
        def __init__(self) -> None:
            self.epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[tuple[int, int]]:
            return iter([(self.epoch, 0), (self.epoch, 1)])

    stream = batch_stream(Epochs())
    assert [stream(index) for index in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("over", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_loader_goes_on_exactly_from_its_position(over: int, own_generator: bool) -> None:
    def loader() -> DataLoader[int]:
        generator = torch.Generator().manual_seed(6) if own_generator else None
        return DataLoader(Numbers(8), batch_size=2, shuffle=True, generator=generator)

    with seeded(1):
        stream = batch_stream(loader())
        before = [stream(index).tolist() for index in range(over)]
        position = json.loads(json.dumps(stream.position()))
        state = torch.get_rng_state()
        after = [stream(index).tolist() for index in range(over, 12)]
    assert len(before) == over
    with seeded(99):
        stream = batch_stream(loader())
        stream.move_to(position)
        torch.set_rng_state(state)
        assert [stream(index).tolist() for index in range(over, 12)] == after


def test_a_loader_with_workers_goes_on_with_the_same_augmentation() -> None:
    def loader() -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        return DataLoader(NoisyPoints(), batch_size=8, shuffle=True, num_workers=1)

    with seeded(1):
        stream = batch_stream(loader())
        for index in range(7):
            stream(index)
        position = json.loads(json.dumps(stream.position()))
        state = torch.get_rng_state()
        after = [stream(index)[0] for index in range(7, 12)]
    with seeded(99):
        stream = batch_stream(loader())
        stream.move_to(position)
        torch.set_rng_state(state)
        for index, expected in zip(range(7, 12), after, strict=True):
            assert torch.equal(stream(index)[0], expected)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "must not be empty"),
        (DataLoader(Numbers(3), batch_size=4, drop_last=True), ValueError, "must not be empty"),
        (iter([1, 2]), TypeError, "iterated again"),
        (3, TypeError, "callable"),
        (Numbers(3), TypeError, "got Numbers"),
    ],
)
def test_what_cannot_be_read_again_and_again_is_refused(batches: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_stream(batches)  # type: ignore[arg-type]


def test_an_iterable_that_turns_out_empty_is_refused_when_it_is_read() -> None:
    class Nothing:
        def __iter__(self) -> Iterator[int]:
            return iter(())

    stream = batch_stream(Nothing())
    with pytest.raises(ValueError, match="epoch 0 of the Nothing was"):
        stream(0)
