from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.errors import DataError
from headgate.train import fit, make_optimizer, seeded
from headgate.train.checkpoints import Checkpoint, Checkpoints
from headgate.train.optimizer_state import optimizer_state, set_optimizer_state
from headgate.train.tensor_files import file_digest, read_tensors, separate, tensor_digest, write_tensors

NO_STATE: Any = {"kind": "SGD", "state": {}, "param_groups": []}


def checkpoint(step: int, **changes: Any) -> Checkpoint:
    parts = {
        "model": {"weight": torch.tensor([1.0])},
        "optimizer": NO_STATE,
        "losses": [],
        "settings": {},
        "notes": {},
        **changes,
    }
    return Checkpoint(step, **parts)


class Counting(torch.optim.Optimizer):
    """An optimizer with a number in its state, and a counter and a pair among its groups' settings."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "count": 0, "pair": (0.5, 0.25)})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["seen"] = state.get("seen", 0) + 1
                state["history"] = [*state.get("history", []), state["seen"] / 3]
                with torch.no_grad():
                    parameter -= group["lr"] * parameter.grad / (group["count"] + state["history"][-1])


def test_numbers_lists_and_group_settings_of_an_optimizer_go_on(tmp_path: Path) -> None:
    def run(steps: int, folder: Path | None) -> tuple[list[float], Counting]:
        with seeded(0):
            model = nn.Linear(3, 1)
        optimizer = Counting(model.parameters())
        batches = [torch.ones(2, 3), -torch.ones(2, 3)]
        history = fit(
            model,
            batches,
            lambda m, batch: m(batch).square().mean(),
            steps=steps,
            optimizer=optimizer,
            checkpoints=folder,
        )
        return history.losses, optimizer

    whole, _ = run(8, None)
    run(5, tmp_path)
    losses, optimizer = run(8, tmp_path)
    assert losses == whole
    assert optimizer.param_groups[0]["count"] == 8
    assert optimizer.param_groups[0]["pair"] == (0.5, 0.25)


def test_a_state_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    odd: Any = {"kind": "SGD", "state": {"weight": {"odd": object()}}, "param_groups": []}
    with pytest.raises(TypeError, match="optimizer's state 'odd' must be a tensor, number, string or list"):
        Checkpoints(tmp_path).write(checkpoint(1, optimizer=odd))
    with pytest.raises(TypeError, match="'extra' is a str"):
        Checkpoints(tmp_path).write(checkpoint(1, model={"extra": "text"}))
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_extra_state_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> str:
            return "text"

    def never(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("no step may be made")

    with pytest.raises(TypeError, match="'_extra_state' is a str"):
        fit(Extra(2, 1), [torch.ones(1, 2)], never, steps=3, checkpoints=tmp_path)


def test_state_follows_names_when_another_optimizer_takes_it_and_its_rate_stays() -> None:
    def stepped(rate: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        with seeded(0):
            model = nn.Linear(3, 2)
        optimizer = make_optimizer(model, learning_rate=rate)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = stepped(0.1)
    state = optimizer_state(optimizer, model)
    assert set(state["state"]) == {"weight", "bias"}
    with seeded(5):
        other = nn.Linear(3, 2)
    taking = make_optimizer(other, learning_rate=0.7)
    set_optimizer_state(taking, other, state)
    assert taking.param_groups[0]["lr"] == 0.7
    assert torch.equal(taking.state[other.bias]["exp_avg"], optimizer.state[model.bias]["exp_avg"])
    assert taking.state[other.weight]["step"].item() == 1


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    losses = [0.1, math.pi, 1e-300]
    store = Checkpoints(tmp_path)
    store.write(checkpoint(3, losses=losses, settings={"processes": 1}, notes={"a": [1, None, "ü", math.inf]}))
    assert store.newest() == 3
    back = store.read(3)
    assert back.losses == losses
    assert back.settings == {"processes": 1}
    assert back.notes == {"a": [1, None, "ü", math.inf]}
    assert back.model["weight"].item() == 1.0


def test_a_checkpoint_that_the_disk_cannot_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path)
    store.write(checkpoint(1))
    store.write(checkpoint(2))

    def broken(path: Path) -> str:
        if path.parent.name == "step-2":
            raise OSError(5, "Input/output error")
        return file_digest(path)

    monkeypatch.setattr("headgate.train.checkpoints.file_digest", broken)
    with pytest.warns(RuntimeWarning, match="step-2.* cannot be read: Input/output error"):
        assert store.newest() == 1


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.write(checkpoint(3))
    store.write(checkpoint(3, model={"weight": torch.tensor([2.0])}))
    assert store.newest() == 3
    assert store.read(3).model["weight"].item() == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_folders_and_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-9").write_text("a file")
    (tmp_path / "step-x").mkdir()
    (tmp_path / "notes").mkdir()
    store = Checkpoints(tmp_path, keep=1)
    assert store.newest() is None
    store.write(checkpoint(1))
    store.write(checkpoint(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step-2", "step-9", "step-x"]


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headgate.train.checkpoints._FORMAT", 99)
    Checkpoints(tmp_path).write(checkpoint(1))
    monkeypatch.undo()
    with pytest.raises(DataError, match="has format 99, this version reads 1"):
        Checkpoints(tmp_path).read(1)


def test_every_dtype_and_every_view_survives_a_file(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "half": base.bfloat16(),
        "flags": base > 3,
        "whole": base,
        "same": base,
        "view": base[1:, ::2],
        "transposed": base.T,
        "number": torch.tensor(7),
        "nothing": torch.empty(0, 3),
    }
    write_tensors(tmp_path / "file", separate(state))
    back = read_tensors(tmp_path / "file")
    assert set(back) == set(state)
    for name, value in state.items():
        assert torch.equal(back[name], value)
        assert back[name].dtype == value.dtype
    assert tensor_digest(back) == tensor_digest(state)


def test_the_digest_sees_names_dtypes_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others: list[dict[str, Tensor]] = [
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": -torch.ones(1)},
    ]
    assert tensor_digest(dict(reversed(base.items()))) == tensor_digest(base)
    assert len({tensor_digest(state) for state in [base, *others]}) == 5
