"""Parity with the published code: stored inputs, weights and results, and the checks that compare ours with them.

A golden file is a JSON beside a safetensors file of the same name in ``$HEADGATE_SHARED/golden/<slug>/``. The JSON's
field ``case`` names the check; the check stands in ``tests/golden/cases/<slug with underscores>.py``::

    from tests.golden.harness import Golden, golden_case

    @golden_case("mha")
    def check(golden: Golden) -> None:
        layer = Attention(**golden.config)
        layer.load_state_dict(convert(golden.state("state.")))
        x = golden.tensors["in.x"].requires_grad_()
        y = layer(x)
        golden.assert_close("output", y, "out.y")
        y.backward(golden.tensors["in.do"])
        golden.assert_close("gradient of x", x.grad, "grad.x")

A check must compare at least one tensor. The summary at the end of the run shows, per case, the worst relative error
and the stored tensors that the check never read.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

__all__ = ["CASES", "Comparison", "Golden", "find_check", "golden_case", "load_cases", "load_golden", "shared_folder"]

Check = Callable[["Golden"], None]

CASES: dict[tuple[str, str], Check] = {}
"""(module of the method, case) → check; filled by :func:`golden_case`."""

CASE_PACKAGE = "tests.golden.cases"
_TOLERANCE_TEXT = re.compile(r"(rtol|atol)\s*[=:]?\s*([0-9.]+(?:e[+-]?[0-9]+)?)", re.IGNORECASE)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one golden file, by name; remembers which ones were read. Every read gives a fresh copy."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(f"no golden tensor {name!r}; stored are {', '.join(sorted(self._tensors))}")
        self._read.add(name)
        return self._tensors[name].clone()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def unread(self) -> list[str]:
        """The names of the tensors that nobody asked for."""
        return sorted(set(self._tensors) - self._read)


@dataclass(frozen=True)
class Comparison:
    """One comparison: what was compared, and the worst error relative to the largest golden value."""

    name: str
    relative_error: float


@dataclass
class Golden:
    """One golden file.

    Attributes:
        path: the JSON file.
        case: which check the file is for.
        config: the JSON's ``config``, empty where there is none.
        json: the whole JSON.
        tensors: name → tensor of the safetensors file; every read gives a copy that may be changed.
        comparisons: what :meth:`assert_close` and :meth:`assert_equal` have compared so far.
    """

    path: Path
    case: str
    config: dict[str, Any]
    json: dict[str, Any]
    tensors: StoredTensors
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def slug(self) -> str:
        """The method's slug: the name of the folder."""
        return self.path.parent.name

    @property
    def rtol(self) -> float:
        """The relative tolerance that the file states; 0 where it states ``atol`` alone."""
        return self.tolerances()[0]

    @property
    def atol(self) -> float:
        """The absolute tolerance that the file states; 0 where it states ``rtol`` alone."""
        return self.tolerances()[1]

    def tolerances(self, part: str | None = None) -> tuple[float, float]:
        """The tolerance ``(rtol, atol)`` of the file, or of one named part of it, e.g. ``"sampler"``.

        Raises:
            ValueError: the file states none in this form; :meth:`assert_close` then needs explicit ones.
        """
        stated = self.json.get("tolerance")
        if part is not None:
            stated = stated.get(part) if isinstance(stated, dict) else None
        if isinstance(stated, str):
            stated = {name.lower(): float(value) for name, value in _TOLERANCE_TEXT.findall(stated)}
        if not isinstance(stated, dict) or not ({"rtol", "atol"} & set(stated)):
            raise ValueError(
                f"{self.path.name} states no rtol and atol{f' for {part!r}' if part else ''}: its tolerance is "
                f"{self.json.get('tolerance')!r}; give rtol and atol, or of_max, to assert_close"
            )
        return float(stated.get("rtol", 0.0)), float(stated.get("atol", 0.0))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, without it: ``state("state.")`` is a state dict.

        Raises:
            KeyError: no name begins so.
        """
        names = [name for name in self.tensors if name.startswith(prefix)]
        if not names:
            raise KeyError(f"no golden tensor begins with {prefix!r}; stored are {', '.join(sorted(self.tensors))}")
        return {name.removeprefix(prefix): self.tensors[name] for name in names}

    def assert_close(
        self,
        name: str,
        actual: Tensor | np.ndarray | float | None,
        golden_name: str,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        of_max: float | None = None,
    ) -> None:
        """Compare ours with a stored tensor: shapes equal; whole numbers and booleans exactly, floats to the tolerance.

        Args:
            name: what is compared, for the message and the summary.
            actual: our result.
            golden_name: the stored tensor's name.
            rtol: relative tolerance per entry; default: the file's.
            atol: absolute tolerance per entry; default: the file's.
            of_max: in their place, the largest error allowed as a share of the largest golden value.

        Raises:
            AssertionError: they differ.
        """
        expected = self.tensors[golden_name]
        if actual is None:
            raise AssertionError(
                f"{name}: ours is None (a gradient that never arrived?), golden {golden_name!r} is not"
            )
        ours = torch.as_tensor(actual).detach().cpu()
        if ours.shape != expected.shape:
            raise AssertionError(f"{name}: ours is {tuple(ours.shape)}, golden {golden_name!r} {tuple(expected.shape)}")
        if ours.is_complex() != expected.is_complex():
            raise AssertionError(f"{name}: ours is {ours.dtype}, golden {golden_name!r} is {expected.dtype}")
        exact = not (expected.is_floating_point() or expected.is_complex())
        wide = torch.complex128 if expected.is_complex() else torch.float64
        ours, expected = ours.to(wide), expected.to(wide)
        size = expected.abs().nan_to_num(nan=0.0, posinf=0.0)
        scale = float(size.max()) if size.numel() else 0.0
        same = (ours == expected) | (ours.isnan() & expected.isnan())
        error = torch.where(same, 0.0, (ours - expected).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
        worst = float(error.max()) if error.numel() else 0.0
        relative = worst / scale if scale else worst
        self.comparisons.append(Comparison(name, relative))
        if exact:
            allowed, words = torch.zeros_like(error), "exactly equal"
        elif of_max is not None:
            allowed, words = torch.full_like(error, of_max * scale), f"of_max {of_max:g}"
        else:
            rtol = self.rtol if rtol is None else rtol
            atol = self.atol if atol is None else atol
            allowed, words = atol + rtol * size, f"rtol {rtol:g}, atol {atol:g}"
        wrong = error > allowed
        if wrong.any():
            at = tuple(int(i) for i in torch.unravel_index((error - allowed).argmax(), error.shape))
            raise AssertionError(
                f"{name} differs from golden {golden_name!r} in {int(wrong.sum())} of {wrong.numel()} values "
                f"({words}): worst at {at}, ours {ours[at].item():.8g}, golden {expected[at].item():.8g}; "
                f"worst error {worst:.3g}, {relative:.3g} of the largest golden value"
            )

    def assert_equal(self, name: str, actual: Any, expected: Any) -> None:
        """Compare something that is no stored tensor (a text, a list, a count of the JSON) exactly.

        Raises:
            AssertionError: they differ.
        """
        if actual != expected:
            raise AssertionError(f"{name}: ours is {actual!r}, golden is {expected!r}")
        self.comparisons.append(Comparison(name, 0.0))


def golden_case(case: str) -> Callable[[Check], Check]:
    """Register a function as the check of the files whose ``case`` is this; the method is the module it stands in.

    Raises:
        ValueError: the module has a check for this case already.
    """

    def register(check: Check) -> Check:
        key = (check.__module__.rpartition(".")[2], case)
        if key in CASES:
            raise ValueError(f"{check.__module__} has two checks for the case {case!r}")
        CASES[key] = check
        return check

    return register


def load_cases(slug: str) -> dict[str, Check]:
    """Import the method's checks: case → check; empty where ``tests/golden/cases/`` has no module for it."""
    module = slug.replace("-", "_")
    if (Path(__file__).parent / "cases" / f"{module}.py").is_file():
        importlib.import_module(f"{CASE_PACKAGE}.{module}")
    return {case: check for (owner, case), check in CASES.items() if owner == module}


