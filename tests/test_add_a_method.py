"""Follows ``docs/add-a-method.md`` to the letter in a temporary copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "add-a-method.md"


def files() -> dict[str, str]:
    """Path → content of every titled block of the page."""
    return dict(re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```$', PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))


def commands() -> list[str]:
    return re.findall(r"^\$ (.+)$", PAGE.read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with the page's files in it, and what stood there before."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, content in files().items():
        path = folder / name
        assert not path.exists(), f"{name} exists already: the page would change it"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for path, content in before.items():
        assert path.read_bytes() == content
    return folder


def run(folder: Path, command: str) -> str:
    arguments = shlex.split(command)
    start = {"headgate": [sys.executable, "-m", "headgate.cli"], "python": [sys.executable]}[arguments[0]]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(
        [*start, *arguments[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_page_touches_the_room_and_its_test_alone():
    for name in files():
        assert name.startswith(("src/headgate/methods/routing/squeeze_excite/", "tests/methods/routing/")), name


def test_the_command_line_finds_the_new_method(copy):
    listing, showing, reproducing, _ = commands()
    assert "squeeze-excite" in run(copy, listing)
    assert "SqueezeExcite" in run(copy, showing)
    assert "squeeze-excite [smoke]" in run(copy, reproducing)


def test_the_contract_suite_finds_the_new_method(copy):
    output = run(copy, commands()[3])
    passed = int(re.search(r"(\d+) passed", output).group(1))
    assert passed >= 4, output
    assert "failed" not in output


def test_the_new_name_stands_at_the_top_of_the_package(copy):
    code = "import headgate; print(headgate.SqueezeExcite(8).dim, headgate.create_model('squeeze_excite_64').dim)"
    assert run(copy, f"python -c {shlex.quote(code)}").split() == ["8", "64"]


def test_the_pages_claim_is_sound(copy):
    """Its settings really show the effect: two seeds at laptop scale, judged by eye of the same criteria."""
    code = (
        "from headgate.methods.routing.squeeze_excite.claim import measure\n"
        "print(*[measure(arm, 7, 'laptop').metrics['r2'] for arm in ('gate', 'plain', 'blind')])"
    )
    gate, plain, blind = map(float, run(copy, f"python -c {shlex.quote(code)}").split())
    assert gate > plain + 0.2
    assert blind < gate - 0.2
