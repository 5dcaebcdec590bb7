"""Models and weights of the published code (facebookresearch/convit) and of timm in this library's modules.

Parameters have the published names, so a bare state dict loads as it is. Checkpoints wrap it: ``convert_state_dict`` takes
what was saved,

    model = build_convit(keywords)
    model.load_state_dict(convert_state_dict(torch.load("convit_tiny.pth", weights_only=True)))

and ``build_convit`` the keywords of the published class. timm's class takes the channels per head: give it
``channels_per_head=True``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headgate.methods.vision.convit.convit import ConViT

__all__ = ["build_convit", "convert_state_dict"]


def build_convit(config: Mapping[str, Any], *, channels_per_head: bool = False) -> ConViT:
    """Build a published model (``VisionTransformer`` of convit.py, ``ConVit`` of timm).

    Args:
        config: its keywords; what is left out has its published default.
        channels_per_head: ``embed_dim`` counts the channels of one head, as in timm and on the published command line.

    Returns:
        Our model, freshly initialised.

    Raises:
        ValueError: an unknown option, or one that is not offered.
    """
    options = dict(config)
    for name in ("norm_layer", "pretrained", "pretrained_cfg"):
        options.pop(name, None)
    for name, offered in (
        ("qk_scale", None),
        ("hybrid_backbone", None),
        ("proj_drop_rate", 0.0),
        ("pos_drop_rate", 0.0),
    ):
        given = options.pop(name, offered)
        if given != offered:
            raise ValueError(f"only {name}={offered!r} is offered, got {given!r}")
    options["global_pool"] = options.get("global_pool") or "token"
    num_heads = options.setdefault("num_heads", 12)
    embed_dim = options.setdefault("embed_dim", 48)
    if channels_per_head:
        options["embed_dim"] = embed_dim * num_heads
    if unknown := set(options) - _OPTIONS:
        raise ValueError(f"the published class has no option {', '.join(sorted(unknown))}")
    return ConViT(**{"drop_path_rate": 0.0, **options})


def convert_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the weights out of a checkpoint of the published code or of timm: of a model or of a single layer.

    Args:
        checkpoint: what was saved: a state dict, with or without the prefix ``module.`` of DistributedDataParallel, or
            a mapping that holds one under ``model`` or ``state_dict``.

    Returns:
        A state dict of :class:`ConViT`, :class:`GPSA` or :class:`MHSA`. Relative coordinates that were saved are left
        out: they are no weights.

    Raises:
        ValueError: a name that the published code does not have.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(checkpoint.get(wrapper), Mapping):
            return convert_state_dict(checkpoint[wrapper])
    converted: dict[str, Tensor] = {}
    for key, value in checkpoint.items():
        name = key.removeprefix("module.")
        if name.rpartition(".")[2] == "rel_indices":
            continue
        if not _NAME.fullmatch(name):
            raise ValueError(f"{key!r} is no weight of a published ConViT or of one of its layers")
        converted[name] = value
    return converted


_OPTIONS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
    *("drop_rate", "attn_drop_rate", "drop_path_rate", "global_pool", "local_up_to_layer", "locality_strength"),
    *("use_pos_embed", "norm_eps"),
}

_LAYER = r"((qk|v|qkv|proj|pos_proj)\.(weight|bias)|gating_param)"
_BLOCK = rf"(attn\.{_LAYER}|(norm1|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias))"
_NAME = re.compile(rf"{_LAYER}|blocks\.\d+\.{_BLOCK}|cls_token|pos_embed|(patch_embed\.proj|norm|head)\.(weight|bias)")
