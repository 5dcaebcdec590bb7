from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from headgate.evaluate import Split, extract_layers, knn_probe, layerwise_probe, linear_probe
from headgate.evaluate.rank import effective_rank

DIGITS, LABELS = load_digits(return_X_y=True)
X, Y = DIGITS[:500].astype(np.float32), LABELS[:500]
SPLIT = Split.random(Y, seed=0)
C = (0.01, 0.1)


def test_the_table_holds_the_single_probes_layer_by_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    loader = DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=100)
    features = extract_layers(model, loader, ["0", "2"])
    table = layerwise_probe(features, Y, SPLIT, k=5, C=C)
    assert list(table.rows) == ["0", "2"]
    for name, row in table.rows.items():
        linear = linear_probe(features[name].X, Y, SPLIT, C=C)
        assert row.linear == linear.accuracy
        assert row.selection == linear.selection_score
        assert row.knn == knn_probe(features[name].X, Y, SPLIT, 5).accuracy
        assert row.rank == effective_rank(features[name].X[SPLIT.train])
        assert row.dim == features[name].X.shape[1]
    assert table.rows["2"].rank <= 2
    assert table.best == "0"


def test_the_best_layer_is_chosen_by_validation_and_not_by_test() -> None:
    narrow, tempting = X[:, 20:32], X.copy()
    tempting[SPLIT.val] = np.random.default_rng(0).normal(size=(len(SPLIT.val), 64))
    table = layerwise_probe({"tempting": tempting, "narrow": narrow}, Y, SPLIT, C=C)
    assert table.rows["tempting"].linear > table.rows["narrow"].linear
    assert table.best == "narrow"


def test_the_table_is_written_in_markdown() -> None:
    table = layerwise_probe({"raw": X}, Y, SPLIT, C=C)
    row = table.rows["raw"]
    assert table.to_markdown().splitlines() == [
        "| layer | dim | linear | kNN | rank |",
        "|---|---:|---:|---:|---:|",
        f"| raw | 64 | {row.linear:.4f} | {row.knn:.4f} | {row.rank:.2f} |",
    ]


def test_no_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must hold at least one layer"):
        layerwise_probe({}, Y, SPLIT)
