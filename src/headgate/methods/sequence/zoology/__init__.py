"""Zoology: how well sequence mixers recall, the mixers themselves, and a few lookups as the remedy."""

from __future__ import annotations

from headgate.methods.sequence.zoology.base_conv import BaseConv
from headgate.methods.sequence.zoology.based import Based
from headgate.methods.sequence.zoology.experiments import mqar_sweep
from headgate.methods.sequence.zoology.h3 import H3
from headgate.methods.sequence.zoology.hybrid import HybridMixer
from headgate.methods.sequence.zoology.hyena import Hyena
from headgate.methods.sequence.zoology.loss import RecallLoss, recall_accuracy
from headgate.methods.sequence.zoology.models import zoology_model
from headgate.methods.sequence.zoology.perplexity import recall_perplexity
from headgate.methods.sequence.zoology.retention import Retention
from headgate.methods.sequence.zoology.rwkv import RWKVChannelMix, RWKVTimeMix
from headgate.methods.sequence.zoology.sparse_lookups import SparseLookups
from headgate.nn import MixerLM

__all__ = [
    "H3",
    "BaseConv",
    "Based",
    "HybridMixer",
    "Hyena",
    "MixerLM",
    "RWKVChannelMix",
    "RWKVTimeMix",
    "RecallLoss",
    "Retention",
    "SparseLookups",
    "mqar_sweep",
    "recall_accuracy",
    "recall_perplexity",
    "zoology_model",
]
