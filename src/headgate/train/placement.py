"""Where a model trains: alone on its own device, or together with other processes under accelerate.

Both placements offer the same few verbs, so that the loop reads the same in either. Alone, PyTorch is called directly, which
costs next to nothing per step; together, accelerate gets model and optimizer and wraps them for DDP or FSDP as the launcher
asked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from headgate.errors import HeadgateError
from headgate.train.optimizer_state import OptimizerState, optimizer_state, parameter_names, set_optimizer_state
from headgate.train.optimizers import make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["PRECISIONS", "Placement", "one_process", "place"]

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

    def model_state(self) -> dict[str, Any]:
        """Read the whole model's state dict; complete on the main process, which writes it."""

    def optimizer_state(self) -> OptimizerState:
        """Read the whole optimizer's state, once it has made a step; complete on the main process."""

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
    is_own = False
    if accelerator is None and _is_launched() and not _ONE_PROCESS.get():
        from accelerate.state import is_initialized

        is_own = not is_initialized()
        accelerator = _accelerator_of_launch(precision)
    if accelerator is None:
        device = next(model.parameters()).device
        return _Alone(model, optimizer or make_optimizer(model, learning_rate=learning_rate), device, precision)

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
        alone = _Alone(model, optimizer, accelerator.device, accelerator.mixed_precision)
        if is_own:
            _forget_precision()
        return alone
    return _Together(model, optimizer or make_optimizer(model, learning_rate=learning_rate), accelerator, is_own)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Let models be trained in this process alone inside the block, although several processes were launched."""
    before = _ONE_PROCESS.set(True)
    try:
        yield
    finally:
        _ONE_PROCESS.reset(before)


class _Alone:
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

    def model_state(self) -> dict[str, Any]:
        return _without_compile(self.model).state_dict()

    def optimizer_state(self) -> OptimizerState:
        return optimizer_state(self.optimizer, _without_compile(self.model))

    def set_state(self, model: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        bare = _without_compile(self.model)
        set_optimizer_state(self.optimizer, bare, optimizer)
        bare.load_state_dict(model)

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def set_scaler_state(self, state: dict[str, Any]) -> None:
        self.scaler.load_state_dict(state)

    def wait(self) -> None:
        """There is nobody to wait for."""

    def leave(self) -> None:
        """Nothing was wrapped."""


class _Together:
    """Several processes, under accelerate."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator, is_own: bool
    ) -> None:
        kind = accelerator.distributed_type.value
        if kind in ("DEEPSPEED", "MEGATRON_LM"):
            raise ValueError(f"accelerator must use DDP or FSDP, got {kind}")
        parameter_names(optimizer, model)  # a parameter outside the model would drift apart between the processes
        self.accelerator, self.is_own = accelerator, is_own
        self.sharded = kind == "FSDP"
        self.own_forward = model.__dict__.get("forward")
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

    def model_state(self) -> dict[str, Any]:
        if not self.sharded:
            return _without_compile(self.module).state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def optimizer_state(self) -> OptimizerState:
        if not self.sharded:
            return optimizer_state(self.optimizer, _without_compile(self.module))
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        kind = type(self.optimizer).__name__
        return {"kind": kind, "state": state.get("state", {}), "param_groups": state.get("param_groups", [])}

    def set_state(self, model: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        if not self.sharded:
            bare = _without_compile(self.module)
            set_optimizer_state(self.optimizer, bare, optimizer)
            bare.load_state_dict(model)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        groups = [
            {**then, "lr": now["lr"]}
            for now, then in zip(self.optimizer.param_groups, optimizer["param_groups"], strict=True)
        ]
        named: Any = {"state": optimizer["state"], "param_groups": groups}
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=dict(model),
            optim_state_dict=named,
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
        bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # Accelerate leaves a bound method on the model, which a copy of the model would share.
        if self.own_forward is None:
            bare.__dict__.pop("forward", None)
        if self.is_own:
            _forget_precision()


_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()
_ONE_PROCESS: ContextVar[bool] = ContextVar("one_process", default=False)


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


def _forget_precision() -> None:
    """Let the next run choose: accelerate keeps the first accelerator's precision for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _to_device(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=device.type == "cuda")


def _without_compile(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)
