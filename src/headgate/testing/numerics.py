"""Checks of numbers: modes, dtypes, autocast, gradients, extreme inputs."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from headgate.testing.trees import map_tensors, tensors
from headgate.testing.trial import Trial

__all__ = ["check_autocast", "check_dtypes", "check_extremes", "check_gradients", "check_modes"]

HALF_TOLERANCE = 0.1
"""Relative error of bfloat16 beside float32; its own rounding is 0.4 %, and errors add up over layers."""


def check_modes(trial: Trial) -> None:
    """Runs in evaluation and in training mode, one after the other on one instance, with finite tensors as outputs."""
    module, inputs = trial.build(), trial.draw()
    trainable = _trainable(module)
    finite = "divide by what cannot be zero; take roots and logs of what is positive"
    trial.doing = "forward in evaluation mode under inference_mode"
    module.eval()
    with torch.inference_mode():
        first = module(*map_tensors(lambda t: t.clone(), inputs))
    mend = "return a tensor, or a tuple, NamedTuple, list, dict or dataclass of tensors"
    trial.expect(any(True for _ in tensors(first, "output")), "the output holds no tensor", mend)
    trial.expect_finite(first, "in evaluation mode", finite)
    _expect_dtypes(trial, first, (torch.float32,), "float32 inputs and weights")
    _expect_still_trainable(trial, module, trainable, "evaluation")
    trial.doing = "forward and backward in training mode, after inference"
    output, _ = trial.differentiate(module.train(), inputs)
    trial.expect_finite(output, "in training mode", finite)
    _expect_still_trainable(trial, module, trainable, "training")
    trial.doing = "forward in evaluation mode, after training"
    last = trial.run(module.eval(), inputs)
    trial.expect_finite(last, "in evaluation mode, after a forward in training mode", finite)


def check_dtypes(trial: Trial) -> None:
    """Works as a whole in each promised dtype, with outputs of that dtype; bfloat16 comes close to float32."""
    for dtype in trial.case.dtypes:
        name = str(dtype).removeprefix("torch.")
        trial.doing = f"forward and backward in {name}"
        module, inputs = trial.build().to(dtype).eval(), trial.cast(trial.draw(), dtype)
        output, gradients = trial.differentiate(module, inputs)
        mend = f"keep the range of {name} in mind; compute sums, exponentials and norms in float32 and cast back"
        trial.expect_finite(output, f"in {name}", mend)
        trial.expect_finite_gradients(gradients, f"in {name}", mend)
        allowed = (dtype,) if dtype in (torch.float32, torch.float64) else (dtype, torch.float32)
        _expect_dtypes(trial, output, allowed, f"{name} inputs and weights")
        if dtype in (torch.bfloat16, torch.float16):
            trial.doing = f"forward in float32 with weights and inputs rounded to {name}"
            reference = trial.run(module.float(), trial.cast(inputs, torch.float32))
            _expect_near(trial, output, reference, f"{name} beside float32")
        if dtype == torch.float64:
            trial.doing = "forward in float32"
            reference = trial.run(trial.build().eval(), trial.draw())
            _expect_near(trial, output, reference, "float64 beside float32")


def check_autocast(trial: Trial) -> None:
    """Works under bfloat16 autocast, fed with float32 or bfloat16 activations, close to float32."""
    inputs = trial.draw()
    reference = trial.run(trial.build().eval(), inputs)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        trial.doing = f"forward and backward under autocast with {name} inputs"
        module = trial.build().eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, gradients = trial.differentiate(module, trial.cast(inputs, dtype))
        mend = "inside autocast a layer before hands on bfloat16: cast where two dtypes meet, compute sums in float32"
        trial.expect_finite(output, f"under autocast with {name} inputs", mend)
        trial.expect_finite_gradients(gradients, f"under autocast with {name} inputs", mend)
        _expect_dtypes(trial, output, (torch.bfloat16, torch.float32), f"autocast with {name} inputs")
        _expect_near(trial, output, reference, f"autocast with {name} inputs beside float32")


def check_gradients(trial: Trial) -> None:
    """A gradient that is not zero reaches every trainable parameter and floating input; frozen ones get none.

    The parameters are moved a little away from their initial values, since a layer that begins at zero rightly blocks
    the gradients behind it; what has no gradient with the first inputs (an expert that was not chosen) gets two more.
    """
    module = trial.build().train()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            _nudge(parameter, generator)
    trial.doing = "forward and backward in training mode"
    reached: dict[str, bool] = {}
    missing: list[str] = []
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for seed in range(3):
        _, gradients = trial.differentiate(module, trial.draw(seed), seed)
        for name, gradient in gradients.items():
            arrived = gradient is not None and bool((gradient != 0).any())
            reached[name] = reached.get(name, False) or arrived
        missing = [name for name, arrived in reached.items() if not arrived and not _is_unused(trial, name)]
        if not set(missing) - frozen:
            break
    for name in reached:
        if name in frozen:
            trial.expect(not reached[name], f"the frozen parameter {name} gets a gradient", "do not unfreeze it")
        elif not _is_unused(trial, name):
            trial.expect(
                name not in missing,
                f"no gradient reaches {', '.join(n for n in missing if n not in frozen)}",
                "look for detach, argmax, rounding or a branch that is never taken; what legally gets no gradient "
                "belongs into unused_parameters (an input as 'inputs.<argument>')",
            )


def check_extremes(trial: Trial) -> None:
    """Outputs and gradients stay finite at extreme but legal inputs."""
    generator = torch.Generator().manual_seed(0)
    if trial.case.extremes is not None:
        extremes = [(f"extreme input {i}", tuple(x)) for i, x in enumerate(trial.case.extremes(generator))]
    else:
        extremes = [(f"inputs times {scale:g}", _scaled(trial.draw(), scale)) for scale in (0.0, 1e-4, 1e2)]
    mend = (
        "clamp or add an epsilon under square roots, logs and divisions, subtract the maximum before exponentials; "
        "if such inputs are illegal, draw legal ones in extremes"
    )
    for name, inputs in extremes:
        for mode in (False, True):
            trial.doing = f"forward and backward with {name} in {'training' if mode else 'evaluation'} mode"
            output, gradients = trial.differentiate(trial.build().train(mode), inputs)
            trial.expect_finite(output, f"with {name}", mend)
            trial.expect_finite_gradients(gradients, f"with {name}", mend)


def _scaled(inputs: tuple[Any, ...], scale: float) -> tuple[Any, ...]:
    scaled: tuple[Any, ...] = map_tensors(lambda t: t * scale if t.is_floating_point() else t, inputs)
    return scaled


def _trainable(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


def _expect_still_trainable(trial: Trial, module: nn.Module, before: list[str], mode: str) -> None:
    changed = sorted(set(before) ^ set(_trainable(module)))
    trial.expect(
        not changed,
        f"requires_grad of {', '.join(changed)} changed in {mode} mode",
        "set requires_grad in __init__ only; the user decides later what is trained",
    )


def _is_unused(trial: Trial, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in trial.case.unused_parameters)


def _nudge(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Move by a tenth of the value, keeping signs; zeros by a tenth."""
    noise = 0.1 * torch.randn(parameter.shape, generator=generator).clamp(-3, 3).to(parameter.dtype)
    with torch.no_grad():
        parameter.copy_(torch.where(parameter == 0, noise, parameter * (1 + noise)))


