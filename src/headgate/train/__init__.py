"""One training loop on accelerate, and what belongs to it: optimizers, schedules, batches, seeds, checkpoints, a cache."""

from __future__ import annotations

from headgate.train.batches import EpochBatches, epoch_batches
from headgate.train.cache import base_model, cache_folder
from headgate.train.ema import EMA
from headgate.train.lion import Lion
from headgate.train.loop import DivergedError, History, fit
from headgate.train.optimizers import count_parameters, make_optimizer
from headgate.train.schedules import one_cycle, warmup_cosine, warmup_linear
from headgate.train.seeds import random_state, seeded, set_random_state, set_seed

__all__ = [
    "EMA",
    "DivergedError",
    "EpochBatches",
    "History",
    "Lion",
    "base_model",
    "cache_folder",
    "count_parameters",
    "epoch_batches",
    "fit",
    "make_optimizer",
    "one_cycle",
    "random_state",
    "seeded",
    "set_random_state",
    "set_seed",
    "warmup_cosine",
    "warmup_linear",
]
