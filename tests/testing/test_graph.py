"""Modules that cannot be captured as one graph, or change by it, are caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from headgate.testing import check_module
from tests.testing.helpers import DIM, Rows, broken, rows


class Branching(Rows):
    """Decides by a value."""

    def apply_to(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y if y.sum() > 0 else -y


def test_a_branch_on_a_value_is_caught_unless_capture_is_not_promised() -> None:
    failures = broken(Branching, compile=True, export=True, batch_independent=False, any_batch_size=False)
    assert list(failures) == ["compile", "export"]
    assert "compiled with fullgraph=True and aot_eager raises Unsupported" in failures["compile"]
    assert "torch.export.export(module, inputs, strict=False) raises" in failures["export"]


def test_a_graph_break_in_training_mode_alone_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            if self.training:
                torch._dynamo.graph_break()
            return y

    failures = broken(Broken, compile=True, export=True)
    assert list(failures) == ["compile"]
    assert "in training mode" in failures["compile"]


def test_another_result_when_compiled_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y * 1.01 if torch.compiler.is_dynamo_compiling() else y

    failures = broken(Broken, compile=True, export=True)
    assert list(failures) == ["compile"]
    assert "compiled in evaluation mode: output differs" in failures["compile"]


def test_another_gradient_when_compiled_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y + (y - y.detach()) * 0.1 if torch.compiler.is_dynamo_compiling() else y

    failures = broken(Broken, compile=True, export=True)
    assert list(failures) == ["compile"]
    assert "the gradients" in failures["compile"]


def test_another_result_when_exported_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y * 1.01 if torch.compiler.is_exporting() else y

    failures = broken(Broken, compile=True, export=True)
    assert list(failures) == ["export"]
    assert "exported: output differs" in failures["export"]


def test_noise_in_training_mode_compiles_to_the_same_values() -> None:
    class Sound(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y + torch.randn_like(y) if self.training else y

    check_module(Sound, rows)


def test_a_dataclass_as_output_is_fine_where_export_is_not_promised() -> None:
    @dataclass
    class Parts:
        value: Tensor
        size: int

    class Parted(Rows):
        def apply_to(self, x: Tensor) -> Any:
            return Parts(self.linear(x), DIM)

    assert list(broken(Parted, export=True)) == ["export"]
    check_module(Parted, rows, export=False)


def test_the_backend_is_the_one_asked_for() -> None:
    failures = broken(Rows, compile=True, compile_backend="no_such_backend")
    assert list(failures) == ["compile"]
    assert "no_such_backend" in failures["compile"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_sound_module_passes_under_each_backend(backend: str) -> None:
    report = check_module(Rows, rows, compile_backend=backend)
    assert {result.name: result.count for result in report.results}["compile"] == 4
