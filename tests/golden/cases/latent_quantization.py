"""kylehkhsu/latent_quantization: the autoencoder with its losses and gradients, its groups of parameters, and InfoMEC."""

from __future__ import annotations

from headgate.evaluate import infomec
from headgate.methods.latent.latent_quantization import weight_decay_groups
from headgate.methods.latent.latent_quantization.official import (
    build_qlae,
    convert_state_dict,
    official_gradients,
    rename,
)
from tests.golden.harness import Golden, golden_case


@golden_case("qlae")
def check_qlae(golden: Golden) -> None:
    """Codes, logits, the three losses, the gradients of every parameter and of the images, and who decays."""
    model = build_qlae(golden.config)
    parameters = golden.state("param.")
    golden.assert_equal("names", sorted(parameters), sorted(golden.json["official_names_and_shapes"]))
    model.load_state_dict(convert_state_dict(parameters))
    tolerance = golden.json["tolerance"]
    x = golden.tensors["in.x"].requires_grad_()
    pre_z = model.encoder(x)
    output = model(x)
    latents = output.latents
    golden.assert_close("encoder's outputs", pre_z, "out.pre_z", of_max=tolerance["forward"])
    golden.assert_close("indices", latents.indices, "out.z_indices")
    golden.assert_close("codes", latents.quantized, "out.z_quantized", of_max=tolerance["forward"])
    golden.assert_close("codes passed on", latents.z_hat, "out.z_hat", of_max=tolerance["forward"])
    golden.assert_close("logits", output.logits, "out.x_hat_logits", of_max=tolerance["forward"])
    losses = model.losses(output, x.detach() if "grad.x" not in golden.tensors else x)
    for name, ours in (
        ("binary_cross_entropy", losses.reconstruction),
        ("quantization", losses.quantization),
        ("commitment", losses.commitment),
    ):
        golden.assert_close(f"{name} loss", ours, f"out.{name}_loss", rtol=0, atol=tolerance["loss"])
    golden.assert_close("loss", losses.loss.reshape(1), "out.loss", rtol=0, atol=tolerance["loss"])
    losses.loss.backward()
    for name, gradient in official_gradients(model, parameters).items():
        golden.assert_close(f"gradient of {name}", gradient, f"grad.{name}", of_max=tolerance["grad"])
    golden.assert_close("gradient of x", x.grad, "grad.x", of_max=tolerance["grad"])
    _check_groups(golden, model)


def _check_groups(golden: Golden, model: object) -> None:
    """Which parameters decay; the file also lists biases that the published blocks do not have."""
    named = {id(parameter): name for name, parameter in model.named_parameters()}  # type: ignore[attr-defined]
    groups = weight_decay_groups(model, 0.1)  # type: ignore[arg-type]
    ours = {
        named[id(parameter)]: "regularized" if group["weight_decay"] else "unregularized"
        for group in groups
        for parameter in group["params"]
    }
    partition = golden.json["optimizer_partition"]
    official = {"quantizer.codebook": partition["latent"]}
    official |= {rename(name): label for name, label in partition.items() if rename(name) in ours}
    golden.assert_equal("groups of parameters", ours, official)


@golden_case("infomec")
def check_infomec(golden: Golden) -> None:
    """Scores, normalised mutual information and the latents that are kept, of continuous and of discrete codes."""
    tolerance = golden.json["tolerance"]
    for kind, scores in golden.json["scalars"].items():
        ours = infomec(golden.tensors["sources"], golden.tensors[f"latents_{kind}"], discrete=kind == "discrete")
        golden.assert_close(f"{kind}: NMI", ours.nmi, f"nmi_{kind}", rtol=0, atol=tolerance[f"nmi_{kind}"])
        golden.assert_close(f"{kind}: kept", ours.active.astype("int32"), f"active_{kind}")
        for name, stored in scores.items():
            difference = abs(getattr(ours, name) - stored)
            golden.assert_equal(f"{kind}: {name} within {tolerance[name]:g}", difference <= tolerance[name], True)
