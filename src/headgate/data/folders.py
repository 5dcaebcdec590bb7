"""Where data sets lie that have to be supplied."""

from __future__ import annotations

import os
from pathlib import Path

from headgate.errors import DataError

__all__ = ["data_folder"]


def data_folder(name: str) -> Path:
    """The folder of a data set: ``$HEADGATE_<NAME>``, or ``data/<name>`` of ``$HEADGATE_SHARED``.

    Args:
        name: in lower case, such as ``"cifar10"`` or ``"cifar100"``.

    Raises:
        DataError: neither variable is set, or there is no such folder.
    """
    variable = f"HEADGATE_{name.upper()}"
    own, shared = os.environ.get(variable), os.environ.get("HEADGATE_SHARED")
    if own is None and shared is None:
        raise DataError(
            f"{name} was not found; set {variable} to its folder, or HEADGATE_SHARED to one with data/{name} in it"
        )
    folder = Path(own) if own is not None else Path(str(shared)) / "data" / name
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected the files of {name} in it")
    return folder
