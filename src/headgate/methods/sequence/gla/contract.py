"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from headgate.methods.sequence.gla import GatedLinearAttention, GLABlock, GLAForCausalLM, GLAModel, gla_language_model
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]


def _hidden(generator: Generator) -> tuple[Tensor]:
    return (torch.randn(4, 9, 8, generator=generator),)


def _mask(generator: Generator) -> Tensor:
    mask = torch.rand(4, 9, generator=generator) < 0.7
    mask[:, 4] = True
    return mask.long()


def _padded(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 9, 8, generator=generator), _mask(generator)


def _tokens(generator: Generator) -> tuple[Tensor]:
    return (torch.randint(11, (4, 9), generator=generator),)


def _padded_tokens(generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (4, 9), generator=generator), _mask(generator)


def _language_model(depth: int = 2, **config: Any) -> GLAForCausalLM:
    # The cache is no tensor, so the suite cannot compare it; the room's tests do.
    sizes = {"hidden_size": 8, "num_hidden_layers": depth, "num_heads": 2, "intermediate_size": 12, "vocab_size": 11}
    return gla_language_model(**sizes, use_cache=False, **config)


_PAIRS = BadInput(
    "a mask of pairs of tokens",
    lambda g: (*_hidden(g), torch.ones(4, 9, 9, dtype=torch.long)),
    ValueError,
    r"padding mask of shape \(batch, length\)",
)
_TWO = BadInput(
    "a mask with a two", lambda g: (*_hidden(g), torch.full((4, 9), 2)), ValueError, "1 at real tokens, got 2"
)
_NO_TOKENS = BadInput("no tokens", lambda g: (torch.zeros(4, 0, 8),), ValueError, "at least one token")
_TWO_FORMS = BadInput(
    "a mask and boundaries",
    lambda g: (*_padded(g), None, torch.tensor([0, 9])),
    ValueError,
    "must not both be given",
)
_BATCH_PACKED = BadInput(
    "boundaries in a batch of four", lambda g: (*_hidden(g), None, None, torch.tensor([0, 9])), ValueError, "batch=4"
)

CASES: dict[str, ContractCase] = {
    "GatedLinearAttention": ContractCase(
        lambda: GatedLinearAttention(8, 2), _hidden, bad_inputs=(_PAIRS, _TWO, _NO_TOKENS, _TWO_FORMS, _BATCH_PACKED)
    ),
    "GatedLinearAttention-first_release": ContractCase(
        lambda: GatedLinearAttention(8, 2, variant="first_release"), _hidden
    ),
    "GatedLinearAttention-options": ContractCase(
        lambda: GatedLinearAttention(
            8, 4, expand_k=1, expand_v=2, num_kv_heads=2, feature_map="sqrelu", use_short_conv=True, conv_bias=True,
            use_output_gate=False, clamp_min=-1.0, elementwise_affine=False,
        ),
        _hidden,
    ),
    "GatedLinearAttention-padded": ContractCase(
        lambda: GatedLinearAttention(8, 2, use_short_conv=True), _padded
    ),
    "GLABlock": ContractCase(lambda: GLABlock(8, 2, 12), _hidden, bad_inputs=(_PAIRS,)),
    "GLAModel": ContractCase(lambda: GLAModel(11, 8, 2, 2, 12), _tokens),
    "GLAModel-padded": ContractCase(lambda: GLAModel(11, 8, 1, 2, 12), _padded_tokens),
    "GLAForCausalLM": ContractCase(_language_model, _tokens),
    "GLAForCausalLM-tied-padded": ContractCase(
        lambda: _language_model(depth=1, tie_word_embeddings=True, variant="first_release"), _padded_tokens
    ),
}  # fmt: skip
