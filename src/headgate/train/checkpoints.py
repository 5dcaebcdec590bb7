"""Checkpoints: one folder each, written whole or not at all, checked before it is used, nothing pickled.

``step-<n>/`` holds the state after n steps: ``model.safetensors``, ``optimizer.safetensors`` (entries named
``<entry>/<parameter>``), ``history.safetensors`` (the losses so far), ``state.json`` (everything that is no tensor) and
``manifest.json`` (the SHA-256 of each of the others). It is written under a temporary name, flushed to the disk and then
renamed, so a crash at any moment leaves the checkpoints that were there before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from headgate.errors import DataError, HeadgateError
from headgate.train.optimizer_state import OptimizerState
from headgate.train.tensor_files import file_digest, read_tensors, separate, write_tensors
from headgate.validate import check_positive

__all__ = ["Checkpoint", "Checkpoints", "check_same_model", "check_same_run", "outline"]

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on from ``step`` as if it had never stopped.

    Attributes:
        step: steps done.
        model: the model's state dict.
        optimizer: the optimizer's state by parameter name.
        losses: the loss of every step so far.
        settings: how the run is set up (processes, accumulation, precision); a run that differs cannot go on exactly.
        notes: whatever else JSON can hold: metrics, seconds, random states, positions in the data.
    """

    step: int
    model: Mapping[str, Any]
    optimizer: OptimizerState
    losses: list[float]
    settings: Mapping[str, int | str]
    notes: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: made when missing.
        keep: how many of the newest stay, ≥ 1.

    Raises:
        ValueError: ``keep`` is below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        check_positive(keep=keep)
        self.folder = Path(folder)
        self.keep = keep
        self._line: list[int] = []

    def prepare(self) -> None:
        """Make the folder, see that it can be written, and clear away what an interrupted write left.

        Raises:
            HeadgateError: it cannot be made or written.
        """
        with _mendable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".probe."):
                pass
            for left in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(left, ignore_errors=True)

    def steps(self) -> list[int]:
        """Give the steps of all checkpoints there, sound or not, in rising order."""
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def newest(self) -> int | None:
        """Find the newest sound checkpoint, with one warning for each that is damaged.

        Returns:
            Its step, or ``None`` where there is none.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                self._verify(step)
            except DataError as error:
                warnings.warn(f"damaged checkpoint passed over: {error}", RuntimeWarning, stacklevel=3)
            else:
                return step
        if steps:
            warnings.warn(f"no sound checkpoint in {self.folder}: starting from step 0", RuntimeWarning, stacklevel=3)
        return None

    def continue_from(self, step: int) -> None:
        """Say that this run goes on from ``step``: that checkpoint and older ones are its own, newer ones are not."""
        self._line = [other for other in self.steps() if other <= step]

    def read(self, step: int) -> Checkpoint:
        """Read one checkpoint; call :meth:`newest` first, which verifies it.

        Raises:
            DataError: it is missing or damaged.
        """
        path = self._path(step)
        state = _read_json(path / "state.json")
        if state.get("format") != _FORMAT:
            raise DataError(f"{path} has format {state.get('format')}, this version reads {_FORMAT}")
        optimizer: OptimizerState = state["optimizer"]
        for key, tensor in read_tensors(path / "optimizer.safetensors").items():
            entry, name = key.split("/", 1)
            optimizer["state"].setdefault(name, {})[entry] = tensor
        losses = read_tensors(path / "history.safetensors")["losses"].tolist()
        model = read_tensors(path / "model.safetensors")
        return Checkpoint(step, model, optimizer, losses, state["settings"], state["notes"])

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whole or not at all, and remove those that are no longer kept.

        Raises:
            HeadgateError: the folder cannot be written or the disk is full; older checkpoints stay.
            TypeError: the state holds something other than tensors, numbers, strings and lists of them.
        """
        tensors, optimizer = _split_optimizer(checkpoint.optimizer)
        state = {
            "format": _FORMAT,
            "step": checkpoint.step,
            "settings": dict(checkpoint.settings),
            "notes": dict(checkpoint.notes),
            "optimizer": optimizer,
        }
        with _atomic_folder(self._path(checkpoint.step)) as folder:
            write_tensors(folder / "model.safetensors", separate(checkpoint.model))
            write_tensors(folder / "optimizer.safetensors", separate(tensors))
            losses = torch.tensor(checkpoint.losses, dtype=torch.float64)
            write_tensors(folder / "history.safetensors", {"losses": losses})
            (folder / "state.json").write_text(json.dumps(state))
            digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            (folder / "manifest.json").write_text(json.dumps({"sha256": digests}, indent=1))
        self._line.append(checkpoint.step)
        for step in set(self.steps()) - set(self._line[-self.keep :]):
            _remove(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _verify(self, step: int) -> None:
        path = self._path(step)
        digests = _read_json(path / "manifest.json").get("sha256")
        if not isinstance(digests, dict) or "state.json" not in digests:
            raise DataError(f"{path / 'manifest.json'} lists no checksums")
        for name, digest in digests.items():
            if not (path / name).is_file():
                raise DataError(f"{path / name} is missing")
            try:
                found = file_digest(path / name)
            except OSError as error:
                raise DataError(f"{path / name} cannot be read: {error.strerror}") from error
            if found != digest:
                raise DataError(f"{path / name} does not have the checksum of manifest.json")


def outline(state: Mapping[str, Any]) -> dict[str, str]:
    """Describe a state dict: name → dtype and shape, e.g. ``"float32 (64, 2)"``."""
    return {
        name: f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
        if isinstance(value, Tensor)
        else type(value).__name__
        for name, value in state.items()
    }


def check_same_model(expected: Mapping[str, str], stored: Mapping[str, str], where: str) -> None:
    """Check that a stored state dict is one of this model: the same names, shapes and dtypes.

    Args:
        expected: the outline of the model's own state dict.
        stored: the outline of the one that was read.
        where: the file's or folder's path, for the message.

    Raises:
        DataError: it is another model's; the message names up to three differences.
    """
    differences = [f"{name} is missing" for name in expected if name not in stored]
    differences += [f"{name} is unknown" for name in stored if name not in expected]
    differences += [
        f"{name} is {stored[name]}, the model's is {expected[name]}"
        for name in expected
        if name in stored and stored[name] != expected[name]
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise DataError(f"{where} holds another model: {'; '.join(differences[:3])}{more}")


def check_same_run(expected: Mapping[str, int | str], stored: Mapping[str, int | str], where: str) -> None:
    """Check that a checkpoint was written by a run set up in the same way.

    Raises:
        DataError: a setting differs.
    """
    for name, value in expected.items():
        if stored.get(name) != value:
            raise DataError(f"{where} was written with {name}={stored.get(name)}, this run has {name}={value}")


def _split_optimizer(optimizer: OptimizerState) -> tuple[dict[str, Tensor], OptimizerState]:
    """Part the tensors, named ``<entry>/<parameter>``, from what JSON can hold."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for name, entries in optimizer["state"].items():
        others[name] = {}
        for entry, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{entry}/{name}"] = value
            else:
                others[name][entry] = _plain(f"state {entry!r}", value)
    groups = [
        {key: _plain(f"setting {key!r}", value) for key, value in group.items() if key != "lr"}
        for group in optimizer["param_groups"]
    ]
    return tensors, {"kind": optimizer["kind"], "state": others, "param_groups": groups}


def _plain(what: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(what, item) for item in value]
    raise TypeError(
        f"optimizer's {what} must be a tensor, number, string or list to be stored, got {type(value).__name__}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object")
    return content


@contextlib.contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    temporary = None
    try:
        with _mendable(path):
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            os.chmod(temporary, 0o755)
            _flush(temporary)
            if path.exists():
                _remove(path)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows gives no handle on a folder
    # Windows flushes only what is open for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Rename first, so that no half-removed checkpoint is ever seen under its own name."""
    with _mendable(path):
        doomed = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        os.replace(path, doomed / path.name)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _mendable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HeadgateError(
            f"cannot write {path}: {reason}; make room or choose another folder, then run again"
        ) from error
