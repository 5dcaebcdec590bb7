"""Networks and training of the claim: graphs whose marked edges decide, and colours of edges that must survive compression.

An arm of a task differs from the others in the one thing that it is named for, and starts from the same numbers where it has the same
parts. :func:`remove_dual` is the ablation of the dual structure: every convolution on the dual hypergraph becomes a linear map of the
edge's own features, with the same parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data import GraphBatch, GraphSet
from headgate.methods.graph.edge_hypergraph.autoencoder import EdgeAutoEncoder
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.graph_conv import GraphConv
from headgate.methods.graph.edge_hypergraph.hypercluster import Clusters, SeedAttention, count_clusters
from headgate.methods.graph.edge_hypergraph.hyperdrop import HyperDrop
from headgate.ops import segment_counts, segment_max, segment_mean, segment_pack, segment_sum, segment_top_k
from headgate.train import epoch_batches, fit, seeded

__all__ = [
    "CLASSIFIERS",
    "COMPRESSORS",
    "DROPPERS",
    "EdgeLinear",
    "NodeAutoEncoder",
    "NodePoolClassifier",
    "RandomDrop",
    "Training",
    "compressor",
    "edge_accuracy",
    "edge_loss",
    "foreign_clusters",
    "graph_accuracy",
    "graph_loss",
    "kept_share",
    "remove_dual",
    "set_drops",
    "star_classifier",
    "train",
]

CLASSIFIERS = ("dual", "nodes", "no_edges", "edge_mlp")
DROPPERS = ("hyperdrop", "keep_all", "random_keep", "mlp_scores")
COMPRESSORS = ("dual", "nodes", "edge_mlp")

Loss = Callable[[nn.Module, GraphBatch], Tensor]
_AT_ONCE = 200


@dataclass(frozen=True)
class Training:
    """A run: Adam without weight decay.

    Attributes:
        steps: updates.
        batch_size: graphs an update.
        evaluate_every: steps between the points of the learning curve.
    """

    steps: int
    batch_size: int
    evaluate_every: int


class EdgeLinear(nn.Module):
    """A linear map of each edge's own features, with the parameters of a convolution on the dual hypergraph.

    Args:
        conv: the convolution whose parameters it takes over.
    """

    def __init__(self, conv: EdgeHypergraphConv) -> None:
        super().__init__()
        self.out_channels = conv.out_channels
        self.weight, self.bias = conv.weight, conv.bias

    def forward(
        self, edge_attr: Float[Tensor, "edges in"], edge_index: Int64[Tensor, "2 edges"], num_nodes: int | None = None
    ) -> Float[Tensor, "edges out"]:
        """(m, in) → (m, out); nothing but the features is looked at."""
        out = edge_attr @ self.weight
        return out if self.bias is None else out + self.bias


def remove_dual(module: nn.Module) -> None:
    """Replace every convolution on the dual hypergraph within ``module`` by an :class:`EdgeLinear`."""
    for name, child in list(module.named_children()):
        if isinstance(child, EdgeHypergraphConv):
            setattr(module, name, EdgeLinear(child))
        else:
            remove_dual(child)


class RandomDrop(HyperDrop):
    """Keeps random edges, as many; their scores weigh them as before."""

    def select(
        self, score: Float[Tensor, " edges"], edge_batch: Int64[Tensor, " edges"] | None = None
    ) -> Int64[Tensor, " kept"]:
        """Which edges stay; drawn from PyTorch's global generator."""
        return segment_top_k(torch.rand_like(score), edge_batch, self.ratio)


def set_drops(arm: str, module: nn.Module) -> None:
    """Have every :class:`HyperDrop` within ``module`` drop edges in the way of an arm, one of :data:`DROPPERS`.

    ``"hyperdrop"``: as it is. ``"keep_all"``: no edge is dropped, all are weighed. ``"random_keep"``: random edges are kept, and
    weighed by their scores. ``"mlp_scores"``: scores from what each edge's own features are at that point.
    """
    for name, child in list(module.named_children()):
        if not isinstance(child, HyperDrop):
            set_drops(arm, child)
        elif arm == "keep_all":
            child.ratio = 1.0
        elif arm == "mlp_scores":
            remove_dual(child)
        elif arm == "random_keep":
            other = RandomDrop(child.channels, child.ratio, clamp=child.clamp)
            other.nonlinearity, other.score_conv = child.nonlinearity, child.score_conv
            setattr(module, name, other)


