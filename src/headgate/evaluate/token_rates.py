r"""Coding rates and sparsity of tokens, layer by layer: the objective of white-box transformers, for any network.

Yu et al., "White-Box Transformers via Sparse Rate Reduction" (arXiv 2306.01129, 2311.13110). Z is here the matrix of N
tokens of d channels, one token a row, ε² the distortion, and U_1 … U_K are bases of p columns:

.. math::
    R(Z) &= \tfrac12 \log\det\bigl(I + \tfrac{d}{N ε^2} Z^\top Z\bigr), \\
    R^c(Z; U) &= \sum_k \tfrac12 \log\det\bigl(I + \tfrac{p}{N ε^2} (Z U_k)^\top (Z U_k)\bigr), \\
    \text{objective} &= R(Z) - R^c(Z; U) - λ \|Z\|_0 \quad (\text{to be maximised}).

Rates are in nats and cost O(N d · min(N, d)), on the smaller side of Z, in float64. Functions of tensors can be
differentiated; ``(N, d)`` features of a data set have :func:`headgate.evaluate.coding_rate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headgate.evaluate.checks import Array, check_finite, to_numpy
from headgate.evaluate.undefined import undefined
from headgate.validate import check_divides, check_positive

__all__ = [
    "HasRateLayers",
    "LayerModules",
    "LayerRates",
    "RateTable",
    "SparseRateReduction",
    "layerwise_report",
    "projected_coding_rate",
    "sparse_rate_reduction",
    "subspace_coding_rate",
    "token_coding_rate",
    "zero_share",
]

_NORM_GUARD = 1e-12
"""Added to the norm of a token, so that one of zeros, which a ReLU can make, stays zero and has no part in the rate."""


class SparseRateReduction(NamedTuple):
    """The objective of a set of tokens and its terms, each ``(*batch)``.

    Attributes:
        objective: ``rate - subspace_rate - lambd * nonzeros``.
        rate: R(Z).
        subspace_rate: Rᶜ(Z; U).
        nonzeros: ‖Z‖₀, how many entries are not zero.
    """

    objective: Float[Array, "*batch"]
    rate: Float[Array, "*batch"]
    subspace_rate: Float[Array, "*batch"]
    nonzeros: Float[Array, "*batch"]


@dataclass(frozen=True)
class LayerModules:
    """Where the tokens of one layer are read, by the names of ``model.named_modules()``.

    Attributes:
        projection: its output is the tokens' projections ``(batch, tokens, channels)``, head after head.
        num_heads: K; must divide the channels that are read.
        output: the layer's output, whose zeros are counted.
        channels: which channels of ``projection`` are read, (first, last + 1); default all. Of a fused projection to
            queries, keys and values of width d, (2 * d, 3 * d) are the values.
    """

    projection: str
    num_heads: int
    output: str
    channels: tuple[int, int] | None = None


@runtime_checkable
class HasRateLayers(Protocol):
    """A model that knows where its layers are to be read."""

    def rate_layers(self) -> Mapping[str, LayerModules]:
        """Name of a layer → its modules, in order of depth."""


@dataclass(frozen=True)
class LayerRates:
    """One layer, measured on a batch of samples.

    Attributes:
        coding_rate: mean over samples of Rᶜ of the projections, every projected token of unit length.
        coding_rate_std: its unbiased deviation over samples; 0 for one sample.
        zeros: mean over samples of the share of exact zeros in the output.
    """

    coding_rate: float
    coding_rate_std: float
    zeros: float

    @property
    def nonzeros(self) -> float:
        """``1 - zeros``, as the paper plots it."""
        return 1.0 - self.zeros


@dataclass(frozen=True)
class RateTable:
    """What :func:`layerwise_report` returns.

    Attributes:
        rows: layer → its rates, in order of depth.
    """

    rows: Mapping[str, LayerRates]

    def column(self, name: str) -> list[float]:
        """``"coding_rate"``, ``"coding_rate_std"``, ``"zeros"`` or ``"nonzeros"`` of all layers."""
        return [getattr(row, name) for row in self.rows.values()]

    def depth_correlation(self, name: str) -> float:
        """Spearman's rank correlation of a column with depth, in [-1, 1]; nan (and a warning) where it is constant."""
        from scipy.stats import spearmanr

        values = self.column(name)
        if len(set(values)) < 2:
            return undefined("depth_correlation", f"{name} has one value in all {len(values)} layers")
        return float(spearmanr(range(len(values)), values).statistic)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        lines = ["| layer | coding rate | std | non-zeros |", "|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {row.coding_rate:.2f} | {row.coding_rate_std:.2f} | {row.nonzeros:.4f} |"
            for name, row in self.rows.items()
        ]
        return "\n".join(lines) + "\n"


