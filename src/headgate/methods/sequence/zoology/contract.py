"""The modules of this room, put through the contract suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headgate.methods.sequence.zoology.base_conv import BaseConv
from headgate.methods.sequence.zoology.based import Based
from headgate.methods.sequence.zoology.h3 import H3
from headgate.methods.sequence.zoology.hybrid import HybridMixer
from headgate.methods.sequence.zoology.hyena import Hyena
from headgate.methods.sequence.zoology.loss import RecallLoss
from headgate.methods.sequence.zoology.models import zoology_model
from headgate.methods.sequence.zoology.retention import Retention
from headgate.methods.sequence.zoology.rwkv import RWKVChannelMix, RWKVTimeMix
from headgate.methods.sequence.zoology.sparse_lookups import SparseLookups
from headgate.nn import MixerLM
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]


def _hidden(length: int = 9, dim: int = 8) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda generator: (torch.randn(4, length, dim, generator=generator),)


def _tokens(generator: torch.Generator) -> tuple[Any, ...]:
    return (torch.randint(11, (4, 8), generator=generator),)


def _hidden_and_tokens(generator: torch.Generator) -> tuple[Any, ...]:
    return torch.randn(4, 9, 8, generator=generator), torch.randint(5, (4, 9), generator=generator)


def _logits_and_labels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(6, (4, 5), generator=generator)
    asked = torch.rand(4, 5, generator=generator) < 0.5
    return torch.randn(4, 5, 6, generator=generator), torch.where(asked, labels, -100)


_TOO_LONG = BadInput("longer than max_length", _hidden(length=10), ValueError, "max_length=9")

CASES: dict[str, ContractCase] = {
    "BaseConv": ContractCase(lambda: BaseConv(8, 9), _hidden()),
    "BaseConv-implicit": ContractCase(lambda: BaseConv(8, 9, -1), _hidden(), bad_inputs=(_TOO_LONG,)),
    "BaseConv-explicit": ContractCase(
        lambda: BaseConv(8, 9, -1, implicit=False, activation=True), _hidden(), bad_inputs=(_TOO_LONG,)
    ),
    "Hyena": ContractCase(lambda: Hyena(8, 9, filter_dim=16), _hidden(), bad_inputs=(_TOO_LONG,)),
    "H3": ContractCase(lambda: H3(8, 8, 2, 9), _hidden(), bad_inputs=(_TOO_LONG,)),
    "RWKVTimeMix": ContractCase(lambda: RWKVTimeMix(8, 1, 4), _hidden()),
    "RWKVChannelMix": ContractCase(lambda: RWKVChannelMix(8, 1, 4), _hidden()),
    "Retention": ContractCase(lambda: Retention(8, 2), _hidden()),
    "Based": ContractCase(lambda: Based(8, 4, 4, 2), _hidden()),
    "Based-chunked": ContractCase(lambda: Based(8, 2, 4, rotary_base=100.0, chunk_size=4), _hidden()),
    "SparseLookups": ContractCase(lambda: SparseLookups(8, 2), _hidden()),
    "SparseLookups-sma-prefix": ContractCase(
        lambda: SparseLookups(8, 2, selector="sma", selection="prefix"), _hidden()
    ),
    "SparseLookups-softmax": ContractCase(lambda: SparseLookups(8, selector="softmax", num_lookups=2), _hidden()),
    "SparseLookups-threshold": ContractCase(lambda: SparseLookups(8, 2, selection="threshold"), _hidden()),
    "SparseLookups-repeat": ContractCase(
        lambda: SparseLookups(8, 2, selector="repeat"),
        _hidden_and_tokens,
        bad_inputs=(BadInput("no tokens", _hidden(), TypeError, "tokens must be given"),),
    ),
    "HybridMixer": ContractCase(lambda: HybridMixer([lambda: BaseConv(8, 9), lambda: Based(8)], 3), _hidden()),
    "MixerLM": ContractCase(
        lambda: MixerLM(
            8,
            2,
            11,
            mixer=lambda layer: HybridMixer([lambda: BaseConv(8, 8), lambda: SparseLookups(8)], layer),
            state_mixer=lambda layer: RWKVChannelMix(8, layer, 2),
            max_positions=8,
        ),
        _tokens,
        bad_inputs=(
            BadInput("too long", lambda g: (torch.randint(11, (4, 9), generator=g),), ValueError, "max_positions=8"),
            BadInput("floating", lambda g: (torch.rand(4, 8, generator=g),), TypeError, "int64"),
        ),
    ),
    "zoology_model": ContractCase(lambda: zoology_model("attention", 8, 8, 11, mlp_ratio=2), _tokens),
    "RecallLoss": ContractCase(
        RecallLoss,
        _logits_and_labels,
        batch_independent=False,
        bad_inputs=(
            BadInput(
                "labels of another length",
                lambda g: (_logits_and_labels(g)[0], _logits_and_labels(g)[1][:, :4]),
                ValueError,
                "labels must have",
            ),
        ),
    ),
}
