"""Latent quantization: scalar codebooks per latent and strong weight decay, for disentangled codes; InfoMEC scores."""

from headgate.evaluate.disentanglement import InfoMEC, infomec
from headgate.methods.latent.latent_quantization.decoder import ConvDecoder, StyleDecoder
from headgate.methods.latent.latent_quantization.encoder import ImageEncoder
from headgate.methods.latent.latent_quantization.infowgan import InfoWGANTraining, QLInfoWGAN, image_ql_infowgan
from headgate.methods.latent.latent_quantization.optimizer import qlae_optimizer, weight_decay_groups
from headgate.methods.latent.latent_quantization.qlae import QLAE, image_qlae
from headgate.methods.latent.latent_quantization.quantizer import LatentQuantizer
from headgate.methods.latent.latent_quantization.recipes import RECIPES, Recipe

__all__ = [
    "QLAE",
    "RECIPES",
    "ConvDecoder",
    "ImageEncoder",
    "InfoMEC",
    "InfoWGANTraining",
    "LatentQuantizer",
    "QLInfoWGAN",
    "Recipe",
    "StyleDecoder",
    "image_ql_infowgan",
    "image_qlae",
    "infomec",
    "qlae_optimizer",
    "weight_decay_groups",
]
