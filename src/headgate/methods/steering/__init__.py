"""Steering: what changes the answers of a finished model while it runs, at its logits, features or prompts."""
