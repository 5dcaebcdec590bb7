"""Where a model trains: alone on its own device, or together with other processes under accelerate.

Both placements offer the same few verbs, so that the loop reads the same in either. :class:`Alone` calls PyTorch directly
and costs next to nothing per step; :class:`Together` hands model and optimizer to accelerate, which wraps them for DDP or
FSDP as the launcher asked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from headgate.errors import HeadgateError
from headgate.train.optimizer_state import OptimizerState, optimizer_state, set_optimizer_state
from headgate.train.optimizers import make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PRECISIONS", "Alone", "Placement", "Together", "place"]

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Placement(Protocol):
    """What the loop asks of the place where it trains."""

    model: nn.Module
    """What ``loss`` calls: the model, or its distributed wrapper."""
    module: nn.Module
    """What ``evaluate`` gets: the model itself where one process can run it."""
    optimizer: torch.optim.Optimizer
    precision: str
    process: int
    processes: int

    def move(self, batch: Any) -> Any:
        """Bring a batch's tensors to the device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Give the context in which the loss is computed."""

    def gathering(self, last: bool) -> AbstractContextManager[Any]:
        """Give the context of one accumulated batch; gradients travel between processes in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients."""

    def update(self, clip_norm: float | None) -> None:
        """Clip the gradients, make the optimizer's step and clear them."""

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes."""

    def from_main(self, value: Any) -> Any:
        """Give every process what the main process holds."""

    def from_all(self, value: Any) -> list[Any]:
        """Give every process what each holds, in the order of the processes."""

    def state(self) -> tuple[dict[str, Any], OptimizerState]:
        """Read the whole state of model and optimizer; complete on the main process, which writes it."""

    def set_state(self, model: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        """Bring model and optimizer to a state read earlier; every process gives the whole state."""

    def scaler_state(self) -> dict[str, Any]:
        """Read the state of the loss scale of fp16; empty for other precisions."""

    def set_scaler_state(self, state: dict[str, Any]) -> None:
        """Bring the loss scale of fp16 to a state read earlier."""

    def wait(self) -> None:
        """Wait until every process is here."""

    def leave(self) -> None:
        """Take the model out of its wrappers."""


def place(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    learning_rate: float,
    accelerator: Accelerator | None,
    precision: str,
) -> Placement:
    """Decide where the model trains.

    Args:
        model: the model.
        optimizer: its optimizer; ``None`` makes AdamW with ``learning_rate``.
        learning_rate: see ``optimizer``.
        accelerator: decides device, precision and processes. Without one, a process started by ``accelerate launch`` or
            ``torchrun`` makes one, and any other process trains on the model's own device.
        precision: ``"no"``, ``"fp16"`` or ``"bf16"``; ``"no"`` leaves the choice to the accelerator where there is one.

    Returns:
        The placement; the model is on its device.

    Raises:
        ValueError: unknown precision, one that contradicts the accelerator's, or a setting that is fit's own.
        HeadgateError: several processes were launched, but accelerate sees one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"mixed_precision must be one of {list(PRECISIONS)}, got {precision!r}")
    if accelerator is None and _is_launched():
        accelerator = _accelerator_of_launch(precision)
    if accelerator is None:
        device = next(model.parameters()).device
        return Alone(model, optimizer or make_optimizer(model, learning_rate=learning_rate), device, precision)

    if precision not in ("no", accelerator.mixed_precision):
        raise ValueError(
            f"mixed_precision must agree with the accelerator's, got {precision!r} and {accelerator.mixed_precision!r}"
        )
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(f"accelerator must use one of {list(PRECISIONS)}, got {accelerator.mixed_precision!r}")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "accelerator must not accumulate gradients, give accumulate to fit instead; got "
            f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}"
        )
    if accelerator.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HeadgateError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but the accelerator sees one; on a machine without "
            "accelerators make it with Accelerator(cpu=True), or give none"
        )
    if accelerator.distributed_type.value == "NO":
        model.to(accelerator.device)
        if optimizer is not None and optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())  # moves its tensors to the parameters' device
        optimizer = optimizer or make_optimizer(model, learning_rate=learning_rate)
        return Alone(model, optimizer, accelerator.device, accelerator.mixed_precision)
    return Together(model, optimizer or make_optimizer(model, learning_rate=learning_rate), accelerator)


