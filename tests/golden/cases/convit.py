"""ConViT against facebookresearch/convit: a layer at its local start and afterwards, and a whole model block by block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headgate.methods.vision.convit import GPSA, relative_coordinates
from headgate.methods.vision.convit.official import build_convit, convert_state_dict
from tests.golden.harness import Golden, golden_case


@golden_case("gpsa")
def check_layer(golden: Golden) -> None:
    """What the local start decides, attention and distance there; then everything with perturbed weights."""
    config = {key: value for key, value in golden.config.items() if key not in ("tokens", "batch")}
    tokens = golden.config["tokens"]
    torch.manual_seed(0)
    layer = GPSA(**config)
    check_start(golden, layer)

    x = golden.tensors["in/x"].requires_grad_()
    layer.load_state_dict(convert_state_dict(golden.state("init/")))
    golden.assert_close("attention at the start", layer.attention(x), "out/attn_at_init_with_init_pos_and_gate")
    golden.assert_close("distance at the start", layer.attention_distance(x), "out/mean_attention_distance_at_init")

    layer.load_state_dict(convert_state_dict(golden.state("sd/")))
    golden.assert_close("attention", layer.attention(x), "out/attn")
    golden.assert_close("distance", layer.attention_distance(x), "out/mean_attention_distance")
    y = layer(x)
    golden.assert_close("output", y, "out/y")
    (y * golden.tensors["in/w"]).sum().backward()
    golden.assert_close("gradient of x", x.grad, "grad/x")
    weights = dict(layer.named_parameters())
    for name in golden.tensors:
        if name.startswith("grad/") and name != "grad/x":
            golden.assert_close(f"gradient of {name[5:]}", weights[name[5:]].grad, name)
    side = math.isqrt(tokens)
    golden.assert_close("relative coordinates", relative_coordinates((side, side)), "out/rel_indices")


def check_start(golden: Golden, layer: GPSA) -> None:
    """Equal where the start is fixed; where it is drawn, of the same spread."""
    local = math.isqrt(layer.num_heads) ** 2
    start = layer.state_dict()
    if local < layer.num_heads:
        start["pos_proj.weight"][local:] = golden.tensors["init/pos_proj.weight"][local:]
    drawn = {"qk.weight", "proj.weight"}
    for name, value in golden.state("init/").items():
        if name not in drawn:
            golden.assert_close(f"start of {name}", start[name], f"init/{name}")
            continue
        golden.assert_equal(f"shape of {name}", start[name].shape, value.shape)
        assert abs(spread(start[name]) / spread(value) - 1) < 0.15, f"{name} starts with another deviation"
        assert abs(float(start[name].mean())) < 0.1 * spread(value)


def spread(values: Tensor) -> float:
    return float(values.std())


@golden_case("model")
def check_model(golden: Golden) -> None:
    """Every block's output, logits, loss, and the gradient of the images."""
    model = build_convit(golden.config).eval()
    golden.assert_equal("parameters", sum(p.numel() for p in model.parameters()), golden.json["parameters"])
    model.load_state_dict(convert_state_dict(golden.state("sd/")))
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images = golden.tensors["in/x"].requires_grad_()
    logits = model(images)
    for index, output in enumerate(outputs):
        golden.assert_close(f"block {index}", output, f"out/block{index}")
    golden.assert_close("logits", logits, "out/logits")
    loss = nn.functional.cross_entropy(logits, golden.tensors["in/y"])
    golden.assert_close("loss", loss, "out/loss")
    loss.backward()
    golden.assert_close("gradient of the images", images.grad, "grad/x")
