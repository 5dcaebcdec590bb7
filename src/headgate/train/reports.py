"""What a run reports while it goes: a log of JSON lines, TensorBoard, a progress display.

A log line is ``{"kind": "train", "step": s, "loss": …, "learning_rate": …, "seconds": …, …}`` for the loss of step s (the
model after s updates), or ``{"kind": "evaluate", "step": s, "seconds": …, …}`` for metrics of the model after s updates.
Numbers that are not finite stand as ``null``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from headgate.errors import HeadgateError, MissingExtraError
from headgate.files import write_text
from headgate.train.progress import open_progress

__all__ = ["Report", "open_reports"]


class Report(Protocol):
    """Something that wants to hear how a run goes."""

    def trained(self, step: int, record: Mapping[str, float]) -> None:
        """Hear a step's ``loss``, ``learning_rate``, ``seconds`` and the scalars that the loss gave."""

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Hear the metrics of the model after ``step`` updates."""

    def close(self) -> None:
        """The run is over, well or not."""


@contextlib.contextmanager
def open_reports(
    log: str | os.PathLike[str] | None,
    tensorboard: str | os.PathLike[str] | None,
    progress: bool,
    steps: int,
    start: int,
    metrics: Mapping[str, float] | None = None,
) -> Iterator[list[Report]]:
    """Open the reports that were asked for, and close them when the block ends.

    Args:
        log: file of JSON lines.
        tensorboard: folder for TensorBoard.
        progress: show how far the run is.
        steps: length of the run.
        start: steps done before; what was reported about later ones is taken back.
        metrics: those measured at ``start`` already, where there are any.

    Raises:
        HeadgateError: a file cannot be written.
        MissingExtraError: tensorboard is not installed.
    """
    with contextlib.ExitStack() as stack:
        reports: list[Report] = []
        if log is not None:
            reports.append(_JsonLines(log, start))
            stack.callback(reports[-1].close)
        if tensorboard is not None:
            reports.append(_TensorBoard(tensorboard, start, metrics or {}))
            stack.callback(reports[-1].close)
        if progress:
            reports.append(_ShownProgress(steps, start))
            stack.callback(reports[-1].close)
        yield reports


class _JsonLines:
    """A log file with one JSON object a line, flushed line by line.

    Args:
        path: lines about steps that a run from ``start`` will report again are cut; so is a last line that is broken off.
        start: steps done before; 0 begins the file anew.
    """

    def __init__(self, path: str | os.PathLike[str], start: int) -> None:
        path = Path(path)
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise HeadgateError(f"cannot read the log {path}: {error}; choose another file") from error
        kept = "".join(line for line in before.splitlines(keepends=True) if start > 0 and _is_before(line, start))
        write_text(path, kept)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def trained(self, step: int, record: Mapping[str, float]) -> None:
        self._write({"kind": "train", "step": step, **record})

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        self._write({"kind": "evaluate", "step": step, "seconds": seconds, **metrics})

    def close(self) -> None:
        self.file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        except OSError as error:
            raise HeadgateError(f"cannot write the log {self.file.name}: {error.strerror}; make room") from error


class _TensorBoard:
    """TensorBoard scalars ``train/…`` and ``evaluate/…``."""

    def __init__(self, folder: str | os.PathLike[str], start: int, metrics: Mapping[str, float]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "tensorboard", "fit(tensorboard=…)") from error
        try:
            self.writer = SummaryWriter(str(folder), purge_step=start or None)
        except OSError as error:
            raise HeadgateError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
        if start > 0:
            # Purging takes back everything from `start` on, the evaluation before the checkpoint included.
            self.evaluated(start, 0.0, metrics)

    def trained(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "seconds":
                self.writer.add_scalar(f"train/{name}", value, step)

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(f"evaluate/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _ShownProgress:
    """The progress display as a report."""

    def __init__(self, steps: int, start: int) -> None:
        self.display = open_progress(steps, start)

    def trained(self, step: int, record: Mapping[str, float]) -> None:
        self.display.show(step + 1, record["loss"])

    def evaluated(self, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """The display shows the loss alone."""

    def close(self) -> None:
        self.display.close()


def _is_before(line: str, start: int) -> bool:
    """Tell whether a line stays when a run goes on after ``start`` steps: the loss of step ``start`` comes anew."""
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (ValueError, KeyError, TypeError):
        return False
    return line.endswith("\n") and (step < start or (step == start and record.get("kind") == "evaluate"))
