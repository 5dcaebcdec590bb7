"""State dicts of the official code (networkslab/dynn, on yitu-opensource/T2T-ViT) as ours.

Official names stand below ``module.`` where the model was saved out of DataParallel; a checkpoint file holds them under
``net``. Heads are ``intermediate_heads.{l}``, gates ``gates.{l}.linear``, the backbone is a T2T-ViT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn.heads import ExitHeads
from headgate.methods.routing.jei_dnn.model import EarlyExit
from headgate.methods.routing.jei_dnn.t2t import T2TViT

__all__ = [
    "convert_backbone",
    "convert_exits",
    "early_exit_from_official",
    "exit_heads_from_official",
    "t2t_vit_from_official",
]

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_HEAD_DIM = 64
_RENAMED = (
    (re.compile(r"^tokens_to_token\.(attention[12])\.w$"), r"\1.directions"),
    (re.compile(r"^tokens_to_token\.(attention[12])\.proj\."), r"\1.out_proj."),
    (re.compile(r"^tokens_to_token\.(attention[12])\.mlp\.0\."), r"\1.mlp.fc1."),
    (re.compile(r"^tokens_to_token\.(attention[12])\.mlp\.2\."), r"\1.mlp.fc2."),
    (re.compile(r"^tokens_to_token\."), ""),
    (re.compile(r"^cls_token$"), "class_token"),
    (re.compile(r"^pos_embed$"), "position_embedding"),
    (re.compile(r"^(blocks\.\d+)\.norm1\."), r"\1.mixer_norm."),
    (re.compile(r"^(blocks\.\d+)\.norm2\."), r"\1.mlp_norm."),
    (re.compile(r"^(blocks\.\d+)\.attn\.qkv\."), r"\1.mixer.qkv."),
    (re.compile(r"^(blocks\.\d+)\.attn\.proj\."), r"\1.mixer.out_proj."),
)


def convert_backbone(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, qk_scale: float | None = None
) -> dict[str, Tensor]:
    """The T2T-ViT of an official state dict under the names of :class:`T2TViT`.

    Args:
        state: name → tensor, e.g. ``torch.load("ckpt.pth", weights_only=True)["net"]``.
        num_heads: of the attention; default: one per 64 channels, as in all published sizes.
        qk_scale: what the model multiplies queries with, where it is not the usual one over the root of a head's channels;
            the queries' weights then take up the difference. (timm's registry of T2T-ViT sets ``dim ** -0.5`` for its
            pretrained weights.)

    Raises:
        ValueError: it holds no backbone, or a name that is no part of one.
    """
    plain = {name: tensor for name, tensor in _unwrapped(state).items() if not _is_exit(name)}
    if "cls_token" not in plain:
        raise ValueError(f"state must hold a T2T-ViT with cls_token, got {list(plain)[:5] or 'nothing'}")
    converted = {}
    for name, tensor in plain.items():
        for pattern, replacement in _RENAMED:
            name, changes = pattern.subn(replacement, name)
            if changes:
                break
        converted[name] = tensor
    if qk_scale is not None:
        dim = plain["cls_token"].shape[-1]
        heads = dim // _HEAD_DIM if num_heads is None else num_heads
        factor = qk_scale * (dim / heads) ** 0.5
        for name in [name for name in converted if name.endswith(".mixer.qkv.weight")]:
            weight = converted[name].clone()
            weight[:dim] *= factor
            converted[name] = weight
    return converted


def convert_exits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads and gates of an official state dict under the names of :class:`ExitHeads`.

    Args:
        state: as in :func:`convert_backbone`; heads and gates alone will do.

    Raises:
        ValueError: it holds no heads, or heads and gates in different numbers.
    """
    found = {name: tensor for name, tensor in _unwrapped(state).items() if _is_exit(name)}
    heads = {name for name in found if re.fullmatch(r"intermediate_heads\.\d+\.weight", name)}
    gates = {name for name in found if re.fullmatch(r"gates\.\d+\.linear\.weight", name)}
    if not heads or len(heads) != len(gates):
        raise ValueError(f"state must hold as many intermediate_heads as gates, got {len(heads)} and {len(gates)}")
    return {name.replace("intermediate_heads.", "heads."): tensor for name, tensor in found.items()}


def exit_heads_from_official(state: Mapping[str, Tensor]) -> tuple[ExitHeads, nn.Linear]:
    """Build heads and gates, and the final head, that an official state dict belongs to, and load them.

    Args:
        state: with ``head``, ``intermediate_heads`` and ``gates``; the rest is not looked at.

    Raises:
        ValueError: one of them is missing.
    """
    plain = _unwrapped(state)
    converted = convert_exits(plain)
    if "head.weight" not in plain:
        raise ValueError(f"state must hold head.weight, got {list(plain)[:5]}")
    weight = plain["head.weight"]
    exits = ExitHeads(weight.shape[1], weight.shape[0], sum(name.endswith("linear.weight") for name in converted))
    exits.to(weight.dtype).load_state_dict(converted)
    final = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    final.load_state_dict({"weight": weight, "bias": plain["head.bias"]})
    return exits, final


def t2t_vit_from_official(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, qk_scale: float | None = None
) -> T2TViT:
    """Build the T2T-ViT that an official state dict belongs to, and load it.

    Args:
        state: as in :func:`convert_backbone`; of T2T-ViT's own code, or of this method's.
        num_heads: as there.
        qk_scale: as there.

    Raises:
        ValueError: it holds no backbone.
    """
    converted = convert_backbone(state, num_heads=num_heads, qk_scale=qk_scale)
    dim = converted["class_token"].shape[-1]
    in_width = converted["attention1.kqv.weight"].shape[1]
    patches = converted["position_embedding"].shape[1] - 1
    backbone = T2TViT(
        dim,
        1 + max(int(name.split(".")[1]) for name in converted if name.startswith("blocks.")),
        dim // _HEAD_DIM if num_heads is None else num_heads,
        mlp_dim=converted["blocks.0.mlp.fc1.weight"].shape[0],
        img_size=16 * round(patches**0.5),
        in_chans=in_width // 49,
        num_classes=converted["head.weight"].shape[0] if "head.weight" in converted else 0,
        token_dim=converted["attention1.out_proj.weight"].shape[0],
    )
    backbone.load_state_dict(converted)
    return backbone


def early_exit_from_official(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, qk_scale: float | None = None
) -> EarlyExit:
    """Build the whole network that an official state dict belongs to, and load it.

    Costs are not in the state dict; see :func:`profile_costs`.

    Args:
        state: as in :func:`convert_backbone`, with heads and gates.
        num_heads: as there.
        qk_scale: as there.

    Raises:
        ValueError: it holds no backbone, or no heads and gates.
    """
    backbone = t2t_vit_from_official(state, num_heads=num_heads, qk_scale=qk_scale)
    model = EarlyExit(backbone, exits=range(_count_exits(state)), blocks="blocks", norm="norm", pool="token")
    model.exits.load_state_dict(convert_exits(state))
    return model


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_WRAPPERS.sub("", name): tensor for name, tensor in state.items() if torch.is_tensor(tensor)}


def _is_exit(name: str) -> bool:
    return name.startswith(("intermediate_heads.", "gates."))


def _count_exits(state: Mapping[str, Tensor]) -> int:
    return sum(name.endswith("linear.weight") for name in convert_exits(state))
