"""Any loss, summed over nested prefixes (paper, Equation 1; Section 3 for the contrastive form)::

    L = Σ_{m ∈ M} c_m · base(z_{1:m}, …)            c_m = 1 by default; the sum is not divided by |M|

For classification the base loss is the cross-entropy of the logits that :class:`MatryoshkaHead` gives at each size.
For losses of embeddings, every embedding is cut to its first m coordinates and, with ``normalize``, scaled to length 1
after the cut. Coordinate j therefore gets a gradient from the sizes m > j only, and the first ones from all of them.

Under DistributedDataParallel gather the full embeddings once and hand them to this loss: it slices after gathering.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.methods.contrastive.matryoshka.sizes import check_dims, check_weights
from headgate.methods.contrastive.matryoshka.truncate import prefix
from headgate.validate import check_floating, check_shape

__all__ = ["MatryoshkaContrastiveLoss", "MatryoshkaLoss"]

BaseLoss: TypeAlias = Callable[..., Tensor]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Features: TypeAlias = Sequence[Mapping[str, Tensor]]


class MatryoshkaLoss(nn.Module):
    """The weighted sum of one loss over the sizes of a nesting set.

    What is summed follows from what comes in:

    - logits per size (the tuple of :class:`MatryoshkaHead`, a mapping size → logits, or one stacked tensor
      ``(sizes, batch, classes)``) and a target: ``base_loss(logits_m, target)``, in float32 at least;
    - one or more embeddings ``(batch, dims[-1])``: ``base_loss(a_{1:m}, b_{1:m}, …)``;
    - the feature mappings of sentence-transformers, where ``base_loss`` is one of that library's losses: its model
      runs once per text column, and the loss sees the truncated embeddings.

    A zero slice has no direction: with ``normalize`` it stays zero. NaN in an embedding gives a NaN loss.

    Args:
        base_loss: function or module. May be left out, ``MatryoshkaLoss([8, 16])``: cross-entropy. Put label smoothing
            into it: ``MatryoshkaLoss(nn.CrossEntropyLoss(label_smoothing=0.1), dims)``.
        dims: sizes in increasing order; the last one is the embedding's size.
        weights: c_m, one for each size, not negative, not all zero; ``None`` is all 1. Kept as a buffer.
        normalize: scale each slice of an embedding to length 1, after slicing.
        dims_per_step: in training mode draw this many sizes per call, without replacement, and scale the sum by
            ``|M| / dims_per_step``, so that its expectation is the full sum. Saves similarity matrices. The draw
            depends on ``seed`` and the number of the call alone: it is the same on every process, and it goes on after
            a checkpoint. Evaluation mode always takes all sizes. Not for ``torch.compile``, which would freeze a draw.
        seed: of the draws, at least 0.
        reduction: over the batch. ``"sum"`` and ``"none"`` need a base loss that gives one value per item
            (``nn.CrossEntropyLoss(reduction="none")``; the default base loss does so of itself).

    Raises:
        TypeError: ``base_loss`` cannot be called, or is a gradient-caching loss of sentence-transformers.
        ValueError: ``dims``, ``weights``, ``dims_per_step``, ``seed`` or ``reduction`` is out of range.
    """

    weights: Float[Tensor, " sizes"]

    def __init__(
        self,
        base_loss: BaseLoss | Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = False,
        dims_per_step: int | None = None,
        seed: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if isinstance(base_loss, Sequence):
            if dims is not None:
                raise TypeError("base_loss must be a function or a module, got a sequence together with dims")
            base_loss, dims = None, base_loss
        if dims is None:
            raise TypeError("dims must be given: MatryoshkaLoss(dims) or MatryoshkaLoss(base_loss, dims)")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if base_loss is not None and not callable(base_loss):
            raise TypeError(f"base_loss must be a function or a module, got {type(base_loss).__name__}")
        if hasattr(base_loss, "calculate_loss") and hasattr(base_loss, "mini_batch_size"):
            raise TypeError(
                f"base_loss must leave the backward pass to the caller; {type(base_loss).__name__} caches gradients "
                "(use its uncached form)"
            )
        self.dims = check_dims(dims)
        if dims_per_step is not None and not 1 <= dims_per_step <= len(self.dims):
            raise ValueError(f"dims_per_step must lie in [1, {len(self.dims)}], got {dims_per_step}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.is_default = base_loss is None
        self.base_loss = nn.CrossEntropyLoss(reduction=reduction) if base_loss is None else base_loss
        self.normalize = normalize
        self.dims_per_step = dims_per_step
        self.seed = seed
        self.reduction = reduction
        self.calls = 0
        self.register_buffer("weights", torch.tensor(check_weights(weights, len(self.dims))))

    def forward(
        self, inputs: Tensor | Sequence[Tensor] | Mapping[int, Tensor] | Features, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "*batch"]:
        """Sum the base loss over the sizes.

        Args:
            inputs: logits per size, an embedding ``(batch, dims[-1])``, or feature mappings.
            *args: handed to ``base_loss``; with an embedding, every further floating matrix is an embedding, too, and
                is cut in the same way. A floating matrix that must stay whole (soft labels) goes by keyword.
            **kwargs: handed to ``base_loss`` as they are.

        Returns:
            A scalar, or ``(batch,)`` with ``reduction="none"``.

        Raises:
            TypeError: ``inputs`` is none of the three kinds, or an embedding is not floating.
            ValueError: not one logits tensor per size, an embedding of another size, ``normalize`` with logits, or a
                base loss that has already averaged where ``reduction`` is ``"sum"`` or ``"none"``.
        """
        chosen = self._chosen()
        total: Tensor | None = None
        for index, term in self._terms(chosen, inputs, args, kwargs):
            wide = term.to(torch.promote_types(term.dtype, torch.float32))
            weighted = self.weights[index].to(wide.dtype) * wide
            total = weighted if total is None else total + weighted
        assert total is not None
        if len(chosen) < len(self.dims):
            total = total * (len(self.dims) / len(chosen))
        return self._reduce(total)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"dims={self.dims}, normalize={self.normalize}, reduction={self.reduction!r}"

    def get_extra_state(self) -> Tensor:
        """Number of draws so far, so that a resumed run draws what an uninterrupted one would have."""
        return torch.tensor(self.calls, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the draws where :meth:`get_extra_state` left them."""
        self.calls = int(state)

    def _chosen(self) -> Sequence[int]:
        if self.dims_per_step is None or not self.training:
            return range(len(self.dims))
        return self._draw(self.dims_per_step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _draw(self, count: int) -> Sequence[int]:
        draws = np.random.default_rng([self.seed, self.calls])
        self.calls += 1
        return sorted(draws.choice(len(self.dims), size=count, replace=False).tolist())

    def _terms(
        self, chosen: Sequence[int], inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        if isinstance(inputs, Tensor) and inputs.dim() == 2:
            yield from self._embedding_terms(chosen, (inputs, *args), kwargs)
        elif isinstance(inputs, Sequence) and inputs and all(isinstance(entry, Mapping) for entry in inputs):
            yield from self._sentence_terms(chosen, inputs, args, kwargs)
        else:
            logits = self._as_logits(inputs)
            if self.is_default:
                _check_target(logits[0], *args, **kwargs)
            yield from self._logits_terms(chosen, logits, args, kwargs)

    def _as_logits(self, inputs: Any) -> Sequence[Tensor]:
        if isinstance(inputs, Mapping):
            if set(inputs) != set(self.dims):
                raise ValueError(f"inputs must hold logits for the dims {list(self.dims)}, got {sorted(inputs)}")
            logits: Sequence[Any] = [inputs[size] for size in self.dims]
        elif isinstance(inputs, Tensor):
            if inputs.dim() < 3:
                raise ValueError(
                    "inputs must be logits per size or an embedding (batch, dim), got a tensor of shape "
                    f"{tuple(inputs.shape)}"
                )
            logits = inputs.unbind(0)
        elif isinstance(inputs, Sequence):
            logits = inputs
        else:
            raise TypeError(f"inputs must be logits per size, an embedding or features, got {type(inputs).__name__}")
        if len(logits) != len(self.dims):
            raise ValueError(f"inputs must hold logits for each of the {len(self.dims)} dims, got {len(logits)}")
        for entry in logits:
            if not isinstance(entry, Tensor) or not entry.is_floating_point():
                kind = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
                raise TypeError(f"inputs must hold floating tensors, got {kind}")
            if entry.dim() < 2 or entry.shape != logits[0].shape:
                shapes = [tuple(other.shape) for other in logits]
                raise ValueError(f"inputs must hold logits of one shape (batch, classes), got {shapes}")
        if self.normalize:
            raise ValueError("normalize applies to embeddings, got logits per size")
        return logits

    def _logits_terms(
        self, chosen: Sequence[int], logits: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        for index in chosen:
            wide = logits[index].to(torch.promote_types(logits[index].dtype, torch.float32))
            yield index, self.base_loss(wide, *args, **kwargs)

    def _embedding_terms(
        self, chosen: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        if self.is_default:
            raise ValueError(
                "inputs must be logits per size (cross-entropy is the default base_loss), got an embedding of shape "
                f"{tuple(args[0].shape)}"
            )
        shape = args[0].shape
        is_embedding = [
            isinstance(arg, Tensor) and arg.dim() == 2 and (arg.is_floating_point() or arg.shape == shape)
            for arg in args
        ]
        for place, (arg, applies) in enumerate(zip(args, is_embedding, strict=True)):
            if applies:
                self._check_embedding("args" if place else "inputs", arg)
        for index in chosen:
            cut = [
                prefix(arg, self.dims[index], self.normalize) if applies else arg
                for arg, applies in zip(args, is_embedding, strict=True)
            ]
            yield index, self.base_loss(*cut, **kwargs)

    def _sentence_terms(
        self, chosen: Sequence[int], features: Features, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, Tensor]]:
        model = getattr(self.base_loss, "model", None)
        if not isinstance(model, nn.Module):
            raise TypeError(
                "features need a base_loss that holds its model, as those of sentence-transformers do, got "
                f"{type(self.base_loss).__name__}"
            )
        encoded = {id(entry): dict(model(entry)) for entry in features}
        for output in encoded.values():
            self._check_embedding("inputs", output["sentence_embedding"])
        for index in chosen:

            def cut(entry: Mapping[str, Tensor], size: int = self.dims[index]) -> dict[str, Any]:
                output = encoded[id(entry)]
                vectors = {key: output[key] for key in ("sentence_embedding", "token_embeddings") if key in output}
                return output | {key: prefix(value, size, self.normalize) for key, value in vectors.items()}

            with _forward_replaced(model, cut):
                term = self.base_loss(features, *args, **kwargs)
            yield index, term

    def _check_embedding(self, name: str, embedding: Tensor) -> None:
        check_floating(name, embedding)
        check_shape(name, embedding, (None, self.dims[-1]), "batch, dim")

    def _reduce(self, total: Tensor) -> Tensor:
        if total.dim() == 0 and self.reduction != "mean" and not self.is_default:
            raise ValueError(
                f"base_loss must give one value per item for reduction={self.reduction!r}, got a scalar "
                "(give it reduction='none')"
            )
        if self.reduction == "mean":
            return total.mean()
        return total.sum() if self.reduction == "sum" else total


def _check_target(logits: Tensor, target: Tensor) -> None:
    """Check what ``nn.CrossEntropyLoss`` would meet with an error of its own kind."""
    if not isinstance(target, Tensor):
        raise TypeError(f"args must hold the target as a tensor, got {type(target).__name__}")
    if target.is_floating_point() and target.shape == logits.shape:
        return
    if target.dtype != torch.int64:
        raise TypeError(f"args must hold int64 labels, or probabilities of the logits' shape, got {target.dtype}")
    if target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"args must hold labels for logits {tuple(logits.shape)}, got {tuple(target.shape)}")


class MatryoshkaContrastiveLoss(MatryoshkaLoss):
    """The symmetric in-batch contrastive loss of ALIGN and CLIP at every size, each slice of both sides normalised.

    ``L = Σ_m c_m · ½ [CE(A_m B_mᵀ / τ, i) + CE(B_m A_mᵀ / τ, i)]`` with A_m, B_m the normalised slices and the same τ
    at every size.

    Args:
        dims: as in :class:`MatryoshkaLoss`.
        weights: as there.
        temperature: τ at the start, positive.
        learn_temperature: train ``log τ``.
        dims_per_step: as in :class:`MatryoshkaLoss`.
        seed: as there.
        reduction: over the pairs.

    Raises:
        ValueError: ``temperature`` is not positive, or as in :class:`MatryoshkaLoss`.
    """

    def __init__(
        self,
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        dims_per_step: int | None = None,
        seed: int = 0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(
            _SymmetricContrast(temperature, learn_temperature),
            dims,
            weights,
            normalize=True,
            dims_per_step=dims_per_step,
            seed=seed,
            reduction=reduction,
        )


class _SymmetricContrast(nn.Module):
    """``½ [CE(A Bᵀ / τ, i) + CE(B Aᵀ / τ, i)]``, one value per pair."""

    def __init__(self, temperature: float, learn: bool) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log(), requires_grad=learn)

    def forward(self, a: Float[Tensor, "batch dim"], b: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        if a.shape != b.shape:
            raise ValueError(f"inputs and args must hold the same pairs, got {tuple(a.shape)} and {tuple(b.shape)}")
        similarity = (a @ b.T).to(torch.promote_types(a.dtype, torch.float32)) / self.log_temperature.exp()
        pairs = torch.arange(len(a), device=a.device)
        forth = F.cross_entropy(similarity, pairs, reduction="none")
        return (forth + F.cross_entropy(similarity.T, pairs, reduction="none")) / 2


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``module`` answer with ``forward`` for the length of a block."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before
