"""The engine: arms × seeds → cells → statistics → verdict → evidence.

Finished cells are kept in ``<out>/cells/<slug>-<scale>/`` and never run twice; an interrupted one starts anew. Cells run
in joblib's worker processes with a fixed number of threads each, so that the numbers do not depend on how many run at the
same time. A cell that fails is reported with its traceback, and the others go on.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headgate.catalog import Method
from headgate.claims.cells import STALE_CELL, Cell, CellRecord, CellStore
from headgate.claims.environment import available_cores, describe_hardware, describe_versions
from headgate.claims.evidence import Evidence, FailedCell
from headgate.claims.fingerprint import method_fingerprint, quick_fingerprint, shared_fingerprint
from headgate.claims.progress import Progress, Silent
from headgate.claims.verdict import judge, overall_verdict
from headgate.errors import ClaimError, HeadgateError
from headgate.files import write_bytes
from headgate.measurement import Measurement

__all__ = ["Grid", "measure_cell", "plan", "reproduce"]


@dataclass
class Grid:
    """The cells of one claim at one scale, and what has become of them so far.

    Attributes:
        method: whose claim it is.
        scale: the scale.
        seeds: the seeds.
        out: the run folder.
        fingerprint: what a finished cell must carry to be taken over.
        finished: cells that are measured.
        failed: cells that raised.
    """

    method: Method
    scale: str
    seeds: tuple[int, ...]
    out: Path
    fingerprint: str
    finished: dict[Cell, CellRecord] = field(default_factory=dict)
    failed: dict[Cell, FailedCell] = field(default_factory=dict)

    @property
    def store(self) -> CellStore:
        """The files of this grid's finished cells."""
        return CellStore(self.out / "cells" / f"{self.method.slug}-{self.scale}")

    @property
    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that an early stop leaves whole comparisons."""
        arms = self.method.claim.arms_at(self.scale)
        return [Cell(self.method.slug, self.scale, arm.name, seed) for seed in self.seeds for arm in arms]

    @property
    def pending(self) -> list[Cell]:
        """Cells that are neither finished nor failed."""
        return [cell for cell in self.cells if cell not in self.finished and cell not in self.failed]


def plan(method: Method, scale: str, seeds: int | None, out: Path) -> tuple[Grid, list[str]]:
    """Lay out the grid of ``method`` at ``scale`` and take over the cells that are finished already.

    Args:
        method: the method.
        scale: one of its claim's scales.
        seeds: number of seeds (0 … seeds − 1); ``None`` for the card's.
        out: the run folder.

    Returns:
        The grid, and one sentence per cell file that was set aside.

    Raises:
        ClaimError: unknown scale, or a number of seeds below one.
    """
    entry = method.claim.scale(scale)
    count = entry.seeds if seeds is None else seeds
    if count < 1:
        raise ClaimError(f"the number of seeds must be at least 1, got {count}")
    key = f"{method_fingerprint(method)}-{shared_fingerprint(method)}-torch{describe_versions()['torch']}"
    grid = Grid(method, scale, tuple(range(count)), out, key)
    warnings = []
    stale = 0
    for cell in grid.cells:
        record, warning = grid.store.load(cell, key)
        stale += warning == STALE_CELL
        if warning and warning != STALE_CELL:
            warnings.append(warning)
        if record is not None:
            grid.finished[cell] = record
    if stale:
        warnings.append(f"{stale} cells in {grid.store.folder} were {STALE_CELL} and are measured again")
    return grid, warnings


def reproduce(
    methods: Sequence[Method],
    *,
    scale: str = "laptop",
    seeds: int | None = None,
    jobs: int | None = None,
    threads: int = 1,
    out: Path = Path("runs"),
    progress: Progress | None = None,
    on_evidence: Callable[[Evidence], None] | None = None,
) -> list[Evidence]:
    """Measure the claims of ``methods`` and judge them.

    Args:
        methods: whose claims.
        scale: ``"smoke"``, ``"laptop"``, ``"paper"`` or another one that each of the claims has.
        seeds: number of seeds; ``None`` for the number in each card.
        jobs: processes; ``None`` for as many as the cores allow.
        threads: threads in each process; jobs × threads must not be above the number of cores.
        out: run folder: evidence and figures, and ``cells/`` below it.
        progress: is told what happens; default: nothing is shown.
        on_evidence: called with each claim's evidence as soon as its last cell is done.

    Returns:
        The evidence of each claim, in the order of ``methods``.

    Raises:
        ClaimError: unknown scale, too many processes, or another run is at work in ``out``.
        HeadgateError: the run folder cannot be written.
    """
    progress = progress or Silent()
    cores = available_cores()
    if threads < 1 or threads > cores:
        raise ClaimError(f"threads must lie between 1 and the {cores} cores of this machine, got {threads}")
    jobs = max(1, cores // threads) if jobs is None else jobs
    if jobs < 1 or jobs * threads > cores:
        raise ClaimError(
            f"jobs × threads must lie between 1 and the {cores} cores of this machine, got {jobs} × {threads}"
        )
    grids = []
    with _sole_use(out):
        for method in methods:
            grid, warnings = plan(method, scale, seeds, out)
            grid.store.tidy()
            grids.append(grid)
            for warning in warnings:
                progress.warn(warning)
        evidence: dict[str, Evidence] = {}

        def close(grid: Grid) -> None:
            evidence[grid.method.slug] = _conclude(grid, jobs, threads)
            if on_evidence is not None:
                on_evidence(evidence[grid.method.slug])

        with progress:
            progress.begin([cell for grid in grids for cell in grid.cells], jobs)
            for grid in grids:
                for cell in grid.cells:
                    if cell in grid.finished:
                        progress.finished(grid.finished[cell], fresh=False)
                if not grid.pending:
                    close(grid)
            by_slug = {grid.method.slug: grid for grid in grids}
            for cell, record, failure in _run([grid for grid in grids if grid.pending], jobs, threads):
                grid = by_slug[cell.slug]
                if record is not None:
                    grid.finished[cell] = record
                    progress.finished(record, fresh=True)
                else:
                    assert failure is not None
                    grid.failed[cell] = failure
                    progress.failed(cell, failure)
                if not grid.pending:
                    close(grid)
    return [evidence[grid.method.slug] for grid in grids]


def measure_cell(cell: Cell, package: str, fingerprint: str, store: CellStore, threads: int) -> CellRecord | FailedCell:
    """Measure one cell in this process and keep it. Errors of the measurement come back, those of the disk are raised."""
    import torch

    torch.set_num_threads(threads)
    start = time.monotonic()
    # Base models that arms share are cached with the cells, and under the fingerprint: other code trains them anew.
    os.environ["HEADGATE_CACHE"] = str(
        store.folder.resolve() / f"models-{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}"
    )
    try:
        measure: Callable[[str, int, str], Measurement] = importlib.import_module(f"{package}.claim").measure
        measurement = measure(cell.arm, cell.seed, cell.scale)
        record = CellRecord.of(cell, fingerprint, measurement, time.monotonic() - start)
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        # What a user can mend (missing data, a missing extra) needs no traceback.
        trace = "" if isinstance(error, HeadgateError) else traceback.format_exc()
        return FailedCell(cell.arm, cell.seed, line, trace)
    store.save(record)
    return record


def _run(grids: Sequence[Grid], jobs: int, threads: int) -> Iterator[tuple[Cell, CellRecord | None, FailedCell | None]]:
    """Run all pending cells, yielding each as it ends.

    A process that is killed takes its whole pool along. The cells that were at work then are tried again one at a time:
    the one that is killed once more is the one to blame.
    """
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    owner = {cell: grid for grid in grids for cell in grid.pending}
    waiting = list(owner)
    suspects: list[Cell] = []
    while waiting:
        alone = bool(suspects)
        batch = [suspects.pop(0)] if alone else list(waiting)
        with _marks(grids[0].out) as marks:
            try:
                for cell, outcome in _pool(batch, owner, jobs, threads, marks):
                    waiting.remove(cell)
                    if isinstance(outcome, CellRecord):
                        yield cell, outcome, None
                    else:
                        yield cell, None, outcome
            except TerminatedWorkerError:
                started = {path.name for path in marks.glob("*")}
                for cell in [cell for cell in batch if cell in waiting]:
                    record, _ = owner[cell].store.load(cell, owner[cell].fingerprint)
                    if record is not None:
                        waiting.remove(cell)
                        yield cell, record, None
                    elif alone:
                        waiting.remove(cell)
                        line = "its process was killed twice (out of memory?)"
                        yield cell, None, FailedCell(cell.arm, cell.seed, line, line)
                    elif _mark(cell) in started:
                        suspects.append(cell)


def _pool(
    batch: Sequence[Cell], owner: dict[Cell, Grid], jobs: int, threads: int, marks: Path
) -> Iterator[tuple[Cell, CellRecord | FailedCell]]:
    """Run ``batch`` in worker processes; with one job, in this process."""
    import joblib

    tasks = (
        joblib.delayed(_work)(
            cell, owner[cell].method.package, owner[cell].fingerprint, owner[cell].store, threads, marks, os.getpid()
        )
        for cell in batch
    )
    with joblib.parallel_config(backend="loky", inner_max_num_threads=threads):
        yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="all")(
            tasks
        )


@contextlib.contextmanager
def _marks(out: Path) -> Iterator[Path]:
    """A folder in which each worker marks the cell that it is at."""
    folder = out / "cells" / f".running-{os.getpid()}"
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            for path in folder.glob("*"):
                path.unlink()
            folder.rmdir()


def _mark(cell: Cell) -> str:
    return f"{cell.slug}-{cell.scale}-{cell.arm}-{cell.seed}"


def _work(
    cell: Cell, package: str, fingerprint: str, store: CellStore, threads: int, marks: Path, parent: int
) -> tuple[Cell, CellRecord | FailedCell]:
    """What a worker process does with one cell."""
    _die_with(parent)
    mark = marks / _mark(cell)
    write_bytes(mark, b"")
    outcome = measure_cell(cell, package, fingerprint, store, threads)
    with contextlib.suppress(OSError):
        mark.unlink()
    return cell, outcome


@functools.cache
def _die_with(parent: int) -> None:
    """End this worker soon after its parent is gone, so that a killed run leaves no process behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if os.getpid() != parent:
        threading.Thread(target=watch, daemon=True).start()


