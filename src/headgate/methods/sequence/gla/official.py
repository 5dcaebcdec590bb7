"""Layers and models of the published code, and their weights under our names.

Two layers are called official, and each one's weights would run in the other without a word and give wrong results:
flash-linear-attention's (``gk_proj``, ``o_proj``) and the first release's (``k_gate``, ``out_proj``;
berlino/gated_linear_attention). Every function here tells them apart by their names and refuses a mix-up.

    layer = build_layer({"hidden_size": 1024, "num_heads": 4})
    load_layer_state_dict(layer, torch.load("layer.pth", weights_only=True))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headgate.methods.sequence.gla.layer import GatedLinearAttention, Variant

__all__ = [
    "KEY_PATTERNS",
    "build_layer",
    "convert_layer_state_dict",
    "convert_model_state_dict",
    "find_variant",
    "infer_config",
    "load_layer_state_dict",
    "rename",
]

KEY_PATTERNS: Mapping[str, str] = {
    r"\bgk_proj\.0\.": "log_gate.down.",
    r"\bgk_proj\.1\.": "log_gate.up.",
    r"\bg_norm(_swish_gate)?\.weight$": "norm.weight",
    r"\bq_conv1d\.": "convolutions.0.",
    r"\bk_conv1d\.": "convolutions.1.",
    r"\bv_conv1d\.": "convolutions.2.",
}
"""Pattern of a name in flash-linear-attention → ours; all other names are the same."""

_FIRST_RELEASE_PATTERNS: Mapping[str, str] = {
    r"^transformer\.wte\.": "model.embeddings.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.h\.": "model.layers.",
    r"\.ln_1\.": ".attn_norm.",
    r"\.ln_2\.": ".mlp_norm.",
    r"\.w1\.": ".mlp.gate_proj.",
    r"\.w3\.": ".mlp.up_proj.",
    r"\.w2\.": ".mlp.down_proj.",
    r"\bk_gate\.0\.": "log_gate.down.",
    r"\bk_gate\.1\.": "log_gate.up.",
    r"\bout_proj\.": "o_proj.",
}

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")

# Keys of the published layers' configurations → our keywords.
_FLA_OPTIONS = {
    "hidden_size": "dim",
    **{
        name: name
        for name in (
            "num_heads", "expand_k", "expand_v", "num_kv_heads", "feature_map", "use_short_conv", "conv_size",
            "conv_bias", "use_output_gate", "gate_fn", "elementwise_affine", "norm_eps", "gate_logit_normalizer",
            "gate_low_rank_dim", "clamp_min", "layer_idx",
        )
    },
}  # fmt: skip
_FLA_IGNORED = ("mode", "fuse_norm")
_FIRST_RELEASE_OPTIONS = {"d_model": "dim", "n_head": "num_heads"}


def build_layer(config: Mapping[str, Any]) -> GatedLinearAttention:
    """Build a published layer.

    Args:
        config: the keywords of flash-linear-attention's ``GatedLinearAttention``, or, where it holds ``d_model``, of
            the first release's. What is left out has its published default.

    Returns:
        Our layer, freshly initialised.

    Raises:
        ValueError: an unknown option, or one that is not on offer: the first release's value gates, or none at all.
    """
    if "d_model" not in config:
        return GatedLinearAttention(**_translate(config, _FLA_OPTIONS, _FLA_IGNORED))
    if config.get("use_gv", False) or not config.get("use_gk", True):
        raise ValueError(f"use_gk must be True and use_gv False: key gates alone are on offer; got {dict(config)}")
    return GatedLinearAttention(
        **_translate(config, _FIRST_RELEASE_OPTIONS, ("use_gk", "use_gv")), variant="first_release"
    )


def load_layer_state_dict(layer: GatedLinearAttention, state: Mapping[str, Tensor]) -> None:
    """Load the weights of a published layer.

    Args:
        layer: of the variant that the weights belong to.
        state: the official layer's ``state_dict()``.

    Raises:
        ValueError: the weights are no such layer's, belong to the other variant, or do not fit its sizes.
    """
    try:
        layer.load_state_dict(convert_layer_state_dict(state, layer.variant))
    except RuntimeError as error:
        raise ValueError(f"state must fit the layer: {error}") from error


def convert_layer_state_dict(state: Mapping[str, Tensor], variant: Variant | None = None) -> dict[str, Tensor]:
    """The weights of a published layer under our names.

    Args:
        state: the official layer's ``state_dict()``.
        variant: the variant that is expected; ``None`` for whichever it is.

    Raises:
        ValueError: the weights are no such layer's, or belong to the other variant.
    """
    return _convert(state, variant)


def convert_model_state_dict(state: Mapping[str, Tensor], variant: Variant | None = None) -> dict[str, Tensor]:
    """The weights of a published language model under the names of :class:`GLAForCausalLM`.

    Args:
        state: the official model's ``state_dict()``, of flash-linear-attention or of the first release.
        variant: the variant that is expected; ``None`` for whichever it is.

    Raises:
        ValueError: the weights are no such model's, or belong to the other variant.
    """
    converted = _convert(state, variant)
    if "model.embeddings.weight" not in converted:
        raise ValueError(f"state must hold model.embeddings.weight, got {', '.join(list(state)[:5]) or 'nothing'}")
    return converted


def rename(name: str, variant: Variant) -> str:
    """Our name of a published weight.

    Args:
        name: as in the official state dict, wrappers of DistributedDataParallel and ``torch.compile`` included.
        variant: which published code it is of.
    """
    name = _WRAPPERS.sub("", name)
    for pattern, replacement in (KEY_PATTERNS if variant == "fla" else _FIRST_RELEASE_PATTERNS).items():
        name = re.sub(pattern, replacement, name)
    return name


def find_variant(state: Mapping[str, Tensor]) -> Variant:
    """Which published code the weights of a layer or a model come from.

    Raises:
        ValueError: from neither.
    """
    for name in state:
        if re.search(r"\bgk_proj\.0\.weight$", name):
            return "fla"
        if re.search(r"\bk_gate\.0\.weight$", name):
            return "first_release"
    raise ValueError(
        "state must hold the memory's gate, gk_proj.0.weight (flash-linear-attention) or k_gate.0.weight (first "
        f"release), got {', '.join(sorted(state)[:8]) or 'nothing'}"
    )


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes of flash-linear-attention's language model off its weights.

    Args:
        state: the official model's ``state_dict()``.

    Returns:
        Keywords of :class:`GLAConfig`.

    Raises:
        ValueError: the weights are no such model's, or do not tell the number of heads (a head norm without weights).
    """
    state = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    if find_variant(state) != "fla":
        raise ValueError(
            "state is of the first release, whose weights do not tell the number of heads: give a config with "
            "variant='first_release', and load convert_model_state_dict(state)"
        )
    norm = next((value for name, value in state.items() if re.search(r"\bg_norm(_swish_gate)?\.weight$", name)), None)
    if norm is None or "model.embeddings.weight" not in state:
        raise ValueError(
            "state must hold model.embeddings.weight and the norm of the heads, whose size tells their number, "
            "or a config must be given"
        )
    embeddings = state["model.embeddings.weight"]
    first = {
        name.removeprefix("model.layers.0."): value
        for name, value in state.items()
        if name.startswith("model.layers.0.")
    }
    hidden_size = embeddings.shape[1]
    key_dim, kv_key_dim = first["attn.q_proj.weight"].shape[0], first["attn.k_proj.weight"].shape[0]
    value_dim = first["attn.o_proj.weight"].shape[1]
    num_heads = value_dim // norm.shape[0]
    head = state.get("lm_head.weight")
    convolution = first.get("attn.q_conv1d.weight")
    return {
        "hidden_size": hidden_size,
        "expand_k": key_dim / hidden_size,
        "expand_v": value_dim / hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": None if kv_key_dim == key_dim else num_heads * kv_key_dim // key_dim,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers.")),
        "intermediate_size": first["mlp.gate_proj.weight"].shape[0],
        "use_output_gate": "attn.g_proj.weight" in first,
        "gate_low_rank_dim": first["attn.gk_proj.0.weight"].shape[0],
        "use_short_conv": convolution is not None,
        "conv_size": 4 if convolution is None else convolution.shape[-1],
        "conv_bias": "attn.q_conv1d.bias" in first,
        "vocab_size": embeddings.shape[0],
        "tie_word_embeddings": head is None or torch.equal(head, embeddings),
    }


def _translate(config: Mapping[str, Any], known: Mapping[str, str], ignored: tuple[str, ...]) -> dict[str, Any]:
    unknown = sorted(set(config) - set(known) - set(ignored))
    if unknown:
        raise ValueError(f"config holds the unknown option {unknown[0]!r}; known: {', '.join((*known, *ignored))}")
    translated = {known[name]: value for name, value in config.items() if name in known}
    if translated.get("layer_idx", 0) is None:
        del translated["layer_idx"]
    return translated


def _convert(state: Mapping[str, Tensor], variant: Variant | None) -> dict[str, Tensor]:
    found = find_variant(state)
    if variant is not None and found != variant:
        raise ValueError(
            f"state is of the variant {found!r}, expected {variant!r}: the two layers compute different functions, "
            f"so build one with variant={found!r}"
        )
    # torch's convolutions have an axis for the one input channel of each group.
    renamed = {rename(name, found): value for name, value in state.items()}
    return {
        name: value.squeeze(1) if re.search(r"convolutions\.\d\.weight$", name) else value
        for name, value in renamed.items()
    }
