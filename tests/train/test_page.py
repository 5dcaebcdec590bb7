"""Runs the blocks of ``docs/train.md``, one after the other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "train.md").read_text(encoding="utf-8")


def test_the_page_runs_and_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADGATE_CACHE", "cache")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.count("```python") == 6
    for block in blocks:
        exec(compile(block, "train.md", "exec"), names)  # the page is part of this repository
    out, error = capsys.readouterr()
    first, last = map(float, re.findall(r"\d\.\d\d", out.splitlines()[0]))
    assert first > 1.0 > 0.5 > last
    stopped = re.search(r"stopped after (\d+) steps at (\d+\.\d)%", out)
    assert stopped is not None
    assert int(stopped[1]) < 2000
    assert float(stopped[2]) > 85
    assert "step 50/50" in error
    written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*")}
    assert {("run", "checkpoints"), ("run", "log.jsonl"), ("run", "board"), ("cache", "base")} <= written
    shown = json.loads(re.search(r"# (\{.*\})$", PAGE, flags=re.MULTILINE)[1].replace("…", "0"))  # type: ignore[index]
    assert list(names["lines"][-1]) == list(shown)
    assert [record["step"] for record in names["lines"]] == sorted({record["step"] for record in names["lines"]})
    assert torch.equal(names["base"][0].weight, names["again"][0].weight)


def test_the_launchers_know_the_options_of_the_page() -> None:
    modules = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
    lines = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", PAGE, flags=re.MULTILINE)]
    assert len(lines) == 3
    for name, module in modules.items():
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
        known = done.stdout.replace("_", "-")
        for line in lines:
            if line[0] == name:
                for option in (part for part in line if part.startswith("--")):
                    assert option in known, f"{name} has no {option}"
