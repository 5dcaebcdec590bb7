"""The suite: which checks there are, which of them a case asks for, and how they are run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headgate.testing.batch import check_batch_independence, check_batch_permutation, check_batch_sizes
from headgate.testing.behaviour import check_determinism, check_inputs_untouched, check_random_state, check_strides
from headgate.testing.case import CheckResult, ContractCase, ContractError, ContractReport, Failure
from headgate.testing.graph import check_compile, check_export
from headgate.testing.numerics import check_autocast, check_dtypes, check_extremes, check_gradients, check_modes
from headgate.testing.refusals import check_refusals
from headgate.testing.storage import check_deepcopy, check_hidden_tensors, check_meta_device, check_state_dict
from headgate.testing.trial import BrokenPromiseError, Trial

__all__ = ["CHECKS", "Check", "check_case", "check_module"]

Inputs = tuple[Any, ...] | Callable[[torch.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Check:
    """One check of the suite.

    Attributes:
        name: as it stands in reports and errors.
        run: the check.
        left_out: the reason why a case does not ask for it, or None.
        mend: what to do where the module raised an exception during the check.
    """

    name: str
    run: Callable[[Trial], None]
    left_out: Callable[[ContractCase], str | None]
    mend: str

    @property
    def promise(self) -> str:
        """What the check promises, in one sentence."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


def check_module(
    factory: Callable[[], nn.Module],
    example_inputs: Inputs,
    *,
    compile_backend: str = "aot_eager",
    **options: Any,
) -> ContractReport:
    """Put a module through the contract suite.

    Args:
        factory: builds a fresh module; it is called many times.
        example_inputs: positional inputs of ``forward`` as a tuple, or a function that draws them from a
            ``torch.Generator``. Float32 or int64, on the CPU, batch axis first, three or more entries.
        compile_backend: backend of ``torch.compile``. The default ``"aot_eager"`` captures the graph and its backward
            without generating code: it needs no C++ compiler and takes a fraction of the time. ``"inductor"`` tests
            the generated code as well.
        **options: further fields of :class:`ContractCase`, e.g. ``batch_independent=False``.

    Returns:
        What was checked.

    Raises:
        ContractError: a promise is broken; the message names each failed check, what was seen and how to mend it.
        TypeError: an option is no field of :class:`ContractCase`, or ``example_inputs`` is neither tuple nor function.

    Example:
        >>> from torch import nn
        >>> report = check_module(lambda: MyLayer(8), lambda generator: (torch.randn(4, 8, generator=generator),))
        >>> print(report)
    """
    if isinstance(example_inputs, tuple):
        fixed = example_inputs
        return check_case(ContractCase(factory, lambda generator: fixed, **options), compile_backend=compile_backend)
    if not callable(example_inputs):
        raise TypeError(f"example_inputs must be a tuple or a function, got {type(example_inputs).__name__}")
    return check_case(ContractCase(factory, example_inputs, **options), compile_backend=compile_backend)


def check_case(case: ContractCase, *, compile_backend: str = "aot_eager") -> ContractReport:
    """Put the module of a case through the contract suite; see :func:`check_module`.

    All checks run, so that one error names all that is to mend; only a module that does not run at all ends the suite
    after the first.

    Raises:
        ContractError: a promise is broken.
    """
    trial = Trial(case, compile_backend)
    subject = type(trial.build()).__name__
    results: list[CheckResult] = []
    failures: list[Failure] = []
    for check in CHECKS:
        reason = check.left_out(case)
        began = time.perf_counter()
        trial.count, trial.doing = 0, "building"
        failure = _failure(check, trial) if reason is None else None
        results.append(CheckResult(check.name, check.promise, trial.count, time.perf_counter() - began, reason))
        if failure is not None:
            failures.append(failure)
            if check is CHECKS[0]:
                break
    report = ContractReport(subject, tuple(results))
    if failures:
        raise ContractError(subject, failures, report)
    return report


def _failure(check: Check, trial: Trial) -> Failure | None:
    try:
        check.run(trial)
    except BrokenPromiseError as broken:
        return Failure(check.name, broken.seen, broken.mend)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " | ".join(lines[:3])[:400]
        return Failure(check.name, f"{trial.doing} raises {type(error).__name__}: {told}", check.mend)
    return None


def _always(case: ContractCase) -> str | None:
    return None


def _if_promised(field: str) -> Callable[[ContractCase], str | None]:
    return lambda case: None if getattr(case, field) else f"{field}=False"


CHECKS: Sequence[Check] = (
    Check("modes", check_modes, _always, "make forward take the example inputs in both modes"),
    Check("dtypes", check_dtypes, _always, "create tensors in the input's dtype; list in dtypes those that it can do"),
    Check(
        "autocast",
        check_autocast,
        _if_promised("autocast"),
        "under autocast activations are bfloat16 and weights float32: cast where they meet, or say autocast=False",
    ),
    Check("gradients", check_gradients, _always, "let every parameter take part in a differentiable output"),
    Check("extremes", check_extremes, _always, "take every legal value; draw legal ones in extremes"),
    Check("batch size", check_batch_sizes, _if_promised("any_batch_size"), "take sizes from the input's shape"),
    Check(
        "batch permutation",
        check_batch_permutation,
        _if_promised("batch_equivariant"),
        "say batch_equivariant=False where the order of entries counts",
    ),
    Check(
        "batch independence",
        check_batch_independence,
        _if_promised("batch_independent"),
        "say batch_independent=False where entries depend on each other",
    ),
    Check("determinism", check_determinism, _always, "draw from torch's global generator only"),
    Check("random state", check_random_state, _always, "leave all global random state alone"),
    Check("inputs untouched", check_inputs_untouched, _always, "work on a clone"),
    Check("strides", check_strides, _always, "use reshape in place of view, contiguous() where a kernel needs it"),
    Check("state dict", check_state_dict, _always, "register tensors; share whole tensors, not parts of one memory"),
    Check("deepcopy", check_deepcopy, _always, "keep no tensor of an autograd graph, no generator and no lock"),
    Check("hidden tensors", check_hidden_tensors, _always, "register every tensor as parameter or buffer"),
    Check(
        "meta device",
        check_meta_device,
        _if_promised("meta"),
        "let no value of a tensor decide anything in __init__ (no .item(), .tolist(), numpy())",
    ),
    Check(
        "compile",
        check_compile,
        _if_promised("compile"),
        "no .item(), no branch on values, no Python objects in between; register kernels with torch.library",
    ),
    Check(
        "export",
        check_export,
        _if_promised("export"),
        "no .item(), no branch on values; outputs in tuples, NamedTuples, lists or dicts",
    ),
    Check("refusals", check_refusals, _always, "check inputs at the door with headgate.validate"),
)
"""All checks in the order in which they run."""
