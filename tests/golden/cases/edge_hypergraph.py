"""EHGNN against harryjo97/EHGNN: the convolution, the classifier with its drops, the auto-encoder with its clusters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headgate.methods.graph.edge_hypergraph import DualHypergraph, EdgeHypergraphConv, HyperDrop
from headgate.methods.graph.edge_hypergraph.official import (
    build_hypercluster,
    build_hyperdrop,
    build_hypergraph_conv,
    convert_state_dict,
)
from tests.golden.harness import Golden, golden_case


@golden_case("hypergraph_conv")
def check_conv(golden: Golden) -> None:
    """Output without and with weights of the hyperedges, and the gradient of both."""
    conv = build_hypergraph_conv(golden.config)
    conv.load_state_dict(convert_state_dict(golden.state("param."), conv))
    x = golden.tensors["x"].requires_grad_()
    index = golden.tensors["hyperedge_index"]
    plain, weighted = conv(x, index), conv(x, index, golden.tensors["hyperedge_weight"])
    golden.assert_close("plain", plain, "out.plain")
    golden.assert_close("weighted", weighted, "out.weighted")
    (plain.sin().sum() + weighted.cos().sum()).backward()
    golden.assert_close("gradient of x", x.grad, "grad.x")


@golden_case("hyperdrop")
def check_classifier(golden: Golden) -> None:
    """The transformation, the kept edges of every drop, log-probabilities, loss and gradients."""
    edge_index, batch = golden.tensors["edge_index"], golden.tensors["batch"]
    dual = DualHypergraph.from_edge_index(edge_index, batch)
    golden.assert_close("incidences", dual.hyperedge_index, "dht.hyperedge_index")
    golden.assert_close("graph of every edge", dual.edge_batch, "dht.edge_batch")
    bare = DualHypergraph.from_edge_index(edge_index, batch, add_loops=False)
    golden.assert_close("incidences without loops", bare.hyperedge_index, "dht_noloops.hyperedge_index")
    golden.assert_equal("the graph back", torch.equal(dual.inverse(), edge_index), True)

    model = build_hyperdrop(golden.config).eval()
    model.load_state_dict(convert_state_dict(golden.state("param."), model))
    x, edge_attr = golden.tensors["x"].requires_grad_(), golden.tensors["edge_attr"].requires_grad_()
    for layer, drop in enumerate(model.drops):
        _follow(golden, drop, layer)
    kept = model.forward_features(x, edge_index, edge_attr, batch).kept
    golden.assert_equal("drops", len(kept), sum(name.startswith("out.kept_edges.") for name in golden.tensors))
    log_probs = model(x, edge_index, edge_attr, batch)
    golden.assert_close("log-probabilities", log_probs, "out.log_probs")
    loss = F.nll_loss(log_probs, golden.tensors["y"])
    golden.assert_close("loss", loss, "out.loss")
    loss.backward()
    golden.assert_close("gradient of x", x.grad, "grad.x")
    golden.assert_close("gradient of edge_attr", edge_attr.grad, "grad.edge_attr")


def _follow(golden: Golden, drop: HyperDrop, layer: int) -> None:
    """Have a drop keep the stored edges, after a check that they are the best ones by its own scores.

    Both directions of an edge have the same features and so the same score, up to rounding, which decides in the file.
    """
    name = f"out.kept_edges.{layer}"

    def select(score: Tensor, edge_batch: Tensor | None = None) -> Tensor:
        own, stored = HyperDrop.select(drop, score, edge_batch), golden.tensors[name]
        assert edge_batch is not None
        golden.assert_equal(f"graphs of {name}", edge_batch[own].tolist(), edge_batch[stored].tolist())
        golden.assert_equal(f"{name}, each once", len(stored.unique()), len(own))
        golden.assert_equal(f"scores of {name}", torch.allclose(score[own], score[stored], rtol=0, atol=1e-6), True)
        return stored

    drop.select = select  # type: ignore[method-assign]


@golden_case("hypercluster")
def check_autoencoder(golden: Golden) -> None:
    """Clusters, assignment, logits and gradient."""
    model = build_hypercluster(golden.config).eval()
    model.load_state_dict(convert_state_dict(golden.state("param."), model))
    assert isinstance(model.last, EdgeHypergraphConv)
    x, edge_index, batch = (golden.tensors[name] for name in ("x", "edge_index", "batch"))
    edge_attr = golden.tensors["edge_attr"].requires_grad_()
    golden.assert_equal("clusters", model.pool.num_clusters, golden.config["num_seeds"])
    pooled, assign = model.encode(x, edge_index, edge_attr, batch)
    golden.assert_close("pooled", pooled, "out.pooled")
    golden.assert_close("assignment", assign, "out.attn")
    logits = model(x, edge_index, edge_attr, batch)
    golden.assert_close("logits", logits, "out.edge_logits")
    loss = logits.square().mean()
    golden.assert_close("loss", loss, "out.loss")
    loss.backward()
    golden.assert_close("gradient of edge_attr", edge_attr.grad, "grad.edge_attr")
