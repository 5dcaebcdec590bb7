"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headgate.methods.vision.crate.attention import MSSA
from headgate.methods.vision.crate.block import CRATEBlock
from headgate.methods.vision.crate.ista import ISTA, OvercompleteISTA
from headgate.methods.vision.crate.model import CRATE
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_Draw = Callable[[torch.Generator], tuple[Any, ...]]


def _tokens(dim: int = 12) -> _Draw:
    return lambda generator: (torch.randn(3, 7, dim, generator=generator),)


def _images(height: int = 8, width: int = 12, chans: int = 3) -> _Draw:
    return lambda generator: (torch.randn(3, chans, height, width, generator=generator),)


def _no_whole_patches(chans: int) -> BadInput:
    message = "images must be whole patches of 4 pixels.*10×12"
    return BadInput("images of 10 pixels", _images(10, chans=chans), ValueError, message)


CASES: dict[str, ContractCase] = {
    "MSSA": ContractCase(lambda: MSSA(12, 3), _tokens()),
    "MSSA-tied": ContractCase(lambda: MSSA(12, 2, head_dim=5, tie_output=True, dropout=0.1), _tokens()),
    "MSSA-one-head": ContractCase(lambda: MSSA(12, 1), _tokens()),
    "ISTA": ContractCase(lambda: ISTA(12), _tokens()),
    "ISTA-two-sided": ContractCase(lambda: ISTA(12, 0.05, 0.5, nonnegative=False), _tokens()),
    "OvercompleteISTA": ContractCase(lambda: OvercompleteISTA(12), _tokens()),
    "OvercompleteISTA-coupled": ContractCase(
        lambda: OvercompleteISTA(12, 2, steps=1, lambd=0.0, decoupled=False), _tokens()
    ),
    "CRATEBlock": ContractCase(lambda: CRATEBlock(12, 3), _tokens()),
    "CRATEBlock-alpha": ContractCase(lambda: CRATEBlock(12, 3, skip=True, expansion=2), _tokens()),
    "CRATE": ContractCase(lambda: CRATE(8, 4, 5, 12, 2, 3, dropout=0.1), _images(), bad_inputs=(_no_whole_patches(3),)),
    "CRATE-mean": ContractCase(
        lambda: CRATE((8, 12), 4, 0, 12, 2, 3, pool="mean", in_chans=1),
        _images(chans=1),
        bad_inputs=(_no_whole_patches(1),),
    ),
}
