"""The dual hypergraph and the convolutions on it: by hand, against dense matrices, and against PyTorch Geometric."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headgate import DualHypergraph, EdgeHypergraphConv, EHGNNClassifier, HypergraphConv, ToDualHypergraph
from headgate.methods.graph.edge_hypergraph.graph_conv import GraphConv, normalize_weights

PICTURE = torch.tensor([[0, 1, 1], [1, 2, 3]])
# A loop, an edge in both directions, an edge that stands twice, and nodes 5 and 7 without edges.
ODD = torch.tensor([[0, 1, 2, 2, 3, 3, 4], [1, 0, 2, 3, 4, 4, 6]])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the transformation ----------------------------------------------------------------------------------------------


def test_the_drawn_example_without_and_with_loops() -> None:
    bare = DualHypergraph.from_edge_index(PICTURE, add_loops=False)
    assert bare.hyperedge_index.tolist() == [[0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 1, 3]]
    assert bare.num_hyperedges == 4
    dual = DualHypergraph.from_edge_index(PICTURE)
    assert dual.hyperedge_index.tolist() == [[0, 1, 2, 0, 1, 2], [1, 1, 1, 4, 5, 6]]
    assert dual.num_hyperedges == 7
    assert dual.num_dual_nodes == 3


@pytest.mark.parametrize("add_loops", [True, False])
def test_nothing_is_lost(add_loops: bool) -> None:
    assert torch.equal(DualHypergraph.from_edge_index(ODD, add_loops=add_loops, num_nodes=8).inverse(), ODD)


def test_dual_nodes_know_their_graph() -> None:
    batch = torch.tensor([0, 0, 1, 1, 2])
    dual = DualHypergraph.from_edge_index(torch.tensor([[0, 2, 3], [1, 3, 2]]), batch)
    assert dual.edge_batch.tolist() == [0, 1, 1]
    assert dual.num_nodes == 5


def test_both_directions_can_be_one_dual_node() -> None:
    dual = DualHypergraph.from_edge_index(ODD, num_nodes=8, undirected=True)
    assert dual.inverse().tolist() == [[0, 2, 2, 3, 4], [1, 2, 3, 4, 6]]
    assert dual.dual_of_edge.tolist() == [0, 0, 1, 2, 3, 3, 4]
    gathered = dual.gather(torch.tensor([[1.0], [3], [4], [5], [6], [8], [9]]))
    assert gathered.flatten().tolist() == [2, 4, 5, 7, 9]
    assert dual.spread(gathered).flatten().tolist() == [2, 2, 4, 5, 7, 7, 9]
    with pytest.raises(ValueError, match="edge_attr must have edges=7"):
        dual.gather(torch.ones(5, 1))
    with pytest.raises(ValueError, match="dual_attr must have dual=5"):
        dual.spread(torch.ones(7, 1))


def test_a_graph_without_edges_has_an_empty_dual() -> None:
    dual = DualHypergraph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 1]))
    assert dual.hyperedge_index.shape == (2, 0)
    assert dual.inverse().shape == (2, 0)
    assert DualHypergraph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64)).num_nodes == 0


def test_incidences_are_linear_in_the_edges_of_a_star() -> None:
    edges = torch.stack([torch.zeros(100, dtype=torch.int64), torch.arange(1, 101)])
    # The hyperedge of the centre and a loop each; those of the leaves have one member.
    assert DualHypergraph.from_edge_index(edges).hyperedge_index.shape[1] == 200


@pytest.mark.parametrize(
    ("edge_index", "options", "error", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), {}, ValueError, "edge_index must have 2=2"),
        (torch.zeros(2, 2), {}, TypeError, "edge_index must be int64 or int32"),
        (PICTURE, {"num_nodes": 3}, ValueError, r"edge_index must lie in \[0, num_nodes=3\), got numbers from 0 to 3"),
        (PICTURE - 1, {}, ValueError, "edge_index must be at least 0"),
        (PICTURE, {"batch": torch.zeros(3, dtype=torch.int64)}, ValueError, "num_nodes=3"),
        (PICTURE, {"batch": torch.zeros(4)}, TypeError, "batch must be int64"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(edge_index, options, error, message) -> None:
    with pytest.raises(error, match=message):
        DualHypergraph.from_edge_index(edge_index, **options)


# --- the convolutions ------------------------------------------------------------------------------------------------


def dense_conv(conv: HypergraphConv, x: Tensor, index: Tensor, weight: Tensor, num_hyperedges: int) -> Tensor:
    """D⁻¹ H diag(w) B Hᵀ X Θ + b, entry by entry."""
    incidence = torch.zeros(len(x), num_hyperedges, dtype=x.dtype)
    for vertex, hyperedge in index.T.tolist():
        incidence[vertex, hyperedge] += 1
    size, degree = incidence.sum(dim=0), incidence @ weight
    inverse_size = torch.where(size > 0, 1 / size, 0)
    inverse_degree = torch.where(degree > 0, 1 / degree, 0)
    middle = torch.diag(weight * inverse_size)
    return inverse_degree[:, None] * (incidence @ middle @ incidence.T @ x @ conv.weight) + conv.bias


@pytest.mark.parametrize("weighted", [False, True])
def test_the_convolution_is_its_matrix_form(weighted: bool) -> None:
    conv = HypergraphConv(4, 3).double()
    torch.nn.init.normal_(conv.bias)
    dual = DualHypergraph.from_edge_index(ODD, num_nodes=8)
    count = dual.num_hyperedges
    weight = draw(count, seed=1).abs() if weighted else torch.ones(count, dtype=torch.float64)
    weight[:2] *= 1.0 - weighted  # some weigh nothing
    x = draw(7, 4)
    expected = dense_conv(conv, x, dual.hyperedge_index, weight, count)
    actual = conv(x, dual.hyperedge_index, weight if weighted else None, num_hyperedges=count)
    torch.testing.assert_close(actual, expected)


def test_gradients_are_right_where_a_vertex_has_no_weight() -> None:
    conv = HypergraphConv(2, 2).double()
    index = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
    weight = torch.tensor([0.0, 0.7], dtype=torch.float64)
    out = conv(draw(4, 2), index, weight)
    assert torch.equal(out[[0, 3]], conv.bias.expand(2, -1))  # one without weight, one without hyperedges
    assert torch.autograd.gradcheck(lambda x: conv(x, index, weight), (draw(4, 2).requires_grad_(),))
    gradient = torch.autograd.grad(conv(draw(4, 2), index, weight.requires_grad_()).sum(), weight)[0]
    assert bool(gradient.isfinite().all())


def test_attention_is_a_softmax_over_the_hyperedges_of_each_vertex() -> None:
    torch.manual_seed(1)
    conv = HypergraphConv(4, 3, attention=True, heads=2).double()
    dual = DualHypergraph.from_edge_index(ODD, num_nodes=8)
    x, attr = draw(7, 4), draw(dual.num_hyperedges, 4, seed=1)
    incidences = dual.hyperedge_index.T.tolist()
    expected = torch.zeros(7, 2, 3, dtype=torch.float64)
    for head in range(2):
        columns = slice(3 * head, 3 * head + 3)
        weight = conv.weight[:, columns].detach()
        h, edges = x @ weight, attr @ weight
        vector = conv.attention[0, head].detach()
        logits = [float(torch.cat([h[v], edges[e]]) @ vector) for v, e in incidences]
        powers = torch.tensor([logit if logit > 0 else 0.2 * logit for logit in logits], dtype=torch.float64).exp()
        for vertex in range(7):
            own = [place for place, (v, _) in enumerate(incidences) if v == vertex]
            powers[own] /= powers[own].sum()
        for place, (vertex, hyperedge) in enumerate(incidences):
            members = [(other, v) for other, (v, e) in enumerate(incidences) if e == hyperedge]
            mean = sum(powers[other] * h[v] for other, v in members) / len(members)
            degree = sum(v == vertex for v, _ in incidences)
            expected[vertex, head] += powers[place] * mean / degree
    actual = conv(x, dual.hyperedge_index, None, attr)
    torch.testing.assert_close(actual, expected.flatten(1) + conv.bias)


def test_attention_without_features_of_hyperedges_looks_at_their_means() -> None:
    torch.manual_seed(1)
    conv = HypergraphConv(4, 3, attention=True, heads=2, concat=False).double()
    dual = DualHypergraph.from_edge_index(PICTURE)
    x, index = draw(3, 4), dual.hyperedge_index
    means = torch.zeros(7, 4, dtype=torch.float64)
    means[1], means[4:] = x.mean(dim=0), x
    torch.testing.assert_close(conv(x, index), conv(x, index, None, means))
    assert conv(x, index).shape == (3, 3)


def test_without_weights_pytorch_geometric_agrees_and_with_attention_too() -> None:
    pyg = pytest.importorskip("torch_geometric.nn", reason="needs torch_geometric (extra graph)")
    dual = DualHypergraph.from_edge_index(ODD, num_nodes=8)
    x = draw(7, 4)
    for attention in (False, True):
        ours = HypergraphConv(4, 3, attention=attention, heads=1 + attention).double()
        theirs = pyg.HypergraphConv(4, 3, use_attention=attention, heads=1 + attention, attention_mode="edge").double()
        with torch.no_grad():
            theirs.lin.weight.copy_(ours.weight.T)
            if attention:
                theirs.att.copy_(ours.attention)
        attr = draw(dual.num_hyperedges, 4, seed=2) if attention else None
        expected = theirs(x, dual.hyperedge_index, hyperedge_attr=attr, num_edges=dual.num_hyperedges)
        torch.testing.assert_close(ours(x, dual.hyperedge_index, None, attr, dual.num_hyperedges), expected)


@pytest.mark.parametrize("edge_index", [PICTURE, ODD, PICTURE[:, :1], PICTURE[:, :0]])
def test_the_edge_convolution_is_that_of_the_dual_hypergraph_with_loops(edge_index: Tensor) -> None:
    edge_conv, conv = EdgeHypergraphConv(4, 3).double(), HypergraphConv(4, 3).double()
    torch.nn.init.normal_(edge_conv.bias)
    conv.load_state_dict(edge_conv.state_dict())
    x = draw(edge_index.shape[1], 4)
    expected = conv(x, DualHypergraph.from_edge_index(edge_index, num_nodes=8).hyperedge_index)
    torch.testing.assert_close(edge_conv(x, edge_index, 8), expected)
    torch.testing.assert_close(edge_conv(x, edge_index), expected)
    torch.testing.assert_close(edge_conv(x, edge_index.int()), expected)


def test_an_edge_that_meets_none_keeps_its_own_features() -> None:
    conv = EdgeHypergraphConv(4, 3, bias=False).double()
    x = draw(1, 4)
    torch.testing.assert_close(conv(x, torch.tensor([[0], [1]])), x @ conv.weight)


def test_the_residual_adds_the_input() -> None:
    plain = EdgeHypergraphConv(4, 4).double()
    residual = EdgeHypergraphConv(4, 4, residual=True).double()
    residual.load_state_dict(plain.state_dict())
    x = draw(7, 4)
    torch.testing.assert_close(residual(x, ODD), plain(x, ODD) + x)
    with pytest.raises(ValueError, match="out_channels must be in_channels=4"):
        EdgeHypergraphConv(4, 5, residual=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_node_of_many_edges_keeps_to_the_range_of_half_precision(dtype: torch.dtype) -> None:
    edges = torch.stack([torch.zeros(70000, dtype=torch.int64), torch.arange(1, 70001)])
    conv = EdgeHypergraphConv(1, 1, bias=False)
    torch.nn.init.ones_(conv.weight)
    out = conv.to(dtype)(torch.full((70000, 1), 2.0, dtype=dtype), edges)
    assert out.dtype == dtype
    assert out.unique().tolist() == [2]  # the mean over the centre and the own value, both 2


def test_features_come_only_from_edges_that_meet() -> None:
    conv = EdgeHypergraphConv(4, 3).double()
    path = torch.stack([torch.arange(5), torch.arange(1, 6)])
    x = draw(5, 4).requires_grad_()
    gradient = torch.autograd.grad(conv(x, path)[2].sum(), x)[0]
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [False, True, True, True, False]


def test_both_directions_of_an_edge_with_equal_features_give_the_same_bits() -> None:
    torch.manual_seed(0)
    layers = [EdgeHypergraphConv(4, 8), EdgeHypergraphConv(8, 1)]
    ends = torch.randint(12, (2, 40), generator=torch.Generator().manual_seed(0))
    x = draw(40, 4).float()
    edges, x = torch.cat([ends, ends.flip(0)], dim=1), torch.cat([x, x])
    for layer in layers:
        x = layer(x, edges, 12)
        assert torch.equal(x[:40], x[40:])


def test_the_order_of_edges_and_the_numbers_of_nodes_do_not_matter() -> None:
    conv = EdgeHypergraphConv(4, 3).double()
    x, order = draw(7, 4), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    names = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(conv(x[order], names[ODD[:, order]], 8), conv(x, ODD, 8)[order])
    torch.testing.assert_close(conv(x, ODD.flip(0), 8), conv(x, ODD, 8))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_node_convolution_is_that_of_pytorch_geometric(normalize: bool) -> None:
    pyg = pytest.importorskip("torch_geometric.nn", reason="needs torch_geometric (extra graph)")
    ours, theirs = GraphConv(4, 3, normalize=normalize).double(), pyg.GCNConv(4, 3, normalize=normalize).double()
    with torch.no_grad():
        torch.nn.init.normal_(ours.bias)
        theirs.lin.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)
    x, weight = draw(8, 4), draw(7, seed=3).abs()
    torch.testing.assert_close(ours(x, ODD), theirs(x, ODD))
    torch.testing.assert_close(ours(x, ODD, weight), theirs(x, ODD, weight))
    torch.testing.assert_close(ours(x, ODD, 0 * weight), theirs(x, ODD, 0 * weight))


def test_weights_are_divided_by_the_roots_of_the_degrees() -> None:
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    weight = torch.tensor([1.0, 1.0, 4.0, 4.0])
    # Into 0: 1, into 1: 5, into 2: 4.
    expected = [1 / 5**0.5, 1 / 5**0.5, 4 / 20**0.5, 4 / 20**0.5]
    assert normalize_weights(edges, weight, 4).tolist() == pytest.approx(expected)
    assert normalize_weights(edges, torch.zeros(4), 4).tolist() == [0] * 4


# --- with PyTorch Geometric ------------------------------------------------------------------------------------------


def test_a_batch_of_transformed_graphs_convolves_as_each_graph_alone() -> None:
    data = pytest.importorskip("torch_geometric.data", reason="needs torch_geometric (extra graph)")
    transforms = pytest.importorskip("torch_geometric.transforms")
    transform = ToDualHypergraph()
    assert isinstance(transform, transforms.BaseTransform)
    graphs = [
        data.Data(x=draw(count, 2), edge_index=edges, edge_attr=draw(edges.shape[1], 4, seed=count))
        for count, edges in ((4, PICTURE), (8, ODD), (3, PICTURE[:, :0]), (4, PICTURE))
    ]
    conv = HypergraphConv(4, 3).double()
    alone = [conv(transform(g).edge_attr, transform(g).hyperedge_index) for g in graphs]
    batch = data.Batch.from_data_list([transform(graph) for graph in graphs])
    torch.testing.assert_close(conv(batch.edge_attr, batch.hyperedge_index), torch.cat(alone))
    edge_conv = EdgeHypergraphConv(4, 3).double()
    edge_conv.load_state_dict(conv.state_dict())
    torch.testing.assert_close(edge_conv(batch.edge_attr, batch.edge_index, batch.num_nodes), torch.cat(alone))
    assert "hyperedge_index" not in graphs[0]
    with pytest.raises(ValueError, match="data must have edge_index"):
        transform(data.Data(x=draw(2, 2)))


def test_a_data_set_that_was_transformed_beforehand_is_loaded_in_batches(tmp_path: Path) -> None:
    data = pytest.importorskip("torch_geometric.data", reason="needs torch_geometric (extra graph)")
    loader = pytest.importorskip("torch_geometric.loader")
    graphs = [
        data.Data(edge_index=edges, edge_attr=draw(edges.shape[1], 4, seed=count), num_nodes=count)
        for count, edges in ((4, PICTURE), (8, ODD), (3, PICTURE[:, :0]), (5, PICTURE))
    ]

    class Stored(data.InMemoryDataset):
        raw_file_names: tuple[str, ...] = ()
        processed_file_names = ("graphs.pt",)

        def __init__(self, root: Path) -> None:
            super().__init__(str(root), pre_transform=ToDualHypergraph())
            self.load(self.processed_paths[0])

        def process(self) -> None:
            self.save([self.pre_transform(graph) for graph in graphs], self.processed_paths[0])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Weights only load failed")
        dataset = Stored(tmp_path)
    (batch,) = loader.DataLoader(dataset, batch_size=4)
    expected = data.Batch.from_data_list([ToDualHypergraph()(graph) for graph in graphs])
    assert torch.equal(batch.hyperedge_index, expected.hyperedge_index)
    assert torch.equal(batch[1].hyperedge_index, ToDualHypergraph()(graphs[1]).hyperedge_index)
    conv, edge_conv = HypergraphConv(4, 3).double(), EdgeHypergraphConv(4, 3).double()
    edge_conv.load_state_dict(conv.state_dict())
    actual = conv(batch.edge_attr, batch.hyperedge_index)
    torch.testing.assert_close(actual, edge_conv(batch.edge_attr, batch.edge_index, batch.num_nodes))


def test_a_batch_of_pytorch_geometric_is_classified_as_each_graph_alone() -> None:
    data = pytest.importorskip("torch_geometric.data", reason="needs torch_geometric (extra graph)")
    torch.manual_seed(0)
    model = EHGNNClassifier(2, 3, 4, hidden=8, ratio=0.6).double().eval()
    graphs = [
        data.Data(x=draw(count, 2), edge_index=edges, edge_attr=draw(edges.shape[1], 4, seed=count))
        for count, edges in ((4, PICTURE), (8, ODD), (3, PICTURE[:, :0]))
    ]
    batch = data.Batch.from_data_list(graphs)
    alone = [model(graph.x, graph.edge_index, graph.edge_attr) for graph in graphs]
    torch.testing.assert_close(model(batch.x, batch.edge_index, batch.edge_attr, batch.batch), torch.cat(alone))


def test_all_but_the_transform_works_without_pytorch_geometric() -> None:
    program = (
        "import sys; sys.modules['torch_geometric'] = None\n"
        "import torch, headgate as hg\n"
        "edges = torch.tensor([[0, 1], [1, 2]])\n"
        "print(hg.EHGNNClassifier(2, 3)(torch.ones(3, 2), edges).shape)\n"
        "try:\n    hg.ToDualHypergraph\n"
        "except ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert "torch.Size([1, 3])" in result.stdout
    assert "MissingExtraError" in result.stdout
    assert "headgate[graph]" in result.stdout