class Alone:
    """One process, one device, no wrapper."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, precision: str
    ) -> None:
        self.model = self.module = model
        self.optimizer = optimizer
        self.device = device
        self.precision = precision
        self.process, self.processes = 0, 1
        self.parameters = _parameters(optimizer)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def move(self, batch: Any) -> Any:
        return batch if self.device.type == "cpu" else _to_device(batch, self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "no":
            return _NOTHING
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def gathering(self, last: bool) -> AbstractContextManager[Any]:
        return _NOTHING

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, clip_norm: float | None) -> None:
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def mean(self, values: Tensor) -> Tensor:
        return values

    def from_main(self, value: Any) -> Any:
        return value

    def from_all(self, value: Any) -> list[Any]:
        return [value]

    def state(self) -> tuple[dict[str, Any], OptimizerState]:
        bare = _without_compile(self.model)
        return bare.state_dict(), optimizer_state(self.optimizer, bare)

    def set_state(self, model: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        bare = _without_compile(self.model)
        bare.load_state_dict(model)
        set_optimizer_state(self.optimizer, bare, optimizer)

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def set_scaler_state(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)

    def wait(self) -> None:
        """There is nobody to wait for."""

    def leave(self) -> None:
        """Nothing was wrapped."""


class Together:
    """Several processes, under accelerate."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        kind = accelerator.distributed_type.value
        if kind in ("DEEPSPEED", "MEGATRON_LM"):
            raise ValueError(f"accelerator must use DDP or FSDP, got {kind}")
        optimizer_state(optimizer, model)  # a parameter outside the model would drift apart between the processes
        self.accelerator = accelerator
        self.sharded = kind == "FSDP"
        self.model, wrapped = accelerator.prepare(model, optimizer)
        self.wrapped_optimizer = wrapped
        self.optimizer = wrapped.optimizer
        # A sharded model runs only as a whole, on all processes at once.
        self.module = self.model if self.sharded else accelerator.unwrap_model(self.model)
        self.precision = accelerator.mixed_precision
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        self.parameters = list(self.model.parameters()) if self.sharded else _parameters(self.optimizer)

    def move(self, batch: Any) -> Any:
        return _to_device(batch, self.accelerator.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def gathering(self, last: bool) -> AbstractContextManager[Any]:
        return _NOTHING if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def update(self, clip_norm: float | None) -> None:
        if clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.parameters, clip_norm)
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()

    def mean(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="mean")

    def from_main(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def from_all(self, value: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([value])

    def state(self) -> tuple[dict[str, Any], OptimizerState]:
        if not self.sharded:
            bare = _without_compile(self.module)
            return bare.state_dict(), optimizer_state(self.optimizer, bare)
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return model, {"kind": type(self.optimizer).__name__, "state": {}, "param_groups": [], **optimizer}

    def set_state(self, model: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        if not self.sharded:
            bare = _without_compile(self.module)
            bare.load_state_dict(model)
            set_optimizer_state(self.optimizer, bare, optimizer)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=dict(model),
            optim_state_dict={"state": optimizer["state"], "param_groups": optimizer["param_groups"]},
            options=StateDictOptions(full_state_dict=True, cpu_offload=True),
        )

    def scaler_state(self) -> dict[str, Any]:
        return {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def set_scaler_state(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def leave(self) -> None:
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def _is_launched() -> bool:
    marks = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
    return any(mark in os.environ for mark in marks) or (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    )


def _accelerator_of_launch(precision: str) -> Accelerator:
    from accelerate import Accelerator

    # Under torchrun accelerate starts processes on the CPU only where it is told to.
    device = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = device is None or device.type == "mps"
    return Accelerator(mixed_precision=None if precision == "no" else precision, cpu=on_cpu)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _to_device(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=device.type == "cuda")


def _without_compile(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)
