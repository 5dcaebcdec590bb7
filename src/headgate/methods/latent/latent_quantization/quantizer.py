"""The quantiser: every latent coordinate has a small codebook of its own and is snapped to the nearest value in it.

With ``V_j`` the codebook of latent j (Hsu et al. 2023, arXiv 2305.18378, section 3):

    i_nj = argmin_v |z_nj - V_j[v]|,  q_nj = V_j[i_nj],  ẑ = z + stopgrad(q - z)
    L_quant = mean_j (stopgrad(z_j) - q_j)²     moves the codebooks
    L_commit = mean_j (z_j - stopgrad(q_j))²    moves the encoder

The gradient of what reads ẑ passes straight through to z; a codebook learns from L_quant alone. Nothing is clamped or
squashed: codes are as good as the spread of z over the codebook, so a short training wants an encoder whose first
outputs reach across it (codebooks begin as ``linspace(-0.5, 0.5, levels)``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.validate import check_floating, check_integer, check_positive, check_shape

__all__ = ["LatentQuantizer", "QuantizedLatents"]


class QuantizedLatents(NamedTuple):
    """What :class:`LatentQuantizer` gives.

    Attributes:
        z_hat: ``(..., latent)`` the quantised latents in value, the encoder's in gradient: what a decoder reads.
        quantized: ``(..., latent)`` the codebook values themselves, with gradients to the codebooks.
        indices: ``(..., latent)`` int64, the discrete code.
        loss: scalar mean of ``loss_per_sample``.
        loss_per_sample: ``(...)`` both losses with their weights.
        quantization_loss: ``(...)`` L_quant without its weight.
        commitment_loss: ``(...)`` L_commit without its weight.
    """

    z_hat: Float[Tensor, "*batch latent"]
    quantized: Float[Tensor, "*batch latent"]
    indices: Int64[Tensor, "*batch latent"]
    loss: Float[Tensor, ""]
    loss_per_sample: Float[Tensor, "*batch"]
    quantization_loss: Float[Tensor, "*batch"]
    commitment_loss: Float[Tensor, "*batch"]


class LatentQuantizer(nn.Module):
    """Snap each latent to the nearest value of its codebook.

    It works on the last axis of any shape, so it stands where a VAE has its Gaussian or a VQ-VAE its layer.

    Args:
        num_latents: latents n_z on the last axis; the paper takes twice the number of sources.
        levels: values n_v per latent, at least 2; one number, or one per latent.
        learnable: whether the codebooks are trained.
        shared: whether all latents use one codebook.
        commitment_weight: of L_commit in the loss.
        quantization_weight: of L_quant in the loss.
        check_finite: refuse NaN and infinity, which would silently become a code. It makes a GPU wait once per call;
            under ``torch.compile`` and ``torch.export`` it is left out, and z_hat is NaN there.

    Raises:
        ValueError: fewer than 2 levels, a list of another length than ``num_latents``, different levels with
            ``shared=True``, or a negative weight.
    """

    mask: Tensor

    def __init__(
        self,
        num_latents: int,
        levels: int | Sequence[int] = 10,
        *,
        learnable: bool = True,
        shared: bool = False,
        commitment_weight: float = 0.01,
        quantization_weight: float = 0.01,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        check_positive(num_latents=num_latents)
        counts = [levels] * num_latents if isinstance(levels, int) else list(levels)
        if len(counts) != num_latents:
            raise ValueError(
                f"levels must be one number or num_latents={num_latents} of them, got {len(counts)}: {counts}"
            )
        if min(counts) < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        if shared and len(set(counts)) > 1:
            raise ValueError(f"levels must be equal with shared=True, got {counts}")
        for name, weight in (
            ("commitment_weight", commitment_weight),
            ("quantization_weight", quantization_weight),
        ):
            if weight < 0:
                raise ValueError(f"{name} must not be negative, got {weight}")
        self.num_latents = num_latents
        self.levels = tuple(counts)
        self.shared = shared
        self.commitment_weight = commitment_weight
        self.quantization_weight = quantization_weight
        self.check_finite = check_finite
        rows, widest = (1 if shared else num_latents), max(counts)
        # One padded tensor in place of a list (one argmin for all latents); what is padded is never chosen.
        self.codebook = nn.Parameter(torch.empty(rows, widest), requires_grad=learnable)  # V
        self.register_buffer("mask", torch.empty(rows, widest, dtype=torch.bool), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread every codebook evenly over [-0.5, 0.5]."""
        with torch.no_grad():
            self.codebook.zero_()
            self.mask.fill_(False)
            for row in range(len(self.codebook)):
                count = self.levels[row]
                self.codebook[row, :count] = torch.linspace(-0.5, 0.5, count).to(self.codebook)
                self.mask[row, :count] = True

    @property
    def values(self) -> list[Float[Tensor, " levels"]]:
        """The codebook of each latent, without padding."""
        codebook = self.codebook.expand(self.num_latents, -1)
        return [codebook[latent, :count] for latent, count in enumerate(self.levels)]

    def forward(self, z: Float[Tensor, "*batch latent"]) -> QuantizedLatents:
        """Snap ``z`` ``(..., num_latents)``.

        Raises:
            TypeError: ``z`` is not of the codebook's floating dtype.
            ValueError: another last size, or NaN or infinity in ``z``.
        """
        check_floating("z", z, like=self.codebook.dtype)
        self._check_last("z", z)
        if self.check_finite:
            _refuse_nan(z)
        distance = (z.unsqueeze(-1) - self.codebook).abs()
        if min(self.levels) < max(self.levels):
            distance = distance.masked_fill(~self.mask, torch.inf)
        indices = distance.argmin(dim=-1)
        quantized = self._look_up(indices)
        z_hat = z + (quantized - z).detach()
        quantization = (z.detach() - quantized).square().mean(dim=-1)
        commitment = (z - quantized.detach()).square().mean(dim=-1)
        loss = self.quantization_weight * quantization + self.commitment_weight * commitment
        return QuantizedLatents(z_hat, quantized, indices, loss.mean(), loss, quantization, commitment)

    def codes(self, indices: Int64[Tensor, "*batch latent"]) -> Float[Tensor, "*batch latent"]:
        """The codebook values of a discrete code, with gradients to the codebooks.

        Args:
            indices: ``(..., num_latents)`` integers.

        Raises:
            TypeError: not int64 or int32.
            ValueError: another last size, or an index outside its codebook.
        """
        check_integer("indices", indices)
        self._check_last("indices", indices)
        limits = torch.tensor(self.levels, device=indices.device)
        wrong = (indices < 0) | (indices >= limits)
        if wrong.any():
            latent = int(wrong.nonzero()[0, -1])
            raise ValueError(
                f"indices must lie in [0, {self.levels[latent]}) for latent {latent}, got "
                f"{int(indices[..., latent].min())} to {int(indices[..., latent].max())}"
            )
        return self._look_up(indices.long())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n latent"]:
        """Draw each latent uniformly from its own codebook, with gradients to the codebooks.

        Args:
            n: rows to draw.
            generator: a CPU generator; without one, PyTorch's global generator is used.

        Raises:
            ValueError: ``n`` is not positive.
        """
        check_positive(n=n)
        draws = torch.rand(n, self.num_latents, generator=generator, device="cpu", dtype=torch.float64)
        indices = (draws * torch.tensor(self.levels, device="cpu")).long()
        return self._look_up(indices.to(self.codebook.device))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        levels = self.levels[0] if len(set(self.levels)) == 1 else list(self.levels)
        return (
            f"{self.num_latents}, levels={levels}, learnable={self.codebook.requires_grad}, shared={self.shared}, "
            f"commitment_weight={self.commitment_weight}, quantization_weight={self.quantization_weight}"
        )

    def _look_up(self, indices: Int64[Tensor, "*batch latent"]) -> Float[Tensor, "*batch latent"]:
        if self.shared:
            return self.codebook[0][indices]
        return self.codebook[torch.arange(self.num_latents, device=indices.device), indices]

    def _check_last(self, name: str, tensor: Tensor) -> None:
        batch = tensor.dim() - 1
        if batch < 0:
            raise ValueError(f"{name} must have shape (..., latent), got {tuple(tensor.shape)}")
        check_shape(name, tensor, (None,) * batch + (self.num_latents,), ", ".join(["batch"] * batch + ["latent"]))


def _refuse_nan(z: Tensor) -> None:
    """Look at the values, where there are any: not while a graph is captured, nor on the meta device."""
    if torch.compiler.is_compiling() or z.is_meta:
        return
    if not bool(torch.isfinite(z).all()):
        count = int((~torch.isfinite(z)).sum())
        raise ValueError(f"z must be finite, got {count} values of {z.numel()} that are NaN or infinite")
