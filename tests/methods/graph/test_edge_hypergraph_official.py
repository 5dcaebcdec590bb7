"""Weights of the published code, recipes, and presets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headgate import create_model
from headgate.catalog import find_method
from headgate.methods.graph.edge_hypergraph import RECIPES, EarlyStopping, reconstruction_loss
from headgate.methods.graph.edge_hypergraph.official import (
    build_hypercluster,
    build_hyperdrop,
    build_hyperdrop_node,
    build_hyperdrop_ogb,
    build_hypergraph_conv,
    build_pool,
    convert_state_dict,
)

TU = {"num_node_features": 5, "num_edge_features": 4, "num_hidden": 16, "num_classes": 3, "edge_ratio": 0.6}
OGB = {"num_classes": 2, "num_hidden": 8, "atom_dims": (3, 4), "bond_dims": (2,)}
NODE = {"num_node_features": 5, "num_classes": 3, "num_convs": 6}
CLUSTER = {
    "num_edge_features": 4,
    "num_hidden": 16,
    "edge_ratio": 0.3,
    "avg_num_edges": 26,
    "cluster": True,
    "ln": True,
}


def hyper(name: str, before: int, behind: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (before, behind), f"{name}.bias": (behind,)}


def linear(name: str, before: int, behind: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (behind, before), f"{name}.bias": (behind,)}


def head(hidden: int, outputs: int) -> dict[str, tuple[int, ...]]:
    sizes = (("0", 3 * hidden, hidden), ("3", hidden, hidden // 2), ("6", hidden // 2, outputs))
    return {k: v for number, *size in sizes for k, v in linear(f"classifier.{number}", *size).items()}


def fill(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Distinct numbers in every weight."""
    return {
        name: torch.arange(torch.Size(shape).numel()).view(shape) + 1000.0 * i
        for i, (name, shape) in enumerate(shapes.items())
    }


