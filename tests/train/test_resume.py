"""A run that was interrupted and goes on gives the same numbers, bit for bit, as one that never stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.errors import DataError, HeadgateError
from headgate.train import fit, make_optimizer, seeded
from headgate.train.checkpoints import Checkpoints
from tests.train.runs import accuracy, cross_entropy, small_batches, small_model, small_run

ROOT = Path(__file__).resolve().parents[2]


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("batches", ["function", "list", "loader", "loader-generator"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_gives_the_same_losses_and_weights(
    batches: str, optimizer: str, accumulate: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"accumulate": accumulate, "evaluate": accuracy, "evaluate_every": 4}
    whole_model, whole = small_run(batches, optimizer, **settings)
    # 7 and 15 lie inside epochs of five batches, and between evaluations.
    for steps in (7, 15, 24):
        model, history = small_run(batches, optimizer, steps, checkpoints=tmp_path, checkpoint_every=100, **settings)
        assert history.losses == whole.losses[:steps]
        assert history.steps == steps
    assert same_weights(model, whole_model)
    in_both = {step: whole.metrics[step] for step in range(0, 25, 4)}
    assert {step: metrics for step, metrics in history.metrics.items() if step in in_both} == in_both
    assert history.seconds > 0


@pytest.mark.parametrize("batches", ["loader-workers", "loader-persistent"])
def test_resuming_a_loader_with_worker_processes_gives_the_same_losses(batches: str, tmp_path: Path) -> None:
    whole = small_run(batches, steps=12)[1]
    small_run(batches, steps=7, checkpoints=tmp_path)
    assert small_run(batches, steps=12, checkpoints=tmp_path)[1].losses == whole.losses


def test_every_global_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(steps: int, folder: Path | None) -> list[float]:
        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            factor = random.random() + float(np.random.standard_normal()) + torch.rand(())  # noqa: NPY002
            return (model(batch) * factor).square().mean()

        with seeded(0):
            model = nn.Linear(2, 1)
        return fit(model, [torch.ones(3, 2)], loss, steps=steps, checkpoints=folder, seed=4).losses

    whole = run(9, None)
    run(4, tmp_path)
    assert run(9, tmp_path) == whole


def test_a_run_without_a_seed_goes_on_from_the_stored_random_state(tmp_path: Path) -> None:
    with seeded(5):
        whole = small_run(seed=None)[1].losses
    with seeded(5):
        small_run(seed=None, steps=9, checkpoints=tmp_path)
    with seeded(77):
        assert small_run(seed=None, checkpoints=tmp_path)[1].losses == whole


def test_float16_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return 1000 * cross_entropy(model, batch)[0]  # overflows float16 until the scale has come down

    def run(steps: int, folder: Path | None) -> tuple[nn.Module, list[float]]:
        model = small_model(dropout=0.0)
        optimizer = make_optimizer(model, "sgd", learning_rate=1e-4)
        batches = small_batches("function")
        history = fit(
            model, batches, loss, steps=steps, optimizer=optimizer, mixed_precision="fp16", checkpoints=folder
        )
        return model, history.losses

    whole_model, whole = run(20, None)
    run(12, tmp_path)
    scale = json.loads((tmp_path / "step-12" / "state.json").read_text())["notes"]["scaler"]["scale"]
    assert scale < 2.0**16  # where it begins
    model, losses = run(20, tmp_path)
    assert losses == whole
    assert same_weights(model, whole_model)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first_model, first = small_run(steps=6, checkpoints=tmp_path, evaluate=accuracy)

    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("no step is left")

    model = small_model()
    optimizer = make_optimizer(model, weight_decay=0.1)
    again = fit(
        model, small_batches("list"), never, steps=6, checkpoints=tmp_path, optimizer=optimizer, evaluate=accuracy
    )
    assert (again.losses, again.metrics, again.steps) == (first.losses, first.metrics, 6)
    assert same_weights(model, first_model)


def test_stop_sees_the_earlier_metrics_again_so_patience_survives(tmp_path: Path) -> None:
    class Patience:
        def __init__(self) -> None:
            self.values: list[float] = []

        def __call__(self, metrics: Any) -> bool:
            self.values.append(metrics["accuracy"])
            return len(self.values) >= 6

    def run(steps: int, folder: Path | None) -> tuple[int, list[float]]:
        patience = Patience()
        history = small_run(steps=steps, evaluate=accuracy, evaluate_every=2, stop=patience, checkpoints=folder)[1]
        return history.steps, patience.values

    whole = run(24, None)
    run(4, tmp_path)
    assert run(24, tmp_path) == whole
    assert whole[0] == 10
    assert run(24, tmp_path) == whole  # stopped early: the last checkpoint is that of the stop, and nothing more is run


def test_resume_false_begins_anew_and_replaces_what_was_there(tmp_path: Path) -> None:
    small_run(steps=20, checkpoints=tmp_path, checkpoint_every=5, keep=3)
    history = small_run(steps=12, checkpoints=tmp_path, checkpoint_every=5, keep=3, resume=False)[1]
    assert history.losses == small_run(steps=12)[1].losses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-12", "step-5"]


def test_the_newest_checkpoints_are_kept_and_by_default_ten_are_written(tmp_path: Path) -> None:
    small_run(steps=24, checkpoints=tmp_path, keep=30)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == list(range(2, 25, 2))
    small_run(steps=26, checkpoints=tmp_path, checkpoint_every=1, keep=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-22", "step-24", "step-25", "step-26"]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "history.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(file: str, harm: str, tmp_path: Path) -> None:
    whole = small_run(steps=9)[1].losses
    small_run(steps=6, checkpoints=tmp_path, checkpoint_every=3)
    path = tmp_path / "step-6" / file
    content = path.read_bytes()
    if harm == "remove":
        path.unlink()
    elif harm == "flip":
        position = content.index(b'": "') + 5 if file == "manifest.json" else len(content) // 2
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "truncate" else b"")
    with pytest.warns(RuntimeWarning, match="damaged checkpoint passed over: .*step-6") as caught:
        history = small_run(steps=9, checkpoints=tmp_path, checkpoint_every=3)[1]
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert history.losses == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-6", "step-9"]


def test_a_folder_of_damaged_checkpoints_begins_anew_and_says_so(tmp_path: Path) -> None:
    small_run(steps=4, checkpoints=tmp_path, checkpoint_every=2)
    for path in tmp_path.glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.warns(RuntimeWarning) as caught:
        history = small_run(steps=6, checkpoints=tmp_path, checkpoint_every=3)[1]
    assert [str(warning.message).split(":")[0] for warning in caught][:2] == ["damaged checkpoint passed over"] * 2
    assert "starting from step 0" in str(caught[2].message)
    assert history.losses == small_run(steps=6)[1].losses
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-6"]


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(steps=3, checkpoints=tmp_path, keep=1)

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(HeadgateError, match=r"cannot write .*step-6.*No space left"):
            small_run(steps=6, checkpoints=tmp_path, checkpoint_every=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    assert small_run(steps=6, checkpoints=tmp_path)[1].losses == small_run(steps=6)[1].losses


def wider() -> nn.Module:
    model = small_model()
    model[4] = nn.Linear(16, 7)
    return model


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    small_run(steps=3, checkpoints=tmp_path)

    def resume(model: nn.Module) -> None:
        fit(model, small_batches("list"), cross_entropy, steps=5, checkpoints=tmp_path)

    with pytest.raises(DataError, match=r"4.weight is float32 \(3, 16\), the model's is float32 \(7, 16\)"):
        resume(wider())
    with pytest.raises(
        DataError, match=r"4.extra.weight is missing; 4.extra.bias is missing; 4.(bias|weight) is unknown and 1 more"
    ):
        model = small_model()
        model[4] = nn.ModuleDict({"extra": nn.Linear(16, 3)})
        resume(model)
    with pytest.raises(DataError, match=r"0.weight is float32 .* the model's is float64"):
        resume(small_model().double())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "the checkpoint holds the state of AdamW, the optimizer is SGD"),
        ({"accumulate": 2}, "accumulate=1, this run has accumulate=2"),
        ({"mixed_precision": "bf16"}, "mixed_precision=no, this run has mixed_precision=bf16"),
    ],
)
def test_a_checkpoint_of_a_run_set_up_differently_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    small_run(steps=3, checkpoints=tmp_path)
    with pytest.raises(DataError, match=message):
        small_run(steps=5, checkpoints=tmp_path, **changes)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    small_run(steps=3, checkpoints=tmp_path)
    model = small_model()
    with pytest.raises(DataError, match="parameter groups"):
        fit(
            model,
            small_batches("function"),
            cross_entropy,
            steps=5,
            checkpoints=tmp_path,
            optimizer=make_optimizer(model, overrides={"4.*": {"lr": 0.1}}),
        )


def test_fewer_steps_than_the_checkpoint_holds_are_refused(tmp_path: Path) -> None:
    small_run(steps=6, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"steps must reach the checkpoint .* got steps=4 and step-6"):
        small_run(steps=4, checkpoints=tmp_path)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    called: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        called.append(1)
        return cross_entropy(model, batch)

    for where in ("checkpoints", "log"):
        with pytest.raises(HeadgateError, match="file"):
            fit(small_model(), small_batches("list"), loss, steps=3, **{where: tmp_path / "file" / "inside"})
    assert called == []


def test_parameters_outside_the_model_are_refused_where_a_checkpoint_would_lose_them(tmp_path: Path) -> None:
    model, temperature = small_model(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([*model.parameters(), temperature])
    with pytest.raises(ValueError, match="optimizer must hold parameters of model alone"):
        fit(model, small_batches("list"), cross_entropy, steps=3, checkpoints=tmp_path, optimizer=optimizer)
    assert fit(model, small_batches("list"), cross_entropy, steps=3, optimizer=optimizer).steps == 3


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        with seeded(1):
            model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        return model

    def run(steps: int, folder: Path | None) -> tuple[nn.Module, list[float]]:
        model = tied()
        return model, fit(model, small_batches("list"), cross_entropy, steps=steps, checkpoints=folder).losses

    _, whole = run(8, None)
    run(3, tmp_path)
    model, losses = run(8, tmp_path)
    assert losses == whole
    assert model[2].weight is model[0].weight  # type: ignore[index]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    small_run(steps=3, checkpoints=tmp_path)
    names = {path.name for path in (tmp_path / "step-3").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "history.safetensors", "state.json", "manifest.json"}
    for path in (tmp_path / "step-3").glob("*.json"):
        json.loads(path.read_text())
    for path in (tmp_path / "step-3").glob("*.safetensors"):
        # A safetensors file begins with the length of its JSON header.
        content = path.read_bytes()
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.mark.parametrize(("batches", "moment"), [("function", "between checkpoints"), ("loader", "in a checkpoint")])
def test_a_run_killed_in_the_middle_goes_on_as_if_nothing_had_happened(
    batches: str, moment: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"batches": batches, "accumulate": 2}
    stored = {**settings, "checkpoint_every": 3, "log_every": 1}
    whole_model, whole = small_run(**settings)
    log, folder = tmp_path / "log.jsonl", tmp_path / "checkpoints"

    def is_there() -> bool:
        if moment == "in a checkpoint":
            return any(folder.glob(".step-9.*"))
        return log.exists() and log.read_text().count("\n") >= 11

    told = {
        "folder": str(tmp_path),
        "slow": 0.05,
        "stall_at": "step-9" if moment == "in a checkpoint" else None,
        **stored,
    }
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "tests.train.runs", json.dumps(told)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 240
    while not is_there() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    assert Checkpoints(folder).newest() == (6 if moment == "in a checkpoint" else 9)
    model, history = small_run(checkpoints=folder, log=log, **stored)
    assert history.losses == whole.losses
    assert same_weights(model, whole_model)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(24))
    assert [record["loss"] for record in records] == whole.losses
    assert not list(folder.glob(".*"))
