"""What measuring one arm of a claim with one seed hands back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Curve", "Measurement"]


@dataclass(frozen=True)
class Curve:
    """One line of a figure: ``y`` over ``x``, e.g. accuracy over embedding size.

    Arms that return a curve of the same name are drawn in one panel, averaged over seeds.
    """

    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    log_x: bool = False

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or len(self.x) == 0:
            raise ValueError(f"x and y must have one equal, positive length, got {len(self.x)} and {len(self.y)}")


@dataclass(frozen=True)
class Measurement:
    """The result of ``measure(arm, seed, scale)``.

    Attributes:
        metrics: name → value; the names are those of the card's ``[claim.metrics]`` (more are kept, too).
        curves: name → :class:`Curve`, for the figure.
        pictures: name → uint8 array ``(height, width, 3)`` worth looking at.
        notes: facts about this cell that a reader wants beside the numbers (learning rate chosen, parameters).
        base_seconds: time spent on training a cached base model that several arms share, reported apart.
    """

    metrics: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, float | int | str] = field(default_factory=dict)
    base_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError("metrics must not be empty")
        for name, picture in self.pictures.items():
            if str(picture.dtype) != "uint8" or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"picture {name!r} must be uint8 of shape (height, width, 3), got {picture.dtype} {picture.shape}"
                )
