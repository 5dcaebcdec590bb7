"""Sequence models: mixers, state space models, linear attention, and how to measure what they can recall."""
