"""Sets of graphs in memory, and small graph worlds in which the edges hold the answer.

Graphs lie one behind the other in a few tensors; :meth:`GraphSet.batch` joins chosen ones into one large graph, in the form that
PyTorch Geometric batches have. Every undirected edge is stored once, its smaller end first; :meth:`GraphBatch.both_ways` adds the
other direction.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headgate.data.seeding import portable_normal, stream_generator
from headgate.validate import check_positive, check_probability

__all__ = ["GraphBatch", "GraphSet", "coloured_graphs", "moon_graphs", "star_graphs"]


class GraphBatch(NamedTuple):
    """Several graphs as one.

    Attributes:
        x: (n, features), features of the nodes; of zero width where there are none.
        edge_index: (2, m), ends of the edges.
        edge_attr: (m, features), of the edges.
        batch: (n,), the graph of every node.
        y: (graphs,), a label per graph.
        edge_y: (m,), a label per edge.
    """

    x: Float[Tensor, "nodes features"]
    edge_index: Int64[Tensor, "2 edges"]
    edge_attr: Float[Tensor, "edges features"]
    batch: Int64[Tensor, " nodes"]
    y: Int64[Tensor, " graphs"]
    edge_y: Int64[Tensor, " edges"]

    def both_ways(self) -> GraphBatch:
        """The same graphs with every edge in both directions: all of one direction, then all of the other."""
        return self._replace(
            edge_index=torch.cat([self.edge_index, self.edge_index.flip(0)], dim=1),
            edge_attr=torch.cat([self.edge_attr, self.edge_attr]),
            edge_y=torch.cat([self.edge_y, self.edge_y]),
        )


@dataclass(frozen=True)
class GraphSet:
    """Graphs one behind the other.

    Attributes:
        num_nodes: (graphs,).
        num_edges: (graphs,).
        x: (all nodes, features).
        edge_index: (2, all edges), nodes numbered within their graph.
        edge_attr: (all edges, features).
        y: (graphs,), a label per graph; zeros where there is none.
        edge_y: (all edges,), a label per edge; zeros where there is none.
    """

    num_nodes: Int64[Tensor, " graphs"]
    num_edges: Int64[Tensor, " graphs"]
    x: Float[Tensor, "nodes features"]
    edge_index: Int64[Tensor, "2 edges"]
    edge_attr: Float[Tensor, "edges features"]
    y: Int64[Tensor, " graphs"]
    edge_y: Int64[Tensor, " edges"]

    def __post_init__(self) -> None:
        nodes, edges, graphs = int(self.num_nodes.sum()), int(self.num_edges.sum()), len(self.num_nodes)
        rows = {"num_edges": graphs, "x": nodes, "edge_attr": edges, "y": graphs, "edge_y": edges}
        for name, count in rows.items():
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have {count} rows, got {len(getattr(self, name))}")
        if self.edge_index.shape != (2, edges):
            raise ValueError(f"edge_index must have shape (2, {edges}), got {tuple(self.edge_index.shape)}")

    def __len__(self) -> int:
        return len(self.num_nodes)

    def batch(self, graphs: Int64[Tensor, " chosen"]) -> GraphBatch:
        """Join graphs.

        Args:
            graphs: (chosen,), which ones, in this order.
        """
        nodes = _rows(self.num_nodes, graphs)
        edges = _rows(self.num_edges, graphs)
        sizes, lengths = self.num_nodes[graphs], self.num_edges[graphs]
        offsets = (sizes.cumsum(0) - sizes).repeat_interleave(lengths)
        return GraphBatch(
            self.x[nodes],
            self.edge_index[:, edges] + offsets,
            self.edge_attr[edges],
            torch.arange(len(graphs)).repeat_interleave(sizes),
            self.y[graphs],
            self.edge_y[edges],
        )


def star_graphs(count: int, *, seed: int = 0, stream: int | str = "stars") -> GraphSet:
    """Draw graphs whose label is in how their marked edges lie: apart, or four of them around one node.

    A graph has 16 nodes and 27 edges: a path through all of them in random order, and 12 more between random pairs. Five edges are
    of type A. In graphs of class 0 no two of them meet; in those of class 1 four share a node, and the fifth meets none of them::

        class 0   A—A  A—A  A—A  A—A  A—A          class 1     A  A
                                                                \\/
                                                             A — o — A     A—A

    Both classes are drawn from the same graphs, and all graphs have as many edges of either type.

    Args:
        count: number of graphs; the classes take turns.
        seed: of the draws.
        stream: which set, e.g. ``"train"``.

    Returns:
        Graphs without features of nodes; edges have three: type A, other type, and a standard normal number. ``y`` is the class,
        ``edge_y`` is 1 for type A.
    """
    check_positive(count=count)
    nodes, extra, marked = 16, 12, 5
    edge_index, edge_y = [], []
    for number in range(count):
        generator = stream_generator(seed, stream, number)
        while True:
            ends = _path_and_more(nodes, extra, generator)
            apart, star = _apart(ends, marked, generator), _star(ends, marked - 1, generator)
            if apart and star:
                break
        edge_index.append(torch.tensor(ends).T)
        marks = torch.zeros(len(ends), dtype=torch.int64)
        marks[star if number % 2 else apart] = 1
        edge_y.append(marks)
    is_a = torch.cat(edge_y)
    noise = portable_normal((len(is_a), 1), stream_generator(seed, stream, count))
    features = torch.cat([torch.stack([is_a, 1 - is_a], dim=1).float(), noise], dim=1)
    labels = torch.arange(count) % 2
    return _bare(torch.full((count,), nodes), edge_index, features, labels, is_a)


def moon_graphs(
    count: int,
    points: int = 40,
    noise: float = 0.08,
    neighbours: int = 3,
    replaced: float = 0.4,
    *,
    seed: int = 0,
    stream: int | str = "moons",
) -> tuple[GraphSet, Float[Tensor, "nodes 2"]]:
    """Draw two interleaved half circles of points, joined to their nearest neighbours by edges of six colours.

    The colour of an edge is its moon and the third of the moon that it lies in; edges between the moons have the last colour. The
    colours are permuted anew for every graph, so that nothing but an edge's neighbourhood tells its colour. Some of the colours
    that are seen are replaced at random.

    Args:
        count: number of graphs.
        points: of both moons together, even.
        noise: deviation of the points from their moon, whose radius is 1.
        neighbours: edges go from each point to so many nearest ones.
        replaced: probability of a colour to be drawn at random.
        seed: of the draws.
        stream: which set, e.g. ``"train"``.

    Returns:
        The graphs, and the points (all nodes, 2). Edges have the colour that is seen, one-hot, as features and the true one as
        ``edge_y``.

    Raises:
        ValueError: a number lies outside its range.
    """
    check_positive(count=count, points=points, neighbours=neighbours)
    check_probability(replaced=replaced)
    if points % 2 or neighbours >= points:
        raise ValueError(f"points must be even and more than neighbours={neighbours}, got {points}")
    colours = 6
    along = torch.linspace(0, 1, points // 2, dtype=torch.float64)
    angle = math.pi * along
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    place = torch.cat([along, along])
    moon = torch.arange(points) * 2 // points
    edge_index, edge_y, seen, positions = [], [], [], []
    for number in range(count):
        generator = stream_generator(seed, stream, number)
        position = torch.cat([upper, lower]) + noise * portable_normal((points, 2), generator).double()
        distance = torch.cdist(position, position, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
        nearest = distance.argsort(dim=1, stable=True)[:, :neighbours]
        pairs = torch.stack([torch.arange(points).repeat_interleave(neighbours), nearest.flatten()])
        ends = pairs.sort(dim=0).values.unique(dim=1)
        third = (3 * place[ends].mean(dim=0)).long().clamp_max(2)
        colour = torch.where(moon[ends[0]] == moon[ends[1]], 3 * moon[ends[0]] + third, colours - 1)
        colour = torch.randperm(colours, generator=generator)[colour]
        is_replaced = torch.rand(len(colour), generator=generator) < replaced
        drawn = torch.randint(colours, (len(colour),), generator=generator)
        edge_index.append(ends)
        edge_y.append(colour)
        seen.append(torch.where(is_replaced, drawn, colour))
        positions.append(position.float())
    features = torch.nn.functional.one_hot(torch.cat(seen), colours).float()
    graphs = _bare(torch.full((count,), points), edge_index, features, torch.zeros(count).long(), torch.cat(edge_y))
    return graphs, torch.cat(positions)


def coloured_graphs(
    count: int, nodes: int = 14, edges: int = 22, colours: int = 4, *, seed: int = 0, stream: int | str = "colours"
) -> GraphSet:
    """Draw graphs whose edges have independent random colours: nothing about an edge can be told from its neighbours.

    Args:
        count: number of graphs.
        nodes: of each; a path in random order runs through all of them.
        edges: of each, at least ``nodes - 1``.
        colours: equally likely.
        seed: of the draws.
        stream: which set, e.g. ``"train"``.

    Returns:
        Graphs whose edges have their colour, one-hot, as features and its number as ``edge_y``.

    Raises:
        ValueError: a number lies outside its range.
    """
    check_positive(count=count, nodes=nodes, colours=colours)
    if not nodes - 1 <= edges <= nodes * (nodes - 1) // 2:
        raise ValueError(f"edges must hold a path and fit between {nodes} nodes, got {edges}")
    edge_index, edge_y = [], []
    for number in range(count):
        generator = stream_generator(seed, stream, number)
        edge_index.append(torch.tensor(_path_and_more(nodes, edges - nodes + 1, generator)).T)
        edge_y.append(torch.randint(colours, (edges,), generator=generator))
    colour = torch.cat(edge_y)
    features = torch.nn.functional.one_hot(colour, colours).float()
    return _bare(torch.full((count,), nodes), edge_index, features, torch.zeros(count).long(), colour)


def _bare(num_nodes: Tensor, edge_index: list[Tensor], edge_attr: Tensor, y: Tensor, edge_y: Tensor) -> GraphSet:
    """Graphs whose nodes have no features."""
    num_edges = torch.tensor([ends.shape[1] for ends in edge_index])
    x = torch.zeros(int(num_nodes.sum()), 0)
    return GraphSet(num_nodes, num_edges, x, torch.cat(edge_index, dim=1), edge_attr, y, edge_y)


def _rows(counts: Int64[Tensor, " graphs"], graphs: Int64[Tensor, " chosen"]) -> Int64[Tensor, " rows"]:
    """The rows of the chosen graphs, one graph behind the other."""
    chosen = counts[graphs]
    starts = (counts.cumsum(0) - counts)[graphs] - (chosen.cumsum(0) - chosen)
    return starts.repeat_interleave(chosen) + torch.arange(int(chosen.sum()))


def _path_and_more(nodes: int, extra: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """A path through all nodes in random order, and ``extra`` other edges; smaller ends first, in random order."""
    order = torch.randperm(nodes, generator=generator).tolist()
    path = {(min(pair), max(pair)) for pair in itertools.pairwise(order)}
    others = [(a, b) for a in range(nodes) for b in range(a + 1, nodes) if (a, b) not in path]
    more = torch.randperm(len(others), generator=generator)[:extra].tolist()
    ends = [*sorted(path), *(others[index] for index in more)]
    return [ends[index] for index in torch.randperm(len(ends), generator=generator).tolist()]


def _apart(ends: list[tuple[int, int]], count: int, generator: torch.Generator) -> list[int]:
    """``count`` edges of which no two meet, or none."""
    taken: set[int] = set()
    chosen: list[int] = []
    for index in torch.randperm(len(ends), generator=generator).tolist():
        if len(chosen) < count and not taken & set(ends[index]):
            chosen.append(index)
            taken |= set(ends[index])
    return chosen if len(chosen) == count else []


def _star(ends: list[tuple[int, int]], rays: int, generator: torch.Generator) -> list[int]:
    """``rays`` edges around one node and one edge that meets none of them, or none."""
    order = torch.randperm(len(ends), generator=generator).tolist()
    for centre in torch.randperm(1 + max(map(max, ends)), generator=generator).tolist():
        star = [index for index in order if centre in ends[index]][:rays]
        taken = {node for index in star for node in ends[index]}
        free = [index for index in order if not taken & set(ends[index])]
        if len(star) == rays and free:
            return [*star, free[0]]
    return []
