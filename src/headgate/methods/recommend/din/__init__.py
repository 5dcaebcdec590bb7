"""Deep Interest Network: a user's history weighed anew for every candidate, and the two training aids that came with it."""

from __future__ import annotations

from headgate.methods.recommend.din.activation_unit import FixedPooling, LocalActivationUnit, PreparedHistory
from headgate.methods.recommend.din.dice import Dice
from headgate.methods.recommend.din.fields import FeatureSpec, Field
from headgate.methods.recommend.din.model import DIN
from headgate.methods.recommend.din.regularization import MiniBatchAwareL2, occurrence_counts

__all__ = [
    "DIN",
    "Dice",
    "FeatureSpec",
    "Field",
    "FixedPooling",
    "LocalActivationUnit",
    "MiniBatchAwareL2",
    "PreparedHistory",
    "occurrence_counts",
]
