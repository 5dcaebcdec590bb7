"""Diffusion features against soumik-kanad/diffssl: noising, every block of the U-Net at every time, and the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from headgate.methods.generative.diffusion_classification import ADMUNet
from headgate.methods.generative.diffusion_classification.official import build_attention, build_linear, build_unet
from headgate.nn.diffusion import VP, DiffusionFeatures
from tests.golden.harness import Golden, golden_case


@golden_case("gd_features")
def check_features(golden: Golden) -> None:
    """x_t, output and blocks of the network; features as users read them; logits of both heads."""
    config = golden.config
    shapes: Mapping[str, Sequence[int]] = golden.json["parameters"]
    state = {
        name: ruled_weights(shape, index, golden.json["weight_seed"], name)
        for index, (name, shape) in enumerate(sorted(shapes.items()))
    }
    unet = ADMUNet.from_guided_diffusion(state, config["size"], config["head_ch"])
    named = build_unet(
        {
            "image_size": config["size"],
            "num_channels": config["mc"],
            "num_res_blocks": config["nrb"],
            "channel_mult": config["mult"],
            "attention_resolutions": [config["size"] // scale for scale in config["attn_ds"]],
            "num_head_channels": config["head_ch"],
            "learn_sigma": True,
            "resblock_updown": True,
        }
    )
    golden.assert_equal("sizes", shapes_of(unet), shapes_of(named))
    golden.assert_equal("blocks", unet.num_blocks, golden.json["n_blocks"])
    numbered = enumerate(unet.block_channels, 1)
    golden.assert_equal("widths", {str(b): width for b, width in numbered}, golden.json["block_channels"])

    path = VP.linear()
    x0, noise = golden.tensors["in/x"], golden.tensors["in/eps"]
    times = golden.tensors["in/t_list"].tolist()
    blocks = list(range(1, unet.num_blocks + 1))
    with torch.no_grad():
        for time in times:
            t = torch.full(x0.shape[:1], time)
            x_t = path.add_noise(x0, noise, t)
            golden.assert_close(f"x at {time}", x_t, f"out/x_t_{time}")
            golden.assert_close(f"output at {time}", unet(x_t, t), f"out/model_output_{time}")

    features = DiffusionFeatures(unet, path, blocks, times)(x0, noise)
    sizes = {}
    for (block, time), maps in features.items():
        golden.assert_close(f"block {block} at {time}", maps.mean(dim=(2, 3)), f"out/block_{block:02d}_mean_{time}")
        stored = f"out/block_{block:02d}_first_pixels_{time}"
        pixels = maps.flatten(2)[:, :, : golden.tensors[stored].shape[2]]
        golden.assert_close(f"pixels of block {block} at {time}", pixels, stored)
        sizes[str(block)] = maps.shape[2]
    golden.assert_equal("sides", sizes, golden.json["block_sizes"])

    golden.assert_close("map that the head reads", features[config["block"], times[0]], "out/head_input_block")
    linear = build_linear(golden.state("sd_linear/"), config["lin_pool"])
    with torch.no_grad():
        logits = linear(golden.tensors["out/head_input_block"])
    golden.assert_close("logits of the pooled map", logits, "out/linear_logits")

    read = [[features[block, time] for block in config["fusion_blocks"]] for time in times]
    for time, maps in zip(times, read, strict=True):
        for block, one in zip(config["fusion_blocks"], maps, strict=True):
            golden.assert_close(f"block {block} as fused at {time}", one, f"out/fusion_input_block_{block:02d}_{time}")
    attention = build_attention(golden.state("sd_attention/"), len(times), config["att_heads"], config["fusion_blocks"])
    with torch.no_grad():
        golden.assert_close("logits of attention", attention(read), "out/attention_logits")


def shapes_of(model: ADMUNet) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def ruled_weights(shape: Sequence[int], index: int, seed: int, name: str) -> Tensor:
    """The integer rule of the file's field ``weights``."""
    mask, multiplier = np.uint64(0xFFFFFFFF), np.uint64(0x45D9F3B)
    count = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
    x = (count * np.uint64(2654435761) + np.uint64(index * 40503 + seed * 97)) & mask
    for _ in range(2):
        x ^= x >> np.uint64(16)
        x = (x * multiplier) & mask
    x ^= x >> np.uint64(16)
    share = x.astype(np.float64) / 2**32
    scale, offset = 0.1, 0.0
    if len(shape) >= 2:
        scale = float(np.sqrt(3 / np.prod(shape[1:])))
    elif name.endswith(".weight"):
        scale, offset = 0.2, 1.0
    return torch.from_numpy(((2 * share - 1) * scale + offset).reshape(shape)).float()
