"""ViG against hustvl/ViG: the layer with its gradients, the plain and the hierarchical backbone, in both modes."""

from __future__ import annotations

import torch

from headgate.methods.vision.vig.official import build_layer, build_vig, build_vig_h, convert_state_dict
from tests.golden.harness import Golden, golden_case


@golden_case("bigla_layer")
def check_layer(golden: Golden) -> None:
    """Output of training and of evaluation, and the gradients of the input and of every weight."""
    layer = build_layer(golden.config)
    layer.load_state_dict(convert_state_dict(golden.state("state.")))
    grid = tuple(golden.json["patch_resolution"])
    x = golden.tensors["in.x"].requires_grad_()
    y = layer.train()(x, grid)
    golden.assert_close("output in training", y, "out.y_train")
    y.backward(golden.tensors["in.do"])
    golden.assert_close("gradient of x", x.grad, "grad.x")
    weights = dict(layer.named_parameters())
    for name in golden.json["official_parameters"]:
        (ours,) = convert_state_dict({name: golden.tensors[f"state.{name}"]})
        golden.assert_close(f"gradient of {name}", weights[ours].grad, f"grad.{name}")
    with torch.no_grad():
        golden.assert_close("output in evaluation", layer.eval()(x, grid), "out.y_eval")


@golden_case("vig_model")
def check_plain(golden: Golden) -> None:
    """Logits in both modes, and of an image of another size."""
    # The file was made with drop path off.
    model = build_vig({"drop_path_rate": 0.0, **golden.config})
    model.load_state_dict(convert_state_dict(golden.state("state.")))
    images = golden.tensors["in.x"]
    with torch.no_grad():
        golden.assert_close("logits in training", model.train()(images), "out.logits_train")
        golden.assert_close("logits in evaluation", model.eval()(images), "out.logits_eval")
        if "in.x_other_size" in golden.tensors:
            logits = model(golden.tensors["in.x_other_size"])
            golden.assert_close("logits of another size", logits, "out.logits_other_size_eval")


@golden_case("vig_h_model")
def check_hierarchical(golden: Golden) -> None:
    """Logits in both modes."""
    model = build_vig_h({"drop_path_rate": 0.0, **golden.config})
    model.load_state_dict(convert_state_dict(golden.state("state.")))
    images = golden.tensors["in.x"]
    with torch.no_grad():
        golden.assert_close("logits in training", model.train()(images), "out.logits_train")
        golden.assert_close("logits in evaluation", model.eval()(images), "out.logits_eval")
