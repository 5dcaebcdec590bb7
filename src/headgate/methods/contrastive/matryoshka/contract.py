"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from headgate.methods.contrastive.matryoshka.encoder import MatryoshkaEncoder
from headgate.methods.contrastive.matryoshka.head import MatryoshkaHead
from headgate.methods.contrastive.matryoshka.language import MatryoshkaMaskedLM
from headgate.methods.contrastive.matryoshka.loss import MatryoshkaContrastiveLoss, MatryoshkaLoss
from headgate.methods.contrastive.matryoshka.resnet import MatryoshkaResNet
from headgate.testing import BadInput, ContractCase
from headgate.validate import check_floating, check_shape

__all__ = ["CASES"]

_DIMS = (4, 8, 16)
_CLASSES = 5


def _normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _embeddings(generator: Generator) -> tuple[Any, ...]:
    return (_normal(4, 16, generator=generator),)


def _pairs(generator: Generator) -> tuple[Any, ...]:
    return _normal(4, 16, generator=generator), _normal(4, 16, generator=generator)


def _logits(generator: Generator) -> tuple[Any, ...]:
    logits = tuple(_normal(4, _CLASSES, generator=generator) for _ in _DIMS)
    return logits, torch.randint(_CLASSES, (4,), generator=generator)


def _hidden(generator: Generator) -> tuple[Any, ...]:
    return (_normal(3, 6, 16, generator=generator),)


def _images(generator: Generator) -> tuple[Any, ...]:
    return (_normal(3, 3, 64, 64, generator=generator),)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    check_shape("args", b, a.shape, "batch, dim")
    return (a - b).square().sum(dim=1).mean()


class _Encoder(nn.Linear):
    """Stands for a user's encoder that looks at its input."""

    def forward(self, args: Tensor) -> Tensor:
        check_shape("args", args, (None, self.in_features), "batch, dim")
        check_floating("args", args, like=self.weight.dtype)
        return super().forward(args)


CASES = {
    "MatryoshkaHead": ContractCase(lambda: MatryoshkaHead(_DIMS, _CLASSES), _embeddings),
    "MatryoshkaHead-tied": ContractCase(lambda: MatryoshkaHead(_DIMS, _CLASSES, tied=True), _embeddings),
    "MatryoshkaEncoder": ContractCase(
        lambda: MatryoshkaEncoder(_Encoder(16, 16), _DIMS, dim=8),
        _embeddings,
    ),
    "MatryoshkaLoss": ContractCase(
        lambda: MatryoshkaLoss(_DIMS),
        _logits,
        batch_independent=False,
        bad_inputs=(
            BadInput(
                "logits for two of three sizes",
                lambda generator: (_logits(generator)[0][:2], _logits(generator)[1]),
                ValueError,
                "each of the 3 dims, got 2",
            ),
            BadInput(
                "an embedding without a base loss",
                lambda generator: (_embeddings(generator)[0], torch.zeros(4, dtype=torch.int64)),
                ValueError,
                "must be logits per size",
            ),
        ),
    ),
    "MatryoshkaLoss-embeddings": ContractCase(
        lambda: MatryoshkaLoss(_squared_distance, _DIMS, (1.0, 0.5, 2.0), normalize=True),
        _pairs,
        batch_independent=False,
    ),
    "MatryoshkaLoss-sampled": ContractCase(
        lambda: MatryoshkaLoss(_squared_distance, _DIMS, dims_per_step=2),
        _pairs,
        batch_independent=False,
        compile=False,
    ),
    "MatryoshkaContrastiveLoss": ContractCase(
        lambda: MatryoshkaContrastiveLoss(_DIMS),
        _pairs,
        batch_independent=False,
        any_batch_size=False,
    ),
    "MatryoshkaMaskedLM": ContractCase(lambda: MatryoshkaMaskedLM(11, _DIMS), _hidden),
    "MatryoshkaResNet": ContractCase(
        lambda: MatryoshkaResNet(_CLASSES, (8, 32, 64), layers=(1, 1, 1, 1), width=2),
        _images,
        bad_inputs=(
            BadInput(
                "images of 16 pixels",
                lambda generator: (_normal(3, 3, 16, 16, generator=generator),),
                ValueError,
                "at least 32 pixels",
            ),
        ),
    ),
}
