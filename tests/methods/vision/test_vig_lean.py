"""Inference on large pictures in little memory: the same values, and nobody's tensors are written over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headgate.methods.vision.vig import ViG, ViGH
from headgate.methods.vision.vig.lean import advance_in_place, may_overwrite


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"_LARGE": 8, "_NARROW_BLOCK": 16, "_WIDE_BLOCK": 5}.items():
        monkeypatch.setattr(f"headgate.methods.vision.vig.lean.{name}", size)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def spread(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights of order one so that every part counts."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model.double().eval()


def plain(**options: Any) -> ViG:
    return spread(ViG(**{"dim": 24, "depth": 2, "img_size": 64, "num_classes": 5, "mlp_dim": 31, **options}))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_act": "silu", "out_act": "silu"},
        {"direction_gates": False, "clamp_min": -0.03},
        {"bidirectional": False},
        {"locality": False, "out_act": "silu"},
        {"rotary": "2d", "official_eval_halving": True},
        {"num_heads": 1},
        {"num_heads": 4, "expand_k": 1.0},
    ],
    ids=str,
)
def test_every_kind_of_block_gives_what_the_modules_give(options: dict[str, Any]) -> None:
    model, x = plain(**options), images(2, 3, 80, 96)
    expected = model(x)
    with torch.no_grad():
        assert may_overwrite(model, model._embed(x))
        torch.testing.assert_close(model(x), expected)


def test_hierarchical_models_give_what_the_modules_give() -> None:
    model, x = spread(ViGH(8, (1, 2, 1), (1, 2, 2), num_classes=5)), images(2, 3, 83, 90)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_a_map_in_another_memory_order_is_left_alone() -> None:
    block, features = plain().blocks[0], images(1, 24, 4, 5)
    before = features.clone()
    with torch.no_grad():
        torch.testing.assert_close(advance_in_place(block, features), block(features))
    assert torch.equal(features, before)


def test_images_and_weights_are_left_alone() -> None:
    model, x = plain(position_embedding=False), images(1, 3, 64, 80)
    before, state = x.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
    assert torch.equal(x, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_feature_maps_are_each_their_own() -> None:
    model, x = plain(), images(1, 3, 64, 80)
    expected = [level.clone() for level in model.forward_maps(x)]
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
        model(x)
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("where", ["blocks.0", "blocks.1.mixer", "patch_embedding", "blocks.0.mlp.output"])
def test_what_a_hook_saw_stays_as_it_was(where: str) -> None:
    model, x = plain(position_embedding=False), images(1, 3, 64, 80)
    seen: list[Tensor] = []
    model.get_submodule(where).register_forward_hook(lambda module, args, output: seen.append(output))
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(seen[1], seen[0])


def test_only_large_pictures_in_evaluation_without_gradients_are_overwritten() -> None:
    model, large, small = plain(), images(1, 24, 3, 4), images(1, 24, 2, 3)
    assert not may_overwrite(model, large)
    with torch.no_grad():
        assert may_overwrite(model, large)
        assert not may_overwrite(model, small)
        assert not may_overwrite(model, large.bfloat16())
        assert not may_overwrite(model.train(), large)
        with torch.autocast("cpu", torch.bfloat16):
            assert not may_overwrite(model.eval(), large)
