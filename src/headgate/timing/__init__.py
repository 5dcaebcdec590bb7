"""Speed and memory of contenders that run side by side in one run."""

from __future__ import annotations

from headgate.timing.machine import available_memory, sgemm_rate, use_threads
from headgate.timing.memory import MemoryFailure, PeakMemory, measure_peak
from headgate.timing.plan import Contender, Floor, Plan, Task
from headgate.timing.results import Missing, Results, TaskResults, Times
from headgate.timing.rounds import Effort, Outcome, compare
from headgate.timing.run import Progress, run_plan
from headgate.timing.samples import Summary, growth_exponent, paired_ratios, summarize
from headgate.timing.workload import Workload, array_bytes, load_builder, relative_difference

__all__ = [
    "Contender",
    "Effort",
    "Floor",
    "MemoryFailure",
    "Missing",
    "Outcome",
    "PeakMemory",
    "Plan",
    "Progress",
    "Results",
    "Summary",
    "Task",
    "TaskResults",
    "Times",
    "Workload",
    "array_bytes",
    "available_memory",
    "compare",
    "growth_exponent",
    "load_builder",
    "measure_peak",
    "paired_ratios",
    "relative_difference",
    "run_plan",
    "sgemm_rate",
    "summarize",
    "use_threads",
]
