"""The reader of the TU sets, on a set small enough to write down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headgate.data import degree_features, fold_split, read_folds, read_tu
from headgate.errors import DataError

# Two graphs: a path 1 — 2 — 3 with a loop at 2 and an edge that stands twice, and a pair 4 — 5.
FILES = {
    "A": "1, 2\n2, 1\n2, 2\n2, 3\n3, 2\n4, 5\n5, 4\n1, 2\n",
    "graph_indicator": "1\n1\n1\n2\n2\n",
    "graph_labels": "1\n-1\n",
    "node_labels": "3\n4\n3\n5\n5\n",
    "node_attributes": "0.5\n1.5\n2.5\n3.5\n4.5\n",
    "edge_labels": "0\n0\n1\n1\n1\n0\n0\n0\n",
}


def write(folder: Path, **changes: str | None) -> Path:
    place = folder / "TINY"
    place.mkdir()
    for name, text in {**FILES, **changes}.items():
        if text is not None:
            (place / f"TINY_{name}.txt").write_text(text)
    return place


def test_a_set_is_read_with_attributes_before_labels(tmp_path: Path) -> None:
    graphs = read_tu(write(tmp_path))
    assert graphs.num_nodes.tolist() == [3, 2]
    assert graphs.num_edges.tolist() == [4, 2]
    assert graphs.edge_index.tolist() == [[0, 1, 1, 2, 0, 1], [1, 0, 2, 1, 1, 0]]
    assert graphs.x.tolist() == [[0.5, 1, 0, 0], [1.5, 0, 1, 0], [2.5, 1, 0, 0], [3.5, 0, 0, 1], [4.5, 0, 0, 1]]
    assert graphs.edge_attr.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]]
    assert graphs.y.tolist() == [1, 0]


def test_graphs_without_features_get_ones_and_degrees(tmp_path: Path) -> None:
    bare = read_tu(write(tmp_path, node_labels=None, node_attributes=None, edge_labels=None))
    assert bare.edge_attr.tolist() == [[1]] * 6
    assert bare.x.shape == (5, 0)
    assert degree_features(bare).x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0]]


def test_a_node_of_a_thousand_edges_standardises_degrees() -> None:
    from headgate.data import GraphSet

    leaves = torch.arange(1, 1001)
    centre = torch.zeros(1000, dtype=torch.int64)
    ends = torch.cat([torch.stack([centre, leaves]), torch.stack([leaves, centre])], dim=1)
    zeros = torch.zeros(2000, dtype=torch.int64)
    star = GraphSet(
        torch.tensor([1001]), torch.tensor([2000]), torch.zeros(1001, 0), ends, torch.ones(2000, 1), zeros[:1], zeros
    )
    x = degree_features(star).x
    assert x.shape == (1001, 1)
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std()) == pytest.approx(1, abs=1e-4)


def test_features_that_are_there_stay(tmp_path: Path) -> None:
    graphs = read_tu(write(tmp_path))
    assert degree_features(graphs) is graphs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_labels": None}, "TINY_graph_labels.txt is missing"),
        ({"A": "1, x\n"}, "TINY_A.txt cannot be read"),
        ({"A": "1, 9\n"}, "pairs of nodes from 1 to 5"),
        ({"A": "3, 4\n", "edge_labels": None}, "joins nodes of different graphs"),
        ({"node_labels": "1\n"}, "must have 5 lines, got 1"),
        ({"graph_indicator": "1\n2\n1\n2\n2\n"}, "rising order"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tu(write(tmp_path, **changes))


def write_folds(folder: Path, count: int = 10) -> Path:
    (folder / "10fold_idx").mkdir()
    for fold in range(count):
        (folder / "10fold_idx" / f"test_idx-{fold + 1}.txt").write_text(f"{2 * fold}\n{2 * fold + 1}\n")
    return folder


def test_validation_is_the_fold_before_the_one_that_is_tested(tmp_path: Path) -> None:
    folds = read_folds(write_folds(tmp_path))
    train, validation, test = fold_split(folds, 0)
    assert test.tolist() == [0, 1]
    assert validation.tolist() == [18, 19]
    assert train.tolist() == list(range(2, 18))
    assert fold_split(folds, 4)[1].tolist() == [6, 7]


def test_missing_folds_and_folds_that_overlap_are_refused(tmp_path: Path) -> None:
    folder = write_folds(tmp_path, count=9)
    with pytest.raises(DataError, match=r"test_idx-10\.txt must hold"):
        read_folds(folder)
    (folder / "10fold_idx" / "test_idx-10.txt").write_text("0\n")
    with pytest.raises(DataError, match="stand in two folds"):
        read_folds(folder)
    with pytest.raises(ValueError, match="fold must be one of 3 folds"):
        fold_split([torch.tensor([0])] * 3, 3)
