"""The paper's ImageNet model: ResNet-50 with blurred downsampling and nested classifiers.

He et al., "Deep Residual Learning" (CVPR 2016), with the stride on the 3×3 convolution, and a fixed 3×3 binomial blur
in front of every strided convolution with at least 16 input channels (Zhang, "Making Convolutional Networks
Shift-Invariant Again", ICML 2019). Parameters carry the names of torchvision's ResNet, the blurred convolutions those of
the official code, so that its checkpoints load (:mod:`headgate.methods.contrastive.matryoshka.official`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.contrastive.matryoshka.head import MatryoshkaHead
from headgate.methods.contrastive.matryoshka.sizes import check_dims, nested_dims
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["MatryoshkaResNet"]

_EXPANSION = 4
_BLUR_FROM_CHANNELS = 16


class MatryoshkaResNet(nn.Module):
    """Bottleneck ResNet whose pooled output is classified at every size of a nesting set.

    Args:
        num_classes: C.
        dims: sizes in increasing order, the last one ``32 · width``; ``None`` is the paper's set, 8 to ``32 · width``.
        tied: MRL-E in place of MRL.
        layers: bottleneck blocks of the four stages; (3, 4, 6, 3) is ResNet-50.
        width: channels of the stem; 64 gives 2048 features.
        blur: blur in front of strided convolutions.

    Raises:
        ValueError: ``dims`` does not end at ``32 · width``, or a number is not positive.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        num_classes: int = 1000,
        dims: Sequence[int] | None = None,
        *,
        tied: bool = False,
        layers: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        blur: bool = True,
    ) -> None:
        super().__init__()
        check_positive(width=width, **{f"layers[{index}]": count for index, count in enumerate(layers)})
        features = 8 * width * _EXPANSION
        self.dims = nested_dims(features) if dims is None else check_dims(dims)
        if len(layers) != 4:
            raise ValueError(f"layers must hold the four stages' numbers of blocks, got {list(layers)}")
        if self.dims[-1] != features:
            raise ValueError(f"dims must end with the {features} features of width={width}, got {list(self.dims)}")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(layers):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Bottleneck(channels, width * 2**stage, stride, blur))
                channels = width * 2**stage * _EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = MatryoshkaHead(self.dims, num_classes, tied=tied)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Embed images: the pooled output of the last stage, ``(batch, dims[-1])``.

        Args:
            images: standardised, ``(batch, 3, height, width)``, sides of 32 pixels or more.

        Raises:
            TypeError: not floating, or of another dtype than the weights.
            ValueError: another shape, or smaller than 32 pixels.
        """
        check_shape("images", images, (None, 3, None, None), "batch, channels, height, width")
        check_floating("images", images, like=self.conv1.weight.dtype)
        if min(images.shape[2:]) < 32:
            raise ValueError(f"images must be at least 32 pixels high and wide, got {tuple(images.shape)}")
        hidden = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = stage(hidden)
        return hidden.mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[Float[Tensor, "batch classes"], ...]:
        """Classify images at every size.

        Args:
            images: as in :meth:`forward_features`.

        Returns:
            One tensor ``(batch, num_classes)`` per size, in the order of ``dims``.
        """
        return self.fc(self.forward_features(images))


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around which the input is added."""

    def __init__(self, channels: int, width: int, stride: int, blur: bool) -> None:
        super().__init__()
        wide = width * _EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride, blur)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != wide:
            self.downsample = nn.Sequential(_convolution(channels, wide, 1, stride, blur), nn.BatchNorm2d(wide))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch wide height2 width2"]:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        hidden = self.bn3(self.conv3(hidden))
        return F.relu(hidden + (x if self.downsample is None else self.downsample(x)))


class _BlurredConv(nn.Module):
    """A fixed 3×3 binomial blur of every channel, then a convolution."""

    blur_filter: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("blur_filter", torch.outer(line, line).repeat(conv.in_channels, 1, 1, 1))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out height2 width2"]:
        return self.conv(F.conv2d(x, self.blur_filter.to(x.dtype), padding=1, groups=x.shape[1]))


def _convolution(channels: int, out: int, size: int, stride: int, blur: bool) -> nn.Module:
    conv = nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, bias=False)
    return _BlurredConv(conv) if blur and stride > 1 and channels >= _BLUR_FROM_CHANNELS else conv
