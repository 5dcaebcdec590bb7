"""Models and weights of the published code (harryjo97/EHGNN) in this library's modules.

``build_…`` take the published arguments as a mapping, ``convert_state_dict`` the weights of the same model:

    model = build_hyperdrop(arguments)
    model.load_state_dict(convert_state_dict(torch.load("best-model.pth", weights_only=True), model))

Graph convolutions may come from PyTorch Geometric before 2.0 (``convs.0.weight``, stored transposed) or later
(``convs.0.lin.weight``). The node model holds layers of edges whose result nothing reads; they are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headgate.methods.graph.edge_hypergraph.autoencoder import EdgeAutoEncoder
from headgate.methods.graph.edge_hypergraph.classifier import EHGNNClassifier, MoleculeEHGNN
from headgate.methods.graph.edge_hypergraph.edge_conv import EdgeHypergraphConv
from headgate.methods.graph.edge_hypergraph.graph_conv import GraphConv
from headgate.methods.graph.edge_hypergraph.hypercluster import HyperCluster
from headgate.methods.graph.edge_hypergraph.hypergraph_conv import HypergraphConv
from headgate.methods.graph.edge_hypergraph.node_classifier import EHGNNNodeClassifier

__all__ = [
    "build_hypercluster",
    "build_hyperdrop",
    "build_hyperdrop_node",
    "build_hyperdrop_ogb",
    "build_hypergraph_conv",
    "build_pool",
    "convert_state_dict",
]


def build_hypergraph_conv(config: Mapping[str, Any]) -> HypergraphConv:
    """Build a published ``HypergraphConv``.

    Its attention reads the features of the dual node that has the hyperedge's number; ours reads ``hyperedge_attr``, so hand it
    ``x[:num_hyperedges]`` for the same.

    Args:
        config: its keywords.
    """
    attention = bool(config.get("use_attention", False))
    return HypergraphConv(
        config["in_channels"],
        config["out_channels"],
        attention=attention,
        heads=config.get("heads", 1) if attention else 1,
        concat=config.get("concat", True) if attention else True,
        negative_slope=config.get("negative_slope", 0.2),
        dropout=config.get("dropout", 0.0) if attention else 0.0,
        bias=config.get("bias", True),
    )


def build_hyperdrop(config: Mapping[str, Any]) -> EHGNNClassifier:
    """Build a published ``Model_HyperDrop``.

    Args:
        config: its arguments; ``data="COLLAB"`` makes the edges an eighth as wide.
    """
    hidden = config["num_hidden"]
    edge_hidden = hidden // 8 if config.get("data") == "COLLAB" else config.get("num_edge_hidden", hidden)
    return EHGNNClassifier(
        config["num_node_features"],
        config["num_classes"],
        config["num_edge_features"],
        hidden=hidden,
        edge_hidden=edge_hidden,
        num_convs=config.get("num_convs", 3),
        ratio=config.get("edge_ratio", 0.8),
        dropout=float(str(config.get("dropout", 0.5)).split()[0]),
    )


def build_hyperdrop_ogb(config: Mapping[str, Any]) -> MoleculeEHGNN:
    """Build a published ``Model_HyperDrop_OGB``.

    Args:
        config: its arguments, and ``atom_dims`` and ``bond_dims`` where those of the encoders are not those of
            Open Graph Benchmark 1.3.0.
    """
    dims = {name: config[name] for name in ("atom_dims", "bond_dims") if name in config}
    return MoleculeEHGNN(
        config["num_classes"],
        hidden=config.get("num_hidden", 128),
        num_convs=config.get("num_convs", 3),
        ratio=config.get("edge_ratio", 0.8),
        dropout=float(str(config.get("dropout", 0.5)).split()[0]),
        **dims,
    )


def build_hyperdrop_node(config: Mapping[str, Any]) -> EHGNNNodeClassifier:
    """Build a published ``Model_HyperDrop_Node``.

    Args:
        config: its arguments.
    """
    return EHGNNNodeClassifier(
        config["num_node_features"],
        config["num_classes"],
        hidden=config.get("num_hidden", 32),
        edge_hidden=config.get("num_edge_hidden", 16),
        num_convs=config.get("num_convs", 2),
        ratio=config.get("edge_ratio", 0.8),
        dropout=float(str(config.get("dropout", 0.5)).split()[0]),
    )


def build_pool(config: Mapping[str, Any]) -> HyperCluster:
    """Build a published ``GMPool`` with convolutions on the dual hypergraph, for any number of heads.

    Args:
        config: the arguments of ``Model_HyperCluster``.
    """
    return HyperCluster(
        config["num_hidden"],
        ratio=config.get("pool_ratio", config.get("edge_ratio")),
        avg_num_edges=config["avg_num_edges"],
        heads=config.get("num_heads", 1),
        layer_norm=config.get("layer_norm", config.get("ln", False)),
        cluster=config.get("cluster", False),
    )


def build_hypercluster(config: Mapping[str, Any]) -> EdgeAutoEncoder:
    """Build a published ``Model_HyperCluster``.

    Args:
        config: its arguments.

    Raises:
        ValueError: several heads, with which it cannot unpool.
    """
    if config.get("num_heads", 1) != 1:
        raise ValueError(f"num_heads must be 1: the published model cannot unpool others, got {config['num_heads']}")
    return EdgeAutoEncoder(
        config["num_edge_features"],
        ratio=config.get("pool_ratio", config.get("edge_ratio")),
        avg_num_edges=config["avg_num_edges"],
        hidden=config["num_hidden"],
        num_convs=config.get("num_convs", 2),
        layer_norm=config.get("layer_norm", config.get("ln", False)),
        cluster=config.get("cluster", False),
    )


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of a published model to those of ours.

    Args:
        state: its ``state_dict()``, with or without the prefix ``module.`` of DataParallel.
        model: what the ``build_…`` for that model returned.

    Returns:
        A state dict for ``model``.

    Raises:
        ValueError: a name that the published model does not have.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _rename(key.removeprefix("module."))
        if name is None:
            raise ValueError(f"{key!r} is no weight of a published {type(model).__name__}")
        if isinstance(model, EHGNNNodeClassifier) and not _is_read(name, model):
            continue
        if isinstance(model, HyperCluster):
            name = name.removeprefix("pool.")
        if _is_transposed(key, name, model):
            value = value.T
        converted[name] = value.flatten() if name.endswith(".root") else value
    return converted


_WHOLE = {
    "weight": "weight",
    "bias": "bias",
    "att": "attention",
    "S": "pool.attention.seeds",
    "pool.S": "pool.attention.seeds",
}
_PATTERNS = (
    (r"(convs|unconvs)\.(\d+)\.(?:lin\.)?(weight|bias)", r"\1.\2.\3"),
    (r"convs\.(\d+)\.linear_(node|edge)\.(weight|bias)", r"convs.\1.\2.\3"),
    (r"convs\.(\d+)\.root_emb\.weight", r"convs.\1.root"),
    (r"hyperconvs\.(\d+)\.(weight|bias)", r"edge_convs.\1.\2"),
    (r"scoreconvs\.(\d+)\.(weight|bias)", r"drops.\1.score_conv.\2"),
    (r"classifier\.(\d+)\.(weight|bias)", r"head.\1.\2"),
    (r"(atom|bond)_encoder\.(?:atom|bond)_embedding_list\.(\d+)\.weight", r"\1s.embeddings.\2.weight"),
    (r"last\.(weight|bias)", r"last.\1"),
)
_POOL = {
    "fc_q": "attention.query",
    "fc_k": "key",
    "fc_v": "value",
    "fc_o": "attention.output",
    "ln0": "attention.norm_before",
    "ln1": "attention.norm_after",
}


def _rename(key: str) -> str | None:
    """Our name of a published weight, ``None`` where there is none."""
    if key in _WHOLE:
        return _WHOLE[key]
    if match := re.fullmatch(r"(?:pool\.)?mab\.(\w+)\.(weight|bias)", key):
        return f"pool.{_POOL[match[1]]}.{match[2]}" if match[1] in _POOL else None
    for pattern, ours in _PATTERNS:
        if match := re.fullmatch(pattern, key):
            return match.expand(ours)
    return None


def _is_read(name: str, model: EHGNNNodeClassifier) -> bool:
    part, number, *_ = name.split(".")
    if part == "edge_convs":
        return int(number) < len(model.edge_convs)
    return part != "drops" or number in model.drops


def _is_transposed(key: str, name: str, model: nn.Module) -> bool:
    """Whether the weight lies the other way round: in graph convolutions of PyTorch Geometric before 2.0."""
    if not name.endswith(".weight") or ".lin." in key:
        return False
    owner = dict(model.named_modules()).get(name.removesuffix(".weight"))
    return isinstance(owner, GraphConv) and not isinstance(owner, EdgeHypergraphConv)
