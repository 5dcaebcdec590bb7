"""Warm-up, alternation, weights from the validation inputs, selection; and training on kept features."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.methods.routing.jei_dnn import (
    EarlyExit,
    ExitHeads,
    JEITrainer,
    collect_features,
    exit_index,
    optimal_exits,
    positive_weights,
    training_phase,
)
from headgate.methods.routing.jei_dnn.losses import exit_cross_entropy
from headgate.train import epoch_batches

COSTS = (0.3, 0.6, 1.0)


def world(count: int = 256, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Features of two exits, the second of which tells all three classes apart, the first only class 0."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(3, (count,), generator=generator)
    spread = noise * torch.randn(count, 2, 6, generator=generator)
    shown = torch.nn.functional.one_hot(target, 6).float()
    first = shown.clone()
    first[target > 0] = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0]) / 2
    features = 2 * torch.stack([first, shown], dim=1) + spread
    return features, 20 * shown[:, :3], target


def build(seed: int = 0) -> ExitHeads:
    torch.manual_seed(seed)
    return ExitHeads(6, 3, 2)


def trainer_of(exits: ExitHeads, lam: float = 0.2, **options: Any) -> JEITrainer:
    settings = {"epochs": 4, "warmup_epochs": 3, "batch_size": 32, "switch_every": 2, "learning_rate": 0.1}
    return JEITrainer(exits, lam, costs=COSTS, **{**settings, **options})


def test_every_epoch_begins_with_the_gates() -> None:
    phases = [training_phase(batch, 3) for batch in range(8)]
    assert phases == ["gate", "gate", "gate", "head", "head", "head", "gate", "gate"]
    with pytest.raises(ValueError, match="switch_every must be positive"):
        training_phase(0, 0)


def test_trained_gates_send_inputs_where_the_answer_is_found_at_the_least_cost() -> None:
    exits = build()
    history = trainer_of(exits, epochs=12, learning_rate=0.3).fit(world(1024), world(seed=1))
    features, final_logits, target = world(seed=2)
    outputs = exits(features, final_logits)
    taken = exit_index(outputs.exit_prob)
    # Class 0 is told apart at the first exit; the others at the second, and nobody needs the third.
    assert (taken[target == 0] == 0).double().mean() > 0.9
    assert (taken[target > 0] == 1).double().mean() > 0.9
    answers = outputs.logits[taken, torch.arange(len(taken))].argmax(dim=1)
    assert (answers == target).double().mean() > 0.95
    assert len(history.epochs) == 12
    assert history.epochs[-1]["cost"] == pytest.approx(
        sum(
            share * cost for share, cost in zip((history.epochs[-1][f"exit_{e}"] for e in range(3)), COSTS, strict=True)
        )
    )


def test_a_greater_lambda_spends_less() -> None:
    costs = []
    for lam in (0.0, 0.3, 10.0):
        exits = build()
        trainer = trainer_of(exits, lam, epochs=8, selection="last")
        # Heads see a lot of noise, the final exit none: without a price on cost it is the best for all.
        history = trainer.fit(world(1024, noise=1.5), world(seed=1, noise=1.5))
        costs.append(history.epochs[-1]["cost"])
    assert costs[0] > costs[1] > costs[2] == pytest.approx(0.3)
    assert costs[0] > 0.9


def test_one_phase_moves_one_part_only() -> None:
    data = world(64)
    for switch_every, still in ((1000, "heads"), (1, None)):
        exits = build()
        before = copy.deepcopy(exits.state_dict())
        trainer_of(exits, warmup_epochs=0, epochs=1, switch_every=switch_every, selection="last").fit(data, data)
        moved = {name for name, tensor in exits.state_dict().items() if not torch.equal(tensor, before[name])}
        expected = {name for name in before if still is None or not name.startswith(still)}
        # A gate whose inputs all want the same still moves; weight decay alone must move nobody else.
        assert moved == expected


def test_losses_of_the_phases_reach_one_part_each() -> None:
    exits, data = build(), world(16)
    trainer = trainer_of(exits)
    trainer.loss(exits, "gate", data).backward()
    assert all(parameter.grad is None for parameter in exits.heads.parameters())
    assert all(parameter.grad is not None for parameter in exits.gates.parameters())
    exits.zero_grad()
    trainer.loss(exits, "head", data).backward()
    assert all(parameter.grad is None for parameter in exits.gates.parameters())
    assert all(parameter.grad is not None for parameter in exits.heads.parameters())


def test_the_weights_of_the_gate_loss_come_from_the_optimal_exits_of_the_validation_inputs() -> None:
    exits, val = build(), world(seed=1)
    trainer = trainer_of(exits, selection="last")
    assert trainer.pos_weight.tolist() == [1.0, 1.0]
    history = trainer.fit(world(), val)
    outputs = exits(val[0], val[1])
    best = optimal_exits(exit_cross_entropy(outputs.logits, val[2]), torch.tensor(COSTS), 0.2)
    assert history.pos_weight == pytest.approx(positive_weights(best, 2).tolist())
    assert history.best == 3


def test_the_weights_with_the_best_validation_accuracy_stay() -> None:
    exits, val = build(), world(seed=1)
    history = trainer_of(exits, epochs=6, learning_rate=0.3).fit(world(), val)
    accuracies = [epoch["accuracy"] for epoch in history.epochs]
    assert history.best == accuracies.index(max(accuracies))
    outputs = exits(val[0], val[1])
    taken = exit_index(outputs.exit_prob)
    answers = outputs.logits[taken, torch.arange(len(taken))].argmax(dim=1)
    assert float((answers == val[2]).double().mean()) == pytest.approx(max(accuracies))


def test_a_head_that_gets_no_better_is_frozen_with_its_best_weights_and_released_afterwards() -> None:
    exits = build()
    data = world(64)
    seen: list[dict[str, Tensor]] = []

    # Validation inputs of one class that the first head gets right from the first epoch on.
    class Watching(JEITrainer):
        def _outputs(self, val: Any) -> Any:
            seen.append({name: tensor.clone() for name, tensor in exits.state_dict().items()})
            return super()._outputs(val)

    zero = tuple(part[data[2] == 0] for part in data)
    trainer = Watching(
        exits, 0.2, costs=COSTS, epochs=1, warmup_epochs=9, warmup_patience=2, batch_size=32, learning_rate=0.1
    )
    history = trainer.warm_up(world(), zero)
    accuracies = [[epoch[f"exit_{exit}"] for epoch in history.warmup] for exit in range(2)]
    for exit, found in enumerate(accuracies):
        best = found.index(max(found))
        assert best + 2 < 9
        # Stored states are those before training and after every epoch.
        torch.testing.assert_close(exits.state_dict()[f"heads.{exit}.weight"], seen[best + 1][f"heads.{exit}.weight"])
    assert len(history.warmup) == max(found.index(max(found)) for found in accuracies) + 3
    assert all(parameter.requires_grad for parameter in exits.parameters())


def test_the_warm_up_moves_heads_alone() -> None:
    exits = build()
    before = copy.deepcopy(exits.state_dict())
    trainer_of(exits).warm_up(world(), world(seed=1))
    for name, tensor in exits.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("gates"), name


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone() -> None:
    states = []
    for seed in (1, 1, 2):
        exits = build()
        before = torch.get_rng_state()
        trainer_of(exits, seed=seed, selection="last").fit(world(), world(seed=1))
        assert torch.equal(before, torch.get_rng_state())
        states.append(exits.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


class Net(nn.Module):
    """Two blocks and a dropout in front."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_classes, self.num_features = 3, 6
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    features, _, target = world(count, seed)
    return features[:, 1].contiguous(), target


