"""State dicts of the published code: names, prefixes, heads of unknown shape, whole networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headgate.methods.contrastive.matryoshka import MatryoshkaHead, MatryoshkaResNet
from headgate.methods.contrastive.matryoshka.official import convert_state_dict, head_from_official, head_state_dict


def official_head(dims: tuple[int, ...], classes: int, *, efficient: bool, bias: bool = True) -> nn.Module:
    """What the published layer registers, under its names."""
    layer = nn.Module()
    for index, size in enumerate(dims[-1:] if efficient else dims):
        layer.add_module(f"nesting_classifier_{index}", nn.Linear(size, classes, bias=bias))
    return layer


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "fc.", "module.fc.", "module._orig_mod.fc."])
def test_heads_load_from_below_any_wrapper(efficient: bool, bias: bool, prefix: str) -> None:
    dims = (2, 4, 8)
    official = official_head(dims, 5, efficient=efficient, bias=bias)
    state = {f"{prefix}{name}": tensor for name, tensor in official.state_dict().items()}
    head = head_from_official(state, dims if efficient else None)
    assert (head.dims, head.num_classes, head.tied) == (dims, 5, efficient)
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for index, (size, logits) in enumerate(zip(dims, head(z), strict=True)):
        linear = official.get_submodule(f"nesting_classifier_{0 if efficient else index}")
        expected = z[:, :size] @ linear.weight[:, :size].T + (linear.bias if bias else 0)
        torch.testing.assert_close(logits, expected)


def test_a_loaded_head_shares_no_memory_with_the_state_dict() -> None:
    state = official_head((2, 4), 5, efficient=False).state_dict()
    head = head_from_official(state)
    with torch.no_grad():
        head.get_submodule("nesting_classifier_0").weight.zero_()
    assert state["nesting_classifier_0.weight"].abs().sum() > 0


def test_a_whole_network_loads_out_of_a_data_parallel_checkpoint() -> None:
    torch.manual_seed(0)
    ours = MatryoshkaResNet(5, layers=(1, 1, 1, 1), width=4)
    official = {f"module.{name}": tensor.clone() for name, tensor in ours.state_dict().items()}
    assert "module.layer3.0.conv2.conv.weight" in official
    assert "module.layer3.0.conv2.blur_filter" in official
    assert "module.fc.nesting_classifier_4.bias" in official
    torch.manual_seed(1)
    loaded = MatryoshkaResNet(5, layers=(1, 1, 1, 1), width=4)
    loaded.load_state_dict(convert_state_dict(official))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for ours_logits, logits in zip(ours.eval()(images), loaded.eval()(images), strict=True):
        torch.testing.assert_close(logits, ours_logits, rtol=0, atol=0)
    head = MatryoshkaHead(loaded.dims, 5)
    head.load_state_dict(head_state_dict(official))


def weights(*widths: int) -> dict[str, Tensor]:
    return {f"fc.nesting_classifier_{index}.weight": torch.zeros(3, width) for index, width in enumerate(widths)}


@pytest.mark.parametrize(
    ("state", "dims", "message"),
    [
        ({}, None, "must hold nesting_classifier_0.weight, got nothing"),
        ({"fc.weight": torch.zeros(3, 8)}, None, r"must hold nesting_classifier_0.weight, got \['fc.weight'\]"),
        (weights(2, 4), (2, 8), r"dims must fit weights of \[2, 4\] columns, got \[2, 8\]"),
        (weights(2, 4), (4,), r"dims must fit weights of \[2, 4\] columns"),
        (weights(8), (2, 4), r"dims must fit weights of \[8\] columns"),
        ({"nesting_classifier_1.weight": torch.zeros(3, 8)}, None, r"\[0\] are missing"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(
    state: dict[str, Tensor], dims: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        head_from_official(state, dims)
