"""Generative models, and what can be read from them or steered in them."""
