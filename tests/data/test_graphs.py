"""Graph worlds: what the docstrings promise of every drawn graph, joining, and the same bytes for the same seed."""

from __future__ import annotations

import itertools

import pytest
import torch

from headgate.data import GraphSet, coloured_graphs, moon_graphs, star_graphs


def split(graphs: GraphSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(edge_index, edge_y) of every graph."""
    edges = graphs.num_edges.tolist()
    return list(zip(graphs.edge_index.split(edges, dim=1), graphs.edge_y.split(edges), strict=True))


def check_simple(edge_index: torch.Tensor) -> None:
    """Smaller ends first, no loop, no edge twice."""
    assert bool((edge_index[0] < edge_index[1]).all())
    assert edge_index.unique(dim=1).shape == edge_index.shape


def test_marked_edges_lie_apart_or_around_one_node() -> None:
    graphs = star_graphs(60, seed=3)
    assert graphs.y.tolist() == [0, 1] * 30
    for (ends, marks), label in zip(split(graphs), graphs.y.tolist(), strict=True):
        check_simple(ends)
        assert ends.shape == (2, 27)
        marked = [set(pair) for pair in ends[:, marks == 1].T.tolist()]
        assert len(marked) == 5
        meeting = [len(a & b) for a, b in itertools.combinations(marked, 2)]
        assert sorted(meeting) == ([0] * 10 if label == 0 else [0] * 4 + [1] * 6)
        if label:
            degrees = ends[:, marks == 1].flatten().bincount(minlength=16)
            assert sorted(degrees.tolist())[-1] == 4


def test_features_of_marked_edges_are_their_type_and_a_number() -> None:
    graphs = star_graphs(200, seed=3)
    assert torch.equal(graphs.edge_attr[:, 0].long(), graphs.edge_y)
    assert torch.equal(graphs.edge_attr[:, 1].long(), 1 - graphs.edge_y)
    assert abs(float(graphs.edge_attr[:, 2].mean())) < 0.05
    assert abs(float(graphs.edge_attr[:, 2].std()) - 1) < 0.05
    assert graphs.x.shape == (200 * 16, 0)


def test_graphs_of_both_classes_are_alike_but_for_the_marks() -> None:
    graphs = star_graphs(400, seed=1)
    degrees = [ends.flatten().bincount(minlength=16).double().square().mean() for ends, _ in split(graphs)]
    apart, star = torch.stack(degrees)[0::2], torch.stack(degrees)[1::2]
    spread = torch.stack(degrees).std() * (2 / 200) ** 0.5
    assert abs(float(apart.mean() - star.mean())) < 3 * float(spread)


def test_edges_of_the_moons_join_nearest_points_and_have_the_colour_of_their_place() -> None:
    graphs, points = moon_graphs(4, noise=0.05, replaced=0.0, seed=5)
    for number, (ends, colours) in enumerate(split(graphs)):
        check_simple(ends)
        position = points[40 * number : 40 * number + 40].double()
        distance = torch.cdist(position, position).fill_diagonal_(9)
        near = {(min(a, b), max(a, b)) for a in range(40) for b in distance[a].topk(3, largest=False).indices.tolist()}
        assert near == {tuple(pair) for pair in ends.T.tolist()}
        place: dict[int, int] = {}
        for (a, b), colour in zip(ends.T.tolist(), colours.tolist(), strict=True):
            moons = (a >= 20, b >= 20)
            third = min(2, int(3 * ((a % 20) + (b % 20)) / 2 / 19))
            true = 5 if moons[0] != moons[1] else 3 * moons[0] + third
            assert place.setdefault(true, colour) == colour
        assert len(set(place.values())) == len(place)


def test_colours_that_are_seen_are_replaced_as_often_as_asked() -> None:
    graphs, _ = moon_graphs(100, seed=5)
    wrong = float((graphs.edge_attr.argmax(dim=1) != graphs.edge_y).double().mean())
    assert wrong == pytest.approx(0.4 * 5 / 6, abs=0.02)  # one in six is drawn as it was
    assert torch.equal(graphs.edge_attr.sum(dim=1), torch.ones(len(graphs.edge_y)))


def test_coloured_graphs_hold_a_path_and_independent_colours() -> None:
    graphs = coloured_graphs(150, seed=2)
    assert graphs.edge_y.bincount().double().div(len(graphs.edge_y)).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    for ends, _ in split(graphs)[:20]:
        check_simple(ends)
        assert ends.shape == (2, 22)
        reached = {0}
        for _ in range(14):
            reached |= {node for pair in ends.T.tolist() if reached & set(pair) for node in pair}
        assert reached == set(range(14))


def test_a_batch_is_the_chosen_graphs_side_by_side() -> None:
    graphs, _ = moon_graphs(3, points=8, neighbours=2, seed=1)
    parts = split(graphs)
    batch = graphs.batch(torch.tensor([2, 0]))
    assert batch.edge_index.tolist() == torch.cat([parts[2][0], parts[0][0] + 8], dim=1).tolist()
    assert batch.edge_y.tolist() == [*parts[2][1].tolist(), *parts[0][1].tolist()]
    assert batch.batch.tolist() == [0] * 8 + [1] * 8
    both = batch.both_ways()
    assert both.edge_index.shape[1] == 2 * batch.edge_index.shape[1]
    assert {tuple(pair) for pair in both.edge_index.T.tolist()} == {
        pair for a, b in batch.edge_index.T.tolist() for pair in ((a, b), (b, a))
    }


@pytest.mark.parametrize("draw", [star_graphs, lambda count, **o: moon_graphs(count, **o)[0], coloured_graphs])
def test_graph_number_n_depends_on_seed_and_stream_alone(draw) -> None:
    few, many = draw(2, seed=7, stream="a"), draw(5, seed=7, stream="a")
    assert torch.equal(few.edge_y, many.edge_y[: len(few.edge_y)])
    assert torch.equal(few.edge_index, many.edge_index[:, : len(few.edge_y)])
    assert not torch.equal(draw(2, seed=7, stream="b").edge_y[:20], few.edge_y[:20])
    assert not torch.equal(draw(2, seed=8, stream="a").edge_y[:20], few.edge_y[:20])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="count must be positive"):
        star_graphs(0)
    with pytest.raises(ValueError, match="points must be even"):
        moon_graphs(1, points=7)
    with pytest.raises(ValueError, match="edges must hold a path"):
        coloured_graphs(1, nodes=14, edges=12)
    graphs = coloured_graphs(2)
    with pytest.raises(ValueError, match="y must have 2 rows, got 1"):
        GraphSet(**{**graphs.__dict__, "y": graphs.y[:1]})