def find_check(golden: Golden) -> Check:
    """The check for a golden file.

    Raises:
        AssertionError: there is none; the message says where it belongs.
    """
    checks = load_cases(golden.slug)
    if golden.case not in checks:
        raise AssertionError(
            f"{golden.slug}/{golden.path.name} is of case {golden.case!r}, which no check knows "
            f"(known: {', '.join(sorted(checks)) or 'none'}); write one into "
            f"tests/golden/cases/{golden.slug.replace('-', '_')}.py with @golden_case({golden.case!r})"
        )
    return checks[golden.case]


def load_golden(path: Path) -> Golden:
    """Read a golden file and its tensors. A file without the field ``tensors`` holds everything in its JSON.

    Raises:
        AssertionError: it is no JSON object with a ``case``; its safetensors file or a tensor it names is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AssertionError(f"{path.name} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("case"), str):
        raise AssertionError(f"{path.name} must be an object with a text field 'case'")
    tensors: dict[str, Tensor] = {}
    stored = path.with_suffix(".safetensors")
    if stored.is_file():
        with safe_open(stored, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    elif "tensors" in content:
        raise AssertionError(f"{path.name} names tensors but {stored.name} is missing beside it")
    if isinstance(content.get("tensors"), dict):
        # A name may be a pattern, such as ``nmi_*``.
        missing = sorted(name for name in content["tensors"] if not fnmatch.filter(tensors, name))
        if missing:
            raise AssertionError(f"{stored.name} lacks tensors that {path.name} names: {', '.join(missing)}")
    return Golden(path, content["case"], dict(content.get("config") or {}), content, StoredTensors(tensors))


def shared_folder() -> Path:
    """The folder with the golden and data files: ``$HEADGATE_SHARED``, or ``shared`` beside the repository."""
    return Path(os.environ.get("HEADGATE_SHARED") or Path(__file__).parents[3] / "shared")
