"""The evidence file: what a claim's run measured, on what, and the verdict that follows.

JSON, one file per method and scale (``<slug>-<scale>.json``). ``evidence/`` holds the committed ones, and a wheel carries
them along; a run of one's own writes its evidence to the run folder. Fingerprints tell whether the code and the criteria
are still those that were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headgate.catalog import Method
from headgate.claims.cells import CellRecord
from headgate.claims.statistics import Interval
from headgate.claims.verdict import CriterionResult
from headgate.errors import ClaimError
from headgate.files import write_text
from headgate.measurement import Curve

__all__ = ["Evidence", "FailedCell", "claim_status", "default_evidence_folders", "find_evidence", "is_stale"]

FORMAT = 1
NOT_MEASURED = "not measured"
STALE = "stale"


@dataclass(frozen=True)
class FailedCell:
    """A cell that raised: its place in the grid, the error in one line, and the traceback (empty where a user can mend it)."""

    arm: str
    seed: int
    error: str
    traceback: str


@dataclass(frozen=True)
class Evidence:
    """Everything that a claim's run leaves behind.

    Attributes:
        slug: the method.
        scale: the scale it was measured at.
        verdict: the claim's verdict.
        criteria: the verdict per criterion, with effects and intervals.
        seeds: the seeds of the grid.
        cells: finished cells (their pictures left out; those stand beside the file).
        failed: cells that raised.
        fingerprint: of the method's room; ``quick`` and ``shared`` are explained in :mod:`headgate.claims.fingerprint`.
        versions: package → version.
        hardware: processor, cores, memory.
        jobs: processes that measured at the same time; ``threads`` in each.
        seconds: time of all cells together; the wall time is about this over ``jobs``.
        finished: date of the end, ``YYYY-MM-DD`` (UTC).
    """

    slug: str
    scale: str
    verdict: str
    criteria: Sequence[CriterionResult]
    seeds: Sequence[int]
    cells: Sequence[CellRecord]
    failed: Sequence[FailedCell]
    fingerprint: Mapping[str, str]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    jobs: int
    threads: int
    seconds: float
    finished: str
    pictures: Sequence[str] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        """Stem of the files that belong to this evidence."""
        return f"{self.slug}-{self.scale}"

    def table(self) -> dict[str, dict[int, Mapping[str, float | None]]]:
        """arm → seed → metrics."""
        table: dict[str, dict[int, Mapping[str, float | None]]] = {}
        for record in self.cells:
            table.setdefault(record.cell.arm, {})[record.cell.seed] = record.metrics
        return table

    def values(self, arm: str, metric: str) -> list[float]:
        """The values of ``metric`` that ``arm`` got, in the order of the seeds; undefined ones left out."""
        row = self.table().get(arm, {})
        found = [row[seed].get(metric) for seed in self.seeds if seed in row]
        return [value for value in found if value is not None]

    def curves(self, arm: str, name: str) -> list[Curve]:
        """The curves called ``name`` that ``arm`` got, one per seed."""
        return [record.curves[name] for record in self.cells if record.cell.arm == arm and name in record.curves]

    def measurements(self) -> dict[str, Any]:
        """What was measured, times left out: two undisturbed runs on one machine agree on it to the last bit."""
        content = self.to_dict()
        for key in ("seconds", "finished", "jobs"):
            content.pop(key)
        for cell in content["cells"]:
            cell.pop("seconds")
            cell.pop("base_seconds")
        return content

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        cells = []
        for record in self.cells:
            entry = record.to_dict()
            for key in ("format", "sha256", "pictures", "fingerprint"):
                entry.pop(key)
            cells.append({**entry.pop("cell"), **entry})
        for cell in cells:
            del cell["slug"], cell["scale"]
        content = {key: value for key, value in asdict(self).items() if key not in ("cells", "criteria")}
        criteria = [
            {
                **asdict(result),
                "effects": {str(k): v for k, v in result.effects.items()},
                "explained_by": list(result.explained_by),
            }
            for result in self.criteria
        ]
        lists = {"seeds": list(self.seeds), "pictures": list(self.pictures)}
        return {"format": FORMAT, **content, **lists, "criteria": criteria, "cells": cells}

    def write(self, folder: Path) -> Path:
        """Write the file into ``folder``, whole or not at all, and return its path."""
        path = folder / f"{self.name}.json"
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """Read an evidence file.

        Raises:
            ClaimError: it cannot be read, or is no evidence of this format.
        """
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            content["cells"] = [_cell(content["slug"], content["scale"], entry) for entry in content["cells"]]
            content["criteria"] = [_criterion(entry) for entry in content["criteria"]]
            content["failed"] = [FailedCell(**entry) for entry in content["failed"]]
            return cls(**content)
        except OSError as error:
            raise ClaimError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClaimError(f"{path} is no evidence file of this version of Headgate: {error}") from error


def _cell(slug: str, scale: str, entry: dict[str, Any]) -> CellRecord:
    from headgate.claims.cells import Cell

    entry = dict(entry)
    cell = Cell(slug, scale, entry.pop("arm"), entry.pop("seed"))
    entry["curves"] = {name: Curve(**curve) for name, curve in entry["curves"].items()}
    return CellRecord(cell=cell, fingerprint="", **entry)


def _criterion(entry: dict[str, Any]) -> CriterionResult:
    entry = dict(entry)
    entry["effects"] = {int(seed): effect for seed, effect in entry["effects"].items()}
    entry["interval"] = None if entry["interval"] is None else Interval(**entry["interval"])
    entry["explained_by"] = tuple(entry["explained_by"])
    return CriterionResult(**entry)


def default_evidence_folders() -> list[Path]:
    """Where evidence is looked for: runs of one's own first, then what Headgate ships."""
    package = Path(__file__).parent.parent
    folders = [Path("runs"), package / "_evidence", package.parent.parent / "evidence"]
    return [folder for folder in folders if folder.is_dir()]


def find_evidence(slug: str, scale: str, folders: Sequence[Path] | None = None) -> Evidence | None:
    """The first evidence of ``slug`` at ``scale`` in ``folders`` (default: :func:`default_evidence_folders`)."""
    for folder in default_evidence_folders() if folders is None else folders:
        path = folder / f"{slug}-{scale}.json"
        if path.exists():
            return Evidence.read(path)
    return None


def is_stale(method: Method, evidence: Evidence) -> bool:
    """Whether the method's code or its criteria have changed since ``evidence`` was measured."""
    from headgate.claims.fingerprint import method_fingerprint, quick_fingerprint

    if quick_fingerprint(method) == evidence.fingerprint["quick"]:
        return False
    return method_fingerprint(method) != evidence.fingerprint["method"]


def claim_status(method: Method, scale: str = "laptop", folders: Sequence[Path] | None = None) -> str:
    """The verdict at ``scale``, or ``"stale"``, or ``"not measured"``."""
    evidence = find_evidence(method.slug, scale, folders)
    if evidence is None:
        return NOT_MEASURED
    return STALE if is_stale(method, evidence) else evidence.verdict