def _expect_dtypes(trial: Trial, output: Any, allowed: tuple[torch.dtype, ...], what: str) -> None:
    for name, leaf in tensors(output, "output"):
        if leaf.is_floating_point():
            trial.expect(
                leaf.dtype in allowed,
                f"{what} give {name} in {str(leaf.dtype).removeprefix('torch.')}",
                "create tensors with the input's dtype and device; no dtype is written into the code",
            )


def _expect_near(trial: Trial, output: Any, reference: Any, what: str) -> None:
    """Nine tenths of the values within a tenth: rounding may flip a choice of experts here and there, no more."""
    mend = "compute sums, exponentials and norms in float32 and cast back; no integer larger than 256 in bfloat16"
    expected = dict(tensors(reference, "output"))
    for name, leaf in tensors(output, "output"):
        if not leaf.is_floating_point() or leaf.numel() == 0:
            continue
        trial.expect(name in expected, f"{what}: {name} is missing in float32", mend)
        trial.expect(leaf.shape == expected[name].shape, f"{what}: {name} has another shape", mend)
        a, b = leaf.double(), expected[name].double()
        far = (a - b).abs() > HALF_TOLERANCE * (b.abs() + _root_mean_square(b)) + 1e-3
        share = float(far.double().mean())
        trial.expect(share <= 0.1, f"{what}: {share:.0%} of {name} are off by more than a tenth", mend)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
