"""One cell of a claim's grid (an arm with a seed) and the files that keep finished cells.

A cell file is JSON, written whole or not at all, with a SHA-256 over its contents and the fingerprint of the code and
settings that made it. A file that is damaged is set aside and measured again; one of another fingerprint is measured
again in its place.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headgate.errors import ClaimError
from headgate.files import write_text
from headgate.measurement import Curve, Measurement

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Cell", "CellRecord", "CellStore"]

FORMAT = 1
STALE_CELL = "made by other code or settings"


@dataclass(frozen=True, order=True)
class Cell:
    """An arm of a claim, measured with one seed at one scale."""

    slug: str
    scale: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.slug} [{self.scale}] {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class CellRecord:
    """A finished cell: what was measured and how long it took (seconds)."""

    cell: Cell
    fingerprint: str
    metrics: Mapping[str, float | None]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    notes: Mapping[str, float | int | str] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    base_seconds: float = 0.0

    @classmethod
    def of(cls, cell: Cell, fingerprint: str, measurement: Measurement, seconds: float) -> CellRecord:
        """The record of ``measurement``; a metric that is not finite is kept as ``None`` (undefined)."""
        return cls(
            cell=cell,
            fingerprint=fingerprint,
            metrics={name: _number(value) for name, value in measurement.metrics.items()},
            curves=dict(measurement.curves),
            notes=dict(measurement.notes),
            pictures={name: _png(picture) for name, picture in measurement.pictures.items()},
            seconds=seconds,
            base_seconds=measurement.base_seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, with its checksum."""
        content = {"format": FORMAT, **asdict(self)}
        content["curves"] = {name: _curve_to_dict(curve) for name, curve in self.curves.items()}
        return {**content, "sha256": _checksum(content)}

    @classmethod
    def from_dict(cls, content: Any) -> CellRecord:
        """The record in ``content``.

        Raises:
            ValueError: it is no cell, or its checksum does not fit.
        """
        if not isinstance(content, dict) or "sha256" not in content:
            raise ValueError("is no cell file")
        content = dict(content)
        if content.pop("sha256") != _checksum(content):
            raise ValueError("has a checksum that does not fit its contents")
        if content.pop("format") != FORMAT:
            raise ValueError("is of another format")
        content["cell"] = Cell(**content["cell"])
        content["curves"] = {name: Curve(**curve) for name, curve in content["curves"].items()}
        return cls(**content)


class CellStore:
    """The folder of finished cells of one claim at one scale.

    Args:
        folder: where the cell files stand; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        """The file of ``cell``."""
        return self.folder / f"{cell.arm}-seed{cell.seed}.json"

    def tidy(self) -> None:
        """Remove what a write that was killed half-way left; only for a process that holds the folder alone."""
        if self.folder.is_dir():
            for left in self.folder.rglob(".*.tmp*"):
                left.unlink(missing_ok=True)

    def save(self, record: CellRecord) -> None:
        """Keep ``record``.

        Raises:
            HeadgateError: the folder cannot be written or the disk is full.
        """
        write_text(self.path(record.cell), json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n")

    def load(self, cell: Cell, fingerprint: str) -> tuple[CellRecord | None, str | None]:
        """Look for a finished ``cell``.

        Returns:
            The record, or ``None`` where it must be measured; and a sentence for the user where a file was set aside.

        Raises:
            ClaimError: the file cannot be read for a reason other than its contents.
        """
        path = self.path(cell)
        try:
            content = json.loads(path.read_bytes())
            record = CellRecord.from_dict(content)
            if record.cell != cell:
                raise ValueError(f"holds another cell ({record.cell})")
        except FileNotFoundError:
            return None, None
        except OSError as error:
            raise ClaimError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            aside = path.with_suffix(".corrupt")
            os.replace(path, aside)
            return None, f"{path} {_reason(error)}: set aside as {aside.name}; the cell is measured again"
        if record.fingerprint != fingerprint:
            return None, STALE_CELL
        return record, None


def _reason(error: Exception) -> str:
    return "is damaged (no valid JSON)" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)


def _number(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _curve_to_dict(curve: Curve) -> dict[str, Any]:
    return {**asdict(curve), "x": [float(x) for x in curve.x], "y": [_number(y) for y in curve.y]}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _png(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
