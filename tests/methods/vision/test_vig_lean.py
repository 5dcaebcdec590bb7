"""Inference with compiled blocks in place: the same values, and nobody's tensors are written over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from headgate.methods.vision.vig import ViG, ViGH, native
from headgate.methods.vision.vig.lean import advance, may_overwrite
from headgate.methods.vision.vig.native import find_weights


@pytest.fixture(autouse=True)
def groups_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headgate.methods.vision.vig.lean._LARGE", 8)


def spread(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with weights of order one so that every part counts."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model.double().eval()


def plain(**options: Any) -> ViG:
    return spread(ViG(**{"dim": 96, "depth": 2, "img_size": 64, "num_classes": 5, "mlp_dim": 48, **options}))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, True),
        ({"conv_act": "silu", "out_act": "silu"}, True),
        ({"direction_gates": False, "clamp_min": -0.03}, True),
        ({"bidirectional": False}, True),
        ({"rotary": "2d", "official_eval_halving": True}, True),
        ({"num_heads": 1}, True),
        ({"num_heads": 6, "expand_k": 1.0}, True),
        ({"locality": False, "out_act": "silu"}, False),
        ({"dim": 24}, False),
        ({"mlp_dim": 31}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_kind_of_block_gives_what_the_modules_give(
    options: dict[str, Any], compiled: bool, dtype: torch.dtype
) -> None:
    model, x = plain(**options).to(dtype), images(2, 3, 80, 96).to(dtype)
    expected = model(x)
    assert (find_weights(model.blocks[0]) is not None) == compiled
    with torch.no_grad():
        assert may_overwrite(model, model._embed(x))
        torch.testing.assert_close(model(x), expected, rtol=1e-9 if dtype == torch.float64 else 2e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 40), (3, 5), (16, 1), (33, 7), (40, 9)])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_grid_and_any_number_of_threads_gives_the_same(rows: int, columns: int, threads: int) -> None:
    block, before = plain(conv_act="silu").blocks[0], torch.get_num_threads()
    features = images(3, 96, rows, columns)
    expected = block(features)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            torch.testing.assert_close(advance(block, features, in_place=True), expected)
    finally:
        torch.set_num_threads(before)


def test_many_tokens_at_once_give_what_few_give(monkeypatch: pytest.MonkeyPatch) -> None:
    block, features = plain().blocks[0], images(1, 96, 40, 40)
    with torch.no_grad():
        expected = advance(block, features.clone(memory_format=torch.channels_last), in_place=True)
        monkeypatch.setattr(native, "_REGISTERS", 2)
        monkeypatch.setattr(native, "_ROWS", 3)
        torch.testing.assert_close(advance(block, features, in_place=True), expected)


def test_weights_of_another_kind_are_left_to_the_modules() -> None:
    block = plain().blocks[0]
    assert find_weights(block) is not None
    block.mlp.output.weight = nn.Parameter(block.mlp.output.weight.t().contiguous().t())
    assert find_weights(block) is None


def test_hierarchical_models_give_what_the_modules_give() -> None:
    model, x = spread(ViGH(32, (1, 2, 1), (1, 2, 2), num_classes=5)), images(2, 3, 83, 90)
    expected = model(x)
    assert all(find_weights(block) is not None for stage in model.stages for block in stage.blocks)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_a_map_in_another_memory_order_is_left_alone() -> None:
    block, features = plain().blocks[0], images(1, 96, 4, 5)
    before = features.clone()
    with torch.no_grad():
        torch.testing.assert_close(advance(block, features, in_place=True), block.by_modules(features))
    assert torch.equal(features, before)


def test_a_block_by_itself_leaves_its_map_alone() -> None:
    block, features = plain().blocks[0], images(1, 96, 4, 5).contiguous(memory_format=torch.channels_last)
    before = features.clone()
    with torch.no_grad():
        torch.testing.assert_close(block(features), block.by_modules(features))
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


def test_only_in_evaluation_without_gradients_maps_are_overwritten() -> None:
    model, large = plain(), images(1, 96, 3, 4)
    assert not may_overwrite(model, large)
    with torch.no_grad():
        assert may_overwrite(model, large)
        with FlopCounterMode(display=False):
            assert not may_overwrite(model, large)
        assert not may_overwrite(model, large.bfloat16())
        assert not may_overwrite(model.train(), large)
        with torch.autocast("cpu", torch.bfloat16):
            assert not may_overwrite(model.eval(), large)
