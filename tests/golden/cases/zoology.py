"""Zoology against HazyResearch/zoology: the task's integers, every mixer with its gradient, the language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from headgate.data.recall import mqar
from headgate.methods.sequence.zoology.official import build_language_model, build_mixer, convert_state_dict
from tests.golden.harness import Golden, golden_case


@golden_case("mqar")
def check_mqar(golden: Golden) -> None:
    for index, setting in enumerate(golden.json["cases"]):
        setting = dict(setting)
        setting.pop("include_slices", None)
        filler_seed = setting.pop("torch_manual_seed_before_call")
        data = mqar(**setting, filler_seed=filler_seed, legacy_rng=True)
        golden.assert_close(f"inputs of case {index}", data.inputs, f"{index}.inputs")
        golden.assert_close(f"labels of case {index}", data.labels, f"{index}.labels")


def build(golden: Golden, name: str) -> nn.Module:
    mixer = build_mixer(name, golden.config)
    mixer.load_state_dict(convert_state_dict(golden.state("state.")))
    return mixer.train(golden.json["mode"] == "train")


def check_mixer(name: str) -> Callable[[Golden], None]:
    def check(golden: Golden) -> None:
        mixer = build(golden, name)
        x = golden.tensors["in.x"].requires_grad_()
        asks = "out.aux_loss" in golden.tensors
        if asks:
            y, aux_loss = mixer(x, return_aux=True)
            golden.assert_close("auxiliary loss", aux_loss, "out.aux_loss")
        else:
            y = mixer(x)
        golden.assert_close("output", y, "out.y")
        if "in.do" in golden.tensors and "grad.x" in golden.tensors:
            y.backward(golden.tensors["in.do"])
            golden.assert_close("gradient of x", x.grad, "grad.x")

    return check


golden_case("mha")(check_mixer("MHA"))
golden_case("base_conv")(check_mixer("BaseConv"))
golden_case("based")(check_mixer("Based"))
golden_case("sliding_attention")(check_mixer("SlidingAttn"))
golden_case("sigmoid_lookups_train")(check_mixer("SigmoidLookups"))
golden_case("sigmoid_lookups_eval")(check_mixer("SigmoidLookups"))
golden_case("sma_lookups_train")(check_mixer("SMA"))
golden_case("hyena")(check_mixer("Hyena"))
golden_case("h3")(check_mixer("H3"))


@golden_case("lm")
def check_language_model(golden: Golden) -> None:
    model = build_language_model(golden.config)
    model.load_state_dict(convert_state_dict(golden.state("state.")))
    model.eval()
    tokens = golden.tensors["in.ids"]
    with torch.no_grad():
        golden.assert_close("logits", model(tokens), "out.logits")
    if golden.json.get("state_size_bytes") is not None:
        size = model.state_size(tokens.shape[1])
        golden.assert_equal("state size in bytes", None if size is None else 4 * size, golden.json["state_size_bytes"])
