"""What a module promises, what a failed promise looks like, and the report of those that were kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BadInput", "CheckResult", "ContractCase", "ContractError", "ContractReport", "Failure"]

Draw = Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class BadInput:
    """Input that the module must refuse.

    Attributes:
        name: what is wrong with it, for messages.
        inputs: draws it.
        error: the exception that must come.
        match: regular expression that must be found in its message.
    """

    name: str
    inputs: Draw
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class ContractCase:
    """One module with example inputs, and the promises that it makes.

    Attributes:
        factory: builds a fresh module, in training mode.
        inputs: draws example inputs (float32 or int64, on the CPU, batch axis first) from a generator. Tensors whose
            first axis is as long as that of the first tensor are taken to be batched.
        dtypes: dtypes in which the module works as a whole.
        autocast: works under bfloat16 autocast.
        batch_independent: in evaluation mode, entry i of the output depends on entry i of the inputs alone. False for
            losses and batch statistics.
        batch_equivariant: permuting the batch permutes the output; a scalar loss stays the same.
        any_batch_size: works with one entry, and with an odd number.
        compile: works under ``torch.compile(fullgraph=True)``.
        export: works under ``torch.export.export(strict=False)``.
        meta: can be built on the meta device.
        unused_parameters: names (``fnmatch`` patterns) of the parameters that legally get no gradient; an input that
            legally gets none is named ``inputs.<argument>``.
        extremes: draws more extreme but legal inputs. Default: the floating inputs times 0, 1e-4 and 1e2.
        bad_inputs: inputs that must be refused, beside the wrong rank, size and dtype of each input.
        tolerance: relative float32 error allowed where two ways of computing one result are compared.
        deterministic: evaluation mode draws no random numbers.
    """

    factory: Callable[[], nn.Module]
    inputs: Draw
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.bfloat16)
    autocast: bool = True
    batch_independent: bool = True
    batch_equivariant: bool = True
    any_batch_size: bool = True
    compile: bool = True
    export: bool = True
    meta: bool = True
    unused_parameters: tuple[str, ...] = ()
    extremes: Callable[[torch.Generator], Sequence[tuple[Any, ...]]] | None = None
    bad_inputs: tuple[BadInput, ...] = ()
    tolerance: float = 1e-4
    deterministic: bool = True


@dataclass(frozen=True)
class Failure:
    """One broken promise: the check's name, what was seen, and how to mend it."""

    check: str
    seen: str
    mend: str

    def __str__(self) -> str:
        return f"{self.check}: {self.seen}\n    mend: {self.mend}"


class ContractError(AssertionError):
    """A module broke promises; the message holds each check's name, what was seen, and how to mend it.

    Attributes:
        failures: all of them, in the order of the checks.
        report: what was checked, the failed checks included.
    """

    def __init__(self, subject: str, failures: Sequence[Failure], report: ContractReport) -> None:
        self.failures = tuple(failures)
        self.report = report
        lines = "\n".join(f"  {failure}" for failure in self.failures)
        super().__init__(f"{subject} breaks {len(self.failures)} of its promises:\n{lines}")

    @property
    def checks(self) -> tuple[str, ...]:
        """The names of the failed checks."""
        return tuple(failure.check for failure in self.failures)


@dataclass(frozen=True)
class CheckResult:
    """One check of one module.

    Attributes:
        name: the check.
        promise: what it promises, one sentence.
        count: comparisons made.
        seconds: time taken.
        left_out: why it was not run; None where it was.
    """

    name: str
    promise: str
    count: int
    seconds: float
    left_out: str | None = None


@dataclass(frozen=True)
class ContractReport:
    """The checks of one module, in the order in which they ran. Prints as a table, plain or with rich."""

    subject: str
    results: tuple[CheckResult, ...]

    @property
    def count(self) -> int:
        """Comparisons made in all."""
        return sum(result.count for result in self.results)

    @property
    def seconds(self) -> float:
        """Time taken in all."""
        return sum(result.seconds for result in self.results)

    def __str__(self) -> str:
        width = max([len(result.name) for result in self.results], default=0)
        lines = [f"{self.subject}: {self.count} comparisons, {self.seconds:.1f} s"]
        lines += [f"  {result.name:<{width}}  {_outcome(result)}" for result in self.results]
        return "\n".join(lines)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.subject}: {self.count} comparisons, {self.seconds:.1f} s")
        table.add_column("check")
        table.add_column("compared", justify="right")
        for result in self.results:
            table.add_row(result.name, _outcome(result))
        return table


def _outcome(result: CheckResult) -> str:
    return f"left out: {result.left_out}" if result.left_out is not None else str(result.count)