def network(dropout: float = 0.0) -> EarlyExit:
    torch.manual_seed(0)
    return EarlyExit(Net(dropout), blocks="blocks")


def test_training_on_kept_features_equals_training_through_the_frozen_backbone() -> None:
    whole, kept = network(), network()
    (x, target), (val_x, val_target) = inputs(), inputs(seed=1)
    options: dict[str, Any] = {"epochs": 2, "warmup_epochs": 1, "batch_size": 32, "switch_every": 1}
    JEITrainer(whole, 0.2, **options).fit((x, target), (val_x, val_target))
    features = collect_features(kept, x, batch_size=40)
    JEITrainer(kept.exits, 0.2, costs=kept.costs, **options).fit(
        (*features, target), (*collect_features(kept, val_x), val_target)
    )
    for name, tensor in whole.exits.state_dict().items():
        torch.testing.assert_close(tensor, kept.exits.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_the_backbone_never_moves_and_its_dropout_is_on() -> None:
    model = network(dropout=0.5)
    before = copy.deepcopy(model.backbone.state_dict())
    modes = []
    model.backbone.dropout.register_forward_hook(lambda layer, _inputs, _output: modes.append(layer.training))  # type: ignore[union-attr,operator]
    JEITrainer(model, 0.2, epochs=1, warmup_epochs=1, batch_size=32).fit(inputs(), inputs(32, seed=1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    assert modes.count(True) == 2 * 3  # every training batch; validation is without
    assert False in modes


def test_features_are_kept_in_order_whatever_the_batch() -> None:
    model = network(dropout=0.5).train()
    x = inputs(50)[0]
    features, logits = collect_features(model, x, batch_size=7)
    assert model.backbone.training
    outputs = model.eval()(x)
    torch.testing.assert_close(features, outputs.features)
    torch.testing.assert_close(logits, outputs.logits[-1])


def test_batches_of_ones_own_are_taken() -> None:
    own, given = build(), build()
    data, val = world(), world(seed=1)
    trainer_of(own, seed=5).fit(data, val)
    trainer_of(given, seed=5).fit(epoch_batches(list(data), 32, 5), val)
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lam": -1.0}, "lam must not be negative"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"switch_every": 0}, "switch_every must be positive"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative"),
        ({"final_learning_rate": 1.0}, "final_learning_rate must lie in"),
        ({"selection": "first"}, "selection must be one of 'accuracy', 'last'"),
        ({"head_weighting": "soft"}, "weighting must be one of"),
        ({"costs": (0.5, 0.4, 1.0)}, "rise"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        JEITrainer(build(), **{"lam": 0.1, "costs": COSTS, **options})


def test_missing_costs_and_data_are_named() -> None:
    with pytest.raises(ValueError, match="costs must be given for ExitHeads"):
        JEITrainer(build(), 0.1)
    data = world(64)
    nobody = tuple(part[:0] for part in data)
    with pytest.raises(ValueError, match="val must hold at least one input"):
        trainer_of(build()).fit(data, nobody)
    with pytest.raises(ValueError, match="inputs must hold at least one"):
        collect_features(network())
