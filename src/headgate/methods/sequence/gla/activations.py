"""The element-wise functions that published configurations name: feature maps of queries and keys, output gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "find_activation"]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": _squared_relu,
    "gelu": _tanh_gelu,
}
"""Name, as in flash-linear-attention, → function. Its ``gelu`` is the approximation by tanh."""


def find_activation(argument: str, name: str) -> Callable[[Tensor], Tensor]:
    """The function called ``name``.

    Args:
        argument: the argument that holds the name, for the message.
        name: a key of :data:`ACTIVATIONS`.

    Raises:
        ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument} must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]
