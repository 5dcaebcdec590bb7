"""Weights of published PyTorch code in this room's modules: DeepCTR-Torch and FuxiCTR.

    unit = unit_from_deepctr(state, normalize="softmax", activation="sigmoid")
    model = DIN(...)
    model.load_state_dict(convert_deepctr_model(state, model, columns))

The authors' own code is TensorFlow 1. In a model, the published towers take their inputs in another order than ours;
``columns`` says in which: the names of fields and, where the pooled history stands, those of the history's inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from headgate.methods.recommend.din.activation_unit import LocalActivationUnit
from headgate.methods.recommend.din.dice import Activation, Dice
from headgate.methods.recommend.din.model import DIN

__all__ = [
    "DeepCTRDice",
    "FuxiCTRDice",
    "convert_deepctr_dice",
    "convert_deepctr_model",
    "convert_deepctr_unit",
    "convert_fuxictr_dice",
    "convert_fuxictr_model",
    "convert_fuxictr_unit",
    "unit_from_deepctr",
    "unit_from_fuxictr",
]

DeepCTRDice = partial(Dice, eps=1e-8, momentum=0.1, affine=True)
"""Dice with DeepCTR-Torch's constants: a function of the width, as ``activation`` takes it."""

FuxiCTRDice = partial(Dice, eps=1e-9, momentum=0.01)
"""Dice with FuxiCTR's constants."""

Normalize = Literal["softmax", "scaled_softmax"] | None


