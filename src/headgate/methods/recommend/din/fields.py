"""The inputs of a ranking model, named: ids with an embedding table, and plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from headgate.validate import check_positive

__all__ = ["FeatureSpec", "Field", "may_look", "read_fields", "real_places"]


@dataclass(frozen=True)
class Field:
    """One input.

    Attributes:
        dim: size of the embedding, or how many numbers there are.
        vocabulary: number of ids; ``None`` for an input of plain numbers.
    """

    dim: int
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        check_positive(dim=self.dim)
        if self.vocabulary is not None:
            check_positive(vocabulary=self.vocabulary)


FeatureSpec: TypeAlias = Mapping[str, Field | Mapping[str, Any]]
"""Name of an input → :class:`Field`, or its arguments as a dict, as JSON and TOML can hold them."""


def read_fields(fields: FeatureSpec) -> dict[str, Field]:
    """Check a specification.

    Raises:
        TypeError: an entry is neither a :class:`Field` nor a dict of its arguments.
        ValueError: no entry, or a name that a module cannot have.
    """
    if not fields:
        raise ValueError("fields must not be empty")
    read = {}
    for name, field in fields.items():
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(f"fields must be named by identifiers that no module method has, got {name!r}")
        if isinstance(field, Mapping):
            unknown = set(field) - {"dim", "vocabulary"}
            if unknown or "dim" not in field:
                raise ValueError(f"fields[{name!r}] must have dim and perhaps vocabulary, got {sorted(field)}")
            field = Field(**field)
        elif not isinstance(field, Field):
            raise TypeError(f"fields[{name!r}] must be a Field or a dict, got {type(field).__name__}")
        read[name] = field
    return read


def may_look(values: Tensor) -> bool:
    """Whether values can be looked at for free: on a CPU, and not while a graph is captured."""
    return not torch.compiler.is_compiling() and values.device.type == "cpu"


def real_places(mask: Bool[Tensor, "batch length"]) -> Int64[Tensor, " real"] | None:
    """Where the behaviours of a padded batch stand in the flat ``(batch * length,)``, so that padding need not be computed.

    Returns:
        ``None`` where values cannot be looked at: then everything is computed, and the shape depends on no value.
    """
    return mask.flatten().nonzero().squeeze(1) if may_look(mask) else None
