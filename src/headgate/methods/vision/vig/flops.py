"""Multiply-adds of a backbone, counted on the meta device; and the count that the paper prints.

The paper's figures leave out the last product of SwiGLU, which sits in a custom autograd function that the authors'
counter did not see. A token, a head and a direction of the scan count 3·K·V: fade, write and read of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from headgate.methods.vision.vig.backbone import Backbone
from headgate.methods.vision.vig.feed_forward import SwiGLU
from headgate.validate import check_positive

__all__ = ["count_multiply_adds"]


def count_multiply_adds(model: Backbone, img_size: int | Sequence[int] = 224, *, as_published: bool = False) -> int:
    """Count the multiply-adds of one image's forward pass: all products, convolutions and scans.

    Args:
        model: a :class:`ViG` or :class:`ViGH`, on any device; nothing is computed.
        img_size: pixels, a number or (height, width).
        as_published: leave out the last product of every SwiGLU, as the paper's figures do.

    Returns:
        The count; FLOPs are twice as many.

    Raises:
        ValueError: a size that the model does not take.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    check_positive(height=height, width=width)
    unseen = 0

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal unseen
        assert isinstance(layer, SwiGLU)
        unseen += inputs[0].numel() * layer.hidden_dim

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, SwiGLU)]
    weights = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    first = model.patch_embedding.conv1.weight
    images = torch.empty(1, model.patch_embedding.in_chans, height, width, device="meta", dtype=first.dtype)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            functional_call(model, weights, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 - (unseen if as_published else 0)
