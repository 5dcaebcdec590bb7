"""Measure what each exit of a network costs, in multiply-adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headgate.methods.routing.jei_dnn.costs import ExitCosts, gate_multiply_adds
from headgate.methods.routing.jei_dnn.heads import UncertaintyGate
from headgate.methods.routing.jei_dnn.model import EarlyExit

__all__ = ["profile_costs"]


@torch.no_grad()
def profile_costs(model: EarlyExit, *args: Any, **kwargs: Any) -> ExitCosts:
    """Count the products that lead to each exit: matrix products, convolutions and attention.

    ``model.set_costs(profile_costs(model, images[:1]).normalized)`` puts them in place. One example is run, in evaluation
    mode; on the meta device nothing is computed.

    Args:
        model: the network.
        *args: of its backbone, a batch of one.
        **kwargs: of its backbone.

    Returns:
        For one input, up to and including each exit's head and gate; uncertainty gates count 9C + 6.

    Raises:
        ValueError: the example holds more than one input, or an exit adds no cost.
    """
    counter = FlopCounterMode(display=False)
    marks: list[float] = []
    gates = 0

    def mark(number: int, hidden: Tensor) -> None:
        nonlocal gates
        if hidden.shape[0] != 1:
            raise ValueError(f"args must hold one input to profile, got {hidden.shape[0]}")
        logits = model.exits.heads[number](model.pooled(hidden))
        gate = model.exits.gates[number]
        if isinstance(gate, UncertaintyGate):
            gates += gate_multiply_adds(model.exits.num_classes)
        else:
            gate(logits)
        marks.append(counter.get_total_flops() / 2 + gates)

    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        # Fused attention is one operation, which the counter does not know on every device; written out it is two products.
        with sdpa_kernel(SDPBackend.MATH), counter, model.taps.open(mark):
            model.backbone(*args, **kwargs)
    finally:
        for part, training in modes:
            part.training = training
    totals = torch.tensor([*marks, counter.get_total_flops() / 2 + gates], dtype=torch.float64, device="cpu")
    if bool((totals.diff() <= 0).any()) or len(totals) != model.num_gates + 1:
        raise ValueError(f"every exit must add products to what is before it, got {totals.tolist()} multiply-adds")
    return ExitCosts(totals, (totals / totals[-1]).float())
