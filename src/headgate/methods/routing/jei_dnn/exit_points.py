"""Exits in the middle of a model's ``forward``, where no submodule ends: behind a node of its ``torch.fx`` graph.

Exits stand behind submodules. Where a block's output is made by the parent, as the sum of a residual branch often is, the
graph has a node for it but the model no module; an identity behind that node is one::

    def forward(self, x):                       x ─ branch ─ add ─ [exit_0] ─ branch ─ add_1 ─ …
        x = x + self.branch(x)   # add
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import fx, nn

__all__ = ["add_exit_points"]

# What EarlyExit reads from a backbone that is asked for nothing else.
_KEPT = ("num_features", "num_classes", "config")


def add_exit_points(model: nn.Module, nodes: Sequence[str], *, tracer: fx.Tracer | None = None) -> fx.GraphModule:
    """Trace a model and put an identity behind nodes of its graph, so that exits can stand there.

    ``EarlyExit(add_exit_points(model, ["add", "add_1"]), exits=["exit_0", "exit_1"])`` is a network with two early exits.
    Where inputs leave, nothing behind an exit may read what was computed before it.

    Args:
        model: a module that ``torch.fx`` can trace, or a graph module; its parameters and submodules are shared, not copied.
        nodes: names of nodes whose value is a tensor with the batch on its first axis, in the order in which they run.
            ``[node.name for node in torch.fx.symbolic_trace(model).graph.nodes]`` lists them.
        tracer: for models that the default one cannot trace, such as one with leaf modules of its own.

    Returns:
        The same function, with submodules ``exit_0``, ``exit_1``, … behind the nodes.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no node, one that is not in the graph or gives no value, another order, or a model that has a submodule
            of such a name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if isinstance(model, fx.GraphModule):
        graph = copy.deepcopy(model.graph)
    else:
        graph = (tracer or fx.Tracer()).trace(model)
    known = {node.name: node for node in graph.nodes if node.op != "output"}
    places = {name: place for place, name in enumerate(known)}
    if not nodes or any(name not in known for name in nodes):
        raise ValueError(f"nodes must be names from {list(known)}, got {list(nodes)}")
    order = [places[name] for name in nodes]
    if order != sorted(set(order)):
        raise ValueError(f"nodes must come in the order in which they run, each once, got {list(nodes)}")
    names = [f"exit_{number}" for number in range(len(nodes))]
    taken = [name for name in names if hasattr(model, name)]
    if taken:
        raise ValueError(f"model must have no submodules {taken}, which are the names of the exits")
    traced = fx.GraphModule(model, graph)
    for name, node in zip(names, (known[name] for name in nodes), strict=True):
        traced.add_submodule(name, nn.Identity())
        with graph.inserting_after(node):
            point = graph.call_module(name, (node,))
        node.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
    graph.lint()
    traced.graph = graph
    for name in _KEPT:
        if hasattr(model, name):
            setattr(traced, name, getattr(model, name))
    return traced.train(model.training)
