"""Latent spaces: quantisers, autoencoders, and what makes their coordinates mean something."""
