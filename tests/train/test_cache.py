from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headgate.errors import HeadgateError
from headgate.train import base_model, cache_folder, seeded
from headgate.train.seeds import random_state

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, sys, time
import torch
from pathlib import Path
from headgate.train import base_model

def train(model):
    with open(sys.argv[1], "a") as file:
        file.write("begin\\n")
    time.sleep(float(sys.argv[2]))
    torch.nn.init.normal_(model.weight)

model, seconds = base_model("shared", lambda: torch.nn.Linear(2, 2), train, {"size": 2})
print(json.dumps([model.weight.tolist(), seconds]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    """A training procedure that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module) -> None:
        self.calls += 1
        time.sleep(0.02)
        for parameter in model.parameters():
            nn.init.normal_(parameter)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))


def files(cache: Path) -> list[Path]:
    return sorted((cache / "base").glob("*.safetensors"))


def test_a_model_is_trained_once_and_then_read_with_the_seconds_that_it_took(cache: Path) -> None:
    train = Counted()
    first, seconds = base_model("net", build, train, {"width": 4})
    again, same_seconds = base_model("net", build, train, {"width": 4})
    assert train.calls == 1
    assert seconds == same_seconds >= 0.02
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert first is not again
    assert not first.training
    assert not again.training
    assert [path.name.startswith("net-") for path in files(cache)] == [True]


def test_name_and_settings_tell_models_apart_whatever_the_order_of_the_settings(cache: Path) -> None:
    @dataclass(frozen=True)
    class Settings:
        width: int
        depth: int

    train = Counted()
    base_model("net", build, train, {"width": 4, "depth": 1})
    base_model("net", build, train, {"depth": 1, "width": 4})
    base_model("net", build, train, Settings(4, 1))
    assert train.calls == 1
    base_model("net", build, train, {"width": 4, "depth": 2})
    base_model("other", build, train, {"width": 4, "depth": 1})
    assert train.calls == 3
    assert len(files(cache)) == 3


def test_another_version_makes_the_model_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = Counted()
    base_model("net", build, train, {})
    monkeypatch.setattr("headgate.train.cache.__version__", "99.0")
    base_model("net", build, train, {})
    assert train.calls == 2


def test_what_follows_is_the_same_whether_the_model_was_cached_or_not() -> None:
    with seeded(3):
        state = random_state()
        base_model("net", build, Counted(), {})
        assert random_state() == state
        base_model("net", build, Counted(), {})
        assert random_state() == state


def test_the_model_depends_on_the_settings_and_not_on_the_global_state(cache: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        with seeded(seed):
            model, _ = base_model("net", build, Counted(), {})
        for path in files(cache):
            path.unlink()
        return model[0].weight  # type: ignore[index]

    assert torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "foreign"])
def test_a_damaged_file_is_reported_and_made_again(harm: str, cache: Path) -> None:
    train = Counted()
    model, _ = base_model("net", build, train, {})
    (path,) = files(cache)
    content = path.read_bytes()
    harmed = {
        "truncate": content[: len(content) // 2],
        "flip": content[:-8] + bytes([content[-8] ^ 1]) + content[-7:],
        "empty": b"",
        "foreign": b"not safetensors at all",
    }
    path.write_bytes(harmed[harm])
    with pytest.warns(RuntimeWarning, match="cached base model is made again: .*net-") as caught:
        again, _ = base_model("net", build, train, {})
    assert len(caught) == 1
    assert train.calls == 2
    assert torch.equal(again[0].weight, model[0].weight)  # type: ignore[index]
    assert path.read_bytes()[8:-1] != harmed[harm][8:-1]
    base_model("net", build, train, {})
    assert train.calls == 2


def test_a_model_whose_shape_has_changed_is_made_again() -> None:
    base_model("net", lambda: nn.Sequential(nn.Linear(3, 4)), Counted(), {})
    with pytest.warns(RuntimeWarning, match=r"0.weight is float32 \(4, 3\), the model's is float32 \(5, 3\)"):
        model, _ = base_model("net", lambda: nn.Sequential(nn.Linear(3, 5)), Counted(), {})
    assert model[0].weight.shape == (5, 3)  # type: ignore[index]


def test_a_training_that_fails_leaves_no_file(cache: Path) -> None:
    def fails(model: nn.Module) -> None:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        base_model("net", build, fails, {})
    assert files(cache) == []
    train = Counted()
    base_model("net", build, train, {})
    assert train.calls == 1


def start(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(tmp_path / "begun"), str(seconds)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def begun(tmp_path: Path) -> int:
    path = tmp_path / "begun"
    return path.read_text().count("begin") if path.exists() else 0


def test_processes_that_ask_at_the_same_time_wait_for_one_training(tmp_path: Path) -> None:
    first, second = start(tmp_path, 1.0), start(tmp_path, 1.0)
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in (first, second)]
    assert begun(tmp_path) == 1
    assert answers[0] == answers[1]


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    process = start(tmp_path, 600.0)
    deadline = time.monotonic() + 120
    while not begun(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    weights, _ = json.loads(start(tmp_path, 0.0).communicate(timeout=120)[0])
    assert begun(tmp_path) == 2
    assert len(weights) == 2


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("a/b", {}, ValueError, "name must consist"),
        ("", {}, ValueError, "name must consist"),
        ("net", {"model": nn.Linear(1, 1)}, TypeError, "settings must hold what JSON can hold"),
        ("net", [1, 2], TypeError, "settings must be a dict or a dataclass, got list"),
    ],
)
def test_bad_input_is_refused(name: str, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        base_model(name, build, Counted(), settings)


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(HeadgateError, match=r"cannot write .*HEADGATE_CACHE"):
        base_model("net", build, Counted(), {})


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("HEADGATE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "headgate"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "headgate"
