"""Linear classifiers on nested prefixes of one embedding (paper, Equation 1 and Section 3, "MRL-E").

Encoder F : X → R^d, z = F(x), prefix z_{1:m}, nesting set M::

    MRL     logits_m = W^(m) z_{1:m} + b^(m)       one classifier per size, C · Σ m weights
    MRL-E   logits_m = W[:, :m] z_{1:m} + b        one weight matrix and one bias for all sizes, C · d weights

With tied weights the logits at m are partial sums over blocks of coordinates, so all sizes together cost one product
of ``d × C``. The parameters carry the names of the official code (``nesting_classifier_{i}``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from headgate.methods.contrastive.matryoshka.sizes import check_dims
from headgate.validate import check_floating, check_positive, check_shape

__all__ = ["MatryoshkaHead", "nested_logits"]


class MatryoshkaHead(nn.Module):
    """Logits at every size of a nesting set.

    Args:
        dims: sizes in increasing order; the last one is the embedding's size d.
        num_classes: C.
        tied: one weight matrix and one bias for all sizes (MRL-E) instead of a classifier per size (MRL).
        bias: add a bias. With ``tied`` the same bias serves every size.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``dims`` is empty, below 1 or not strictly increasing, or ``num_classes`` is not positive.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        tied: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes)
        self.dims = check_dims(dims)
        self.num_classes = num_classes
        self.tied = tied
        for index, size in enumerate(self.dims[-1:] if tied else self.dims):
            layer = nn.Linear(size, num_classes, bias=bias, device=device, dtype=dtype)
            self.add_module(f"nesting_classifier_{index}", layer)

    def reset_parameters(self) -> None:
        """Draw all weights anew, as ``nn.Linear`` does."""
        for layer in self._layers():
            layer.reset_parameters()

    def forward(self, z: Float[Tensor, "batch dim"]) -> tuple[Float[Tensor, "batch classes"], ...]:
        """Compute the logits at every size.

        Args:
            z: embeddings, ``(batch, dims[-1])``.

        Returns:
            One tensor ``(batch, num_classes)`` per size, in the order of ``dims``.

        Raises:
            TypeError: ``z`` is not floating, or of another dtype than the weights.
            ValueError: another shape.
        """
        check_shape("z", z, (None, self.dims[-1]), "batch, dim")
        layers = self._layers()
        check_floating("z", z, like=layers[0].weight.dtype)
        if self.tied:
            return nested_logits(z, layers[0].weight, layers[0].bias, self.dims)
        return tuple(layer(z[:, :size]) for layer, size in zip(layers, self.dims, strict=True))

    def classifier(self, dim: int) -> nn.Linear:
        """A linear layer of its own that gives the logits of size ``dim`` from the first ``dim`` coordinates.

        For deployment at one size; the weights are copied.

        Raises:
            ValueError: ``dim`` is not one of ``dims``: there is no head for it (use a probe or 1-NN there).
        """
        if dim not in self.dims:
            raise ValueError(f"dim must be one of {list(self.dims)}, got {dim}")
        source = self._layers()[0 if self.tied else self.dims.index(dim)]
        weight = source.weight
        bias = source.bias is not None
        # No weights are drawn: reading a classifier leaves the global random state alone.
        layer: nn.Linear = skip_init(
            nn.Linear, dim, self.num_classes, bias=bias, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            layer.weight.copy_(weight[:, :dim])
            if bias:
                layer.bias.copy_(source.bias)
        return layer

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"dims={self.dims}, num_classes={self.num_classes}, tied={self.tied}"

    def _layers(self) -> list[nn.Linear]:
        count = 1 if self.tied else len(self.dims)
        return [self.get_submodule(f"nesting_classifier_{index}") for index in range(count)]  # type: ignore[misc]


def nested_logits(
    z: Float[Tensor, "... dim"],
    weight: Float[Tensor, "classes dim"],
    bias: Float[Tensor, " classes"] | None,
    dims: Sequence[int],
) -> tuple[Float[Tensor, "... classes"], ...]:
    """``W[:, :m] z_{1:m} + b`` for every m in ``dims``, block by block: each weight is used once.

    Half-precision products are added up in float32 and rounded once, at the end.

    Args:
        z: embeddings.
        weight: ``(classes, dim)``.
        bias: ``(classes,)`` or None.
        dims: sizes in increasing order, the last at most ``dim``.

    Returns:
        One tensor ``(..., classes)`` per size.
    """
    logits = []
    total: Tensor | None = None
    for start, stop in zip((0, *dims), dims, strict=False):
        product = F.linear(z[..., start:stop], weight[:, start:stop])
        wide = product.to(torch.promote_types(product.dtype, torch.float32))
        total = wide if total is None else total + wide
        logits.append((total if bias is None else total + bias.to(total.dtype)).to(product.dtype))
    return tuple(logits)
