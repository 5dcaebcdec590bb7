from __future__ import annotations

import sys

import pytest

import toy
from headgate.catalog import load_methods


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with the toy package, installed for this process."""
    folder = tmp_path / "lab"
    folder.mkdir()
    toy.write_toy(folder)
    monkeypatch.syspath_prepend(folder)
    load_methods.cache_clear()
    yield folder
    load_methods.cache_clear()
    for name in [name for name in sys.modules if name.startswith("toy_lab")]:
        del sys.modules[name]
