"""Published names and weights, and the layer of vector-quantize-pytorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headgate.methods.latent.latent_quantization import LatentQuantizer, image_ql_infowgan
from headgate.methods.latent.latent_quantization.official import (
    build_qlae,
    convert_lucidrains,
    convert_state_dict,
    official_gradients,
)

CONFIG: dict[str, Any] = {
    "img": 8, "channels": 2, "num_latents": 3, "num_values_per_latent": [2, 4, 3], "input_channels": 5,
    "dense": [7, 6], "enc_widths": [4], "enc_k": [4], "enc_s": [2], "enc_p": [1],
    "dec_widths": [4], "dec_k": [4], "dec_s": [2], "dec_p": [1],
    "lambdas": {"binary_cross_entropy": 2.0, "quantization": 0.1, "commitment": 0.2},
}  # fmt: skip

ENCODER = {
    "encoder.conv.0.0.weight": (4, 2, 4, 4), "encoder.conv.0.1.weight": (4,), "encoder.conv.0.1.bias": (4,),
    "encoder.dense.0.0.weight": (7, 64), "encoder.dense.0.0.bias": (7,),
    "encoder.dense.1.0.weight": (6, 7), "encoder.dense.1.0.bias": (6,),
    "encoder.head.weight": (3, 6), "encoder.head.bias": (3,),
    "latent._values_per_latent.0": (2,), "latent._values_per_latent.1": (4,), "latent._values_per_latent.2": (3,),
}  # fmt: skip
STYLE = {
    "decoder.input_map": (5, 4, 4),
    "decoder.dense.0.0.weight": (7, 3), "decoder.dense.0.0.bias": (7,),
    "decoder.dense.1.0.weight": (6, 7), "decoder.dense.1.0.bias": (6,),
    "decoder.style_conv_transpose.blocks.0.forward_block.0.weight": (5, 4, 4, 4),
    "decoder.style_conv_transpose.blocks.0.conditioning.0.weight": (8, 6),
    "decoder.style_conv_transpose.blocks.0.conditioning.0.bias": (8,),
    "decoder.conv.0.weight": (2, 4, 3, 3),
}  # fmt: skip
PLAIN = {
    "decoder.0.0.0.weight": (7, 3), "decoder.0.0.0.bias": (7,), "decoder.0.1.0.weight": (6, 7), "decoder.0.1.0.bias": (6,),
    "decoder.1.0.weight": (80, 6), "decoder.1.0.bias": (80,),
    "decoder.3.0.0.weight": (5, 4, 4, 4), "decoder.3.0.1.weight": (4,), "decoder.3.0.1.bias": (4,),
    "decoder.4.0.weight": (2, 4, 1, 1),
}  # fmt: skip


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(("kind", "decoder"), [("style", STYLE), ("conv", PLAIN)])
def test_every_published_name_has_its_place(kind: str, decoder: dict[str, tuple[int, ...]]) -> None:
    state = weights({**ENCODER, **decoder})
    model = build_qlae({**CONFIG, "decoder": kind})
    model.load_state_dict(convert_state_dict(state))
    for latent, values in enumerate(model.quantizer.values):
        assert torch.equal(values, state[f"latent._values_per_latent.{latent}"])
    name = next(name for name in decoder if name.endswith(("forward_block.0.weight", "3.0.0.weight")))
    transposed = model.decoder.blocks[0].conv.weight if kind == "style" else model.decoder.blocks[0][0].weight
    assert torch.equal(transposed, state[name])
    x = torch.rand(2, 2, 8, 8)
    losses = model.training_loss(x)
    expected = 2.0 * losses.reconstruction + 0.1 * losses.quantization + 0.2 * losses.commitment
    torch.testing.assert_close(losses.loss, expected.mean())
    losses.loss.backward()
    gradients = official_gradients(model, state)
    assert {key: value.shape for key, value in gradients.items()} == {key: value.shape for key, value in state.items()}


def test_equinox_s_layout_is_turned_into_pytorch_s() -> None:
    state = weights({**ENCODER, **STYLE})
    name = "decoder.style_conv_transpose.blocks.0.forward_block.0.weight"
    turned = {**state, name: torch.empty(4, 5, 4, 4)}
    for out in range(4):
        for row in range(4):
            for column in range(4):
                turned[name][out, :, row, column] = state[name][:, out, 3 - row, 3 - column]
    ours, same = convert_state_dict(turned, layout="equinox"), convert_state_dict(state)
    assert all(torch.equal(ours[key], same[key]) for key in same)
    with pytest.raises(ValueError, match="layout must be 'torch' or 'equinox', got 'jax'"):
        convert_state_dict(state, layout="jax")  # type: ignore[arg-type]


def test_a_published_gan_s_names_have_their_places() -> None:
    model = image_ql_infowgan(3, 4, 16, size="small")
    official = {}
    for name, tensor in model.state_dict().items():
        if name == "quantizer.codebook":
            official |= {f"latent._values_per_latent.{row}": values for row, values in enumerate(tensor + 1)}
            continue
        for ours, theirs in (
            ("encoder.", "encoder.base."),
            ("critic.", "encoder.critic."),
            ("decoder.conv.", "generator.conv.0."),
        ):
            if name.startswith(ours):
                official[name.replace(ours, theirs, 1)] = tensor + 1
                break
        else:
            block = name.replace("decoder.blocks.", "generator.style_conv_transpose.blocks.")
            block = block.replace(".conv.", ".forward_block.0.").replace(".style.", ".conditioning.0.")
            official[block.replace("decoder.", "generator.")] = tensor + 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(convert_state_dict(official))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 1)


def test_one_codebook_for_all_latents_loads_too() -> None:
    state = {"latent.values": torch.tensor([-0.3, 0.1, 0.2])}
    quantizer = LatentQuantizer(4, 3, shared=True)
    quantizer.load_state_dict({"codebook": convert_state_dict(state)["quantizer.codebook"]})
    assert quantizer(torch.tensor([[0.14, -1.0, 1.0, 0.0]])).indices.tolist() == [[1, 0, 2, 1]]


def test_missing_codebooks_are_named() -> None:
    state = weights({**ENCODER, **STYLE})
    del state["latent._values_per_latent.1"]
    with pytest.raises(ValueError, match=r"without a gap, got numbers \[0, 2\]"):
        convert_state_dict(state)
    with pytest.raises(ValueError, match=r"values_per_latent.0 and on without a gap, got numbers \[\]"):
        convert_lucidrains({})


def test_the_other_library_s_layer_keeps_its_values_and_projections() -> None:
    values = [torch.tensor([-0.5, 0.0]), torch.tensor([-0.5, 0.1, 0.5])]
    state = {f"values_per_latent.{index}": tensor for index, tensor in enumerate(values)}
    plain = convert_lucidrains(state)
    z = torch.tensor([[0.1, 0.2], [-0.4, 0.4]])
    assert plain.quantizer(plain.project_in(z)).quantized.tolist() == [[0.0, values[1][1].item()], [-0.5, 0.5]]
    assert plain.quantizer.levels == (2, 3)
    projections = weights(
        {"project_in.weight": (4, 6), "project_in.bias": (4,), "project_out.weight": (6, 4), "project_out.bias": (6,)}
    )
    projected = convert_lucidrains({**state, **projections})
    assert projected.quantizer.levels == (2, 3, 2, 3)
    x = torch.randn(5, 6)
    out = projected.project_out(projected.quantizer(projected.project_in(x)).z_hat)
    inner = x @ projections["project_in.weight"].T + projections["project_in.bias"]
    nearest = [(inner[:, j : j + 1] - values[j % 2]).abs().argmin(dim=1) for j in range(4)]
    snapped = torch.stack([values[j % 2][nearest[j]] for j in range(4)], dim=1)
    torch.testing.assert_close(
        out, snapped @ projections["project_out.weight"].T + projections["project_out.bias"], rtol=1e-4, atol=1e-5
    )
    assert convert_lucidrains(state, num_codebooks=2).quantizer.num_latents == 4
    wrong = {**projections, "project_in.weight": torch.zeros(5, 6), "project_in.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match="project_in must have a multiple of 2 inner features, got 5"):
        convert_lucidrains({**state, **wrong})
