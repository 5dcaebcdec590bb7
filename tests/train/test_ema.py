"""Averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate.train import EMA


def test_the_average_follows_its_recurrence():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = EMA(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    expected = 1.0
    with average.following(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 1)).sum().backward()
            optimizer.step()
            expected = 0.9 * expected + 0.1 * model.weight.item()
    assert average.average.weight.item() == pytest.approx(expected, rel=1e-6)
    optimizer.step()
    assert average.average.weight.item() == pytest.approx(expected, rel=1e-6)


def test_decay_zero_copies_and_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    average = EMA(model, 0.0)
    model(torch.randn(5, 2) + 3)
    nn.init.constant_(model.weight, 4.0)
    average.update()
    assert torch.equal(average.average.weight, model.weight)
    assert torch.equal(average.average.running_mean, model.running_mean)
    other = nn.BatchNorm1d(2)
    average.copy_to(other)
    assert torch.equal(other.weight, model.weight)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), 1.0)
