from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headgate.errors import DataError, HeadgateError
from headgate.evaluate import Features, FeatureWriter, Split


def features(rows: int = 7, dim: int = 3) -> Features:
    generator = np.random.default_rng(0)
    return Features(
        generator.normal(size=(rows, dim)).astype(np.float32),
        generator.integers(0, 2, rows),
        np.arange(rows) * 10,
        {"layer": "fc6", "pool": "mean", "normalize": False},
    )


def test_a_file_gives_back_what_was_saved_in_half_precision(tmp_path: Path) -> None:
    original = features()
    original.save(tmp_path / "f.safetensors")
    opened = Features.open(tmp_path / "f.safetensors")
    assert isinstance(opened.X, np.memmap)
    assert opened.X.dtype == np.float16
    assert (original.X.astype(np.float16) == opened.X).all()
    assert opened.y is not None
    assert (opened.y == original.y).all()
    assert (opened.ids == original.ids).all()
    assert opened.meta == original.meta
    rows = opened.rows(slice(2, 5))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, original.X[2:5], rtol=1e-3)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    original = features()
    original.save(tmp_path / "f.safetensors")
    loaded = load_file(tmp_path / "f.safetensors")
    assert sorted(loaded) == ["X", "ids", "y"]
    assert (loaded["X"] == original.X.astype(np.float16)).all()
    assert (loaded["ids"] == original.ids).all()


@pytest.mark.parametrize("y", [None, np.random.default_rng(0).normal(size=(7, 2))])
def test_labels_may_be_missing_or_real_targets(tmp_path: Path, y: np.ndarray | None) -> None:
    Features(features().X, y, np.arange(7)).save(tmp_path / "f.safetensors")
    opened = Features.open(tmp_path / "f.safetensors")
    assert (opened.y is None) == (y is None)
    if y is not None:
        assert opened.y is not None
        assert (opened.y == y).all()


def test_a_value_that_half_precision_cannot_hold_is_refused_with_its_row_and_leaves_no_file(tmp_path: Path) -> None:
    original = features()
    for value in (1e5, np.nan):
        original.X[4, 1] = value
        with pytest.raises(ValueError, match="in row 4"):
            original.save(tmp_path / "f.safetensors")
        assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    features().save(path)
    before = path.read_bytes()
    with pytest.raises(KeyError), FeatureWriter(path) as writer:
        writer.append(np.zeros((2, 3)))
        raise KeyError
    with pytest.raises(RuntimeError, match="must be finished"), FeatureWriter(path) as writer:
        writer.append(np.zeros((2, 3)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_file_written_in_parts_is_that_written_at_once(tmp_path: Path) -> None:
    original = features()
    original.save(tmp_path / "whole")
    with FeatureWriter(tmp_path / "parts") as writer:
        for start in (0, 3, 4):
            writer.append(original.X[start : {0: 3, 3: 4, 4: 7}[start]])
        writer.finish(original.y, original.ids, original.meta)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "f") as writer:
        writer.append(np.zeros((2, 3)))
        with pytest.raises(ValueError, match=r"rows of shape \(3,\), got \(4,\)"):
            writer.append(np.zeros((2, 4)))
        with pytest.raises(ValueError, match="ids must have one entry per row: expected 2, got 3"):
            writer.finish(None, np.arange(3), {})
        with pytest.raises(TypeError, match="y must hold integers or floats"):
            writer.finish(np.array([True, False]), np.arange(2), {})
        with pytest.raises(ValueError, match="meta must fit the file's header"):
            writer.finish(None, np.arange(2), {"long": "x" * 100_000})
        writer.finish(None, np.arange(2), {})
    with FeatureWriter(tmp_path / "g") as writer:
        with pytest.raises(ValueError, match="X must have at least one row"):
            writer.finish(None, np.arange(0), {})
        writer.append(np.zeros((1, 1)))
        writer.finish(None, np.arange(1), {})


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "empty", "foreign", "header"])
def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "f.safetensors"
    features().save(path)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "garbage":
        path.write_bytes(bytes(range(256)) * 400)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(data.replace(b"headgate-features", b"something-elseeee"))
    else:
        path.write_bytes(data[:5000].replace(b'"ids"', b'"odd"') + data[5000:])
    with pytest.raises(DataError, match=r"f\.safetensors"):
        Features.open(path)


