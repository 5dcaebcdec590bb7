"""The root-mean-square norm against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate.nn import RMSNorm
from headgate.train import make_optimizer


@pytest.mark.parametrize("dim", [7, 32])
def test_it_equals_pytorchs_with_and_without_gradients(dim: int) -> None:
    ours, theirs = RMSNorm(dim, 1e-6), nn.RMSNorm(dim, 1e-6)
    nn.init.uniform_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_its_weight_takes_no_weight_decay() -> None:
    optimizer = make_optimizer(nn.Sequential(nn.Linear(4, 4), RMSNorm(4)), learning_rate=1e-3, weight_decay=0.1)
    decay = {group["weight_decay"]: {tuple(p.shape) for p in group["params"]} for group in optimizer.param_groups}
    assert decay == {0.1: {(4, 4)}, 0.0: {(4,)}}


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="x must have dim=8"):
        RMSNorm(8)(torch.zeros(2, 4))
