"""Benchmarks: the rooms that have one, a run of one, and its files.

A run writes three files, each whole or not at all: ``bench-<slug>.json`` (everything that was measured),
``bench-<slug>.md`` (the tables) and ``bench-<slug>.png`` (time and memory over size).
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headgate.catalog import Method, load_methods
from headgate.claims.environment import describe_hardware, describe_versions
from headgate.errors import HeadgateError
from headgate.files import write_text
from headgate.timing import Effort, Floor, Plan, Progress, Results, run_plan
from headgate.timing.settings import change_settings

__all__ = ["BenchReport", "check_folder", "check_has_bench", "methods_with_bench", "run_bench"]

FORMAT = 1
QUICK_EFFORT = Effort(rounds=3, fewest_rounds=3, sample_seconds=0.01, enough_seconds=1.0, budget_seconds=20.0)


@dataclass
class BenchReport:
    """Everything that one run of a benchmark has to say.

    Attributes:
        slug: the method.
        title: what was compared.
        settings: name → value.
        quick: whether it was a short run, which shows that the code runs and not how fast it is.
        effort: how long was measured.
        results: what was measured.
        floors: what the benchmark must show, and whether it does.
        notes: facts that a reader needs.
        versions, hardware: what it ran on.
        finished: date.
        seconds: wall time of the run.
    """

    slug: str
    title: str
    settings: Mapping[str, Any]
    quick: bool
    effort: Effort
    results: Results
    floors: list[Floor]
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str | int | float] = field(default_factory=dict)
    finished: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The stem of its files; those of a run that was broken off never replace those of a whole one."""
        return f"bench-{self.slug}{'-part' if self.results.interrupted else ''}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        content = {"format": FORMAT, **asdict(self)}
        content["floors"] = [{**asdict(floor), "met": floor.met} for floor in self.floors]
        return content

    @classmethod
    def from_dict(cls, content: Any) -> BenchReport:
        """The report in ``content``.

        Raises:
            ValueError: it is no benchmark of this format.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT or "floors" not in content:
            raise ValueError(f"must be a benchmark of format {FORMAT}")
        values = {key: value for key, value in content.items() if key != "format"}
        values["effort"] = Effort(**values["effort"])
        values["results"] = Results.from_dict(values["results"])
        values["floors"] = [
            Floor(**{key: value for key, value in floor.items() if key != "met"}) for floor in values["floors"]
        ]
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> BenchReport:
        """The report in the file ``path``.

        Raises:
            HeadgateError: it cannot be read, or holds no benchmark.
        """
        try:
            return cls.from_dict(json.loads(path.read_bytes()))
        except OSError as error:
            raise HeadgateError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise HeadgateError(f"{path} is no benchmark file: {error}") from error

    def write(self, folder: Path) -> list[Path]:
        """Write JSON, Markdown and figure into ``folder``; returns their paths.

        Raises:
            HeadgateError: the folder cannot be written or the disk is full.
        """
        from headgate.report.bench_figure import draw_bench
        from headgate.report.bench_markdown import bench_page

        data, page = folder / f"{self.name}.json", folder / f"{self.name}.md"
        write_text(data, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        write_text(page, bench_page(self))
        figure = draw_bench(self, folder / f"{self.name}.png")
        return [data, page, *([] if figure is None else [figure])]


def methods_with_bench() -> list[Method]:
    """The methods whose room holds a ``bench.py``; nothing of it is imported."""
    return [method for method in load_methods().values() if (method.folder / "bench.py").exists()]


def check_has_bench(method: Method) -> None:
    """Check that ``method`` has a benchmark; nothing of it is imported.

    Raises:
        HeadgateError: it has none; the message says which ones have.
    """
    having = [other.slug for other in methods_with_bench()]
    if method.slug not in having:
        raise HeadgateError(f"{method.slug} has no benchmark; there are {', '.join(having) or 'none'}")


def check_folder(folder: Path) -> None:
    """Make ``folder``, so that a long run does not find out at its end that it cannot write.

    Raises:
        HeadgateError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise HeadgateError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
    if not writable:
        raise HeadgateError(f"cannot write to {folder}: permission denied; choose another folder with --out")


def run_bench(
    method: Method,
    *,
    changes: Sequence[tuple[str, str]] = (),
    quick: bool = False,
    budget: float | None = None,
    threads: int = 1,
    progress: Progress | None = None,
) -> BenchReport:
    """Run a benchmark in this process, which is held to ``threads`` threads already.

    Args:
        method: whose benchmark.
        changes: (setting, text) pairs.
        quick: small sizes and few samples: shows that the code runs, not how fast it is.
        budget: seconds after which a contender is left out at a size; ``None`` for the usual ones.
        threads: threads of the processes that measure memory.
        progress: is told what happens.

    Returns:
        The report.

    Raises:
        HeadgateError: it has none, or an unknown or wrong setting.
    """
    check_has_bench(method)
    module = _load(method)
    settings = change_settings(module.QUICK if quick else module.Settings(), changes)
    plan: Plan = module.plan(settings)
    effort = QUICK_EFFORT if quick else Effort()
    if budget is not None:
        effort = dataclasses.replace(effort, budget_seconds=budget)
    began = time.monotonic()
    results = run_plan(plan, effort, threads=threads, progress=progress, sgemm_size=512 if quick else 2048)
    return BenchReport(
        slug=method.slug,
        title=plan.title,
        settings=asdict(settings),
        quick=quick,
        effort=effort,
        results=results,
        floors=plan.floors(results),
        notes=list(plan.notes),
        versions=describe_versions(),
        hardware=describe_hardware(),
        finished=datetime.datetime.now(datetime.UTC).date().isoformat(),
        seconds=round(time.monotonic() - began, 1),
    )


def _load(method: Method) -> Any:
    """The room's module ``bench``; this imports what it measures."""
    module = importlib.import_module(f"{method.package}.bench")
    for name in ("Settings", "QUICK", "plan"):
        if not hasattr(module, name):
            raise HeadgateError(f"{method.folder / 'bench.py'} must define {name!r}")
    return module
