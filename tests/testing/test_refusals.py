"""Modules that let bad input in, or crash on it from deep inside, are caught."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.testing import BadInput, check_module
from headgate.validate import check_floating, check_integer, check_shape
from tests.testing.helpers import DIM, Rows, broken, rows, sequences


class Open(nn.Module):
    """A linear layer that checks what the tests want it to check."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        check_floating("x", x)
        return self.linear(x)


def test_integers_that_crash_deep_inside_are_caught() -> None:
    class Broken(nn.Linear):
        def __init__(self) -> None:
            super().__init__(DIM, DIM)

    failures = broken(Broken)
    assert list(failures) == ["refusals"]
    assert "inputs.input of dtype int64 gives RuntimeError" in failures["refusals"]


def test_integers_taken_without_a_word_are_caught() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x)

    assert broken(Broken) == {"refusals": "inputs.x of dtype int64 is taken without a word"}


def test_floats_in_place_of_indices_are_caught() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, DIM)

        def forward(self, ids: Tensor) -> Tensor:
            check_shape("ids", ids, (None, None), "batch, length")
            return self.embedding(ids.long())

    def draw(generator: torch.Generator) -> tuple[Tensor]:
        return (torch.randint(7, (4, 5), generator=generator),)

    assert broken(Broken, draw) == {"refusals": "inputs.ids of dtype float32 is taken without a word"}


def test_a_wrong_size_that_crashes_deep_inside_is_caught() -> None:
    failures = broken(Open)
    assert list(failures) == ["refusals"]
    assert "inputs.x of shape (4, 7) in place of (4, 6) gives RuntimeError" in failures["refusals"]


def test_a_rank_that_is_handed_through_soundly_is_fine() -> None:
    class Sound(Open):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1:] != (DIM,):
                raise ValueError(f"x must have dim={DIM}, got {tuple(x.shape)}")
            return super().forward(x)

    check_module(Sound, rows, compile=False, export=False)
    check_module(Sound, sequences, compile=False, export=False)


def test_a_rank_that_gives_another_result_without_a_word_is_caught() -> None:
    class Broken(Open):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1:] != (DIM,):
                raise ValueError(f"x must have dim={DIM}, got {tuple(x.shape)}")
            return super().forward(x).mean(1)

    failures = broken(Broken, sequences)
    assert list(failures) == ["refusals"]
    assert "(1, 4, 5, 6) in place of (4, 5, 6) is taken without a word" in failures["refusals"]


def test_a_missing_batch_axis_that_is_misread_is_caught() -> None:
    class Broken(Open):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1:] != (DIM,) or x.dim() > 3:
                raise ValueError(f"x must have dim={DIM}, got {tuple(x.shape)}")
            return super().forward(x).mean(1)

    failures = broken(Broken, sequences)
    assert "(5, 6) in place of (4, 5, 6) is taken without a word" in failures["refusals"]


class Distance(nn.Module):
    """A loss between two batches of rows that trusts broadcasting."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        check_floating("x", x)
        check_floating("y", y)
        if x.shape[-1] != y.shape[-1] or max(x.dim(), y.dim()) > 2 or (x.dim() == y.dim() and len(x) != len(y)):
            raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
        return (x - y).square().mean()


def test_two_alike_inputs_that_broadcast_are_caught() -> None:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(4, DIM, generator=generator), torch.randn(4, DIM, generator=generator)

    failures = broken(Distance, draw, batch_independent=False)
    assert list(failures) == ["refusals"]
    assert "inputs.x of shape (6,) in place of (4, 6) is taken without a word" in failures["refusals"]


def test_a_mask_of_its_own_shape_may_broadcast() -> None:
    class Masked(Rows):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            check_floating("scale", scale)
            if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != x.shape[0]):
                raise ValueError(f"scale must have shape (batch,) or (), got {tuple(scale.shape)}")
            y: Tensor = super().forward(x)
            return y * (scale[:, None] if scale.dim() else scale)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(4, DIM, generator=generator), torch.randn(4, generator=generator)

    check_module(Masked, draw, compile=False, export=False)


def test_a_batch_that_does_not_fit_the_other_inputs_is_tried() -> None:
    class Broken(nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            check_shape("logits", logits, (None, None), "batch, classes")
            check_floating("logits", logits)
            check_shape("target", target, (None,), "batch")
            check_integer("target", target)
            return -F.log_softmax(logits, -1).gather(1, target[:, None])[:, 0].view(len(logits))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(4, 5, generator=generator), torch.randint(5, (4,), generator=generator)

    failures = broken(Broken, draw)
    assert list(failures) == ["refusals"]
    assert "gives RuntimeError" in failures["refusals"]


def test_a_message_without_the_argument_is_caught() -> None:
    class Broken(Open):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1:] != (DIM,):
                raise ValueError("bad input")
            return super().forward(x)

    failures = broken(Broken)
    assert list(failures) == ["refusals"]
    assert "ValueError: bad input, without the argument's name" in failures["refusals"]


def test_an_expected_size_makes_a_message_clear_enough() -> None:
    class Sound(Open):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1:] != (DIM,):
                raise ValueError(f"the last axis must be {DIM} long")
            return super().forward(x)

    check_module(Sound, rows, compile=False, export=False)


def test_behind_star_args_the_submodule_s_name_counts() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Tensor) -> Tensor:
            return self.inner(*args)

    check_module(lambda: Wrapper(Rows()), rows, compile=False, export=False)
    assert "RuntimeError" in broken(lambda: Wrapper(nn.Linear(DIM, DIM)))["refusals"]


NAN = BadInput("nan", lambda generator: (torch.full((2, DIM), float("nan")),), ValueError, "finite")


def test_bad_inputs_of_the_case_must_be_refused_with_their_error_and_message() -> None:
    class Other(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise TypeError("x must be finite")
            return self.linear(x)

    class Mumbling(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise ValueError("x is bad")
            return self.linear(x)

    class Sound(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            if x.isnan().any():
                raise ValueError("x must be finite")
            return self.linear(x)

    assert broken(Rows, bad_inputs=(NAN,)) == {"refusals": "the bad input 'nan' is taken without a word"}
    assert broken(Other, bad_inputs=(NAN,)) == {"refusals": "the bad input 'nan' gives TypeError: x must be finite"}
    assert broken(Mumbling, bad_inputs=(NAN,)) == {"refusals": "the bad input 'nan' gives ValueError: x is bad"}
    check_module(Sound, rows, bad_inputs=(NAN,), compile=False, export=False)
