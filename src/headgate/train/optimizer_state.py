"""An optimizer's state by parameter name: what a checkpoint holds in place of PyTorch's numbered one.

Names survive a change in the order of parameter groups, are the same alone, under DDP and under FSDP, and tell one model's
state from another's.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from headgate.errors import DataError

__all__ = ["OptimizerState", "optimizer_state", "parameter_names", "set_optimizer_state"]


class OptimizerState(TypedDict):
    """State by name."""

    kind: str
    """The optimizer's class."""
    state: dict[str, dict[str, Any]]
    """Parameter name → entry name, such as ``exp_avg`` → tensor or number."""
    param_groups: list[dict[str, Any]]
    """The groups' settings; ``params`` holds names."""


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> OptimizerState:
    """Read an optimizer's state.

    Args:
        optimizer: over parameters of ``model``.
        model: gives the names.

    Returns:
        The state, its tensors not copied.

    Raises:
        ValueError: a parameter of the optimizer is none of the model's.
    """
    numbered = optimizer.state_dict()
    names = parameter_names(optimizer, model)
    return {
        "kind": type(optimizer).__name__,
        "state": {names[index]: dict(entries) for index, entries in numbered["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]} for group in numbered["param_groups"]
        ],
    }


def set_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: OptimizerState) -> None:
    """Bring an optimizer to a state read by :func:`optimizer_state`; the learning rates stay as they are.

    Raises:
        DataError: another kind of optimizer, or other parameters in its groups.
    """
    kind = type(optimizer).__name__
    if state["kind"] != kind:
        raise DataError(f"the checkpoint holds the state of {state['kind']}, the optimizer is {kind}")
    names = parameter_names(optimizer, model)
    numbers = {name: index for index, name in names.items()}
    present = optimizer.state_dict()["param_groups"]
    stored = [group["params"] for group in state["param_groups"]]
    if stored != (expected := [[names[index] for index in group["params"]] for group in present]):
        raise DataError(f"the checkpoint's parameter groups are {stored}, the optimizer's are {expected}")
    groups = []
    for now, then in zip(present, state["param_groups"], strict=True):
        settings = {key: _like(now.get(key), value) for key, value in then.items() if key != "lr"}
        groups.append({**now, **settings, "params": now["params"]})
    optimizer.load_state_dict(
        {"state": {numbers[name]: entries for name, entries in state["state"].items()}, "param_groups": groups}
    )


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    """Name an optimizer's parameters.

    Args:
        optimizer: over parameters of ``model``.
        model: gives the names.

    Returns:
        Number, in the order of the optimizer's groups → name.

    Raises:
        ValueError: a parameter of the optimizer is none of the model's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if id(parameter) not in names:
            raise ValueError(
                "optimizer must hold parameters of model alone when a run has checkpoints or several processes, got another "
                f"of shape {tuple(parameter.shape)}: put what is trained together into one nn.Module"
            )
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _like(present: Any, stored: Any) -> Any:
    """JSON turns tuples into lists; a setting comes back in the type that it has."""
    if isinstance(present, tuple):
        return tuple(stored)
    return torch.as_tensor(stored).to(present) if isinstance(present, Tensor) else stored
