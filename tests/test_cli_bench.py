from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import toy
from headgate.report.bench import BenchReport
from tests.test_import import loaded

BENCH = '''
"""The toy's benchmark."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from headgate.timing import Contender, Floor, Plan, Task, Workload


@dataclass(frozen=True)
class Settings:
    """What a user may change."""

    lengths: tuple[int, ...] = (64, 128)
    backends: tuple[str, ...] = ("one", "two")
    gate: float = 2.0
    fail: str = "nobody"

    def __post_init__(self):
        if self.gate <= 0:
            raise ValueError(f"gate must be positive, got gate={self.gate}")


QUICK = Settings(lengths=(8, 16))


def plan(settings):
    task = Task(
        name="toy",
        label="playing",
        size_label="length",
        sizes=settings.lengths,
        contenders=tuple(Contender(name, f"Toy {name}", agrees="toys") for name in settings.backends),
        ours="one",
        build=f"{__name__}:build",
        arguments={"gate": settings.gate, "fail": settings.fail},
        warm_up_size=2,
        memory_sizes=settings.lengths[-1:],
    )

    def floors(results):
        ratio = results.tasks["toy"].ratio(("two", settings.lengths[0]), ("one", settings.lengths[0]))
        return [Floor("speed", "two against one", ratio and ratio.median, 0.0, "at least")]

    return Plan(f"Toys with a gate of {settings.gate:g}", (task,), floors)


def build(contender, size, *, gate, fail):
    def run(x):
        if contender == fail:
            raise RuntimeError("the toy broke")
        if fail == "sleep" or (fail == "late" and size > 64):
            print("asleep", flush=True)
            time.sleep(60)
        return gate * x

    return Workload(lambda: (torch.ones(size, 1024),), run)
'''


@pytest.fixture
def lab(tmp_path):
    """A package with a method that has a benchmark, and another one that has none."""
    room = toy.write_toy(tmp_path)
    (room / "bench.py").write_text(BENCH)
    card = toy.CARD.replace("toy-gate", "toy-twin").replace("ToyGate", "ToyTwin").replace("toy_two", "toy_three")
    twin = toy.write_toy(tmp_path / "other", card=card, package="twin_lab")
    (twin / "__init__.py").write_text(toy.ROOM.replace("ToyGate", "ToyTwin"))
    twin.rename(twin.parent / "toy_twin")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / path.name)
    return tmp_path


