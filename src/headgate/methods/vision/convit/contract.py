"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headgate.methods.vision.convit.attention import GPSA, MHSA
from headgate.methods.vision.convit.convit import ConViT
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_Draw = Callable[[torch.Generator], tuple[Any, ...]]


def _tokens(count: int = 16, *grid: tuple[int, int], dim: int = 16) -> _Draw:
    return lambda generator: (torch.randn(3, count, dim, generator=generator), *grid)


def _images(height: int = 16, width: int = 16) -> _Draw:
    return lambda generator: (torch.randn(3, 3, height, width, generator=generator),)


def _model(**options: Any) -> ConViT:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}
    return ConViT(**{**sizes, "num_classes": 5, **options})


CASES: dict[str, ContractCase] = {
    "GPSA": ContractCase(
        lambda: GPSA(16, 4),
        _tokens(),
        bad_inputs=(
            BadInput("a class token", _tokens(17), ValueError, "square number of tokens, got 17.*class token"),
            BadInput("a grid that does not fit", _tokens(16, (3, 5)), ValueError, "hold the 16 tokens.*3 rows of 5"),
            BadInput("no tokens", _tokens(0), ValueError, "square number of tokens, got 0"),
        ),
    ),
    "GPSA-oblong": ContractCase(
        lambda: GPSA(16, 4, qkv_bias=True, locality_strength=0.5, grid_size=(3, 4)),
        _tokens(12),
        bad_inputs=(BadInput("a class token", _tokens(13), ValueError, "hold the 13 tokens.*3 rows of 4"),),
    ),
    "GPSA-no-locality": ContractCase(lambda: GPSA(15, 5, local_init=False), _tokens(12, (4, 3), dim=15)),
    "GPSA-dropout": ContractCase(lambda: GPSA(16, 4, attn_drop=0.2, proj_drop=0.1), _tokens()),
    "GPSA-branch-dropout": ContractCase(lambda: GPSA(16, 4, attn_drop=0.2, branch_dropout=True), _tokens()),
    "MHSA": ContractCase(lambda: MHSA(16, 4, qkv_bias=True, attn_drop=0.1), _tokens(7)),
    "ConViT": ContractCase(
        lambda: _model(drop_path_rate=0.1),
        _images(),
        bad_inputs=(BadInput("images of 18 pixels", _images(18), ValueError, "whole patches of 4 pixels.*18×16"),),
    ),
    "ConViT-other-size": ContractCase(lambda: _model(global_pool="avg", drop_rate=0.1), _images(8, 12)),
    "ConViT-deit": ContractCase(lambda: _model(local_up_to_layer=0, use_pos_embed=False, qkv_bias=True), _images()),
}
