"""Checks of whole-graph capture: ``torch.compile(fullgraph=True)`` and ``torch.export``."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from headgate.testing.trial import Trial

__all__ = ["check_compile", "check_export"]


def check_compile(trial: Trial) -> None:
    """torch.compile(fullgraph=True) equals eager: outputs and gradients, in evaluation and in training mode.

    In training mode, the values are compared where no random numbers are drawn, or where the backend draws them as
    eager mode does (``aot_eager``; ``inductor`` has a generator of its own).
    """
    inputs = trial.draw()
    mend = (
        "no graph breaks: no .item(), no branch on a tensor's values, no Python objects in between; register custom "
        "kernels with torch.library"
    )
    for mode, name in ((False, "evaluation"), (True, "training")):
        trial.doing = f"forward and backward in {name} mode, eager"
        module = trial.build().train(mode)
        draws = _draws_random_numbers(trial, inputs, mode)
        expected = trial.differentiate(module, inputs)
        module = trial.build().train(mode)
        trial.doing = f"forward and backward in {name} mode, compiled with fullgraph=True and {trial.compile_backend}"
        torch.compiler.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = torch.compile(module, fullgraph=True, backend=trial.compile_backend, dynamic=False)
            actual = trial.differentiate(module, inputs, call=compiled)
        if draws and trial.compile_backend != "aot_eager":
            trial.expect_finite(actual[0], f"compiled in {name} mode", mend)
            continue
        tolerance = trial.case.tolerance
        trial.expect_same(actual[0], expected[0], tolerance, f"compiled in {name} mode", mend)
        gradients = {key: value for key, value in actual[1].items() if value is not None}
        wanted = {key: value for key, value in expected[1].items() if value is not None}
        trial.expect_same(gradients, wanted, tolerance, f"compiled in {name} mode, the gradients", mend)
    torch.compiler.reset()


def check_export(trial: Trial) -> None:
    """torch.export.export(strict=False) in evaluation mode gives a program that equals eager.

    ``strict=False`` is what torch itself uses by default in its newer releases; the stricter capture of the Python code
    is the one that :func:`check_compile` puts to the test.
    """
    module, inputs = trial.build().eval(), trial.draw()
    trial.doing = "forward in evaluation mode"
    expected = trial.run(module, inputs)
    trial.doing = "torch.export.export(module, inputs, strict=False)"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, strict=False)
        trial.doing = "forward of the exported program"
        actual = program.module()(*inputs)
    mend = "compute sizes from shapes, not from values; outputs must be tensors in tuples, NamedTuples, lists or dicts"
    trial.expect_same(actual, expected, trial.case.tolerance, "exported", mend)


def _draws_random_numbers(trial: Trial, inputs: tuple[Any, ...], mode: bool) -> bool:
    module = trial.build().train(mode)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        module(*inputs)
        return not torch.equal(before, torch.get_rng_state())