def token_coding_rate(
    z: Float[Array, "*batch tokens dim"], eps2: float = 0.01, normalize: bool = True
) -> Float[Array, "*batch"]:
    """R(Z) of every set of tokens: how many nats it takes to code them up to distortion ε².

    Args:
        z: tokens ``(*batch, N, d)``.
        eps2: ε², positive.
        normalize: divide every token by its L2 norm + 1e-12 first.

    Returns:
        ``(*batch)``, at least 0, at least of float32.

    Raises:
        TypeError: ``z`` is no array of floating-point numbers.
        ValueError: fewer than two axes, no token or channel, NaN or infinity, or ``eps2`` not positive.
    """
    check_positive(eps2=eps2)
    tokens = _as_tokens("z", z)
    return _as_given(z, _rate(tokens, eps2, normalize))


def projected_coding_rate(
    w: Float[Array, "*batch heads tokens head_dim"], eps2: float = 0.01, normalize: bool = True
) -> Float[Array, "*batch"]:
    """Rᶜ of tokens that are projected already: the sum over heads of their coding rates.

    With the defaults it is the published measurement (``vis_utils/coding_rate.py``).

    Args:
        w: ``(*batch, K, N, p)``, ``Z U_k`` for every head.
        eps2: ε², positive.
        normalize: divide every projected token by its L2 norm + 1e-12 first. (The published code adds nothing, and gives
            NaN for a token of zeros.)

    Returns:
        ``(*batch)``, at least of float32.

    Raises:
        TypeError: ``w`` is no array of floating-point numbers.
        ValueError: fewer than three axes, one of them empty, NaN or infinity, or ``eps2`` not positive.
    """
    check_positive(eps2=eps2)
    tokens = _as_tokens("w", w, axes=("heads", "tokens", "head_dim"))
    return _as_given(w, _rate(tokens, eps2, normalize).sum(dim=-1))


def subspace_coding_rate(
    z: Float[Array, "*batch tokens dim"],
    bases: Float[Array, "heads dim head_dim"],
    eps2: float = 0.01,
    normalize: bool = False,
) -> Float[Array, "*batch"]:
    """Rᶜ(Z; U) of every set of tokens against K subspaces.

    Args:
        z: tokens ``(*batch, N, d)``.
        bases: U ``(K, d, p)``.
        eps2: ε², positive.
        normalize: divide every projected token by its L2 norm + 1e-12 first, as the published measurement does and the
            definition does not.

    Returns:
        ``(*batch)``, at least of float32.

    Raises:
        TypeError: something is no array of floating-point numbers.
        ValueError: shapes do not fit, NaN or infinity, or ``eps2`` not positive.
    """
    check_positive(eps2=eps2)
    tokens = _as_tokens("z", z)
    return _as_given(z, _subspace_rate(tokens, _as_bases(bases, tokens), eps2, normalize))


