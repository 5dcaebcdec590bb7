from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "diffusers", "sklearn", "matplotlib", "torch_geometric", "pandas", "pyarrow", "scipy")


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after ``code``."""
    program = f"import sys\n{code}\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.rsplit("LOADED", 1)[1].split())


def test_import_headgate_loads_nothing_heavy():
    assert loaded("import headgate") == set()


def test_layers_load_torch_alone():
    optional = {"transformers", "diffusers", "sklearn", "matplotlib", "torch_geometric", "pandas", "pyarrow"}
    code = "import headgate.nn, headgate.ops, headgate.data, headgate.testing"
    assert not loaded(code) & optional


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["--version"], ["search", "recall"], ["reproduce", "--help"]]
)
def test_the_quick_commands_import_no_torch(arguments):
    code = f"from headgate.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    assert not loaded(code) & {"torch", "matplotlib", "scipy", "sklearn"}
