from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import toy
from headgate.claims import Evidence
from headgate.claims.cells import Cell
from headgate.claims.progress import TimeLeft, format_seconds

CELLS = {(arm, seed) for arm in ("toy", "nothing", "shut") for seed in range(3)}


def run(lab, *arguments, **extra):
    return toy.headgate(lab, "reproduce", "toy-gate", *arguments, **extra)


def evidence(lab, out="runs", scale="laptop"):
    return Evidence.read(lab / out / f"toy-gate-{scale}.json")


def measured(log):
    """The cells that were really measured, from the log that the toy's claim writes."""
    return [tuple(line.split()) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_run_measures_every_cell_once_and_gives_the_verdict(lab):
    log = lab / "log"
    result = run(lab, TOY_LOG=str(log))
    assert result.returncode == 0, result.stderr
    assert sorted(measured(log)) == sorted((arm, str(seed)) for arm, seed in CELLS)
    found = evidence(lab)
    assert found.verdict == "reproduced"
    assert {(record.cell.arm, record.cell.seed) for record in found.cells} == CELLS
    assert "✔ reproduced" in result.stdout
    assert "The toy is 20 points above nothing" in result.stdout
    assert (lab / "runs" / "toy-gate-laptop.png").stat().st_size > 10_000
    assert (lab / "runs" / "toy-gate-laptop-toy-toy.png").exists()
    assert found.pictures == ["toy-gate-laptop-toy-toy.png"]


def test_a_second_run_measures_nothing_again(lab):
    log = lab / "log"
    run(lab, TOY_LOG=str(log))
    first = evidence(lab)
    log.unlink()
    result = run(lab, TOY_LOG=str(log))
    assert result.returncode == 0
    assert measured(log) == []
    assert evidence(lab).to_dict() == first.to_dict()


def test_more_seeds_measure_only_the_new_ones(lab):
    log = lab / "log"
    run(lab, "--seeds", "2", TOY_LOG=str(log))
    log.unlink()
    run(lab, "--seeds", "4", TOY_LOG=str(log))
    assert sorted(seed for _, seed in measured(log)) == ["2"] * 3 + ["3"] * 3
    assert list(evidence(lab).seeds) == [0, 1, 2, 3]


def test_the_numbers_do_not_depend_on_the_number_of_processes(lab):
    run(lab, "--out", "one", "--jobs", "1")
    run(lab, "--out", "all")
    assert evidence(lab, "one").measurements() == evidence(lab, "all").measurements()


def test_a_changed_claim_is_measured_again_and_changed_prose_is_not(lab):
    log = lab / "log"
    claim = lab / "toy_lab" / "methods" / "toys" / "toy_gate" / "claim.py"
    run(lab, TOY_LOG=str(log))
    log.unlink()
    claim.write_text(claim.read_text().replace('"""The toy\'s claim."""', '"""Other words."""  # and a comment'))
    run(lab, TOY_LOG=str(log))
    assert measured(log) == []
    claim.write_text(claim.read_text().replace('"toy": 0.9', '"toy": 0.8'))
    result = run(lab, TOY_LOG=str(log))
    assert len(measured(log)) == 9
    assert "9 cells in runs/cells/toy-gate-laptop were made by other code or settings" in result.stdout


def test_a_failing_cell_is_reported_the_others_go_on_and_the_next_run_tries_it_again(lab):
    result = run(lab, TOY_FAIL="nothing")
    assert result.returncode == 2
    assert "3 cells failed (tracebacks above)" in result.stderr
    assert "RuntimeError: the toy broke" in result.stdout
    assert "Traceback" in result.stdout
    found = evidence(lab)
    assert [(failure.arm, failure.seed) for failure in found.failed] == [("nothing", 0), ("nothing", 1), ("nothing", 2)]
    assert {record.cell.arm for record in found.cells} == {"toy", "shut"}
    verdicts = {result.name: result.verdict for result in found.criteria}
    assert verdicts == {"beats-nothing": "inconclusive", "gate-matters": "reproduced"}
    log = lab / "log"
    assert run(lab, TOY_LOG=str(log)).returncode == 0
    assert {arm for arm, _ in measured(log)} == {"nothing"}
    assert evidence(lab).verdict == "reproduced"


def test_a_process_that_dies_costs_its_own_cell_alone(lab):
    result = run(lab, "--jobs", "2", TOY_DIE="shut")
    assert result.returncode == 2
    found = evidence(lab)
    assert {record.cell.arm for record in found.cells} == {"toy", "nothing"}
    assert {failure.arm for failure in found.failed} == {"shut"}
    assert "killed twice" in found.failed[0].error


def test_a_corrupt_cell_is_reported_and_measured_again(lab):
    log = lab / "log"
    run(lab)
    before = evidence(lab)
    cells = lab / "runs" / "cells" / "toy-gate-laptop"
    (cells / "toy-seed1.json").write_text('{"cell": ')
    (cells / "shut-seed2.json").write_bytes(b"")
    result = run(lab, TOY_LOG=str(log))
    assert result.returncode == 0
    assert sorted(measured(log)) == [("shut", "2"), ("toy", "1")]
    assert result.stdout.count("set aside") == 2
    assert evidence(lab).measurements() == before.measurements()


def test_a_missing_metric_is_named(lab):
    claim = lab / "toy_lab" / "methods" / "toys" / "toy_gate" / "claim.py"
    claim.write_text(claim.read_text().replace('metrics={"score": score}', 'metrics={"points": score}'))
    result = run(lab)
    assert result.returncode == 2
    assert "did not report the metric 'score'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_ten_times_gives_the_evidence_of_an_undisturbed_one(lab, which):
    assert run(lab, "--out", "calm").returncode == 0
    log = lab / "log"
    generator = random.Random(int(which))
    environment = toy.environment(lab, TOY_SLEEP="0.25", TOY_LOG=str(log))
    command = [sys.executable, "-m", "headgate.cli", "reproduce", "toy-gate", "--out", "storm"]
    cells = lab / "storm" / "cells" / "toy-gate-laptop"
    for _ in range(10):
        finished = {path.name: path.read_bytes() for path in cells.glob("[!.]*.json")} if cells.exists() else {}
        process = subprocess.Popen(
            command,
            cwd=lab,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(generator.uniform(0.2, 4.0))
        process.send_signal(which)
        process.wait(60)
        for name, content in finished.items():
            assert (cells / name).read_bytes() == content, f"{name} was finished and has changed"
    result = run(lab, "--out", "storm")
    assert result.returncode == 0, result.stderr
    assert evidence(lab, "storm").measurements() == evidence(lab, "calm").measurements()
    assert not list(cells.glob("*.tmp*"))


def test_a_killed_run_leaves_no_process_behind(lab):
    environment = toy.environment(lab, TOY_SLEEP="30")
    command = [sys.executable, "-m", "headgate.cli", "reproduce", "toy-gate", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=lab, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    group = process.pid
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list((lab / "runs" / "cells").glob(".running-*/*"))) < 2:
        time.sleep(0.1)
    process.kill()
    process.wait(60)

    def alive() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        return True

    while time.monotonic() < deadline and alive():
        time.sleep(0.1)
    assert not alive()


def test_ctrl_c_says_that_nothing_is_lost(lab):
    environment = toy.environment(lab, TOY_SLEEP="20")
    command = [sys.executable, "-m", "headgate.cli", "reproduce", "toy-gate"]
    process = subprocess.Popen(
        command, cwd=lab, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((lab / "runs" / "cells").glob(".running-*/*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished cells are kept" in message
    assert "Traceback" not in message


def test_two_runs_in_one_folder_do_not_meet(lab):
    environment = toy.environment(lab, TOY_SLEEP="20")
    command = [sys.executable, "-m", "headgate.cli", "reproduce", "toy-gate"]
    first = subprocess.Popen(command, cwd=lab, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((lab / "runs" / "cells").glob(".running-*/*")):
        time.sleep(0.1)
    second = run(lab)
    first.kill()
    first.wait(60)
    assert second.returncode == 2
    assert "another run is at work in runs" in second.stderr


def test_the_time_left_is_the_mean_of_each_arm_over_the_processes():
    cells = [Cell("toy", "laptop", arm, seed) for arm in ("a", "b") for seed in range(3)]
    left = TimeLeft(cells, jobs=2)
    assert left.seconds() is None
    left.done(cells[0], 10.0)
    left.done(cells[3], 2.0)
    assert left.seconds() == (2 * 10.0 + 2 * 2.0) / 2
    assert format_seconds(75.2) == "1:15"
    assert format_seconds(3700) == "1:01:40"


def test_evidence_names_versions_hardware_and_no_person(lab):
    run(lab)
    content = json.loads((lab / "runs" / "toy-gate-laptop.json").read_text())
    assert {"python", "torch", "numpy", "headgate"} <= content["versions"].keys()
    assert content["hardware"]["cores"] >= 1
    assert str(lab) not in json.dumps(content)
