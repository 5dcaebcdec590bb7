from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headgate.errors import HeadgateError
from headgate.train import DivergedError, epoch_batches, fit, make_optimizer, seeded
from headgate.train.seeds import random_state
from tests.train.runs import accuracy, cross_entropy, points, small_batches, small_model, small_run


def linear() -> nn.Linear:
    with seeded(0):
        return nn.Linear(3, 1)


def data(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator)


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_losses_and_weights_equal_a_loop_written_by_hand_bit_for_bit(name: str, accumulate: int) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if name == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)

    inputs, labels = points()

    def batches(index: int) -> tuple[Tensor, Tensor]:
        chosen = torch.arange(8 * index, 8 * index + 8) % len(labels)
        return inputs[chosen], labels[chosen]

    trained = small_model()
    history = fit(
        trained,
        batches,
        cross_entropy,
        steps=12,
        optimizer=optimizer(trained),
        schedule=lambda step: 1 / (step + 1),
        clip_norm=0.5,
        accumulate=accumulate,
        log_every=5,
        seed=6,
    )

    model = small_model().train()
    by_hand = optimizer(model)
    losses = []
    with seeded(6):
        for step in range(12):
            by_hand.param_groups[0]["lr"] = 0.1 * (1 / (step + 1))
            values = []
            for part in range(accumulate):
                value, _ = cross_entropy(model, batches(step * accumulate + part))
                (value / accumulate).backward()
                values.append(value.detach())
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            by_hand.step()
            by_hand.zero_grad()
            losses.append(torch.stack(values).mean().item())
    assert history.losses == losses
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert (history.steps, history.stopped_early) == (12, False)
    assert history.seconds > 0


def test_gradients_left_by_the_caller_do_not_enter_the_first_step() -> None:
    model, clean = linear(), linear()
    squared(model, data(9)).backward()
    assert fit(model, data, squared, steps=3).losses == fit(clean, data, squared, steps=3).losses
    assert torch.equal(model.weight, clean.weight)


def test_accumulated_batches_are_one_large_batch() -> None:
    def large(index: int) -> tuple[Tensor, Tensor]:
        parts = [data(3 * index + part) for part in range(3)]
        return torch.cat([inputs for inputs, _ in parts]), torch.cat([target for _, target in parts])

    one, three = linear(), linear()
    expected = fit(one, large, squared, steps=6, learning_rate=0.1)
    history = fit(three, data, squared, steps=6, learning_rate=0.1, accumulate=3)
    assert history.losses == pytest.approx(expected.losses, rel=1e-5)
    torch.testing.assert_close(three.weight, one.weight, rtol=1e-4, atol=1e-6)


