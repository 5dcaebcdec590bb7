"""The dual hypergraph as a transform of PyTorch Geometric; this file alone needs that package (extra ``graph``).

dataset = TUDataset(folder, "MUTAG", pre_transform=ToDualHypergraph())
for data in DataLoader(dataset, batch_size=32):
    out = HypergraphConv(...)(data.edge_attr, data.hyperedge_index)
"""

from __future__ import annotations

from typing import Any

import torch

from headgate.errors import MissingExtraError
from headgate.methods.graph.edge_hypergraph.dual import DualHypergraph

try:
    from torch_geometric.data import Data
    from torch_geometric.transforms import BaseTransform
except ImportError as error:
    raise MissingExtraError("torch_geometric", "graph", "ToDualHypergraph") from error

__all__ = ["DualHypergraphData", "ToDualHypergraph"]


class DualHypergraphData(Data):  # type: ignore[misc]
    """A graph with the incidences of its dual hypergraph, which are numbered on when graphs are batched.

    Attributes:
        hyperedge_index: (2, incidences), dual nodes (edges of the graph) above hyperedges.
        num_hyperedges: hyperedges.
    """

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """By how much the numbers of the next graph in a batch are raised."""
        if key == "hyperedge_index":
            # A data set in memory stores the number as a tensor of one element.
            return value.new_tensor([[self.num_edges], [int(self.num_hyperedges)]])
        return super().__inc__(key, value, *args, **kwargs)

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """The axis along which values of several graphs are joined."""
        return 1 if key == "hyperedge_index" else super().__cat_dim__(key, value, *args, **kwargs)


# A data set stores the class of its graphs beside its tensors, and is read with weights_only=True.
torch.serialization.add_safe_globals([DualHypergraphData])


class ToDualHypergraph(BaseTransform):  # type: ignore[misc]
    """Store ``hyperedge_index`` and ``num_hyperedges`` on the graph; every stored edge is one dual node.

    Args:
        add_loops: as for :meth:`DualHypergraph.from_edge_index`.
    """

    def __init__(self, add_loops: bool = True) -> None:
        self.add_loops = add_loops

    def forward(self, data: Data) -> DualHypergraphData:
        """Transform one graph.

        Args:
            data: a graph with ``edge_index``.

        Returns:
            A copy of it, with the two fields.

        Raises:
            ValueError: the graph has no ``edge_index``, or one that does not fit.
        """
        if data.edge_index is None:
            raise ValueError("data must have edge_index, got a graph without")
        dual = DualHypergraph.from_edge_index(data.edge_index, add_loops=self.add_loops, num_nodes=data.num_nodes)
        transformed = DualHypergraphData(**data.to_dict())
        transformed.hyperedge_index = dual.hyperedge_index
        transformed.num_hyperedges = dual.num_hyperedges
        return transformed

    def __repr__(self) -> str:
        return f"ToDualHypergraph(add_loops={self.add_loops})"
