from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from headgate.errors import HeadgateError
from headgate.report.bench import BenchReport, check_folder
from headgate.report.bench_figure import draw_bench
from headgate.report.bench_markdown import bench_page
from headgate.report.bench_tables import bytes_text, floors_table, machine_line, missing_lines, seconds_text, task_table
from headgate.report.bench_terminal import BenchProgress, print_bench
from headgate.timing import Contender, Floor, PeakMemory, Plan, run_plan
from headgate.timing import run as run_module
from tests.timing import toys

FLOORS = [
    Floor("fast", "the fast toy against the slow one, size 8", 8.0, 5.0, "at least", "× faster"),
    Floor("small", "peak memory over inputs and results", 3.0, 2.5, "at most", reason="worst at size 4"),
    Floor("far", "size 16", None, 5.0, "at least", reason="size 16 is not in this run"),
]


@pytest.fixture
def report(monkeypatch):
    """A run of the toys on their own clock, with made-up memory, on a machine of 100 FLOP/s."""
    monkeypatch.setattr(run_module, "sgemm_rate", lambda *args, **options: 100.0)

    def peak(build, arguments, warm_up, **options):
        size = arguments["size"] * (arguments["size"] if arguments["contender"] == "slow" else 1)
        return PeakMemory(3 * size * 2**20, 2 * size * 2**20)

    monkeypatch.setattr(run_module, "measure_peak", peak)
    contenders = (
        Contender("fast", "Fast toy", agrees="toys"),
        Contender("slow", "Slow | toy", agrees="toys"),
        Contender("away", "Absent toy", unavailable="it is at home"),
    )
    plan = toys.plan(
        contenders=contenders,
        memory_sizes=(4, 8),
        work=lambda size: 500.0 * size,
        work_unit="moves",
        arithmetic=lambda size: 0.05 * size,
        columns={"legs": lambda name, size: f"{len(name)}{size}"},
    )
    results = run_plan(plan, toys.QUICK, threads=2, clock=toys.CLOCK)
    return BenchReport(
        slug="toy-gate",
        title="Toys at play",
        settings={"sizes": (1, 2, 4, 8), "device": "cpu"},
        quick=False,
        effort=toys.QUICK,
        results=results,
        floors=FLOORS,
        notes=["Toys are small."],
        versions={"torch": "2"},
        hardware={"processor": "P", "cores": 2},
        finished="2026-01-01",
        seconds=90.0,
    )


def task(report):
    return report.results.tasks["toy"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (0.00712, "7.12 ms"), (0.1234, "123 ms"), (8.51e-5, "85.1 µs"), (0.00099999, "1.00 ms"), (3e-9, "3.00 ns"), (1234.5, "1,234 s")],
)  # fmt: skip
def test_times_read_in_a_fitting_unit(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (2048, "2.00 KiB"), (12345678, "11.8 MiB"), (5 * 2**30, "5.00 GiB")]
)
def test_bytes_read_in_a_fitting_unit(count, text):
    assert bytes_text(count) == text


def test_a_task_s_table_puts_contenders_of_one_size_side_by_side(report):
    table = task_table(task(report), report.results.sgemm)
    assert table.head == (
        "size", "contender", "time, median", "quartiles", "time / Fast toy", "moves/s", "of the machine's limit", "legs",
        "peak memory", "over inputs and results",
    )  # fmt: skip
    assert [row[:2] for row in table.rows] == [
        (str(size), name) for size in (1, 2, 4, 8) for name in ("Fast toy", "Slow | toy")
    ]
    # Size 4: the fast toy takes 4 ms for 2,000 moves, and the machine could do 0.2 FLOP in 2 ms; the slow one takes 16 ms.
    assert table.rows[4][2:] == (
        "4.00 ms", "4.00 ms – 4.00 ms", "1.00 ×", "500 k", "50.0 %", "44", "12.0 MiB", "1.50",
    )  # fmt: skip
    assert table.rows[5][2:] == (
        "16.0 ms", "16.0 ms – 16.0 ms", "4.00 ×", "125 k", "12.5 %", "44", "48.0 MiB", "1.50",
    )  # fmt: skip
    assert table.rows[0][-2:] == ("–", "–")
    assert table.sections == {1, 3, 5, 7}


def test_the_table_of_floors_says_what_was_asked_measured_and_met():
    assert floors_table(FLOORS).rows == [
        ("the fast toy against the slow one, size 8", "at least 5 × faster", "8 × faster", "✔"),
        ("peak memory over inputs and results (worst at size 4)", "at most 2.5 ×", "3 ×", "✘"),
        ("size 16 (size 16 is not in this run)", "at least 5 ×", "not measured", "–"),
    ]


def test_what_could_not_be_measured_is_one_line_per_reason(report):
    assert missing_lines(report.results) == ["playing: Absent toy left out: it is at home"]
    effort = dataclasses.replace(toys.QUICK, budget_seconds=0.1)
    found = run_plan(toys.plan(sizes=(4, 8, 16)), effort, clock=toys.CLOCK)
    assert missing_lines(found) == [
        "playing: Slow toy left out at size 8, 16: a call would last about 0.032 s; "
        "a warm-up and 3 rounds are beyond the budget of 0.1 s"
    ]


def test_the_machines_limit_is_named_with_its_threads(report):
    report.results.sgemm = 191.26e9
    assert "191.3 GFLOP/s, the best of this run, 2 threads" in machine_line(report.results)


