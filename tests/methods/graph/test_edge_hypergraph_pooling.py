"""HyperDrop, HyperCluster and the models around them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headgate import (
    EdgeAutoEncoder,
    EdgeHypergraphConv,
    EHGNNClassifier,
    EHGNNNodeClassifier,
    HyperCluster,
    HyperDrop,
    MoleculeEHGNN,
)
from headgate.methods.graph.edge_hypergraph.graph_conv import MoleculeConv

# Two graphs of five and three edges, and a third without edges.
EDGES = torch.tensor([[0, 1, 2, 3, 0, 4, 5, 6], [1, 2, 3, 0, 2, 5, 6, 4]])
BATCH = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
NODES = len(BATCH)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- HyperDrop -------------------------------------------------------------------------------------------------------


def test_the_best_edges_of_every_graph_stay_in_the_order_of_their_scores() -> None:
    drop = HyperDrop(4, ratio=0.5)
    x, edge_attr = draw(NODES, 2), draw(8, 4)
    out = drop(x, EDGES, edge_attr, BATCH)
    score = torch.tanh(drop.score_conv(edge_attr, EDGES, NODES)).flatten()
    first = score[:5].sort(descending=True).indices[:3]
    second = 5 + score[5:].sort(descending=True).indices[:2]
    assert out.perm.tolist() == [*first.tolist(), *second.tolist()]
    assert torch.equal(out.edge_index, EDGES[:, out.perm])
    assert torch.equal(out.edge_attr, edge_attr[out.perm])
    assert torch.equal(out.score, score[out.perm])
    assert torch.equal(out.edge_weight, out.score.clamp(0, 1))
    assert out.batch is BATCH


def test_a_ratio_of_one_keeps_all_edges_and_no_edge_is_kept_of_none() -> None:
    drop = HyperDrop(4, ratio=1.0)
    out = drop(draw(NODES, 2), EDGES, draw(8, 4), BATCH)
    assert sorted(out.perm.tolist()) == list(range(8))
    for batch in (None, BATCH):
        empty = drop(draw(NODES, 2), EDGES[:, :0], draw(0, 4), batch)
        assert empty.edge_index.shape == (2, 0)
        assert empty.score.shape == (0,)


def test_one_edge_has_one_score() -> None:
    out = HyperDrop(4, ratio=0.3)(draw(2, 1), EDGES[:, :1], draw(1, 4))
    assert out.score.shape == out.edge_weight.shape == (1,)


def test_scores_learn_through_the_weights_but_not_below_the_clamp() -> None:
    drop = HyperDrop(4, ratio=1.0)
    edge_attr = draw(8, 4)
    out = drop(draw(NODES, 2), EDGES, edge_attr)
    gradient = torch.autograd.grad(out.edge_weight.sum(), out.score)[0]
    assert torch.equal(gradient, (out.score > 0).float())
    assert 0 < int(gradient.sum()) < 8
    wide = HyperDrop(4, ratio=1.0, clamp=(1e-4, 1))
    assert float(wide(draw(NODES, 2), EDGES, edge_attr).edge_weight.detach().min()) == pytest.approx(1e-4)


@pytest.mark.parametrize(("nonlinearity", "function"), [("sigmoid", torch.sigmoid), ("identity", lambda s: s)])
def test_other_nonlinearities(nonlinearity, function) -> None:
    drop = HyperDrop(4, nonlinearity=nonlinearity)
    expected = function(drop.score_conv(draw(8, 4), EDGES, NODES)).flatten()
    torch.testing.assert_close(drop.score(EDGES, draw(8, 4), NODES), expected)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\], got ratio=0"):
        HyperDrop(4, ratio=0)
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\], got ratio=1.5"):
        HyperDrop(4, ratio=1.5)
    with pytest.raises(ValueError, match="nonlinearity must be one of tanh, sigmoid, identity, got 'relu'"):
        HyperDrop(4, nonlinearity="relu")
    with pytest.raises(ValueError, match="clamp must rise"):
        HyperDrop(4, clamp=(1, 0))


# --- HyperCluster ----------------------------------------------------------------------------------------------------


def cluster_by_hand(pool: HyperCluster, edge_attr: Tensor, edges: slice) -> tuple[Tensor, Tensor]:
    """O and A of one graph, head by head."""
    attention, heads = pool.attention, pool.heads
    width = pool.channels // heads
    query = attention.seeds[0] @ attention.query.weight.T + attention.query.bias
    key = pool.key(edge_attr, EDGES, NODES)[edges]
    value = pool.value(edge_attr, EDGES, NODES)[edges]
    outputs, assigns = [], []
    for head in range(heads):
        columns = slice(head * width, head * width + width)
        logits = query[:, columns] @ key[:, columns].T / math.sqrt(pool.channels)
        assign = logits.softmax(dim=0 if attention.cluster else 1)
        outputs.append(query[:, columns] + assign @ value[:, columns])
        assigns.append(assign)
    out = attention.norm_before(torch.cat(outputs, dim=1))
    out = out + torch.relu(out @ attention.output.weight.T + attention.output.bias)
    return attention.norm_after(out), torch.stack(assigns)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("cluster", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_pooling_is_that_of_each_graph_alone(heads: int, cluster: bool, layer_norm: bool) -> None:
    torch.manual_seed(0)
    pool = HyperCluster(4, 3, heads=heads, cluster=cluster, layer_norm=layer_norm)
    edge_attr = draw(8, 4)
    pooled, assign = pool(draw(NODES, 2), EDGES, edge_attr, BATCH)
    assert assign.shape == (heads * 3, 3, 5)
    for graph, edges in enumerate((slice(0, 5), slice(5, 8))):
        out, weights = cluster_by_hand(pool, edge_attr, edges)
        torch.testing.assert_close(pooled[graph], out)
        size = edges.stop - edges.start
        for head in range(heads):
            torch.testing.assert_close(assign[head * 3 + graph, :, :size], weights[head])


def test_clusters_share_out_every_edge_and_without_them_every_seed_is_a_mean() -> None:
    x, edge_attr = draw(NODES, 2), draw(8, 4)
    assign = HyperCluster(4, 3)(x, EDGES, edge_attr, BATCH).assign
    torch.testing.assert_close(assign.sum(dim=1), torch.ones(3, 5))
    mean = HyperCluster(4, 3, cluster=False)(x, EDGES, edge_attr, BATCH).assign
    torch.testing.assert_close(mean.sum(dim=2), torch.ones(3, 3))
    assert float(mean.detach()[1, :, 3:].abs().max()) == 0


@pytest.mark.parametrize("cluster", [True, False])
def test_a_graph_without_edges_keeps_the_seeds(cluster: bool) -> None:
    pool = HyperCluster(4, 3, cluster=cluster)
    pooled, _ = pool(draw(NODES, 2), EDGES, draw(8, 4), BATCH)
    query = pool.attention.query(pool.attention.seeds[0])
    torch.testing.assert_close(pooled[2], query + torch.relu(pool.attention.output(query)))
    nothing = pool(draw(NODES, 2), EDGES[:, :0], draw(0, 4), BATCH)
    torch.testing.assert_close(nothing.pooled, pooled[2].expand(3, -1, -1))
    assert nothing.assign.shape == (3, 3, 0)


def test_unpooling_gives_each_edge_its_mixture_in_the_order_of_the_edges() -> None:
    pool = HyperCluster(4, 3)
    pooled, assign = pool(draw(NODES, 2), EDGES, draw(8, 4), BATCH)
    edges = pool.unpool(pooled, assign, pool.edge_mask(EDGES, BATCH, NODES))
    assert edges.shape == (8, 4)
    torch.testing.assert_close(edges[3], assign[0, :, 3] @ pooled[0])
    torch.testing.assert_close(edges[6], assign[1, :, 1] @ pooled[1])


def test_the_number_of_clusters_is_a_share_rounded_up() -> None:
    assert HyperCluster(4, ratio=0.15, avg_num_edges=50).num_clusters == 8
    assert HyperCluster(4, ratio=0.15, avg_num_edges=69.33).num_clusters == 11
    with pytest.raises(ValueError, match="num_clusters must be given, or ratio and avg_num_edges"):
        HyperCluster(4, ratio=0.5)
    with pytest.raises(ValueError, match="must not be given together"):
        HyperCluster(4, 3, ratio=0.5)
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]"):
        HyperCluster(4, ratio=0.0, avg_num_edges=3)
    with pytest.raises(ValueError, match="heads must divide channels, got channels=4, heads=3"):
        HyperCluster(4, 3, heads=3)


def test_several_heads_cannot_unpool_and_mixed_graphs_cannot_be_pooled() -> None:
    pool = HyperCluster(4, 3, heads=2)
    pooled, assign = pool(draw(NODES, 2), EDGES, draw(8, 4))
    with pytest.raises(ValueError, match=r"unpool needs heads=1.*got heads=2"):
        pool.unpool(pooled, assign, torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="one behind the other"):
        pool(draw(NODES, 2), EDGES.flip(1), draw(8, 4), BATCH)
    single = HyperCluster(4, 3)
    with pytest.raises(ValueError, match="mask must have places=8"):
        single.unpool(*single(draw(NODES, 2), EDGES, draw(8, 4)), torch.ones(1, 7, dtype=torch.bool))


# --- the models ------------------------------------------------------------------------------------------------------


def test_graphs_of_a_batch_are_classified_as_each_alone() -> None:
    torch.manual_seed(0)
    model = EHGNNClassifier(2, 3, 4, hidden=8, ratio=0.6).eval()
    x, edge_attr = draw(NODES, 2), draw(8, 4)
    together = model(x, EDGES, edge_attr, BATCH)
    torch.testing.assert_close(together.exp().sum(dim=1), torch.ones(3))
    parts = (
        (x[:4], EDGES[:, :5], edge_attr[:5]),
        (x[4:7], EDGES[:, 5:] - 4, edge_attr[5:]),
        (x[7:], EDGES[:, :0], edge_attr[:0]),
    )
    for graph, part in enumerate(parts):
        torch.testing.assert_close(model(*part), together[graph : graph + 1])
    torch.testing.assert_close(model(x, EDGES, edge_attr, BATCH, num_graphs=3), together)
    with pytest.raises(ValueError, match=r"batch must lie in \[0, num_graphs=2\)"):
        model(x, EDGES, edge_attr, BATCH, num_graphs=2)
    with pytest.raises(ValueError, match="num_graphs must be 1 without batch"):
        model(x, EDGES, edge_attr, num_graphs=2)


def test_every_drop_keeps_its_share_and_no_node_goes() -> None:
    model = EHGNNClassifier(2, 3, 4, hidden=8, ratio=0.6).eval()
    features = model.forward_features(draw(NODES, 2), EDGES, draw(8, 4), BATCH)
    assert [len(kept) for kept in features.kept] == [3 + 2, 2 + 2]
    assert features.nodes.shape == (NODES, 8)
    assert features.readout.shape == (3, 24)


def test_edges_without_features_are_ones() -> None:
    model = EHGNNClassifier(2, 3, hidden=8).eval()
    x = draw(NODES, 2)
    torch.testing.assert_close(model(x, EDGES, None, BATCH), model(x, EDGES, torch.ones(8, 1), BATCH))


def test_the_order_of_edges_does_not_change_the_class() -> None:
    torch.manual_seed(0)
    model = EHGNNClassifier(2, 3, 4, hidden=8, ratio=0.6).eval()
    x, edge_attr, order = draw(NODES, 2), draw(8, 4), torch.tensor([6, 0, 3, 5, 1, 7, 2, 4])
    expected = model(x, EDGES, edge_attr, BATCH)
    torch.testing.assert_close(model(x, EDGES[:, order], edge_attr[order], BATCH), expected)


def test_the_molecule_convolution_is_its_formula() -> None:
    torch.manual_seed(0)
    conv = MoleculeConv(4)
    x, edge_attr, weight = draw(NODES, 4), draw(8, 4, seed=1), draw(8, seed=2).abs()
    h, e = conv.node(x), conv.edge(edge_attr)
    degree = torch.ones(NODES)
    for (_, target), w in zip(EDGES.T.tolist(), weight.tolist(), strict=True):
        degree[target] += w
    expected = torch.relu(h + conv.root) / degree[:, None]
    for place, (source, target) in enumerate(EDGES.T.tolist()):
        norm = weight[place] / (degree[source] * degree[target]).sqrt()
        expected[target] = expected[target] + norm * torch.relu(h[source] + e[place])
    torch.testing.assert_close(conv(x, EDGES, edge_attr, weight), expected)
    torch.testing.assert_close(conv(x, EDGES, edge_attr), conv(x, EDGES, edge_attr, torch.ones(8)))


def test_features_of_atoms_and_bonds_are_added_up() -> None:
    model = MoleculeEHGNN(2, hidden=8, atom_dims=(3, 4), bond_dims=(2,)).eval()
    atoms = torch.tensor([[0, 3], [2, 1]])
    tables = [embedding.weight for embedding in model.atoms.embeddings]
    expected = torch.stack([tables[0][0] + tables[1][3], tables[0][2] + tables[1][1]])
    torch.testing.assert_close(model.atoms("x", atoms), expected)
    logits = model(atoms, torch.tensor([[0, 1], [1, 0]]), torch.tensor([[1], [1]]))
    assert logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"edge_attr\[:, 0\] must lie in \[0, values=2\)"):
        model(atoms, torch.tensor([[0], [1]]), torch.tensor([[2]]))


def test_node_classifier_drops_edges_in_training_and_weighs_all_of_them_at_test() -> None:
    torch.manual_seed(0)
    model = EHGNNNodeClassifier(3, 4, hidden=8, edge_hidden=4, num_convs=4, ratio=0.5, dropout=0.0)
    x = draw(NODES, 3)
    results = {}
    for training in (True, False):
        h = F.relu(model.convs[0](x, EDGES))
        edge_attr = torch.cat([h[EDGES[0]], h[EDGES[1]]], dim=1)
        edge_attr = torch.relu(model.edge_convs[0](edge_attr, EDGES, NODES))
        h = F.relu(model.convs[1](h, EDGES))
        edge_attr = torch.relu(model.edge_convs[1](edge_attr, EDGES, NODES))
        score = torch.tanh(model.drops["1"].score_conv(edge_attr, EDGES, NODES)).flatten()
        kept = score.argsort(descending=True)[:4] if training else torch.arange(8)
        edges, weight = EDGES[:, kept], score[kept].clamp(1e-4, 1)
        degree = torch.zeros(NODES).index_add(0, edges[1], weight)
        scale = torch.where(degree > 0, degree.rsqrt(), 0)
        weight = scale[edges[0]] * weight * scale[edges[1]]
        h = F.relu(model.convs[2](h, edges, weight))
        results[training] = F.log_softmax(model.convs[3](h, edges, weight), dim=1)
        torch.testing.assert_close(model.train(training)(x, EDGES), results[training])
    assert not torch.allclose(results[True], results[False])


@pytest.mark.parametrize(
    ("num_convs", "drops", "edge_convs"), [(2, [], 0), (3, ["1"], 2), (6, ["1"], 2), (7, ["1", "5"], 6)]
)
def test_node_classifier_has_the_layers_of_edges_that_are_read(num_convs, drops, edge_convs) -> None:
    model = EHGNNNodeClassifier(3, 4, num_convs=num_convs)
    assert list(model.drops) == drops
    assert len(model.edge_convs) == edge_convs
    loss = model(draw(NODES, 3), EDGES).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="num_convs must be at least 2"):
        EHGNNNodeClassifier(3, 4, num_convs=1)


def test_the_auto_encoder_reconstructs_a_graph_of_a_batch_as_alone() -> None:
    torch.manual_seed(0)
    model = EdgeAutoEncoder(4, 3, hidden=8, out_channels=5)
    x, edge_attr = draw(NODES, 0), draw(8, 4)
    together = model(x, EDGES, edge_attr, BATCH)
    assert together.shape == (8, 5)
    torch.testing.assert_close(model(x[:4], EDGES[:, :5], edge_attr[:5]), together[:5])
    torch.testing.assert_close(model(x[4:7], EDGES[:, 5:] - 4, edge_attr[5:]), together[5:])
    assert model(x, EDGES[:, :0], edge_attr[:0], BATCH).shape == (0, 5)


def test_the_decoder_sees_the_edges_through_clusters_and_assignment_alone() -> None:
    model = EdgeAutoEncoder(4, 3, hidden=8)
    x, edge_attr = draw(NODES, 1), draw(8, 4)
    clusters = model.encode(x, EDGES, edge_attr, BATCH)
    edges = model.pool.unpool(*clusters, model.pool.edge_mask(EDGES, BATCH, NODES))
    for conv in model.unconvs:
        assert isinstance(conv, EdgeHypergraphConv)
        edges = torch.relu(conv(edges, EDGES, NODES))
    torch.testing.assert_close(model(x, EDGES, edge_attr, BATCH), model.last(edges, EDGES, NODES))


@pytest.mark.parametrize(
    "build",
    [
        lambda: EHGNNClassifier(2, 3, 4, hidden=8, ratio=0.6, clamp=(1e-4, 1.0)),
        lambda: MoleculeEHGNN(2, hidden=8, atom_dims=(3, 4), bond_dims=(2,)),
        lambda: EHGNNNodeClassifier(2, 3, hidden=8, edge_hidden=4, num_convs=3),
        lambda: EdgeAutoEncoder(4, ratio=0.3, avg_num_edges=8, hidden=8),
    ],
    ids=["graphs", "molecules", "nodes", "edges"],
)
def test_a_saved_model_comes_back_the_same(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    if isinstance(model, MoleculeEHGNN):
        inputs = (torch.ones(NODES, 2, dtype=torch.int64), EDGES, torch.ones(8, 1, dtype=torch.int64))
    else:
        inputs = (draw(NODES, 2), EDGES, draw(8, 4))[: 2 if isinstance(model, EHGNNNodeClassifier) else 3]
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert str(loaded) == str(model)


def test_a_single_graph_is_trained_when_compiled() -> None:
    torch.manual_seed(0)
    model = EdgeAutoEncoder(4, 3, hidden=8)
    x, edge_attr = draw(NODES, 1), draw(8, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, EDGES, edge_attr), model(x, EDGES, edge_attr))
    torch.compiler.reset()
