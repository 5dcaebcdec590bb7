"""The claim engine: arms × seeds → measurements → statistics → verdict → evidence."""

from __future__ import annotations

from headgate.claims.cells import Cell, CellRecord, CellStore
from headgate.claims.engine import plan, reproduce
from headgate.claims.evidence import Evidence, FailedCell, claim_status, find_evidence, is_stale
from headgate.claims.statistics import Interval, mean_interval
from headgate.claims.verdict import CriterionResult, judge, overall_verdict

__all__ = [
    "Cell",
    "CellRecord",
    "CellStore",
    "CriterionResult",
    "Evidence",
    "FailedCell",
    "Interval",
    "claim_status",
    "find_evidence",
    "is_stale",
    "judge",
    "mean_interval",
    "overall_verdict",
    "plan",
    "reproduce",
]
