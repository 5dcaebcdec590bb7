"""The ``headgate`` command. Imports torch only where something is measured or built."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headgate.errors import HeadgateError

if TYPE_CHECKING:
    from rich.console import Console

    from headgate.catalog import Method
    from headgate.claims.evidence import Evidence

__all__ = ["app", "main"]

app = typer.Typer(
    help="Gated and learned representations for PyTorch, and their papers' claims, measured on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EvidenceOption = Annotated[
    list[Path] | None,
    typer.Option("--evidence", help="Folder of evidence files to look in (default: ./runs, then what is shipped)."),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can mend are one line each, without a traceback."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="headgate")
    except HeadgateError as error:
        print(f"headgate: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        import headgate

        print(f"headgate {headgate.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_command(
    family: Annotated[str | None, typer.Option(help="Only methods of this family, e.g. sequence.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only methods of this kind, e.g. loss.")] = None,
    evidence: EvidenceOption = None,
) -> None:
    """List the methods with the status of their claims."""
    from headgate.catalog import KINDS, load_methods
    from headgate.report.terminal import print_methods

    methods = list(load_methods().values())
    families = sorted({method.family for method in methods})
    if family is not None and family not in families:
        raise HeadgateError(f"unknown family {family!r}; there are {', '.join(families)}")
    if kind is not None and kind not in KINDS:
        raise HeadgateError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}")
    chosen = [m for m in methods if family in (None, m.family) and (kind is None or kind in m.kinds)]
    print_methods(_console(), chosen, evidence)


@app.command("show")
def show_command(
    method: Annotated[str, typer.Argument(help="The method's name, e.g. zoology.")],
    evidence: EvidenceOption = None,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="Only the citation.")] = False,
) -> None:
    """Show one method: parts, presets, use, claim with criteria, evidence, citation."""
    from headgate.catalog import find_method

    found = find_method(method)
    if bibtex:
        print(found.bibtex())
        return
    from headgate.report.terminal import print_method

    print_method(_console(), found, evidence)


@app.command("search")
def search_command(
    query: Annotated[list[str], typer.Argument(help="Words that the method's card must hold.")],
    evidence: EvidenceOption = None,
) -> None:
    """Search the methods' cards."""
    from headgate.catalog import search_methods
    from headgate.report.terminal import print_methods

    found = search_methods(" ".join(query))
    if not found:
        raise HeadgateError(f"no method's card holds all of: {' '.join(query)}")
    print_methods(_console(), found, evidence)