def sparse_rate_reduction(
    z: Float[Array, "*batch tokens dim"],
    bases: Float[Array, "heads dim head_dim"],
    eps2: float = 0.01,
    lambd: float = 0.1,
    normalize: bool = False,
) -> SparseRateReduction:
    """The objective that a white-box transformer maximises, ``R(Z) - Rᶜ(Z; U) - λ‖Z‖₀``, and its terms.

    Args:
        z: tokens ``(*batch, N, d)``.
        bases: U ``(K, d, p)``.
        eps2: ε², positive.
        lambd: λ, at least 0.
        normalize: give unit length to the tokens in R and to the projected tokens in Rᶜ.

    Raises:
        TypeError: something is no array of floating-point numbers.
        ValueError: shapes do not fit, NaN or infinity, ``eps2`` not positive, or ``lambd`` negative.
    """
    check_positive(eps2=eps2)
    if not lambd >= 0:
        raise ValueError(f"lambd must be at least 0, got lambd={lambd}")
    tokens = _as_tokens("z", z)
    whole = _rate(tokens, eps2, normalize)
    within = _subspace_rate(tokens, _as_bases(bases, tokens), eps2, normalize)
    nonzeros = (tokens != 0).sum(dim=(-2, -1)).to(whole.dtype)
    terms = (whole - within - lambd * nonzeros, whole, within, nonzeros)
    return SparseRateReduction(*(_as_given(z, term) for term in terms))


def zero_share(z: Float[Array, "*batch tokens dim"]) -> Float[Array, "*batch"]:
    """The share of entries of every set of tokens that are exactly zero.

    Args:
        z: tokens ``(*batch, N, d)``.

    Returns:
        ``(*batch)`` in [0, 1], at least of float32.

    Raises:
        TypeError: ``z`` is no array of floating-point numbers.
        ValueError: fewer than two axes, no token or channel, or NaN or infinity.
    """
    tokens = _as_tokens("z", z)
    return _as_given(z, (tokens == 0).to(torch.float64).mean(dim=(-2, -1)))


def layerwise_report(
    model: nn.Module, x: Any, layers: Mapping[str, LayerModules] | None = None, *, eps2: float = 0.01
) -> RateTable:
    """Measure every layer of a network on one batch, as the authors of CRATE do.

    The rate is taken on the projection that *enters* a layer's attention, although the paper's plots label it
    Rᶜ(Z^(l+1/2)); zeros are counted in what leaves the layer. The model runs in eval mode without gradients; afterwards
    every module is in the mode in which it was. Rates need K p² N per sample and layer, so a few hundred images will do.

    Args:
        model: any module.
        x: its input: a tensor, or a mapping of keywords; on the model's device.
        layers: name → modules of the layer, in order of depth; default: what ``model.rate_layers()`` says.
        eps2: ε², positive.

    Raises:
        TypeError: no ``layers`` for a model that does not know its own, or a module that gives no tensor.
        ValueError: no layer, an unknown module, one that does not run once, or tokens of another shape.
    """
    check_positive(eps2=eps2)
    if layers is None:
        if not isinstance(model, HasRateLayers):
            raise TypeError(
                f"layers must be given for a model without rate_layers(), got None for a {type(model).__name__}"
            )
        layers = model.rate_layers()
    if not layers:
        raise ValueError("layers must name at least one layer, got none")
    modules = dict(model.named_modules())
    rates: dict[str, list[Tensor]] = {name: [] for name in layers}
    zeros: dict[str, list[Tensor]] = {name: [] for name in layers}
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for name, layer in layers.items():
            for place in (layer.projection, layer.output):
                if place not in modules:
                    raise ValueError(f"layers[{name!r}] must name submodules of the model, got {place!r}")

            def read_projection(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                heads = _heads(layers[name], _tensor(layers[name].projection, output))
                rates[name].append(_rate(heads, eps2, True).sum(dim=-1))

            def read_output(_module: nn.Module, _inputs: Any, output: Any, name: str = name) -> None:
                tokens = _tokens(layers[name].output, _tensor(layers[name].output, output))
                zeros[name].append((tokens == 0).to(torch.float64).flatten(1).mean(dim=1))

            for place, hook in ((layer.projection, read_projection), (layer.output, read_output)):
                stack.callback(modules[place].register_forward_hook(hook).remove)
        model.eval()
        if isinstance(x, Mapping):
            model(**x)
        else:
            model(x)
    rows = {}
    for name in layers:
        rate, zero = _once(name, rates[name]), _once(name, zeros[name])
        deviation = float(rate.std()) if len(rate) > 1 else 0.0
        rows[name] = LayerRates(float(rate.mean()), deviation, float(zero.mean()))
    return RateTable(rows)


def _rate(tokens: Float[Tensor, "*batch tokens dim"], eps2: float, normalize: bool) -> Float[Tensor, "*batch"]:
    """``½ logdet(I + d/(N ε²) ZᵀZ)`` by Cholesky on the smaller side."""
    if normalize:
        tokens = tokens / (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) + _NORM_GUARD)
    count, dim = tokens.shape[-2:]
    product = tokens @ tokens.mT if count < dim else tokens.mT @ tokens
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    factor = torch.linalg.cholesky(identity + dim / (count * eps2) * product)
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


