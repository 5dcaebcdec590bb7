"""What all tests share: the folder of data and golden files, one thread per worker, the summary of golden errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden.harness import shared_folder


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_model_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a cache of base models of its own, so that none reads what another has trained."""
    monkeypatch.setenv("HEADGATE_CACHE", str(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with ``data`` and ``golden``: ``$HEADGATE_SHARED``, or ``shared`` beside the repository."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"{folder} is no folder; set HEADGATE_SHARED to the folder that holds data/ and golden/")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show per golden case the worst error relative to the largest golden value, worst first."""
    rows = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "golden" and report.when == "call":
                    rows.append((json.loads(value), report.outcome))
    if not rows:
        return
    rows.sort(key=lambda row: -row[0]["worst"]["relative_error"] if row[0]["worst"] else 0.0)
    terminalreporter.section("golden: worst relative error per case")
    width = max(len(row["case"]) for row, _ in rows)
    terminalreporter.write_line(f"{'case':<{width}}  {'error':>9}  compared  where")
    for row, outcome in rows:
        worst = row["worst"] or {"name": "nothing compared", "relative_error": float("nan")}
        line = f"{row['case']:<{width}}  {worst['relative_error']:9.2e}  {row['compared']:8d}  {worst['name']}"
        if row["unread"]:
            names = ", ".join(row["unread"][:3]) + (", …" if len(row["unread"]) > 3 else "")
            line += f"; {len(row['unread'])} stored tensors never read: {names}"
        terminalreporter.write_line(line if outcome == "passed" else f"{line}; {outcome.upper()}")
