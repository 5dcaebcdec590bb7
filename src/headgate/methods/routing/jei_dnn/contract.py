"""What the contract suite puts the parts of JEI-DNN through.

The suite follows the batch along the first axis of every output; logits of all exits have it on their second. The networks
are therefore put through it with that axis moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from headgate.methods.routing.jei_dnn.heads import ExitHeads, ExitOutputs, UncertaintyGate
from headgate.methods.routing.jei_dnn.losses import GateLoss, HeadLoss
from headgate.methods.routing.jei_dnn.model import EarlyExit
from headgate.methods.routing.jei_dnn.t2t import T2TViT
from headgate.nn import VisionTransformer
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_COSTS = (0.3, 0.6, 1.0)
_CLASSES = 5


class _BatchFirstHeads(ExitHeads):
    def forward(self, features: Tensor, final_logits: Tensor) -> ExitOutputs:
        return _batch_first(super().forward(features, final_logits))


class _BatchFirstNetwork(EarlyExit):
    def forward(self, *args: Any, **kwargs: Any) -> ExitOutputs:
        return _batch_first(super().forward(*args, **kwargs))


def _batch_first(outputs: ExitOutputs) -> ExitOutputs:
    return outputs._replace(logits=outputs.logits.transpose(0, 1))


def _network() -> EarlyExit:
    backbone = VisionTransformer(8, 3, 2, img_size=8, patch_size=4, in_chans=2, num_classes=_CLASSES)
    return _BatchFirstNetwork(backbone, norm="norm")


def _images(generator: Generator, side: int = 8, chans: int = 2) -> tuple[Any, ...]:
    return (torch.randn(4, chans, side, side, generator=generator),)


def _predictions(generator: Generator) -> tuple[Any, ...]:
    return (torch.randn(4, _CLASSES, generator=generator),)


def _features(generator: Generator) -> tuple[Any, ...]:
    return torch.randn(4, 2, 6, generator=generator), torch.randn(4, _CLASSES, generator=generator)


class _BatchFirstGateLoss(GateLoss):
    def forward(self, gate_logits: Tensor, logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
        return super().forward(gate_logits, _exits_first(logits), target, pos_weight)


class _BatchFirstHeadLoss(HeadLoss):
    def forward(self, logits: Tensor, exit_prob: Tensor, target: Tensor) -> Tensor:
        return super().forward(_exits_first(logits), exit_prob, target)


def _exits_first(logits: Tensor) -> Tensor:
    return logits.transpose(0, 1) if logits.dim() == 3 else logits


def _gate_inputs(generator: Generator) -> tuple[Any, ...]:
    gate_logits = torch.randn(4, 2, generator=generator)
    logits = torch.randn(4, 3, _CLASSES, generator=generator)
    return gate_logits, logits, torch.randint(_CLASSES, (4,), generator=generator)


def _head_inputs(generator: Generator) -> tuple[Any, ...]:
    logits = torch.randn(4, 3, _CLASSES, generator=generator)
    exit_prob = torch.randn(4, 3, generator=generator).softmax(dim=1)
    return logits, exit_prob, torch.randint(_CLASSES, (4,), generator=generator)


_ONE_CLASS = BadInput(
    "one class", lambda generator: (torch.randn(4, 1, generator=generator),), ValueError, "at least two classes"
)
_NOT_FINITE = BadInput(
    "infinite logits", lambda generator: (torch.full((4, _CLASSES), torch.inf),), ValueError, "logits must be finite"
)

CASES = {
    "UncertaintyGate": ContractCase(
        UncertaintyGate,
        _predictions,
        unused_parameters=("inputs.logits",),
        bad_inputs=(_ONE_CLASS, _NOT_FINITE),
    ),
    "ExitHeads": ContractCase(lambda: _BatchFirstHeads(6, _CLASSES, 2), _features),
    "EarlyExit": ContractCase(_network, _images),
    "T2TViT": ContractCase(
        lambda: T2TViT(8, 2, 2, img_size=32, in_chans=2, num_classes=_CLASSES, token_dim=6, drop_path_rate=0.1),
        lambda generator: _images(generator, side=32),
    ),
    "GateLoss": ContractCase(
        lambda: _BatchFirstGateLoss(_COSTS, 0.5),
        _gate_inputs,
        batch_independent=False,
        unused_parameters=("inputs.logits",),
    ),
    "GateLoss-prob": ContractCase(
        lambda: _BatchFirstGateLoss(_COSTS, 0.5, objective="prob"),
        _gate_inputs,
        batch_independent=False,
        unused_parameters=("inputs.logits",),
    ),
    **{
        f"HeadLoss-{weighting}": ContractCase(
            lambda weighting=weighting: _BatchFirstHeadLoss(weighting),  # type: ignore[misc]
            _head_inputs,
            batch_independent=False,
            unused_parameters=("inputs.exit_prob",),
        )
        for weighting in ("exit_prob", "uniform", "raw", "hard")
    },
}
