"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headgate.methods.vision.vig.layer import BidirectionalGLA
from headgate.methods.vision.vig.vig import ViG
from headgate.methods.vision.vig.vig_h import ViGH
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_Draw = Callable[[torch.Generator], tuple[Any, ...]]


def _tokens(rows: int = 3, columns: int = 4, grid: Any = (3, 4)) -> _Draw:
    return lambda generator: (torch.randn(3, rows * columns, 24, generator=generator), grid)


def _images(height: int = 32, width: int = 48) -> _Draw:
    return lambda generator: (torch.randn(3, 3, height, width, generator=generator),)


_TOO_SMALL = BadInput("images of 8 pixels", _images(32, 8), ValueError, "at least 16 pixels")
_BAD_GRIDS = (
    BadInput("a class token", _tokens(1, 13), ValueError, r"grid must hold the 13 tokens.*got 3 rows of 4"),
    BadInput("a grid per image", _tokens(grid=[(3, 4), (4, 3), (3, 4)]), ValueError, "one pair"),
    BadInput("a grid of no columns", _tokens(grid=(12, 0)), ValueError, "12 rows of 0"),
)

CASES: dict[str, ContractCase] = {
    "BidirectionalGLA": ContractCase(lambda: BidirectionalGLA(24), _tokens(), bad_inputs=_BAD_GRIDS),
    "BidirectionalGLA-tiny": ContractCase(
        lambda: BidirectionalGLA(24, conv_act="silu", out_act="silu", clamp_min=-1.0, rotary="2d"), _tokens()
    ),
    "BidirectionalGLA-shared-gate": ContractCase(lambda: BidirectionalGLA(24, direction_gates=False), _tokens()),
    "BidirectionalGLA-forward-only": ContractCase(
        lambda: BidirectionalGLA(24, bidirectional=False, rotary="1d"), _tokens()
    ),
    "BidirectionalGLA-no-locality": ContractCase(lambda: BidirectionalGLA(24, locality=False, expand_v=0.5), _tokens()),
    "ViG": ContractCase(
        lambda: ViG(12, 2, 3, img_size=32, num_classes=5, mlp_dim=16, drop_path_rate=0.1),
        _images(),
        bad_inputs=(
            _TOO_SMALL,
            BadInput("images of 40 pixels", _images(40, 32), ValueError, "whole patches of 16 pixels.*pad_images"),
        ),
    ),
    "ViG-features": ContractCase(
        lambda: ViG(12, 2, 3, img_size=32, mlp_dim=16, pad_images=True, features_only=True, out_indices=(0,)),
        _images(24, 40),
        bad_inputs=(_TOO_SMALL,),
    ),
    "ViGH": ContractCase(
        lambda: ViGH(8, (1, 1, 1), (1, 2, 2), num_classes=5), _images(16, 28), bad_inputs=(_TOO_SMALL,)
    ),
    "ViGH-features": ContractCase(
        lambda: ViGH(8, (1, 1, 1), (1, 2, 2), features_only=True, out_indices=(0, 1)), _images(20, 16)
    ),
}
