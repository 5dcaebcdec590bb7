from __future__ import annotations

import json
import math

import numpy as np
import pytest

from headgate.claims.cells import Cell, CellRecord, CellStore
from headgate.errors import HeadgateError
from headgate.measurement import Curve, Measurement

CELL = Cell("toy", "laptop", "ours", 3)


def record(fingerprint: str = "f", **options) -> CellRecord:
    options.setdefault("metrics", {"score": 0.1 + 0.2})
    return CellRecord.of(CELL, fingerprint, Measurement(**options), 1.5)


def test_a_cell_comes_back_bit_for_bit(tmp_path):
    curve = Curve([1, 2], [0.1, 1 / 3], "x", "y", log_x=True)
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    saved = record(curves={"c": curve}, pictures={"p": picture}, notes={"lr": 1e-3, "which": "b"}, base_seconds=2.5)
    store = CellStore(tmp_path)
    store.save(saved)
    loaded, warning = store.load(CELL, "f")
    assert warning is None
    assert loaded == saved
    assert loaded.metrics["score"] == 0.30000000000000004


def test_an_undefined_metric_is_kept_as_none(tmp_path):
    store = CellStore(tmp_path)
    store.save(record(metrics={"a": math.nan, "b": math.inf, "c": 1}))
    assert store.load(CELL, "f")[0].metrics == {"a": None, "b": None, "c": 1.0}


def test_a_cell_that_is_not_there_is_simply_measured(tmp_path):
    assert CellStore(tmp_path / "none").load(CELL, "f") == (None, None)


def test_a_cell_of_other_code_is_measured_again(tmp_path):
    store = CellStore(tmp_path)
    store.save(record("old"))
    loaded, warning = store.load(CELL, "new")
    assert loaded is None
    assert "other code or settings" in warning


@pytest.mark.parametrize("keep", [0, 1, 10, 100, -2])
def test_a_truncated_file_is_set_aside_and_reported(tmp_path, keep):
    store = CellStore(tmp_path)
    store.save(record())
    path = store.path(CELL)
    path.write_bytes(path.read_bytes()[:keep])
    loaded, warning = store.load(CELL, "f")
    assert loaded is None
    assert "set aside as ours-seed3.corrupt" in warning
    assert not path.exists()
    assert path.with_suffix(".corrupt").exists()


def test_every_flipped_digit_is_noticed(tmp_path):
    store = CellStore(tmp_path)
    store.save(record(metrics={"score": 0.25}))
    path = store.path(CELL)
    text = path.read_text()
    digits = [i for i, letter in enumerate(text) if letter.isdigit()]
    for i in digits:
        path.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
        assert store.load(CELL, "f")[0] is None, text[i - 20 : i + 5]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[]", b"null", b"{}", b'{"sha256": 3}', b"NaN"])
def test_a_file_that_is_no_cell_is_set_aside(tmp_path, content):
    store = CellStore(tmp_path)
    store.path(CELL).write_bytes(content)
    assert store.load(CELL, "f")[0] is None
    assert store.path(CELL).with_suffix(".corrupt").read_bytes() == content


def test_a_cell_file_under_another_cells_name_is_not_taken(tmp_path):
    store = CellStore(tmp_path)
    store.save(record())
    other = Cell("toy", "laptop", "theirs", 3)
    store.path(CELL).rename(store.path(other))
    loaded, warning = store.load(other, "f")
    assert loaded is None
    assert "holds another cell" in warning


def test_writing_leaves_no_partial_file_behind(tmp_path):
    store = CellStore(tmp_path)
    store.save(record())
    store.save(record())
    assert [path.name for path in tmp_path.iterdir()] == ["ours-seed3.json"]
    assert json.loads(store.path(CELL).read_text())["cell"]["arm"] == "ours"


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadgateError, match=r"cannot write .*Not a directory|cannot write .*File exists"):
        CellStore(tmp_path / "file" / "cells").save(record())


def test_what_a_killed_write_left_is_tidied_and_cells_stay(tmp_path):
    store = CellStore(tmp_path)
    store.tidy()
    store.save(record())
    (tmp_path / ".ours-seed3.json.abc.tmp.json").write_text('{"half')
    (tmp_path / "models-1").mkdir()
    (tmp_path / "models-1" / ".base.safetensors.xyz.tmp.safetensors").write_bytes(b"half")
    store.tidy()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ours-seed3.json"]