def test_the_page_holds_tables_floors_reasons_and_circumstances(report):
    page = bench_page(report)
    for expected in (
        "# Toys at play", "`headgate bench toy-gate`: sizes = 1, 2, 4, 8, device = cpu.",
        "| the fast toy against the slow one, size 8 | at least 5 × faster | 8 × faster | ✔ |",
        "| 8 | Slow \\| toy | 64.0 ms |", "![Time and memory over size](bench-toy-gate.png)",
        "- playing: Absent toy left out: it is at home", "Toys are small.", "5 rounds (slow ones at least 3)",
        "On P (2 of 2 cores), torch 2, 2026-01-01, 1.5 minutes.",
    ):  # fmt: skip
        assert expected in page, expected
    assert "quick run" not in page
    report.quick = True
    assert "quick run" in bench_page(report)


def columns(row):
    return len(re.split(r"(?<!\\)\|", row))


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_head(report):
    rows = [line for line in bench_page(report).splitlines() if line.startswith("|")]
    widths = [columns(row) for row in rows]
    assert widths == [6] * 5 + [12] * 10


def test_a_report_survives_the_way_through_its_file(report, tmp_path):
    data, page, figure = report.write(tmp_path / "new")
    assert (data.name, page.name, figure.name) == ("bench-toy-gate.json", "bench-toy-gate.md", "bench-toy-gate.png")
    assert [floor["met"] for floor in json.loads(data.read_text())["floors"]] == [True, False, None]
    again = BenchReport.read(data)
    assert again.results == report.results
    assert again.floors == report.floors
    assert bench_page(again) == page.read_text() == bench_page(report)
    assert sorted(path.name for path in data.parent.iterdir()) == sorted(path.name for path in (data, page, figure))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 99, "floors": []}'])
def test_a_file_that_is_no_benchmark_is_refused(content, tmp_path):
    path = tmp_path / "bench-toy.json"
    path.write_text(content)
    with pytest.raises(HeadgateError, match=r"bench-toy\.json is no benchmark file"):
        BenchReport.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HeadgateError, match=r"cannot read .*bench-toy\.json: No such file"):
        BenchReport.read(tmp_path / "bench-toy.json")


def test_a_folder_that_cannot_be_made_is_found_out_before_the_run(tmp_path):
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(HeadgateError, match="choose another folder with --out"):
        check_folder(tmp_path / "occupied" / "runs")
    check_folder(tmp_path / "free" / "runs")
    assert (tmp_path / "free" / "runs").is_dir()


def test_the_figure_names_contenders_slopes_and_the_machines_limit(report, tmp_path):
    text = draw_bench(report, tmp_path / "figure.svg").read_text()
    drawn = " ".join(re.findall(r"<!-- (.*?) -->", text, flags=re.DOTALL))
    for expected in (
        "Toys at play", "Playing: time of a call", "Playing: peak memory of a call", "10 ms", "16 MiB", "size",
        "slope 1", "slope 2", "sgemm",
    ):  # fmt: skip
        assert expected in drawn, expected
    assert re.search(r"Fast toy +\(∝ size\^1\.00\)", drawn)
    assert re.search(r"Slow \| toy +\(∝ size\^2\.00\)", drawn)
    assert "Absent toy" not in drawn


def test_the_figure_is_a_picture_of_decent_size(report, tmp_path):
    from PIL import Image

    picture = np.asarray(Image.open(draw_bench(report, tmp_path / "figure.png")).convert("L"))
    assert picture.shape[1] > 700
    assert 0.005 < (picture < 200).mean() < 0.5


def test_one_size_makes_no_figure(tmp_path):
    found = run_plan(toys.plan(sizes=(4,)), toys.QUICK, clock=toys.CLOCK, sgemm_size=8)
    single = BenchReport("toy-gate", "Toys", {}, True, toys.QUICK, found, [])
    assert [path.suffix for path in single.write(tmp_path)] == [".json", ".md"]


@pytest.fixture
def console():
    from rich.console import Console

    return Console(width=160, record=True, force_terminal=False, color_system=None)


def test_the_terminal_shows_the_same_as_the_page(report, console):
    print_bench(console, report)
    text = console.export_text()
    for row in task_table(task(report), report.results.sgemm).rows:
        for cell in row:
            assert cell in text, cell
    for floor in FLOORS:
        assert floor.statement in text
    assert "Absent toy left out: it is at home" in text
    assert "quick run" not in text


def test_the_terminal_shows_the_traceback_of_what_failed_once(console):
    found = run_plan(toys.plan(arguments={"fail": "slow"}), toys.QUICK, clock=toys.CLOCK, sgemm_size=8)
    print_bench(console, BenchReport("toy-gate", "Toys", {}, True, toys.QUICK, found, []))
    text = console.export_text()
    assert text.count("Traceback") == 1
    assert "playing: Slow toy failed: RuntimeError: the toy broke" in text


def test_progress_is_a_line_per_step_where_there_is_no_terminal(console):
    plan = Plan("Toys", toys.plan().tasks, floors=lambda results: [])
    with BenchProgress(console) as progress:
        run_plan(plan, toys.QUICK, clock=toys.CLOCK, progress=progress, sgemm_size=8)
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == "4 steps"
    assert len(lines) == 5
    assert lines[4].endswith("playing, size 8: Fast toy 8 ms · Slow toy 64 ms")