def convert_deepctr_dice(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of DeepCTR-Torch's ``Dice`` to those of ours with ``affine=True``.

    Args:
        state: its ``state_dict()``; α of its three-dimensional form has shape (C, 1).

    Raises:
        ValueError: a name that it does not have.
    """
    return _dice(state, ("weight", "bias", "running_mean", "running_var"))


def convert_fuxictr_dice(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of FuxiCTR's ``Dice`` to ours.

    Args:
        state: its ``state_dict()``.

    Raises:
        ValueError: a name that it does not have.
    """
    return _dice(state, ("running_mean", "running_var"))


def convert_deepctr_unit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of DeepCTR-Torch's ``AttentionSequencePoolingLayer`` (or ``LocalActivationUnit``) to ours.

    Args:
        state: its ``state_dict()``.

    Raises:
        ValueError: a name that it does not have.
    """
    parts = {name.removeprefix("local_att."): value for name, value in state.items()}
    layers, activations = _deepctr_mlp({n: v for n, v in parts.items() if n.startswith("dnn.")}, "dnn.")
    last = {name.removeprefix("dense."): value for name, value in parts.items() if name.startswith("dense.")}
    _refuse_rest(parts, ("dnn.", "dense."))
    return _unit(layers, activations, last)


def convert_fuxictr_unit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of FuxiCTR's ``DIN_Attention`` to ours.

    Args:
        state: its ``state_dict()``.

    Raises:
        ValueError: a name that it does not have, or a batch normalisation, which has no place here.
    """
    parts = {name.removeprefix("attention_layer."): value for name, value in state.items()}
    _refuse_rest(parts, ("mlp.",))
    layers, activations = _fuxictr_mlp(parts, "mlp.")
    return _unit(layers[:-1], activations, layers[-1])


def unit_from_deepctr(
    state: Mapping[str, Tensor], normalize: Normalize = None, activation: Activation = "sigmoid"
) -> LocalActivationUnit:
    """Build the unit that a DeepCTR-Torch state dict belongs to, with the published treatment of padding, and load it.

    Args:
        state: of an ``AttentionSequencePoolingLayer``.
        normalize: ``"softmax"`` for ``weight_normalization=True``.
        activation: where the weights do not tell: ``"sigmoid"`` or ``"relu"``. Dice and PReLU are seen by their weights.

    Raises:
        ValueError: weights that are not those of such a layer.
    """
    return _build(convert_deepctr_unit(state), normalize, activation, DeepCTRDice)


def unit_from_fuxictr(
    state: Mapping[str, Tensor], normalize: Normalize = None, activation: Activation = "relu"
) -> LocalActivationUnit:
    """Build the unit that a FuxiCTR state dict belongs to, with the published treatment of padding, and load it.

    Args:
        state: of a ``DIN_Attention``.
        normalize: ``"softmax"`` for ``use_softmax=True``.
        activation: where the weights do not tell; Dice and PReLU are seen by their weights.

    Raises:
        ValueError: weights that are not those of such a layer.
    """
    return _build(convert_fuxictr_unit(state), normalize, activation, FuxiCTRDice)


def convert_deepctr_model(state: Mapping[str, Tensor], model: DIN, columns: Sequence[str]) -> dict[str, Tensor]:
    """Rename the weights of DeepCTR-Torch's ``DIN`` to those of ``model``.

    Args:
        state: its ``state_dict()``. Its ``hist_…`` tables, which share those of the candidate, may be there or not.
        model: ours, with the same fields and widths.
        columns: the order of the published tower's input: sparse fields, the history's inputs, dense fields.

    Raises:
        ValueError: a name that it does not have, or ``columns`` that are not those of ``model``.
    """
    tables = _take(state, "embedding_dict.")
    layers, activations = _deepctr_mlp(_take(state, "dnn."), "")
    output = _take(state, "dnn_linear.")
    output["bias"] = _take(state, "out.").get("bias", torch.zeros(1)).reshape(1)
    _refuse_rest(state, ("embedding_dict.", "dnn.", "dnn_linear.", "out.", "attention.", "linear_model."))
    unit = convert_deepctr_unit(_take(state, "attention."))
    return _model(model, columns, tables, unit, layers, activations, output)


def convert_fuxictr_model(state: Mapping[str, Tensor], model: DIN, columns: Sequence[str]) -> dict[str, Tensor]:
    """Rename the weights of FuxiCTR's ``DIN``, with one pair of target and sequence fields, to those of ``model``.

    Args:
        state: its ``state_dict()``.
        model: ours, with the same fields and widths.
        columns: the order of the published tower's input: that of its feature map.

    Raises:
        ValueError: a name that it does not have, a batch normalisation, or ``columns`` that are not those of ``model``.
    """
    tables = _take(state, "embedding_layer.embedding_layers.")
    layers, activations = _fuxictr_mlp(_take(state, "dnn."), "mlp.")
    _refuse_rest(state, ("embedding_layer.", "dnn.", "attention_layers.0."))
    unit = convert_fuxictr_unit(_take(state, "attention_layers.0."))
    return _model(model, columns, tables, unit, layers[:-1], activations, layers[-1])


_Layers = list[dict[str, Tensor]]


def _take(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _refuse_rest(state: Mapping[str, Tensor], known: tuple[str, ...]) -> None:
    for name in state:
        if not name.startswith(known):
            raise ValueError(f"state must hold published weights under {', '.join(known)}, got {name!r}")


def _dice(state: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    converted = {}
    for name, value in state.items():
        ours = name.removeprefix("bn.")
        if name == "bn.num_batches_tracked":
            continue
        if ours not in ("alpha", *names) or (ours == "alpha") == name.startswith("bn."):
            raise ValueError(f"state must hold alpha and bn.{', bn.'.join(names)}, got {name!r}")
        converted[ours] = value.flatten() if ours == "alpha" else value
    return converted


def _activation(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An activation's weights: those of Dice, of PReLU, or none."""
    if "alpha" in state:
        return _dice(state, ("weight", "bias", "running_mean", "running_var"))
    if set(state) - {"weight"}:
        raise ValueError(f"state must hold the weights of Dice or PReLU behind a layer, got {sorted(state)}")
    return dict(state)


def _deepctr_mlp(state: Mapping[str, Tensor], prefix: str) -> tuple[_Layers, _Layers]:
    """Linear layers and activations of a ``DNN``, by index."""
    layers: dict[int, dict[str, Tensor]] = {}
    activations: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(linears|activation_layers)\.(\d+)\.(.+)", name.removeprefix(prefix))
        if match is None:
            raise ValueError(f"state must hold linears and activation_layers without batch normalisation, got {name!r}")
        group = layers if match[1] == "linears" else activations
        group.setdefault(int(match[2]), {})[match[3]] = value
    ordered = [layers[index] for index in sorted(layers)]
    return ordered, [_activation(activations.get(index, {})) for index in range(len(ordered))]


def _fuxictr_mlp(state: Mapping[str, Tensor], prefix: str) -> tuple[_Layers, _Layers]:
    """Linear layers of an ``MLP_Block``, the last one included, and the activation behind each of the others."""
    modules: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = re.fullmatch(r"(\d+)\.(.+)", name.removeprefix(prefix))
        if match is None:
            raise ValueError(f"state must hold {prefix}<index> of an MLP_Block, got {name!r}")
        modules.setdefault(int(match[1]), {})[match[2]] = value
    layers: _Layers = []
    activations: _Layers = []
    for index in sorted(modules):
        module = modules[index]
        if module.get("weight", torch.empty(0)).dim() == 2:
            layers.append(module)
            activations.append({})
        elif not layers or activations[-1]:
            raise ValueError(f"state must hold one activation behind each layer, got {prefix}{index}")
        else:
            activations[-1] = _activation(module)
    if len(layers) < 2:
        raise ValueError(f"state must hold two layers at least under {prefix!r}, got {len(layers)}")
    return layers, activations[:-1]


def _unit(layers: _Layers, activations: _Layers, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not layers or set(last) != {"weight", "bias"}:
        raise ValueError(f"state must hold hidden layers and a score, got {len(layers)} layers and {sorted(last)}")
    names = ["first", *(f"layers.{index}" for index in range(len(layers) - 1))]
    converted = {
        f"{name}.{kind}": value for name, layer in zip(names, layers, strict=True) for kind, value in layer.items()
    }
    for index, activation in enumerate(activations):
        converted |= {f"activations.{index}.{kind}": value for kind, value in activation.items()}
    return converted | {f"score.{kind}": value for kind, value in last.items()}


def _build(
    weights: Mapping[str, Tensor], normalize: Normalize, activation: Activation, dice: Activation
) -> LocalActivationUnit:
    width = weights["first.weight"].shape[1]
    if width % 4:
        raise ValueError(f"state must hold a first layer for four vectors, got {width} columns")
    hidden = [weights["first.weight"].shape[0]]
    while (name := f"layers.{len(hidden) - 1}.weight") in weights:
        hidden.append(weights[name].shape[0])
    if "activations.0.alpha" in weights:
        activation = dice
    elif "activations.0.weight" in weights:
        count = weights["activations.0.weight"].shape[0]
        activation = (lambda width: nn.PReLU(1)) if count == 1 else "prelu"
    unit = LocalActivationUnit(width // 4, hidden, activation, normalize, official_quirks=True)
    unit.load_state_dict(weights)
    return unit.to(weights["first.weight"].dtype)


def _model(
    model: DIN,
    columns: Sequence[str],
    tables: Mapping[str, Tensor],
    unit: Mapping[str, Tensor],
    layers: _Layers,
    activations: _Layers,
    output: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    converted = {}
    for name, value in tables.items():
        table = name.removesuffix(".weight")
        if table in model.tables:
            converted[f"tables.{table}.weight"] = value
        elif table.removeprefix("hist_") not in model.tables and table not in model.history:
            raise ValueError(f"state must hold tables of {list(model.tables)}, got {name!r}")
    converted |= {f"pool.{name}": value for name, value in unit.items()}
    order = _places(model, columns)
    if layers:
        layers = [{**layers[0], "weight": layers[0]["weight"][:, order]}, *layers[1:]]
    for index, (layer, activation) in enumerate(zip(layers, activations, strict=True)):
        converted |= {f"tower.{2 * index}.{kind}": value for kind, value in layer.items()}
        converted |= {f"tower.{2 * index + 1}.{kind}": value for kind, value in activation.items()}
    return converted | {f"output.{kind}": value for kind, value in output.items()}


def _places(model: DIN, columns: Sequence[str]) -> Tensor:
    """Which published column each of our tower's columns is."""
    sizes = dict(model.tower_inputs())
    if sorted(columns) != sorted(sizes):
        raise ValueError(f"columns must hold each of {list(sizes)} once, got {list(columns)}")
    starts, start = {}, 0
    for name in columns:
        starts[name] = start
        start += sizes[name]
    return torch.cat([torch.arange(starts[name], starts[name] + size) for name, size in sizes.items()])
