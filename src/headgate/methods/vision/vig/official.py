"""Models and weights of the published code (hustvl/ViG) in this library's modules.

``build_layer``, ``build_vig`` and ``build_vig_h`` take the keywords of the published classes, ``convert_state_dict``
their weights:

    model = build_vig(keywords)
    model.load_state_dict(convert_state_dict(torch.load("vig_tiny.pth", weights_only=True)["model"]))

Options that the published classes accept and do not look at are let through; options that change the result in a way
that is not offered here are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headgate.methods.vision.vig.layer import BidirectionalGLA
from headgate.methods.vision.vig.vig import ViG
from headgate.methods.vision.vig.vig_h import ViGH

__all__ = ["build_layer", "build_vig", "build_vig_h", "convert_state_dict"]


def build_layer(config: Mapping[str, Any]) -> BidirectionalGLA:
    """Build a published layer (``GatedLinearAttention`` of ``vig.py``; ``GLA2D`` of ``vig_h.py`` does not halve).

    Args:
        config: its keywords; what is left out has its published default.

    Returns:
        Our layer, freshly initialised, with ``official_eval_halving=True``.

    Raises:
        ValueError: an unknown option, or one that is not offered.
    """
    options = _Options("GatedLinearAttention", config)
    options.ignore("mode", "fuse_norm", "use_out_gate", "layer_idx", "is_attn")
    arguments = {
        "num_heads": options.take("num_heads", 4),
        "expand_k": options.take("expand_k", 1.0),
        "expand_v": options.take("expand_v", 2.0),
        "gate_low_rank_dim": options.take("gate_low_rank_dim", 16),
        "gate_logit_normalizer": options.take("gate_logit_normalizer", 16),
        "clamp_min": options.take("clamp_min", None),
        "norm_eps": options.take("layernorm_eps", 1e-5),
        **options.mixer("gate_fn"),
    }
    dim = options.take("d_model", 1024)
    options.done()
    return BidirectionalGLA(dim, official_eval_halving=True, **arguments)


def build_vig(config: Mapping[str, Any]) -> ViG:
    """Build a published plain backbone (``ViG``).

    Args:
        config: its keywords; what is left out has its published default.

    Returns:
        Our model, freshly initialised, with ``official_eval_halving=True``.

    Raises:
        ValueError: an unknown option, or one that is not offered.
    """
    options = _Options("ViG", config)
    options.ignore("attn_model", "use_out_gate", "pt_hw_seq_len")
    if options.take("if_cls_token", True) or options.take("use_middle_cls_token", False):
        raise ValueError("if_cls_token must be False: a class token has no place on the grid of the convolutions")
    patch_size = options.take("patch_size", 16)
    for name, default, offered in (
        ("stride", 16, patch_size),
        ("classification_mode", "avgpool", "avgpool"),
        ("patch_embed_version", "v1", "v2"),
        ("use_swiglu", False, True),
        ("use_bias_in_patch", True, True),
        ("use_act_in_patch", False, False),
        ("use_lower_bound", False, False),
        ("scan_mode", "default", "default"),
        ("if_rc_pe", False, False),
        ("use_msg", False, False),
        ("init_values", None, None),
        ("drop_rate", 0.0, 0.0),
        ("expand_v", 1, 1),
    ):
        options.only(name, default, offered)
    arguments = {
        "depth": options.take("depth", 12),
        "num_heads": options.take("num_heads", 2),
        "img_size": options.take("img_size", 224),
        "in_chans": options.take("channels", 3),
        "num_classes": options.take("num_classes", 1000),
        "expand_k": options.take("expand_k", 0.5),
        "position_embedding": options.take("if_abs_pos_embed", True),
        "drop_path_rate": options.take("drop_path_rate", 0.1),
        **options.mixer("hidden_act"),
    }
    dim = options.take("embed_dim", 192)
    options.done()
    return ViG(dim, patch_size=patch_size, official_eval_halving=True, **arguments)


def build_vig_h(config: Mapping[str, Any]) -> ViGH:
    """Build a published hierarchical backbone (``HierViG``).

    Args:
        config: its keywords; what is left out has its published default.

    Returns:
        Our model, freshly initialised.

    Raises:
        ValueError: an unknown option, or one that is not offered.
    """
    options = _Options("HierViG", config)
    options.ignore("attn_models", "mlp_ratio", "mlp_act_layer", "use_checkpoint")
    for name, default, offered in (
        ("patch_size", 4, 4),
        ("patch_norm", True, True),
        ("patchembed_version", "v1", "v2"),
        ("downsample_version", "v2", "v3"),
        ("gmlp", False, True),
        ("mlp_drop_rate", 0.0, 0.0),
        ("expand_v", 1.0, 1.0),
    ):
        options.only(name, default, offered)
    norm = options.take("norm_layer", "LN")
    if norm.lower() not in ("ln", "ln2d"):
        raise ValueError(f"norm_layer must be 'ln' or 'ln2d' (layer norm over channels in either order), got {norm!r}")
    depths = options.take("depths", (2, 2, 9, 2))
    dims = options.take("dims", (96, 192, 384, 768))
    if not isinstance(dims, int):
        if list(dims) != [dims[0] * 2**stage for stage in range(len(depths))]:
            raise ValueError(f"dims must double from stage to stage, got {list(dims)}")
        dims = dims[0]
    arguments = {
        "depths": depths,
        "num_heads": options.take("num_heads", (3, 6, 12, 24)),
        "in_chans": options.take("in_chans", 3),
        "num_classes": options.take("num_classes", 1000),
        "expand_k": options.take("expand_k", 0.5),
        "drop_path_rate": options.take("drop_path_rate", 0.1),
        **options.mixer("hidden_act"),
    }
    options.done()
    return ViGH(dims, **arguments)


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a published layer, ViG or ViG-H to ours.

    Args:
        state: its ``state_dict()``, with or without the prefix ``module.`` of DistributedDataParallel.

    Returns:
        A state dict for the module that :func:`build_layer`, :func:`build_vig` or :func:`build_vig_h` builds.

    Raises:
        ValueError: a name that the published code does not have.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _rename(key.removeprefix("module."))
        if name is None:
            raise ValueError(f"{key!r} is no weight of a published layer, ViG or ViG-H")
        # The channel-first linear layers of ViG-H may have been saved as 1×1 convolutions.
        pointwise = value.dim() == 4 and value.shape[2:] == (1, 1)
        converted[name] = value.flatten(1) if pointwise else value
    return converted


def _parameters(modules: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in modules.items() for kind in ("weight", "bias")}


_LAYER = {
    **_parameters(
        {
            "in_proj.0": "conv",
            "qkv_proj": "qkv",
            "gk_proj.0": "log_gate.down",
            "gk_proj.1": "log_gate.up",
            "g_proj": "mix",
            "o_proj": "output",
        }
    ),
    "g_norm.weight": "global_norm_weight",
    "l_norm.weight": "local_norm_weight",
}
_PLAIN_BLOCK = {
    **_parameters(
        {
            "attn_norm": "mixer_norm",
            "mlp_norm": "mlp_norm",
            "mlp.gate_proj": "mlp.gate_value",
            "mlp.down_proj": "mlp.output",
        }
    ),
    **{f"attn.{theirs}": f"mixer.{ours}" for theirs, ours in _LAYER.items()},
}
_HIERARCHICAL_BLOCK = {
    **_parameters({"norm": "mixer_norm", "norm2": "mlp_norm", "mlp.fc1": "mlp.gate_value", "mlp.fc2": "mlp.output"}),
    **{f"op.{theirs}": f"mixer.{ours}" for theirs, ours in _LAYER.items()},
}
_DOWNSAMPLE = _parameters({"1": "conv", "3": "norm"})
_OUTSIDE = {
    **_parameters(
        {
            "patch_embed.proj.0": "patch_embedding.conv1",
            "patch_embed.proj.1": "patch_embedding.norm1",
            "patch_embed.proj.3": "patch_embedding.conv2",
            "patch_embed.proj.4": "patch_embedding.norm2",
            "patch_embed.0": "patch_embedding.conv1",
            "patch_embed.2": "patch_embedding.norm1",
            "patch_embed.5": "patch_embedding.conv2",
            "patch_embed.7": "patch_embedding.norm2",
            "norm": "norm",
            "head": "head",
            "classifier.norm": "norm",
            "classifier.head": "head",
        }
    ),
    "pos_embed": "position_embedding",
}


def _rename(name: str) -> str | None:
    """Our name of a published weight, ``None`` where there is none."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        part = _PLAIN_BLOCK.get(match[2])
        return part and f"blocks.{match[1]}.{part}"
    if match := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", name):
        part = _HIERARCHICAL_BLOCK.get(match[3])
        return part and f"stages.{match[1]}.blocks.{match[2]}.{part}"
    if match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", name):
        # There it ends a stage, here it begins the next one.
        part = _DOWNSAMPLE.get(match[2])
        return part and f"stages.{int(match[1]) + 1}.downsample.{part}"
    return _LAYER.get(name) or _OUTSIDE.get(name)


