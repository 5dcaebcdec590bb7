"""CRATE against Ma-Lab-Berkeley/CRATE: the whole model layer by layer with its gradients, and the measure by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from headgate.evaluate import layerwise_report, projected_coding_rate
from headgate.methods.vision.crate.ista import ISTA
from headgate.methods.vision.crate.official import build_crate, convert_state_dict
from tests.golden.harness import Golden, golden_case


@golden_case("model")
def check_model(golden: Golden) -> None:
    """Branches and outputs of every layer, rates and zeros, logits, smoothed loss, gradients."""
    model = build_crate(golden.config)
    model.load_state_dict(convert_state_dict(golden.state("sd/")))
    golden.assert_equal("parameters", sum(p.numel() for p in model.parameters()), golden.json["parameters"])
    seen: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.layers):
        for name, module in ((f"mssa{index}", layer[0].fn), (f"ista{index}", layer[1])):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    images = golden.tensors["in/x"].requires_grad_()
    logits = model(images)
    loss = F.cross_entropy(logits, golden.tensors["in/y"], label_smoothing=0.1)
    loss.backward()
    for name, output in seen.items():
        golden.assert_close(name, output, f"out/{name}")
    golden.assert_close("logits", logits, "out/logits")
    golden.assert_close("loss", loss, "out/loss")
    golden.assert_close("gradient of x", images.grad, "grad/x")
    weights = dict(model.named_parameters())
    for name in golden.tensors:
        if name.startswith("grad/") and name != "grad/x":
            golden.assert_close(f"gradient of {name[5:]}", weights[name[5:]].grad, name)
    rtol, atol = golden.tolerances("coding_rate")
    report = layerwise_report(model, images.detach())
    for index, row in enumerate(report.rows.values()):
        golden.assert_close(f"rate {index}", row.coding_rate, f"out/coding_rate_mean{index}", rtol=rtol, atol=atol)
        golden.assert_close(
            f"its deviation {index}", row.coding_rate_std, f"out/coding_rate_std{index}", rtol=rtol, atol=atol
        )
        golden.assert_close(f"zeros {index}", row.zeros, f"out/zero_fraction{index}")


@golden_case("coding_rate_and_ista")
def check_parts(golden: Golden) -> None:
    """The measure with its gradient, and one ISTA step."""
    z = golden.tensors["in/z"].requires_grad_()
    rates = projected_coding_rate(z, golden.config["eps"])
    rates.mean().backward()
    golden.assert_close("mean rate", rates.mean(), "out/mean")
    golden.assert_close("deviation", rates.std(), "out/std")
    golden.assert_close("gradient of z", z.grad, "grad/z")
    state = golden.state("sd/ista.")
    ista = ISTA(state["weight"].shape[0], golden.config["ista_step"], golden.config["ista_lambda"])
    ista.load_state_dict(state)
    golden.assert_close("ISTA", ista(golden.tensors["in/x"]), "out/ista")
