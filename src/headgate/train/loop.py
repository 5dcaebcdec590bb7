"""The training loop: one function that can be read from top to bottom.

A *step* is one update of the parameters; ``step`` counts the updates made so far. Step s reads its batches, computes the
loss of the model after s updates, and makes update s + 1; metrics and checkpoints of step s describe the model after s
updates. Losses stay on the device and are read every ``log_every`` steps, so a GPU never waits for the host in between;
that is also when a loss that is not finite is found, and the error names the step where it first was.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headgate.data.seeding import splitmix64
from headgate.errors import HeadgateError
from headgate.train.batches import Batches, BatchStream, batch_stream
from headgate.train.checkpoints import Checkpoint, Checkpoints, check_same_model, check_same_run, outline
from headgate.train.optimizer_state import parameter_names
from headgate.train.placement import Placement, place
from headgate.train.reports import Report, open_reports
from headgate.train.schedules import Schedule
from headgate.train.seeds import random_state, seeded, set_random_state
from headgate.train.tensor_files import check_tensors
from headgate.validate import check_positive

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DivergedError", "History", "LossResult", "fit"]

LossResult = Tensor | tuple[Tensor, Mapping[str, Tensor | float]]

_EVALUATE_KEYS = ("kind", "step", "seconds")
_TRAIN_KEYS = (*_EVALUATE_KEYS, "loss", "learning_rate")


class DivergedError(HeadgateError, ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass
class History:
    """What a run went through; a resumed run holds what came before, too.

    Attributes:
        losses: ``losses[s]`` is the loss of step s, averaged over accumulated batches and processes.
        metrics: step → what ``evaluate`` gave for the model after that many updates.
        steps: updates made.
        seconds: wall time in :func:`fit`, evaluations and checkpoints included, over all parts of a resumed run.
        stopped_early: ``stop`` ended the run.
    """

    losses: list[float] = field(default_factory=list)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    stopped_early: bool = False


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Callable[[nn.Module, Any], LossResult],
    *,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float = 1e-3,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    stop: Callable[[Mapping[str, float]], bool] | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: bool = True,
    log: str | os.PathLike[str] | None = None,
    log_every: int = 10,
    tensorboard: str | os.PathLike[str] | None = None,
    progress: bool = False,
    accelerator: Accelerator | None = None,
    mixed_precision: str = "no",
    seed: int | None = None,
) -> History:
    """Train a model in place.

    It trains on the model's own device. Started by ``accelerate launch`` or ``torchrun``, or given an ``accelerator``, it
    trains where accelerate says, under DDP or FSDP; P processes then see the batches of one process that accumulates P
    times as many.

    Args:
        model: its trainable parameters are those that the optimizer holds. It trains in training mode (submodules that are
            in evaluation mode inside a model in training mode stay so), and gets its modes back at the end.
        batches: a callable index → batch, where the indices count up over the whole run (``accumulate`` and processes
            included); or a list or ``DataLoader``, repeated for as many epochs as it takes, with ``set_epoch`` called on it
            and its sampler. A callable is resumed for free; a ``DataLoader`` begins its epoch again and skips.
        loss: ``loss(model, batch)`` gives a scalar tensor, or that and a dict of scalars to log. It runs under autocast when
            precision is mixed. With several processes ``model`` is the wrapper: call it, and no other method of it.
        steps: updates to make in all, ≥ 1; a resumed run counts those made before.
        optimizer: over parameters of ``model``; default: AdamW without weight decay. On return its groups have their
            learning rates of before.
        learning_rate: of the default optimizer.
        schedule: step → factor of every parameter group's learning rate.
        clip_norm: largest norm of all gradients together, > 0.
        accumulate: batches a step, ≥ 1; their losses are averaged.
        evaluate: ``evaluate(model, step)`` gives metrics. It runs in evaluation mode without gradients, before the first
            step, every ``evaluate_every`` steps, and after the last; the random state is put back afterwards, so that
            evaluating more often changes nothing. With several processes each of them calls it, the main one's count.
        evaluate_every: see ``evaluate``; default: only before the first and after the last step.
        stop: sees the metrics of every evaluation in turn; true ends the run. A resumed run shows it the earlier ones again.
        checkpoints: folder for checkpoints; with several machines, one that all share.
        checkpoint_every: steps between checkpoints; default: a tenth of ``steps``. The last step is always kept.
        keep: how many checkpoints stay, ≥ 1.
        resume: go on from the newest sound checkpoint there. Without it the run begins anew, and its first checkpoint
            replaces all those in the folder.
        log: file for one JSON line every ``log_every`` steps and one per evaluation; see :mod:`headgate.train.reports`. A
            resumed run cuts the lines that it will write again, any other run begins the file anew.
        log_every: steps between readings of the loss from the device, ≥ 1.
        tensorboard: folder for TensorBoard (extra ``tensorboard``).
        progress: show a bar in a terminal, a few lines elsewhere, on standard error.
        accelerator: an ``accelerate.Accelerator``, where more has to be set than the launcher does.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; ``"no"`` leaves it to the accelerator or launcher.
        seed: seeds the global random generators (dropout, a shuffling ``DataLoader``) for this run, and leaves them as they
            were; every process gets a seed of its own. Without it the run draws from their present state.

    Returns:
        The losses, metrics and time.

    Raises:
        TypeError: an argument is of the wrong kind, or ``loss`` gives no tensor.
        ValueError: a number lies outside its range, the model has no trainable parameter, ``batches`` is empty, arguments
            do not go together, or the folder holds checkpoints beyond ``steps``.
        DivergedError: a loss was NaN or infinite; the message names the step. No checkpoint holds such a step.
        DataError: the checkpoint is that of another model, optimizer or setup.
        HeadgateError: a folder or file cannot be written.
        MissingExtraError: ``tensorboard`` is not installed.
    """
    _check_model(model)
    _check_kinds(loss, optimizer, schedule, evaluate, stop)
    _check_numbers(steps, accumulate, keep, log_every, evaluate_every, checkpoint_every, clip_norm)
    _check_company(evaluate, evaluate_every, stop, checkpoints, checkpoint_every)
    checkpoint_every = checkpoint_every or max(1, steps // 10)
    if checkpoints is not None and optimizer is not None:
        parameter_names(optimizer, model)  # others would be lost

    spot = place(model, optimizer, learning_rate, accelerator, mixed_precision)
    is_main = spot.process == 0
    stream = batch_stream(batches, spot.process, spot.processes)
    store = None if checkpoints is None else Checkpoints(checkpoints, keep)
    history = History()

    with contextlib.ExitStack() as stack:
        stack.callback(spot.leave)
        stack.enter_context(_modes_restored(spot.model))
        if not spot.model.training:
            spot.model.train()
        rates = stack.enter_context(_rates_restored(spot.optimizer))
        if seed is not None:
            stack.enter_context(seeded(seed if is_main else splitmix64(seed, spot.process)))
        if store is not None:
            _prepare(store, spot, steps, accumulate, resume, stream, history)
        reports: Sequence[Report] = ()
        if is_main:
            measured = history.metrics.get(history.steps)
            reports = stack.enter_context(open_reports(log, tensorboard, progress, steps, history.steps, measured))
        is_reported = log is not None or tensorboard is not None or progress
        ledger = _Ledger(spot, history, reports)

        if stop is not None:
            for metrics in history.metrics.values():
                history.stopped_early |= bool(stop(metrics))
        if (
            evaluate is not None
            and history.steps not in history.metrics
            and _is_due(history.steps, evaluate_every, steps)
        ):
            ledger.evaluated(_measure(evaluate, spot, history.steps))
            history.stopped_early |= stop is not None and bool(stop(history.metrics[history.steps]))

        spot.optimizer.zero_grad()  # what the caller may have left
        for step in range(history.steps, steps):
            if history.stopped_early:
                break
            if schedule is not None:
                factor = schedule(step)
                for group, rate in zip(spot.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor

            losses, scalars = [], []
            for part in range(accumulate):
                batch = spot.move(stream(step * accumulate + part))
                with spot.gathering(last=part == accumulate - 1):
                    with spot.autocast():
                        value, extra = _checked(loss(spot.model, batch))
                    spot.backward(value if accumulate == 1 else value / accumulate)
                losses.append(value.detach())
                scalars.append(extra)
            spot.update(clip_norm)

            history.steps = step + 1
            ledger.add(losses)
            if step % log_every == 0 or history.steps == steps:
                ledger.read()
                if is_reported:
                    ledger.trained(step, scalars)
            if evaluate is not None and _is_due(history.steps, evaluate_every, steps):
                ledger.read()  # a loss that is not finite is found before the model is evaluated
                ledger.evaluated(_measure(evaluate, spot, history.steps))
                history.stopped_early = stop is not None and bool(stop(history.metrics[history.steps]))
            if store is not None and (_is_due(history.steps, checkpoint_every, steps) or history.stopped_early):
                ledger.read()
                _save(store, spot, accumulate, stream, history)

        ledger.read()
        spot.wait()
    return history


class _Ledger:
    """Keeps the losses on the device until they are read, and passes on what there is to report."""

    def __init__(self, spot: Placement, history: History, reports: Sequence[Report]) -> None:
        self.spot, self.history, self.reports = spot, history, reports
        self.unread: list[Tensor] = []
        self.device = torch.device("cpu")
        self.before = history.seconds
        self.began = time.perf_counter()

    def add(self, losses: list[Tensor]) -> None:
        """Take the losses of one step's batches."""
        self.device = losses[0].device
        self.unread.append(losses[0] if len(losses) == 1 else torch.stack(losses).mean())

    def read(self) -> None:
        """Bring the losses to the host; the only place where it waits for the device."""
        self.history.seconds = self.before + time.perf_counter() - self.began
        if not self.unread:
            return
        values = self.spot.mean(torch.stack(self.unread)).tolist()
        self.unread.clear()
        for value in values:
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss of step {len(self.history.losses)} is {value}; lower the learning rate, clip the gradients "
                    "(clip_norm), or look at that step's batch"
                )
            self.history.losses.append(value)

    def trained(self, step: int, scalars: list[Mapping[str, Tensor | float]]) -> None:
        """Report a step whose loss has been read, with the scalars of its batches averaged; every process calls this."""
        names = list(scalars[0])
        means: list[float] = []
        if names:
            device = self.device
            if any(row.keys() != scalars[0].keys() for row in scalars):
                raise ValueError(f"loss must log the same names for every batch, got {[list(row) for row in scalars]}")
            rows = [torch.stack([_scalar(name, row[name], device) for name in names]) for row in scalars]
            means = self.spot.mean(torch.stack(rows).mean(dim=0)).tolist()
        record = {
            "loss": self.history.losses[step],
            "learning_rate": float(self.spot.optimizer.param_groups[0]["lr"]),
            "seconds": self.history.seconds,
            **dict(zip(names, means, strict=True)),
        }
        for report in self.reports:
            report.trained(step, record)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Take and report the metrics of the model as it is now."""
        self.read()
        self.history.metrics[self.history.steps] = metrics
        for report in self.reports:
            report.evaluated(self.history.steps, self.history.seconds, metrics)


def _measure(evaluate: Callable[[nn.Module, int], Mapping[str, float]], spot: Placement, step: int) -> dict[str, float]:
    with _modes_restored(spot.model), seeded(None), torch.no_grad():
        spot.model.eval()
        metrics = evaluate(spot.module, step)
    if not isinstance(metrics, Mapping):
        raise TypeError(f"evaluate must return a dict of numbers, got {type(metrics).__name__}")
    _check_names("evaluate", metrics, _EVALUATE_KEYS)
    return spot.from_main({name: _number(name, value) for name, value in metrics.items()})


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"evaluate must return a dict of numbers, got {name!r}: {value!r}") from error


def _prepare(
    store: Checkpoints,
    spot: Placement,
    steps: int,
    accumulate: int,
    resume: bool,
    stream: BatchStream,
    history: History,
) -> None:
    """Make the folder ready and bring everything to where the newest checkpoint was written."""
    newest = None
    if spot.process == 0:
        store.prepare()
        if resume:
            newest = store.newest()
    newest = spot.from_main(newest)
    state = check_tensors(spot.model_state())  # what cannot be stored is found before the first step
    if newest is None:
        return
    if newest > steps:
        raise ValueError(
            f"steps must reach the checkpoint in {store.folder}, got steps={steps} and step-{newest} there"
        )
    saved = store.read(newest)
    where = f"{store.folder}/step-{newest}"
    check_same_model(spot.from_main(outline(state)), outline(saved.model), where)
    check_same_run(_settings(spot, accumulate), saved.settings, where)
    spot.set_state(saved.model, saved.optimizer)
    spot.set_scaler_state(saved.notes["scaler"])
    own = saved.notes["processes"][spot.process]
    stream.move_to(own["position"])
    set_random_state(own["random_state"])
    history.losses = saved.losses
    history.metrics = dict(saved.notes["metrics"])
    history.steps = saved.step
    history.seconds = saved.notes["seconds"]
    store.continue_from(saved.step)


def _save(store: Checkpoints, spot: Placement, accumulate: int, stream: BatchStream, history: History) -> None:
    model, optimizer = spot.model_state(), spot.optimizer_state()
    processes = spot.from_all({"position": stream.position(), "random_state": random_state()})
    if spot.process == 0:
        notes = {
            "metrics": list(history.metrics.items()),
            "seconds": history.seconds,
            "scaler": spot.scaler_state(),
            "processes": processes,
        }
        store.write(Checkpoint(history.steps, model, optimizer, history.losses, _settings(spot, accumulate), notes))


def _settings(spot: Placement, accumulate: int) -> dict[str, int | str]:
    return {"processes": spot.processes, "accumulate": accumulate, "mixed_precision": spot.precision}


def _is_due(step: int, every: int | None, steps: int) -> bool:
    return step in (0, steps) or (every is not None and step % every == 0)


def _checked(result: LossResult) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    value, scalars = result if isinstance(result, tuple) and len(result) == 2 else (result, _NO_SCALARS)
    if not isinstance(scalars, Mapping):
        raise TypeError(
            f"loss must return a scalar tensor, or that and a dict, got {type(scalars).__name__} in its place"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a scalar tensor, or that and a dict, got {type(value).__name__}")
    if value.dim() != 0:
        raise ValueError(f"loss must return a scalar tensor, got shape {tuple(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss must depend on the model's parameters, got a tensor without gradient")
    if scalars:
        _check_names("loss", scalars, _TRAIN_KEYS)
    return value, scalars


_NO_SCALARS: Mapping[str, Tensor | float] = {}


def _scalar(name: str, value: Tensor | float, device: torch.device) -> Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"loss must log scalars, got {name!r}: {value!r}") from error
    if tensor.dim() != 0:
        raise ValueError(f"loss must log scalars, got {name!r} of shape {tuple(tensor.shape)}")
    return tensor


def _check_names(source: str, scalars: Mapping[str, Any], reserved: tuple[str, ...]) -> None:
    if taken := [name for name in scalars if name in reserved]:
        raise ValueError(f"{source} must not name its values {list(reserved)}, got {taken}")


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter with requires_grad, got none")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model must hold its parameters, got one on the meta device")


def _check_kinds(loss: object, optimizer: object, schedule: object, evaluate: object, stop: object) -> None:
    if not callable(loss):
        raise TypeError(f"loss must be a function of model and batch, got {type(loss).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    for name, value in {"schedule": schedule, "evaluate": evaluate, "stop": stop}.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, got {type(value).__name__}")


def _check_numbers(
    steps: int,
    accumulate: int,
    keep: int,
    log_every: int,
    evaluate_every: int | None,
    checkpoint_every: int | None,
    clip_norm: float | None,
) -> None:
    counts = {"steps": steps, "accumulate": accumulate, "keep": keep, "log_every": log_every}
    counts |= {} if evaluate_every is None else {"evaluate_every": evaluate_every}
    counts |= {} if checkpoint_every is None else {"checkpoint_every": checkpoint_every}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}: {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {name}={value}")
    if clip_norm is not None:
        check_positive(clip_norm=clip_norm)


def _check_company(
    evaluate: object, evaluate_every: object, stop: object, checkpoints: object, checkpoint_every: object
) -> None:
    for name, value, needed, given in (
        ("evaluate_every", evaluate_every, "evaluate", evaluate),
        ("stop", stop, "evaluate", evaluate),
        ("checkpoint_every", checkpoint_every, "checkpoints", checkpoints),
    ):
        if value is not None and given is None:
            raise ValueError(f"{name} needs {needed}, got {name}={value!r} and {needed}=None")


@contextlib.contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _rates_restored(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """Give the groups' learning rates and set them again at the end; loading a state makes new groups in between."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
