"""Diffusion models as image encoders: features of a denoiser's blocks at small noise, and heads that classify them."""

from __future__ import annotations

from headgate.evaluate.grid_probe import grid_probe
from headgate.methods.generative.diffusion_classification.attention import AttentionHead, DifFormer
from headgate.methods.generative.diffusion_classification.classifier import DiffusionClassifier
from headgate.methods.generative.diffusion_classification.compare import block_similarity, cache_features
from headgate.methods.generative.diffusion_classification.difffeed import DifFeed
from headgate.methods.generative.diffusion_classification.heads import ConvHead, LinearProbe, MLPHead
from headgate.methods.generative.diffusion_classification.recipe import HEAD_RECIPES, HeadRecipe, train_head
from headgate.methods.generative.diffusion_classification.unet import ADMUNet, adm_unet_256
from headgate.nn.diffusion import DiffusionFeatures

__all__ = [
    "HEAD_RECIPES",
    "ADMUNet",
    "AttentionHead",
    "ConvHead",
    "DifFeed",
    "DifFormer",
    "DiffusionClassifier",
    "DiffusionFeatures",
    "HeadRecipe",
    "LinearProbe",
    "MLPHead",
    "adm_unet_256",
    "block_similarity",
    "cache_features",
    "grid_probe",
    "train_head",
]
