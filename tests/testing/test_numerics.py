"""Modules whose numbers are wrong are caught by the check that promises them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.testing import check_module
from tests.testing.helpers import DIM, Rows, broken, rows


def test_a_module_that_does_not_run_ends_the_suite_with_one_failure() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) @ torch.ones(3)

    failures = broken(Broken)
    assert list(failures) == ["modes"]
    assert "forward in evaluation mode" in failures["modes"]
    assert "RuntimeError" in failures["modes"]


def test_an_output_without_a_tensor_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Any:
            return {"size": 3}

    assert "no tensor" in broken(Broken)["modes"]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
def test_infinity_in_one_mode_is_caught(mode: str) -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y / 0 if self.training == (mode == "training") else y

    assert f"in {mode} mode" in broken(Broken)["modes"]


def test_a_tensor_cached_under_inference_mode_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.register_buffer("scale", None, persistent=False)
            self.scale: Tensor | None

        def apply_to(self, x: Tensor) -> Tensor:
            if self.scale is None:
                self.scale = torch.ones(DIM)
            return self.linear(x) * self.scale

    assert "after inference" in broken(Broken)["modes"]


def test_unfreezing_a_parameter_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.linear.bias.requires_grad_(False)

        def train(self, mode: bool = True) -> Broken:
            self.linear.bias.requires_grad_(mode)
            return super().train(mode)

    assert "linear.bias" in broken(Broken)["modes"]


def test_a_dtype_that_leaks_from_numpy_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.from_numpy(np.ones(DIM))

    assert "float64" in broken(Broken)["modes"]


def test_a_dtype_written_into_the_code_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x).float()

    failures = broken(Broken)
    assert list(failures) == ["dtypes"]
    assert "float64 inputs and weights give output in float32" in failures["dtypes"]


def test_a_weight_of_another_dtype_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) @ torch.ones(DIM, DIM, device=x.device)

    failures = broken(Broken)
    assert "in float64" in failures["dtypes"]
    assert "RuntimeError" in failures["dtypes"]


def test_counting_in_half_precision_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            odd = torch.arange(1000, 1000 + DIM, dtype=x.dtype, device=x.device) % 2
            return self.linear(x) + odd

    failures = broken(Broken)
    assert list(failures) == ["dtypes", "autocast"]
    assert "bfloat16 beside float32" in failures["dtypes"]


def test_dtypes_that_are_not_promised_are_not_tested() -> None:
    class Single(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x).float()

    report = check_module(Single, rows, dtypes=(torch.float32,), compile=False, export=False)
    assert report.count > 50


def test_two_dtypes_that_meet_under_autocast_are_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            out = torch.zeros(x.shape, dtype=self.linear.weight.dtype, device=x.device)
            out[:, torch.arange(DIM, device=x.device)] = self.linear(x)
            return out

    failures = broken(Broken)
    assert list(failures) == ["autocast"]
    assert check_module(Broken, rows, autocast=False, compile=False, export=False).count > 50


def test_bfloat16_activations_under_autocast_are_tried() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x.index_add(0, torch.zeros(1, dtype=torch.int64), self.linear.bias[None]))

    failures = broken(Broken, batch_independent=False, batch_equivariant=False)
    assert list(failures) == ["autocast"]
    assert "autocast with bfloat16 inputs raises RuntimeError" in failures["autocast"]


def test_a_detached_parameter_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return x @ self.linear.weight.detach() + self.linear.bias

    failures = broken(Broken)
    assert list(failures) == ["gradients"]
    assert failures["gradients"] == "no gradient reaches linear.weight"
    check_module(Broken, rows, unused_parameters=("linear.w*",), compile=False, export=False)


def test_a_gradient_that_is_always_zero_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x).round() + x

    failures = broken(Broken)
    assert list(failures) == ["gradients"]
    assert "linear.weight, linear.bias" in failures["gradients"]


def test_a_detached_input_is_caught_by_its_name() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x.detach())

    failures = broken(Broken)
    assert failures == {"gradients": "no gradient reaches inputs.x"}
    check_module(Broken, rows, unused_parameters=("inputs.x",), compile=False, export=False)


def test_a_frozen_parameter_with_a_gradient_is_caught() -> None:
    class Broken(Rows):
        def make(self) -> None:
            self.linear.bias.requires_grad_(False)

        def apply_to(self, x: Tensor) -> Tensor:
            self.linear.bias.grad = torch.ones_like(self.linear.bias)
            return self.linear(x)

    assert broken(Broken) == {"gradients": "the frozen parameter linear.bias gets a gradient"}


def test_a_layer_that_begins_at_zero_is_sound() -> None:
    class Sound(Rows):
        def make(self) -> None:
            self.out = nn.Linear(DIM, DIM)
            nn.init.zeros_(self.out.weight)

        def apply_to(self, x: Tensor) -> Tensor:
            return self.out(self.linear(x))

    assert check_module(Sound, rows, compile=False, export=False).count > 50


def test_a_root_whose_gradient_is_infinite_at_zero_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) * x.square().sum(-1, keepdim=True).sqrt()

    failures = broken(Broken)
    assert list(failures) == ["extremes"]
    assert "inputs times 0: the gradient of inputs.x holds NaN" in failures["extremes"]


def test_an_exponential_that_overflows_is_caught_unless_such_inputs_are_illegal() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + x.exp()

    failures = broken(Broken)
    assert list(failures) == ["extremes"]
    assert "inputs times 100" in failures["extremes"]
    check_module(Broken, rows, extremes=lambda g: [(torch.full((2, DIM), 9.0),)], compile=False, export=False)


def test_the_case_s_own_extremes_are_tried() -> None:
    failures = broken(Rows, extremes=lambda g: [rows(g), (torch.full((2, DIM), float("nan")),)])
    assert list(failures) == ["extremes"]
    assert "extreme input 1" in failures["extremes"]
