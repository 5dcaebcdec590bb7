"""Routing: what is computed for an input depends on the input."""
