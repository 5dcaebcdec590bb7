"""Features of a model over a data set, their file, and the split that every selection respects.

A feature file is a safetensors file: float16 on disk, memory-mapped when it is opened, float32 in use. Anything that
reads safetensors can read it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from headgate.errors import DataError
from headgate.evaluate.checks import Array, as_labels, as_seed, check_finite
from headgate.files import atomic_path

__all__ = ["FeatureWriter", "Features", "Split"]

_HEADER_BYTES = 1 << 16
_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64}


@dataclass(frozen=True)
class Features:
    """Features of N items, with their labels, ids and how they came about.

    Attributes:
        X: ``(N, d)``; ``(N, ...)`` where nothing was pooled. A memory map in float16 after :meth:`open`.
        y: ``(N,)`` integer labels, or ``(N, ...)`` targets; ``None`` without labels.
        ids: ``(N,)`` unique integers.
        meta: layer, pooling, preprocessing, normalisation, dtype.
    """

    X: np.ndarray
    y: np.ndarray | None
    ids: Int[np.ndarray, " n"]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.X, np.ndarray) or self.X.ndim < 2 or 0 in self.X.shape:
            shape = getattr(self.X, "shape", type(self.X).__name__)
            raise ValueError(f"X must be a NumPy array of shape (n, dim), none of them 0, got {shape}")
        if self.y is not None and len(self.y) != len(self.X):
            raise ValueError(f"y must have one entry per row of X: expected {len(self.X)}, got {len(self.y)}")
        ids = as_labels("ids", self.ids, length=len(self.X))
        if len(np.unique(ids)) != len(ids):
            raise ValueError("ids must be unique, got a repeated id")

    def __len__(self) -> int:
        return len(self.X)

    def rows(self, index: Any) -> Float[np.ndarray, "n dim"]:
        """Return the rows that ``index`` (a slice or integers) picks, in float32 or wider."""
        picked = np.asarray(self.X[index])
        return picked.astype(np.float32) if picked.dtype.itemsize < 4 else picked

    def select(self, index: Int[np.ndarray, " m"]) -> Features:
        """Return the items that ``index`` picks, in its order."""
        return Features(self.rows(index), None if self.y is None else self.y[index], self.ids[index], self.meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the features to one file, in float16, whole or not at all.

        Raises:
            ValueError: a value is not finite or beyond the range of float16 (±65504); its row is named.
            HeadgateError: the file cannot be written.
        """
        with FeatureWriter(path) as writer:
            step = max(1, (1 << 24) // self.X[0].size)
            for start in range(0, len(self.X), step):
                writer.append(np.asarray(self.X[start : start + step]))
            writer.finish(self.y, self.ids, self.meta)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Features:
        """Open a feature file; ``X`` stays on disk and is read where it is used.

        Raises:
            DataError: no such file, or not a whole feature file.
        """
        return _open(Path(path))


@dataclass(frozen=True)
class Split:
    """Rows for training, for choosing and for testing; no row is in two of them.

    Everything that is fitted uses ``train``, everything that is chosen (C, k, thresholds, PCA, whitening, the layer)
    uses ``train`` and ``val``, and ``test`` is looked at once.

    Attributes:
        train: row numbers, at least one.
        val: row numbers; may be empty, and then choices are made by cross-validation inside ``train``.
        test: row numbers, at least one.
    """

    train: Int[np.ndarray, " train"]
    val: Int[np.ndarray, " val"]
    test: Int[np.ndarray, " test"]

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            index = np.asarray(getattr(self, name))
            if index.size == 0:
                index = index.astype(np.int64).reshape(-1)
            if index.ndim != 1 or index.dtype.kind not in "iu":
                raise TypeError(f"{name} must hold row numbers, got {index.dtype} of shape {index.shape}")
            if index.size and index.min() < 0:
                raise ValueError(f"{name} must hold row numbers of at least 0, got {index.min()}")
            if index.size == 0 and name != "val":
                raise ValueError(f"{name} must hold at least one row, got none")
            object.__setattr__(self, name, index.astype(np.int64))
        together = np.concatenate([self.train, self.val, self.test])
        values, counts = np.unique(together, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"train, val and test must share no row, got row {values[counts > 1][0]} twice")

    def check(self, num_rows: int) -> None:
        """Check that every row number is below ``num_rows``.

        Raises:
            ValueError: one is not.
        """
        largest = int(max(index.max() for index in (self.train, self.val, self.test) if index.size))
        if largest >= num_rows:
            raise ValueError(f"split must hold rows below n={num_rows}, got {largest}")

    @classmethod
    def random(cls, labels: Int[Array, " n"], *, val: float = 0.2, test: float = 0.2, seed: int = 0) -> Split:
        """Draw a split that keeps the shares of the classes.

        Args:
            labels: ``(N,)`` integers. Of each class, ``round(test * count)`` rows go to the test set and
                ``round(val * count)`` to the validation set.
            val: share in [0, 1).
            test: share in (0, 1); at least one class must be large enough to give a row.
            seed: of the draw.

        Raises:
            TypeError: labels are not integers.
            ValueError: shares outside their range, or nothing left to train or test on.
        """
        classes = as_labels("labels", labels)
        if not (0 <= val < 1 and 0 < test < 1 and val + test < 1):
            raise ValueError(f"val and test must be shares that leave something to train on, got {val} and {test}")
        generator = np.random.default_rng(as_seed("seed", seed))
        parts: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
        for label in np.unique(classes):
            members = generator.permutation(np.flatnonzero(classes == label))
            tests, vals = round(test * len(members)), round(val * len(members))
            parts["test"].append(members[:tests])
            parts["val"].append(members[tests : tests + vals])
            parts["train"].append(members[tests + vals :])
        return cls(**{name: np.sort(np.concatenate(rows)) for name, rows in parts.items()})


class FeatureWriter:
    """Writes a feature file batch by batch; used as a context, it appears whole at the end of the block or not at all.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._stack = contextlib.ExitStack()
        self._path = path
        self._shape: tuple[int, ...] = ()
        self._finished = False

    def __enter__(self) -> FeatureWriter:
        temporary = self._stack.enter_context(atomic_path(self._path))
        self._file = self._stack.enter_context(open(temporary, "wb"))
        # The header names the number of rows, which is known at the end only: its room is kept free.
        self._file.write(b" " * _HEADER_BYTES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._finished:
            unfinished = RuntimeError("FeatureWriter must be finished before its block ends")
            self._stack.__exit__(RuntimeError, unfinished, None)
            raise unfinished
        self._stack.__exit__(kind, error, trace)

    def append(self, block: np.ndarray) -> None:
        """Write ``(b, ...)`` further rows.

        Raises:
            ValueError: another row shape than before, or a value that float16 cannot hold (its row is named).
        """
        done = self._shape[0] if self._shape else 0
        if self._shape and block.shape[1:] != self._shape[1:]:
            raise ValueError(f"block must have rows of shape {self._shape[1:]}, got {block.shape[1:]}")
        check_finite("X", block, first_row=done)
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(block, dtype=np.float16)
        check_finite("X in float16 (at most 65504)", half, first_row=done)
        self._file.write(half.tobytes())
        self._shape = (done + len(block), *block.shape[1:])

    def finish(self, y: np.ndarray | None, ids: Int[np.ndarray, " n"], meta: Mapping[str, Any]) -> None:
        """Write labels, ids and the header.

        Raises:
            TypeError: labels that are neither integers nor floats.
            ValueError: no row, lengths that differ, or a ``meta`` too long for the header.
        """
        if not self._shape:
            raise ValueError("X must have at least one row, got none")
        tensors: dict[str, Any] = {"__metadata__": {"format": "headgate-features", "meta": json.dumps(dict(meta))}}
        end = 2 * int(np.prod(self._shape, dtype=np.int64))
        tensors["X"] = {"dtype": "F16", "shape": list(self._shape), "data_offsets": [0, end]}
        for name, values in (("y", y), ("ids", ids)):
            if values is None:
                continue
            if len(values) != self._shape[0]:
                raise ValueError(f"{name} must have one entry per row: expected {self._shape[0]}, got {len(values)}")
            stored = values.astype(np.int64) if values.dtype.kind in "iu" else values
            codes = [code for code, dtype in _DTYPES.items() if dtype == stored.dtype]
            if not codes:
                raise TypeError(f"{name} must hold integers or floats, got {values.dtype}")
            self._file.write(np.ascontiguousarray(stored).tobytes())
            tensors[name] = {
                "dtype": codes[0],
                "shape": list(stored.shape),
                "data_offsets": [end, end + stored.nbytes],
            }
            end += stored.nbytes
        header = json.dumps(tensors).encode()
        if len(header) > _HEADER_BYTES - 8:
            raise ValueError(f"meta must fit the file's header of {_HEADER_BYTES} bytes, got {len(header)}")
        self._file.seek(0)
        self._file.write((_HEADER_BYTES - 8).to_bytes(8, "little") + header)
        self._file.flush()
        self._finished = True


def _open(path: Path) -> Features:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = json.loads(file.read(_HEADER_BYTES)[8:])
            metadata = header.pop("__metadata__")
            if metadata["format"] != "headgate-features":
                raise DataError(f"{path} is not a feature file")
            arrays: dict[str, np.ndarray] = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                if _HEADER_BYTES + end > size:
                    raise DataError(f"{path} is cut short: it holds {size} of at least {_HEADER_BYTES + end} bytes")
                if name == "X":
                    continue
                file.seek(_HEADER_BYTES + begin)
                flat = np.frombuffer(file.read(end - begin), dtype=_DTYPES[entry["dtype"]])
                arrays[name] = flat.reshape(entry["shape"])
        shape = tuple(header["X"]["shape"])
        mapped = np.memmap(path, dtype=np.float16, mode="r", offset=_HEADER_BYTES, shape=shape)
        return Features(mapped, arrays.get("y"), arrays["ids"], json.loads(metadata["meta"]))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole feature file: {error}") from error
