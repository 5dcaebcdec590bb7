"""Where batches come from: a function of the step, or anything that can be iterated again and again.

Steps of data are counted over the whole run, epochs included. A function of the step (random access) can be entered
anywhere, so resuming costs nothing. An iterable is read in order; its position is the epoch, how many batches of it are
over, and the random state with which the epoch began: resuming begins that epoch again and skips to the position, so a
shuffling ``DataLoader`` and random augmentation come back exactly. Persistent workers carry random states of their own from
epoch to epoch: with them the order comes back, and what they draw for augmentation does not.

With several processes, process r of P takes the batches r, r + P, r + 2P, …
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, Protocol

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from headgate.data.seeding import stream_generator
from headgate.errors import DataError
from headgate.train.seeds import RandomState, decode_bytes, encode_bytes, random_state, set_random_state
from headgate.validate import check_positive

__all__ = ["BatchStream", "Batches", "EpochBatches", "batch_stream", "epoch_batches"]

Batches = Callable[[int], Any] | Iterable[Any]


class BatchStream(Protocol):
    """This process's batches in order."""

    def __call__(self, index: int) -> Any:
        """Give batch ``index`` of this process; a stream over an iterable must be asked in order."""

    def position(self) -> dict[str, Any]:
        """Say where the stream stands, as something that JSON can hold."""

    def move_to(self, position: dict[str, Any]) -> None:
        """Bring the stream where another one stood; the global random state changes on the way.

        Raises:
            DataError: the position is that of other batches.
        """


def batch_stream(batches: Batches, process: int = 0, processes: int = 1) -> BatchStream:
    """Turn what a user gives as ``batches`` into the stream of one process.

    Args:
        batches: a callable step → batch; a list; or a re-iterable such as a ``DataLoader``. A loader whose sampler already
            gives each process its share (``DistributedSampler``, or prepared by accelerate) is read whole.
        process: index of this process.
        processes: how many there are.

    Returns:
        The stream.

    Raises:
        TypeError: neither callable nor re-iterable.
        ValueError: it is empty, or shuffles differently on each process.
    """
    if callable(batches):
        return _RandomAccess(batches, process, processes)
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise TypeError(
            "batches must be a callable step -> batch or an iterable that can be iterated again (a list, a DataLoader), "
            f"got {type(batches).__name__}"
        )
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError(f"batches must not be empty, got a {type(batches).__name__} of length 0")
    if isinstance(batches, Sequence):
        return _RandomAccess(lambda index: batches[index % len(batches)], process, processes)
    if processes > 1 and _gives_shares(batches):
        return _Repeated(batches, 0, 1)
    if processes > 1 and isinstance(batches, DataLoader):
        sampler = getattr(batches.batch_sampler, "sampler", batches.sampler)
        if not isinstance(sampler, SequentialSampler):
            raise ValueError(
                f"batches must give every process the same order, got a DataLoader with a {type(sampler).__name__}, which "
                "each process draws anew: give it a DistributedSampler, or use epoch_batches"
            )
    return _Repeated(batches, process, processes)


class EpochBatches:
    """Batches of tensors in memory, reshuffled every epoch, with random access; see :func:`epoch_batches`."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, seed: int, drop_last: bool) -> None:
        self.tensors = tuple(tensors)
        self.batch_size = batch_size
        self.seed = seed
        self.size = len(self.tensors[0])
        self.steps_per_epoch = self.size // batch_size if drop_last else -(-self.size // batch_size)
        self._order: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """Give the batch of one step, counted over all epochs.

        Args:
            step: ≥ 0; step s lies in epoch s // steps_per_epoch.

        Returns:
            One tensor (batch, ...) for every tensor given.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order(epoch).to(self.tensors[0].device))
        chosen = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return tuple(tensor[chosen] for tensor in self.tensors)

    def order(self, epoch: int) -> Int64[Tensor, " size"]:
        """Give the order of one epoch: a permutation that depends on (seed, epoch) alone."""
        return torch.randperm(self.size, generator=stream_generator(self.seed, "epoch", epoch))


