"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from headgate.methods.contrastive.relative_representations.attention import RelativeAttention
from headgate.methods.contrastive.relative_representations.autoencoder import AbsoluteAutoencoder, RelativeAutoencoder
from headgate.methods.contrastive.relative_representations.encoder import RelativeEncoder
from headgate.methods.contrastive.relative_representations.head import StitchingHead
from headgate.methods.contrastive.relative_representations.projection import RelativeProjection
from headgate.methods.contrastive.relative_representations.quantize import RelativeQuantizer
from headgate.methods.contrastive.relative_representations.stitching import StitchedAutoencoder, StitchedModel
from headgate.methods.contrastive.relative_representations.subspaces import SubspaceRelativeAttention
from headgate.testing import BadInput, ContractCase
from headgate.validate import check_floating, check_shape

__all__ = ["CASES"]

_ANCHORS, _DIM, _CLASSES = 5, 6, 3


def _items(generator: Generator) -> tuple[Any, ...]:
    return (torch.randn(4, _DIM, generator=generator),)


def _with_anchors(generator: Generator) -> tuple[Any, ...]:
    return *_items(generator), torch.randn(_ANCHORS, _DIM, generator=generator)


def _with_labels(generator: Generator) -> tuple[Any, ...]:
    return *_with_anchors(generator), torch.arange(_ANCHORS) % _CLASSES


def _codes(generator: Generator) -> tuple[Any, ...]:
    return (torch.randn(4, _ANCHORS, generator=generator),)


def _images(generator: Generator) -> tuple[Any, ...]:
    return (torch.rand(3, 2, 8, 7, generator=generator),)


class _Encoder(nn.Linear):
    """Stands for a user's encoder that looks at its input."""

    def forward(self, x: Tensor) -> Tensor:
        check_shape("x", x, (None, self.in_features), "batch, dim")
        check_floating("x", x, like=self.weight.dtype)
        return super().forward(x)


def _block(**options: Any) -> Callable[[], nn.Module]:
    return lambda: RelativeAttention(_ANCHORS, _DIM, **options)


def _projection(**options: Any) -> Callable[[], nn.Module]:
    return lambda: RelativeProjection(torch.randn(_ANCHORS, _DIM), **options)


def _encoder(**options: Any) -> Callable[[], nn.Module]:
    return lambda: RelativeEncoder(_Encoder(_DIM, 4), torch.randn(_ANCHORS, _DIM), 4, **options)


def _autoencoder() -> RelativeAutoencoder:
    return RelativeAutoencoder((8, 7), 2, _ANCHORS, (4, 6)).fit_anchors(torch.rand(_ANCHORS, 2, 8, 7))


_CLASSES_OF_ANCHORS = (
    BadInput("no labels", _with_anchors, ValueError, "anchor_labels must be given"),
    BadInput(
        "a class too many",
        lambda generator: (*_with_anchors(generator), torch.arange(_ANCHORS)),
        ValueError,
        r"anchor_labels must lie in \[0, 3\)",
    ),
)

CASES = {
    "RelativeAttention": ContractCase(_block(), _with_anchors),
    "RelativeAttention-inner": ContractCase(_block(similarity="inner", center=True), _with_anchors),
    "RelativeAttention-basis change": ContractCase(_block(similarity="basis_change"), _with_anchors, tolerance=1e-3),
    "RelativeAttention-angular": ContractCase(_block(similarity="angular"), _with_anchors),
    "RelativeAttention-euclidean": ContractCase(_block(similarity="euclidean", out_norm="l2"), _with_anchors),
    "RelativeAttention-l1": ContractCase(_block(similarity="l1"), _with_anchors),
    "RelativeAttention-trainable": ContractCase(
        _block(values="trainable", hidden_dim=7, maps=("queries", "keys"), out_norm="layernorm"), _with_anchors
    ),
    "RelativeAttention-anchors": ContractCase(
        _block(values="anchors", maps=("queries", "keys", "values"), hidden_dim=8), _with_anchors
    ),
    "RelativeAttention-self-attention": ContractCase(
        _block(values="self_attention", attention_dim=8, num_heads=2), _with_anchors
    ),
    "RelativeAttention-relative anchors": ContractCase(_block(values="relative_anchors"), _with_anchors),
    "RelativeAttention-averages": ContractCase(
        _block(aggregate="class", num_classes=_CLASSES, groups=2, out_norm="layernorm"),
        _with_labels,
        bad_inputs=_CLASSES_OF_ANCHORS,
    ),
    "RelativeAttention-stratified": ContractCase(
        _block(resample="stratified", samples_per_class=2, num_classes=_CLASSES),
        _with_labels,
        bad_inputs=_CLASSES_OF_ANCHORS,
    ),
    "RelativeAttention-gaussian": ContractCase(
        _block(resample="gaussian", samples_per_class=2, num_classes=_CLASSES),
        _with_labels,
        bad_inputs=_CLASSES_OF_ANCHORS,
    ),
    "RelativeAttention-rounded": ContractCase(_block(quantizer=RelativeQuantizer("round", 0.5)), _with_anchors),
    "RelativeAttention-smooth": ContractCase(_block(quantizer=RelativeQuantizer("smooth", 0.5)), _with_anchors),
    "RelativeAttention-batch": ContractCase(
        _block(out_norm="instancenorm"), _with_anchors, batch_independent=False, any_batch_size=False
    ),
    "SubspaceRelativeAttention": ContractCase(
        lambda: SubspaceRelativeAttention(_ANCHORS, _DIM, subspaces=2), _with_anchors
    ),
    "SubspaceRelativeAttention-linear": ContractCase(
        lambda: SubspaceRelativeAttention(_ANCHORS, _DIM, subspaces=3, pool="linear", out_norm="batchnorm"),
        _with_anchors,
    ),
    "RelativeProjection": ContractCase(_projection(), _items),
    "RelativeProjection-subspaces": ContractCase(
        _projection(subspaces=2, pool="max", out_norm="layernorm", center=True), _items
    ),
    "RelativeEncoder": ContractCase(_encoder(), _items),
    "RelativeEncoder-maps": ContractCase(
        _encoder(maps=("queries", "keys"), hidden_dim=5, out_norm="layernorm", anchor_mode="eval"), _items
    ),
    "StitchingHead": ContractCase(lambda: StitchingHead(_ANCHORS, _CLASSES, normalize=True), _codes),
    "StitchingHead-batch": ContractCase(
        lambda: StitchingHead(_ANCHORS, _CLASSES, unit_norm="batch"),
        _codes,
        batch_independent=False,
        any_batch_size=False,
    ),
    "AbsoluteAutoencoder": ContractCase(lambda: AbsoluteAutoencoder((8, 7), 2, 5, (4, 6)), _images),
    "RelativeAutoencoder": ContractCase(_autoencoder, _images),
    "StitchedModel": ContractCase(
        lambda: StitchedModel(
            _Encoder(_DIM, 4),
            RelativeProjection(torch.randn(_ANCHORS, 4)),
            StitchingHead(_ANCHORS, _CLASSES, unit_norm=None),
        ),
        _items,
    ),
    "StitchedAutoencoder": ContractCase(
        lambda: StitchedAutoencoder(_autoencoder(), _autoencoder()),
        _images,
        unused_parameters=("first.decoder*", "first.relative.*", "second.encoder*"),
    ),
}
