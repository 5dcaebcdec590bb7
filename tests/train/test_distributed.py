"""Two processes under a launcher, on the CPU over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from headgate.errors import DataError, HeadgateError
from headgate.train.checkpoints import Checkpoints
from tests.train.runs import small_run
from tests.train.together import PLAIN

ROOT = Path(__file__).resolve().parents[2]


def run_module(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have made the runs of together.py."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run_module(
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        port,
        "-m",
        "tests.train.together",
        str(folder),
    )
    return folder


@pytest.fixture(scope="module")
def gave(folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes got from its runs."""
    return [json.loads((folder / f"{process}.json").read_text()) for process in range(2)]


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("batches", ["function", "list"])
def test_two_processes_give_the_losses_of_one_with_the_same_batches(batches: str, gave: list[dict[str, Any]]) -> None:
    model, history = small_run(batches, accumulate=4, **PLAIN)
    first, second = (process[batches] for process in gave)
    # Both average the same gradients, in another order: within 1e-5 relative, over 24 steps.
    assert first["losses"] == pytest.approx(history.losses, rel=1e-5)
    assert second == first
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(first["weights"][name]), value, rtol=1e-3, atol=1e-5)
    assert first["model"] == "Sequential"


@pytest.mark.parametrize("batches", ["function", "list"])
def test_two_processes_write_every_file_once(batches: str, folder: Path, gave: list[dict[str, Any]]) -> None:
    assert sorted(path.name for path in (folder / batches).iterdir()) == ["step-12", "step-24"]
    assert Checkpoints(folder / batches).newest() == 24
    records = [json.loads(line) for line in (folder / f"{batches}.jsonl").read_text().splitlines()]
    steps = [(record["kind"], record["step"]) for record in records]
    assert steps == [("evaluate", 0), *(("train", step) for step in range(24)), ("evaluate", 24)]
    assert [record["loss"] for record in records if "loss" in record] == gave[0][batches]["losses"]


def test_two_processes_go_on_exactly_each_from_its_own_random_state(folder: Path, gave: list[dict[str, Any]]) -> None:
    for process in gave:
        assert process["parts"] == process["whole"]
    state = json.loads((folder / "parts" / "step-7" / "state.json").read_text())
    first, second = (process["random_state"] for process in state["notes"]["processes"])
    assert first["torch"] != second["torch"]


def test_gradients_travel_in_the_last_accumulated_batch_alone(gave: list[dict[str, Any]]) -> None:
    for process in gave:
        assert process["gathered"] == [False, False, True] * 2


def test_every_process_hears_of_a_loss_that_is_not_finite_on_one(gave: list[dict[str, Any]]) -> None:
    for process in gave:
        assert process["diverged"].startswith("the loss of step 1 is nan")


def test_a_base_model_is_trained_by_one_process_alone_while_the_other_waits(gave: list[dict[str, Any]]) -> None:
    first, second = (process["base"] for process in gave)
    assert sorted([first["trained"], second["trained"]]) == [[], [6]]
    alone = small_run(steps=6)[0].state_dict()["0.weight"].tolist()
    assert first["weight"] == second["weight"] == alone


def test_bfloat16_trains_close_to_float32_and_the_model_is_left_without_wrappers(gave: list[dict[str, Any]]) -> None:
    first, second = (process["bf16"] for process in gave)
    assert first == second
    expected = small_run(accumulate=2, **PLAIN)[1].losses
    assert first["losses"] == pytest.approx(expected, rel=0.1, abs=0.02)
    assert first["losses"] != pytest.approx(expected, rel=1e-5)
    assert (first["model"], first["forward"]) == ("Sequential", False)
    assert gave[0]["after"]["losses"] == gave[0]["function"]["losses"]  # the next run is in float32 again


def test_a_sharded_model_trains_like_a_whole_one_and_goes_on_exactly(folder: Path, gave: list[dict[str, Any]]) -> None:
    model, history = small_run(accumulate=2, steps=12, **PLAIN)
    for process in gave:
        assert process["sharded whole"]["parameter"] == "DTensor"
        assert process["sharded whole"]["losses"] == pytest.approx(history.losses, rel=1e-5)
        assert process["sharded parts"] == process["sharded whole"]
    stored = Checkpoints(folder / "sharded").read(12)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(stored.model[name], value, rtol=1e-3, atol=1e-5)
    assert stored.optimizer["state"]["0.weight"]["exp_avg"].shape == (16, 6)


def test_a_checkpoint_of_two_processes_is_refused_by_one(folder: Path) -> None:
    with pytest.raises(DataError, match="processes=2, this run has processes=1"):
        small_run(steps=30, checkpoints=folder / "function", accumulate=2, **PLAIN)


def test_accelerate_launch_decides_on_the_precision(tmp_path: Path) -> None:
    told = json.dumps({"folder": str(tmp_path), **PLAIN, "steps": 6})
    options = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no")
    run_module("accelerate.commands.launch", *options, "--mixed_precision", "bf16", "-m", "tests.train.runs", told)
    losses = json.loads((tmp_path / "history-0.json").read_text())["losses"]
    assert losses == small_run(mixed_precision="bf16", steps=6, **PLAIN)[1].losses


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_that_sees_one_of_several_launched_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HeadgateError, match="2 processes were launched, but the accelerator sees one"):
        small_run(steps=1, accelerator=accelerator)


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_accelerator_in_one_process_trains_as_none_does() -> None:
    assert small_run(steps=6, accelerator=Accelerator(cpu=True))[1].losses == small_run(steps=6)[1].losses


@pytest.mark.usefixtures("fresh_accelerate")
def test_settings_that_contradict_the_accelerator_are_refused() -> None:
    with pytest.raises(ValueError, match="mixed_precision must agree with the accelerator's, got 'bf16' and 'no'"):
        small_run(steps=1, accelerator=Accelerator(cpu=True), mixed_precision="bf16")
    with pytest.raises(ValueError, match="give accumulate to fit instead"):
        small_run(steps=1, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))
