"""State dicts of the official code (RAIVNLab/MRL) as ours.

Official names are ``nesting_classifier_{i}.weight`` and ``.bias`` (``nesting_classifier_0`` alone for MRL-E), below
``fc.`` in a whole ResNet, below ``module.`` where the model was saved out of DistributedDataParallel. Ours are the same
without the prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from headgate.methods.contrastive.matryoshka.head import MatryoshkaHead

__all__ = ["convert_state_dict", "head_from_official", "head_state_dict"]

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
_HEAD = re.compile(r"^(?:fc\.)?(nesting_classifier_(\d+)\.(?:weight|bias))$")


def convert_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict, of a head or of a whole ResNet, under our names.

    The result loads into :class:`MatryoshkaHead` or :class:`MatryoshkaResNet`, whichever it came from.

    Args:
        state: name → tensor, e.g. ``torch.load("final_weights.pt", weights_only=True)``.

    Raises:
        ValueError: it holds no nested classifier.
    """
    converted = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if not any(_HEAD.match(name) for name in converted):
        raise ValueError(f"state must hold nesting_classifier_0.weight, got {list(state)[:5] or 'nothing'}")
    return converted


def head_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The nested classifiers alone, for :class:`MatryoshkaHead`.

    Args:
        state: as in :func:`convert_state_dict`.

    Raises:
        ValueError: it holds no nested classifier.
    """
    converted = convert_state_dict(state)
    return {match[1]: tensor for name, tensor in converted.items() if (match := _HEAD.match(name))}


def head_from_official(state: Mapping[str, Tensor], dims: Sequence[int] | None = None) -> MatryoshkaHead:
    """Build the head that an official state dict belongs to, and load it.

    Args:
        state: as in :func:`convert_state_dict`.
        dims: the sizes of an MRL-E head, whose one weight matrix does not tell them; ``None`` for MRL, where the
            weights do.

    Raises:
        ValueError: no nested classifier, or ``dims`` that do not fit the weights.
    """
    weights = head_state_dict(state)
    matrices = [weights[f"nesting_classifier_{index}.weight"] for index in range(_count(weights))]
    widths = [matrix.shape[1] for matrix in matrices]
    dims = widths if dims is None else list(dims)
    tied = len(widths) == 1 and len(dims) > 1
    if (dims[-1:] if tied else dims) != widths:
        raise ValueError(f"dims must fit weights of {widths} columns, got {dims}")
    bias = "nesting_classifier_0.bias" in weights
    head = MatryoshkaHead(dims, matrices[0].shape[0], tied=tied, bias=bias, dtype=matrices[0].dtype)
    head.load_state_dict(weights)
    return head


def _count(weights: Mapping[str, Tensor]) -> int:
    count = sum(name.endswith(".weight") for name in weights)
    missing = [index for index in range(count) if f"nesting_classifier_{index}.weight" not in weights]
    if missing:
        raise ValueError(f"state must hold nesting_classifier_0 to _{count - 1}, {missing} are missing")
    return count
