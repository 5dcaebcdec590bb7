"""Any encoder with the size of its embeddings as a setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headgate.methods.contrastive.matryoshka.sizes import check_dims
from headgate.methods.contrastive.matryoshka.truncate import check_prefix, prefix

__all__ = ["MatryoshkaEncoder"]


class MatryoshkaEncoder(nn.Module):
    """Any encoder, with the size of its embeddings as a setting that may be changed at deployment.

    ``model.dim = 64`` makes every later call return 64 coordinates; so does ``model(x, dim=64)`` for one call.

    Args:
        encoder: module that returns a tensor ``(..., dims[-1])``.
        dims: the sizes it was trained for.
        dim: size to return, at most ``dims[-1]``. Sizes between the trained ones work too: accuracy interpolates.
            ``None`` is all of it.
        normalize: scale each slice to length 1; a slice of zeros stays zeros.

    Raises:
        ValueError: ``dims`` is no nesting set, or ``dim`` lies outside [1, dims[-1]].
    """

    def __init__(
        self, encoder: nn.Module, dims: Sequence[int], *, dim: int | None = None, normalize: bool = True
    ) -> None:
        super().__init__()
        self.dims = check_dims(dims)
        self.encoder = encoder
        self.normalize = normalize
        self.dim = self.dims[-1] if dim is None else dim

    @property
    def dim(self) -> int:
        """Size of the embeddings that come back."""
        return self._dim

    @dim.setter
    def dim(self, dim: int) -> None:
        check_prefix((self.dims[-1],), dim)
        self._dim = dim

    def forward(self, *args: Any, dim: int | None = None, **kwargs: Any) -> Float[Tensor, "... dim"]:
        """Encode and truncate.

        Args:
            *args: handed to the encoder.
            dim: size for this call; ``None`` is the module's.
            **kwargs: handed to the encoder.

        Returns:
            ``(..., dim)``.

        Raises:
            TypeError: the encoder returned something other than a floating tensor.
            ValueError: its last size is not ``dims[-1]``, or ``dim`` lies outside [1, dims[-1]].
        """
        z = self.encoder(*args, **kwargs)
        if not isinstance(z, Tensor) or not z.is_floating_point():
            kind = z.dtype if isinstance(z, Tensor) else type(z).__name__
            raise TypeError(f"encoder must return a floating tensor, got {kind}")
        if z.shape[-1] != self.dims[-1]:
            raise ValueError(f"encoder must return embeddings of size {self.dims[-1]}, got {tuple(z.shape)}")
        size = self.dim if dim is None else dim
        check_prefix(z.shape, size)
        return prefix(z, size, self.normalize)
