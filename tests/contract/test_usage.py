"""The example on every method's card runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

from headgate.catalog import Method, load_methods

METHODS = list(load_methods().values())


@pytest.mark.parametrize("method", METHODS, ids=[method.slug for method in METHODS])
def test_the_example_of_a_card_runs_and_shows_an_export(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any(name in method.usage for name in (*method.exports, *method.presets)), (
        f"the example of {method.slug} uses none of its exports: {', '.join(method.exports)}"
    )
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        exec(compile(method.usage, str(method.folder / "card.toml [usage]"), "exec"), namespace)
