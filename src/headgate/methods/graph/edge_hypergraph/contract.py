"""What the modules of this room promise; the contract suite holds them to it.

The first axis of the inputs counts nodes or edges of one graph, so none of the promises on batches applies. How many edges are left of
several graphs depends on the values of ``batch``; of one graph it follows from the shapes, and the models can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headgate.methods.graph.edge_hypergraph.autoencoder import EdgeAutoEncoder
from headgate.methods.graph.edge_hypergraph.classifier import EHGNNClassifier, MoleculeEHGNN
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.hypercluster import HyperCluster
from headgate.methods.graph.edge_hypergraph.hyperdrop import HyperDrop
from headgate.methods.graph.edge_hypergraph.hypergraph_conv import HypergraphConv
from headgate.methods.graph.edge_hypergraph.node_classifier import EHGNNNodeClassifier
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_Draw = Callable[[torch.Generator], tuple[Any, ...]]

# Two triangles with a tail each, both directions of every edge: nodes 0 to 3, and nodes 4 to 7.
_ONE_WAY = torch.tensor([[0, 0, 1, 2, 4, 4, 5, 6], [1, 2, 2, 3, 5, 6, 6, 7]])
_EDGES = torch.cat([_ONE_WAY, _ONE_WAY.flip(0)], dim=1)[:, [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]]
_NODES = 8
_HALVES = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
_SMALL: dict[str, Any] = {"hidden": 8, "dropout": 0.2, "ratio": 0.6}

_graph_case = partial(ContractCase, batch_independent=False, batch_equivariant=False, any_batch_size=False)


def _graph(channels: int, batch: Tensor | None = None, edges: Tensor = _EDGES) -> _Draw:
    """x, edge_index, edge_attr, batch, as PyTorch Geometric has them."""
    return lambda generator: (
        torch.randn(_NODES, 3, generator=generator),
        edges.clone(),
        torch.randn(edges.shape[1], channels, generator=generator),
        None if batch is None else batch.clone(),
    )


def _of_edges(edges: Tensor = _EDGES, rows: int = 16, num_nodes: int = _NODES) -> _Draw:
    return lambda generator: (torch.randn(rows, 4, generator=generator), edges.clone(), num_nodes)


def _hypergraph(weighted: bool = False, attr: bool = False) -> _Draw:
    index = torch.tensor([[0, 1, 2, 0, 3, 4, 4, 1], [0, 0, 0, 1, 1, 1, 3, 3]])

    def draw(generator: torch.Generator) -> tuple[Any, ...]:
        return (
            torch.randn(6, 4, generator=generator),
            index.clone(),
            torch.rand(4, generator=generator) if weighted else None,
            torch.randn(4, 4, generator=generator) if attr else None,
            4,
        )

    return draw


def _molecules(batch: Tensor | None = None) -> _Draw:
    return lambda generator: (
        torch.randint(3, (_NODES, 2), generator=generator),
        _EDGES.clone(),
        torch.randint(2, (_EDGES.shape[1], 1), generator=generator),
        None if batch is None else batch.clone(),
    )


_OUTSIDE = BadInput(
    "an edge to node 9", _graph(4, None, _EDGES + (_EDGES == 7) * 2), ValueError, r"num_nodes=8\).* to 9"
)
_NEGATIVE = BadInput("a negative node", _graph(4, None, _EDGES - 1), ValueError, "edge_index must lie in .*from -1")
_BAD_BATCH = BadInput("a negative graph", _graph(4, _HALVES - 1), ValueError, "batch must be at least 0")
_MIXED = BadInput("graphs that are mixed", _graph(4, _HALVES.flip(0)), ValueError, "one behind the other")

CASES: dict[str, ContractCase] = {
    "HypergraphConv": _graph_case(lambda: HypergraphConv(4, 5), _hypergraph()),
    "HypergraphConv-weighted": _graph_case(
        lambda: HypergraphConv(4, 5, bias=False),
        _hypergraph(weighted=True),
        bad_inputs=(
            BadInput("features without attention", _hypergraph(attr=True), ValueError, "hyperedge_attr is read by"),
        ),
    ),
    "HypergraphConv-attention": _graph_case(
        lambda: HypergraphConv(4, 5, attention=True, heads=2, dropout=0.1), _hypergraph(weighted=True, attr=True)
    ),
    "HypergraphConv-attention without features": _graph_case(
        lambda: HypergraphConv(4, 5, attention=True, heads=2, concat=False), _hypergraph()
    ),
    "EdgeHypergraphConv": _graph_case(
        lambda: EdgeHypergraphConv(4, 5),
        _of_edges(),
        bad_inputs=(
            BadInput("rows of 15 edges", _of_edges(rows=15), ValueError, "edges=16"),
            BadInput("a graph of 7 nodes", _of_edges(num_nodes=7), ValueError, "num_nodes=7"),
        ),
    ),
    "EdgeHypergraphConv-residual": _graph_case(
        lambda: EdgeHypergraphConv(4, 4, residual=True), _of_edges(_ONE_WAY, rows=8)
    ),
    "HyperDrop": _graph_case(
        lambda: HyperDrop(4, 0.6),
        _graph(4),
        unused_parameters=("inputs.x",),
        bad_inputs=(_OUTSIDE, _NEGATIVE, _BAD_BATCH),
    ),
    "HyperDrop-batch": _graph_case(
        lambda: HyperDrop(4, 0.6, "sigmoid", clamp=(1e-4, 1.0)),
        _graph(4, _HALVES),
        unused_parameters=("inputs.x",),
        compile=False,
        export=False,
    ),
    "HyperCluster": _graph_case(
        lambda: HyperCluster(4, 3),
        _graph(4),
        unused_parameters=("inputs.x",),
        bad_inputs=(_OUTSIDE, _NEGATIVE, _BAD_BATCH, _MIXED),
    ),
    "HyperCluster-heads": _graph_case(
        lambda: HyperCluster(4, ratio=0.3, avg_num_edges=8, heads=2, layer_norm=True, cluster=False),
        _graph(4, _HALVES),
        unused_parameters=("inputs.x",),
        compile=False,
        export=False,
    ),
    "EHGNNClassifier": _graph_case(
        lambda: EHGNNClassifier(3, 5, 4, **_SMALL),
        _graph(4),
        bad_inputs=(_OUTSIDE, _NEGATIVE, _BAD_BATCH),
    ),
    "EHGNNClassifier-batch": _graph_case(
        lambda: EHGNNClassifier(3, 5, 4, clamp=(1e-4, 1.0), **_SMALL), _graph(4, _HALVES), compile=False, export=False
    ),
    "MoleculeEHGNN": _graph_case(
        lambda: MoleculeEHGNN(2, atom_dims=(3, 4), bond_dims=(2,), **_SMALL),
        _molecules(),
        bad_inputs=(
            BadInput(
                "an unknown atom",
                lambda generator: (_molecules()(generator)[0] + 1, *_molecules()(generator)[1:]),
                ValueError,
                r"x\[:, 0\] must lie in \[0, values=3\)",
            ),
        ),
    ),
    "MoleculeEHGNN-batch": _graph_case(
        lambda: MoleculeEHGNN(2, atom_dims=(3, 4), bond_dims=(2,), **_SMALL),
        _molecules(_HALVES),
        compile=False,
        export=False,
    ),
    "EHGNNNodeClassifier": _graph_case(
        lambda: EHGNNNodeClassifier(3, 4, hidden=8, edge_hidden=8, dropout=0.2),
        lambda generator: _graph(4)(generator)[:2],
    ),
    "EdgeAutoEncoder": _graph_case(
        lambda: EdgeAutoEncoder(4, 3, hidden=8),
        _graph(4),
        unused_parameters=("inputs.x",),
        bad_inputs=(_OUTSIDE, _NEGATIVE, _BAD_BATCH, _MIXED),
    ),
    "EdgeAutoEncoder-batch": _graph_case(
        lambda: EdgeAutoEncoder(4, ratio=0.3, avg_num_edges=8, hidden=8, layer_norm=True, cluster=False),
        _graph(4, _HALVES),
        unused_parameters=("inputs.x",),
        compile=False,
        export=False,
    ),
}
