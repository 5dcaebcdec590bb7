"""Checks of bad input: each gets a ValueError or TypeError that names the argument, never a crash from deep inside."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headgate.testing.trees import batch_size, difference, map_tensors, take, tensors
from headgate.testing.trial import Trial, argument_names, name_inputs

__all__ = ["check_refusals"]


def check_refusals(trial: Trial) -> None:
    """Wrong rank, size or dtype of an input, and what the case lists, get a clear ValueError or TypeError.

    A rank or size that the module takes is fine where the result is sound: a size that is free, an axis in front that
    is handed through, an axis that broadcasts.
    """
    module, inputs = trial.build().eval(), trial.draw()
    door = _Door(trial, module, inputs)
    trial.doing = "forward with the legal inputs"
    legal = trial.run(module, inputs)
    for position, (name, tensor) in enumerate(name_inputs(module, inputs)):
        _check_dtype(door, position, name, tensor)
        _check_rank(door, position, name, tensor, legal)
        _check_sizes(door, position, name, tensor)
    for bad in trial.case.bad_inputs:
        trial.doing = f"the bad input {bad.name!r}"
        given = tuple(bad.inputs(torch.Generator().manual_seed(0)))
        mend = f"raise {bad.error.__name__} with a message that matches {bad.match!r}"
        try:
            trial.run(module, given)
        except Exception as error:
            fits = isinstance(error, bad.error) and re.search(bad.match, str(error)) is not None
            trial.expect(fits, f"the bad input {bad.name!r} gives {_told(error)}", mend)
        else:
            trial.expect(False, f"the bad input {bad.name!r} is taken without a word", mend)


@dataclass(frozen=True)
class _Door:
    """The module at whose door wrong inputs knock, with the legal ones."""

    trial: Trial
    module: nn.Module
    inputs: tuple[Any, ...]

    def knock(self, position: int, tensor: Tensor, what: str, *, sizes: bool) -> tuple[Any] | None:
        """The output in a tuple where the module takes ``tensor``; None where it refuses it in a clear way."""
        mend = "check it first (headgate.validate) and raise ValueError or TypeError with the argument's name"
        try:
            return (self.trial.run(self.module, self.replace(position, tensor)),)
        except (ValueError, TypeError) as error:
            clear = any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(error)) for word in self.words(sizes))
            hint = "the argument's name or an expected size" if sizes else "the argument's name"
            self.trial.expect(clear, f"{what} gives {_told(error)}, without {hint}", mend)
            return None
        except Exception as error:
            self.trial.fail(f"{what} gives {_told(error)}", mend)

    def replace(self, position: int, tensor: Tensor) -> tuple[Any, ...]:
        """The legal inputs with another tensor at one position."""
        positions = iter(range(len(list(tensors(self.inputs, "inputs")))))
        replaced: tuple[Any, ...] = map_tensors(lambda t: tensor if next(positions) == position else t, self.inputs)
        return replaced

    def words(self, sizes: bool) -> Iterator[str]:
        """What a clear message may hold. Behind ``*args``, a submodule that is handed them names its own."""
        names = argument_names(self.module, self.inputs)
        yield from (name.partition(".")[0] for name in names)
        if any("." in name for name in names):
            for part in self.module.modules():
                yield from inspect.signature(part.forward).parameters
        if sizes:
            for _, tensor in tensors(self.inputs, "inputs"):
                yield from map(str, tensor.shape)


def _check_dtype(door: _Door, position: int, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bool or tensor.is_complex():
        return
    wrong = tensor.long() if tensor.is_floating_point() else tensor.float()
    what = f"{name} of dtype {str(wrong.dtype).removeprefix('torch.')}"
    taken = door.knock(position, wrong, what, sizes=False)
    checker = "check_floating" if tensor.is_floating_point() else "check_integer"
    door.trial.expect(taken is None, f"{what} is taken without a word", f"call headgate.validate.{checker} first")


def _check_rank(door: _Door, position: int, name: str, tensor: Tensor, legal: Any) -> None:
    trial, mend = door.trial, "call headgate.validate.check_shape first"
    what = f"{name} of shape {tuple(tensor[None].shape)} in place of {tuple(tensor.shape)}"
    taken = door.knock(position, tensor[None], what, sizes=True)
    if taken is not None:
        sound = _same_up_to_front_axis(taken[0], legal, trial.case.tolerance)
        trial.expect(sound, f"{what} is taken without a word and gives another result", mend)
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        return
    what = f"{name} of shape {tuple(tensor[0].shape)} in place of {tuple(tensor.shape)}"
    taken = door.knock(position, tensor[0], what, sizes=True)
    if taken is not None:
        sound = any(
            _same_up_to_front_axis(expected, taken[0], trial.case.tolerance)
            for expected in _sound_results(door, position, tensor)
        )
        trial.expect(sound, f"{what} is taken without a word and gives another result", mend)


def _sound_results(door: _Door, position: int, tensor: Tensor) -> Iterator[Any]:
    """What a missing batch axis may mean: a single entry, or one for all entries.

    The second holds for an input with a shape of its own (a mask, a step); two inputs of one shape must stay alike.
    """
    shapes = [other.shape for _, other in tensors(door.inputs, "inputs")]
    if len(shapes) == 1 and batch_size(door.inputs) == tensor.shape[0]:
        yield door.trial.run(door.module, take(door.inputs, [0]))
    if shapes.count(tensor.shape) == 1:
        yield door.trial.run(door.module, door.replace(position, tensor[:1].expand_as(tensor).contiguous()))


def _check_sizes(door: _Door, position: int, name: str, tensor: Tensor) -> None:
    batched = [t for _, t in tensors(door.inputs, "inputs") if t.dim() > 0 and t.shape[0] == batch_size(door.inputs)]
    first = 0 if len(batched) > 1 else 1
    for axis in range(first, tensor.dim()):
        if tensor.shape[axis] > 0:
            wrong = torch.cat([tensor, tensor.narrow(axis, -1, 1)], dim=axis)
            what = f"{name} of shape {tuple(wrong.shape)} in place of {tuple(tensor.shape)}"
            door.knock(position, wrong, what, sizes=True)
            door.trial.count += 1


def _same_up_to_front_axis(longer: Any, shorter: Any, tolerance: float) -> bool:
    left, right = dict(tensors(longer, "output")), dict(tensors(shorter, "output"))
    if list(left) != list(right):
        return False
    return all(
        difference(left[name], leaf, tolerance) is None or difference(left[name], leaf[None], tolerance) is None
        for name, leaf in right.items()
    )


def _told(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:160]}"
