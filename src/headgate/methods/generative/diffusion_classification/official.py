"""Networks, heads and weights of the published code (openai/guided-diffusion, soumik-kanad/diffssl) in this library's modules.

The U-Net's parameters have their published names, so its state dict loads as it is:

    unet = ADMUNet.from_guided_diffusion(torch.load("256x256_diffusion_uncond.pt", weights_only=True))
    head = build_attention(state_dict, num_timesteps=3, num_heads=8)      # "model_head" of diffssl's latest.pth
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headgate.methods.generative.diffusion_classification.attention import DifFormer
from headgate.methods.generative.diffusion_classification.heads import MLPHead
from headgate.methods.generative.diffusion_classification.unet import ADMUNet

__all__ = [
    "build_attention",
    "build_linear",
    "build_unet",
    "convert_attention_state_dict",
    "convert_linear_state_dict",
    "convert_state_dict",
]

_INNER = "intra_inter_block_attention"


def build_unet(config: Mapping[str, Any]) -> ADMUNet:
    """Build a published ``UNetModel``.

    Args:
        config: keywords of guided-diffusion's ``create_model``: ``image_size``, ``num_channels``, ``num_res_blocks``,
            ``channel_mult`` and ``attention_resolutions`` as texts or sequences (resolutions in pixels),
            ``num_head_channels``, ``num_heads``, ``learn_sigma``, ``class_cond``, ``dropout``, ``use_scale_shift_norm``,
            ``resblock_updown``, ``use_new_attention_order``; what is left out has its published default.

    Raises:
        ValueError: an unknown option.
    """
    options = {"num_heads_upsample": -1, "use_fp16": False, "use_checkpoint": False, **config}
    for ignored in ("num_heads_upsample", "use_fp16", "use_checkpoint"):
        options.pop(ignored)
    size = options.pop("image_size", 64)
    mult = options.pop("channel_mult", "") or _DEFAULT_MULT.get(size)
    if mult is None:
        raise ValueError(f"channel_mult must be given for image_size={size}")
    pixels = _numbers(options.pop("attention_resolutions", "16,8"))
    head_channels = options.pop("num_head_channels", -1)
    built = ADMUNet(
        image_size=size,
        model_channels=options.pop("num_channels", 128),
        out_channels=6 if options.pop("learn_sigma", False) else 3,
        num_res_blocks=options.pop("num_res_blocks", 2),
        attention_downsampling=tuple(size // side for side in pixels),
        channel_mult=_numbers(mult),
        dropout=options.pop("dropout", 0.0),
        num_classes=1000 if options.pop("class_cond", False) else None,
        num_heads=options.pop("num_heads", 4),
        num_head_channels=None if head_channels == -1 else head_channels,
        use_scale_shift_norm=options.pop("use_scale_shift_norm", True),
        resblock_updown=options.pop("resblock_updown", False),
        use_new_attention_order=options.pop("use_new_attention_order", False),
    )
    if options:
        raise ValueError(f"unknown options of create_model: {', '.join(sorted(options))}")
    return built


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's weights: the names are the published ones; a wrapper's ``module.`` or ``encoder.`` is taken away."""
    return {re.sub(r"^(module\.)?(encoder\.)?", "", name): value for name, value in state.items()}


def build_linear(state: Mapping[str, Tensor], pool: int) -> MLPHead:
    """A published ``Head`` (linear or with hidden layers) with its weights, ``official_quirks`` on.

    Args:
        state: of the head; layer i is ``fcs.i``.
        pool: its ``pre_pool_size``.

    Raises:
        ValueError: another state dict.
    """
    weights = [state[f"fcs.{index}.weight"] for index in range(len(state)) if f"fcs.{index}.weight" in state]
    if not weights or weights[0].shape[1] % pool**2:
        raise ValueError(f"state must be that of diffssl's Head with pre_pool_size={pool}, got {sorted(state)}")
    hidden = [weight.shape[0] for weight in weights[:-1]]
    channels = weights[0].shape[1] // pool**2
    head = MLPHead(channels, weights[-1].shape[0], hidden, pool=pool, official_quirks=True)
    head.load_state_dict(convert_linear_state_dict(state))
    return head.eval()


def convert_linear_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``Head`` → :class:`MLPHead` or :class:`LinearProbe`."""
    return {re.sub(r"^fcs\.", "layers.", name): value for name, value in state.items()}


def build_attention(
    state: Mapping[str, Tensor], num_timesteps: int, num_heads: int, blocks: Sequence[int] | None = None
) -> DifFormer:
    """A published ``AttentionFusion`` with its weights.

    Args:
        state: of the head.
        num_timesteps: times whose class tokens stand side by side.
        num_heads: attention heads, which weights do not tell.
        blocks: in which order the maps of the numbered blocks are given; default rising.

    Raises:
        ValueError: another state dict, or batch norm's (whose grid weights do not tell).
    """
    order = _block_numbers(state) if blocks is None else list(blocks)
    norms = [state.get(f"pre_layer.{number}.1.weight") for number in order]
    if not order or any(norm is None or norm.dim() != 3 for norm in norms):
        raise ValueError(
            f"state must be that of diffssl's AttentionFusion with layer norm, for blocks {order}, got {sorted(state)}"
        )
    layers = {name.split(".")[2] for name in state if name.startswith(f"{_INNER}.layers.")}
    inner = state[f"{_INNER}.layers.{min(layers, key=int)}.mlp.fc1.weight"]
    head = DifFormer(
        [norm.shape[0] for norm in norms if norm is not None],
        state["head.weight"].shape[0],
        num_timesteps,
        inner.shape[1],
        len(layers),
        num_heads,
        grids=[norm.shape[1] for norm in norms if norm is not None],
        mlp_ratio=inner.shape[0] / inner.shape[1],
    )
    head.load_state_dict(convert_attention_state_dict(state, order))
    return head.eval()


def convert_attention_state_dict(state: Mapping[str, Tensor], blocks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """``AttentionFusion`` → :class:`DifFormer`.

    Args:
        state: of the published head.
        blocks: the numbered blocks in the order of the ``DifFormer``'s; default rising.
    """
    order = _block_numbers(state) if blocks is None else list(blocks)
    first = min((int(name.split(".")[2]) for name in state if name.startswith(f"{_INNER}.layers.")), default=0)
    parts = {"1": "norm", "2": "proj"}
    inner = {"norm1": "mixer_norm", "norm2": "mlp_norm", "attn.qkv": "mixer.qkv", "attn.proj": "mixer.out_proj"}
    converted = {}
    for name, value in state.items():
        if name.startswith("pre_layer."):
            _, number, part, rest = name.split(".", 3)
            name = f"tokens.{order.index(int(number))}.{parts[part]}.{rest}"
        elif name == f"{_INNER}.cls_token":
            name = "attention.class_token"
        elif name.startswith(f"{_INNER}.layers."):
            _, _, index, rest = name.split(".", 3)
            for theirs, ours in inner.items():
                rest = re.sub(rf"^{re.escape(theirs)}\.", f"{ours}.", rest)
            name = f"attention.blocks.{int(index) - first}.{rest}"
        else:
            name = re.sub(r"^head\.", "classifier.", name)
        converted[name] = value
    return converted


def _block_numbers(state: Mapping[str, Tensor]) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in state if name.startswith("pre_layer.")})


_DEFAULT_MULT = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


def _numbers(given: str | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(number) for number in (given.split(",") if isinstance(given, str) else given))
