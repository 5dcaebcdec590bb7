"""An encoder that hands out relative representations, trained end to end (Moschella et al. 2023, Section 4.3).

The anchors are items of the training data, drawn once and kept with the model. In every step they are encoded anew by the
encoder as it is then, without gradients; gradients flow through the items of the batch alone.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations.attention import RelativeAttention
from headgate.methods.contrastive.relative_representations.subspaces import SubspaceRelativeAttention
from headgate.validate import check_integer, check_positive, check_shape

__all__ = ["RelativeEncoder"]


class RelativeEncoder(nn.Module):
    """``x`` to the relative representation of ``encoder(x)`` with respect to anchors that are inputs of the encoder.

    Args:
        encoder: from ``(batch, …)`` to embeddings ``(batch, dim)``.
        anchor_inputs: ``(K, …)``, the anchors as the encoder takes them; a buffer.
        dim: size of the embeddings.
        anchor_labels: ``(K,)`` classes of the anchors, for ``aggregate`` and ``resample``; a buffer.
        anchor_ids: ``(K,)`` integers that name the anchors, for :func:`check_same_anchors`; by default 0 … K - 1.
        refresh: encode the anchors in every ``refresh``-th forward of training and use these embeddings until the next;
            in evaluation they are encoded in every forward. With ``refresh`` above 1 a compiled model is traced anew.
        anchor_mode: ``"current"``: anchors go through the encoder in the mode it is in (in training its batch
            normalisation sees them as a batch of their own, and its dropout makes them noisy); ``"eval"``: always in
            evaluation mode.
        subspaces: equal blocks of the embedding.
        **options: of :class:`RelativeAttention`, or of :class:`SubspaceRelativeAttention` with ``subspaces`` above 1.

    Raises:
        TypeError: ``anchor_inputs`` is no tensor, or labels or ids are no integers.
        ValueError: numbers out of range, lengths that differ, or as :class:`RelativeAttention`.
    """

    anchor_inputs: Tensor
    anchor_ids: Int[Tensor, " anchors"]
    anchor_labels: Int[Tensor, " anchors"] | None
    latents: Float[Tensor, "anchors dim"] | None

    def __init__(
        self,
        encoder: nn.Module,
        anchor_inputs: Shaped[Tensor, "anchors *item"],
        dim: int,
        *,
        anchor_labels: Int[Tensor, " anchors"] | None = None,
        anchor_ids: Int[Tensor, " anchors"] | None = None,
        refresh: int = 1,
        anchor_mode: Literal["current", "eval"] = "current",
        subspaces: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(anchor_inputs, Tensor):
            raise TypeError(f"anchor_inputs must be a tensor, got {type(anchor_inputs).__name__}")
        count = anchor_inputs.shape[0] if anchor_inputs.dim() else 0
        if count == 0:
            raise ValueError(f"anchor_inputs must hold at least one anchor, got shape {tuple(anchor_inputs.shape)}")
        check_positive(refresh=refresh, subspaces=subspaces)
        if anchor_mode not in ("current", "eval"):
            raise ValueError(f"anchor_mode must be 'current' or 'eval', got {anchor_mode!r}")
        self.encoder = encoder
        self.relative: RelativeAttention | SubspaceRelativeAttention = (
            RelativeAttention(count, dim, **options)
            if subspaces == 1
            else SubspaceRelativeAttention(count, dim, subspaces=subspaces, **options)
        )
        self.refresh, self.anchor_mode = refresh, anchor_mode
        if anchor_labels is not None:
            self.relative.check_labels(anchor_labels)
        ids = torch.arange(count, device=anchor_inputs.device) if anchor_ids is None else anchor_ids
        check_shape("anchor_ids", ids, (count,), "anchors")
        check_integer("anchor_ids", ids)
        self.register_buffer("anchor_inputs", anchor_inputs.clone())
        self.register_buffer("anchor_ids", ids.clone())
        self.register_buffer("anchor_labels", None if anchor_labels is None else anchor_labels.clone())
        self.register_buffer("latents", None, persistent=False)
        self._since_refresh = 0

    @property
    def out_dim(self) -> int:
        """Size of the relative representation."""
        return self.relative.out_dim

    def forward(self, x: Shaped[Tensor, "batch *item"]) -> Float[Tensor, "batch out"]:
        """Relative representation of a batch of inputs.

        Args:
            x: as the encoder takes it.

        Returns:
            ``(batch, out_dim)``.

        Raises:
            ValueError: the encoder gives another shape than ``(batch, dim)``.
        """
        embedded = self.encoder(x)
        anchors = self.embed_anchors().to(embedded.dtype)
        relative = self.relative
        return relative.decode(relative.encode_trusted(embedded, anchors, self.anchor_labels))  # type: ignore[arg-type]

    def embed_anchors(self) -> Float[Tensor, "anchors dim"]:
        """The anchors' embeddings, without gradients; see ``refresh`` and ``anchor_mode``."""
        if self.refresh == 1 or not self.training:
            return self._encode_anchors()
        if self.latents is None or self._since_refresh >= self.refresh:
            self.latents = self._encode_anchors()
            self._since_refresh = 0
        self._since_refresh += 1
        return self.latents

    @torch.no_grad()
    def _encode_anchors(self) -> Float[Tensor, "anchors dim"]:
        if self.anchor_mode == "current" or not self.training:
            embedded: Tensor = self.encoder(self.anchor_inputs)
            return embedded
        modes = {module: module.training for module in self.encoder.modules()}
        try:
            embedded = self.encoder.eval()(self.anchor_inputs)
        finally:
            for module, training in modes.items():
                module.training = training
        return embedded
