"""Models and weights of the published code (HazyResearch/zoology) in this library's modules.

``build_mixer`` and ``build_language_model`` take a configuration of the published code, ``convert_state_dict`` its
weights:

    model = build_language_model(config)          # the dictionary of a published ModelConfig
    model.load_state_dict(convert_state_dict(state))

Options that the published code accepts and does not look at are let through; options that change the result in a way
that is not offered here are refused by name. Modules are built with ``official_quirks=True`` where there are any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.methods.sequence.zoology.base_conv import BaseConv
from headgate.methods.sequence.zoology.based import Based
from headgate.methods.sequence.zoology.h3 import H3
from headgate.methods.sequence.zoology.hybrid import HybridMixer
from headgate.methods.sequence.zoology.hyena import Hyena
from headgate.methods.sequence.zoology.rwkv import RWKVChannelMix, RWKVTimeMix
from headgate.methods.sequence.zoology.selectors import SoftmaxPairSelector
from headgate.methods.sequence.zoology.sparse_lookups import SparseLookups
from headgate.nn import FeedForward, GatedFeedForward, MixerLM, MultiHeadAttention, SlidingWindowAttention

__all__ = ["build_language_model", "build_mixer", "convert_state_dict"]

_FEATURE_MAPS = {
    None: "identity",
    "none": "identity",
    "identity": "identity",
    "taylor_exp": "taylor",
    "pos_elu": "elu",
    "TaylorExp": "taylor",
    "PosELU": "elu",
    "ReLU": "relu",
    "Square": "square",
    "Identity": "identity",
}


def build_mixer(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Build a published mixer or state mixer.

    Args:
        name: the class, with or without its module: ``"zoology.mixers.base_conv.BaseConv"`` or ``"BaseConv"``.
        options: all of its keywords, ``d_model`` and ``layer_idx`` included.

    Returns:
        Our module, freshly initialised.

    Raises:
        ValueError: an unknown class or option, or one that is not offered.
    """
    short = name.rpartition(".")[2]
    if short not in _BUILDERS:
        raise ValueError(f"name must be one of {', '.join(_BUILDERS)}, got {name!r}")
    return _BUILDERS[short](_Options(short, options))


