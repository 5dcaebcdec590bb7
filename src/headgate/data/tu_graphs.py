"""Reader for the TU sets of graphs (Morris et al., "TUDataset", arXiv 2007.08663): PROTEINS, MUTAG, D&D, IMDB and others.

A set is a folder of text files: ``<NAME>_A.txt`` (edges, numbered from 1 over all graphs), ``_graph_indicator.txt`` (the graph of every
node), ``_graph_labels.txt``, and where there are such, ``_node_labels``, ``_node_attributes``, ``_edge_labels`` and
``_edge_attributes``. Folds for cross-validation stand beside them: ``10fold_idx/test_idx-1.txt`` … hold numbers of graphs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headgate.data.graphs import GraphSet
from headgate.errors import DataError

__all__ = ["degree_features", "fold_split", "read_folds", "read_tu"]

_ONE_HOT_BELOW = 1000


def read_tu(folder: str | os.PathLike[str]) -> GraphSet:
    """Read a set.

    Attributes come first and labels, one-hot, behind them. Repeated edges are merged and loops left out. Edges of graphs without
    features of edges get a 1.

    Args:
        folder: named as the set, with its files, or with the folder ``raw`` that holds them.

    Returns:
        The graphs; edges are stored in both directions, as they stand in the files, graph by graph.

    Raises:
        DataError: a file is missing or broken.
    """
    folder = Path(folder)
    name = folder.name
    files = folder / "raw" if (folder / "raw").is_dir() else folder

    def read(part: str, *, whole: bool = True, required: bool = False) -> np.ndarray | None:
        path = files / f"{name}_{part}.txt"
        if not path.is_file():
            if required:
                raise DataError(f"{path} is missing; expected the text files of the TU set {name} in {files}")
            return None
        try:
            return np.loadtxt(path, delimiter=",", dtype=np.int64 if whole else np.float64, ndmin=2)
        except ValueError as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    pairs, graph_of, labels = (read(part, required=True) for part in ("A", "graph_indicator", "graph_labels"))
    assert pairs is not None
    assert graph_of is not None
    assert labels is not None
    graph, ends = graph_of[:, 0] - 1, pairs.T - 1
    if ends.shape[0] != 2 or ends.min() < 0 or ends.max() >= len(graph):
        raise DataError(f"{files / f'{name}_A.txt'} must hold pairs of nodes from 1 to {len(graph)}")
    if (np.diff(graph) < 0).any() or graph.min() != 0 or graph.max() + 1 != len(labels):
        raise DataError(f"{files / f'{name}_graph_indicator.txt'} must name the {len(labels)} graphs in rising order")
    node_parts = [read("node_attributes", whole=False), _one_hot(read("node_labels"))]
    edge_parts = [read("edge_attributes", whole=False), _one_hot(read("edge_labels"))]
    x = _beside(node_parts, len(graph), f"{name}_node_attributes.txt and _node_labels.txt")
    edge_attr = _beside(edge_parts, ends.shape[1], f"{name}_edge_attributes.txt and _edge_labels.txt")
    if edge_attr.shape[1] == 0:
        edge_attr = np.ones((ends.shape[1], 1))

    if (graph[ends[0]] != graph[ends[1]]).any():
        raise DataError(f"{files / f'{name}_A.txt'} joins nodes of different graphs")
    # Sorted by their ends, edges stand graph by graph, since nodes do.
    _, first = np.unique(ends[0] * len(graph) + ends[1], return_index=True)
    first = first[ends[0, first] != ends[1, first]]
    ends, edge_attr = ends[:, first], edge_attr[first]
    num_nodes = np.bincount(graph)
    starts = num_nodes.cumsum() - num_nodes
    return GraphSet(
        torch.from_numpy(num_nodes),
        torch.from_numpy(np.bincount(graph[ends[0]], minlength=len(num_nodes))),
        torch.from_numpy(x).float(),
        torch.from_numpy(ends - starts[graph[ends[0]]]),
        torch.from_numpy(edge_attr).float(),
        torch.from_numpy(np.unique(labels[:, 0], return_inverse=True)[1]),
        torch.zeros(ends.shape[1], dtype=torch.int64),
    )


def degree_features(graphs: GraphSet) -> GraphSet:
    """Give graphs whose nodes have no features the degrees of their nodes: one-hot, or standardised where one reaches 1000.

    Args:
        graphs: edges in both directions.

    Returns:
        The graphs with other features; as they came where they have some.
    """
    if graphs.x.shape[1]:
        return graphs
    starts = graphs.num_nodes.cumsum(0) - graphs.num_nodes
    sources = graphs.edge_index[0] + starts.repeat_interleave(graphs.num_edges)
    degree = sources.bincount(minlength=len(graphs.x))
    if int(degree.max()) < _ONE_HOT_BELOW:
        return replace(graphs, x=torch.nn.functional.one_hot(degree).float())
    return replace(graphs, x=((degree - degree.double().mean()) / degree.double().std())[:, None].float())


def read_folds(folder: str | os.PathLike[str]) -> list[Int64[Tensor, " fold"]]:
    """Read the ten test folds, ``10fold_idx/test_idx-1.txt`` … ``-10.txt``.

    Args:
        folder: of the set.

    Returns:
        Numbers of graphs, fold by fold.

    Raises:
        DataError: a file is missing or broken, or a graph stands in two folds.
    """
    folds = []
    for number in range(1, 11):
        path = Path(folder) / "10fold_idx" / f"test_idx-{number}.txt"
        try:
            folds.append(torch.from_numpy(np.loadtxt(path, dtype=np.int64, ndmin=1)))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} must hold the numbers of the graphs of a fold, one a line: {error}") from error
    together = torch.cat(folds)
    if len(together.unique()) != len(together):
        raise DataError(f"{Path(folder) / '10fold_idx'} has graphs that stand in two folds")
    return folds


def fold_split(
    folds: Sequence[Int64[Tensor, " fold"]], fold: int
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " validation"], Int64[Tensor, " test"]]:
    """Split for one round of cross-validation: test on one fold, validate on the one before it, train on the others.

    Args:
        folds: as of :func:`read_folds`.
        fold: which one is tested, from 0; the one before the first is the last.

    Raises:
        ValueError: there is no such fold, or fewer than three.
    """
    if len(folds) < 3 or not 0 <= fold < len(folds):
        raise ValueError(f"fold must be one of {len(folds)} folds, of which there must be three or more, got {fold}")
    validation = (fold - 1) % len(folds)
    train = torch.cat([part for number, part in enumerate(folds) if number not in (fold, validation)])
    return train.sort().values, folds[validation], folds[fold]


def _one_hot(labels: np.ndarray | None) -> Float[np.ndarray, "rows values"] | None:
    """Labels of every column from its smallest to its largest."""
    if labels is None:
        return None
    columns = [np.eye(column.max() - column.min() + 1)[column - column.min()] for column in labels.T]
    return np.concatenate(columns, axis=1)


def _beside(parts: Sequence[np.ndarray | None], rows: int, what: str) -> Float[np.ndarray, "rows features"]:
    present = [part for part in parts if part is not None]
    for part in present:
        if len(part) != rows:
            raise DataError(f"{what} must have {rows} lines, got {len(part)}")
    return np.concatenate([np.zeros((rows, 0)), *present], axis=1)
