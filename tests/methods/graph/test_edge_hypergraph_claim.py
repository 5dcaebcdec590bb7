"""The claim's networks and data, costs, and the cross-validation in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headgate.catalog import read_card
from headgate.data import GraphSet, coloured_graphs, star_graphs
from headgate.errors import DataError
from headgate.methods.graph.edge_hypergraph import EdgeHypergraphConv, claim
from headgate.methods.graph.edge_hypergraph.claim import (
    PAPER_ARMS,
    SCALES,
    CostScale,
    PaperScale,
    WorldScale,
    arms_at,
    measure,
)
from headgate.methods.graph.edge_hypergraph.cost import line_graph, star_step
from headgate.methods.graph.edge_hypergraph.experiments import (
    CLASSIFIERS,
    COMPRESSORS,
    DROPPERS,
    EdgeLinear,
    NodePoolClassifier,
    Training,
    compressor,
    edge_accuracy,
    foreign_clusters,
    graph_accuracy,
    kept_share,
    remove_dual,
    star_classifier,
    train,
)
from headgate.methods.graph.edge_hypergraph.hypercluster import SeedAttention
from headgate.methods.graph.edge_hypergraph.recipe import Recipe
from headgate.methods.graph.edge_hypergraph.tu_training import build_classifier, train_fold
from headgate.timing import Effort
from headgate.train import count_parameters, seeded

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale, settings in SCALES.items():
        assert set(arms_at(settings)) == {arm.name for arm in CARD.claim.arms_at(scale)}
        if isinstance(settings, WorldScale):
            assert set(settings.star_rates) == {*CLASSIFIERS, *DROPPERS}
            assert set(settings.moon_rates) == set(settings.colour_rates) == set(COMPRESSORS)


def test_criteria_of_the_laptop_are_those_of_the_paper_s_card() -> None:
    found = {(c.arm, c.against, c.metric): c.value or c.margin for c in CARD.claim.criteria_at("laptop")}
    assert found == {
        ("dual", None, "accuracy"): 0.95,
        ("dual", "no_edges", "accuracy"): 0.40,
        ("dual", "edge_mlp", "accuracy"): 0.40,
        ("hyperdrop", "keep_all", "accuracy"): -0.02,
        ("hyperdrop", "random_keep", "accuracy"): 0.10,
        ("dual", "edge_mlp", "moons"): 0.15,
        ("dual", "nodes", "colours"): 0.10,
        ("dual", "edge_mlp", "colours"): 0.0,
    }
    cost = {(c.arm, c.relation): c.value for c in CARD.claim.criteria_at("cost")}
    assert cost == {("dual", "below"): 1.15, ("dual", "above"): 0.85, ("line_graph", "above"): 1.8}


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="arm must be one of dual, line_graph at scale cost, got 'nodes'"):
        measure("nodes", 0, "cost")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop, cost, paper, got 'huge'"):
        measure("dual", 0, "huge")


@pytest.mark.parametrize("arm", [*CLASSIFIERS, *DROPPERS])
def test_a_cell_measures_what_the_card_s_criteria_ask_of_it(arm: str) -> None:
    first = measure(arm, 1, "smoke")
    asked = {c.metric for c in CARD.claim.criteria_at("smoke") if arm in (c.arm, c.against, *c.controls)}
    assert asked <= set(first.metrics) <= set(CARD.claim.metrics)
    assert all(0 <= value <= 1 for value in first.metrics.values())
    again = measure(arm, 1, "smoke")
    assert again.metrics == first.metrics
    assert again.curves == first.curves


def test_the_picture_of_the_first_seed_shows_a_graph() -> None:
    pictures = measure("dual", 0, "smoke").pictures
    assert pictures["colours"].std() > 5
    assert "colours" not in measure("nodes", 1, "smoke").pictures


# --- networks --------------------------------------------------------------------------------------------------------


def test_arms_of_a_task_have_equally_many_parameters() -> None:
    counts = {arm: count_parameters(star_classifier(arm, 32, 3)) for arm in (*CLASSIFIERS, *DROPPERS)}
    assert counts["dual"] == counts["edge_mlp"] == counts["nodes"] == 5410
    assert counts["no_edges"] == 5410 - 2 * 32
    assert len({counts[arm] for arm in DROPPERS}) == 1
    sizes = {arm: count_parameters(compressor(arm, 6, 0.15, 69.3, 32)) for arm in COMPRESSORS}
    assert sizes["dual"] == sizes["edge_mlp"]
    assert abs(sizes["nodes"] / sizes["dual"] - 1) < 0.03


@pytest.mark.parametrize(
    "pair", [("dual", "edge_mlp"), ("hyperdrop", "keep_all"), ("hyperdrop", "random_keep"), ("hyperdrop", "mlp_scores")]
)
def test_arms_start_from_the_same_numbers(pair: tuple[str, str]) -> None:
    states = []
    for arm in pair:
        with seeded(3):
            states.append(star_classifier(arm, 8, 3).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_without_the_dual_structure_no_edge_sees_another() -> None:
    with seeded(0):
        conv = torch.nn.ModuleList([EdgeHypergraphConv(4, 3)])
    weight, bias = conv[0].weight, conv[0].bias
    remove_dual(conv)
    assert isinstance(conv[0], EdgeLinear)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conv[0](x, torch.tensor([[0, 0], [1, 2]])), x @ weight + bias)


def test_edges_are_not_seen_by_the_arm_without() -> None:
    graphs = star_graphs(4).batch(torch.arange(4))
    with seeded(0):
        model, with_edges = star_classifier("no_edges", 32, 3), star_classifier("nodes", 32, 3)
    changed = graphs._replace(edge_attr=graphs.edge_attr.flip(0))
    torch.testing.assert_close(model(graphs), model(changed))
    assert not torch.allclose(with_edges(graphs), with_edges(changed))


def test_random_edges_are_kept_anew_each_time_and_as_many() -> None:
    graphs = star_graphs(40)
    model = star_classifier("random_keep", 8, 3).eval()
    with seeded(0):
        first = kept_share(model, graphs)
    assert first == pytest.approx(7 / 27, abs=0.06)
    kept = {kept_share(model, graphs) for _ in range(3)}
    assert len(kept) > 1
    assert kept_share(star_classifier("keep_all", 8, 3).eval(), graphs) == 1


def test_dropped_nodes_take_their_edges_with_them() -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    edges = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    empty = torch.zeros(6, 0)
    zeros = torch.zeros(6, dtype=torch.int64)
    graphs = GraphSet(torch.tensor([3, 2]), torch.tensor([4, 2]), x, edges.clone(), empty, torch.tensor([0, 1]), zeros)
    graphs.edge_index[:, 4:] -= 3
    torch.manual_seed(0)
    model = NodePoolClassifier(2, 3, hidden=8, ratio=0.5, dropout=0.0).eval()
    together = model(graphs.batch(torch.tensor([0, 1])))
    torch.testing.assert_close(together[:1], model(graphs.batch(torch.tensor([0]))))
    torch.testing.assert_close(together[1:], model(graphs.batch(torch.tensor([1]))))
    assert len(NodePoolClassifier(2, 3, hidden=8, ratio=None, dropout=0.0).scores) == 0


def test_accuracies_are_shares_of_right_answers() -> None:
    graphs = star_graphs(10)

    class Right(torch.nn.Module):
        def forward(self, batch):
            return torch.nn.functional.one_hot(self.of(batch), 2).float()

    model = Right()
    model.of = lambda batch: batch.y
    assert graph_accuracy(model, graphs) == 1
    model.of = lambda batch: torch.zeros_like(batch.edge_y)
    assert edge_accuracy(model, graphs) == pytest.approx(22 / 27)


@pytest.mark.parametrize("arm", COMPRESSORS)
def test_foreign_clusters_are_those_of_the_next_graph_with_the_own_assignment(arm: str) -> None:
    graphs = coloured_graphs(3).batch(torch.arange(3))
    with seeded(0):
        model = compressor(arm, 4, 0.25, 22, 8)
    own, seen = model(graphs), []
    attention = next(part for part in model.modules() if isinstance(part, SeedAttention))
    hook = attention.register_forward_hook(lambda _, __, clusters: seen.append(clusters))
    with foreign_clusters(model):
        foreign = model(graphs)
    hook.remove()
    assert not torch.allclose(foreign, own)
    torch.testing.assert_close(model(graphs), own)
    same = seen[0].pooled[:1].expand(3, -1, -1)
    replace = attention.register_forward_hook(lambda _, __, clusters: clusters._replace(pooled=same))
    equal = model(graphs)
    with foreign_clusters(model):
        torch.testing.assert_close(model(graphs), equal)
    replace.remove()


def test_training_makes_the_dual_network_better() -> None:
    known, held = star_graphs(100, stream="train"), star_graphs(100, stream="test")
    model, by_step = train(
        lambda: star_classifier("dual", 16, 3),
        known,
        held,
        claim.graph_loss,
        graph_accuracy,
        Training(120, 50, 60),
        1e-2,
        0,
    )
    assert list(by_step) == [0, 60, 120]
    assert by_step[120] > 0.85
    assert not model.training


# --- cost ------------------------------------------------------------------------------------------------------------


def test_the_line_graph_joins_edges_that_meet() -> None:
    edges = torch.tensor([[0, 1, 1, 4], [1, 2, 3, 5]])
    pairs = {tuple(pair) for pair in line_graph(edges, 6).T.tolist()}
    assert pairs == {(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}
    star = torch.stack([torch.zeros(9, dtype=torch.int64), torch.arange(1, 10)])
    assert line_graph(star, 10).shape == (2, 9 * 8)


@pytest.mark.parametrize("arm", ["dual", "line_graph"])
def test_a_step_convolves_the_edges_of_a_star(arm: str) -> None:
    out = star_step(arm, 6, 4)()
    assert out.shape == (6, 4)
    # In a star all edges meet, so the mean over the outputs is the mean over the inputs, mapped.
    assert bool(out.isfinite().all())
    assert float(out.std()) > 0


def test_costs_are_exponents_over_the_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = CostScale({"dual": (8, 64), "line_graph": (4, 8)}, Effort(rounds=2, fewest_rounds=2, sample_seconds=1e-3))
    monkeypatch.setitem(SCALES, "cost", tiny)
    monkeypatch.setattr(claim, "summarize", lambda samples: type("S", (), {"median": 2.0})())
    found = measure("dual", 0, "cost")
    assert found.metrics["time_exponent"] == pytest.approx(0)
    assert found.metrics["microseconds_per_edge"] == pytest.approx(2e6 / 64)
    assert list(found.curves["time of a convolution"].x) == [8, 64]


# --- the paper's cross-validation ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 graphs of marked edges as text files: cycles whose label is their node's label."""
    folder = tmp_path / "TINY"
    (folder / "10fold_idx").mkdir(parents=True)
    pairs, owners, nodes, labels = [], [], [], []
    for graph in range(40):
        first, size = len(owners) + 1, 3 + graph % 3
        for place in range(size):
            a, b = first + place, first + (place + 1) % size
            pairs += [f"{a}, {b}", f"{b}, {a}"]
            owners.append(str(graph + 1))
            nodes.append(str(graph % 2))
        labels.append(str(graph % 2))
    files = {"A": pairs, "graph_indicator": owners, "graph_labels": labels, "node_labels": nodes}
    for name, lines in files.items():
        (folder / f"TINY_{name}.txt").write_text("\n".join(lines))
    for fold in range(10):
        numbers = "\n".join(map(str, range(4 * fold, 4 * fold + 4)))
        (folder / "10fold_idx" / f"test_idx-{fold + 1}.txt").write_text(numbers)
    monkeypatch.setenv("HEADGATE_GRAPHS", str(tmp_path))
    return folder


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_a_fold_is_trained_and_tested(arm: str, tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(3e-2, 1e-4, batch_size=16, epochs=8, patience=7, warmup_epochs=1)
    monkeypatch.setitem(SCALES, "paper", PaperScale("TINY", recipe, hidden=8, ratio=0.6))
    found = measure(arm, 3, "paper")
    assert found.metrics["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert list(found.curves["validation"].x) == list(range(9))
    assert measure(arm, 3, "paper").metrics == found.metrics


def test_a_run_stops_when_validation_gets_no_better(tiny_set: Path) -> None:
    recipe = Recipe(1e-12, 0.0, batch_size=16, epochs=50, patience=2, warmup_epochs=1)
    _, by_epoch = train_fold("hyperdrop", "TINY", 0, recipe, hidden=8, ratio=0.6)
    assert len(by_epoch) < 50


def test_the_paper_s_networks_have_the_published_sizes(tiny_set: Path) -> None:
    from headgate.data import read_tu

    graphs = read_tu(tiny_set)
    counts = {arm: count_parameters(build_classifier(arm, graphs, 128, 0.65, 0.5)) for arm in PAPER_ARMS}
    assert len({counts[arm] for arm in DROPPERS}) == 1
    # Convolutions and scores of edges come on top of what the network of nodes has.
    assert counts["hyperdrop"] - counts["no_edges"] == (128 + 128) + (128 * 128 + 128) + 2 * (128 + 1)


def test_missing_sets_are_named(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="PROTEINS is no folder"):
        measure("hyperdrop", 0, "paper")
    (tiny_set / "10fold_idx" / "test_idx-10.txt").write_text("40\n")
    with pytest.raises(DataError, match="names graphs beyond the 40"):
        train_fold("hyperdrop", "TINY", 0, Recipe(1e-3, 0.0), hidden=8, ratio=0.6)
    monkeypatch.delenv("HEADGATE_GRAPHS")
    monkeypatch.delenv("HEADGATE_SHARED", raising=False)
    with pytest.raises(DataError, match="set HEADGATE_GRAPHS to its folder"):
        measure("hyperdrop", 0, "paper")
