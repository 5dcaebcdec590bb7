"""Taps: forward hooks on a model's blocks, through which a caller can read, shrink or end a forward pass.

Hooks are put once, when the taps are made, so that ``torch.compile`` and ``torch.export`` see a model that does not
change. They do nothing until :meth:`Taps.open` names a visitor, and again nothing afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["PassEnded", "Taps", "check_names", "find_blocks", "name_exits"]

Visitor = Callable[[int, Tensor], Tensor | None]


class PassEnded(Exception):
    """Raised by a visitor when nothing behind this block has to be computed."""


class Taps:
    """Taps behind the named blocks of a model.

    A block's output is a tensor, or a tuple whose first entry is one, with the batch on its first axis.

    Args:
        model: the model.
        exits: names of the submodules to tap, in the order in which they run.
        batched: names of arguments, of these submodules and of all that stand in one list with them, which have the batch
            on their first axis.
    """

    def __init__(self, model: nn.Module, exits: Sequence[str], batched: Sequence[str]) -> None:
        self.visitor: Visitor | None = None
        self.rows: Tensor | None = None
        self.batched = tuple(batched)
        self.passed = 0
        self.exits = tuple(exits)
        self.handles: list[RemovableHandle] = []
        for number, name in enumerate(exits):
            self.handles.append(model.get_submodule(name).register_forward_hook(_Tap(self, number)))
        for block in _with_siblings(model, exits) if self.batched else ():
            self.handles.append(block.register_forward_pre_hook(self._cut_arguments, with_kwargs=True))

    @contextlib.contextmanager
    def open(self, visitor: Visitor) -> Iterator[None]:
        """Call ``visitor(number, hidden)`` behind every tapped block inside the block.

        What it returns takes the place of ``hidden``; ``None`` leaves it. It may raise :class:`PassEnded`.
        """
        self.start(visitor)
        try:
            yield
        finally:
            self.stop()

    def start(self, visitor: Visitor) -> None:
        """Begin to call ``visitor``; :meth:`stop` ends it."""
        self.visitor, self.passed = visitor, 0

    def stop(self) -> None:
        """Call nobody any more."""
        self.visitor, self.rows = None, None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def visit(self, number: int, output: Any) -> Any:
        """Pass a block's output to the visitor, and what it gives back on to the next block."""
        if self.visitor is None:
            return None
        if number != self.passed:
            raise ValueError(
                f"exits must name blocks in the order in which they run, each once per pass, got {self.exits[number]!r} "
                f"in place of {self.exits[min(self.passed, len(self.exits) - 1)]!r}"
            )
        self.passed += 1
        is_tensor = isinstance(output, Tensor)
        changed = self.visitor(number, output if is_tensor else output[0])
        if changed is None:
            return None
        return changed if is_tensor else (changed, *output[1:])

    def _cut_arguments(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Where rows have left the batch, take the same rows of the block's other arguments."""
        if self.rows is None:
            return None
        rows = self.rows
        names = list(inspect.signature(block.forward).parameters)

        def cut(name: str, value: Any) -> Any:
            is_whole = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] > max(1, len(rows))
            return value[rows] if name in self.batched and is_whole else value

        places = [*names[: len(args)], *[""] * (len(args) - len(names))]
        return (
            tuple(cut(name, value) for name, value in zip(places, args, strict=True)),
            {name: cut(name, value) for name, value in kwargs.items()},
        )


class _Tap:
    """One hook; an object, so that it is copied with its model."""

    def __init__(self, taps: Taps, number: int) -> None:
        self.taps, self.number = taps, number

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return self.taps.visit(self.number, output)


def find_blocks(model: nn.Module, blocks: str | None = None) -> list[str]:
    """The names of a model's blocks, in order.

    Args:
        model: the model.
        blocks: name of the ``ModuleList`` or ``Sequential`` that holds them; default: the longest one.

    Raises:
        ValueError: there is none, it holds fewer than two, or two are equally long.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)}
    if blocks is None:
        longest = max((len(part) for part in lists.values()), default=0)
        found = [name for name, part in lists.items() if len(part) == longest]
        if longest < 2 or len(found) != 1:
            raise ValueError(f"blocks must name the list of the backbone's blocks, one of {sorted(lists)}; got None")
        blocks = found[0]
    if blocks not in lists or len(lists[blocks]) < 2:
        raise ValueError(f"blocks must name a list of two blocks or more, one of {sorted(lists)}; got {blocks!r}")
    return [f"{blocks}.{index}" if blocks else str(index) for index in range(len(lists[blocks]))]


def name_exits(exits: Sequence[int] | None, blocks: Sequence[str]) -> list[str]:
    """The names of the blocks behind which exits stand.

    Args:
        exits: positions in ``blocks``; ``None`` is all but the last.
        blocks: names of the blocks.

    Raises:
        TypeError: no numbers.
        ValueError: none, not increasing, outside the model, or the last block, where the final exit stands.
    """
    chosen = list(range(len(blocks) - 1)) if exits is None else list(exits)
    if not all(isinstance(exit, int) and not isinstance(exit, bool) for exit in chosen):
        raise TypeError(f"exits must be positions of blocks, or all names of submodules, got {chosen}")
    rises = all(before < after for before, after in pairwise(chosen))
    if not chosen or not rises or chosen[0] < 0 or chosen[-1] > len(blocks) - 2:
        raise ValueError(
            f"exits must be positions in increasing order in [0, {len(blocks) - 2}] for a backbone of {len(blocks)} "
            f"blocks, whose last is the final exit; got {chosen}"
        )
    return [blocks[position] for position in chosen]


def check_names(model: nn.Module, exits: Sequence[str]) -> list[str]:
    """Check that exits name different submodules of a model.

    Raises:
        ValueError: they do not.
    """
    known = dict(model.named_modules())
    if not exits or len(set(exits)) != len(exits) or any(name not in known or not name for name in exits):
        raise ValueError(f"exits must name different submodules of the backbone, got {list(exits)}")
    return list(exits)


def _with_siblings(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The named submodules, and those that stand in one list with them."""
    found: dict[nn.Module, None] = {}
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        is_list = isinstance(parent, nn.ModuleList | nn.Sequential)
        found.update(dict.fromkeys(parent.children() if is_list else [model.get_submodule(name)]))
    return list(found)