def build_language_model(config: Mapping[str, Any]) -> MixerLM:
    """Build a published language model.

    Args:
        config: a ``ModelConfig`` as a dictionary; what is left out has its published default.

    Returns:
        Our model, freshly initialised.

    Raises:
        ValueError: an unknown option, or one that is not offered.
    """
    options = _Options("ModelConfig", config)
    sequence_mixer = options.take("sequence_mixer")
    state_mixer = options.take("state_mixer", {"name": "MLP", "kwargs": {"hidden_mult": 4}})
    dim = options.take("d_model", 128)

    def build(module: Mapping[str, Any]) -> Callable[[int], nn.Module]:
        given = {"d_model": dim, **module.get("kwargs", {})}
        return lambda layer: build_mixer(module["name"], {**given, "layer_idx": layer})

    options.only("block_type", "TransformerBlock")
    options.ignore("name")
    arguments = {
        "depth": options.take("n_layers", 2),
        "vocab_size": options.take("vocab_size", 8192),
        "max_positions": max(options.take("max_position_embeddings", 64), 0),
        "embedding_dropout": options.take("embed_dropout", 0.1),
        "dropout": options.take("resid_dropout", 0.0),
        "drop_path": options.take("drop_path", 0.0),
        "norm_eps": options.take("layer_norm_epsilon", 1e-5),
        "learn_embedding": options.take("learnable_word_embeddings", True),
        "vocab_multiple": options.take("pad_vocab_size_multiple", 1),
    }
    options.done()
    return MixerLM(dim, mixer=build(sequence_mixer), state_mixer=build(state_mixer), **arguments)


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a published mixer or language model to ours.

    Args:
        state: its ``state_dict()``.

    Returns:
        A state dict for the module that :func:`build_mixer` or :func:`build_language_model` builds.

    Raises:
        ValueError: a name that the published code does not have, or an output layer that is not tied to the embedding.
    """
    if not any(key.startswith("backbone.") for key in state):
        return _convert_mixer(state)
    converted: dict[str, Tensor] = {}
    mixers: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", key)
        if layer is None:
            if key == "lm_head.weight":
                if not torch.equal(value, state["backbone.embeddings.word_embeddings.weight"]):
                    raise ValueError("lm_head.weight must be the tied word embedding, but differs from it")
            elif key in _MODEL_NAMES:
                converted[_MODEL_NAMES[key]] = value
            else:
                raise ValueError(f"{key!r} is no weight of a published language model")
            continue
        index, rest = layer.groups()
        part = re.match(r"(sequence_mixer\.(?:mixer\.)*|state_mixer\.)(.+)", rest)
        if part is None:
            converted[f"blocks.{index}.{rest}"] = value
        else:
            prefix = f"blocks.{index}.{part[1].removeprefix('sequence_')}"
            mixers.setdefault(prefix, {})[part[2]] = value
    for prefix, mixer in mixers.items():
        converted.update({prefix + key: value for key, value in _convert_mixer(mixer).items()})
    return converted


_MODEL_NAMES = {
    "backbone.embeddings.word_embeddings.weight": "embedding.weight",
    "backbone.embeddings.position_embeddings.weight": "positions.weight",
    "backbone.ln_f.weight": "norm.weight",
    "backbone.ln_f.bias": "norm.bias",
}


class _Options:
    """Keywords that are taken one by one; what is left over at the end is refused."""

    def __init__(self, owner: str, values: Mapping[str, Any]) -> None:
        self.owner = owner
        self.values = dict(values)

    def take(self, key: str, *default: Any) -> Any:
        if key not in self.values and not default:
            raise ValueError(f"{self.owner} needs the option {key!r}")
        return self.values.pop(key, *default)

    def ignore(self, *keys: str) -> None:
        """Options that the published code accepts and does not look at."""
        for key in keys:
            self.values.pop(key, None)

    def only(self, key: str, value: Any) -> None:
        given = self.values.pop(key, value)
        if given != value:
            raise ValueError(f"{self.owner} is offered with {key}={value!r} only, got {given!r}")

    def done(self) -> None:
        if self.values:
            raise ValueError(f"{self.owner} has no option {', '.join(map(repr, self.values))}")


def _attention(options: _Options) -> nn.Module:
    dim, heads = options.take("d_model"), options.take("num_heads", 1)
    bias, dropout = options.take("bias", True), options.take("dropout", 0.0)
    options.ignore("layer_idx")
    options.done()
    return MultiHeadAttention(dim, heads, causal=True, bias=bias, dropout=dropout)


def _sliding_attention(options: _Options) -> nn.Module:
    dim, window = options.take("d_model"), options.take("block_size", 256)
    bias, dropout = options.take("bias", True), options.take("dropout", 0.0)
    options.ignore("layer_idx", "l_max", "attention_dropout")
    options.done()
    return SlidingWindowAttention(dim, window, causal=True, bias=bias, dropout=dropout)


def _base_conv(options: _Options) -> nn.Module:
    dim, max_length, layer = options.take("d_model"), options.take("l_max"), options.take("layer_idx", None)
    kernel_size = options.take("kernel_size", 3)
    if isinstance(kernel_size, Sequence):
        if layer is None or layer >= len(kernel_size):
            raise ValueError(f"kernel_size must have an entry for layer_idx={layer}, got {list(kernel_size)}")
        kernel_size = kernel_size[layer]
    implicit, activation = options.take("implicit_long_conv", True), options.take("use_act", False)
    options.done()
    return BaseConv(dim, max_length, kernel_size, implicit=implicit, activation=activation, official_quirks=True)


def _based(options: _Options) -> nn.Module:
    dim, heads = options.take("d_model"), options.take("num_heads", 12)
    name = options.take("feature_name", "taylor_exp")
    short = name if name in _FEATURE_MAPS else str(name).rpartition(".")[2]
    if short not in _FEATURE_MAPS:
        raise ValueError(f"Based has no feature_name {name!r} here; known: {', '.join(map(str, _FEATURE_MAPS))}")
    feature_options = _Options("Based.feature_kwargs", options.take("feature_kwargs", {}))
    feature_options.ignore("eps", "head_dim_idx")
    if _FEATURE_MAPS[short] == "taylor":
        feature_options.ignore("temp")
    feature_options.only("temp", 1.0)
    feature_options.done()
    base = options.take("rope_theta", 10000.0)
    rotary = options.take("apply_rotary", False)
    options.only("causal", True)
    options.ignore("layer_idx", "l_max", "train_view")
    arguments = {
        "feature_dim": options.take("feature_dim", 16),
        "num_kv_heads": options.take("num_key_value_heads", 12),
        "eps": options.take("eps", 1e-12),
    }
    options.done()
    return Based(dim, heads, feature_map=_FEATURE_MAPS[short], rotary_base=base if rotary else None, **arguments)


def _hyena(options: _Options) -> nn.Module:
    dim, max_length = options.take("d_model"), options.take("l_max")
    for key, value in (("num_heads", 1), ("num_blocks", 1), ("bidirectional", False), ("channels", 1), ("bias", True)):
        options.only(key, value)
    options.ignore("layer_idx", "outer_mixing", "filter_dropout", "return_state")
    options.ignore("lr", "lr_pos_emb", "modulation_lr", "wd")  # tags for an optimizer
    arguments = {
        "filter_dim": options.take("filter_order", 64),
        "short_kernel_size": options.take("short_filter_order", 3),
        "dropout": options.take("dropout", 0.0),
        "num_features": options.take("emb_dim", 3),
        "num_inner_layers": options.take("num_inner_mlps", 2),
        "frequency": options.take("w", 1),
        "linear": options.take("linear_mixer", False),
        "modulate": options.take("modulate", True),
        "fast_decay": options.take("fast_decay_pct", 0.3),
        "slow_decay": options.take("slow_decay_pct", 1.5),
        "decay_target": options.take("target", 1e-2),
        "decay_shift": options.take("shift", 0.0),
        "normalize": options.take("normalized", False),
    }
    options.done()
    return Hyena(dim, max_length, **arguments)


def _h3(options: _Options) -> nn.Module:
    dim, state_dim = options.take("d_model"), int(options.take("d_state", 64))
    head_dim, max_length = options.take("head_dim", 1), options.take("l_max", None)
    options.ignore("layer_idx", "dropout", "use_fast_fftconv", "device", "dtype")
    kernel = _Options("H3.kernel_args", options.take("kernel_args", {}))
    for key, value in (
        ("mode", "diag"), ("channels", 1), ("disc", "bilinear"), ("real_type", "exp"), ("bandlimit", None),
        ("force_real", False),
    ):  # fmt: skip
        kernel.only(key, value)
    kernel.ignore("measure", "measure_args", "rank", "deterministic", "lr", "n_ssm", "verbose")  # start and optimizer
    dt_min, dt_max = kernel.take("dt_min", 0.001), kernel.take("dt_max", 0.1)
    kernel.done()
    options.done()
    return H3(dim, state_dim, head_dim, max_length, dt_min=dt_min, dt_max=dt_max)


def _lookups(selector: str) -> Callable[[_Options], nn.Module]:
    def build(options: _Options) -> nn.Module:
        dim, heads = options.take("d_model"), options.take("num_heads", 1)
        arguments: dict[str, Any] = {
            "selector": selector,
            "bias": options.take("bias", True),
            "dropout": options.take("dropout", 0.0),
        }
        if selector == "sigmoid":
            arguments["penalty"] = options.take("selection_penalty", 0.001)
            arguments["num_lookups"] = options.take("n_lookups", None)
        if selector == "sma":
            arguments["selector"] = SoftmaxPairSelector(dim, options.take("alpha", 0.3) * dim**0.5)
        options.ignore("layer_idx")
        options.done()
        return SparseLookups(dim, heads, **arguments)

    return build


def _rwkv(kind: type[RWKVTimeMix] | type[RWKVChannelMix]) -> Callable[[_Options], nn.Module]:
    def build(options: _Options) -> nn.Module:
        dim, layer, depth = options.take("d_model", 512), options.take("layer_idx", 0), options.take("n_layer", 12)
        options.ignore("l_max")
        options.done()
        return kind(dim, max(layer, 0), depth)

    return build


def _hybrid(options: _Options) -> nn.Module:
    dim, layer = options.take("d_model"), options.take("layer_idx")
    configs = options.take("configs")
    options.done()

    def build(config: Mapping[str, Any]) -> Callable[[], nn.Module]:
        given = {"d_model": dim, "layer_idx": layer, **config.get("kwargs", {})}
        return lambda: build_mixer(config["name"], given)

    return HybridMixer([build(config) for config in configs], layer)


def _mlp(kind: type[FeedForward] | type[GatedFeedForward]) -> Callable[[_Options], nn.Module]:
    def build(options: _Options) -> nn.Module:
        dim, multiple = options.take("d_model"), options.take("hidden_mult", 1)
        activation = options.take("activation", F.gelu)
        options.ignore("layer_idx", "return_residual")
        options.done()
        return kind(dim, dim * multiple, activation)

    return build


_BUILDERS: dict[str, Callable[[_Options], nn.Module]] = {
    "MHA": _attention,
    "SlidingAttn": _sliding_attention,
    "BaseConv": _base_conv,
    "Based": _based,
    "Hyena": _hyena,
    "H3": _h3,
    "SigmoidLookups": _lookups("sigmoid"),
    "SMA": _lookups("sma"),
    "SelectiveLookups": _lookups("softmax"),
    "RWKVTimeMixer": _rwkv(RWKVTimeMix),
    "RWKVStateMixer": _rwkv(RWKVChannelMix),
    "Hybrid": _hybrid,
    "MLP": _mlp(FeedForward),
    "GLU": _mlp(GatedFeedForward),
    "Identity": lambda options: nn.Identity(),
}

# Per kind of mixer: a weight that only it has, and the names of its weights as pattern → ours. The first that fits counts.
_NAMES: list[tuple[str, dict[str, str]]] = [
    ("selecting.weight", {
        r"selecting\.(.+)": r"selector.proj.\1", r"Wqkv\.(.+)": r"attention.qkv.\1",
        r"out_proj\.(.+)": r"attention.out_proj.\1",
    }),
    ("selection_proj.weight", {
        r"selection_proj\.(.+)": r"selector.proj.\1", "temperature": "selector.temperature",
        r"Wqkv\.(.+)": r"attention.qkv.\1", r"out_proj\.(.+)": r"attention.out_proj.\1",
    }),
    ("Wqkv.weight", {r"Wqkv\.(.+)": r"qkv.\1", r"out_proj\.(.+)": r"out_proj.\1"}),
    ("projection.weight", {
        r"projection\.(.+)": r"projection.\1", r"conv\.conv\.(.+)": r"conv.\1", r"conv\.filter": "conv.kernel",
        r"conv\.pos_emb\.z": "conv.features", r"conv\.mlp\.(.+)": r"conv.filter.\1",
    }),
    ("proj_q.weight", {
        r"proj_q\.(.+)": r"query.\1", r"proj_k\.(.+)": r"key.\1", r"proj_v\.(.+)": r"value.\1",
        r"proj_o\.(.+)": r"output.\1",
    }),
    ("filter_fn.pos_emb.z", {
        r"(in_proj|out_proj)\.(.+)": r"\1.\2", r"short_filter\.(.+)": r"short_conv.\1",
        r"filter_fn\.bias": "filter.skip", r"filter_fn\.pos_emb\.z": "filter.features",
        r"filter_fn\.pos_emb\.t": "filter.time", r"filter_fn\.modulation\.deltas": "filter.decay",
        r"filter_fn\.implicit_filter\.(\d+)\.freq": "filter.frequency",
        r"filter_fn\.implicit_filter\.(\d+)\.(weight|bias)": r"filter.layers.\1.\2",
    }),
    ("ssm_k_D", {
        r"q_proj\.(.+)": r"query.\1", r"k_proj\.(.+)": r"key.\1", r"v_proj\.(.+)": r"value.\1",
        r"output_linear\.(.+)": r"output.\1", "ssm_k_D": "key_skip", "D": "skip",
        r"ssm_k_kernel\.kernel\.B": "key_kernel.input", r"ssm_k_kernel\.kernel\.C": "key_kernel.readout",
        r"kernel\.kernel\.B": "kernel.input", r"kernel\.kernel\.C": "kernel.readout",
        r"kernel\.kernel\.log_dt": "kernel.log_dt", r"kernel\.kernel\.inv_A_real": "kernel.log_decay",
        r"kernel\.kernel\.A_imag": "kernel.frequency",
    }),
    ("receptance.weight", {
        "time_decay": "log_decay", "time_first": "bonus", "time_mix_k": "mix_key", "time_mix_v": "mix_value",
        "time_mix_r": "mix_receptance", r"(key|value|receptance|output)\.weight": r"\1.weight",
    }),
    ("fc3.weight", {r"fc1\.(.+)": r"value.\1", r"fc2\.(.+)": r"gate.\1", r"fc3\.(.+)": r"output.\1"}),
    ("fc1.weight", {r"(fc1|fc2)\.(.+)": r"\1.\2"}),
]  # fmt: skip


def _convert_mixer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = next((names for signature, names in _NAMES if signature in state), None)
    if names is None:
        raise ValueError(f"these are no weights of a published mixer: {', '.join(sorted(state))}")
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        ours = next((re.sub(pattern, name, key) for pattern, name in names.items() if re.fullmatch(pattern, key)), None)
        if ours is None:
            raise ValueError(f"{key!r} is no weight of the published mixer that has {', '.join(sorted(state))}")
        ours, value = _reshape(ours, value, state)
        if ours in converted and not torch.equal(converted[ours], value):
            raise ValueError(f"{key!r} must equal its twin, which shares {ours!r} here, but differs from it")
        converted[ours] = value
    return converted


def _reshape(name: str, value: Tensor, state: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """Drop axes of length one; number a filter's linear layers without the sines between them; untie shared modes."""
    layer = re.fullmatch(r"filter\.layers\.(\d+)\.(.+)", name)
    if layer is not None:
        return f"filter.layers.{int(layer[1]) // 2}.{layer[2]}", value
    if name in ("conv.features", "filter.features", "filter.time", "key_kernel.readout", "kernel.readout"):
        value = value.squeeze(0)
    elif name in ("conv.weight", "short_conv.weight"):
        value = value.squeeze(1)
    elif name in ("filter.frequency", "filter.decay") or name.startswith("mix_"):
        value = value.flatten()
    elif name in ("kernel.input", "kernel.log_decay", "kernel.frequency"):
        copies = state["kernel.kernel.log_dt"].shape[0] // value.shape[0]
        value = value.repeat(copies, *[1] * (value.dim() - 1))
    return name, value
