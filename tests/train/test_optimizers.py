from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate.train import count_parameters, make_optimizer, seeded


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm((2, 4))  # its weight has two axes
        self.linear = nn.Linear(4, 3)
        self.position_bias = nn.Parameter(torch.zeros(3, 3))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def settings(optimizer: torch.optim.Optimizer, model: nn.Module, key: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group[key] for group in optimizer.param_groups for p in group["params"]}


def test_norms_biases_and_scalars_get_no_weight_decay() -> None:
    model = Block()
    assert settings(make_optimizer(model, weight_decay=0.1), model, "weight_decay") == {
        "embedding.weight": 0.1,
        "linear.weight": 0.1,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "linear.bias": 0.0,
        "position_bias": 0.0,
        "temperature": 0.0,
    }


def test_everything_trainable_decays_when_asked() -> None:
    model = Block()
    decays = settings(make_optimizer(model, weight_decay=0.1, decay_norms_and_biases=True), model, "weight_decay")
    assert len(decays) == 7
    assert set(decays.values()) == {0.1}


def test_parameters_with_the_same_settings_share_a_group_in_order_of_first_appearance() -> None:
    model = Block()
    optimizer = make_optimizer(model, weight_decay=0.1, overrides={"temperature": {"lr": 0.5}})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups] == [
        ["position_bias", "norm.weight", "norm.bias", "linear.bias"],
        ["temperature"],
        ["embedding.weight", "linear.weight"],
    ]


def test_overrides_change_what_matches_and_later_ones_win() -> None:
    model = Block()
    optimizer = make_optimizer(
        model, learning_rate=0.1, overrides={"linear.*": {"lr": 0.2}, "*.bias": {"lr": 0.3, "weight_decay": 0.5}}
    )
    rates, decays = settings(optimizer, model, "lr"), settings(optimizer, model, "weight_decay")
    assert (rates["linear.weight"], rates["linear.bias"], rates["norm.bias"], rates["norm.weight"]) == (
        0.2,
        0.3,
        0.3,
        0.1,
    )
    assert (decays["linear.bias"], decays["linear.weight"]) == (0.5, 0.0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_equal_those_of_the_plain_torch_optimizer(name: str) -> None:
    def train(make) -> torch.Tensor:
        with seeded(0):
            model = nn.Linear(5, 4)
            inputs = torch.randn(6, 5)
        optimizer = make(model)
        for _ in range(5):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach()

    def plain(model: nn.Module) -> torch.optim.Optimizer:
        if name == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), foreach=False)
        return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.2, momentum=0.7, foreach=False)

    def ours(model: nn.Module) -> torch.optim.Optimizer:
        return make_optimizer(model, name, 0.1, 0.2, momentum=0.7, betas=(0.8, 0.9), decay_norms_and_biases=True)

    torch.testing.assert_close(train(ours), train(plain), rtol=1e-5, atol=1e-6)


def test_complex_parameters_can_be_optimised() -> None:
    model = nn.ParameterList([torch.zeros(2, 2, dtype=torch.complex64)])
    optimizer = make_optimizer(model, learning_rate=0.1)
    (model[0] - (1 + 2j)).abs().square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].detach(), torch.full((2, 2), 0.1 + 0.1j), rtol=1e-4, atol=1e-5)


def test_count_parameters_counts_shared_ones_once_and_can_leave_out_frozen_ones() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    assert count_parameters(model) == 12
    assert count_parameters(model, trainable_only=True) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "lion"}, "name must be 'adamw' or 'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"name": "sgd", "momentum": 1.0}, "momentum"),
        ({"overrides": {"nothing.*": {"lr": 1.0}}}, "matches none"),
        ({"overrides": {"*": {"momentum": 0.9}}}, "unknown settings"),
        ({"overrides": {"*": {"lr": -0.1}}}, r"overrides\['\*'\] must not have a negative lr, got -0.1"),
        ({"overrides": {"bias": {"weight_decay": -1}}}, "negative weight_decay"),
    ],
)
def test_bad_settings_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_optimizer(nn.Linear(2, 2), **arguments)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="requires_grad"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False))
