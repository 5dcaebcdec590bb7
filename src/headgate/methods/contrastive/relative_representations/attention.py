"""The relative block: items described by their similarities to anchors (Moschella et al. 2023, Section 3).

With an encoder E, an item's embedding e_x = E(x) and anchors a_1 … a_K out of the data::

    r_x = (sim(e_x, e_{a_1}), …, sim(e_x, e_{a_K}))

The published block (``RelativeAttention`` of lucmos/relreps) adds options around this line, in this order: anchors drawn
anew; learned maps of items and anchors; scaling to length 1; quantised embeddings; similarity; averages per class;
quantised similarities; what is made of the similarities (``values``); normalisation of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.methods.contrastive.relative_representations.classes import (
    RESAMPLINGS,
    Resampling,
    check_anchor_labels,
    class_means,
    draw_anchors,
)
from headgate.methods.contrastive.relative_representations.norm import AcrossBatchNorm
from headgate.methods.contrastive.relative_representations.quantize import RelativeQuantizer
from headgate.methods.contrastive.relative_representations.similarity import (
    Similarity,
    check_similarity,
    similarity_matrix,
    unit_vectors,
)
from headgate.validate import check_divides, check_floating, check_positive, check_shape

__all__ = ["OutputNorm", "RelativeAttention", "RelativeEncoding", "Values"]

Values = Literal["similarities", "anchors", "trainable", "self_attention", "relative_anchors"]
OutputNorm = Literal["l2", "layernorm", "batchnorm", "instancenorm"]

_MAPS = ("queries", "keys", "values")


class RelativeEncoding(NamedTuple):
    """What the encoder's side of the block hands to the decoder's, which may be that of another model.

    Attributes:
        similarities: ``(batch, anchors)``, averaged and quantised where that is asked for.
        unquantized: the same before they were quantised.
        keys: ``(anchors, width)``, the anchors as they entered the similarity.
        anchors: ``(anchors, dim)``, the anchors as they were given.
    """

    similarities: Float[Tensor, "batch relative"]
    unquantized: Float[Tensor, "batch relative"]
    keys: Float[Tensor, "drawn width"]
    anchors: Float[Tensor, "anchors dim"]


class RelativeAttention(nn.Module):
    """Relative representation of a batch with respect to anchors that are given with it.

    Args:
        num_anchors: K.
        dim: size d of the embeddings.
        similarity: ``"cosine"`` (the paper's), ``"inner"``, ``"basis_change"``, ``"euclidean"``, ``"l1"``, ``"angular"``.
        normalize: scale items and anchors to length 1; ``None``: for cosine and angular alone.
        center: subtract the mean of the anchors from both first, for spaces with an offset.
        maps: learned linear maps without bias, out of ``"queries"`` (items), ``"keys"`` (anchors) and ``"values"``.
        hidden_dim: output size of the maps and of trainable values.
        quantizer: of the similarities.
        absolute_quantizer: of items and anchors, behind the normalisation: ``round`` or ``cluster``.
        aggregate: ``"class"`` averages the similarities over the anchors of each class.
        num_classes: C, for ``aggregate`` and ``resample``.
        groups: averages per class; the j-th anchor of a class counts for group j mod ``groups``.
        resample: draw anchors anew in every forward of training: ``"stratified"`` (with replacement) or ``"gaussian"``;
            in evaluation a class's anchors are taken in turn, or their mean.
        samples_per_class: how many are drawn per class.
        values: ``"similarities"`` (the paper's); ``"anchors"``: softmax(r)·keys, equivariant; ``"trainable"``:
            softmax(r)·V with V ~ N(0, 1); ``"self_attention"`` over the similarities; ``"relative_anchors"``:
            LayerNorm(r)·R with R the relative representation of the anchors themselves.
        attention_dim: width of the self-attention.
        num_heads: its heads.
        out_norm: ``"l2"``, ``"layernorm"``, ``"batchnorm"``, ``"instancenorm"`` (over the batch) of the result.
        official_quirks: as the published code does it: rounded embeddings have the gradient zero, ``smooth`` has steps
            of width 1 whatever its bins, and anchors are drawn anew in evaluation, too.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a number out of range, an unknown choice, or options that do not go together.
    """

    def __init__(
        self,
        num_anchors: int,
        dim: int,
        *,
        similarity: Similarity = "cosine",
        normalize: bool | None = None,
        center: bool = False,
        maps: Sequence[str] = (),
        hidden_dim: int | None = None,
        quantizer: RelativeQuantizer | None = None,
        absolute_quantizer: RelativeQuantizer | None = None,
        aggregate: Literal["class"] | None = None,
        num_classes: int | None = None,
        groups: int = 1,
        resample: Resampling | None = None,
        samples_per_class: int | None = None,
        values: Values = "similarities",
        attention_dim: int | None = None,
        num_heads: int | None = None,
        out_norm: OutputNorm | None = None,
        official_quirks: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(num_anchors=num_anchors, dim=dim, groups=groups)
        self.num_anchors, self.dim = num_anchors, dim
        self.similarity, self.normalized, self.center = similarity, check_similarity(similarity, normalize), center
        self.aggregate, self.num_classes, self.groups = aggregate, num_classes, groups
        self.resample, self.samples_per_class = resample, samples_per_class
        self.values_mode = values
        self.official_quirks = official_quirks
        _check_classes(aggregate, groups, resample, samples_per_class, num_classes, similarity)
        _check_values(values, aggregate, resample, maps, hidden_dim, attention_dim, num_heads)
        self.quantizer = quantizer
        self.absolute_quantizer = absolute_quantizer
        if absolute_quantizer is not None and absolute_quantizer.mode not in ("round", "cluster"):
            raise ValueError(
                f"absolute_quantizer must be of mode 'round' or 'cluster', got mode={absolute_quantizer.mode!r}"
            )
        if official_quirks and quantizer is not None and quantizer.mode == "smooth":
            self.quantizer = dataclasses.replace(quantizer, bin_size=None)
        if official_quirks and absolute_quantizer is not None:
            self.absolute_quantizer = dataclasses.replace(absolute_quantizer, has_gradient=False)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [hidden_dim or dim if name in maps else dim for name in ("queries", "keys")]
        if widths[0] != widths[1]:
            raise ValueError(f"maps must hold both 'queries' and 'keys' for hidden_dim={hidden_dim}, got {tuple(maps)}")
        self.hidden_dim = hidden_dim
        self.key_dim = widths[1]
        self.query_map = _linear(dim, widths[0], "queries" in maps, device, dtype)
        self.key_map = _linear(dim, widths[1], "keys" in maps, device, dtype)
        self.value_map = _linear(self.key_dim, hidden_dim or dim, "values" in maps, device, dtype)
        relative = self.relative_dim
        if values == "trainable":
            self.values = nn.Parameter(torch.empty(relative, hidden_dim or 0, **factory))
        elif values == "self_attention":
            width = attention_dim or 0
            self.similarity_norm = nn.LayerNorm(relative, **factory)
            self.to_queries = nn.Parameter(torch.empty(relative, width, **factory))
            self.to_keys = nn.Parameter(torch.empty(relative, width, **factory))
            self.to_values = nn.Parameter(torch.empty(relative, width, **factory))
            self.self_attention = nn.MultiheadAttention(width, num_heads or 1, batch_first=True, **factory)
            self.gather = nn.Linear(width, 1, bias=False, **factory)
        elif values == "relative_anchors":
            self.similarity_norm = nn.LayerNorm(num_anchors, **factory)
            self.of_anchors = RelativeAttention(
                num_anchors,
                dim,
                similarity=similarity,
                normalize=normalize,
                center=center,
                maps=maps,
                hidden_dim=hidden_dim,
                quantizer=quantizer,
                out_norm=out_norm,
                official_quirks=official_quirks,
                device=device,
                dtype=dtype,
            )
        self.out_norm_mode = out_norm
        self.out_norm = _output_norm(out_norm, self.out_dim, device, dtype)
        self._draw_parameters()

    @property
    def relative_dim(self) -> int:
        """How many similarities an item has: K, or one per group or per drawn anchor of each class."""
        if self.aggregate is not None:
            return (self.num_classes or 0) * self.groups
        if self.resample is not None:
            return (self.num_classes or 0) * (self.samples_per_class or 0)
        return self.num_anchors

    @property
    def out_dim(self) -> int:
        """Size of the result."""
        if self.values_mode == "trainable":
            return self.hidden_dim or 0
        if self.values_mode == "anchors":
            return self.key_dim if self.value_map is None else self.value_map.out_features
        return self.relative_dim

    def forward(
        self,
        x: Float[Tensor, "batch dim"],
        anchors: Float[Tensor, "anchors dim"],
        anchor_labels: Int[Tensor, " anchors"] | None = None,
    ) -> Float[Tensor, "batch out"]:
        """Relative representation of ``x``.

        Args:
            x: ``(batch, dim)`` embeddings; a zero vector has the cosine 0 to everything.
            anchors: ``(num_anchors, dim)``, of the same dtype; gradients flow where they require any.
            anchor_labels: ``(num_anchors,)`` classes, for ``aggregate`` and ``resample``.

        Returns:
            ``(batch, out_dim)``.

        Raises:
            TypeError: wrong dtype.
            ValueError: wrong shape, labels missing or out of range.
            RuntimeError: clusters in training mode.
        """
        return self.decode(self.encode(x, anchors, anchor_labels))

    def encode(
        self,
        x: Float[Tensor, "batch dim"],
        anchors: Float[Tensor, "anchors dim"],
        anchor_labels: Int[Tensor, " anchors"] | None = None,
    ) -> RelativeEncoding:
        """The encoder's side: everything up to the quantised similarities. Arguments as of :meth:`forward`."""
        if anchor_labels is not None and not torch.compiler.is_compiling():
            self.check_labels(anchor_labels)
        return self.encode_trusted(x, anchors, anchor_labels)

    def check_labels(self, anchor_labels: Int[Tensor, " anchors"]) -> None:
        """Check the values of labels once; whoever keeps them calls :meth:`encode_trusted` afterwards.

        Raises:
            TypeError: no integers.
            ValueError: a wrong shape, a class out of range, or none where anchors are drawn from each.
        """
        if self.num_classes is not None:
            every = self.resample is not None
            check_anchor_labels(anchor_labels, self.num_anchors, self.num_classes, every_class=every)

    def encode_trusted(
        self,
        x: Float[Tensor, "batch dim"],
        anchors: Float[Tensor, "anchors dim"],
        anchor_labels: Int[Tensor, " anchors"] | None = None,
    ) -> RelativeEncoding:
        """As :meth:`encode`, without a look at the labels' values, which would make a GPU wait."""
        check_shape("x", x, (None, self.dim), "batch, dim")
        check_shape("anchors", anchors, (self.num_anchors, self.dim), "anchors, dim")
        weight = None if self.query_map is None else self.query_map.weight.dtype
        check_floating("x", x, like=weight)
        check_floating("anchors", anchors, like=x.dtype)
        if self.num_classes is not None:
            if anchor_labels is None:
                raise ValueError("anchor_labels must be given to average or draw anchors by class, got None")
            check_shape("anchor_labels", anchor_labels, (self.num_anchors,), "anchors")
        quantizers = (self.quantizer, self.absolute_quantizer)
        if self.training and any(q is not None and q.mode == "cluster" for q in quantizers):
            raise RuntimeError("clusters depend on the batch and have no useful gradient: call eval() first")

        given, labels = anchors, anchor_labels
        if self.resample is not None and labels is not None:
            anchors, labels = draw_anchors(
                anchors,
                labels,
                self.num_classes or 0,
                self.samples_per_class or 0,
                self.resample,
                random=self.training or self.official_quirks,
            )
        if self.center:
            mean = given.mean(dim=0)
            x, anchors = x - mean, anchors - mean
        queries = x if self.query_map is None else self.query_map(x)
        keys = anchors if self.key_map is None else self.key_map(anchors)
        if self.normalized:
            queries, keys = unit_vectors(queries), unit_vectors(keys)
        if self.absolute_quantizer is not None:
            queries, keys = self.absolute_quantizer(torch.cat([queries, keys])).split([len(queries), len(keys)])
        similarities = similarity_matrix(queries, keys, self.similarity, normalized=self.normalized)
        if self.aggregate is not None and labels is not None:
            similarities = class_means(similarities, labels, self.num_classes or 0, self.groups)
        quantized = similarities if self.quantizer is None else self.quantizer(similarities)
        return RelativeEncoding(quantized, similarities, keys, given)

    def decode(self, encoding: RelativeEncoding) -> Float[Tensor, "batch out"]:
        """The decoder's side: what is made of the similarities, which may be those of another model's block."""
        check_shape("similarities", encoding.similarities, (None, self.relative_dim), "batch, relative")
        return self._normalize_output(self._attend(encoding))

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"{self.num_anchors}, {self.dim}, similarity={self.similarity!r}, values={self.values_mode!r}"

    def _attend(self, encoding: RelativeEncoding) -> Float[Tensor, "batch out"]:
        similarities = encoding.similarities
        if self.values_mode == "trainable":
            return similarities.softmax(dim=-1) @ self.values
        if self.values_mode == "anchors":
            values = encoding.keys if self.value_map is None else self.value_map(encoding.keys)
            return similarities.softmax(dim=-1) @ values
        if self.values_mode == "self_attention":
            tokens = self.similarity_norm(similarities)[:, :, None]
            queries, keys, values = tokens * self.to_queries, tokens * self.to_keys, tokens * self.to_values
            attended, _ = self.self_attention(queries, keys, values, need_weights=False)
            gathered: Tensor = self.gather(attended).squeeze(-1)
            return gathered
        if self.values_mode == "relative_anchors":
            weights: Tensor = self.similarity_norm(similarities)
            return weights @ self.of_anchors(encoding.anchors, encoding.anchors)
        return similarities

    def _normalize_output(self, output: Float[Tensor, "batch out"]) -> Float[Tensor, "batch out"]:
        if self.out_norm_mode == "l2":
            return unit_vectors(output)
        if self.out_norm is None:
            return output
        normalized: Tensor = self.out_norm(output)
        return normalized

    def _draw_parameters(self) -> None:
        """Values and maps of single similarities begin as N(0, 1), in the order of the published code."""
        for name in ("values", "to_queries", "to_keys", "to_values"):
            parameter = getattr(self, name, None)
            if parameter is not None:
                nn.init.normal_(parameter)


def _linear(
    inputs: int, outputs: int, wanted: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear | None:
    return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype) if wanted else None


def _output_norm(
    mode: str | None, width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module | None:
    if mode is None or mode == "l2":
        return None
    if mode == "layernorm":
        return nn.LayerNorm(width, device=device, dtype=dtype)
    if mode == "batchnorm":
        return nn.BatchNorm1d(width, device=device, dtype=dtype)
    if mode == "instancenorm":
        return AcrossBatchNorm(width, device=device, dtype=dtype)
    raise ValueError(f"out_norm must be None or one of {', '.join(get_args(OutputNorm))}, got {mode!r}")


def _check_classes(
    aggregate: str | None,
    groups: int,
    resample: str | None,
    samples_per_class: int | None,
    num_classes: int | None,
    similarity: str,
) -> None:
    if aggregate not in (None, "class"):
        raise ValueError(f"aggregate must be None or 'class', got {aggregate!r}")
    if aggregate is None and groups != 1:
        raise ValueError(f"groups needs aggregate='class', got groups={groups} without it")
    if resample is not None and resample not in RESAMPLINGS:
        raise ValueError(f"resample must be None or one of {', '.join(RESAMPLINGS)}, got {resample!r}")
    if (resample is None) != (samples_per_class is None):
        raise ValueError(
            f"resample and samples_per_class need each other, got resample={resample!r}, "
            f"samples_per_class={samples_per_class}"
        )
    if resample is not None and similarity == "basis_change":
        raise ValueError("resample must be None for a basis change: repeated anchors have no unique coordinates")
    if (aggregate is None and resample is None) != (num_classes is None):
        raise ValueError(f"num_classes is for aggregate or resample and needed by them, got num_classes={num_classes}")
    for name, value in (("num_classes", num_classes), ("samples_per_class", samples_per_class)):
        if value is not None:
            check_positive(**{name: value})


def _check_values(
    values: str,
    aggregate: str | None,
    resample: str | None,
    maps: Sequence[str],
    hidden_dim: int | None,
    attention_dim: int | None,
    num_heads: int | None,
) -> None:
    if values not in get_args(Values):
        raise ValueError(f"values must be one of {', '.join(get_args(Values))}, got {values!r}")
    unknown = [name for name in maps if name not in _MAPS]
    if unknown or len(set(maps)) != len(maps):
        raise ValueError(f"maps must be distinct ones of {', '.join(_MAPS)}, got {tuple(maps)}")
    if "values" in maps and values != "anchors":
        raise ValueError(f"maps can hold 'values' only with values='anchors', got values={values!r}")
    if hidden_dim is not None:
        check_positive(hidden_dim=hidden_dim)
    if values == "trainable" and hidden_dim is None:
        raise ValueError("hidden_dim must be given for values='trainable', got None")
    if hidden_dim is not None and not maps and values != "trainable":
        raise ValueError(f"hidden_dim is for maps and trainable values, got hidden_dim={hidden_dim} without them")
    if values in ("anchors", "relative_anchors") and aggregate is not None:
        raise ValueError(f"aggregate must be None for values={values!r}, which needs one weight per anchor")
    if values == "relative_anchors" and resample is not None:
        raise ValueError("resample must be None for values='relative_anchors', which needs one weight per anchor")
    if values == "self_attention":
        if attention_dim is None or num_heads is None:
            raise ValueError(
                "attention_dim and num_heads must be given for values='self_attention', got "
                f"attention_dim={attention_dim}, num_heads={num_heads}"
            )
        check_divides(num_heads=num_heads, attention_dim=attention_dim)
    elif attention_dim is not None or num_heads is not None:
        raise ValueError(f"attention_dim and num_heads are for values='self_attention', got values={values!r}")
