"""Inputs and outputs as trees: tensors inside tuples, NamedTuples, lists, dicts and dataclasses.

A leaf's path is dotted: ``output.logits``, ``inputs.features.0``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_size", "cast", "difference", "leaves", "map_tensors", "take", "tensors"]


def leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All leaves of ``tree`` with their paths below ``path``; whatever is no container is a leaf."""
    for key, value in _children(tree):
        yield from leaves(value, f"{path}.{key}")
    if not _is_container(tree):
        yield path, tree


def tensors(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The leaves that are tensors."""
    return ((name, leaf) for name, leaf in leaves(tree, path) if isinstance(leaf, Tensor))


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """A tree of the same form with ``function`` applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if not _is_container(tree):
        return tree
    children = {key: map_tensors(function, value) for key, value in _children(tree)}
    if isinstance(tree, Mapping):
        return type(tree)(zip(tree, children.values(), strict=True))  # type: ignore[call-arg]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **children)
    if hasattr(tree, "_fields"):
        return type(tree)(**children)
    return type(tree)(children.values())


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """The floating tensors in another dtype, all else as it is."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, tree)


def batch_size(inputs: Any) -> int | None:
    """The length of the first axis of the first tensor that has one."""
    sizes = (tensor.shape[0] for _, tensor in tensors(inputs, "inputs") if tensor.dim() > 0)
    return next(sizes, None)


def take(inputs: Any, entries: Sequence[int]) -> Any:
    """The named batch entries of every input whose first axis is the batch's; entries may repeat."""
    batch, index = batch_size(inputs), torch.tensor(entries)
    return map_tensors(lambda t: t[index] if t.dim() > 0 and t.shape[0] == batch else t, inputs)


def difference(actual: Any, expected: Any, tolerance: float, path: str = "output") -> str | None:
    """Say in words where two trees differ; None where they agree.

    Whole numbers, booleans and all that is no tensor must be equal. Floating tensors may differ by ``tolerance`` times
    their own largest value, or a thousandth of the tree's largest one (rounding noise of what is truly zero).
    """
    left, right = dict(leaves(actual, path)), dict(leaves(expected, path))
    if list(left) != list(right):
        return f"the structure is {list(left)} in place of {list(right)}"
    scales = [_scale(leaf) for leaf in right.values() if isinstance(leaf, Tensor)]
    floor = 1e-3 * max([scale for scale in scales if scale < float("inf")], default=0.0)
    for name, expected_leaf in right.items():
        problem = _leaf_difference(left[name], expected_leaf, tolerance, floor)
        if problem:
            return f"{name} {problem}"
    return None


def _leaf_difference(actual: Any, expected: Any, tolerance: float, floor: float) -> str | None:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = actual is expected or (type(actual) is type(expected) and bool(actual == expected))
        return None if same else f"is {_short(actual)} in place of {_short(expected)}"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"is {_short(actual)} in place of {_short(expected)}"
    if actual.numel() == 0:
        return None
    if not (expected.is_floating_point() or expected.is_complex()):
        wrong = int((actual != expected).sum())
        return f"differs in {wrong} of {actual.numel()} whole numbers" if wrong else None
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = actual.detach().to(wide), expected.detach().to(wide)
    equal = (a == b) | (a.isnan() & b.isnan())
    error = float(torch.where(equal, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf")).max())
    allowed = tolerance * max(_scale(b), floor)
    if error > allowed:
        return f"differs by {error:.3g} where at most {allowed:.3g} is allowed (tolerance {tolerance:g})"
    return None


def _scale(leaf: Tensor) -> float:
    if leaf.numel() == 0 or not (leaf.is_floating_point() or leaf.is_complex()):
        return 0.0
    return float(leaf.detach().abs().nan_to_num(nan=0.0, posinf=0.0).max())


def _short(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return repr(leaf)


def _is_container(tree: Any) -> bool:
    if isinstance(tree, Tensor | type):
        return False
    return isinstance(tree, Mapping | list | tuple) or dataclasses.is_dataclass(tree)


def _children(tree: Any) -> list[tuple[str, Any]]:
    if not _is_container(tree):
        return []
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if dataclasses.is_dataclass(tree):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree) if field.init]
    if hasattr(tree, "_fields"):
        return [(name, getattr(tree, name)) for name in tree._fields]
    return [(str(index), value) for index, value in enumerate(tree)]
