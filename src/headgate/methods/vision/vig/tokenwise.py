"""Functions of single tokens, computed a few hundred tokens at a time where that saves time and memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["map_tokens"]

_TOKENS_AT_ONCE = 256
"""A wide layer's intermediate results for so many tokens still fit into a core's cache."""


def map_tokens(
    module: nn.Module, function: Callable[..., Tensor], channels: int, *tensors: Float[Tensor, "batch length _"]
) -> Float[Tensor, "batch length channels"]:
    """Apply a function of single tokens, in inference on a CPU block by block.

    Intermediate results then stay in the cache and never exist for all tokens at once. Everywhere else it is one plain
    call: where gradients are recorded intermediate results are kept anyway, compilers and other devices fuse by
    themselves, the results of narrow dtypes may be wider than their arguments, and hooks want to see all tokens.

    Args:
        module: whose parameters ``function`` uses.
        function: maps tensors ``(batch, length, ...)`` to ``(batch, length, channels)``, each token by itself.
        channels: of the result.
        *tensors: its arguments.

    Returns:
        What ``function`` returns for all tokens.
    """
    first = tensors[0]
    if torch.compiler.is_compiling():
        return function(*tensors)
    tokens, block = first.shape[0] * first.shape[1], _TOKENS_AT_ONCE * torch.get_num_threads()
    if tokens <= block or not _in_blocks(module, first):
        return function(*tensors)
    flat = [x.flatten(0, 1) for x in tensors]
    # Made before the intermediate results, so that it does not come to lie behind the holes they leave.
    result = first.new_empty(tokens, channels)
    for start in range(0, tokens, block):
        result[start : start + block] = function(*(x[None, start : start + block] for x in flat))[0]
    return result.view(*first.shape[:2], channels)


def _in_blocks(module: nn.Module, x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    return x.dtype in (torch.float32, torch.float64) and not hooked