def epoch_batches(
    tensors: Tensor | Sequence[Tensor], batch_size: int, seed: int, drop_last: bool = True
) -> EpochBatches:
    """Cut tensors into shuffled batches.

    Args:
        tensors: one tensor (size, ...) or several of the same size and device.
        batch_size: entries a batch, ≥ 1.
        seed: every epoch's order comes from (seed, epoch).
        drop_last: leave out the rest of an epoch that fills no batch; without it the last batch is smaller.

    Returns:
        A callable step → tuple of tensors (batch, ...), with ``steps_per_epoch``.

    Raises:
        TypeError: something is no tensor.
        ValueError: no tensors, sizes differ, or no batch can be made.
    """
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    if not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an integer, got {type(batch_size).__name__}: {batch_size!r}")
    check_positive(batch_size=batch_size)
    if not tensors:
        raise ValueError("tensors must not be empty")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors must be tensors, got a {type(tensor).__name__}")
    sizes = [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors]
    if len(set(sizes)) != 1:
        raise ValueError(f"tensors must have the same first size, got {sizes}")
    if sizes[0] < (batch_size if drop_last else 1):
        raise ValueError(f"tensors must fill one batch, got {sizes[0]} entries for batch_size={batch_size}")
    return EpochBatches(tensors, batch_size, seed, drop_last)


class _RandomAccess:
    def __init__(self, batches: Callable[[int], Any], process: int, processes: int) -> None:
        self.batches, self.process, self.processes = batches, process, processes

    def __call__(self, index: int) -> Any:
        return self.batches(index * self.processes + self.process)

    def position(self) -> dict[str, Any]:
        return {}

    def move_to(self, position: dict[str, Any]) -> None:
        if position:
            raise DataError(
                "the checkpoint was written by a run that iterated over its batches, this run names each step"
            )


class _Repeated:
    """The endless chain of an iterable's epochs, of which this process takes every ``processes``-th batch."""

    def __init__(self, batches: Iterable[Any], process: int, processes: int) -> None:
        self.batches, self.processes = batches, processes
        self.epoch, self.over = -1, 0
        self.to_skip = process
        self.iterator: Iterator[Any] | None = None
        self.began_with: RandomState = {}

    def __call__(self, index: int) -> Any:
        for _ in range(self.to_skip):
            self._next()
        self.to_skip = self.processes - 1
        return self._next()

    def position(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "over": self.over, "to_skip": self.to_skip, "random_state": self.began_with}

    def move_to(self, position: dict[str, Any]) -> None:
        if not position:
            raise DataError("the checkpoint was written with batches that name their step, this run iterates over them")
        self.epoch, self.to_skip = position["epoch"], position["to_skip"]
        if self.epoch < 0:
            return
        if self.epoch > 0 and getattr(self.batches, "persistent_workers", False):
            iter(self.batches)  # starts the workers, for which only the first epoch draws a seed
        self._set_generators(position["random_state"])
        self._begin()
        self.over = position["over"]
        if sum(1 for _ in itertools.islice(self._iterator(), self.over)) < self.over:
            raise DataError(
                f"the checkpoint stands behind batch {self.over} of an epoch, this run's epochs are shorter"
            )

    def _next(self) -> Any:
        if self.iterator is not None:
            try:
                batch = next(self.iterator)
            except StopIteration:
                self.iterator = None
            else:
                self.over += 1
                return batch
        self.epoch += 1
        self.over = 0
        self._begin()
        try:
            batch = next(self._iterator())
        except StopIteration:
            raise ValueError(
                f"batches must not be empty, epoch {self.epoch} of the {type(self.batches).__name__} was"
            ) from None
        self.over = 1
        return batch

    def _begin(self) -> None:
        for part in (
            self.batches,
            getattr(self.batches, "sampler", None),
            getattr(self.batches, "batch_sampler", None),
        ):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.epoch)
        self.began_with = {
            "global": random_state(),
            "own": [encode_bytes(generator.get_state()) for generator in self._generators()],
        }
        self.iterator = iter(self.batches)

    def _iterator(self) -> Iterator[Any]:
        assert self.iterator is not None
        return self.iterator

    def _generators(self) -> list[torch.Generator]:
        """The generators that a DataLoader and its samplers hold themselves."""
        loader = self.batches
        sampler = getattr(loader, "batch_sampler", None)
        holders = (loader, getattr(loader, "sampler", None), sampler, getattr(sampler, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))

    def _set_generators(self, state: dict[str, Any]) -> None:
        set_random_state(state["global"])
        generators = self._generators()
        if len(generators) != len(state["own"]):
            raise DataError(
                f"the checkpoint holds {len(state['own'])} generators of the batches' own, this run has {len(generators)}"
            )
        for generator, own in zip(generators, state["own"], strict=True):
            generator.set_state(decode_bytes(own))


def _gives_shares(batches: Iterable[Any]) -> bool:
    from accelerate.data_loader import DataLoaderStateMixin

    samplers = (getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    return isinstance(batches, DataLoaderStateMixin) or any(hasattr(sampler, "num_replicas") for sampler in samplers)
