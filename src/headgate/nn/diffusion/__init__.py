"""Diffusion and flow models: paths between data and noise, losses, samplers, networks, and features read from them."""

from __future__ import annotations

from headgate.nn.diffusion.adm_unet import ADMUNet
from headgate.nn.diffusion.betas import cosine_betas, linear_betas, scaled_linear_betas
from headgate.nn.diffusion.denoisers import Condition, denoise
from headgate.nn.diffusion.dit import DiT, DiTBlock, convert_dit_state_dict
from headgate.nn.diffusion.embeddings import grid_sinusoids, time_sinusoids
from headgate.nn.diffusion.features import DiffusionFeatures, FeatureKey
from headgate.nn.diffusion.guidance import Guidance
from headgate.nn.diffusion.losses import denoising_loss, edm_loss
from headgate.nn.diffusion.paths import (
    EDM,
    VP,
    Coefficients,
    CosineFlow,
    LinearFlow,
    OTFlow,
    Path,
    path_from_scheduler,
)
from headgate.nn.diffusion.samplers import edm_sigmas, sample_ddim, sample_edm, sample_ode, sample_sde
from headgate.nn.diffusion.taps import LayerName, Pooling, Position, numbered_blocks, pool_features, tap, tokens_to_maps

__all__ = [
    "EDM",
    "VP",
    "ADMUNet",
    "Coefficients",
    "Condition",
    "CosineFlow",
    "DiT",
    "DiTBlock",
    "DiffusionFeatures",
    "FeatureKey",
    "Guidance",
    "LayerName",
    "LinearFlow",
    "OTFlow",
    "Path",
    "Pooling",
    "Position",
    "convert_dit_state_dict",
    "cosine_betas",
    "denoise",
    "denoising_loss",
    "edm_loss",
    "edm_sigmas",
    "grid_sinusoids",
    "linear_betas",
    "numbered_blocks",
    "path_from_scheduler",
    "pool_features",
    "sample_ddim",
    "sample_edm",
    "sample_ode",
    "sample_sde",
    "scaled_linear_betas",
    "tap",
    "time_sinusoids",
    "tokens_to_maps",
]
