"""Modules that depend on or change what they must not are caught by the check that promises otherwise."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.testing import check_module
from tests.testing.helpers import DIM, Rows, broken, rows, sequences


def test_an_initialisation_by_the_operating_system_s_randomness_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.linear.weight.data += int.from_bytes(os.urandom(2), "big") / 65536

    failures = broken(Broken)
    assert "two modules built under one seed differ: module.linear.weight" in failures["determinism"]


def test_noise_from_elsewhere_in_training_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            noise = int.from_bytes(os.urandom(2), "big") / 65536
            return self.linear(x) + noise * self.training

    failures = broken(Broken)
    assert list(failures) == ["determinism"]
    assert "two runs under one seed differ in training mode" in failures["determinism"]


def test_a_module_that_changes_while_evaluating_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.register_buffer("seen", torch.zeros(()))
            self.seen: Tensor

        def apply_to(self, x: Tensor) -> Tensor:
            self.seen = self.seen + 1
            return self.linear(x) * self.seen

    assert "evaluation changes the module" in broken(Broken)["determinism"]


def test_dropout_that_never_rests_is_caught_unless_it_is_meant() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return F.dropout(self.linear(x), 0.5)

    free = {"batch_independent": False, "batch_equivariant": False}
    assert broken(Broken, **free) == {"random state": "evaluation mode draws from torch's global generator"}
    check_module(Broken, rows, deterministic=False, compile=False, export=False, **free)


@pytest.mark.parametrize("place", ["building", "running"])
def test_reseeding_the_global_generator_is_caught(place: str) -> None:
    class Broken(Rows):
        def make(self) -> None:
            if place == "building":
                torch.manual_seed(0)

        def apply_to(self, x: Tensor) -> Tensor:
            if place == "running":
                torch.manual_seed(0)
            return self.linear(x)

    assert "is reseeded" in broken(Broken)["random state"]


@pytest.mark.parametrize("source", ["numpy", "random"])
def test_the_global_state_of_others_is_watched(source: str) -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            if self.training:
                _ = np.random.rand() if source == "numpy" else random.random()  # noqa: NPY002
            return self.linear(x)

    assert broken(Broken) == {"random state": f"the global random state of {source} is used"}


def test_the_suite_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    check_module(Rows, rows)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_an_input_changed_in_place_is_caught(mode: str) -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            if self.training == (mode == "training"):
                x.data.mul_(2)
            return y

    assert broken(Broken)["inputs untouched"] == f"inputs.x is changed in place in {mode} mode"


def test_view_on_inputs_of_any_layout_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + x.view(-1).view(x.shape)

    failures = broken(Broken)
    assert list(failures) == ["strides"]
    assert "inputs stored transposed raises RuntimeError" in failures["strides"]


def test_memory_read_in_the_wrong_order_is_caught() -> None:
    class Broken(Rows):
        def forward(self, x: Tensor) -> Tensor:
            flat = torch.as_strided(x, (x.shape[0] * DIM,), (1,)) if x.dtype == torch.float32 else x.reshape(-1)
            return super().forward(flat.reshape(-1, DIM)) + 0 * x

    assert "output differs" in broken(Broken)["strides"]


def test_a_sequence_stored_transposed_is_tried() -> None:
    class Broken(Rows):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 3 or x.shape[2] != DIM or not x.is_floating_point():
                raise ValueError(f"x must be floating and of dim={DIM}, got {x.dtype} {tuple(x.shape)}")
            return self.linear(x) * (2.0 if x.stride(1) == 1 else 1.0)

    assert "stored transposed" in broken(Broken, sequences)["strides"]