def load(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Fill, convert, load; every weight of ours must get one."""
    state = fill(shapes)
    converted = convert_state_dict({f"module.{name}": value for name, value in state.items()}, model)
    model.load_state_dict(converted, strict=True)
    return state


def tu_shapes(graph_conv: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, before in enumerate((5, 16, 16)):
        new = graph_conv == "lin.weight"
        shapes |= {f"convs.{layer}.{graph_conv}": (16, before) if new else (before, 16), f"convs.{layer}.bias": (16,)}
    for layer, before in enumerate((4, 16)):
        shapes |= hyper(f"hyperconvs.{layer}", before, 16) | hyper(f"scoreconvs.{layer}", 16, 1)
    return shapes | head(16, 3)


def test_weights_of_the_classifier_load_from_both_forms_of_graph_convolutions() -> None:
    new, old = build_hyperdrop(TU), build_hyperdrop(TU)
    state = load(new, tu_shapes("lin.weight"))
    assert torch.equal(new.convs[0].weight, state["convs.0.lin.weight"])
    assert torch.equal(new.edge_convs[1].weight, state["hyperconvs.1.weight"])
    assert torch.equal(new.drops[1].score_conv.weight, state["scoreconvs.1.weight"])
    state = load(old, tu_shapes("weight"))
    assert torch.equal(old.convs[1].weight, state["convs.1.weight"].T)


def test_collab_has_edges_of_an_eighth_of_the_width() -> None:
    assert build_hyperdrop({**TU, "data": "COLLAB"}).edge_convs[0].out_channels == 2
    assert build_hyperdrop(TU).edge_convs[0].out_channels == 16
    assert build_hyperdrop({**TU, "dropout": "0.25 (inactive in eval)"}).head[2].p == 0.25


def test_weights_of_the_molecule_model_load() -> None:
    model = build_hyperdrop_ogb(OGB)
    shapes: dict[str, tuple[int, ...]] = {
        "atom_encoder.atom_embedding_list.0.weight": (3, 8),
        "atom_encoder.atom_embedding_list.1.weight": (4, 8),
        "bond_encoder.bond_embedding_list.0.weight": (2, 8),
    }
    for layer in range(3):
        shapes |= linear(f"convs.{layer}.linear_node", 8, 8) | linear(f"convs.{layer}.linear_edge", 8, 8)
        shapes[f"convs.{layer}.root_emb.weight"] = (1, 8)
    for layer in range(2):
        shapes |= hyper(f"hyperconvs.{layer}", 8, 8) | hyper(f"scoreconvs.{layer}", 8, 1)
    state = load(model, shapes | head(8, 2))
    assert torch.equal(model.convs[2].root, state["convs.2.root_emb.weight"][0])
    assert torch.equal(model.atoms.embeddings[1].weight, state["atom_encoder.atom_embedding_list.1.weight"])


def test_weights_of_the_node_model_load_without_the_layers_that_nothing_reads() -> None:
    model = build_hyperdrop_node(NODE)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (before, behind) in enumerate(((5, 32), *[(32, 32)] * 4, (32, 3))):
        shapes |= {f"convs.{layer}.lin.weight": (behind, before), f"convs.{layer}.bias": (behind,)}
    for layer in range(5):
        shapes |= hyper(f"hyperconvs.{layer}", 16 if layer else 64, 16) | hyper(f"scoreconvs.{layer}", 16, 1)
    state = load(model, shapes)
    assert torch.equal(model.drops["1"].score_conv.weight, state["scoreconvs.1.weight"])
    assert torch.equal(model.convs[5].weight, state["convs.5.lin.weight"])


def pool_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"pool.S": (1, 8, 16)}
    shapes |= linear("pool.mab.fc_q", 16, 16) | linear("pool.mab.fc_o", 16, 16)
    shapes |= hyper("pool.mab.fc_k", 16, 16) | hyper("pool.mab.fc_v", 16, 16)
    for norm in ("ln0", "ln1"):
        shapes |= {f"pool.mab.{norm}.weight": (16,), f"pool.mab.{norm}.bias": (16,)}
    return shapes


def test_weights_of_the_auto_encoder_load() -> None:
    model = build_hypercluster(CLUSTER)
    shapes = (
        hyper("convs.0", 4, 16) | hyper("convs.1", 16, 16) | hyper("unconvs.0", 16, 16) | hyper("unconvs.1", 16, 16)
    )
    state = load(model, shapes | hyper("last", 16, 4) | pool_shapes())
    # Convolutions on hypergraphs are stored as ours are, also where their names are those of graph convolutions.
    assert torch.equal(model.convs[1].weight, state["convs.1.weight"])
    assert torch.equal(model.pool.key.weight, state["pool.mab.fc_k.weight"])
    assert torch.equal(model.pool.attention.norm_after.weight, state["pool.mab.ln1.weight"])
    with pytest.raises(ValueError, match="num_heads must be 1"):
        build_hypercluster({**CLUSTER, "num_heads": 2})


def test_weights_of_the_pooling_alone_load_for_several_heads() -> None:
    pool = build_pool({**CLUSTER, "num_heads": 4})
    state = load(pool, {name.removeprefix("pool."): shape for name, shape in pool_shapes().items()})
    assert pool.heads == 4
    assert torch.equal(pool.attention.seeds, state["S"])


def test_weights_of_the_convolution_load_with_attention() -> None:
    conv = build_hypergraph_conv({"in_channels": 4, "out_channels": 3, "use_attention": True, "heads": 2})
    state = load(conv, {"weight": (4, 6), "att": (1, 2, 6), "bias": (6,)})
    assert torch.equal(conv.attention, state["att"])


def test_a_name_that_the_published_model_does_not_have_is_refused() -> None:
    for name in ("convs.0.gate", "pool.mab.fc_x.weight"):
        with pytest.raises(ValueError, match=f"'{name}' is no weight of a published EHGNNClassifier"):
            convert_state_dict({name: torch.ones(1)}, build_hyperdrop(TU))


# --- recipes and presets ---------------------------------------------------------------------------------------------


def test_every_preset_has_its_recipe() -> None:
    assert set(RECIPES) == set(find_method("edge-hypergraph").presets)
    assert RECIPES["hyperdrop_dd"].batch_size == 10
    assert RECIPES["hyperdrop_molhiv"].batch_size == 512
    assert RECIPES["hyperdrop_molhiv"].patience is None
    assert RECIPES["hypercluster_zinc"].weight_decay == 0


def test_presets_have_the_sizes_of_their_sets() -> None:
    with torch.device("meta"):
        zinc, collab, dd = (create_model(name) for name in ("hypercluster_zinc", "hyperdrop_collab", "hyperdrop_dd"))
        cora = create_model("hyperdrop_cora")
    assert zinc.pool.num_clusters == 8
    assert collab.edge_convs[0].out_channels == 16
    assert dd.hidden == 32
    assert [conv.weight.shape[0] for conv in cora.convs] == [32] * 5 + [7]


def test_the_learning_rate_rises_for_as_many_epochs_as_patience_and_falls_to_zero() -> None:
    factor = RECIPES["hyperdrop_proteins"].schedule(steps_per_epoch=8)
    assert factor(0) == pytest.approx(1 / 400)
    assert factor(399) == 1
    assert factor(400 + 1800) == pytest.approx(0.5)
    assert factor(4000) == pytest.approx(0, abs=1e-6)


def test_adam_adds_weight_decay_to_the_gradient_of_every_parameter() -> None:
    optimizer = RECIPES["hyperdrop_cora"].optimizer(nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.Adam
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups] == [
        (0.01, 5e-4, 2)
    ]


def test_early_stopping_bears_as_many_evaluations_as_its_patience() -> None:
    stop = EarlyStopping(patience=2)
    values = [3.0, 2.0, 2.0, 2.5, 2.1]
    assert [stop({"loss": value}) for value in values] == [False, False, False, False, True]
    assert (stop.best, stop.best_evaluation) == (2.0, 1)
    accuracy = EarlyStopping(patience=1, metric="accuracy", larger_is_better=True)
    assert [accuracy({"accuracy": value}) for value in (0.5, 0.5, 0.4, 0.4)] == [False, False, False, True]
    with pytest.raises(ValueError, match="patience must not be negative"):
        EarlyStopping(-1)


def test_the_published_validation_loss_has_the_softmax_twice() -> None:
    logits, target = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    once = torch.tensor([[2.0, 0.0]]).softmax(1)
    assert reconstruction_loss(logits, target).item() == pytest.approx(-once[0, 0].log().item())
    twice = once.softmax(1)
    assert reconstruction_loss(logits, target, official_quirks=True).item() == pytest.approx(-twice[0, 0].log().item())
