"""Whole models of DeepCTR-Torch and FuxiCTR: their weights, under their names, give their logits in ours.

The published forward passes are written down here in their own order of inputs: DeepCTR-Torch's tower reads sparse fields,
the pooled history, dense fields; FuxiCTR's reads its feature map, each history's share of the pooled vector in its place.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate import DIN, Field
from headgate.methods.recommend.din.official import (
    convert_deepctr_dice,
    convert_deepctr_model,
    convert_deepctr_unit,
    convert_fuxictr_model,
    convert_fuxictr_unit,
    unit_from_deepctr,
)

FIELDS = {
    "user": Field(3, vocabulary=5),
    "item": Field(4, vocabulary=9),
    "cate": Field(4, vocabulary=6),
    "score": Field(2),
}
HISTORY, TARGET = ["hist_item", "hist_cate"], ["item", "cate"]


def model() -> DIN:
    torch.manual_seed(0)
    return DIN(FIELDS, HISTORY, TARGET, (8, 6), "relu", attention=(7, 5), attention_activation="sigmoid").eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"user": 5, "item": 9, "cate": 6}
    ids = {name: torch.randint(size, (4,), generator=generator) for name, size in sizes.items()}
    past = {f"hist_{name}": torch.randint(sizes[name], (4, 5), generator=generator) for name in TARGET}
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [2]])
    return {**ids, **past, "score": torch.randn(4, 2, generator=generator), "mask": mask}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def pooled_and_pieces(
    given: dict[str, torch.Tensor], tables: dict[str, torch.Tensor], layers: list[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The pieces of a published tower's input, by name."""
    pieces = {name: tables[name][given[name]] for name in ("user", "item", "cate")} | {"score": given["score"]}
    query = torch.cat([pieces["item"], pieces["cate"]], dim=1)[:, None].expand(4, 5, 8)
    keys = torch.cat([tables["item"][given["hist_item"]], tables["cate"][given["hist_cate"]]], dim=2)
    hidden = torch.cat([query, keys, query - keys, query * keys], dim=2)
    for weight, bias in layers[:-1]:
        hidden = torch.sigmoid(hidden @ weight.T + bias)
    scores = (hidden @ layers[-1][0].T + layers[-1][1]).squeeze(2) * given["mask"]
    pooled = (scores[..., None] * keys).sum(dim=1)
    return {**pieces, "hist_item": pooled[:, :4], "hist_cate": pooled[:, 4:]}


def weights() -> tuple[dict[str, torch.Tensor], list, list]:
    tables = {"user": draw(5, 3, seed=10), "item": draw(9, 4, seed=11), "cate": draw(6, 4, seed=12)}
    unit = [(draw(7, 32, seed=13), draw(7, seed=14)), (draw(5, 7, seed=15), draw(5, seed=16)), (draw(1, 5, seed=17), draw(1, seed=18))]  # fmt: skip
    tower = [(draw(8, 21, seed=19), draw(8, seed=20)), (draw(6, 8, seed=21), draw(6, seed=22)), (draw(1, 6, seed=23), draw(1, seed=24))]  # fmt: skip
    return tables, unit, tower


def tower_logits(hidden: torch.Tensor, tower: list) -> torch.Tensor:
    for weight, bias in tower[:-1]:
        hidden = torch.relu(hidden @ weight.T + bias)
    return (hidden @ tower[-1][0].T + tower[-1][1])[:, 0]


def test_a_deepctr_model_gives_its_logits_in_ours() -> None:
    tables, unit, tower = weights()
    columns = ["user", "item", "cate", "hist_item", "hist_cate", "score"]
    state = {f"embedding_dict.{name}.weight": table for name, table in tables.items()}
    state["embedding_dict.hist_item.weight"] = tables["item"]
    for index, (weight, bias) in enumerate(unit[:-1]):
        state[f"attention.local_att.dnn.linears.{index}.weight"] = weight
        state[f"attention.local_att.dnn.linears.{index}.bias"] = bias
    state["attention.local_att.dense.weight"], state["attention.local_att.dense.bias"] = unit[-1]
    for index, (weight, bias) in enumerate(tower[:-1]):
        state[f"dnn.linears.{index}.weight"], state[f"dnn.linears.{index}.bias"] = weight, bias
    state["dnn_linear.weight"], state["out.bias"] = tower[-1]
    ours = model()
    ours.load_state_dict(convert_deepctr_model(state, ours, columns))
    pieces = pooled_and_pieces(batch(), tables, unit)
    expected = tower_logits(torch.cat([pieces[name] for name in columns], dim=1), tower)
    torch.testing.assert_close(ours(batch()), expected, atol=1e-5, rtol=1e-4)


def test_a_fuxictr_model_gives_its_logits_in_ours() -> None:
    tables, unit, tower = weights()
    columns = ["score", "item", "hist_item", "user", "cate", "hist_cate"]
    state = {f"embedding_layer.embedding_layers.{name}.weight": table for name, table in tables.items()}
    for prefix, layers in (("attention_layers.0.attention_layer.mlp", unit), ("dnn.mlp", tower)):
        for index, (weight, bias) in enumerate(layers):
            state[f"{prefix}.{2 * index}.weight"], state[f"{prefix}.{2 * index}.bias"] = weight, bias
    ours = model()
    ours.load_state_dict(convert_fuxictr_model(state, ours, columns))
    pieces = pooled_and_pieces(batch(), tables, unit)
    expected = tower_logits(torch.cat([pieces[name] for name in columns], dim=1), tower)
    torch.testing.assert_close(ours(batch()), expected, atol=1e-5, rtol=1e-4)


def test_a_prelu_of_one_slope_and_one_of_many_are_told_apart() -> None:
    for count in (1, 7):
        state = {
            "local_att.dnn.linears.0.weight": draw(7, 16, seed=1),
            "local_att.dnn.linears.0.bias": draw(7, seed=2),
            "local_att.dnn.activation_layers.0.weight": torch.full((count,), 0.3),
            "local_att.dense.weight": draw(1, 7, seed=3),
            "local_att.dense.bias": draw(1, seed=4),
        }
        (activation,) = unit_from_deepctr(state).activations
        assert isinstance(activation, nn.PReLU)
        assert activation.weight.tolist() == pytest.approx([0.3] * count)


def test_foreign_weights_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"got 'bn\.gamma'"):
        convert_deepctr_dice({"bn.gamma": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"got 'dnn\.bn\.0\.weight'"):
        convert_deepctr_unit({"local_att.dnn.bn.0.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"got 'conv\.weight'"):
        convert_fuxictr_unit({"conv.weight": torch.zeros(3)})
    batch_norm = {"mlp.0.weight": torch.zeros(3, 8), "mlp.1.weight": torch.ones(3), "mlp.1.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="weights of Dice or PReLU behind a layer"):
        convert_fuxictr_unit(batch_norm)
    ours = model()
    with pytest.raises(ValueError, match="columns must hold each of"):
        state = {"attention_layers.0.attention_layer.mlp.0.weight": draw(7, 32, seed=1), "attention_layers.0.attention_layer.mlp.0.bias": draw(7, seed=1), "attention_layers.0.attention_layer.mlp.2.weight": draw(1, 7, seed=1), "attention_layers.0.attention_layer.mlp.2.bias": draw(1, seed=1), "dnn.mlp.0.weight": draw(8, 21, seed=1), "dnn.mlp.0.bias": draw(8, seed=1), "dnn.mlp.2.weight": draw(1, 8, seed=1), "dnn.mlp.2.bias": draw(1, seed=1)}  # fmt: skip
        convert_fuxictr_model(state, ours, ["user", "item"])
