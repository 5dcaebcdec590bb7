r"""A diffusion network as an encoder: noise the image to step t, run the denoiser, read a block.

.. math:: f(x; b, t) = \text{output of block } b \text{ at } (x_t, t), \qquad
          x_t = \alpha_t x + \sigma_t \epsilon, \quad \epsilon \sim N(0, I)

Mukhopadhyay et al., "Diffusion Models Beat GANs on Image Classification" (arXiv 2307.08702); Xiang et al., "Denoising
Diffusion Autoencoders are Unified Self-supervised Learners" (arXiv 2303.09769).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.nn.diffusion.denoisers import Condition, denoise
from headgate.nn.diffusion.paths import Path, path_from_scheduler
from headgate.nn.diffusion.taps import LayerName, Pooling, Position, tap

__all__ = ["DiffusionFeatures", "FeatureKey"]

FeatureKey: TypeAlias = tuple[LayerName, float]
"""(layer, time)."""


class DiffusionFeatures:
    """Features of layers at times, from one pass of the denoiser per time; frozen and without a graph by default.

    Args:
        model: a denoiser that :func:`~headgate.nn.diffusion.denoise` can call.
        path: a :class:`~headgate.nn.diffusion.Path`, or a scheduler of diffusers.
        layers: module paths, patterns or block numbers from 1, as in :func:`~headgate.nn.diffusion.tap`.
        timesteps: times of the path: integers in [0, T) for ``VP``.
        pool: ``None``, ``"mean"``, ``"cls"`` or cells per side, as in :func:`~headgate.nn.diffusion.pool_features`.
        condition: as in :func:`~headgate.nn.diffusion.denoise`; a network with conditions needs one, or ``"null"``.
        generator: of the noise; each call goes on drawing from it. Without one, features are random.
        num_noise: features are averaged over so many draws of noise; the cost grows with it.
        stop_early: end each pass at the last wanted layer.
        latents: inputs are latents and need not lie in [-1, 1].
        position: ``"before_upsample"`` reads a U-Net's numbered blocks before what up-samples inside them.
        detach: whether no graph is kept; without it, gradients reach the denoiser.
        full_precision: return float32 at least.

    Raises:
        ValueError: no layer or time, a time outside the path's domain, or ``num_noise`` below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path | Any,
        layers: Sequence[LayerName],
        timesteps: Sequence[float],
        *,
        pool: Pooling = None,
        condition: Condition = None,
        generator: torch.Generator | None = None,
        num_noise: int = 1,
        stop_early: bool = True,
        latents: bool = False,
        position: Position = "after",
        detach: bool = True,
        full_precision: bool = True,
    ) -> None:
        if num_noise < 1:
            raise ValueError(f"num_noise must be at least 1, got {num_noise}")
        if not timesteps:
            raise ValueError("timesteps must hold at least one time, got none")
        self.model = model
        self.path = path if isinstance(path, Path) else path_from_scheduler(path)
        self.layers = list(layers)
        self.timesteps = list(timesteps)
        self.path.check_time(torch.tensor(self.timesteps))
        self.pool = pool
        self.condition = condition
        self.generator = generator
        self.num_noise = num_noise
        self.stop_early = stop_early
        self.latents = latents
        self.position = position
        self.detach = detach
        self.full_precision = full_precision
        with tap(model, self.layers, position=position):  # refuses unknown layers at once
            pass

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], noise: Tensor | None = None
    ) -> dict[FeatureKey, Tensor]:
        """Read the features of images.

        Args:
            images: ``(batch, channels, height, width)`` in [-1, 1] (latents: any range), on the model's device.
            noise: ε, of the shape of ``images``, the same for all times; with ``num_noise`` above 1 stacked along a new
                first axis. Default: drawn, anew for every image, time and draw.

        Returns:
            (layer, time) → maps ``(batch, C, h, w)``, tokens ``(batch, N, D)``, or what ``pool`` makes of them; times in
            their order, layers in that in which they run.

        Raises:
            TypeError: images that are not floating point.
            ValueError: images outside [-1, 1], noise of another shape, or as the denoiser and ``pool`` refuse.
        """
        self._check_images(images)
        draws = self._draws(images, noise)
        features: dict[FeatureKey, Tensor] = {}
        with self._frozen():
            for time in self.timesteps:
                t = torch.full((images.shape[0],), time, device=images.device)
                for draw in range(self.num_noise):
                    epsilon = self._draw(images) if draws is None else draws[draw]
                    for layer, value in self._read(images, epsilon, t).items():
                        key = (layer, time)
                        share = value / self.num_noise if self.num_noise > 1 else value
                        features[key] = features[key] + share if key in features else share
        return features

    def noisy(self, images: Tensor, noise: Tensor, time: float) -> Tensor:
        """x_t, in the dtype of the images."""
        t = torch.full((images.shape[0],), time, device=images.device)
        return self.path.add_noise(images, noise, t).to(images.dtype)

    def _read(self, images: Tensor, noise: Tensor, t: Tensor) -> dict[LayerName, Tensor]:
        x_t = self.path.add_noise(images, noise, t).to(images.dtype)
        with tap(
            self.model, self.layers, self.pool, self.detach, self.stop_early, self.position, self.full_precision
        ) as read:
            denoise(self.model, x_t, self.path.network_time(t), self.condition)
        return read

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """Evaluation mode, and no gradients where none are wanted; modes as before at the end."""
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def _draws(self, images: Tensor, noise: Tensor | None) -> Tensor | None:
        if noise is None:
            return None
        stacked = noise[None] if self.num_noise == 1 and noise.dim() == images.dim() else noise
        if stacked.shape != (self.num_noise, *images.shape):
            raise ValueError(
                f"noise must have the shape of images, {tuple(images.shape)}, for each of {self.num_noise} draws, "
                f"got {tuple(noise.shape)}"
            )
        return stacked

    def _draw(self, images: Tensor) -> Tensor:
        place = images.device if self.generator is None else self.generator.device
        return torch.randn(images.shape, generator=self.generator, device=place, dtype=torch.float32).to(
            images.device, images.dtype
        )

    def _check_images(self, images: Tensor) -> None:
        if images.dim() != 4:
            raise ValueError(f"images must have shape (batch, channels, height, width), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if self.latents or not images.numel():
            return
        low, high = (float(edge) for edge in images.detach().aminmax())
        if not (low >= -1.001 and high <= 1.001):
            hint = "; they look like 0..255: divide by 127.5 and subtract 1" if low >= 0 and high > 2 else ""
            raise ValueError(f"images must lie in [-1, 1], got {low:g}..{high:g}{hint}")
