from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from headgate.train.seeds import random_state, seeded, set_random_state, set_seed


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), float(torch.rand(()))  # noqa: NPY002


def test_set_seed_fixes_the_numbers_of_python_numpy_and_torch() -> None:
    with seeded():
        set_seed(4)
        first = draw()
        set_seed(4)
        assert draw() == first
        set_seed(5)
        assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**64 - 1, -3])
def test_every_integer_is_a_seed(seed: int) -> None:
    with seeded(seed):
        first = draw()
    with seeded(seed):
        assert draw() == first


def test_seeded_leaves_the_global_generators_as_they_were() -> None:
    state = random_state()
    with seeded(1):
        draw()
    assert random_state() == state


def test_seeded_restores_after_an_error() -> None:
    state = random_state()
    with pytest.raises(RuntimeError, match="inside"), seeded(1):
        draw()
        raise RuntimeError("inside")
    assert random_state() == state


def test_seeded_without_a_seed_goes_on_from_the_present_state() -> None:
    with seeded(3):
        with seeded():
            inside = draw()
        assert draw() == inside


def test_random_state_survives_json_and_brings_back_the_same_numbers() -> None:
    with seeded(8):
        random.gauss(0, 1)  # leaves a second number waiting inside Python's generator
        np.random.standard_normal()  # noqa: NPY002
        text = json.dumps(random_state())
        expected = draw()
        draw()
        set_random_state(json.loads(text))
        assert draw() == expected


@pytest.mark.parametrize("seed", [1.5, "1", True, None])
def test_a_seed_that_is_no_integer_is_refused(seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an integer"):
        set_seed(seed)  # type: ignore[arg-type]
