"""The published cross-validation on a TU set: one fold of one arm, with early stopping on the validation loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from headgate.data import GraphBatch, GraphSet, degree_features, fold_split, read_folds, read_tu
from headgate.data.folders import data_folder
from headgate.errors import DataError
from headgate.methods.graph.edge_hypergraph.classifier import EHGNNClassifier
from headgate.methods.graph.edge_hypergraph.experiments import (
    DROPPERS,
    NodePoolClassifier,
    remove_dual,
    set_drops,
)
from headgate.methods.graph.edge_hypergraph.recipe import EarlyStopping, Recipe
from headgate.train import epoch_batches, fit, seeded

__all__ = ["build_classifier", "graph_folder", "train_fold"]


def graph_folder(name: str) -> Path:
    """The folder of a set within ``$HEADGATE_GRAPHS``, or ``data/graphs`` of ``$HEADGATE_SHARED``.

    Raises:
        DataError: neither variable is set, or there is no such folder.
    """
    folder = data_folder("graphs") / name
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected the text files of the TU set {name} in it")
    return folder


def build_classifier(arm: str, graphs: GraphSet, hidden: int, ratio: float, dropout: float) -> nn.Module:
    """A classifier of :class:`GraphBatch` for a set.

    Args:
        arm: one of the arms that drop edges; ``"node_drop"``: drops nodes; ``"no_edges"``: drops nothing and sees no edges'
            features.
        graphs: decides the sizes.
        hidden: channels.
        ratio: share of the edges, or nodes, that each drop keeps.
        dropout: in the head.
    """
    classes = int(graphs.y.max()) + 1
    nodes, edges = graphs.x.shape[1], graphs.edge_attr.shape[1]
    if arm in DROPPERS:
        model = EHGNNClassifier(nodes, classes, edges, hidden=hidden, ratio=ratio, dropout=dropout)
        set_drops(arm, model)
        if arm == "mlp_scores":
            remove_dual(model)  # the convolutions of the edges serve the scores alone
        return _OnBatches(model)
    kept = ratio if arm == "node_drop" else None
    return NodePoolClassifier(nodes, classes, hidden=hidden, ratio=kept, dropout=dropout)


class _OnBatches(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, graphs: GraphBatch) -> torch.Tensor:
        return self.model(graphs.x, graphs.edge_index, graphs.edge_attr, graphs.batch, len(graphs.y))


def train_fold(
    arm: str, name: str, fold: int, recipe: Recipe, *, hidden: int, ratio: float, dropout: float = 0.5
) -> tuple[float, dict[int, float]]:
    """Train one arm on all folds but two, and test it on the named one as it was at its best validation loss.

    Args:
        arm: as of :func:`build_classifier`.
        name: of the set.
        fold: the fold that is tested, from 0, and the seed.
        recipe: the training.
        hidden: channels.
        ratio: share that each drop keeps.
        dropout: in the head.

    Returns:
        Share of the test graphs that are classified right, and the validation accuracy by epoch.

    Raises:
        DataError: the set or its folds are missing or broken.
    """
    folder = graph_folder(name)
    graphs, folds = degree_features(read_tu(folder)), read_folds(folder)
    if int(torch.cat(folds).max()) >= len(graphs):
        raise DataError(f"{folder / '10fold_idx'} names graphs beyond the {len(graphs)} there are")
    train, validation, test = fold_split(folds, fold)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with seeded(fold):
        model = build_classifier(arm, graphs, hidden, ratio, dropout)
    model.to(device)
    order = epoch_batches(train, min(recipe.batch_size, len(train)), fold, drop_last=False)
    assert recipe.patience is not None
    stop = EarlyStopping(recipe.patience)
    best: dict[str, torch.Tensor] = {}

    def evaluate(network: nn.Module, step: int) -> Mapping[str, float]:
        with seeded(fold):
            loss, accuracy = _evaluate(network, graphs, validation, recipe.batch_size, device)
        if step == 0:
            return {"loss": math.inf, "accuracy": accuracy}  # the untrained network is no candidate
        if not best or loss < float(best["loss"]):
            best.clear()
            best.update(loss=torch.tensor(loss, dtype=torch.float64), **copy.deepcopy(network.state_dict()))
        return {"loss": loss, "accuracy": accuracy}

    history = fit(
        model,
        lambda step: graphs.batch(order(step)[0]),
        lambda network, batch: F.nll_loss(network(batch), batch.y),
        steps=recipe.epochs * order.steps_per_epoch,
        optimizer=recipe.optimizer(model),
        schedule=recipe.schedule(order.steps_per_epoch),
        clip_norm=recipe.clip_norm,
        evaluate=evaluate,
        evaluate_every=order.steps_per_epoch,
        stop=stop,
        seed=fold,
    )
    best.pop("loss")
    model.load_state_dict(best)
    with seeded(fold):
        _, accuracy = _evaluate(model.eval(), graphs, test, recipe.batch_size, device)
    by_epoch = {step // order.steps_per_epoch: metrics["accuracy"] for step, metrics in history.metrics.items()}
    return accuracy, by_epoch


@torch.no_grad()
def _evaluate(
    model: nn.Module, graphs: GraphSet, chosen: torch.Tensor, batch_size: int, device: torch.device
) -> tuple[float, float]:
    """Mean negative log-likelihood, and share classified right."""
    loss = right = 0.0
    for part in chosen.split(batch_size):
        batch = GraphBatch(*(tensor.to(device) for tensor in graphs.batch(part)))
        log_probs = model(batch)
        loss += float(F.nll_loss(log_probs, batch.y, reduction="sum"))
        right += float((log_probs.argmax(dim=1) == batch.y).sum())
    return loss / len(chosen), right / len(chosen)
