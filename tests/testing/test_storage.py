"""Modules that hold their tensors in a wrong way are caught by the check that promises otherwise."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.testing import check_module
from tests.testing.helpers import DIM, Rows, broken, rows


def test_a_random_buffer_that_is_not_saved_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.register_buffer("noise", torch.randn(DIM), persistent=False)
            self.noise: Tensor

        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.noise

    failures = broken(Broken)
    assert list(failures) == ["state dict", "meta device"]
    assert "not saved differ: noise" in failures["state dict"]
    assert "not restored after to_empty and load_state_dict: noise" in failures["meta device"]


def test_a_state_that_is_no_tensor_is_caught() -> None:
    class Broken(Rows):
        def get_extra_state(self) -> Any:
            return {"version": 2}

        def set_extra_state(self, state: Any) -> None: ...

    assert "no tensor: _extra_state" in broken(Broken)["state dict"]


def test_buffers_that_overlap_in_one_memory_are_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            flat = torch.arange(DIM, dtype=torch.float32)
            self.register_buffer("whole", flat)
            self.register_buffer("part", flat[:2])

    failures = broken(Broken)
    assert "saving the state dict to safetensors raises" in failures["state dict"]
    assert "part" in failures["state dict"]


def test_tied_weights_are_sound() -> None:
    class Tied(Rows):
        def make(self) -> None:
            self.back = nn.Linear(DIM, DIM, bias=False)
            self.back.weight = self.linear.weight

        def apply_to(self, x: Tensor) -> Tensor:
            return self.back(self.linear(x).sigmoid())

    check_module(Tied, rows, compile=False, export=False)


def test_ties_that_come_apart_when_loaded_are_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.back = nn.Linear(DIM, DIM, bias=False)
            self.back.weight = self.linear.weight

        def apply_to(self, x: Tensor) -> Tensor:
            return self.back(self.linear(x).sigmoid())

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            self.back.weight = nn.Parameter(self.back.weight.detach().clone())
            return super().load_state_dict(state_dict, strict, assign)

    assert broken(Broken)["state dict"] == (
        "tied tensors come apart after load_state_dict: linear.weight = back.weight"
    )


def test_names_that_differ_between_instances_are_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            torch.rand(1)
            self.register_buffer(f"b{torch.randint(1000, (1,)).sum()}", torch.zeros(1))

    failures = broken(Broken, meta=False)
    assert list(failures) == ["state dict"]
    assert "load_state_dict(strict=True) into a second module raises RuntimeError" in failures["state dict"]


def test_an_output_kept_with_its_graph_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            self.last = self.linear(x)
            return self.last

    failures = broken(Broken)
    assert "copy.deepcopy after a training step raises RuntimeError" in failures["deepcopy"]


def test_a_lock_that_cannot_be_copied_is_caught() -> None:
    import threading

    class Broken(Rows):
        def make(self) -> None:
            self.lock = threading.Lock()

    failures = broken(Broken)
    assert list(failures) == ["deepcopy"]
    assert "TypeError" in failures["deepcopy"]


def test_a_copy_that_shares_its_tensors_is_caught() -> None:
    class Broken(Rows):
        def __deepcopy__(self, memo: Any) -> Broken:
            return copy.copy(self)

    assert "linear.weight" in broken(Broken)["deepcopy"]
    assert "shares memory" in broken(Broken)["deepcopy"]


class Helper:
    """An object that is no module and holds a tensor."""

    def __init__(self) -> None:
        self.table = torch.ones(DIM)


HIDING_PLACES = {
    "attribute": lambda: torch.ones(DIM),
    "list": lambda: [0, torch.ones(DIM)],
    "dict": lambda: {"a": {"b": torch.ones(DIM)}},
    "partial": lambda: functools.partial(torch.add, torch.ones(DIM)),
    "closure": lambda: (lambda table: lambda: table)(torch.ones(DIM)),
    "object": Helper,
    "bound method": lambda: Helper().__init__,
    "list of modules": lambda: [nn.Linear(2, 2)],
    "integers": lambda: torch.arange(3),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_hidden_tensor_is_caught(place: str) -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.hidden = HIDING_PLACES[place]()

    failures = broken(Broken, meta=False)
    assert set(failures) - {"deepcopy"} == {"hidden tensors"}, "a closure is shared by a copy, too"
    assert "leaves behind hidden" in failures["hidden tensors"]


def test_a_cache_filled_by_forward_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.cache: dict[int, Tensor] = {}

        def apply_to(self, x: Tensor) -> Tensor:
            if len(x) not in self.cache:
                self.cache[len(x)] = torch.ones(DIM, dtype=x.dtype)
            return self.linear(x) + self.cache[len(x)].clone().detach()

    assert "cache.4 (float32)" in broken(Broken)["hidden tensors"]


def test_a_cached_number_of_the_old_dtype_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.scale: float | None = None

        def apply_to(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = float((torch.ones((), dtype=x.dtype, device=x.device) / 3).item())
            return self.linear(x) * self.scale

    failures = broken(Broken)
    assert list(failures) == ["hidden tensors"]
    assert "after use in float32" in failures["hidden tensors"]


def test_a_reference_to_the_parent_and_registered_tensors_in_lists_are_sound() -> None:
    class Sound(Rows):
        def make(self) -> None:
            self.parts = (self.linear,)
            self.again = [self]

    check_module(Sound, rows, compile=False, export=False)


def test_a_buffer_that_numpy_made_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.register_buffer("table", torch.from_numpy(np.ones(DIM, dtype=np.float32)))

    failures = broken(Broken)
    assert failures == {"meta device": "under the meta device these are real: table"}


def test_memory_allocated_and_thrown_away_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            real = torch.zeros(16, DIM, device="cpu")
            self.register_buffer("table", real.to(self.linear.weight.device))

    failures = broken(Broken)
    assert list(failures) == ["meta device"]
    assert "real memory is allocated: (16, 6)" in failures["meta device"]
    check_module(Broken, rows, meta=False, compile=False, export=False)


def test_a_value_read_while_building_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.rates = torch.linspace(0, 0.1, 3).tolist()

    failures = broken(Broken)
    assert list(failures) == ["meta device"]
    assert "building under torch.device('meta') raises" in failures["meta device"]


def test_other_shapes_on_the_meta_device_are_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.extra = nn.Parameter(torch.ones(3 if self.linear.weight.is_meta else 2))

        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.extra.mean()

    assert "built on the meta device: output.extra.0 is 3 in place of 2" in broken(Broken)["meta device"]


def test_an_unsaved_buffer_that_reset_parameters_fills_is_sound() -> None:
    class Sound(Rows):
        def make(self) -> None:
            self.register_buffer("table", torch.empty(DIM), persistent=False)
            self.table: Tensor
            self.reset_parameters()

        def reset_parameters(self) -> None:
            torch.arange(DIM, out=self.table)

        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.table

    check_module(Sound, rows, compile=False, export=False)
