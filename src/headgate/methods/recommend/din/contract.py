"""What the modules of this room promise; the contract suite holds them to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, nn

from headgate.methods.recommend.din.activation_unit import FixedPooling, LocalActivationUnit
from headgate.methods.recommend.din.dice import Dice
from headgate.methods.recommend.din.fields import Field
from headgate.methods.recommend.din.model import DIN
from headgate.methods.recommend.din.regularization import MiniBatchAwareL2
from headgate.testing import BadInput, ContractCase

__all__ = ["CASES"]

_Draw = Callable[[Generator], tuple[Any, ...]]


def _matrix(generator: Generator) -> tuple[Any, ...]:
    return (torch.randn(4, 6, generator=generator),)


def _mask() -> torch.Tensor:
    """Four histories of up to 7 behaviours; one has a gap, one is empty."""
    mask = torch.arange(7) < torch.tensor([[7], [5], [3], [0]])
    mask[1, 2] = False
    return mask


def _history(candidates: int | None = None) -> _Draw:
    shape = (4, 5) if candidates is None else (4, candidates, 5)
    return lambda generator: (
        torch.randn(shape, generator=generator),
        torch.randn(4, 7, 5, generator=generator),
        _mask(),
    )


def _three_channels(generator: Generator) -> tuple[Any, ...]:
    return torch.randn(4, 6, 3, generator=generator), _mask()[:, :3]


_LONG_MASK = BadInput(
    "a mask of another length",
    lambda generator: (*_history()(generator)[:2], torch.ones(4, 6, dtype=torch.bool)),
    ValueError,
    "mask must have length=7",
)
_NUMBER_MASK = BadInput(
    "a mask of numbers", lambda generator: (*_history()(generator)[:2], _mask().float()), TypeError, "mask must be bool"
)

_FIELDS = {
    "item": Field(4, vocabulary=11),
    "price": Field(2),
    "age": Field(3, vocabulary=5),
    "hour": Field(1),
}


def _batch(candidates: tuple[int, ...] = (), **changes: Any) -> _Draw:
    def draw(generator: Generator) -> tuple[Any, ...]:
        batch = {
            "item": torch.randint(11, (4, *candidates), generator=generator),
            "price": torch.randn(4, *candidates, 2, generator=generator),
            "age": torch.randint(5, (4,), generator=generator),
            "hour": torch.randn(4, 1, generator=generator),
            "items_before": torch.randint(11, (4, 7), generator=generator),
            "prices_before": torch.randn(4, 7, 2, generator=generator),
            "mask": _mask(),
        }
        batch |= changes
        return ({name: value for name, value in batch.items() if value is not None},)

    return draw


def _model(**options: Any) -> Callable[[], nn.Module]:
    return lambda: DIN(
        _FIELDS,
        ["items_before", "prices_before"],
        ["item", "price"],
        (8, 6),
        attention=(7, 5),
        embedding_std=0.5,
        **options,
    )


_BAD_BATCHES = (
    BadInput("no history", _batch(items_before=None), ValueError, "batch must hold 'items_before'"),
    BadInput("an id beyond the vocabulary", _batch(age=torch.full((4,), 5)), ValueError, r"age.*\[0, 5\), got 5 to 5"),
    BadInput("an id below 0", _batch(items_before=torch.full((4, 7), -1)), ValueError, r"items_before.*\[0, 11\)"),
    BadInput(
        "a mask of another length", _batch(mask=_mask()[:, :6]), ValueError, r"items_before.*\(4, 6\), got \(4, 7\)"
    ),
    BadInput("a mask of numbers", _batch(mask=_mask().float()), TypeError, r"mask.*bool"),
)


def _ids(generator: Generator) -> tuple[Any, ...]:
    ids = torch.randint(11, (4, 7), generator=generator)
    return ({"item": ids.masked_fill(~_mask(), -1)},)


CASES: dict[str, ContractCase] = {
    "Dice": ContractCase(
        lambda: Dice(6),
        _matrix,
        bad_inputs=(
            BadInput("a vector", lambda generator: (torch.zeros(6),), ValueError, "x must have 6 channels"),
            BadInput(
                "a mask of other rows",
                lambda generator: (*_matrix(generator), torch.ones(5, dtype=torch.bool)),
                ValueError,
                "mask must have shape",
            ),
        ),
    ),
    "Dice-masked": ContractCase(lambda: Dice(6, affine=True, channel_dim=1), _three_channels),
    "LocalActivationUnit": ContractCase(
        lambda: LocalActivationUnit(5, (8, 6)), _history(), bad_inputs=(_LONG_MASK, _NUMBER_MASK)
    ),
    "LocalActivationUnit-softmax": ContractCase(
        lambda: LocalActivationUnit(5, (8,), "prelu", "softmax"), _history(candidates=3)
    ),
    "LocalActivationUnit-published": ContractCase(
        lambda: LocalActivationUnit(5, (8, 6), "sigmoid", "scaled_softmax", official_quirks=True), _history()
    ),
    "FixedPooling": ContractCase(
        lambda: FixedPooling("mean"),
        _history(),
        unused_parameters=("inputs.query",),
        bad_inputs=(_LONG_MASK, _NUMBER_MASK),
    ),
    "FixedPooling-sum": ContractCase(
        lambda: FixedPooling("sum"), _history(candidates=3), unused_parameters=("inputs.query",)
    ),
    "MiniBatchAwareL2": ContractCase(
        lambda: MiniBatchAwareL2({"item": nn.Embedding(11, 4)}, {"item": torch.arange(11)}),
        _ids,
        batch_independent=False,
        bad_inputs=(
            BadInput(
                "another table", lambda generator: ({"user": torch.zeros(3).long()},), ValueError, "ids must have"
            ),
            BadInput(
                "an id beyond the vocabulary",
                lambda generator: ({"item": torch.full((3,), 11)},),
                ValueError,
                r"ids\['item'\] must lie in \[0, 11\)",
            ),
        ),
    ),
    "DIN": ContractCase(_model(), _batch(), bad_inputs=_BAD_BATCHES),
    "DIN-base": ContractCase(_model(pooling="mean", activation="prelu"), _batch(), bad_inputs=_BAD_BATCHES),
    "DIN-published": ContractCase(
        _model(
            activation="sigmoid",
            normalize="scaled_softmax",
            interaction=True,
            batch_norm=True,
            project=True,
            item_bias="item",
        ),
        _batch(),
    ),
    "DIN-candidates": ContractCase(_model(normalize="softmax", activation="relu"), _batch(candidates=(3,))),
}
