"""The harness itself: what it reads, what it lets pass and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.golden.harness import CASES, Golden, find_check, golden_case, load_golden

VALUES = {
    "out.y": torch.tensor([1.0, -2.0, 4.0]),
    "out.nan": torch.tensor([1.0, float("nan"), float("inf")]),
    "ids": torch.tensor([3, 5]),
    "state.weight": torch.ones(2, 2),
}


def make(folder: Path, stored: dict[str, Tensor] | None = None, **content: Any) -> Path:
    path = folder / "some-method" / "file.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"case": "layer", "tolerance": "rtol 1e-4, atol 1e-5", "tensors": {}} | content))
    if stored is not None:
        save_file(stored, path.with_suffix(".safetensors"))
    return path


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    return load_golden(make(tmp_path, VALUES, config={"dim": 4}))


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("rtol 1e-4, atol 1e-5 (float32); router decisions must match exactly", (1e-4, 1e-5)),
        ("rtol 1e-3, atol 1e-4", (1e-3, 1e-4)),
        ({"rtol": 0.001, "atol": 2e-05, "beams": "exact unless two beams tie"}, (1e-3, 2e-5)),
        ({"atol": 1e-06}, (0.0, 1e-6)),
    ],
)
def test_both_forms_of_tolerance_are_understood(tmp_path: Path, stated: Any, expected: tuple[float, float]) -> None:
    golden = load_golden(make(tmp_path, VALUES, tolerance=stated))
    assert (golden.rtol, golden.atol) == expected


def test_a_part_has_its_own_tolerance(tmp_path: Path) -> None:
    stated = {"rtol": 1e-4, "atol": 1e-4, "sampler": {"rtol": 1e-3, "atol": 1e-2}}
    assert load_golden(make(tmp_path, VALUES, tolerance=stated)).tolerances("sampler") == (1e-3, 1e-2)


@pytest.mark.parametrize("stated", [None, "exact (integers)", {"forward": 1e-5}])
def test_a_tolerance_in_no_known_form_must_be_given_at_the_comparison(tmp_path: Path, stated: Any) -> None:
    golden = load_golden(make(tmp_path, VALUES, tolerance=stated))
    with pytest.raises(ValueError, match="states no rtol and atol"):
        golden.assert_close("output", VALUES["out.y"], "out.y")
    golden.assert_close("output", VALUES["out.y"] * (1 + 1e-6), "out.y", of_max=1e-5)
    golden.assert_close("ids", np.array([3, 5]), "ids")


def test_equal_values_pass_and_the_error_is_recorded_relative_to_the_largest(golden: Golden) -> None:
    golden.assert_close("output", VALUES["out.y"] + torch.tensor([0.0, 8e-6, 0.0]), "out.y")
    (comparison,) = golden.comparisons
    assert comparison.name == "output"
    assert comparison.relative_error == pytest.approx(2e-6, rel=0.05)


@pytest.mark.parametrize(
    ("actual", "name", "message"),
    [
        (torch.tensor([1.0, -2.0, 4.01]), "out.y", r"differs .* in 1 of 3 .* worst at \(2,\)"),
        (torch.tensor([1.0, -2.0]), "out.y", r"ours is \(2,\), golden 'out.y' \(3,\)"),
        (torch.tensor([1.0, -2.0, float("nan")]), "out.y", "differs"),
        (torch.tensor([1.0, 0.0, float("inf")]), "out.nan", "differs"),
        (torch.tensor([3, 6]), "ids", "exactly equal"),
        (torch.tensor([3.00001, 5.0]), "ids", "exactly equal"),
        (None, "out.y", "ours is None"),
    ],
)
def test_what_differs_is_refused(golden: Golden, actual: Any, name: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        golden.assert_close("output", actual, name)


def test_nan_and_infinity_equal_themselves(golden: Golden) -> None:
    golden.assert_close("output", VALUES["out.nan"], "out.nan")
    assert golden.comparisons[0].relative_error == 0


def test_a_share_of_the_largest_value_forgives_small_entries_only_to_it(golden: Golden) -> None:
    golden.assert_close("output", VALUES["out.y"] + 3.9e-3, "out.y", of_max=1e-3)
    with pytest.raises(AssertionError, match="of_max"):
        golden.assert_close("output", VALUES["out.y"] + 4.1e-3, "out.y", of_max=1e-3)


def test_state_strips_the_prefix_and_unread_tensors_are_known(golden: Golden) -> None:
    assert list(golden.state("state.")) == ["weight"]
    assert golden.tensors.unread() == ["ids", "out.nan", "out.y"]
    with pytest.raises(KeyError, match="param"):
        golden.state("param.")
    with pytest.raises(KeyError, match=r"in\.x"):
        golden.tensors["in.x"]


def test_what_a_check_does_to_a_tensor_leaves_the_stored_one_alone(golden: Golden) -> None:
    golden.tensors["out.y"].zero_()
    golden.assert_close("output", VALUES["out.y"], "out.y")


def test_a_json_without_its_tensors_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"file\.safetensors is missing"):
        load_golden(make(tmp_path))


def test_a_tensor_that_the_json_names_must_be_stored(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"lacks tensors .*: out\.z"):
        load_golden(make(tmp_path, VALUES, tensors={"out.z": {"shape": [1]}}))


def test_names_may_be_patterns_that_stored_tensors_match(tmp_path: Path) -> None:
    assert "out.y" in load_golden(make(tmp_path, VALUES, tensors={"out.*": "what came out"})).tensors
    with pytest.raises(AssertionError, match=r"lacks tensors .*: nmi_\*"):
        load_golden(make(tmp_path, VALUES, tensors={"nmi_*": "nothing of the kind"}))


def test_a_json_that_holds_everything_itself_needs_no_tensors(tmp_path: Path) -> None:
    path = make(tmp_path)
    path.write_text(json.dumps({"case": "tokens", "cases": [1]}))
    golden = load_golden(path)
    golden.assert_equal("cases", [1], golden.json["cases"])
    with pytest.raises(AssertionError, match=r"ours is \[2\]"):
        golden.assert_equal("cases", [2], golden.json["cases"])
    assert len(golden.comparisons) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"case": 3}', "{}"])
def test_a_malformed_json_fails(tmp_path: Path, text: str) -> None:
    path = make(tmp_path, VALUES)
    path.write_text(text)
    with pytest.raises(AssertionError, match=r"file\.json"):
        load_golden(path)


def test_a_case_that_no_check_knows_fails_and_says_where_it_belongs(golden: Golden) -> None:
    with pytest.raises(AssertionError, match=r"no check knows .*cases/some_method\.py"):
        find_check(golden)


def test_checks_belong_to_the_module_they_stand_in(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(golden: Golden) -> None: ...

    monkeypatch.setattr(check, "__module__", "tests.golden.cases.some_method")
    monkeypatch.setitem(CASES, ("another_method", "layer"), lambda golden: None)
    try:
        assert golden_case("layer")(check) is check
        assert find_check(golden) is check
        with pytest.raises(ValueError, match="two checks"):
            golden_case("layer")(check)
    finally:
        CASES.pop(("some_method", "layer"), None)
