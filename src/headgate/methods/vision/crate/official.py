"""Models and weights of the published code (Ma-Lab-Berkeley/CRATE) in this library's modules.

Parameters have the published names, so only the wrapping is taken off and the names are checked:

    state = torch.load("crate_small.pth", weights_only=True)
    model = crate_small()
    model.load_state_dict(convert_state_dict(state))

A checkpoint of the published training script keeps its weights under ``"state_dict"``, one of the fine-tuning script under
``"model"``; both are found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headgate.methods.vision.crate.model import CRATE

__all__ = ["build_crate", "convert_state_dict"]

_NAMES = re.compile(
    r"pos_embedding|cls_token"
    r"|to_patch_embedding\.[123]\.(weight|bias)"
    r"|transformer\.layers\.\d+\.[01]\.norm\.(weight|bias)"
    r"|transformer\.layers\.\d+\.0\.fn\.(qkv\.weight|to_out\.0\.(weight|bias))"
    r"|transformer\.layers\.\d+\.1\.fn\.weight"
    r"|mlp_head\.[01]\.(weight|bias)"
)
_KEYWORDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_classes": "num_classes",
    "dim": "dim",
    "depth": "depth",
    "heads": "heads",
    "pool": "pool",
    "channels": "in_chans",
    "dropout": "dropout",
    "emb_dropout": "embedding_dropout",
    "ista": "step_size",
}


def build_crate(config: Mapping[str, Any]) -> CRATE:
    """Build a published model (``CRATE`` of ``model/crate.py``).

    Args:
        config: its keywords; what is left out has its published default (``dim_head`` 64, whatever ``dim`` is).
            ``mlp_dim`` is accepted and not looked at, as there.

    Returns:
        Our model, freshly initialised.

    Raises:
        ValueError: an unknown keyword, one that is missing, or a patch that is no square.
    """
    options = dict(config)
    options.pop("mlp_dim", None)
    arguments: dict[str, Any] = {"dim_head": options.pop("dim_head", 64)}
    patch = options.get("patch_size")
    if isinstance(patch, list | tuple):
        if len(set(patch)) != 1:
            raise ValueError(f"patch_size must be square, got {tuple(patch)}")
        options["patch_size"] = patch[0]
    for name, ours in _KEYWORDS.items():
        if name in options:
            arguments[ours] = options.pop(name)
    if options:
        raise ValueError(f"CRATE has no keyword {next(iter(options))!r}")
    for name in ("image_size", "patch_size", "num_classes", "dim", "depth", "heads"):
        if _KEYWORDS[name] not in arguments:
            raise ValueError(f"CRATE needs the keyword {name!r}")
    return CRATE(**arguments)


def convert_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the wrapping off published weights.

    Args:
        state: a ``state_dict()``, with or without the prefix ``module.`` of DataParallel, or a checkpoint that holds one
            under ``"state_dict"`` or ``"model"``.

    Returns:
        A state dict for :class:`CRATE`.

    Raises:
        ValueError: a name that the published model does not have.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
            break
    converted = {name.removeprefix("module."): value for name, value in state.items()}
    for name in converted:
        if not _NAMES.fullmatch(name):
            raise ValueError(f"{name!r} is no weight of a published CRATE")
    return converted
