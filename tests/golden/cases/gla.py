"""Gated linear attention against flash-linear-attention and its first release: the recurrence and both layers."""

from __future__ import annotations

from headgate.methods.sequence.gla import GLACache, gla
from headgate.methods.sequence.gla.official import build_layer, load_layer_state_dict, rename
from tests.golden.harness import Golden, golden_case

MODES = ("auto", "chunk", "recurrent", "parallel")


@golden_case("op")
def check_op(golden: Golden) -> None:
    """Outputs, final state and all gradients, in every mode; the file's tolerances are shares of the largest value."""
    for mode in MODES:
        inputs = {name: golden.tensors[name].requires_grad_() for name in ("q", "k", "v", "gk")}
        state = golden.tensors["h0"].requires_grad_() if "h0" in golden.tensors else None
        o, final = gla(**inputs, initial_state=state, return_state=True, mode=mode)
        golden.assert_close(f"{mode}: output", o, "o", of_max=2e-5)
        golden.assert_close(f"{mode}: final state", final, "ht", of_max=2e-5)
        assert final is not None
        ((o * golden.tensors["do"]).sum() + (final * golden.tensors["dht"]).sum()).backward()
        for name, tensor in inputs.items():
            golden.assert_close(f"{mode}: gradient of {name}", tensor.grad, f"d{name}", of_max=1e-4)
        if state is not None:
            golden.assert_close(f"{mode}: gradient of the initial state", state.grad, "dh0", of_max=1e-4)


@golden_case("layer")
def check_layer(golden: Golden) -> None:
    """Output, final state where it is stored, and the gradients of the input and of every weight."""
    layer = build_layer(golden.config)
    weights = golden.state("state.")
    load_layer_state_dict(layer, weights)
    golden.assert_equal("names", sorted(weights), sorted(golden.json["official_parameters"]))
    x = golden.tensors["in.x"].requires_grad_()
    cache = GLACache()
    y = layer(x, cache=cache)
    golden.assert_close("output", y, "out.y")
    if "out.state" in golden.tensors:
        state = cache[0]
        assert state is not None
        golden.assert_close("final state", state.memory, "out.state")
    y.backward(golden.tensors["in.do"])
    golden.assert_close("gradient of x", x.grad, "grad.x")
    ours = dict(layer.named_parameters())
    for name in weights:
        if f"grad.{name}" in golden.tensors:
            gradient = ours[rename(name, layer.variant)].grad
            if gradient is not None and gradient.dim() < golden.tensors[f"grad.{name}"].dim():
                gradient = gradient.unsqueeze(1)  # a convolution's axis for its one input channel
            golden.assert_close(f"gradient of {name}", gradient, f"grad.{name}")


golden_case("first_release_layer")(check_layer)
