"""The claim: encoders and heads of models that were trained apart can be exchanged, where both speak relatively.

Several models are trained per seed, and every head (or decoder) is scored behind every encoder. The same encoders are
measured with absolute representations, with absolute ones rotated onto each other, and with anchors that are noise or do
not correspond.
"""

from __future__ import annotations

from headgate.measurement import Measurement
from headgate.methods.contrastive.relative_representations.digits import DigitsScale, measure_digits
from headgate.methods.contrastive.relative_representations.exchange import ARMS
from headgate.methods.contrastive.relative_representations.images import ImagesScale, measure_images
from headgate.methods.contrastive.relative_representations.pretrained import PretrainedScale, measure_pretrained

__all__ = ["SCALES", "measure"]

# The best of 0.001, 0.002, 0.004 and 0.008 with the own head or decoder, on seeds 100 and 101.
_CLASSIFIER_RATES = {"relative": 4e-3, "absolute": 4e-3}
_AUTOENCODER_RATES = {"relative": 2e-3, "absolute": 2e-3}
_HEAD_RATES = {"relative": 8e-3, "absolute": 1e-3, "procrustes": 1e-3, "noise_anchors": 1e-3, "other_anchors": 8e-3}


SCALES: dict[str, DigitsScale | ImagesScale | PretrainedScale] = {
    "smoke": DigitsScale(
        models=2,
        anchors=32,
        steps=30,
        head_steps=30,
        curve=(16, 32),
        classifier_rates=_CLASSIFIER_RATES,
        autoencoder_rates=_AUTOENCODER_RATES,
        head_rates=_HEAD_RATES,
    ),
    "laptop": DigitsScale(
        models=4,
        anchors=64,
        steps=1200,
        head_steps=600,
        curve=(4, 8, 16, 32, 64, 128),
        classifier_rates=_CLASSIFIER_RATES,
        autoencoder_rates=_AUTOENCODER_RATES,
        head_rates=_HEAD_RATES,
        first_seed=10,
    ),
    "cifar10": ImagesScale(
        models=2,
        anchors=500,
        steps=600,
        head_steps=600,
        hidden_dims=(32, 64, 128, 256),
        autoencoder_rate=1e-3,
        head_rate=1e-3,
    ),
    "paper": PretrainedScale(
        names=("vit_base_patch16_224", "vit_small_patch16_224", "vit_base_resnet50_384", "rexnet_100"),
        anchors=768,
        epochs=10,
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    Args:
        arm: one of the card's arms.
        seed: decides the data, anchors, initial weights and order of batches, alike for all arms; the laptop scale adds
            10 to it, see the card's history.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
        HeadgateError: the scale's pretrained models are missing.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    if isinstance(settings, DigitsScale):
        return measure_digits(arm, seed, settings)
    if isinstance(settings, ImagesScale):
        return measure_images(arm, seed, settings)
    return measure_pretrained(arm, seed, settings)