def test_every_group_follows_the_schedule_and_has_its_own_rate_again_at_the_end() -> None:
    model = linear()
    optimizer = make_optimizer(model, "sgd", learning_rate=0.1, overrides={"bias": {"lr": 0.4}})
    seen: list[list[float]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return squared(model, batch)

    fit(model, data, loss, steps=3, optimizer=optimizer, schedule=lambda step: [1.0, 0.5, 0.25][step])
    assert seen == [[0.1, 0.4], [0.05, 0.2], [0.025, 0.1]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]


def test_a_list_is_repeated_and_a_function_is_asked_for_rising_indices() -> None:
    asked: list[int] = []

    def batches(index: int) -> tuple[Tensor, Tensor]:
        asked.append(index)
        return data(index % 3)

    by_function = fit(linear(), batches, squared, steps=4, accumulate=2)
    by_list = fit(linear(), [data(index) for index in range(3)], squared, steps=4, accumulate=2)
    assert asked == list(range(8))
    assert by_list.losses == by_function.losses


def test_the_seed_decides_the_run_and_the_global_state_is_left_alone() -> None:
    before = random_state()
    first = small_run("loader", seed=7)[1].losses
    assert random_state() == before
    with seeded(123):
        assert small_run("loader", seed=7)[1].losses == first
        assert small_run("loader", seed=8)[1].losses != first


def test_without_a_seed_the_run_draws_from_the_global_state() -> None:
    with seeded(1):
        first = small_run(seed=None)[1].losses
    with seeded(1):
        assert small_run(seed=None)[1].losses == first
    with seeded(2):
        assert small_run(seed=None)[1].losses != first


def test_evaluation_happens_before_in_between_and_after_in_evaluation_mode_without_gradients() -> None:
    seen: list[tuple[int, bool, bool]] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        seen.append((step, model.training, torch.is_grad_enabled()))
        return {"value": float(step)}

    model = small_model()
    history = small_run(model=model, steps=7, evaluate=evaluate, evaluate_every=3)[1]
    assert seen == [(step, False, False) for step in (0, 3, 6, 7)]
    assert history.metrics == {step: {"value": float(step)} for step in (0, 3, 6, 7)}


def test_evaluation_sees_the_model_after_as_many_updates_as_its_step_says() -> None:
    weights: dict[int, Tensor] = {}

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        weights[step] = model.weight.clone()  # type: ignore[union-attr, operator]
        return {}

    model = linear()
    start = model.weight.detach().clone()
    fit(model, data, squared, steps=4, evaluate=evaluate, evaluate_every=2)
    short = linear()
    fit(short, data, squared, steps=2)
    assert torch.equal(weights[0], start)
    assert torch.equal(weights[2], short.weight)
    assert torch.equal(weights[4], model.weight)


def test_evaluating_more_often_and_drawing_in_it_changes_nothing() -> None:
    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        return {"noise": torch.rand(3).sum().item()}

    seldom = small_run("loader", evaluate=evaluate)[1]
    often = small_run("loader", evaluate=evaluate, evaluate_every=1)[1]
    assert often.losses == seldom.losses


def test_modes_are_restored_and_submodules_in_evaluation_mode_stay_so_while_training() -> None:
    model = small_model()
    model[1].eval()
    seen: set[tuple[bool, bool, bool]] = set()

    def loss(model: Any, batch: Any) -> Any:
        seen.add((model.training, model[1].training, model[3].training))
        return cross_entropy(model, batch)

    fit(model, small_batches("list"), loss, steps=3, evaluate=accuracy, evaluate_every=1)
    assert seen == {(True, False, True)}
    assert (model.training, model[1].training, model[3].training) == (True, False, True)

    model = small_model().eval()
    seen.clear()
    fit(model, small_batches("list"), loss, steps=1)
    assert seen == {(True, True, True)}
    assert not any(module.training for module in model.modules())


def test_stop_ends_the_run_after_the_evaluation_that_it_likes() -> None:
    shown: list[float] = []

    def stop(metrics: Mapping[str, float]) -> bool:
        shown.append(metrics["step_seen"])
        return metrics["step_seen"] >= 4

    history = fit(
        linear(),
        data,
        squared,
        steps=100,
        evaluate=lambda model, step: {"step_seen": step},
        evaluate_every=2,
        stop=stop,
    )
    assert shown == [0, 2, 4]
    assert (history.steps, len(history.losses), history.stopped_early) == (4, 4, True)


@pytest.mark.parametrize(("answer", "steps"), [(torch.tensor(True), 0), (1, 0), (None, 4), (torch.tensor(0), 4)])
def test_stop_may_answer_with_anything_true_or_false(answer: Any, steps: int) -> None:
    history = fit(linear(), data, squared, steps=4, evaluate=lambda model, step: {}, stop=lambda metrics: answer)
    assert history.steps == steps
    assert history.stopped_early is (steps == 0)


def test_seconds_hold_the_evaluations_and_checkpoints_too(tmp_path: Path) -> None:
    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        time.sleep(0.2)
        return {}

    history = fit(linear(), data, squared, steps=1, evaluate=evaluate)
    assert history.seconds >= 0.4
    fit(linear(), data, squared, steps=1, evaluate=evaluate, checkpoints=tmp_path)
    resumed = fit(linear(), data, squared, steps=2, evaluate=evaluate, checkpoints=tmp_path)
    assert resumed.seconds >= 0.6


def test_a_metric_may_be_named_loss() -> None:
    history = fit(linear(), data, squared, steps=1, evaluate=lambda model, step: {"loss": torch.tensor(2.0)})
    assert history.metrics == {0: {"loss": 2.0}, 1: {"loss": 2.0}}


def test_stop_may_end_a_run_before_its_first_step() -> None:
    model = linear()
    start = model.weight.detach().clone()
    history = fit(model, data, squared, steps=5, evaluate=lambda model, step: {"done": 1.0}, stop=lambda metrics: True)
    assert (history.steps, history.losses, history.stopped_early) == (0, [], True)
    assert torch.equal(model.weight, start)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_every", [1, 10, 1000])
def test_a_loss_that_is_not_finite_is_named_by_its_step(bad: float, log_every: int, tmp_path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return squared(model, batch) * (bad if len(calls) == 7 else 1.0)

    with pytest.raises(DivergedError, match=r"the loss of step 6 is (nan|inf)") as caught:
        fit(linear(), data, loss, steps=25, log_every=log_every, checkpoints=tmp_path, checkpoint_every=5)
    assert isinstance(caught.value, HeadgateError)
    assert len(calls) <= min(25, math.ceil(7 / log_every) * log_every + 1, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def test_a_model_that_has_diverged_is_not_evaluated() -> None:
    seen: list[int] = []

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        seen.append(step)
        return {}

    with pytest.raises(DivergedError, match="step 2 is nan"):
        fit(
            linear(),
            lambda index: data(index) if index < 2 else (data(index)[0] * float("nan"), data(index)[1]),
            squared,
            steps=9,
            evaluate=evaluate,
            evaluate_every=2,
        )
    assert seen == [0, 2]


def test_bfloat16_runs_the_loss_in_autocast_and_keeps_the_weights_in_float32() -> None:
    dtypes: set[torch.dtype] = set()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        dtypes.add(output.dtype)
        return functional.mse_loss(output.float(), batch[1])

    model, exact = linear(), linear()
    history = fit(model, data, loss, steps=8, mixed_precision="bf16", learning_rate=0.05)
    assert dtypes == {torch.bfloat16}
    assert model.weight.dtype == torch.float32
    expected = fit(exact, data, squared, steps=8, learning_rate=0.05)
    assert history.losses == pytest.approx(expected.losses, rel=0.05)
    assert history.losses != expected.losses


def test_float16_scales_the_loss_so_that_small_gradients_survive() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).float().mean() * 1e-6

    def shift(mixed_precision: str) -> Tensor:
        model = linear()
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e6)
        fit(
            model,
            lambda index: (torch.full((4, 3), 1e-2),),
            loss,
            steps=1,
            optimizer=optimizer,
            mixed_precision=mixed_precision,
        )
        return model.weight.detach() - before

    # 1e-8 is below the smallest float16: without scaling the gradient would be zero.
    torch.testing.assert_close(shift("fp16"), shift("no"), rtol=2e-3, atol=0)
    assert shift("fp16").abs().min() > 0


def test_float16_clips_the_gradients_at_their_own_scale() -> None:
    def shift(mixed_precision: str) -> Tensor:
        model = linear()
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e3)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return 1e-3 * functional.mse_loss(model(batch[0]).float(), batch[1])

        fit(model, data, loss, steps=1, optimizer=optimizer, clip_norm=1e-4, mixed_precision=mixed_precision)
        return model.weight.detach() - before

    torch.testing.assert_close(shift("fp16"), shift("no"), rtol=1e-2, atol=1e-4)


