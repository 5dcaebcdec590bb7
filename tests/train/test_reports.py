from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.errors import MissingExtraError
from headgate.train import fit
from headgate.train.progress import open_progress
from tests.train.runs import accuracy, small_run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_the_log_holds_every_tenth_step_the_last_one_and_every_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    history = small_run(log=path, evaluate=accuracy, evaluate_every=15)[1]
    records = read(path)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("evaluate", 0),
        ("train", 0),
        ("train", 10),
        ("evaluate", 15),
        ("train", 20),
        ("train", 23),
        ("evaluate", 24),
    ]
    for record in records:
        if record["kind"] == "train":
            assert record["loss"] == history.losses[record["step"]]
        else:
            assert record["accuracy"] == history.metrics[record["step"]]["accuracy"]
    assert [record["seconds"] for record in records] == sorted(record["seconds"] for record in records)
    # The schedule rises over four steps to the base rate of 0.05.
    assert records[1]["learning_rate"] == pytest.approx(0.05 / 4)


def test_logged_scalars_are_averaged_over_accumulated_batches(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        return model(batch).sum() + batch.mean(), {"mean": batch.mean(), "number": 2.0}

    batches = [torch.full((2, 3), float(value)) for value in (1, 4, 7, 10)]
    fit(nn.Linear(3, 1), batches, loss, steps=2, accumulate=2, log=tmp_path / "log", log_every=1)
    records = read(tmp_path / "log")
    assert [(record["mean"], record["number"]) for record in records] == [(2.5, 2.0), (8.5, 2.0)]


def test_lines_are_flushed_while_the_run_goes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    seen: list[int] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        seen.append(len(read(path)))
        return {}

    small_run(steps=4, log=path, log_every=1, evaluate=evaluate, evaluate_every=1)
    assert seen == [0, 2, 4, 6, 8]


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"evaluate": accuracy, "evaluate_every": 4, "log_every": 3, "checkpoint_every": 8}
    small_run(checkpoints=tmp_path / "whole", log=tmp_path / "whole.jsonl", **settings)
    small_run(steps=8, checkpoints=tmp_path / "parts", log=tmp_path / "parts.jsonl", **settings)
    with open(tmp_path / "parts.jsonl", "a") as file:
        # Written behind the checkpoint by a run that was killed while it wrote the second line.
        file.write('{"kind": "train", "step": 9, "loss": 1.0}\n{"kind": "tra')
    small_run(checkpoints=tmp_path / "parts", log=tmp_path / "parts.jsonl", **settings)
    expected = without_seconds(read(tmp_path / "whole.jsonl"))
    # A run of 8 steps also logs its own last one.
    records = [r for r in without_seconds(read(tmp_path / "parts.jsonl")) if (r["kind"], r["step"]) != ("train", 7)]
    assert records == expected


def test_a_log_in_any_language_survives_a_resume_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(steps: int) -> None:
        small_run(
            steps=steps, checkpoints=tmp_path / "checkpoints", log=tmp_path / "log", evaluate=lambda m, s: {"ä": s}
        )

    run(2)
    line = '{"kind": "evaluate", "step": 0, "größe": 1}\n'
    (tmp_path / "log").write_text(line + (tmp_path / "log").read_text(), encoding="utf-8")
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="ascii": read_text(path, encoding=encoding))
    run(3)
    assert (tmp_path / "log").read_bytes().decode().startswith(line)


def test_a_last_line_without_its_end_is_cut_before_others_follow_it(tmp_path: Path) -> None:
    small_run(steps=3, checkpoints=tmp_path / "checkpoints", log=tmp_path / "log", log_every=1)
    (tmp_path / "log").write_text((tmp_path / "log").read_text().rstrip())
    small_run(steps=5, checkpoints=tmp_path / "checkpoints", log=tmp_path / "log", log_every=1)
    assert [record["step"] for record in read(tmp_path / "log")] == [0, 1, 3, 4]


def test_a_run_that_begins_anew_begins_the_log_anew(tmp_path: Path) -> None:
    small_run(steps=9, log=tmp_path / "log", log_every=1)
    small_run(steps=3, log=tmp_path / "log", log_every=1)
    assert [record["step"] for record in read(tmp_path / "log")] == [0, 1, 2]


def test_metrics_that_are_not_finite_stand_as_null(tmp_path: Path) -> None:
    history = small_run(steps=1, log=tmp_path / "log", evaluate=lambda model, step: {"worst": float("inf")})[1]
    assert read(tmp_path / "log")[0]["worst"] is None
    assert history.metrics[0]["worst"] == math.inf


def test_tensorboard_gets_losses_and_metrics_at_their_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings: dict[str, Any] = {"tensorboard": tmp_path / "board", "evaluate": accuracy, "log_every": 2}
    small_run(steps=4, checkpoints=tmp_path / "checkpoints", **settings)
    history = small_run(steps=8, checkpoints=tmp_path / "checkpoints", **settings)[1]
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == {step: pytest.approx(history.losses[step]) for step in (0, 2, 3, 4, 6, 7)}
    found = {event.step: event.value for event in events.Scalars("evaluate/accuracy")}
    assert found == {step: pytest.approx(metrics["accuracy"]) for step, metrics in history.metrics.items()}
    assert {"train/learning_rate", "train/accuracy"} <= set(events.Tags()["scalars"])


def test_a_missing_tensorboard_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'headgate\[tensorboard\]'"):
        small_run(steps=1, tensorboard=tmp_path)


def test_progress_outside_a_terminal_is_a_line_at_each_tenth_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    history = small_run(steps=20, progress=True, log_every=1)[1]
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert out == ""
    assert [line.split("  ")[0] for line in lines] == [f"step {step}/20" for step in range(2, 21, 2)]
    assert lines[-1] == f"step 20/20  loss {history.losses[-1]:.4g}  0:00:00 left"


def test_progress_of_a_resumed_run_begins_where_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_run(steps=15, checkpoints=tmp_path)
    small_run(steps=20, checkpoints=tmp_path, progress=True, log_every=1)
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 16/20",
        "step 18/20",
        "step 20/20",
    ]


def test_progress_in_a_terminal_shows_steps_and_loss() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    display = open_progress(steps=40, start=10, stream=screen)
    display.show(30, 0.12345)
    display.close()
    assert "30/40" in screen.getvalue()
    assert "loss 0.1235" in screen.getvalue()


def test_without_reports_nothing_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_run(steps=3)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