def _conclude(grid: Grid, jobs: int, threads: int) -> Evidence:
    """Judge a grid whose cells are all done, and write its evidence and pictures."""
    import base64

    method = grid.method
    table: dict[str, dict[int, dict[str, float | None]]] = {}
    for cell, record in grid.finished.items():
        table.setdefault(cell.arm, {})[cell.seed] = dict(record.metrics)
    for criterion in method.claim.criteria_at(grid.scale):
        for arm, metric in (
            (criterion.arm, criterion.metric),
            (criterion.against, criterion.against_metric or criterion.metric),
        ):
            for seed, metrics in table.get(arm or "", {}).items():
                if metric not in metrics:
                    raise HeadgateError(
                        f"{method.slug}: arm {arm!r} with seed {seed} did not report the metric {metric!r}, "
                        f"which the criterion {criterion.name!r} needs; it reported {', '.join(sorted(metrics))}"
                    )
    results = judge(method.claim, grid.scale, table, grid.seeds)
    pictures = []
    for cell in grid.cells:
        if cell in grid.finished and cell.seed == grid.seeds[0]:
            for name, data in grid.finished[cell].pictures.items():
                file = f"{method.slug}-{grid.scale}-{cell.arm}-{name}.png"
                write_bytes(grid.out / file, base64.b64decode(data))
                pictures.append(file)
    evidence = Evidence(
        slug=method.slug,
        scale=grid.scale,
        verdict=overall_verdict(results),
        criteria=results,
        seeds=grid.seeds,
        cells=[grid.finished[cell] for cell in grid.cells if cell in grid.finished],
        failed=[grid.failed[cell] for cell in grid.cells if cell in grid.failed],
        fingerprint={
            "quick": quick_fingerprint(method),
            "method": method_fingerprint(method),
            "shared": shared_fingerprint(method),
        },
        versions=describe_versions(),
        hardware=describe_hardware(),
        jobs=jobs,
        threads=threads,
        seconds=round(sum(record.seconds for record in grid.finished.values()), 1),
        finished=datetime.datetime.now(datetime.UTC).date().isoformat(),
        pictures=pictures,
    )
    if evidence.cells:
        evidence.write(grid.out)
    return evidence


@contextlib.contextmanager
def _sole_use(out: Path) -> Iterator[None]:
    """Hold the run folder for this process alone."""
    try:
        (out / "cells").mkdir(parents=True, exist_ok=True)
        lock = open(out / "cells" / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise ClaimError(
            f"cannot write to the run folder {out}: {error.strerror}; choose another one with --out"
        ) from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no advisory locks on this system: two runs in one folder still never tear a file
            pass
        except OSError as error:
            raise ClaimError(
                f"another run is at work in {out}; wait for it or choose another folder with --out"
            ) from error
        yield
