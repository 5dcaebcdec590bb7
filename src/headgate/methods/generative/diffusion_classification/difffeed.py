r"""DifFeed: what the way up has seen is fed back to the way down, and a second pass is read (arXiv 2311.17921).

With N numbered blocks, a first pass collects the maps of blocks b on the way up; each goes through a 1×1 convolution, batch
norm and ReLU to the width of input block N + 1 - b, its mirror image, is resized bilinearly and added to the output of that
block in a second pass over the same noisy image. The read block of the second pass goes to a head. Head and feedback are
trained, the U-Net is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.nn.diffusion import ADMUNet

__all__ = ["DifFeed"]


class DifFeed(nn.Module):
    """A frozen U-Net with trained feedback, and a head on one of its blocks.

    Args:
        unet: unconditional; its parameters are frozen, and it stays in evaluation mode.
        head: takes the maps of ``read_block``, e.g. an ``AttentionHead``.
        feedback_blocks: numbers of output blocks whose maps are fed back.
        read_block: number of the block that is read in the second pass.

    Raises:
        ValueError: no block, a block that is none of the U-Net's or no output block, or a class-conditional U-Net.
    """

    def __init__(
        self,
        unet: ADMUNet,
        head: nn.Module,
        feedback_blocks: Sequence[int] = (21, 24, 27, 30, 33, 36),
        read_block: int = 24,
    ) -> None:
        super().__init__()
        total, inputs = unet.num_blocks, len(unet.input_blocks)
        if unet.num_classes is not None:
            raise ValueError(f"unet must be unconditional, got one of {unet.num_classes} classes")
        if not feedback_blocks:
            raise ValueError("feedback_blocks must name at least one block, got none")
        for number in feedback_blocks:
            if not inputs + 2 <= number <= total:
                raise ValueError(f"feedback_blocks must be output blocks {inputs + 2}..{total}, got {number}")
        if not 1 <= read_block <= total:
            raise ValueError(f"read_block must lie in 1..{total}, got {read_block}")
        self.feedback_blocks = tuple(feedback_blocks)
        self.read_block = read_block
        self.unet = unet.requires_grad_(False)
        self.head = head
        widths = unet.block_channels
        self.feedback = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[number - 1], widths[total - number], 1, bias=False),
                nn.BatchNorm2d(widths[total - number]),
                nn.ReLU(),
            )
            for number in feedback_blocks
        )
        self.train(self.training)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """Classify noisy images.

        Args:
            x: x_t ``(batch, in_channels, height, width)``.
            timesteps: ``(batch,)`` integer steps.

        Returns:
            What the head gives.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape.
        """
        return self.head(self.forward_features(x, timesteps))

    def forward_features(
        self, x: Float[Tensor, "batch channels height width"], timesteps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch width h w"]:
        """The map of ``read_block`` in the second pass; arguments as of :meth:`forward`."""
        with torch.no_grad():
            seen = self.unet.forward_blocks(x, timesteps, self.feedback_blocks)
        total = self.unet.num_blocks
        told = {
            total + 1 - number: layer(maps)
            for number, layer, maps in zip(self.feedback_blocks, self.feedback, seen, strict=True)
        }
        return self.unet.forward_blocks(x, timesteps, [self.read_block], feedback=told)[0]

    def train(self, mode: bool = True) -> Self:
        """Set the mode of feedback and head; the U-Net stays in evaluation mode."""
        super().train(mode)
        self.unet.eval()
        return self
