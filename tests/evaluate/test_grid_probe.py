"""Probes in every cell of a grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from headgate.evaluate import collect_grid, grid_probe


def world(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return torch.nn.functional.one_hot(labels, 3).float() + 0.4 * torch.randn(count, 3, generator=generator), labels


def encoder(x):
    return {
        ("clear", 0.0): x,
        ("clear", 0.5): x * 0 + 1.0 + x.sum(1, keepdim=True),
        ("maps", 0.0): x[:, :, None, None].expand(-1, -1, 2, 2),
    }


def test_each_cell_is_the_logistic_regression_of_scikit_learn():
    (x, y), (z, w) = world(120, 0), world(80, 1)
    table = grid_probe(encoder, (x, y), (z, w), batch_size=50)
    assert [(cell.layer, cell.t) for cell in table] == [("clear", 0.0), ("clear", 0.5), ("maps", 0.0)]
    scaler = StandardScaler().fit(x.numpy())
    model = LogisticRegression(C=1.0, max_iter=300).fit(scaler.transform(x.numpy()), y.numpy())
    right = model.predict(scaler.transform(z.numpy())) == w.numpy()
    assert table[0].accuracy == pytest.approx(right.mean(), abs=0.013)
    assert table[0].accuracy == table[0].correct.mean()
    assert table[0].accuracy > table[1].accuracy + 0.2
    assert table[2].accuracy == pytest.approx(table[0].accuracy, abs=0.013)
    assert table[2].dim == 3


def test_several_targets_are_read_from_the_same_features():
    (x, y), (z, w) = world(120, 0), world(80, 1)
    flipped = {"label": 2 - y, "same": y}, {"label": 2 - w, "same": w}
    table = grid_probe(encoder, (x, flipped[0]), (z, flipped[1]), layers=["clear"], timesteps=[0.0])
    assert [cell.target for cell in table] == ["label", "same"]
    assert table[0].accuracy == pytest.approx(table[1].accuracy, abs=0.013)


def test_tokens_are_averaged_and_batches_joined_in_order():
    x = torch.arange(24.0).reshape(4, 3, 2)
    found = collect_grid(lambda part: {("tokens", 1.0): part}, x, batch_size=3)["tokens", 1.0]
    np.testing.assert_allclose(found, x.mean(1).numpy())


def test_bad_input_is_refused():
    (x, y), (z, w) = world(20, 0), world(10, 1)
    with pytest.raises(ValueError, match="layers"):
        grid_probe(encoder, (x, y), (z, w), layers=["dark"])
    with pytest.raises(ValueError, match="same targets"):
        grid_probe(encoder, (x, {"a": y}), (z, {"b": w}))
    with pytest.raises(ValueError, match="train labels"):
        grid_probe(encoder, (x, y[:5]), (z, w))
