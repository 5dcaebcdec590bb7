"""What all checks share: building the module, drawing inputs, running it under a seed, counting comparisons."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from headgate.testing.case import ContractCase
from headgate.testing.trees import cast, difference, leaves, map_tensors, tensors

__all__ = ["BrokenPromiseError", "Trial", "argument_names", "name_inputs"]


class BrokenPromiseError(Exception):
    """Ends a check: what was seen, and how to mend it."""

    def __init__(self, seen: str, mend: str) -> None:
        super().__init__(seen)
        self.seen = seen
        self.mend = mend


@dataclass
class Trial:
    """One case under trial.

    Attributes:
        case: the module and its promises.
        compile_backend: backend of ``torch.compile``.
        count: comparisons made by the check that runs now.
        doing: what that check does now, for the message should the module raise.
    """

    case: ContractCase
    compile_backend: str
    count: int = 0
    doing: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh module, initialised from ``seed``; the caller's random state stays as it was."""
        with seeded(seed):
            return self.case.factory()

    def draw(self, seed: int = 0) -> tuple[Any, ...]:
        """Example inputs."""
        return tuple(self.case.inputs(torch.Generator().manual_seed(seed)))

    def run(self, module: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> Any:
        """The output without gradients, under ``seed``, detached from the inputs."""
        with seeded(seed), torch.no_grad():
            return module(*inputs)

    def differentiate(
        self, module: nn.Module, inputs: tuple[Any, ...], seed: int = 0, call: Callable[..., Any] | None = None
    ) -> tuple[Any, dict[str, Tensor | None]]:
        """The output, and the gradients of all parameters and floating inputs by name.

        What is differentiated is the sum of all floating outputs under fixed random weights: a plain sum would hide
        gradients that cancel, as those of a softmax or a normalisation do.

        Args:
            module: owns the parameters.
            inputs: its inputs; they are copied.
            seed: of torch's global generator while it runs.
            call: what is called in the module's place, e.g. its compiled form.
        """
        inputs = map_tensors(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), inputs)
        module.zero_grad(set_to_none=True)
        with seeded(seed):
            output = (module if call is None else call)(*inputs)
            loss = weighted_sum(output)
            if loss is not None:
                loss.backward()
        gradients = {name: tensor.grad for name, tensor in name_inputs(module, inputs) if tensor.requires_grad}
        gradients |= {name: parameter.grad for name, parameter in module.named_parameters()}
        return map_tensors(lambda t: t.detach(), output), gradients

    def cast(self, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        """The inputs with all floating tensors in ``dtype``."""
        result: tuple[Any, ...] = cast(inputs, dtype)
        return result

    def expect(self, kept: bool, seen: str, mend: str) -> None:
        """Count one comparison; end the check where it failed."""
        self.count += 1
        if not kept:
            self.fail(seen, mend)

    def expect_same(self, actual: Any, expected: Any, tolerance: float, what: str, mend: str) -> None:
        """Count one comparison of two trees; end the check where they differ by more than ``tolerance``."""
        problem = difference(actual, expected, tolerance)
        self.expect(problem is None, f"{what}: {problem}", mend)

    def expect_finite(self, tree: Any, what: str, mend: str) -> None:
        """Count one comparison; end the check where a tensor holds NaN or infinity."""
        for name, leaf in tensors(tree, "output"):
            bad = int((~leaf.isfinite()).sum()) if leaf.is_floating_point() or leaf.is_complex() else 0
            self.expect(bad == 0, f"{what}: {name} holds NaN or infinity in {bad} of {leaf.numel()} values", mend)

    def expect_finite_gradients(self, gradients: dict[str, Tensor | None], what: str, mend: str) -> None:
        """Count one comparison per gradient; end the check where one holds NaN or infinity."""
        for name, gradient in gradients.items():
            if gradient is not None:
                bad = int((~gradient.isfinite()).sum())
                self.expect(
                    bad == 0,
                    f"{what}: the gradient of {name} holds NaN or infinity in {bad} of {gradient.numel()} values",
                    mend,
                )

    def fail(self, seen: str, mend: str) -> NoReturn:
        """End the check.

        Raises:
            BrokenPromiseError: always.
        """
        raise BrokenPromiseError(seen, mend)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global CPU generator at ``seed``, and put its state back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def weighted_sum(output: Any) -> Tensor | None:
    """The sum of all differentiable outputs under fixed random weights; None where there are none."""
    generator = torch.Generator().manual_seed(5)
    total = None
    for _, leaf in tensors(output, "output"):
        if not leaf.requires_grad:
            continue
        real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        weight = torch.randn(real.shape, generator=generator) if real.dim() else torch.ones(())
        term = (real * weight.to(real.dtype)).sum()
        total = term if total is None else total + term
    return total


def argument_names(module: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """The name of ``forward``'s parameter behind each positional input."""
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}.{index}" for index in range(len(inputs) - len(names))]
        elif parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    return names[: len(inputs)]


def name_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor among the inputs as ``inputs.<argument>``, with the path inside it where it is a container."""
    for name, value in zip(argument_names(module, inputs), inputs, strict=True):
        for path, leaf in leaves(value, f"inputs.{name}"):
            if isinstance(leaf, Tensor):
                yield path, leaf
