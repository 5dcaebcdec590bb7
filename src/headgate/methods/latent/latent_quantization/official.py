"""Published models and weights as ours: kylehkhsu/latent_quantization (JAX), and the layer of vector-quantize-pytorch.

Official names are the paths of the pytree, ``encoder.conv.0.0.weight``; a list of codebooks becomes one padded tensor,
and the style blocks are named for what they hold. Weights of transposed convolutions lie as PyTorch has them, (in, out,
height, width), or as equinox has them, (out, in, height, width) with both axes of the kernel reversed.

    model = build_qlae(config)
    model.load_state_dict(convert_state_dict(arrays, layout="equinox"))

No weights are published; the names are those that the official code gives to what it trains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from headgate.methods.latent.latent_quantization.decoder import ConvDecoder, StyleDecoder
from headgate.methods.latent.latent_quantization.encoder import ImageEncoder
from headgate.methods.latent.latent_quantization.qlae import QLAE
from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer

__all__ = [
    "OtherQuantizer",
    "build_qlae",
    "convert_lucidrains",
    "convert_state_dict",
    "official_gradients",
    "rename",
]

_CODEBOOK = re.compile(r"^latent\._values_per_latent\.(\d+)$")
_SHARED_CODEBOOK = "latent.values"
_RULES = (
    # The plain decoder is a list: dense layers, the layer to the map, a reshape, blocks, the last convolution.
    (re.compile(r"^(decoder|generator)\.0\.(\d+)\.(\d+)\."), r"\1.dense.\2.\3."),
    (re.compile(r"^(decoder|generator)\.1\.(\d+)\."), r"\1.dense.{map}.\2."),
    (re.compile(r"^(decoder|generator)\.3\."), r"\1.blocks."),
    (re.compile(r"^(decoder|generator)\.4\.0\."), r"\1.conv."),
    (re.compile(r"^(decoder|generator)\.style_conv_transpose\.blocks\.(\d+)\.forward_block\.0\."), r"\1.blocks.\2.conv."),
    (re.compile(r"^(decoder|generator)\.style_conv_transpose\.blocks\.(\d+)\.conditioning\.0\."), r"\1.blocks.\2.style."),
    (re.compile(r"^(decoder|generator)\.conv\.0\."), r"\1.conv."),
    (re.compile(r"^generator\."), "decoder."),
    (re.compile(r"^encoder\.base\."), "encoder."),
    (re.compile(r"^encoder\.critic\."), "critic."),
)  # fmt: skip
_TRANSPOSED = re.compile(r"^decoder\.blocks\.\d+\.(conv|0)\.weight$")


def build_qlae(config: Mapping[str, Any]) -> QLAE:
    """Build a published autoencoder of images.

    Args:
        config: ``img``, ``channels``, ``num_latents``, ``num_values_per_latent``, ``input_channels``, ``lambdas``, and
            the lists ``dense``, ``enc_widths``, ``enc_k``, ``enc_s``, ``enc_p`` and ``dec_widths``, ``dec_k``,
            ``dec_s``, ``dec_p``; ``decoder`` may be ``"style"`` (default) or ``"conv"``.

    Returns:
        Our model, freshly initialised.

    Raises:
        KeyError: a setting is missing.
        ValueError: settings that do not go together.
    """
    lambdas = config["lambdas"]
    encoder = ImageEncoder(
        config["num_latents"],
        config["img"],
        config["channels"],
        widths=config["enc_widths"],
        kernel_sizes=config["enc_k"],
        strides=config["enc_s"],
        paddings=config["enc_p"],
        hidden_dims=config["dense"],
    )
    kind = {"style": StyleDecoder, "conv": ConvDecoder}[config.get("decoder", "style")]
    decoder = kind(
        config["num_latents"],
        config["channels"],
        encoder.transition_shape[1:],
        input_channels=config["input_channels"],
        widths=config["dec_widths"],
        kernel_sizes=config["dec_k"],
        strides=config["dec_s"],
        paddings=config["dec_p"],
        hidden_dims=config["dense"],
    )
    quantizer = LatentQuantizer(
        config["num_latents"],
        config["num_values_per_latent"],
        learnable=config.get("optimize_values", True),
        quantization_weight=lambdas["quantization"],
        commitment_weight=lambdas["commitment"],
    )
    return QLAE(encoder, decoder, quantizer, reconstruction_weight=lambdas.get("binary_cross_entropy", 1.0))


def convert_state_dict(state: Mapping[str, Tensor], layout: Literal["torch", "equinox"] = "torch") -> dict[str, Tensor]:
    """An official autoencoder's or InfoGAN's parameters under our names.

    Args:
        state: official name → tensor.
        layout: how weights of transposed convolutions lie, ``"torch"`` or ``"equinox"``.

    Returns:
        A state dict for :class:`QLAE` or :class:`QLInfoWGAN`.

    Raises:
        ValueError: an unknown layout, or codebooks that are missing or not numbered without a gap.
    """
    if layout not in ("torch", "equinox"):
        raise ValueError(f"layout must be 'torch' or 'equinox', got {layout!r}")
    last = _dense_count(state)
    converted = {"quantizer.codebook": _codebook(state)}
    for name, tensor in state.items():
        if _CODEBOOK.match(name) or name == _SHARED_CODEBOOK:
            continue
        ours = rename(name, last)
        if layout == "equinox" and _TRANSPOSED.match(ours):
            tensor = tensor.flip(2, 3).transpose(0, 1).contiguous()
        # Equinox keeps the bias of a convolution as (channels, 1, 1).
        converted[ours] = tensor.flatten() if ours.endswith("bias") else tensor
    return converted


def rename(name: str, map_layer: int = 0) -> str:
    """Our name of an official parameter that is no codebook.

    Args:
        name: path in the official pytree.
        map_layer: number of dense layers before the one that gives the map, in the plain decoder.
    """
    for pattern, ours in _RULES:
        name = pattern.sub(ours, name)
    return name.replace("{map}", str(map_layer))


def official_gradients(model: nn.Module, names: Mapping[str, Tensor] | list[str]) -> dict[str, Tensor | None]:
    """The gradients of our model under official names (PyTorch's layout).

    Args:
        model: a model built here, after a backward pass.
        names: the official names asked for.
    """
    parameters = dict(model.named_parameters())
    last = _dense_count(names)
    gradients: dict[str, Tensor | None] = {}
    for name in names:
        codebook = _CODEBOOK.match(name)
        if codebook is None:
            gradients[name] = parameters[rename(name, last)].grad
            continue
        quantizer = model.get_submodule("quantizer")
        assert isinstance(quantizer, LatentQuantizer)
        latent, gradient = int(codebook[1]), quantizer.codebook.grad
        gradients[name] = None if gradient is None else gradient[latent, : quantizer.levels[latent]]
    return gradients


class OtherQuantizer(NamedTuple):
    """A ``LatentQuantize`` of vector-quantize-pytorch in our parts; apply them in this order on the last axis.

    Attributes:
        project_in: a linear layer, or the identity.
        quantizer: with the same codebooks.
        project_out: a linear layer, or the identity.
    """

    project_in: nn.Module
    quantizer: LatentQuantizer
    project_out: nn.Module


def convert_lucidrains(state: Mapping[str, Tensor], num_codebooks: int = 1) -> OtherQuantizer:
    """A state dict of vector-quantize-pytorch's ``LatentQuantize`` in our parts.

    That layer never trained its codebooks, and its losses compare outputs behind the projection; the values convert, the
    training does not.

    Args:
        state: name → tensor; with learned values (``optimize_values=True``), the others store none.
        num_codebooks: groups of latents that share the list of codebooks; with projections their sizes tell it.

    Raises:
        ValueError: no codebooks, or projections that do not fit them.
    """
    values = _numbered(state, re.compile(r"^values_per_latent\.(\d+)$"), "values_per_latent.0")
    project: dict[str, nn.Module] = {}
    for name in ("project_in", "project_out"):
        weight = state.get(f"{name}.weight")
        if weight is None:
            project[name] = nn.Identity()
            continue
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        layer.load_state_dict({part: state[f"{name}.{part}"] for part in ("weight", "bias")})
        project[name] = layer
        inner = weight.shape[0 if name == "project_in" else 1]
        if inner % len(values):
            raise ValueError(f"{name} must have a multiple of {len(values)} inner features, got {inner}")
        num_codebooks = inner // len(values)
    values = values * num_codebooks
    quantizer = LatentQuantizer(len(values), [len(codebook) for codebook in values])
    quantizer.load_state_dict({"codebook": _padded(values)})
    return OtherQuantizer(project["project_in"], quantizer, project["project_out"])


def _codebook(state: Mapping[str, Tensor]) -> Tensor:
    if _SHARED_CODEBOOK in state:
        return state[_SHARED_CODEBOOK].unsqueeze(0)
    return _padded(_numbered(state, _CODEBOOK, "latent._values_per_latent.0"))


def _numbered(state: Mapping[str, Tensor], pattern: re.Pattern[str], first: str) -> list[Tensor]:
    found = {int(match[1]): tensor for name, tensor in state.items() if (match := pattern.match(name))}
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(f"state must hold {first} and on without a gap, got numbers {sorted(found)}")
    return [found[index] for index in range(len(found))]


def _padded(values: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(values, batch_first=True)


def _dense_count(names: Mapping[str, Tensor] | list[str]) -> int:
    """Dense layers before the map in the plain decoder."""
    pattern = re.compile(r"^(?:decoder|generator)\.0\.(\d+)\.0\.weight$")
    return max((int(match[1]) + 1 for name in names if (match := pattern.match(name))), default=0)
