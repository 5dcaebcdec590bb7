"""Recommendation: models that rank items for a user from what the user did before."""
