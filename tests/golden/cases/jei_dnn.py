"""networkslab/dynn: what the gates read and say, the exits taken, the losses of heads and gates with their gradients."""

from __future__ import annotations

import torch

from headgate.evaluate import conformal_quantile
from headgate.methods.routing.jei_dnn import (
    GateLoss,
    HeadLoss,
    exit_cross_entropy,
    exit_index,
    optimal_exits,
    uncertainty_features,
)
from headgate.methods.routing.jei_dnn.official import exit_heads_from_official
from tests.golden.harness import Golden, golden_case


@golden_case("gates_and_losses")
def check_gates_and_losses(golden: Golden) -> None:
    """Everything of one batch of stored features, the final exit's last."""
    config = golden.config
    gates = config["num_intermediate_exits"]
    exits, final = exit_heads_from_official(golden.state("param."))
    features, target = golden.tensors["in.features"], golden.tensors["in.targets"]
    outputs = exits(features[:-1].transpose(0, 1), final(features[-1]))
    logits, gate_logits, exit_prob, _ = outputs

    golden.assert_close("early logits", logits[:-1], "out.intermediate_logits")
    golden.assert_close("final logits", logits[-1], "out.final_logits")
    statistics = torch.stack([uncertainty_features(early) for early in logits[:-1]])
    golden.assert_close("uncertainty features", statistics, "out.gate_features")
    golden.assert_close("gate logits", gate_logits, "out.gate_logits")
    golden.assert_close("exit probabilities", exit_prob[:, :-1], "out.p_exit_at_gate")
    taken = exit_index(exit_prob)
    golden.assert_close("exits", taken, "out.sample_exit_level_map")
    golden.assert_close("exits, mode single", taken, "out.single.sample_exit_level_map")
    golden.assert_close("gated logits", logits[taken, torch.arange(len(taken))], "out.gated_logits")

    head_loss = HeadLoss("uniform")(logits, exit_prob, target)
    _scalar(golden, "head loss", head_loss, "im_loss_weighted")
    _scalar(golden, "plain mean", head_loss, "plain_mean_ce")
    _scalar(golden, "head loss, mode single", HeadLoss("hard")(logits, exit_prob, target), "im_loss_single")
    head_loss.backward(retain_graph=True)
    for number, head in enumerate(exits.heads):
        name = f"intermediate_heads.{number}.weight"
        golden.assert_close(f"gradient of {name}", head.weight.grad, f"grad.im_loss_weighted.{name}")

    costs = [*config["normalized_cost_per_exit"], 1.0]
    lam, weight = config["ce_ic_tradeoff"], torch.tensor(config["pos_weights"])
    gate_loss = GateLoss(costs, lam)(gate_logits, logits, target, weight)
    _scalar(golden, "gate loss", gate_loss, "gate_loss_ce")
    gate_loss.backward(retain_graph=True)
    for number, gate in enumerate(exits.gates):
        name = f"gates.{number}.linear.weight"
        golden.assert_close(f"gradient of {name}", gate.linear.weight.grad, f"grad.gate_loss_ce.{name}")
    by_probability = GateLoss(costs, lam, objective="prob")(gate_logits, logits, target, weight)
    _scalar(golden, "gate loss by probability", by_probability, "gate_loss_prob")
    best = optimal_exits(exit_cross_entropy(logits, target), torch.tensor(costs), lam)
    counts = {str(number): int((best == number).sum()) for number in range(gates)}
    golden.assert_equal("optimal exits", counts, golden.json["scalars"]["exit_count_optimal_gate"])

    scores = 1 - logits[0].softmax(dim=1)[torch.arange(len(target)), target]
    for alpha, stored in golden.json["scalars"]["conformal_qhat_exit0"].items():
        _number(
            golden,
            f"conformal quantile at {alpha}",
            conformal_quantile(scores.detach(), float(alpha), capped=True),
            stored,
        )


def _scalar(golden: Golden, name: str, ours: torch.Tensor, stored: str) -> None:
    _number(golden, name, ours.item(), golden.json["scalars"][stored])


def _number(golden: Golden, name: str, ours: float, stored: float) -> None:
    if abs(ours - stored) > golden.atol + golden.rtol * abs(stored):
        raise AssertionError(f"{name}: ours is {ours!r}, golden is {stored!r}")
    golden.assert_equal(name, True, True)
