"""The ADM U-Net as a model that is saved, loaded and made by name."""

from __future__ import annotations

from typing import Any

from headgate.nn import diffusion
from headgate.train.hub import HubModel

__all__ = ["ADMUNet", "adm_unet_256"]


class ADMUNet(HubModel, diffusion.ADMUNet):
    """:class:`headgate.nn.diffusion.ADMUNet`, with its arguments, that goes to a folder or the hub and comes back."""


def adm_unet_256(**options: Any) -> ADMUNet:
    """The unconditional network for 256 pixels, 553 million parameters, as in ``256x256_diffusion_uncond.pt``.

    Args:
        **options: keywords of :class:`ADMUNet`, in place of the preset's.
    """
    return ADMUNet(**{"image_size": 256, "model_channels": 256, **options})
