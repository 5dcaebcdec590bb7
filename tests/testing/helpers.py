"""Small modules for the tests of the suite, and how a broken one is put through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.testing import ContractError, check_module
from headgate.validate import check_floating, check_shape

DIM = 6


def rows(generator: torch.Generator) -> tuple[Tensor]:
    """A batch of four rows."""
    return (torch.randn(4, DIM, generator=generator),)


def sequences(generator: torch.Generator) -> tuple[Tensor]:
    """A batch of four sequences of five."""
    return (torch.randn(4, 5, DIM, generator=generator),)


class Rows(nn.Module):
    """A sound linear layer over rows; broken ones derive from it and override ``make`` or ``apply_to``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.make()

    def make(self) -> None: ...

    def forward(self, x: Tensor) -> Any:
        check_shape("x", x, (None, DIM), "batch, dim")
        check_floating("x", x)
        return self.apply_to(x)

    def apply_to(self, x: Tensor) -> Any:
        return self.linear(x)


def broken(
    factory: Callable[[], nn.Module],
    inputs: Any = rows,
    *,
    compile: bool = False,
    export: bool = False,
    **options: Any,
) -> dict[str, str]:
    """The failed checks of a module: name → what was seen."""
    with pytest.raises(ContractError) as caught:
        check_module(factory, inputs, compile=compile, export=export, **options)
    return {failure.check: failure.seen for failure in caught.value.failures}
