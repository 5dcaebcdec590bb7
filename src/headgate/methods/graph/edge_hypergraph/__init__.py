"""Edge representation learning with hypergraphs: edges as nodes of a dual hypergraph, dropped or clustered for whole graphs.

``ToDualHypergraph`` is loaded when it is first used, since it alone needs PyTorch Geometric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headgate.methods.graph.edge_hypergraph.autoencoder import EdgeAutoEncoder
from headgate.methods.graph.edge_hypergraph.classifier import EHGNNClassifier, GraphFeatures, MoleculeEHGNN
from headgate.methods.graph.edge_hypergraph.dual import DualHypergraph
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.hypercluster import Clusters, HyperCluster
from headgate.methods.graph.edge_hypergraph.hyperdrop import DroppedEdges, HyperDrop
from headgate.methods.graph.edge_hypergraph.hypergraph_conv import HypergraphConv
from headgate.methods.graph.edge_hypergraph.node_classifier import EHGNNNodeClassifier
from headgate.methods.graph.edge_hypergraph.recipe import RECIPES, EarlyStopping, Recipe, reconstruction_loss

if TYPE_CHECKING:
    from headgate.methods.graph.edge_hypergraph.transform import DualHypergraphData, ToDualHypergraph

__all__ = [
    "RECIPES",
    "Clusters",
    "DroppedEdges",
    "DualHypergraph",
    "DualHypergraphData",
    "EHGNNClassifier",
    "EHGNNNodeClassifier",
    "EarlyStopping",
    "EdgeAutoEncoder",
    "EdgeHypergraphConv",
    "GraphFeatures",
    "HyperCluster",
    "HyperDrop",
    "HypergraphConv",
    "MoleculeEHGNN",
    "Recipe",
    "ToDualHypergraph",
    "reconstruction_loss",
]


def __getattr__(name: str) -> Any:
    if name in ("DualHypergraphData", "ToDualHypergraph"):
        from headgate.methods.graph.edge_hypergraph import transform

        return getattr(transform, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