def test_a_folder_that_cannot_be_written_is_a_readable_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadgateError, match="cannot write"):
        features().save(tmp_path / "file" / "f.safetensors")


def test_selection_keeps_rows_labels_and_ids_together() -> None:
    original = features()
    chosen = original.select(np.array([5, 1]))
    assert (original.X[[5, 1]] == chosen.X).all()
    assert original.y is not None
    assert chosen.y is not None
    assert (chosen.y == original.y[[5, 1]]).all()
    assert chosen.ids.tolist() == [50, 10]
    assert len(chosen) == 2


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"X": np.zeros((0, 3))}, ValueError, "X must be a NumPy array of shape"),
        ({"X": [[1.0]]}, ValueError, "got list"),
        ({"y": np.zeros(6, int)}, ValueError, "y must have one entry per row of X: expected 7, got 6"),
        ({"ids": np.zeros(7, int)}, ValueError, "ids must be unique"),
        ({"ids": np.arange(7.0)}, TypeError, "ids must hold integers"),
    ],
)
def test_features_that_do_not_fit_together_are_refused(changes: dict, error: type[Exception], match: str) -> None:
    arguments: dict[str, Any] = {"X": np.zeros((7, 3)), "y": np.zeros(7, int), "ids": np.arange(7)}
    with pytest.raises(error, match=match):
        Features(**{**arguments, **changes})


def test_a_drawn_split_keeps_the_shares_of_the_classes_and_uses_every_row_once() -> None:
    labels = np.repeat([3, 7], [20, 60])
    split = Split.random(labels, val=0.25, test=0.1, seed=4)
    for rows, counts in ((split.train, (13, 39)), (split.val, (5, 15)), (split.test, (2, 6))):
        assert ((labels[rows] == 3).sum(), (labels[rows] == 7).sum()) == counts
    assert sorted(np.concatenate([split.train, split.val, split.test])) == list(range(80))


def test_the_seed_decides_the_split() -> None:
    labels = np.repeat([0, 1], 50)
    first, again, other = (Split.random(labels, seed=seed) for seed in (0, 0, 1))
    assert (first.test == again.test).all()
    assert (first.test != other.test).any()
    assert len(Split.random(labels, val=0.0).val) == 0


@pytest.mark.parametrize(
    ("rows", "error", "match"),
    [
        (([0, 1], [1], [2]), ValueError, "must share no row, got row 1 twice"),
        (([0, 1], [], [1]), ValueError, "must share no row"),
        (([], [0], [1]), ValueError, "train must hold at least one row"),
        (([0], [1], []), ValueError, "test must hold at least one row"),
        (([-1], [], [1]), ValueError, "train must hold row numbers of at least 0, got -1"),
        (([0.5], [], [1]), TypeError, "train must hold row numbers, got float64"),
        (([True], [], [1]), TypeError, "train must hold row numbers, got bool"),
    ],
)
def test_a_split_that_leaks_or_lacks_is_refused(rows: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Split(*(np.array(part) for part in rows))


def test_a_split_beyond_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows below n=3, got 3"):
        Split(np.array([0]), np.array([], int), np.array([3])).check(3)
    with pytest.raises(ValueError, match="shares that leave something"):
        Split.random(np.array([0, 1]), val=0.5, test=0.5)


def test_the_record_is_json(tmp_path: Path) -> None:
    features().save(tmp_path / "f")
    header = json.loads((tmp_path / "f").read_bytes()[8:65536])
    assert json.loads(header["__metadata__"]["meta"])["layer"] == "fc6"
