"""Trees of tensors: paths, mapping, batch entries, and differences in words."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from headgate.testing.trees import batch_size, cast, difference, leaves, map_tensors, take


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Box:
    content: Any
    label: str = "box"


def tree() -> Any:
    return OrderedDict(a=[torch.ones(3), Pair(torch.zeros(3, 2), None)], b=Box((torch.arange(3), 0.5)))


def test_leaves_have_dotted_paths() -> None:
    assert [name for name, _ in leaves(tree(), "x")] == [
        "x.a.0",
        "x.a.1.left",
        "x.a.1.right",
        "x.b.content.0",
        "x.b.content.1",
        "x.b.label",
    ]
    assert [name for name, _ in leaves(torch.ones(1), "output")] == ["output"]


def test_mapping_keeps_the_form_and_all_that_is_no_tensor() -> None:
    mapped = map_tensors(lambda t: t + 1, tree())
    assert isinstance(mapped, OrderedDict)
    assert isinstance(mapped["a"][1], Pair)
    assert isinstance(mapped["b"], Box)
    assert mapped["b"].label == "box"
    assert mapped["a"][0].tolist() == [2, 2, 2]
    assert mapped["b"].content[0].tolist() == [1, 2, 3]
    assert mapped["b"].content[1] == 0.5
    assert difference(map_tensors(lambda t: t - 1, mapped), tree(), 0.0) is None


def test_only_floating_tensors_are_cast() -> None:
    result = cast(tree(), torch.float64)
    assert result["a"][0].dtype == torch.float64
    assert result["b"].content[0].dtype == torch.int64


def test_entries_are_taken_from_batched_tensors_alone() -> None:
    inputs = (torch.arange(3), torch.arange(4), torch.tensor(7), 5, None)
    assert batch_size(inputs) == 3
    taken = take(inputs, [2, 0, 0, 1])
    assert taken[0].tolist() == [2, 0, 0, 1]
    assert taken[1].tolist() == [0, 1, 2, 3]
    assert taken[2:] == (torch.tensor(7), 5, None)
    assert batch_size((torch.tensor(1.0), None)) is None


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (torch.ones(2), torch.ones(3), r"float32 \(2,\) in place of float32 \(3,\)"),
        (torch.ones(2), torch.ones(2).double(), "in place of float64"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), r"differs by 0\.1 where at most 0\.00021 is allowed"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs in 1 of 2 whole numbers"),
        (torch.tensor([True]), torch.tensor([False]), "differs in 1 of 1"),
        (torch.tensor([float("nan")]), torch.tensor([1.0]), "differs by inf"),
        (torch.tensor([1.0]), torch.tensor([float("inf")]), "differs by inf"),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), "differs by 2"),
        ((torch.ones(1), 2), (torch.ones(1), 3), "output.1 is 2 in place of 3"),
        ((torch.ones(1), 2), (torch.ones(1), torch.tensor(2)), "output.1 is 2 in place of int64"),
        ([torch.ones(1)], [torch.ones(1), None], "the structure is"),
        ({"a": 1}, {"b": 1}, "the structure is"),
    ],
)
def test_differences_are_told(actual: Any, expected: Any, words: str) -> None:
    import re

    problem = difference(actual, expected, 1e-4)
    assert problem is not None
    assert re.search(words, problem)


def test_what_agrees_within_the_tolerance_has_no_difference() -> None:
    large, noise = torch.tensor([100.0]), torch.tensor([1e-6])
    assert difference((large + 5e-3, noise), (large, -noise), 1e-4) is None
    assert difference((large, noise), (large, -noise), 1e-6) is not None
    special = torch.tensor([float("nan"), float("inf")])
    assert difference(special, special.clone(), 0.0) is None
    assert difference(torch.ones(0), torch.ones(0), 0.0) is None


def test_a_tensor_is_given_to_the_function_as_it_is() -> None:
    seen: list[Tensor] = []
    tensor = torch.ones(1)
    map_tensors(seen.append, {"a": tensor, "b": [1, tensor]})
    assert len(seen) == 2
    assert all(entry is tensor for entry in seen)
