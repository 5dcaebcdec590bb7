"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headgate.methods.generative.diffusion_classification.attention import AttentionHead, DifFormer
from headgate.methods.generative.diffusion_classification.difffeed import DifFeed
from headgate.methods.generative.diffusion_classification.heads import ConvHead, LinearProbe, MLPHead
from headgate.methods.generative.diffusion_classification.unet import ADMUNet
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_Draw = Callable[[torch.Generator], tuple[Any, ...]]


def _maps(channels: int = 6, side: int = 8) -> _Draw:
    return lambda generator: (torch.randn(3, channels, side, side, generator=generator),)


def _noisy(side: int = 8, labels: bool = False) -> _Draw:
    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        images = torch.randn(3, 3, side, side, generator=generator)
        times = torch.randint(1000, (3,), generator=generator)
        told = (torch.randint(4, (3,), generator=generator),) if labels else ()
        return images, times, *told

    return draw


def _several(times: int = 2) -> _Draw:
    def draw(generator: torch.Generator) -> tuple[Any, ...]:
        shapes = ((3, 6, 8, 8), (3, 4, 4, 4))
        return ([[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(times)],)

    return draw


def _unet(**options: Any) -> ADMUNet:
    return ADMUNet(8, 3, 32, 6, 1, (2,), (1, 2), num_head_channels=32, **options)


_SMALL_MAPS = BadInput("maps of one cell", _maps(side=1), ValueError, "pool=2")

CASES: dict[str, ContractCase] = {
    "ADMUNet": ContractCase(
        _unet,
        _noisy(),
        bad_inputs=(
            BadInput("a side of 9", _noisy(9), ValueError, "divisible"),
            BadInput("labels", _noisy(labels=True), ValueError, "unconditional"),
        ),
    ),
    "ADMUNet-classes": ContractCase(
        lambda: _unet(
            num_classes=4,
            use_scale_shift_norm=False,
            resblock_updown=False,
            use_new_attention_order=True,
            dropout=0.1,
        ),
        _noisy(labels=True),
        bad_inputs=(BadInput("no labels", _noisy(), ValueError, "class-conditional"),),
    ),
    "LinearProbe": ContractCase(lambda: LinearProbe(6, 5), _maps(), bad_inputs=(_SMALL_MAPS,)),
    "LinearProbe-repeated cells": ContractCase(lambda: LinearProbe(6, 5, official_quirks=True), _maps(side=1)),
    "MLPHead": ContractCase(lambda: MLPHead(6, 5, (7, 8), pool=1), _maps()),
    "ConvHead": ContractCase(lambda: ConvHead(6, 5, (8, 7)), _maps()),
    "AttentionHead": ContractCase(
        lambda: AttentionHead(6, 5, 8, 2, 2, grid=4),
        _maps(),
        bad_inputs=(BadInput("maps below the grid", _maps(side=3), ValueError, "grid=4"),),
    ),
    "AttentionHead-batch norm": ContractCase(lambda: AttentionHead(6, 5, 8, 1, 2, norm="batch", grid=8), _maps()),
    "DifFormer": ContractCase(
        lambda: DifFormer((6, 4), 5, 2, 8, 1, 2, grids=4),
        _several(),
        bad_inputs=(BadInput("one time of two", _several(1), ValueError, "2 times of 2 blocks"),),
    ),
    "DifFeed": ContractCase(lambda: DifFeed(_unet(), LinearProbe(64, 5), (7, 8), read_block=6), _noisy()),
}