def _subspace_rate(
    tokens: Float[Tensor, "*batch tokens dim"], bases: Float[Tensor, "heads dim head_dim"], eps2: float, normalize: bool
) -> Float[Tensor, "*batch"]:
    return _rate(tokens.unsqueeze(-3) @ bases, eps2, normalize).sum(dim=-1)


def _as_tokens(name: str, values: Array, axes: Sequence[str] = ("tokens", "dim")) -> Float[Tensor, "*batch tokens dim"]:
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(to_numpy(name, values))
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.dim() < len(axes) or 0 in tensor.shape[-len(axes) :]:
        raise ValueError(
            f"{name} must have shape (..., {', '.join(axes)}) with all sizes positive, got {tuple(tensor.shape)}"
        )
    check_finite(name, tensor)
    return _wide(tensor)


def _as_bases(bases: Array, tokens: Tensor) -> Float[Tensor, "heads dim head_dim"]:
    wide = _as_tokens("bases", bases, axes=("heads", "dim", "head_dim"))
    if wide.dim() != 3 or wide.shape[1] != tokens.shape[-1]:
        raise ValueError(
            f"bases must have shape (heads, dim, head_dim) with dim={tokens.shape[-1]}, got {tuple(wide.shape)}"
        )
    return wide.to(tokens.device)


def _wide(tensor: Tensor) -> Tensor:
    """In float64, where the device has it: p/(N ε²) may be large."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _as_given(given: Array, value: Tensor) -> Any:
    """``value`` as the kind and, down to float32, the dtype of the argument."""
    if not isinstance(given, Tensor):
        return value.numpy().astype(np.promote_types(given.dtype, np.float32))
    return value.to(torch.promote_types(given.dtype, torch.float32))


def _tensor(place: str, output: Any) -> Tensor:
    if isinstance(output, list | tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"module {place!r} must give a tensor, got {type(output).__name__}")
    return output


def _tokens(place: str, output: Tensor) -> Float[Tensor, "batch tokens dim"]:
    if output.dim() != 3 or 0 in output.shape:
        raise ValueError(f"module {place!r} must give tokens (batch, tokens, dim), got {tuple(output.shape)}")
    return output


def _heads(layer: LayerModules, output: Tensor) -> Float[Tensor, "batch heads tokens head_dim"]:
    tokens = _tokens(layer.projection, output)
    first, last = layer.channels or (0, tokens.shape[-1])
    if not 0 <= first < last <= tokens.shape[-1]:
        raise ValueError(f"channels must lie within the {tokens.shape[-1]} of {layer.projection!r}, got {first, last}")
    check_divides(num_heads=layer.num_heads, channels=last - first)
    return _wide(tokens[..., first:last].unflatten(-1, (layer.num_heads, -1)).transpose(1, 2))


def _once(name: str, found: Sequence[Tensor]) -> Tensor:
    if len(found) != 1:
        raise ValueError(f"the modules of layer {name!r} must run once in a pass, one of them ran {len(found)} times")
    return found[0]
