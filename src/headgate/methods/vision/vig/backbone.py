"""What both backbones share: images in, logits or feature maps out, a classifier that can be replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.vision.vig.hub import HubModel
from headgate.methods.vision.vig.lean import may_overwrite
from headgate.nn.patch_embedding import ConvPatchEmbedding

__all__ = ["SMALLEST_IMAGE", "Backbone"]

SMALLEST_IMAGE = 16
"""Pixels to a side."""

Maps = list[Float[Tensor, "batch dim rows columns"]]


class Backbone(nn.Module, HubModel, ABC):
    """An image network after the conventions of timm.

    Args:
        num_features: channels that the classifier reads.
        num_classes: classes; 0 for no classifier.
        num_maps: how many feature maps there are.
        features_only: whether ``forward`` returns feature maps in place of logits.
        out_indices: which ones: positions, or n for the last n; ``None`` for all.

    Raises:
        ValueError: negative ``num_classes``, maps that do not exist, or maps asked for without ``features_only``.
    """

    patch_embedding: ConvPatchEmbedding
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        num_maps: int,
        features_only: bool,
        out_indices: int | Sequence[int] | None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or more, got {num_classes}")
        if out_indices is not None and not features_only:
            raise ValueError(f"out_indices needs features_only=True, got out_indices={out_indices!r}")
        self.num_features = self.embed_dim = num_features
        self.num_classes = num_classes
        self.features_only = features_only
        self.out_indices = _choose("out_indices", out_indices, num_maps)

    @abstractmethod
    def _embed(self, images: Tensor) -> Float[Tensor, "batch dim rows columns"]:
        """What the first of :meth:`_steps` reads."""

    @abstractmethod
    def _steps(self) -> nn.ModuleList:
        """The parts of the network, each of which maps a feature map to the next one."""

    @abstractmethod
    def _finish(self, features: Float[Tensor, "batch dim rows columns"]) -> Tensor:
        """What :meth:`forward_features` makes of the last map."""

    @abstractmethod
    def _init_linear(self, layer: nn.Linear) -> None:
        """Draw the weights of a linear layer."""

    @abstractmethod
    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Float[Tensor, "batch classes"]:
        """Pool what :meth:`forward_features` returned, and classify; with ``pre_logits`` return the pooled features."""

    def forward(self, images: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"] | Maps:
        """Classify images, or, with ``features_only``, turn them into feature maps.

        Args:
            images: standardised, ``(batch, in_chans, height, width)``, at least 16 pixels high and wide.

        Returns:
            Logits ``(batch, num_classes)``, or a list of maps ``(batch, channels, rows, columns)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or a size that the model does not take.
        """
        if self.features_only:
            return self.forward_maps(images, self.out_indices)
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Float[Tensor, "batch chans height width"]) -> Tensor:
        """The normed output of the last block, before pooling; arguments as of :meth:`forward`."""
        features = self._embed(images)
        in_place = may_overwrite(self, features)
        for step in self._steps():
            features = step.advance(features, in_place=in_place)  # type: ignore[operator]
        return self._finish(features)

    def forward_maps(
        self, images: Float[Tensor, "batch chans height width"], indices: int | Sequence[int] | None = None
    ) -> Maps:
        """Feature maps for dense prediction; what lies behind the last one is not computed.

        Args:
            images: as of :meth:`forward`.
            indices: positions of the maps, or n for the last n; default all.

        Returns:
            Maps ``(batch, channels, rows, columns)``, without a norm, in rising order.

        Raises:
            ValueError: a map that does not exist.
        """
        chosen = _choose("indices", indices, len(self._steps()))
        features = self._embed(images)
        maps = []
        for index, step in enumerate(self._steps()[: chosen[-1] + 1]):
            features = step(features)
            if index in chosen:
                maps.append(features)
        return maps

    def forward_intermediates(
        self,
        images: Float[Tensor, "batch chans height width"],
        indices: int | Sequence[int] | None = None,
        *,
        intermediates_only: bool = False,
    ) -> Maps | tuple[Tensor, Maps]:
        """Feature maps, and what :meth:`forward_features` returns, from one pass.

        Args:
            images: as of :meth:`forward`.
            indices: as of :meth:`forward_maps`.
            intermediates_only: leave out the features.

        Returns:
            The features and the maps, or the maps alone.
        """
        if intermediates_only:
            return self.forward_maps(images, indices)
        last = len(self._steps()) - 1
        chosen = _choose("indices", indices, last + 1)
        maps = self.forward_maps(images, sorted({*chosen, last}))
        return self._finish(maps[-1]), maps[: len(chosen)]

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier in place of the last layer.

        Args:
            num_classes: classes; 0 for no classifier.

        Raises:
            ValueError: ``num_classes`` is negative, or the model returns feature maps only.
        """
        if num_classes < 0 or self.features_only:
            raise ValueError(f"num_classes must be 0 or more, for a model with a classifier, got {num_classes}")
        weight = next(self.norm.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            self._init_linear(self.head)
        self.num_classes = num_classes
        self._remember(num_classes=num_classes)


def _choose(name: str, indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Which of ``count`` maps are asked for, in rising order."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"{name} must be at least 1 and at most the {count} maps there are, got {indices}")
        return list(range(count - indices, count))
    chosen = sorted(index + count if index < 0 else index for index in indices)
    if not chosen or len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= count:
        raise ValueError(f"{name} must name different ones of {count} maps, got {list(indices)}")
    return chosen