class _Options:
    """The keywords of a published class, each of which must be taken."""

    def __init__(self, owner: str, options: Mapping[str, Any]) -> None:
        self.owner = owner
        self.options = dict(options)

    def take(self, name: str, default: Any) -> Any:
        return self.options.pop(name, default)

    def ignore(self, *names: str) -> None:
        for name in names:
            self.options.pop(name, None)

    def only(self, name: str, default: Any, offered: Any) -> None:
        """Refuse every value but one; where the option is left out, it has its published default."""
        given = self.options.pop(name, default)
        if given != offered:
            raise ValueError(f"{self.owner}: only {name}={offered!r} is offered, got {given!r}")

    def mixer(self, activation_name: str) -> dict[str, Any]:
        """The options of a mixer that all published classes share."""
        self.only("use_dirpe", False, False)
        self.only("use_bias_in_dwconv", False, False)
        activation = self.take(activation_name, "swish")
        if activation not in ("swish", "silu"):
            raise ValueError(f"{self.owner}: only {activation_name}='swish' is offered, got {activation!r}")
        rotary = self.take("rope_mode", "none")
        if rotary not in _ROTARY:
            raise ValueError(f"{self.owner}: rope_mode must be one of {', '.join(_ROTARY)}, got {rotary!r}")
        return {
            "conv_act": "silu" if self.take("use_act_in_conv", True) else None,
            "out_act": "silu" if self.take("use_out_act", False) else None,
            "rotary": _ROTARY[rotary],
        }

    def done(self) -> None:
        if self.options:
            raise ValueError(f"{self.owner} has no option {next(iter(self.options))!r}")


_ROTARY = {"none": None, "1d": "1d", "2dv1": "2d"}
"""The third published mode, 2dv0, turns the two channels of a pair by different angles, which is no rotation."""
