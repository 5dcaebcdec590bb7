"""An encoder and a head as one classifier of images, used as scikit-learn's are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.generative.diffusion_classification.attention import DifFormer
from headgate.methods.generative.diffusion_classification.recipe import HeadRecipe, central_crop, train_head
from headgate.nn.diffusion import DiffusionFeatures, tokens_to_maps

__all__ = ["DiffusionClassifier"]


class DiffusionClassifier:
    """Classify images by what a denoiser makes of them.

    Args:
        encoder: reads maps (without ``pool``): one layer at one time; for a :class:`DifFormer` all of its layers at all of
            its times. Tokens that form a square are laid out as a map.
        head: e.g. a :class:`LinearProbe` or :class:`AttentionHead`.
        recipe: how the head is trained; default: the linear head's.
        seed: of the training, and of the noise where the encoder has no generator of its own.

    Attributes:
        classes_: the labels seen, rising, once fitted on arrays.
    """

    def __init__(
        self, encoder: DiffusionFeatures, head: nn.Module, recipe: HeadRecipe | None = None, *, seed: int = 0
    ) -> None:
        cells = len(encoder.layers) * len(encoder.timesteps)
        if cells != 1 and not isinstance(head, DifFormer):
            raise ValueError(f"encoder must read one layer at one time for {type(head).__name__}, got {cells} cells")
        self.encoder = encoder
        self.head = head
        self.recipe = HeadRecipe() if recipe is None else recipe
        self.seed = seed
        self.classes_: Int[np.ndarray, " classes"] | None = None

    def fit(self, data: Any, labels: Any = None) -> Self:
        """Train the head, and the denoiser, too, where the recipe says so.

        Args:
            data: images ``(n, channels, height, width)`` in [-1, 1], an array or a tensor; or a loader of batches
                (images, labels).
            labels: ``(n,)`` integers in [0, K) for arrays.

        Raises:
            TypeError: labels that are no integers.
            ValueError: lengths that differ, or labels beyond the head's classes.
        """
        batches: Any = data
        if isinstance(data, np.ndarray | Tensor):
            images, targets = self._images(data), torch.as_tensor(labels)
            if targets.is_floating_point() or targets.dtype == torch.bool:
                raise TypeError(f"labels must be integers, got {targets.dtype}")
            if targets.shape != images.shape[:1]:
                raise ValueError(f"labels must have shape ({len(images)},), got {tuple(targets.shape)}")
            known = getattr(self.head, "num_classes", None)
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or (known is not None and high >= known):
                raise ValueError(f"labels must lie in 0..{'' if known is None else known - 1}, got {low}..{high}")
            self.classes_ = np.unique(targets.cpu().numpy())
            batches = (images, targets.long())
        elif labels is not None or not isinstance(data, Iterable):
            raise TypeError("data must be an array of images with labels, or a loader of both")
        keeps_no_graph, self.encoder.detach = self.encoder.detach, not self.recipe.finetune
        try:
            train_head(self.head, self.read, batches, self.recipe, encoder=self.encoder.model, seed=self.seed)
        finally:
            self.encoder.detach = keeps_no_graph
        return self

    def decision_function(self, data: Any, batch_size: int = 256) -> Float[np.ndarray, "n classes"]:
        """Logits of images ``(n, channels, height, width)``; one draw of noise for each, or as many as the encoder takes."""
        images = self._images(data)
        if self.recipe.crop is not None:
            images = central_crop(images, self.recipe.crop)
        mode = self.head.training
        try:
            self.head.eval()
            with torch.no_grad():
                parts = [self.head(self.read(part)) for part in images.split(batch_size)]
        finally:
            self.head.train(mode)
        return torch.cat(parts).float().cpu().numpy()

    def predict_proba(self, data: Any) -> Float[np.ndarray, "n classes"]:
        """Probabilities of the classes."""
        return torch.from_numpy(self.decision_function(data)).softmax(dim=1).numpy()

    def predict(self, data: Any) -> Int[np.ndarray, " n"]:
        """The likeliest class of each image."""
        return self.decision_function(data).argmax(axis=1)

    def score(self, data: Any, labels: Any) -> float:
        """Share of images that are classified rightly."""
        truth = np.asarray(labels)
        if truth.shape != (len(data),):
            raise ValueError(f"labels must have shape ({len(data)},), got {truth.shape}")
        return float((self.predict(data) == truth).mean())

    def read(self, images: Tensor) -> Any:
        """What the head takes: one map, or for a :class:`DifFormer` a list per time of a map per layer."""
        features = {
            key: tokens_to_maps(value) if value.dim() == 3 else value for key, value in self.encoder(images).items()
        }
        if not isinstance(self.head, DifFormer):
            (only,) = features.values()
            return only
        return [[features[layer, time] for layer in self.encoder.layers] for time in self.encoder.timesteps]

    def _images(self, data: Any) -> Tensor:
        images = torch.as_tensor(data)
        return images.to(next(self.head.parameters()).dtype) if images.dtype == torch.float64 else images
