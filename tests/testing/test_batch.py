"""Modules that mix the batch axis up are caught by the check that promises otherwise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.testing import check_module
from headgate.validate import check_floating, check_integer, check_shape
from tests.testing.helpers import DIM, Rows, broken, rows, sequences


def test_squeezing_away_a_batch_of_one_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x).squeeze()

    failures = broken(Broken)
    assert list(failures) == ["batch size"]
    assert "with 1 batch entries output has 1 axes, with 4 it has 2" in failures["batch size"]


def test_an_even_batch_taken_for_granted_is_caught_unless_nothing_else_is_promised() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x).unflatten(0, (2, -1)).flatten(0, 1)

    failures = broken(Broken)
    assert list(failures) == ["batch size", "batch independence"]
    check_module(Broken, rows, any_batch_size=False, compile=False, export=False)


def test_statistics_over_the_batch_in_evaluation_mode_are_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y - y.mean(0)

    failures = broken(Broken)
    assert list(failures) == ["batch independence"]
    assert "changing entry 0 changes others" in failures["batch independence"]
    check_module(Broken, rows, batch_independent=False, compile=False, export=False)


def test_state_that_leaks_from_the_last_entry_to_the_one_before_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return torch.cat([y[:-2], y[-2:] * y[-1:].abs().amax(-1, keepdim=True)])

    failures = broken(Broken)
    assert list(failures) == ["batch permutation", "batch independence"]


def test_a_position_along_the_batch_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None]

    failures = broken(Broken)
    assert list(failures) == ["batch permutation", "batch independence"]
    assert "entry 3 alone gives another result" in failures["batch independence"]


def test_batch_and_length_exchanged_are_caught() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            check_shape("x", x, (None, None, DIM), "batch, length, dim")
            check_floating("x", x)
            return x.reshape(x.shape[1], x.shape[0], DIM).cumsum(0).reshape(x.shape)

    assert {"batch permutation", "batch independence"} <= set(broken(Broken, sequences))


def test_a_loss_must_say_that_its_entries_depend_on_each_other() -> None:
    class Loss(nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            check_shape("logits", logits, (None, None), "batch, classes")
            check_floating("logits", logits)
            check_shape("target", target, (logits.shape[0],), "batch")
            check_integer("target", target)
            return F.cross_entropy(logits, target)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(4, 5, generator=generator), torch.randint(5, (4,), generator=generator)

    failures = broken(Loss, draw)
    assert failures == {"batch independence": "no output has a batch axis"}
    check_module(Loss, draw, batch_independent=False, compile=False, export=False)


def test_a_loss_that_depends_on_the_order_is_caught() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return (y[1:] - y[:-1]).square().mean() + y.mean() if len(x) > 1 else y.mean()

    assert list(broken(Broken, batch_independent=False)) == ["batch permutation"]


def test_a_matrix_between_entries_may_be_permuted_on_both_axes() -> None:
    class Similarity(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            return y @ y.mT

    check_module(Similarity, rows, batch_independent=False, compile=False, export=False)


def test_flattened_entries_may_be_permuted_in_blocks() -> None:
    class Flat(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x).reshape(-1, 2)

    check_module(Flat, rows, batch_independent=False, compile=False, export=False)


def test_one_example_entry_is_too_few() -> None:
    failures = broken(Rows, (torch.randn(1, DIM),))
    assert set(failures) == {"batch permutation", "batch independence"}
    assert "one batch entry" in failures["batch permutation"]


def test_inputs_without_a_batch_axis_are_named() -> None:
    class Scalar(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            check_shape("x", x, (), "")
            check_floating("x", x)
            return x.sigmoid()

    failures = broken(Scalar, (torch.tensor(0.5),))
    assert set(failures) == {"batch size", "batch permutation", "batch independence"}
    assert "no input has a batch axis" in failures["batch size"]


def test_fixed_example_inputs_find_a_leak_as_well() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return self.linear(x) + x.mean(0)

    assert list(broken(Broken, (torch.randn(4, DIM),))) == ["batch independence"]