@app.command("reproduce")
def reproduce_command(
    methods: Annotated[list[str] | None, typer.Argument(help="Names of methods.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All methods.")] = False,
    scale: Annotated[str, typer.Option(help="smoke, laptop, paper, or another scale of the claim.")] = "laptop",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds (default: the card's).")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes (default: as many as there are cores).")] = None,
    threads: Annotated[int, typer.Option(help="Threads in each process.")] = 1,
    out: Annotated[Path, typer.Option(help="Run folder: evidence, figures and finished cells.")] = Path("runs"),
) -> None:
    """Measure the claims of METHODS on this machine and give a verdict on each.

    A run that was interrupted goes on where it stopped: the same command measures only what is missing.
    """
    from headgate.catalog import find_method, load_methods

    if everything == bool(methods):
        raise HeadgateError("name the methods to reproduce, or give --all: headgate reproduce zoology matryoshka")
    chosen = (
        list(load_methods().values()) if everything else [find_method(name) for name in dict.fromkeys(methods or [])]
    )

    from headgate.claims.engine import reproduce
    from headgate.claims.progress import ConsoleProgress

    console = _console()
    progress = ConsoleProgress(console)
    _hush_pool_thread()

    def show(method: Method, evidence: Evidence) -> None:
        from headgate.report.figure import draw_figure
        from headgate.report.terminal import print_evidence

        figure = draw_figure(method, evidence, out / f"{evidence.name}.png") if evidence.cells else None
        if evidence.cells or any(failure.traceback for failure in evidence.failed):
            print_evidence(console, method, evidence, figure)

    by_slug = {method.slug: method for method in chosen}
    try:
        results = reproduce(
            chosen,
            scale=scale,
            seeds=seeds,
            jobs=jobs,
            threads=threads,
            out=out,
            progress=progress,
            on_evidence=lambda evidence: show(by_slug[evidence.slug], evidence),
        )
    except KeyboardInterrupt:
        print("headgate: interrupted; finished cells are kept, the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    if len(results) > 1:
        _print_summary(console, results)
    failures = [failure for evidence in results for failure in evidence.failed]
    if failures:
        reasons = dict.fromkeys(failure.error for failure in failures if not failure.traceback)
        hint = "; ".join(reasons) or "tracebacks above"
        raise HeadgateError(f"{len(failures)} cells failed ({hint}); the same command tries them again")


@app.command("bench")
def bench_command(
    method: Annotated[str, typer.Argument(help="The method's name, e.g. gla.")],
    lengths: Annotated[str | None, typer.Option(help="Lengths to measure, e.g. 1k,4k,16k.")] = None,
    backends: Annotated[str | None, typer.Option(help="Backends of ours to measure, e.g. native,chunk.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of the benchmark, e.g. heads=8 (repeatable).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads (default: as many as there are cores).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few samples: only shows that it runs.")] = False,
    budget: Annotated[
        float | None, typer.Option(help="Seconds; a contender that needs more at a size is left out (default: 120).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables, the numbers and the figure.")] = Path("runs"),
) -> None:
    """Measure speed and peak memory of METHOD and its rivals, side by side in one run on this machine."""
    from headgate.catalog import find_method
    from headgate.claims.environment import available_cores
    from headgate.report.bench import check_folder, check_has_bench, run_bench

    found = find_method(method)
    check_has_bench(found)
    changes = [("lengths", lengths), ("backends", backends)]
    chosen = [(name, text) for name, text in changes if text is not None]
    for text in change or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise HeadgateError(f"--set must have the form NAME=VALUE, got {text!r}")
        chosen.append((name.strip(), value))
    cores = available_cores()
    threads = cores if threads is None else threads
    if threads < 1 or threads > cores:
        raise HeadgateError(f"threads must lie between 1 and the {cores} cores of this machine, got {threads}")
    if budget is not None and not budget > 0:
        raise HeadgateError(f"budget must be above 0 seconds, got {budget:g}")
    check_folder(out)

    from headgate.report.bench_terminal import BenchProgress, print_bench
    from headgate.timing import use_threads

    use_threads(threads)
    console = _console()
    try:
        with BenchProgress(console) as progress:
            report = run_bench(found, changes=chosen, quick=quick, budget=budget, threads=threads, progress=progress)
    except KeyboardInterrupt:
        print("headgate: interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    print_bench(console, report)
    for path in report.write(out):
        console.print(f"written: {path}", style="dim", highlight=False, soft_wrap=True)
    if report.results.interrupted:
        print("headgate: interrupted; what had been measured by then is in these files", file=sys.stderr)
        raise typer.Exit(130)
    failed = [gap for task in report.results.tasks.values() for gap in task.missing if gap.what == "failed"]
    if failed:
        reasons = dict.fromkeys(gap.reason for gap in failed)
        raise HeadgateError(f"{len(failed)} measurements failed: {'; '.join(reasons)}")


def _hush_pool_thread() -> None:
    """Let the process pool's own thread end without a traceback when a run is interrupted; the run reports it."""
    import threading

    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.thread is None or not args.thread.name.startswith("ExecutorManagerThread"):
            usual(args)

    threading.excepthook = hook


def _print_summary(console: Console, results: Sequence[Evidence]) -> None:
    from rich.table import Table

    from headgate.claims.progress import format_seconds
    from headgate.report.terminal import verdict_text

    table = Table(box=None, pad_edge=False, header_style="bold", title="verdicts", title_justify="left")
    for column in ("method", "verdict", "criteria reproduced", "time of all cells"):
        table.add_column(column)
    for evidence in results:
        passed = sum(result.verdict == "reproduced" for result in evidence.criteria)
        table.add_row(
            evidence.slug,
            verdict_text(evidence.verdict),
            f"{passed} of {len(evidence.criteria)}",
            format_seconds(evidence.seconds),
        )
    console.print(table)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


if __name__ == "__main__":
    main()