def check_refused(result, *words):
    """One clear line on standard error, no traceback, a status that is not zero."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toygate"], ["unknown method 'toygate'", "did you mean toy-gate"]),
        (["toy-twin"], ["toy-twin has no benchmark; there are", "toy-gate"]),
        (["toy-gate", "--set", "heads=3"], ["no setting 'heads'; it has lengths, backends, gate, fail"]),
        (["toy-gate", "--set", "gate"], ["--set must have the form NAME=VALUE, got 'gate'"]),
        (["toy-gate", "--set", "gate=wide"], ["'gate' must be a number, got 'wide'"]),
        (["toy-gate", "--set", "gate=-1"], ["gate must be positive, got gate=-1.0"]),
        (["toy-gate", "--lengths", "far"], ["'lengths' must be a list of whole numbers", "'far'"]),
        (["toy-gate", "--threads", "0"], ["threads must lie between 1 and"]),
        (["toy-gate", "--threads", "1000"], ["threads must lie between 1 and"]),
        (["toy-gate", "--budget", "0"], ["budget must be above 0 seconds"]),
        (["toy-gate", "--out", "occupied/runs"], ["cannot write to occupied/runs", "--out"]),
    ],
)
def test_bad_input_is_one_clear_line(lab, arguments, words):
    (lab / "occupied").write_text("a file where a folder should be")
    check_refused(toy.headgate(lab, "bench", *arguments), *words)


def test_a_room_whose_benchmark_lacks_a_part_is_named(lab):
    room = lab / "toy_lab" / "methods" / "toys" / "toy_gate"
    (room / "bench.py").write_text(BENCH.replace("QUICK =", "HASTY ="))
    check_refused(toy.headgate(lab, "bench", "toy-gate"), "bench.py must define 'QUICK'")


def test_a_run_shows_tables_and_leaves_numbers_page_and_figure(lab):
    result = toy.headgate(
        lab, "bench", "toy-gate", "--quick", "--threads", "1", "--lengths", "4,8,16", "--set", "gate=3", "--out", "out"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for expected in ("5 steps", "Toys with a gate of 3", "Toy one", "Toy two", "peak memory", "two against one", "✔",
                     "quick run", "GFLOP/s", "written: out/bench-toy-gate.png"):  # fmt: skip
        assert expected in result.stdout, expected
    report = BenchReport.read(lab / "out" / "bench-toy-gate.json")
    task = report.results.tasks["toy"]
    assert [(t.size, t.contender, len(t.samples)) for t in task.times] == [
        (size, name, 3) for size in (4, 8, 16) for name in ("one", "two")
    ]
    assert [(name, size, peak.array_bytes) for name, size, peak in task.peaks] == [
        ("one", 16, 2 * 16 * 4096),
        ("two", 16, 2 * 16 * 4096),
    ]
    assert (report.quick, report.results.threads, report.settings["gate"]) == (True, 1, 3.0)
    assert "# Toys with a gate of 3" in (lab / "out" / "bench-toy-gate.md").read_text()
    assert (lab / "out" / "bench-toy-gate.png").read_bytes()[:4] == b"\x89PNG"


def test_a_contender_that_fails_is_said_and_the_others_are_measured_and_written(lab):
    result = toy.headgate(lab, "bench", "toy-gate", "--quick", "--set", "fail=two", "--threads", "1")
    assert result.returncode == 2
    assert "measurements failed: RuntimeError: the toy broke" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Toy two failed" in result.stdout
    assert "in run" in result.stdout
    content = json.loads((lab / "runs" / "bench-toy-gate.json").read_text())
    assert {entry["contender"] for entry in content["results"]["tasks"]["toy"]["times"]} == {"one"}
    assert content["floors"][0]["met"] is None


def test_backends_choose_the_contenders(lab):
    result = toy.headgate(lab, "bench", "toy-gate", "--quick", "--backends", "two", "--threads", "1")
    assert result.returncode == 0, result.stderr
    task = BenchReport.read(lab / "runs" / "bench-toy-gate.json").results.tasks["toy"]
    assert task.contenders == {"two": "Toy two"}


def interrupted(lab, fail):
    """Exit status and error output of a run that gets Ctrl-C while a contender is asleep."""
    command = [sys.executable, "-m", "headgate.cli", "bench", "toy-gate", "--set", f"fail={fail}", "--threads", "1"]
    with subprocess.Popen(
        command, cwd=lab, env=toy.environment(lab), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        for line in run.stdout:
            if "asleep" in line:
                break
        time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    return run.returncode, errors.strip()


@pytest.mark.skipif(os.name != "posix", reason="sends the signal that Ctrl-C sends")
def test_a_run_that_is_interrupted_before_anything_was_measured_says_so_and_leaves_no_file(lab):
    assert interrupted(lab, "sleep") == (130, "headgate: interrupted; nothing was written")
    assert list((lab / "runs").iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="sends the signal that Ctrl-C sends")
def test_an_interrupted_run_keeps_what_it_had_measured_under_a_name_of_its_own(lab):
    status, errors = interrupted(lab, "late")
    assert (status, errors) == (130, "headgate: interrupted; what had been measured by then is in these files")
    report = BenchReport.read(lab / "runs" / "bench-toy-gate-part.json")
    assert report.results.interrupted
    assert {times.size for times in report.results.tasks["toy"].times} == {64}
    assert "the run was interrupted" in (lab / "runs" / "bench-toy-gate-part.md").read_text()


def test_the_help_and_wrong_names_import_no_torch():
    for arguments in (["bench", "--help"], ["bench", "zoology"], ["bench", "nothing-like-it"]):
        code = f"from headgate.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass"
        assert not loaded(code) & {"torch", "matplotlib", "sklearn", "scipy"}, arguments