# --- where the marked edges lie -------------------------------------------------------------------------------------


def star_classifier(arm: str, hidden: int, edge_channels: int, classes: int = 2) -> nn.Module:
    """A classifier of graphs of three layers, one of :data:`CLASSIFIERS` or :data:`DROPPERS`; reads a :class:`GraphBatch`.

    Args:
        arm: ``"dual"``: convolutions on the dual hypergraph, edges are read out. ``"edge_mlp"``: the same without the dual
            structure. ``"nodes"``: each node starts with the mean over its edges, then graph convolutions. ``"no_edges"``:
            graph convolutions alone, all nodes alike. The others: the network of ``"dual"`` with drops, see :func:`set_drops`.
        hidden: channels.
        edge_channels: features of the edges.
        classes: classes.
    """
    if arm in ("nodes", "no_edges"):
        return _NodeNet(edge_channels if arm == "nodes" else 1, hidden, classes)
    if arm in DROPPERS:
        dropping = _DroppingNet(edge_channels, hidden, classes, ratio=0.5)
        set_drops(arm, dropping)
        return dropping
    model = _EdgeNet(edge_channels, hidden, classes)
    if arm == "edge_mlp":
        remove_dual(model)
    return model


class _EdgeNet(nn.Module):
    """Convolutions on the dual hypergraph; edges are read out."""

    def __init__(self, edge_channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(EdgeHypergraphConv(width, hidden) for width in (edge_channels, hidden, hidden))
        self.head = _head(hidden, classes)

    def forward(self, graphs: GraphBatch) -> Float[Tensor, "graphs classes"]:
        edges = graphs.edge_attr
        for conv in self.convs:
            edges = torch.relu(conv(edges, graphs.edge_index, len(graphs.batch)))
        return self.head(_read_out(edges, graphs.batch[graphs.edge_index[0]], len(graphs.y)))


class _DroppingNet(_EdgeNet):
    """The same with a drop before each of the first two convolutions; edges that stay are multiplied by their weights.

    What a convolution has passed on, no later drop could take back. Scores start near tanh(1), since one that starts below the
    clamp would get no gradient.
    """

    def __init__(self, edge_channels: int, hidden: int, classes: int, ratio: float) -> None:
        super().__init__(edge_channels, hidden, classes)
        self.drops = nn.ModuleList(HyperDrop(width, ratio) for width in (edge_channels, hidden))
        for drop in self.drops:
            assert isinstance(drop, HyperDrop)
            assert drop.score_conv.bias is not None
            nn.init.ones_(drop.score_conv.bias)

    def forward(self, graphs: GraphBatch) -> Float[Tensor, "graphs classes"]:
        return self.trace(graphs)[0]

    def trace(self, graphs: GraphBatch) -> tuple[Float[Tensor, "graphs classes"], Int64[Tensor, " kept"]]:
        """Logits, and which edges are left behind the last drop."""
        nodes = graphs.edge_attr.new_zeros(len(graphs.batch), 0)
        edge_index, edges = graphs.edge_index, graphs.edge_attr
        left = torch.arange(len(edges), device=edges.device)
        for layer, conv in enumerate(self.convs):
            if layer < len(self.drops):
                edge_index, edges, weight, _, perm, _ = self.drops[layer](nodes, edge_index, edges, graphs.batch)
                edges, left = edges * weight[:, None], left[perm]
            edges = torch.relu(conv(edges, edge_index, len(nodes)))
        return self.head(_read_out(edges, graphs.batch[edge_index[0]], len(graphs.y))), left


class _NodeNet(nn.Module):
    """Graph convolutions; nodes are read out. They start with ones, or with the mean over the edges of each node."""

    def __init__(self, in_channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.convs = nn.ModuleList(GraphConv(width, hidden) for width in (in_channels, hidden, hidden))
        self.head = _head(hidden, classes)

    def forward(self, graphs: GraphBatch) -> Float[Tensor, "graphs classes"]:
        graphs = graphs.both_ways()
        nodes = len(graphs.batch)
        if self.in_channels == 1:
            x = graphs.edge_attr.new_ones(nodes, 1)
        else:
            x = segment_mean(graphs.edge_attr, graphs.edge_index[1], nodes)
        for conv in self.convs:
            x = torch.relu(conv(x, graphs.edge_index))
        return self.head(_read_out(x, graphs.batch, len(graphs.y)))


class NodePoolClassifier(nn.Module):
    """A classifier that drops nodes where the published one drops edges (Lee et al., "Self-Attention Graph Pooling", ICML 2019).

    Args:
        in_channels: features of the nodes.
        classes: classes.
        hidden: channels.
        ratio: share of every graph's nodes that each drop keeps; ``None`` for no drops.
        dropout: in the head.
        num_convs: layers; there is a drop behind each but the last.
    """

    def __init__(
        self, in_channels: int, classes: int, *, hidden: int, ratio: float | None, dropout: float, num_convs: int = 3
    ) -> None:
        super().__init__()
        self.ratio = 1.0 if ratio is None else ratio
        widths = [in_channels, *[hidden] * num_convs]
        self.convs = nn.ModuleList(GraphConv(*pair) for pair in itertools.pairwise(widths))
        drops = 0 if ratio is None else num_convs - 1
        self.scores = nn.ModuleList(GraphConv(hidden, 1) for _ in range(drops))
        self.head = nn.Sequential(
            nn.Linear(3 * hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden // 2),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden // 2, classes),
        )

    def forward(self, graphs: GraphBatch) -> Float[Tensor, "graphs classes"]:
        """Logarithms of probabilities (graphs, classes)."""
        x, edge_index, batch = graphs.x, graphs.edge_index, graphs.batch
        readouts = []
        for layer, conv in enumerate(self.convs):
            x = torch.relu(conv(x, edge_index))
            if layer < len(self.scores):
                score = torch.tanh(self.scores[layer](x, edge_index).squeeze(-1))
                kept = segment_top_k(score, batch, self.ratio)
                number = torch.full_like(batch, -1).scatter(0, kept, torch.arange(len(kept), device=kept.device))
                edge_index = number[edge_index]
                edge_index = edge_index[:, (edge_index >= 0).all(dim=0)]
                x, batch = x[kept] * score[kept, None], batch[kept]
            readouts.append(_read_out(x, batch, len(graphs.y)))
        return F.log_softmax(self.head(torch.stack(readouts).sum(dim=0)), dim=1)


def _read_out(values: Tensor, batch: Tensor, graphs: int) -> Float[Tensor, "graphs readout"]:
    return torch.cat([reduce(values, batch, graphs) for reduce in (segment_max, segment_mean, segment_sum)], dim=1)


def _head(hidden: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes))


# --- colours of edges ------------------------------------------------------------------------------------------------


def compressor(arm: str, colours: int, ratio: float, avg_num_edges: float, hidden: int) -> nn.Module:
    """An auto-encoder of the colours of edges, one of :data:`COMPRESSORS`; reads a :class:`GraphBatch`.

    Args:
        arm: ``"dual"``: the published one. ``"edge_mlp"``: the same without the dual structure. ``"nodes"``:
            :class:`NodeAutoEncoder`.
        colours: features of the edges, and classes.
        ratio: clusters as a share of the edges of an average graph.
        avg_num_edges: its edges.
        hidden: channels.
    """
    if arm == "nodes":
        return NodeAutoEncoder(colours, count_clusters(None, ratio, avg_num_edges), hidden)
    model = EdgeAutoEncoder(colours, ratio=ratio, avg_num_edges=avg_num_edges, hidden=hidden)
    if arm == "edge_mlp":
        remove_dual(model)
    return _OnBatches(model)


class _OnBatches(nn.Module):
    """The published auto-encoder on graphs whose nodes have no features."""

    def __init__(self, model: EdgeAutoEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, graphs: GraphBatch) -> Float[Tensor, "edges colours"]:
        x = graphs.edge_attr.new_zeros(len(graphs.batch), 0)
        return self.model(x, graphs.edge_index, graphs.edge_attr, graphs.batch, len(graphs.y))


class NodeAutoEncoder(nn.Module):
    """The same by way of the nodes: each starts with the mean over its edges, nodes are pooled, and edges read off their ends.

    Args:
        colours: features of the edges, and classes.
        num_clusters: clusters of nodes.
        hidden: channels.
    """

    def __init__(self, colours: int, num_clusters: int, hidden: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(GraphConv(width, hidden) for width in (colours, hidden))
        self.key, self.value = GraphConv(hidden, hidden), GraphConv(hidden, hidden)
        self.attention = SeedAttention(hidden, num_clusters, 1, layer_norm=False, cluster=True)
        self.unconvs = nn.ModuleList(GraphConv(hidden, hidden) for _ in range(2))
        self.last = nn.Linear(2 * hidden, colours)

    def forward(self, graphs: GraphBatch) -> Float[Tensor, "edges colours"]:
        """Logits of the colour of every edge, (m, colours)."""
        both = graphs.both_ways()
        x = segment_mean(both.edge_attr, both.edge_index[1], len(graphs.batch))
        for conv in self.convs:
            x = torch.relu(conv(x, both.edge_index))
        count = len(graphs.y)
        places = int(segment_counts(graphs.batch, count).max())
        keys, mask = segment_pack(self.key(x, both.edge_index), graphs.batch, count, places)
        values, _ = segment_pack(self.value(x, both.edge_index), graphs.batch, count, places)
        pooled, assign = self.attention(keys, values, mask)
        x = (assign.transpose(1, 2) @ pooled)[mask]
        for conv in self.unconvs:
            x = torch.relu(conv(x, both.edge_index))
        first, second = x[graphs.edge_index]
        return self.last(torch.cat([first + second, first * second], dim=1))


# --- training --------------------------------------------------------------------------------------------------------


def train(
    build: Callable[[], nn.Module],
    known: GraphSet,
    held: GraphSet,
    loss: Loss,
    score: Callable[[nn.Module, GraphSet], float],
    training: Training,
    rate: float,
    seed: int,
) -> tuple[nn.Module, dict[int, float]]:
    """Train on ``known``; order of the graphs and initial weights depend on the seed alone.

    Returns:
        The network in evaluation mode, and its score on ``held`` by step.
    """
    with seeded(seed):
        model = build()
    order = epoch_batches(torch.arange(len(known)), training.batch_size, seed)

    def evaluate(network: nn.Module, step: int) -> Mapping[str, float]:
        with seeded(seed):  # for what draws, such as RandomDrop
            return {"score": score(network, held)}

    history = fit(
        model,
        lambda step: known.batch(order(step)[0]),
        loss,
        steps=training.steps,
        learning_rate=rate,
        evaluate=evaluate,
        evaluate_every=training.evaluate_every,
        seed=seed,
    )
    return model.eval(), {step: metrics["score"] for step, metrics in history.metrics.items()}


def graph_loss(model: nn.Module, graphs: GraphBatch) -> Tensor:
    """Cross-entropy of the classes of graphs; logarithms of probabilities are logits, too."""
    return F.cross_entropy(model(graphs), graphs.y)


def edge_loss(model: nn.Module, graphs: GraphBatch) -> Tensor:
    """Cross-entropy of the colours of edges."""
    return F.cross_entropy(model(graphs), graphs.edge_y)


@torch.no_grad()
def graph_accuracy(model: nn.Module, graphs: GraphSet) -> float:
    """Share of the graphs that are classified right."""
    right = [(model(batch).argmax(dim=1) == batch.y).double() for batch in _batches(graphs)]
    return float(torch.cat(right).mean())


@torch.no_grad()
def edge_accuracy(model: nn.Module, graphs: GraphSet) -> float:
    """Share of the edges whose colour is right."""
    right = [(model(batch).argmax(dim=1) == batch.edge_y).double() for batch in _batches(graphs)]
    return float(torch.cat(right).mean())


@contextmanager
def foreign_clusters(model: nn.Module) -> Iterator[None]:
    """Within it, every graph is decoded from the clusters of the next graph of its batch, and from its own assignment.

    What an auto-encoder still gets right this way, its clusters need not say: it stands in how each edge, or node, was shared
    out among them, which unpooling reads as well.
    """

    def exchange(_: nn.Module, __: tuple[object, ...], clusters: Clusters) -> Clusters:
        return clusters._replace(pooled=clusters.pooled.roll(1, 0))

    hooks = [part.register_forward_hook(exchange) for part in model.modules() if isinstance(part, SeedAttention)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def kept_share(model: nn.Module, graphs: GraphSet) -> float:
    """Share of the marked edges that are left behind the last drop of a :func:`star_classifier` with drops."""
    assert isinstance(model, _DroppingNet)
    kept = [batch.edge_y[model.trace(batch)[1]].sum() for batch in _batches(graphs)]
    return float(torch.stack(kept).sum() / graphs.edge_y.sum())


def _batches(graphs: GraphSet) -> list[GraphBatch]:
    return [graphs.batch(chosen) for chosen in torch.arange(len(graphs)).split(_AT_ONCE)]
