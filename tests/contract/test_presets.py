"""Every preset can be built on the meta device, and has as many parameters as its card says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headgate.catalog import Method, Preset, load_methods
from headgate.presets import create_model, list_models

PRESETS = [(method, preset) for method in load_methods().values() for preset in method.presets.values()]


@pytest.mark.parametrize(("method", "preset"), PRESETS, ids=[preset.name for _, preset in PRESETS])
def test_a_preset_builds_without_memory_and_has_the_stated_size(method: Method, preset: Preset) -> None:
    with torch.device("meta"):
        model = create_model(preset.name)
    assert isinstance(model, nn.Module), f"{preset.name} of {method.slug} gives a {type(model).__name__}, no module"
    real = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    assert not real, f"not on the meta device: {', '.join(real)}"
    if preset.parameters is not None:
        assert sum(parameter.numel() for parameter in model.parameters()) == preset.parameters


def test_no_two_presets_share_a_name() -> None:
    names = [preset.name for _, preset in PRESETS]
    assert sorted(names) == list_models()
