"""Base models that several arms or runs share: trained once, then read from a folder.

An entry is a safetensors file named after the model and a hash of everything that could change it: the settings given and
the versions of PyTorch and Headgate. It is written whole or not at all, carries a digest of its contents, and is made by one
process at a time: whoever asks meanwhile waits. A damaged entry is reported and made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import headgate
from headgate.errors import DataError, HeadgateError
from headgate.files import atomic_path
from headgate.train.checkpoints import check_same_model
from headgate.train.tensor_files import read_tensors, separate, tensor_digest, write_tensors

__all__ = ["base_model", "cache_folder"]

Model = TypeVar("Model", bound=nn.Module)


def cache_folder() -> Path:
    """The folder of cached models: ``$HEADGATE_CACHE``, otherwise ``headgate`` in the user's cache folder."""
    if named := os.environ.get("HEADGATE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headgate"


def base_model(
    name: str, build: Callable[[], Model], train: Callable[[Model], None], settings: Mapping[str, Any]
) -> tuple[Model, float]:
    """Give a trained model, from the cache where it has been trained before.

    Args:
        name: of the model: letters, digits, ``-``, ``_`` and ``.``.
        build: makes the untrained model; must be cheap.
        train: trains it in place.
        settings: everything that decides what comes out (seed, sizes, steps, a version of the recipe): strings, numbers,
            booleans and lists or dicts of them.

    Returns:
        The model, in evaluation mode, and the seconds that its training took when it was made.

    Raises:
        TypeError: ``settings`` holds something that JSON cannot.
        ValueError: ``name`` holds other characters.
        HeadgateError: the cache folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name must be letters, digits, '-', '_' and '.', got {name!r}")
    key = {"settings": dict(settings), "torch": torch.__version__, "headgate": headgate.__version__}
    try:
        text = json.dumps(key, sort_keys=True)
    except TypeError as error:
        raise TypeError(f"settings must hold what JSON can: {error}") from error
    path = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"

    model = build()
    with _sole_maker(path):
        seconds = _read(path, model)
        if seconds is None:
            began = time.perf_counter()
            train(model)
            seconds = time.perf_counter() - began
            _write(path, model, seconds)
    return model.eval(), seconds


def _write(path: Path, model: nn.Module, seconds: float) -> None:
    tensors = separate(model.state_dict())
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, {"seconds": repr(seconds), "digest": tensor_digest(tensors)})


def _read(path: Path, model: nn.Module) -> float | None:
    """Load the entry into ``model``; ``None`` where there is none, or a damaged one."""
    if not path.exists():
        return None
    from safetensors import safe_open

    try:
        tensors = read_tensors(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("digest") != tensor_digest(tensors):
            raise DataError(f"{path} does not have the digest that it names")
        check_same_model(model.state_dict(), tensors, str(path))
        seconds = float(metadata["seconds"])
    except (DataError, KeyError, ValueError) as error:
        warnings.warn(f"damaged cache entry is made anew: {error}", RuntimeWarning, stacklevel=4)
        return None
    model.load_state_dict(tensors)
    return seconds


@contextlib.contextmanager
def _sole_maker(path: Path) -> Iterator[None]:
    """Hold the entry's lock; the system lets go of it when a process dies, so none is ever left behind."""
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")  # noqa: SIM115
    except OSError as error:
        raise HeadgateError(
            f"cannot write the cache folder {path.parent}: {error.strerror}; set HEADGATE_CACHE to another"
        ) from error
    with file:
        try:
            import fcntl
        except ImportError:  # without advisory locks two processes may both train; each still writes a whole file
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