def test_parameters_without_gradient_and_buffers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, data, squared, steps=3, optimizer=make_optimizer(model, weight_decay=0.5, learning_rate=0.1))
    assert torch.equal(model[0].weight, before)


def test_a_compiled_wrapper_is_trained_like_the_model_itself() -> None:
    model = linear()
    expected = fit(linear(), data, squared, steps=4).losses
    assert fit(torch.compile(model, backend="eager"), data, squared, steps=4).losses == pytest.approx(expected)


def alternating() -> Any:
    """A loss that logs another name for every other batch."""
    names = iter(["odd", "even"] * 10)
    return lambda model, batch: (squared(model, batch), {next(names): 1.0})


def ok(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"model": linear(), "batches": data, "loss": squared, "steps": 3, **changes}
    return fit(arguments.pop("model"), arguments.pop("batches"), arguments.pop("loss"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got steps=0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got float"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"keep": 0}, ValueError, "keep"),
        ({"log_every": 0}, ValueError, "log_every"),
        ({"evaluate_every": 0, "evaluate": lambda model, step: {}}, ValueError, "evaluate_every"),
        ({"checkpoint_every": 0, "checkpoints": "here"}, ValueError, "checkpoint_every"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate"),
        ({"evaluate_every": 2}, ValueError, "evaluate_every needs evaluate"),
        ({"stop": lambda metrics: False}, ValueError, "stop needs evaluate"),
        ({"checkpoint_every": 2}, ValueError, "checkpoint_every needs checkpoints"),
        ({"model": lambda x: x}, TypeError, "model must be an nn.Module, got function"),
        ({"model": nn.Linear(3, 1).requires_grad_(False)}, ValueError, "requires_grad"),
        ({"model": nn.ReLU()}, ValueError, "requires_grad"),
        ({"model": nn.Linear(3, 1, device="meta")}, ValueError, "meta device"),
        ({"batches": []}, ValueError, "batches must not be empty"),
        ({"batches": iter([data(0)])}, TypeError, "batches must be"),
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision must be one of"),
        (
            {"loss": lambda model, batch: 1.0},
            TypeError,
            "loss must return a scalar tensor, or that and a dict, got float",
        ),
        (
            {"loss": lambda model, batch: model(batch[0])},
            ValueError,
            r"loss must return a scalar tensor, got shape \(4, 1\)",
        ),
        ({"loss": lambda model, batch: batch[0].mean()}, ValueError, "depend on the model's parameters"),
        ({"loss": lambda model, batch: (squared(model, batch), {"step": 1.0})}, ValueError, r"got \['step'\]"),
        (
            {"loss": lambda model, batch: (squared(model, batch), {}, 1.0)},
            TypeError,
            "loss must return a scalar tensor, or that and a dict, got tuple",
        ),
        (
            {"loss": lambda model, batch: (squared(model, batch), 1.0)},
            TypeError,
            "loss must return a scalar tensor, or that and a dict, got float in its place",
        ),
        (
            {"loss": lambda model, batch: (squared(model, batch), {"a": batch[0]}), "log": "log"},
            ValueError,
            r"loss must log scalars, got 'a' of shape \(4, 3\)",
        ),
        (
            {"loss": lambda model, batch: (squared(model, batch), {"a": "text"}), "log": "log"},
            TypeError,
            "loss must log scalars, got 'a': 'text'",
        ),
        (
            {"loss": alternating(), "log": "log", "accumulate": 2},
            ValueError,
            r"loss must log the same names for every batch, got \[\['odd'\], \['even'\]\]",
        ),
        ({"loss": 3.0}, TypeError, "loss must be a function of model and batch, got float"),
        ({"optimizer": "adamw"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"schedule": 0.1}, TypeError, "schedule must be a function, got float"),
        ({"evaluate": {"accuracy": 1.0}}, TypeError, "evaluate must be a function, got dict"),
        ({"evaluate": lambda model, step: {}, "stop": 3}, TypeError, "stop must be a function, got int"),
        ({"evaluate": lambda model, step: 3.0}, TypeError, "evaluate must return a dict of numbers, got float"),
        (
            {"evaluate": lambda model, step: {"a": "b"}},
            TypeError,
            "evaluate must return a dict of numbers, got 'a': 'b'",
        ),
        ({"evaluate": lambda model, step: {"a": torch.ones(2)}}, TypeError, "evaluate must return .*, got 'a': tensor"),
        ({"evaluate": lambda model, step: {"seconds": 1.0}}, ValueError, r"got \['seconds'\]"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_input_is_refused_with_its_name(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        ok(**changes)


def test_optional_and_heavy_packages_are_not_loaded_with_the_loop() -> None:
    code = "import sys, headgate.train; print([n for n in ('accelerate', 'rich', 'tensorboard') if n in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fit_learns_the_small_problem() -> None:
    inputs, labels = points()
    model = small_model(dropout=0.0)
    history = fit(
        model,
        epoch_batches([inputs, labels], 20, seed=0),
        cross_entropy,
        steps=150,
        learning_rate=0.02,
        evaluate=accuracy,
    )
    assert history.metrics[150]["accuracy"] > 0.95 > history.metrics[0]["accuracy"]
