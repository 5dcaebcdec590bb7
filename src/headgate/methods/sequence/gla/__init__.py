"""Gated linear attention: a memory of constant size whose rows fade by gates that the tokens themselves set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headgate.methods.sequence.gla.block import GLABlock
from headgate.methods.sequence.gla.cache import GLACache
from headgate.methods.sequence.gla.functional import gla
from headgate.methods.sequence.gla.layer import GatedLinearAttention
from headgate.methods.sequence.gla.model import GLAModel

if TYPE_CHECKING:
    from headgate.methods.sequence.gla.language_model import GLAConfig, GLAForCausalLM, gla_language_model

__all__ = [
    "GLABlock",
    "GLACache",
    "GLAConfig",
    "GLAForCausalLM",
    "GLAModel",
    "GatedLinearAttention",
    "gla",
    "gla_language_model",
]

_NEED_TRANSFORMERS = ("GLAConfig", "GLAForCausalLM", "gla_language_model")


def __getattr__(name: str) -> Any:
    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from headgate.methods.sequence.gla import language_model

    return getattr(language_model, name)
