"""Checks of what a call may depend on and change: seeds, the global random state, the inputs, their memory layout."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headgate.testing.trees import difference, map_tensors
from headgate.testing.trial import Trial, name_inputs, seeded

__all__ = ["check_determinism", "check_inputs_untouched", "check_random_state", "check_strides"]


def check_determinism(trial: Trial) -> None:
    """One seed gives one module and one output, in training and in evaluation mode."""
    trial.doing = "building twice under one seed"
    first, second = trial.build(seed=1), trial.build(seed=1)
    mend = "draw from torch's global generator only (no numpy, no random, no hash, no set order)"
    problem = difference(_all_tensors(second), _all_tensors(first), 0.0, "module")
    trial.expect(problem is None, f"two modules built under one seed differ: {problem}", mend)
    inputs = trial.draw()
    for mode, name in ((True, "training"), (False, "evaluation")):
        trial.doing = f"forward twice under one seed in {name} mode"
        outputs = [trial.run(module.train(mode), inputs, seed=2) for module in (first, second)]
        problem = difference(outputs[1], outputs[0], 0.0)
        trial.expect(problem is None, f"two runs under one seed differ in {name} mode: {problem}", mend)
    trial.doing = "forward again on one module in evaluation mode"
    again = difference(trial.run(first, inputs, seed=2), trial.run(first, inputs, seed=2), 0.0)
    trial.expect(again is None, f"evaluation changes the module: {again}", "update buffers in training mode only")


def check_random_state(trial: Trial) -> None:
    """No random state but torch's is touched, nobody reseeds it, and evaluation mode draws nothing from it."""
    inputs = trial.draw()
    foreign = _foreign_state()
    ends = []
    module = None
    for seed in (1, 2):
        trial.doing = "building and running in training mode"
        with seeded(seed), torch.no_grad():
            module = trial.case.factory()
            module.train()(*inputs)
            ends.append(torch.get_rng_state())
    mend = "take a seed and make a torch.Generator of your own for what must always be the same"
    trial.expect(not torch.equal(*ends), "torch's global generator is reseeded while building or running", mend)
    assert module is not None
    if trial.case.deterministic:
        trial.doing = "forward in evaluation mode"
        with seeded(3), torch.no_grad():
            before = torch.get_rng_state()
            module.eval()(*inputs)
            drawn = not torch.equal(before, torch.get_rng_state())
        mend = "draw noise in training mode only; say deterministic=False for what samples by nature"
        trial.expect(not drawn, "evaluation mode draws from torch's global generator", mend)
    moved = [name for name, state in _foreign_state().items() if state != foreign[name]]
    mend = "draw from torch, or from a numpy.random.Generator of your own"
    trial.expect(not moved, f"the global random state of {' and '.join(moved)} is used", mend)


def check_inputs_untouched(trial: Trial) -> None:
    """No input is changed in place, in either mode."""
    for mode, name in ((False, "evaluation"), (True, "training")):
        module, inputs = trial.build().train(mode), trial.draw()
        before = map_tensors(lambda t: t.clone(), inputs)
        trial.doing = f"forward in {name} mode"
        trial.run(module, inputs)
        for (path, after), (_, kept) in zip(name_inputs(module, inputs), name_inputs(module, before), strict=True):
            same = after.shape == kept.shape and difference(after, kept, 0.0) is None
            mend = "use the operation without the underscore, or work on a clone"
            trial.expect(same, f"{path} is changed in place in {name} mode", mend)


def check_strides(trial: Trial) -> None:
    """Inputs that do not lie contiguously in memory give the same outputs and gradients."""
    inputs = trial.draw()
    module = trial.build().eval()
    trial.doing = "forward and backward with contiguous inputs"
    expected = trial.differentiate(module, inputs)
    for layout, name in ((_every_second, "of stride two"), (_transposed, "stored transposed")):
        trial.doing = f"forward with inputs {name}"
        relaid = functools.partial(_call_with_layout, module, layout)
        actual = trial.differentiate(module, inputs, call=relaid)
        mend = "use reshape in place of view, and call contiguous() where a kernel needs it"
        trial.expect_same(actual[0], expected[0], trial.case.tolerance, f"with inputs {name}", mend)
        trial.expect_same(actual[1], expected[1], trial.case.tolerance, f"gradients with inputs {name}", mend)


def _call_with_layout(module: nn.Module, layout: Callable[[Tensor], Tensor], *inputs: Any) -> Any:
    return module(*map_tensors(layout, inputs))


def _every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor.clone()], dim=-1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(_named_tensors(module))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _foreign_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (looked at, not drawn from)
    return {"numpy": (name, np.asarray(keys).tobytes(), *rest), "random": random.getstate()}
