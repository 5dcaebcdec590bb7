"""The suite as a whole: sound modules of many kinds pass it, and its report and error say what a reader needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from headgate.testing import CHECKS, ContractCase, ContractError, check_case, check_module
from headgate.validate import check_floating, check_integer, check_shape
from tests.testing.helpers import DIM, Rows, rows, sequences


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        check_shape("images", images, (None, 3, None, None), "batch, channels, height, width")
        check_floating("images", images)
        return self.drop(F.gelu(self.norm(self.conv(images))))


class Loss(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        check_shape("logits", logits, (None, None), "batch, classes")
        check_floating("logits", logits)
        check_shape("target", target, (logits.shape[0],), "batch")
        check_integer("target", target)
        return F.cross_entropy(logits, target)


class LanguageModel(nn.Module):
    """An embedding tied to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, DIM)
        self.head = nn.Linear(DIM, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        check_shape("ids", ids, (None, None), "batch, length")
        check_integer("ids", ids)
        return self.head(self.embedding(ids).cumsum(1))


class Routed(NamedTuple):
    output: Tensor
    expert: Tensor
    load: Tensor


class Experts(nn.Module):
    """Hard routing: an expert without tokens gets no gradient, and rounding may flip a choice."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, 3)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Routed:
        check_shape("x", x, (None, None, DIM), "batch, length, dim")
        check_floating("x", x)
        probabilities = self.router(x).softmax(-1)
        weight, choice = probabilities.max(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        mask = F.one_hot(choice, 3).to(outputs.dtype)
        return Routed((outputs * mask[..., None]).sum(-2) * weight[..., None], choice, probabilities.mean((0, 1)))


class Attention(nn.Module):
    """Two inputs, one of them boolean, in a container; a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor, masks: list[Tensor]) -> dict[str, Tensor]:
        check_shape("x", x, (None, None, DIM), "batch, length, dim")
        check_floating("x", x)
        check_shape("masks", masks[0], (x.shape[0], x.shape[1]), "batch, length")
        q, k, v = self.qkv(x).chunk(3, -1)
        return {"y": F.scaled_dot_product_attention(q, k, v, masks[0][:, None, :])}


def images(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randn(4, 3, 5, 6, generator=generator),)


def labels(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 7, generator=generator), torch.randint(7, (4,), generator=generator)


def tokens(generator: torch.Generator) -> tuple[Tensor]:
    return (torch.randint(11, (4, 5), generator=generator),)


def masked(generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    mask = torch.rand(4, 5, generator=generator) > 0.3
    return torch.randn(4, 5, DIM, generator=generator), [mask.index_fill(1, torch.tensor(0), True)]


SOUND: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "linear": (Rows, rows, {}),
    "convolution": (Convolution, images, {}),
    "loss": (Loss, labels, {"batch_independent": False}),
    "embedding": (LanguageModel, tokens, {}),
    "experts": (Experts, sequences, {}),
    "attention": (Attention, masked, {}),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_module_keeps_all_promises(kind: str) -> None:
    factory, inputs, options = SOUND[kind]
    report = check_module(factory, inputs, **options)
    counts = {result.name: result.count for result in report.results}
    left_out = {result.name for result in report.results if result.left_out is not None}
    assert list(counts) == [check.name for check in CHECKS]
    assert left_out == ({"batch independence"} if kind == "loss" else set())
    assert all(count > 0 for name, count in counts.items() if name not in left_out)


def test_one_error_names_all_broken_promises_what_was_seen_and_how_to_mend() -> None:
    class Broken(Rows):
        def apply_to(self, x: Tensor) -> Tensor:
            return (self.linear(x) + x.mean(0)).squeeze()

    with pytest.raises(ContractError) as caught:
        check_module(Broken, rows, compile=False, export=False)
    error = caught.value
    assert isinstance(error, AssertionError)
    assert error.checks == ("batch size", "batch independence")
    assert str(error).startswith("Broken breaks 2 of its promises:\n  batch size: with 1 batch entries")
    assert str(error).count("mend: ") == 2
    assert all(failure.seen in str(error) and failure.mend in str(error) for failure in error.failures)
    assert [result.name for result in error.report.results] == [check.name for check in CHECKS]


def test_the_report_is_a_short_table_that_says_what_was_left_out() -> None:
    case = ContractCase(Rows, rows, compile=False, export=False)
    report = check_case(case)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"Rows: {report.count} comparisons")
    assert len(lines) == 1 + len(CHECKS)
    assert any(line.split() == ["compile", "left", "out:", "compile=False"] for line in lines)
    console = Console(record=True, width=80)
    console.print(report)
    assert "left out: export=False" in console.export_text()


def test_every_check_states_its_promise_in_one_sentence() -> None:
    for check in CHECKS:
        assert check.promise.endswith("."), check.name
        assert 20 < len(check.promise) < 120, check.name
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_dataclasses_as_inputs_are_understood() -> None:
    @dataclass(frozen=True)
    class Batch:
        features: Tensor
        name: str

    class Sound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = Rows()

        def forward(self, batch: Batch) -> Tensor:
            check_shape("batch", batch.features, (None, DIM), "batch, dim")
            check_floating("batch", batch.features)
            return self.rows(batch.features)

    check_module(Sound, lambda generator: (Batch(*rows(generator), "some"),), export=False)


def test_wrong_arguments_of_the_suite_are_refused() -> None:
    with pytest.raises(TypeError, match="example_inputs must be a tuple or a function, got list"):
        check_module(Rows, [1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="batch_independant"):
        check_module(Rows, rows, batch_independant=False)
