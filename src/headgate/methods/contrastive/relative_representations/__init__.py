"""Relative representations: items described by their similarities to anchors, so that latent spaces speak one language."""

from headgate.methods.contrastive.relative_representations.anchors import check_same_anchors, select_anchors
from headgate.methods.contrastive.relative_representations.attention import RelativeAttention, RelativeEncoding
from headgate.methods.contrastive.relative_representations.autoencoder import AbsoluteAutoencoder, RelativeAutoencoder
from headgate.methods.contrastive.relative_representations.encoder import RelativeEncoder
from headgate.methods.contrastive.relative_representations.estimator import RelativeRepresentation
from headgate.methods.contrastive.relative_representations.head import StitchingHead
from headgate.methods.contrastive.relative_representations.projection import RelativeProjection
from headgate.methods.contrastive.relative_representations.quantize import RelativeQuantizer
from headgate.methods.contrastive.relative_representations.stitching import (
    StitchedAutoencoder,
    StitchedModel,
    latent_communication,
    relative_distance,
    stitch,
    stitching_matrix,
)
from headgate.methods.contrastive.relative_representations.subspaces import SubspaceRelativeAttention

__all__ = [
    "AbsoluteAutoencoder",
    "RelativeAttention",
    "RelativeAutoencoder",
    "RelativeEncoder",
    "RelativeEncoding",
    "RelativeProjection",
    "RelativeQuantizer",
    "RelativeRepresentation",
    "StitchedAutoencoder",
    "StitchedModel",
    "StitchingHead",
    "SubspaceRelativeAttention",
    "check_same_anchors",
    "latent_communication",
    "relative_distance",
    "select_anchors",
    "stitch",
    "stitching_matrix",
]
