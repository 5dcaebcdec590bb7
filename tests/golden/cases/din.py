"""DeepCTR-Torch and FuxiCTR: the activation unit with its pooling, and Dice in both of their forms."""

from __future__ import annotations

import torch
from torch import Tensor

from headgate.methods.recommend.din import Dice
from headgate.methods.recommend.din.official import (
    DeepCTRDice,
    FuxiCTRDice,
    convert_deepctr_dice,
    convert_fuxictr_dice,
    unit_from_deepctr,
    unit_from_fuxictr,
)
from tests.golden.harness import Golden, golden_case


@golden_case("pool")
def check_pool(golden: Golden) -> None:
    """Pooled history and weights, gradients of query and keys, and the pooled history in training mode."""
    config = golden.config
    unit = unit_from_deepctr(
        golden.state("param."),
        normalize="softmax" if config["weight_normalization"] else None,
        activation=config["att_activation"].lower(),
    )
    golden.assert_equal("embed_dim", unit.embed_dim, config["embedding_dim"])
    widths = [unit.first.out_features, *(layer.out_features for layer in unit.layers)]
    golden.assert_equal("hidden", widths, list(config["att_hidden_units"]))
    query, keys = golden.tensors["in.query"].requires_grad_(), golden.tensors["in.keys"].requires_grad_()
    mask = torch.arange(keys.shape[1]) < golden.tensors["in.keys_length"]
    unit.eval()
    pooled, weights = unit(query, keys, mask, return_weights=True)
    golden.assert_close("pooled", pooled, "out.pooled_eval")
    golden.assert_close("weights", weights, "out.scores_eval")
    pooled.backward(golden.tensors["in.grad_out"])
    golden.assert_close("gradient of query", query.grad, "grad.query")
    golden.assert_close("gradient of keys", keys.grad, "grad.keys")
    prepared = unit.pool(query, unit.prepare(keys, mask))
    golden.assert_close("pooled from a prepared history", prepared, "out.pooled_eval")
    flat = torch.stack([unit(query[:, 0], keys, mask)], dim=1)
    golden.assert_close("pooled for one candidate", flat, "out.pooled_eval")
    golden.assert_close("pooled in training", unit.train()(query, keys, mask), "out.pooled_train")


@golden_case("fuxictr_attention")
def check_fuxictr_attention(golden: Golden) -> None:
    """Pooled history, for any pattern of padding."""
    config = golden.config
    unit = unit_from_fuxictr(
        golden.state("param."),
        normalize="softmax" if config["use_softmax"] else None,
        activation=config["hidden_activations"].lower(),
    )
    golden.assert_equal("embed_dim", unit.embed_dim, config["embedding_dim"])
    mask = golden.tensors["in.mask"].bool()
    pooled = unit.eval()(golden.tensors["in.target"], golden.tensors["in.history"], mask)
    golden.assert_close("pooled", pooled, "out.pooled_eval")


@golden_case("dice")
def check_dice(golden: Golden) -> None:
    """Both forms in evaluation mode, then in training mode, and the gradient of the sum of squares there."""
    width = golden.config["dim"]
    inputs = {"dim2": "in.x2", "dim3": "in.x3", "fuxictr": "in.x2"}
    for form, source in inputs.items():
        if f"out.{form}.eval" not in golden.tensors:
            continue
        dice = _dice(form, width, golden.state(f"param.{form}."))
        x = golden.tensors[source].requires_grad_()
        golden.assert_close(f"{form}: evaluation", dice.eval()(x), f"out.{form}.eval")
        y = dice.train()(x)
        golden.assert_close(f"{form}: training", y, f"out.{form}.train")
        y.square().sum().backward()
        if (name := f"grad.{form}.train.sum_of_squares.x") in golden.tensors:
            golden.assert_close(f"{form}: gradient of x", x.grad, name)


def _dice(form: str, width: int, state: dict[str, Tensor]) -> Dice:
    fuxictr = form == "fuxictr"
    dice = FuxiCTRDice(width) if fuxictr else DeepCTRDice(width)
    dice.load_state_dict(convert_fuxictr_dice(state) if fuxictr else convert_deepctr_dice(state))
    return dice
