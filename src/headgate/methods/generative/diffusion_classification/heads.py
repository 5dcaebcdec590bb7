"""Classifiers of one feature map: linear, with hidden layers, and convolutional.

Heads A to C of Mukhopadhyay et al. (arXiv 2307.08702); A and B as in soumik-kanad/diffssl, where a map is first pooled to p × p
cells. The layout of the convolutional head is not published.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["ConvHead", "LinearProbe", "MLPHead"]


class MLPHead(nn.Module):
    """Pool a map to p × p cells, flatten, hidden layers with ReLU, classify.

    Args:
        in_channels: C of the maps.
        num_classes: K.
        hidden_dims: widths of the hidden layers.
        pool: p; the first layer sees C p² numbers.
        official_quirks: as the published code, pool a map that has fewer cells than p × p, too, repeating its cells.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden_dims: Sequence[int] = (2048,),
        *,
        pool: int = 2,
        official_quirks: bool = False,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes, pool=pool)
        check_positive(**{f"hidden_dims[{index}]": width for index, width in enumerate(hidden_dims)})
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.pool = pool
        self.official_quirks = official_quirks
        widths = [in_channels * pool**2, *hidden_dims, num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Classify maps ``(batch, in_channels, height, width)``.

        Returns:
            Logits ``(batch, num_classes)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, or maps with fewer cells than are pooled to.
        """
        check_maps(features, self.in_channels, self.layers[0].weight)
        if min(features.shape[2:]) < self.pool and not self.official_quirks:
            raise ValueError(
                f"features must have at least pool={self.pool} cells a side, got maps of {tuple(features.shape[2:])}"
            )
        x = F.adaptive_avg_pool2d(features, self.pool).flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class LinearProbe(MLPHead):
    """Pool a map to p × p cells, flatten, classify.

    Args:
        in_channels: C of the maps.
        num_classes: K.
        pool: p; the layer sees C p² numbers.
        official_quirks: as of :class:`MLPHead`.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_channels: int, num_classes: int, *, pool: int = 2, official_quirks: bool = False) -> None:
        super().__init__(in_channels, num_classes, (), pool=pool, official_quirks=official_quirks)


class ConvHead(nn.Module):
    """Two 3×3 convolutions of stride 2, each with batch norm and ReLU, the mean over what is left, classify.

    Args:
        in_channels: C of the maps.
        num_classes: K.
        widths: of the two convolutions.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: tuple[int, int] = (512, 256)) -> None:
        super().__init__()
        first, second = widths
        check_positive(in_channels=in_channels, num_classes=num_classes, first_width=first, second_width=second)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_channels, first, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(second)
        self.classifier = nn.Linear(second, num_classes)

    def forward(self, features: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Classify maps ``(batch, in_channels, height, width)``.

        Returns:
            Logits ``(batch, num_classes)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape.
        """
        check_maps(features, self.in_channels, self.conv1.weight)
        x = F.relu(self.norm1(self.conv1(features)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def check_maps(features: Tensor, channels: int, weight: Tensor | nn.Module, name: str = "features") -> None:
    """Refuse what are no maps of so many channels in the dtype of ``weight``."""
    check_shape(name, features, (None, channels, None, None), "batch, channels, height, width")
    assert isinstance(weight, Tensor)
    check_floating(name, features, like=weight.dtype)
