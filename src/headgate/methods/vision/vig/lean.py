"""One block in place: inference on a CPU, in little time and memory.

The block's modules, one after the other, each hold their results for all tokens: on a large picture that is several times
the picture. Here normed tokens exist for a strip of rows at a time, queries, keys, values, gates and outputs for a group
of heads, and what is token-wise for some dozen tokens; x_s alone is kept whole. The values are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from headgate.methods.vision.vig.positions import rotate

if TYPE_CHECKING:
    from headgate.methods.vision.vig.block import ViGBlock
    from headgate.methods.vision.vig.layer import BidirectionalGLA

__all__ = ["advance", "may_overwrite"]

_LARGE = 1024
"""Tokens of a batch from which on memory counts more than the calls that save it."""
_GROUPS = 3
"""Into how many groups the heads are cut there, at most."""


def may_overwrite(model: nn.Module, features: Float[Tensor, "batch dim rows columns"]) -> bool:
    """Whether the parts of ``model`` may be fused, and the maps within it written over.

    They may not where somebody else looks at them: autograd, a compiler, a counter of operations, or a hook.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training or type(features) is not Tensor:
        return False
    if (
        torch._C._get_tracing_state() is not None
        or _get_current_dispatch_mode() is not None
        or features.device.type != "cpu"
    ):
        return False
    if features.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu") or not features.numel():
        return False
    return not nn.modules.module._has_any_global_hook() and not _is_hooked(model)


def advance(block: ViGBlock, features: Float[Tensor, "batch dim rows columns"], *, in_place: bool) -> Tensor:
    """What ``block`` makes of ``features`` in evaluation mode.

    Blocks that the compiled form does not cover are run part by part.

    Args:
        block: the block; :func:`may_overwrite` must hold.
        features: a map ``(batch, dim, rows, columns)``.
        in_place: write the result over ``features`` where it lies in channels-last order.
    """
    from headgate.methods.vision.vig import native  # numba is slow to import

    weights, mixer = native.find_weights(block), block.mixer
    if weights is None:
        return block.by_modules(features)
    picture = features.permute(0, 2, 3, 1)
    picture = picture.contiguous() if in_place else picture.clone(memory_format=torch.contiguous_format)
    local, tokens = native.local_features(weights, picture).flatten(0, 2), picture.flatten(0, 2)
    size = -(-mixer.num_heads // (_GROUPS if len(tokens) >= _LARGE else 1))
    for first in range(0, mixer.num_heads, size):
        heads = range(first, min(mixer.num_heads, first + size))
        qkv, gates = native.project(weights, heads, local)
        scanned = _scan(mixer, picture.shape, len(heads), qkv, gates)
        del qkv, gates
        native.add_merged(weights, heads, local, scanned, tokens, heads.stop == mixer.num_heads)
    return picture.permute(0, 3, 1, 2)


def _is_hooked(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return any(part is not None and _is_hooked(part) for part in module._modules.values())


def _scan(
    mixer: BidirectionalGLA,
    shape: torch.Size,
    num_heads: int,
    qkv: Float[Tensor, "tokens qkv"],
    gates: Float[Tensor, "tokens gates"],
) -> Float[Tensor, "tokens width"]:
    """o of a group of heads, side by side, for pictures of ``shape``."""
    from headgate.ops.gated_linear_attention import native

    batch, rows, columns, _ = shape
    key = mixer.key_dim // mixer.num_heads
    width = num_heads * key
    # The kernels themselves: what the functions in front of them check, such as gates of at most one, is so here.
    q, k, forward, backward = (
        x.view(batch, rows * columns, num_heads, key)
        for x in (qkv[:, :width], qkv[:, width : 2 * width], gates[:, :width], gates[:, -width:])
    )
    v = qkv[:, 2 * width :].view(batch, rows * columns, num_heads, -1)
    if mixer.rotary:
        q, k = (rotate(x, (rows, columns), mixer.rotary) for x in (q, k))
    if mixer.bidirectional:
        o = native.bidirectional(q, k, v, forward, backward, None, key**-0.5)
    else:
        o, _ = native.forward(q, k, v, forward, None, None, key**-0.5, False)
    if mixer.official_eval_halving:
        o.div_(2)
    return o.view(batch * rows * columns, -1)
