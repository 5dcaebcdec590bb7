"""Base models that are trained once and kept: several arms of an experiment start from the same one.

A cached model is one safetensors file, named after the model, its settings and the versions of what computed it. The file's
metadata holds the training time and the SHA-256 of the tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from headgate import __version__
from headgate.errors import DataError, HeadgateError
from headgate.files import atomic_path
from headgate.train.checkpoints import check_same_model, outline
from headgate.train.placement import one_process
from headgate.train.seeds import seeded
from headgate.train.tensor_files import read_tensors, separate, tensor_digest, write_tensors

__all__ = ["base_model", "cache_folder"]

Model = TypeVar("Model", bound=nn.Module)


def base_model(
    name: str,
    build: Callable[[], Model],
    train: Callable[[Model], object],
    settings: Mapping[str, Any] | object,
) -> tuple[Model, float]:
    """Give a trained base model: train it the first time, read it from the cache afterwards.

    ``build`` and ``train`` run with the global random generators seeded from name and settings, and leave them as they were,
    so what comes afterwards is the same whether the model was cached or not. Processes that ask for the same model at
    the same time wait for the one that trains it; the lock is the operating system's and goes with its process, so a killed
    one never blocks the others.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        build: makes the untrained model.
        train: trains it in place; what it returns is not looked at. Where several processes were launched, ``fit`` inside
            it trains in one of them alone, while the others wait.
        settings: everything that decides what comes out, as JSON can hold it, or a dataclass of such. When the code of
            ``build`` or ``train`` changes, something in here (a revision number) has to change, too.

    Returns:
        The model in evaluation mode, on the device where ``build`` makes it, and the seconds that its training took when it
        was made.

    Raises:
        TypeError: ``settings`` cannot be written as JSON.
        ValueError: ``name`` holds other characters.
        HeadgateError: the cache folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name must consist of letters, digits, '.', '_' and '-', got {name!r}")
    described = _describe(settings)
    path = cache_folder() / "base" / f"{name}-{_short_hash(described)}-{_short_hash(_versions())}.safetensors"
    seed = int.from_bytes(hashlib.sha256(f"{name}\0{described}".encode()).digest()[:4])

    with seeded(seed):
        model = build()
    seen = _stamp(path)
    seconds = _load(path, model)
    if seconds is None:
        with _lock(path.with_suffix(".lock")):
            if _stamp(path) != seen:  # another process trained it while this one waited
                seconds = _load(path, model)
            if seconds is None:
                _make(path, build, train, seed)
                seconds = _load(path, model)
        if seconds is None:
            raise HeadgateError(f"{path} was damaged while it was written; look at the disk, then run again")
    return model.eval(), seconds


def cache_folder() -> Path:
    """Give the folder for what can be computed again: ``$HEADGATE_CACHE``, or the platform's cache folder."""
    if chosen := os.environ.get("HEADGATE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "headgate" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "headgate"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headgate"


def _make(path: Path, build: Callable[[], Model], train: Callable[[Model], object], seed: int) -> None:
    with seeded(seed), one_process():  # the others wait, and cannot take part
        model = build()
        began = time.perf_counter()
        train(model)
        seconds = time.perf_counter() - began
    tensors = separate(model.state_dict())
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {"seconds": repr(seconds), "sha256": tensor_digest(tensors)})


def _load(path: Path, model: nn.Module) -> float | None:
    """Fill the model from the file; give the training time, or ``None`` where there is no sound file."""
    if not path.exists():
        return None
    try:
        tensors, seconds = _read(path)
        check_same_model(outline(model.state_dict()), outline(tensors), str(path))
    except DataError as error:
        warnings.warn(f"cached base model is made again: {error}", RuntimeWarning, stacklevel=3)
        return None
    model.load_state_dict(tensors)
    return seconds


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tell one file at a path from the next one there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Tensor], float]:
    tensors = read_tensors(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("sha256") != tensor_digest(tensors):
        raise DataError(f"{path} does not have the checksum in its metadata")
    try:
        return tensors, float(metadata["seconds"])
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} does not say how long its training took") from error


def _describe(settings: Mapping[str, Any] | object) -> str:
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    if not isinstance(settings, Mapping):
        raise TypeError(f"settings must be a dict or a dataclass, got {type(settings).__name__}")
    try:
        return json.dumps(dict(settings), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise TypeError(f"settings must hold what JSON can hold: {error}") from error


def _versions() -> str:
    versions = (__version__, torch.__version__, np.__version__, platform.machine())
    return json.dumps([str(version) for version in versions])


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; waits for as long as another process holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115
    except OSError as error:
        raise HeadgateError(f"cannot write {path}: {error.strerror}; set HEADGATE_CACHE to another folder") from error
    with file:
        _acquire(file)
        yield  # closing the file releases the lock, as the end of the process does


if sys.platform == "win32":
    import msvcrt

    def _acquire(file: BinaryIO) -> None:
        while True:
            file.seek(0)
            try:
                # Tries for ten seconds, then raises.
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            except OSError:
                continue
            return

else:
    import fcntl

    def _acquire(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)
