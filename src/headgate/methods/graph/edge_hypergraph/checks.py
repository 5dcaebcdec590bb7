"""Checks of graphs at the door of a layer: each raises one clear error that names the argument.

Values are looked at on the CPU alone and outside ``torch.compile``: on a GPU every look would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headgate.validate import check_floating, check_integer, check_shape

__all__ = ["check_batch", "check_edges", "check_ids", "check_ratio", "check_rows"]


def check_edges(edge_index: Tensor, num_nodes: int | None = None) -> None:
    """Check that ``edge_index`` is (2, m), holds integers, and that these lie in [0, num_nodes).

    Raises:
        TypeError: no tensor of integers.
        ValueError: wrong shape, or a number outside the range.
    """
    check_shape("edge_index", edge_index, (2, None), "2, edges")
    check_integer("edge_index", edge_index)
    check_ids("edge_index", edge_index, num_nodes, "num_nodes")


def check_ids(name: str, ids: Tensor, count: int | None, count_name: str) -> None:
    """Check that the numbers of ``ids`` lie in [0, count), or are not negative where ``count`` is ``None``.

    Raises:
        ValueError: one does not.
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or (count is not None and high >= count):
        bound = "be at least 0" if count is None else f"lie in [0, {count_name}={count})"
        raise ValueError(f"{name} must {bound}, got numbers from {low} to {high}")


def check_rows(name: str, values: Tensor, shape: Sequence[int | None], axes: str, like: torch.dtype) -> None:
    """Check shape and dtype of features of nodes or edges.

    Raises:
        TypeError: another dtype.
        ValueError: another shape.
    """
    check_shape(name, values, shape, axes)
    check_floating(name, values, like)


def check_batch(batch: Tensor, num_nodes: int, num_graphs: int | None = None) -> None:
    """Check that ``batch`` gives every node the number of its graph.

    Raises:
        TypeError: no tensor of integers.
        ValueError: wrong shape, or a number outside [0, num_graphs).
    """
    check_shape("batch", batch, (num_nodes,), "nodes")
    check_integer("batch", batch)
    check_ids("batch", batch, num_graphs, "num_graphs")


def check_ratio(**ratios: float) -> None:
    """Check that every named share lies in (0, 1].

    Raises:
        ValueError: one does not.
    """
    for name, ratio in ratios.items():
        if not 0 < ratio <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {name}={ratio}")
