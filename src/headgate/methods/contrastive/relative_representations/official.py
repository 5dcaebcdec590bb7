"""State dicts of the official code (lucmos/relreps, package ``rae``) as ours.

The block (``RelativeAttention``, ``MultiheadRelativeAttention``), the autoencoders (``VanillaAE``, ``VanillaRelAE``) and the
stitching head of the notebooks have parameters; the names change as the tables below say. Models inside a Lightning module
stand below ``model.`` or ``autoencoder.``, beside a second copy of the anchors, which is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["convert_autoencoder", "convert_head", "convert_state_dict"]

_BLOCK = (
    (r"\bpre_attention_transforms\.module_dict\.attention_queries\.", "query_map."),
    (r"\bpre_attention_transforms\.module_dict\.attention_keys\.", "key_map."),
    (r"\bpre_attention_transforms\.module_dict\.attention_values\.", "value_map."),
    (r"\bsim_norm\.", "similarity_norm."),
    (r"\bsim_to_(queries|keys|values)\b", r"to_\1"),
    (r"\bself_attention_aggregation\.", "gather."),
    (r"\banchors_relative_attention\.", "of_anchors."),
    (r"\boutnorm\.", "out_norm."),
    (r"\brelative_attentions\.", "blocks."),
    (r"\bhead_pooling\.", "pooling."),
)
_AUTOENCODER = (
    (r"^relative_attention\.", "relative."),
    (r"^anchors_images$", "anchor_images"),
    (r"^anchors_targets$", "anchor_labels"),
)
_WRAPPERS = re.compile(r"^(?:model|autoencoder|module)\.")
_HEAD = {"0": "norm", "1": "hidden", "6": "out"}


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A relative block's official state dict under our names.

    The result loads into :class:`RelativeAttention`, or, of a multi-head block, :class:`SubspaceRelativeAttention`.

    Args:
        state: name → tensor.
    """
    return {_rename(name, _BLOCK): tensor for name, tensor in state.items()}


def convert_autoencoder(
    state: Mapping[str, Tensor], anchor_ids: Int[Tensor, " anchors"] | None = None
) -> dict[str, Tensor]:
    """An autoencoder's official state dict, relative or absolute, under our names.

    The result loads into :class:`RelativeAutoencoder` or :class:`AbsoluteAutoencoder`, whichever it came from.

    Args:
        state: name → tensor, with or without the prefix of a Lightning module.
        anchor_ids: ``(K,)`` the items that the anchors are (``anchors_idxs`` of the checkpoint's metadata); by default
            0 … K - 1.

    Raises:
        ValueError: it holds no autoencoder, or ``anchor_ids`` of another length.
    """
    wrapped = [name for name in state if _WRAPPERS.match(name)]
    chosen = wrapped or list(state)
    converted = {}
    for name in chosen:
        own = _WRAPPERS.sub("", name)
        if own != "anchors_latents":
            converted[_rename(_rename(own, _AUTOENCODER), _BLOCK)] = state[name]
    if "decoder_in.0.weight" not in converted:
        raise ValueError(f"state must hold decoder_in.0.weight of an autoencoder, got {list(state)[:5] or 'nothing'}")
    if "anchor_images" in converted:
        count = len(converted["anchor_images"])
        ids = torch.arange(count) if anchor_ids is None else anchor_ids
        if len(ids) != count:
            raise ValueError(f"anchor_ids must name {count} anchors, got {len(ids)}")
        converted["anchor_ids"] = ids
        converted["anchor_labels"] = converted["anchor_labels"].long()
    return converted


def convert_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stitching notebooks' head, an ``nn.Sequential``, under the names of :class:`StitchingHead`.

    Args:
        state: name → tensor: ``0`` LayerNorm, ``1`` and ``6`` linear layers.

    Raises:
        ValueError: other names.
    """
    unknown = [name for name in state if name.partition(".")[0] not in _HEAD]
    if unknown or len(state) != 2 * len(_HEAD):
        raise ValueError(f"state must hold weight and bias of the layers 0, 1 and 6, got {list(state)}")
    return {
        f"{_HEAD[layer]}.{kind}": tensor
        for (layer, _, kind), tensor in ((n.partition("."), t) for n, t in state.items())
    }


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
