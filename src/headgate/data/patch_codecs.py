r"""Codecs of images by patches that need no training: latents for small diffusion models.

:class:`PatchPCA` takes the first principal components of p × p patches. Component k with deviation s_k is divided by
:math:`1.3\,\sqrt{s_k \bar s}` with :math:`\bar s` the mean deviation: half of a whitening, since whole whitening makes
components of noise as large as those of content.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headgate.validate import check_divides, check_shape

__all__ = ["PatchPCA"]


class PatchPCA:
    """Images ``(n, c, h, w)`` ↔ latents ``(n, z, h / p, w / p)``, linear in both directions.

    Args:
        images: to take the components from, ``(n, c, h, w)``.
        patch_size: p, side of a patch.
        channels: z, components that are kept, at most c p².

    Raises:
        ValueError: sides that are no whole patches, or too many channels.
    """

    def __init__(self, images: Float[Tensor, "n c h w"], patch_size: int = 4, channels: int = 8) -> None:
        self.patch_size = patch_size
        self.image_channels = images.shape[1]
        if not 1 <= channels <= self.image_channels * patch_size**2:
            raise ValueError(
                f"channels must lie in 1..{self.image_channels * patch_size**2} for patches of {patch_size} pixels, "
                f"got {channels}"
            )
        patches = self._cut(images).flatten(0, 2).double()
        self.mean = patches.mean(dim=0)
        centred = patches - self.mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        deviations = values.clamp(min=0).sqrt().flip(0)[:channels]
        components = vectors.flip(1)[:, :channels]
        # An eigenvector's sign is the library's whim: the entry that is largest in size shall be positive.
        largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
        self.components = components * largest.sign()
        self.scale = 1.3 * (deviations * deviations.mean()).sqrt()

    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n z rows columns"]:
        """Latents of images, in their dtype."""
        scores = (self._cut(images).double() - self.mean) @ self.components / self.scale
        return scores.permute(0, 3, 1, 2).to(images.dtype)

    def decode(self, latents: Float[Tensor, "n z rows columns"]) -> Float[Tensor, "n c h w"]:
        """Images of latents, the nearest that the kept components allow; not clipped."""
        check_shape("latents", latents, (None, len(self.scale), None, None), "n, z, rows, columns")
        n, _, rows, columns = latents.shape
        p = self.patch_size
        patches = (latents.permute(0, 2, 3, 1).double() * self.scale) @ self.components.T + self.mean
        pixels = patches.reshape(n, rows, columns, self.image_channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(n, self.image_channels, rows * p, columns * p).to(latents.dtype)

    def _cut(self, images: Tensor) -> Float[Tensor, "n rows columns values"]:
        check_shape("images", images, (None, self.image_channels, None, None), "n, channels, height, width")
        p = self.patch_size
        check_divides(patch_size=p, height=images.shape[2])
        check_divides(patch_size=p, width=images.shape[3])
        n, c, h, w = images.shape
        return images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, h // p, w // p, -1)
