"""A small package of one's own with one method in it, written into a folder and found through an entry point.

Its claim measures in milliseconds; environment variables make it slow, fail, die or hang, so that the engine's promises
can be tested on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CARD = """
slug = "toy-gate"
title = "A toy gate"
summary = "Doubles its input when the gate is open."
family = "toys"
kinds = ["gate", "layer"]
exports = ["ToyGate"]

[paper]
title = "On toys"
authors = ["Ada Lovelace", "Alan Turing"]
venue = "Journal of Toys"
year = 1950

[usage]
code = "gate = 2"

[presets.toy_two]
export = "ToyGate"
summary = "A gate of two."
arguments = { dim = 2 }
parameters = 2

[claim]
statement = "The toy beats nothing at all."
source = "Table 1"
primary = "score"

[[claim.arms]]
name = "toy"
role = "method"
label = "Toy"
summary = "The toy."

[[claim.arms]]
name = "nothing"
role = "baseline"
label = "Nothing"
summary = "Nothing at all."

[[claim.arms]]
name = "shut"
role = "ablation"
label = "Shut toy"
summary = "The gate stays shut."

[claim.metrics.score]
label = "Score"
unit = "%"
better = "higher"

[[claim.criteria]]
name = "beats-nothing"
statement = "The toy is 20 points above nothing"
metric = "score"
arm = "toy"
relation = "above"
against = "nothing"
margin = 0.2

[[claim.criteria]]
name = "gate-matters"
statement = "A shut toy is below an open one"
metric = "score"
arm = "shut"
relation = "below"
against = "toy"

[claim.scales.smoke]
seeds = 2
summary = "At once."

[claim.scales.laptop]
seeds = 3
summary = "At once, too."

[[claim.findings]]
scale = "laptop"
text = "An open gate is all it takes."
"""

CLAIM = '''
"""The toy's claim."""

import os
import signal
import time

import numpy as np

from headgate.measurement import Curve, Measurement


def measure(arm, seed, scale):
    if arm not in ("toy", "nothing", "shut"):
        raise ValueError(f"unknown arm {arm!r}")
    log = os.environ.get("TOY_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{arm} {seed}\\n")
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    if os.environ.get("TOY_FULL_DISK") == f"{arm} {seed}":
        def full(_):
            raise OSError(28, "No space left on device")

        os.fsync = full
    if os.environ.get("TOY_DATA"):
        from headgate.data import read_text

        read_text(os.environ["TOY_DATA"])
    if os.environ.get("TOY_FAIL") == arm:
        raise RuntimeError("the toy broke")
    if os.environ.get("TOY_DIE") == arm:
        os.kill(os.getpid(), signal.SIGKILL)
    noise = np.random.default_rng(seed).normal() / 100
    score = {"toy": 0.9, "nothing": 0.5, "shut": 0.6}[arm] + noise + hash_free(arm, seed) / 1000
    picture = np.full((4, 6, 3), 200, np.uint8)
    return Measurement(
        metrics={"score": score},
        curves={"score over steps": Curve([1, 2, 4], [0.1, 0.2, score], "steps", "score", log_x=True)},
        pictures={"toy": picture} if arm == "toy" else {},
        notes={"learning_rate": 0.1},
    )


def hash_free(arm, seed):
    return (len(arm) * 7 + seed * 3) % 5
'''

ROOM = '''
"""A toy room."""

import torch


class ToyGate(torch.nn.Module):
    """Scales every channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.scale


__all__ = ["ToyGate"]
'''


def write_toy(folder: Path, card: str = CARD, claim: str = CLAIM, package: str = "toy_lab") -> Path:
    """Write the package, with the metadata that an installed one has, into ``folder``, and return its room."""
    room = folder / package / "methods" / "toys" / "toy_gate"
    room.mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "methods" / "__init__.py").write_text("")
    (room.parent / "__init__.py").write_text("")
    (room / "__init__.py").write_text(ROOM)
    (room / "claim.py").write_text(claim)
    (room / "card.toml").write_text(card)
    info = folder / f"{package}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[headgate.methods]\n{package} = {package}.methods\n")
    return room


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """The environment of a subprocess that finds the toy package in ``folder``."""
    source = Path(__file__).parent.parent / "src"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(source)]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "140",
        **extra,
    }


def headgate(folder: Path, *arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the ``headgate`` command with the toy package of ``folder`` installed."""
    return subprocess.run(
        [sys.executable, "-m", "headgate.cli", *arguments],
        capture_output=True,
        text=True,
        env=environment(folder, **extra),
        cwd=cwd or folder,
        timeout=300,
    )
