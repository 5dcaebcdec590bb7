"""RITUAL: answers of a vision-language model from the picture and a randomly transformed copy of it, and how to score them."""

from headgate.methods.steering.ritual.branches import Branch
from headgate.methods.steering.ritual.coco import COCO_OBJECTS
from headgate.methods.steering.ritual.fusion import WEIGHTS, fuse_logits, m3id_weight, plausible, view_weights
from headgate.methods.steering.ritual.generate import (
    choose_transform,
    generate_with_views,
    parse_choice,
    ritual_generate,
)
from headgate.methods.steering.ritual.metrics import (
    MME_HALLUCINATION,
    CHAIRScores,
    MMEScores,
    POPEScores,
    chair_scores,
    mentioned_objects,
    mme_answer,
    mme_scores,
    pope_answer,
    pope_scores,
)
from headgate.methods.steering.ritual.noise import noise_image, signal_share
from headgate.methods.steering.ritual.processor import View, ViewFusionLogitsProcessor
from headgate.methods.steering.ritual.recipes import RECIPES, Recipe
from headgate.methods.steering.ritual.transforms import (
    TRANSFORMS,
    color_jitter,
    draw_transform,
    gaussian_blur,
    horizontal_flip,
    random_resized_crop,
    rotation,
    vertical_flip,
)

__all__ = [
    "COCO_OBJECTS",
    "MME_HALLUCINATION",
    "RECIPES",
    "TRANSFORMS",
    "WEIGHTS",
    "Branch",
    "CHAIRScores",
    "MMEScores",
    "POPEScores",
    "Recipe",
    "View",
    "ViewFusionLogitsProcessor",
    "chair_scores",
    "choose_transform",
    "color_jitter",
    "draw_transform",
    "fuse_logits",
    "gaussian_blur",
    "generate_with_views",
    "horizontal_flip",
    "m3id_weight",
    "mentioned_objects",
    "mme_answer",
    "mme_scores",
    "noise_image",
    "parse_choice",
    "plausible",
    "pope_answer",
    "pope_scores",
    "random_resized_crop",
    "ritual_generate",
    "rotation",
    "signal_share",
    "vertical_flip",
    "view_weights",
]
