"""What a frozen backbone gives to its exits, computed once: in memory, or in files that a training reads row by row.

Heads and gates need G · D numbers per input. An epoch on these takes a thousandth of the time of an epoch through the
backbone, so a data set that is trained on for many epochs, or for many λ, should pass the backbone once.

A folder of kept features holds three plain arrays in row order, which are mapped into memory and not read as a whole, and a
JSON file that says what they are::

    features.bin  (N, G, D)      logits.bin  (N, C)      target.bin  (N,)  int64      kept.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headgate.errors import DataError, HeadgateError
from headgate.methods.routing.jei_dnn.model import EarlyExit
from headgate.train import EpochBatches, epoch_batches
from headgate.validate import check_integer, check_positive

__all__ = ["KeptFeatures", "collect_features", "keep_features", "open_features"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FORMAT = 1


def collect_features(
    model: EarlyExit, *inputs: Tensor, batch_size: int = 256
) -> tuple[Float[Tensor, "n gates dim"], Float[Tensor, "n classes"]]:
    """Run a frozen backbone once, so that heads and gates can be trained on what it gives.

    Args:
        model: the network; it runs in evaluation mode.
        *inputs: tensors ``(N, ...)`` that the backbone is called with, in batches.
        batch_size: inputs at a time.

    Returns:
        Features ``(N, G, D)`` and final logits ``(N, C)``, the inputs of ``model.exits``, on the device of ``inputs``.

    Raises:
        ValueError: no input.
    """
    check_positive(batch_size=batch_size)
    if not inputs or len(inputs[0]) == 0:
        raise ValueError("inputs must hold at least one input, got none")
    with _frozen(model) as device:
        parts = [
            [tensor.to(inputs[0].device) for tensor in model.features(*(part.to(device) for part in chunk))]
            for chunk in zip(*(tensor.split(batch_size) for tensor in inputs), strict=True)
        ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


@dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Features in files, mapped into memory: rows are read when they are asked for.

    Attributes:
        features: ``(N, G, D)`` of the dtype that they were kept in.
        final_logits: ``(N, C)`` of the same.
        target: ``(N,)`` int64.
        exit_names: the blocks behind which the exits stood.
    """

    features: Float[Tensor, "n gates dim"]
    final_logits: Float[Tensor, "n classes"]
    target: Int[Tensor, " n"]
    exit_names: tuple[str, ...]

    def __len__(self) -> int:
        """N."""
        return len(self.target)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it in memory, in float32: features, final logits and target, as :meth:`JEITrainer.fit` takes them."""
        return self.features.float(), self.final_logits.float(), self.target.clone()

    def batches(self, batch_size: int, seed: int, device: torch.device | str | None = None) -> _KeptBatches:
        """Shuffled batches of those three for :meth:`JEITrainer.fit`, read from the files as they are needed.

        Args:
            batch_size: inputs per update, at most N.
            seed: of their order.
            device: where to bring them; default: the CPU.
        """
        rows = epoch_batches(torch.arange(len(self)), min(batch_size, len(self)), seed)
        return _KeptBatches(self, rows, device)


class _KeptBatches:
    """Rows of kept features by step."""

    def __init__(self, kept: KeptFeatures, rows: EpochBatches, device: torch.device | str | None) -> None:
        self.kept, self.rows, self.device = kept, rows, device

    @property
    def steps_per_epoch(self) -> int:
        return self.rows.steps_per_epoch

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        (rows,) = self.rows(step)
        kept = self.kept
        return (
            kept.features[rows].to(self.device, torch.float32),
            kept.final_logits[rows].to(self.device, torch.float32),
            kept.target[rows].to(self.device),
        )


def keep_features(
    model: EarlyExit,
    batches: Iterable[Sequence[Tensor]],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
) -> KeptFeatures:
    """Run a frozen backbone once over batches, and keep what it gives in a folder.

    Args:
        model: the network; it runs in evaluation mode.
        batches: each a sequence of tensors, all but the last of which the backbone is called with, and the last of which is
            the target ``(batch,)``; a ``DataLoader``, say. They are not held in memory.
        folder: a new folder, which appears when all is written, or not at all.
        dtype: of features and logits in the files: float32, float16 or bfloat16.

    Returns:
        The same as :func:`open_features`.

    Raises:
        TypeError: targets that are no integers.
        ValueError: another dtype, no batch, not one target per input, or a folder that exists.
        HeadgateError: the folder cannot be written.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"folder must not exist yet, got {folder}")
    temporary = _beside(folder)
    try:
        facts = _write(model, batches, temporary, dtype)
        text = json.dumps({"format": _FORMAT, "dtype": name, "exit_names": list(model.exit_names), **facts}, indent=2)
        (temporary / "kept.json").write_text(text, encoding="utf-8")
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise HeadgateError(
            f"cannot write {folder}: {error.strerror or error}; make room or choose another folder, then run again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_features(folder)


def open_features(folder: str | os.PathLike[str]) -> KeptFeatures:
    """Open what :func:`keep_features` wrote.

    Raises:
        DataError: no such folder, a missing file, or one of another length than ``kept.json`` says.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / "kept.json").read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise DataError(f"{folder} must hold kept features of format {_FORMAT}, found {facts['format']!r}")
        dtype = _DTYPES[facts["dtype"]]
        rows, gates, dim, classes = (int(facts[name]) for name in ("rows", "gates", "dim", "classes"))
        names = tuple(str(name) for name in facts["exit_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no kept features, as keep_features writes them: {error!r}") from error
    return KeptFeatures(
        _map(folder / "features.bin", (rows, gates, dim), dtype),
        _map(folder / "logits.bin", (rows, classes), dtype),
        _map(folder / "target.bin", (rows,), torch.int64),
        names,
    )


@contextlib.contextmanager
def _frozen(model: EarlyExit) -> Iterator[torch.device]:
    """Evaluation mode without gradients inside the block; gives the model's device."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for part, training in modes:
            part.training = training


def _write(model: EarlyExit, batches: Iterable[Sequence[Tensor]], folder: Path, dtype: torch.dtype) -> dict[str, int]:
    """Append every batch to the three files; how many rows there were, and of what shape."""
    rows = 0
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(_frozen(model))
        files = [stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in ("features", "logits", "target")]
        for *inputs, target in batches:
            check_integer("target", target)
            features, logits = model.features(*(tensor.to(device) for tensor in inputs))
            if target.shape != (len(features),):
                raise ValueError(f"target must have shape ({len(features)},), one per input, got {tuple(target.shape)}")
            parts = (features.to(dtype), logits.to(dtype), target.long())
            for file, part in zip(files, parts, strict=True):
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            rows += len(target)
    if not rows:
        raise ValueError("batches must hold at least one input, got none")
    return {"rows": rows, "gates": features.shape[1], "dim": features.shape[2], "classes": logits.shape[1]}


def _beside(folder: Path) -> Path:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise HeadgateError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


def _map(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel()
    expected = size * dtype.itemsize
    found = path.stat().st_size if path.is_file() else 0
    if found != expected or size <= 0:
        raise DataError(f"{path} must hold {expected} bytes for {shape} of {dtype}, found {found}")
    # A private map: what is written to the tensor does not reach the file.
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)
