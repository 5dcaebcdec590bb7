"""RITUAL against sangminwoo/RITUAL: fused and masked scores of its three modes, the tokens sampled from them, VCD's noise."""

from __future__ import annotations

import torch

from headgate.methods.steering.ritual import fuse_logits, noise_image, view_weights
from headgate.methods.steering.ritual.official import MODES, official_plausibility, official_weight
from tests.golden.harness import Golden, golden_case

SECOND = {"ritual": "logits_transformed", "vcd": "logits_distorted", "m3id": "logits_distorted"}


@golden_case("decode")
def check_decode(golden: Golden) -> None:
    """Every step's scores and sampled token (softmax, then multinomial, from one seeded stream), and three noised images."""
    config = golden.config
    base = golden.tensors["logits"]
    for mode in MODES:
        if f"{mode}.scores" not in golden.tensors:
            continue
        weight, beta = official_weight(mode, config), official_plausibility(config)
        view = golden.tensors[SECOND[mode]]
        scores = torch.stack(
            [
                fuse_logits(base[:, step], [view[:, step]], view_weights([weight], step), beta)
                for step in range(base.shape[1])
            ],
            dim=1,
        )
        golden.assert_close(f"{mode}: scores", scores, f"{mode}.scores")
        stream = torch.Generator().manual_seed(config["seed"])
        tokens = [
            torch.multinomial((step / config["temperature"]).softmax(dim=-1), 1, generator=stream)
            for step in scores.unbind(dim=1)
        ]
        golden.assert_close(f"{mode}: tokens", torch.cat(tokens, dim=1), f"{mode}.sampled")
    for name in golden.tensors:
        if name.startswith("noise.out_"):
            step = int(name.removeprefix("noise.out_"))
            noised = noise_image(golden.tensors["noise.image"], step, noise=golden.tensors["noise.eps"])
            golden.assert_close(f"noise at step {step}", noised, name)
