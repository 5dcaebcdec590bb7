"""Named tensors in safetensors files, with the checksums that tell a damaged file from a sound one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headgate.errors import DataError

__all__ = ["check_tensors", "file_digest", "read_tensors", "separate", "tensor_digest", "write_tensors"]


def check_tensors(state: Mapping[str, object]) -> Mapping[str, Tensor]:
    """Check that a state dict holds tensors alone, as a safetensors file does.

    Raises:
        TypeError: an entry is something else, such as a module's extra state.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"model's state must hold tensors alone to be stored, {name!r} is a {type(value).__name__}")
    return cast(Mapping[str, Tensor], state)


def separate(state: Mapping[str, object]) -> dict[str, Tensor]:
    """Bring a state dict's tensors to the CPU, each contiguous and with storage of its own.

    Safetensors holds no shared storage, so tied weights are written once under every name.

    Args:
        state: name → tensor.

    Returns:
        The same names; what was on the CPU and alone in its storage is not copied.

    Raises:
        TypeError: an entry is no tensor.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in check_tensors(state).items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the tensors to ``path``, a temporary file that its caller moves into place."""
    # Empty metadata beside no tensors (SGD without momentum) would make a broken header.
    save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU, into memory of its own: the file may be removed afterwards.

    Raises:
        DataError: no safetensors file, or a truncated one.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no whole safetensors file: {error}") from error


def file_digest(path: Path) -> str:
    """Compute a file's SHA-256 as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of names, dtypes, shapes and contents, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
