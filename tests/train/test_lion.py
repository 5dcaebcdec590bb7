"""Lion: its update by hand, weight decay, closures, state, and training with it."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from headgate.train import Lion, fit


def test_two_updates_computed_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    weight.grad = torch.tensor([0.5, -4.0, 0.0])
    optimizer.step()
    # The running average starts at 0, so the signs are those of the gradient; sign(0) = 0. Decay is 0.1 · 0.2 of the weight.
    torch.testing.assert_close(weight.data, torch.tensor([0.98 - 0.1, -1.96 + 0.1, 2.94]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor([0.25, -2.0, 0.0]))
    weight.grad = torch.tensor([-1.0, 30.0, 1.0])
    optimizer.step()
    # 0.9 m + 0.1 g = 0.125, 1.2, 0.1
    torch.testing.assert_close(weight.data, torch.tensor([0.88 * 0.98 - 0.1, -1.86 * 0.98 - 0.1, 2.94 * 0.98 - 0.1]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor([-0.375, 14.0, 0.5]))


def test_steps_do_not_depend_on_the_size_of_the_gradient() -> None:
    weights = []
    for scale in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.linspace(-1, 1, 8))
        optimizer = Lion([weight], lr=0.01)
        for step in range(5):
            weight.grad = scale * torch.randn(8, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        weights.append(weight.data)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])


def test_parameters_without_a_gradient_stay_and_groups_have_their_own_settings() -> None:
    still, slow, fast = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = Lion([{"params": [still, slow]}, {"params": [fast], "lr": 0.5}], lr=0.1, weight_decay=0.0)
    slow.grad = fast.grad = torch.ones(2)
    optimizer.step()
    assert still.tolist() == [1, 1]
    torch.testing.assert_close(slow.data, torch.full((2,), 0.9))
    torch.testing.assert_close(fast.data, torch.full((2,), 0.5))
    assert still not in optimizer.state


def test_a_closure_is_called_with_gradients_and_its_loss_comes_back() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = Lion([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9
    assert weight.item() == pytest.approx(2.9)


def test_a_run_goes_on_from_its_saved_state() -> None:
    def run(steps: range, weight: nn.Parameter, optimizer: Lion) -> None:
        for step in steps:
            weight.grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    whole = nn.Parameter(torch.zeros(4))
    run(range(8), whole, Lion([whole], lr=0.1))
    weight = nn.Parameter(torch.zeros(4))
    first = Lion([weight], lr=0.1)
    run(range(3), weight, first)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = Lion([weight], lr=0.1)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(range(3, 8), weight, second)
    assert torch.equal(weight, whole)


def test_the_training_loop_takes_it_and_resumes_it(tmp_path) -> None:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    target = x @ torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])

    def train(steps: int, folder) -> tuple[nn.Linear, list[float]]:
        torch.manual_seed(1)
        model = nn.Linear(5, 1)
        history = fit(
            model,
            lambda step: (x, target),
            lambda net, batch: nn.functional.mse_loss(net(batch[0])[:, 0], batch[1]),
            steps=steps,
            optimizer=Lion(model.parameters(), 0.02),
            checkpoints=folder,
        )
        return model, history.losses

    whole, losses = train(200, tmp_path / "whole")
    assert losses[-1] < 0.05 * losses[0]
    train(120, tmp_path / "parts")
    resumed, _ = train(200, tmp_path / "parts")
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"betas": (-0.1, 0.9)}, "betas must lie in"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lion([nn.Parameter(torch.ones(1))], **options)
