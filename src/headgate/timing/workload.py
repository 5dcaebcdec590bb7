"""One thing to measure: what it starts from, and what it does."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Builder", "Workload", "array_bytes", "load_builder", "relative_difference"]


@dataclass(frozen=True)
class Workload:
    """What one contender does at one size. Whatever stays between calls (a model's weights) exists already.

    Attributes:
        inputs: makes the inputs of a call, the same ones every time.
        run: does the work once: inputs → results (outputs and, where they are part of the work, gradients). Everything
            that it returns counts as memory that the caller asked for.
        device: where it runs; on a GPU a call has ended only when the device has caught up.
    """

    inputs: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    device: str = "cpu"

    def prepare(self) -> Callable[[], Any]:
        """Make the inputs, and return a function without arguments that runs one whole call on them."""
        inputs = self.inputs()
        if self.device == "cpu":
            return lambda: self.run(*inputs)
        import torch

        def call() -> Any:
            results = self.run(*inputs)
            torch.cuda.synchronize(self.device)
            return results

        return call


Builder = Callable[..., Workload]


def load_builder(path: str) -> Builder:
    """The function that ``"package.module:function"`` names, so that a fresh process can find it, too.

    Raises:
        ValueError: ``path`` has another form, or the module has no such function.
    """
    module, colon, name = path.partition(":")
    if not module or not colon or not name:
        raise ValueError(f"path must have the form 'package.module:function', got {path!r}")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"path must name a function, but the module {module!r} has no function {name!r}")
    return found


def array_bytes(*trees: Any) -> int:
    """Bytes of the distinct arrays (tensors, NumPy arrays, bytes) in nested tuples, lists and mappings."""
    sizes: dict[int, int] = {}
    for tree in trees:
        for array in _leaves(tree):
            place = array.data_ptr() if hasattr(array, "data_ptr") else id(array)
            size = int(array.nbytes) if hasattr(array, "nbytes") else len(array)
            sizes[place] = max(size, sizes.get(place, 0))
    return sum(sizes.values())


def relative_difference(results: Any, expected: Any) -> float:
    """Largest RMS(result − expected) / RMS(expected) over the tensors of two nested results.

    Infinite where a result is not finite, or where number or shapes of the tensors differ.
    """
    ours, theirs = list(_leaves(results)), list(_leaves(expected))
    if [tuple(a.shape) for a in ours] != [tuple(b.shape) for b in theirs]:
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        error, size = float((a - b).square().mean().sqrt()), float(b.square().mean().sqrt())
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error / size if size else math.inf if error else 0.0)
    return worst


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _leaves(branch)
    elif hasattr(tree, "nbytes") or isinstance(tree, (bytes, bytearray)):
        yield tree
