"""Representations learnt by comparing, and what makes them cheap to store, search and reuse."""
