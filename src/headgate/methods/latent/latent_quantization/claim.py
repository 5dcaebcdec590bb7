"""The claim: a codebook per latent and strong weight decay, together, make codes modular and keep them explicit.

Autoencoders of one size learn a world of known factors; InfoMEC tells how many latents inform about one factor alone,
and how well all of them tell the factors. Quantisation without decay, decay without quantisation and one frozen codebook
take the method apart; bins that are cut after training, and an autoencoder that stops when it reconstructs no better than
the quantised one, offer simpler explanations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from headgate.data import stream_generator
from headgate.evaluate import InfoMEC
from headgate.measurement import Curve, Measurement
from headgate.methods.latent.latent_quantization.experiments import (
    ARMS,
    Reading,
    Sizes,
    build,
    dense_networks,
    is_gan,
    published_networks,
    read,
    score,
    train,
)
from headgate.methods.latent.latent_quantization.infowgan import QLInfoWGAN
from headgate.methods.latent.latent_quantization.recipes import RECIPES
from headgate.methods.latent.latent_quantization.worlds import Images, scene_images, shapes3d_images
from headgate.train import DivergedError, base_model, count_parameters, seeded

__all__ = ["RATES", "SCALES", "choose_rate", "measure"]

RATES = (1e-3, 2e-3, 4e-3)
"""The learning rates that every arm chooses from."""

_LEAST_INFOE = 0.3
_LEAST_PSNR = 17.0
_COURSE = 30
_SHOWN = 8
_REVISION = 2


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        images: makes the data.
        sizes: of the models.
        steps: updates, of the encoder for a GAN.
        scored: images that are scored.
        rates: arm → learning rate; :func:`choose_rate` chose it.
        decays: arm → weight decay.
        batch_size: images per step.
        gan_batch_size: the same for a GAN.
        early_psnr: at which the control that stops early does so, in dB: about QLAE's, on seeds that are not reported.
        accelerate: whether to train on a GPU where there is one.
        first_seed: added to every seed that is measured, so that it draws what no earlier choice has looked at.
    """

    images: Callable[[], Images]
    sizes: Sizes
    steps: int
    scored: int
    rates: Mapping[str, float]
    decays: Mapping[str, float]
    batch_size: int = 128
    gan_batch_size: int = 64
    early_psnr: float = 0.0
    accelerate: bool = False
    first_seed: int = 0


_DECAY_PER_STEP = 2e-4
"""Learning rate × weight decay on a laptop, whatever the rate: 0.1 at 2e-3."""

_LAPTOP_RATES = {
    "qlae": 2e-3,
    "ae": 4e-3,
    "ae_decay": 2e-3,
    "qlae_no_decay": 2e-3,
    "shared_codebook": 1e-3,
    "ae_early": 2e-3,
}
_LONGER_RATES = {
    "qlae": 4e-3,
    "ae": 4e-3,
    "ae_decay": 2e-3,
    "qlae_no_decay": 2e-3,
    "shared_codebook": 2e-3,
    "ae_early": 2e-3,
}
_ON_SMOKE = (*_LAPTOP_RATES, "ql_infowgan")
_ON_PAPER = tuple(arm for arm in ARMS if arm not in ("ae_binned", "ae_early"))
_DECAYED = ("qlae", "ae_decay", "shared_codebook", "ae_early")
_AE, _GAN = RECIPES["qlae_shapes3d"], RECIPES["ql_infowgan_shapes3d"]

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        images=scene_images,
        sizes=Sizes(dense_networks(32), num_latents=4, levels=5, head_gain=8.0),
        steps=6,
        scored=150,
        rates=dict.fromkeys(_ON_SMOKE, 2e-3),
        decays=dict.fromkeys(_ON_SMOKE, 0.1),
        batch_size=32,
        gan_batch_size=32,
        early_psnr=30.0,
    ),
    "laptop": Scale(
        images=functools.partial(scene_images, 12, (0.2, 0.26, 0.32)),
        sizes=Sizes(dense_networks(128, 128), num_latents=12, levels=8, head_gain=8.0),
        steps=1500,
        scored=3000,
        rates=_LAPTOP_RATES,
        decays={arm: _DECAY_PER_STEP / rate if arm in _DECAYED else 0.0 for arm, rate in _LAPTOP_RATES.items()},
        early_psnr=20.0,
        first_seed=10,
    ),
    "longer": Scale(
        images=scene_images,
        sizes=Sizes(dense_networks(256, 256), num_latents=12, levels=8, head_gain=8.0),
        steps=10_000,
        scored=3000,
        rates=_LONGER_RATES,
        decays={arm: 2 * _DECAY_PER_STEP / rate if arm in _DECAYED else 0.0 for arm, rate in _LONGER_RATES.items()},
        early_psnr=20.6,
    ),
    "paper": Scale(
        images=shapes3d_images,
        sizes=Sizes(published_networks, num_latents=12, levels=10),
        steps=_AE.steps,
        scored=10_000,
        rates={arm: (_GAN if is_gan(arm) else _AE).learning_rate for arm in _ON_PAPER},
        decays={
            **dict.fromkeys(("qlae", "ae_decay", "shared_codebook"), _AE.weight_decay),
            "ae": 1e-3,
            "qlae_no_decay": 0.0,
            "beta_vae": 0.0,
            "tc_vae": 0.0,
            "bio_ae": 1e-4,
            "vq_vae": 0.01,
            "ql_infowgan": _GAN.weight_decay,
            "infowgan": 1e-4,
        },
        batch_size=_AE.batch_size,
        gan_batch_size=_GAN.batch_size,
        accelerate=True,
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Train one arm with one seed and score its code.

    Args:
        arm: an arm of the card that is measured at this scale.
        seed: decides the initial weights, the batches and which images are scored, alike for all arms; the laptop scale
            adds 10 to it, see the card's history.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale, or an arm that is not measured at this scale.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    known = [name for name in ARMS if _trained_as(name) in settings.rates]
    if arm not in known:
        raise ValueError(f"arm must be one of {', '.join(known)}, got {arm!r}")
    images = settings.images()
    drawn = settings.first_seed + seed
    kept, seconds = _trained(_trained_as(arm), drawn, scale, settings, images)
    index = _scored(images, settings, drawn)
    reading = read(kept.model, images, index, settings.sizes.levels if arm == "ae_binned" else None)
    scores = score(reading, images, index)
    return Measurement(
        metrics=_guarded(scores, reading),
        curves={
            "share of a latent's information": _information_curve(scores),
            **({} if arm == "ae_early" else {"training loss": _loss_curve(kept)}),
        },
        pictures={
            "information": _information_picture(scores, images.factor_names),
            **_traversals(kept.model, images.pixels(index[:1]), reading, scores),
        },
        notes={
            "learning rate": settings.rates[_trained_as(arm)],
            "weight decay": settings.decays[_trained_as(arm)],
            "parameters": count_parameters(kept.model),
            "steps": int(kept.steps),
            "drawn with seed": drawn,
            **({} if _is_trained(scores, reading) else {"untrained, its InfoM": _metrics(scores)["infom"]}),
        },
        base_seconds=seconds if _trained_as(arm) == "ae_decay" else 0.0,
    )


def choose_rate(arm: str, scale: str = "laptop", seeds: Sequence[int] = (100, 101)) -> dict[float, float]:
    """Score every learning rate of :data:`RATES`, on seeds that are not reported.

    This is how the rates in :data:`SCALES` were chosen: the one with the best InfoM among those that train. Learning
    rate × weight decay stays the same.

    Args:
        arm: an arm that is trained.
        scale: a scale of :data:`SCALES`.
        seeds: to average over, none of those that :func:`measure` is called with.

    Returns:
        Learning rate → mean InfoM; 0 for a run that diverged or is untrained.
    """
    settings = SCALES[scale]
    images = settings.images()

    def informed(rate: float, seed: int) -> float:
        with seeded(seed):
            model = build(arm, settings.sizes, images)
        decay = settings.decays[arm] * settings.rates[arm] / rate
        try:
            _fit(model, images, settings, rate, decay, seed)
        except DivergedError:
            return 0.0
        index = _scored(images, settings, seed)
        reading = read(model, images, index)
        scores = score(reading, images, index)
        return _metrics(scores)["infom"] if _is_trained(scores, reading) else 0.0

    return {rate: sum(informed(rate, seed) for seed in seeds) / len(seeds) for rate in RATES}


class _Kept(nn.Module):
    """A model with the course of its loss, so that the cache of shared models keeps them together."""

    course: Tensor
    steps: Tensor

    def __init__(self, model: nn.Module, parts: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("course", torch.zeros(parts, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def _trained_as(arm: str) -> str:
    """The arm whose very model this one reads."""
    return "ae_decay" if arm == "ae_binned" else arm


def _trained(arm: str, seed: int, scale: str, settings: Scale, images: Images) -> tuple[_Kept, float]:
    """The model of an arm; one that two arms read is trained once and kept."""

    def fresh() -> _Kept:
        with seeded(seed):
            return _Kept(build(arm, settings.sizes, images), min(_COURSE, settings.steps))

    def fill(kept: _Kept) -> None:
        stop = settings.early_psnr if arm == "ae_early" else None
        losses = _fit(kept.model, images, settings, settings.rates[arm], settings.decays[arm], seed, stop)
        kept.steps.fill_(len(losses))
        parts = np.array_split(losses, len(kept.course))
        kept.course.copy_(torch.tensor([part.mean() if len(part) else math.nan for part in parts]))

    if arm != "ae_decay":
        kept = fresh()
        fill(kept)
        return kept, 0.0
    recipe = {
        "revision": _REVISION,
        "scale": scale,
        "seed": seed,
        "rate": settings.rates[arm],
        "decay": settings.decays[arm],
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "sizes": [*settings.sizes[1:]],
    }
    return base_model(f"latent-quantization-{arm}", fresh, fill, recipe)


def _fit(
    model: nn.Module,
    images: Images,
    settings: Scale,
    rate: float,
    decay: float,
    seed: int,
    stop_psnr: float | None = None,
) -> list[float]:
    device = "cuda" if settings.accelerate and torch.cuda.is_available() else "cpu"
    return train(
        model.to(device),
        images,
        steps=settings.steps,
        batch_size=settings.gan_batch_size if isinstance(model, QLInfoWGAN) else settings.batch_size,
        learning_rate=rate,
        weight_decay=decay,
        seed=seed,
        stop_psnr=stop_psnr,
    )


def _scored(images: Images, settings: Scale, seed: int) -> Tensor:
    order = torch.randperm(images.size, generator=stream_generator(seed, "scored"))
    return order[: settings.scored]


def _metrics(scores: InfoMEC) -> dict[str, float]:
    """The scores; a code with fewer than two latents in use has neither modularity nor compactness."""
    found = asdict(scores)
    metrics = {name: 0.0 if math.isnan(found[name]) else found[name] for name in ("infom", "infoe", "infoc")}
    return {**metrics, "active": float(scores.active.sum())}


def _guarded(scores: InfoMEC, reading: Reading) -> dict[str, float]:
    """What is reported: a model that is untrained fails, its modularity and compactness are undefined."""
    metrics = {**_metrics(scores), "psnr": reading.psnr, "trained": 1.0}
    return (
        metrics if _is_trained(scores, reading) else {**metrics, "infom": math.nan, "infoc": math.nan, "trained": 0.0}
    )


def _is_trained(scores: InfoMEC, reading: Reading) -> bool:
    return scores.infoe >= _LEAST_INFOE and reading.psnr >= _LEAST_PSNR


def _loss_curve(kept: _Kept) -> Curve:
    count = len(kept.course)
    x = [(part + 0.5) * int(kept.steps) / count for part in range(count)]
    return Curve(x, kept.course.tolist(), "step", "loss")


def _information_curve(scores: InfoMEC) -> Curve:
    """How a latent's information divides over the factors, the best-known one first: 1, 0, … is modular."""
    nmi = scores.nmi[:, scores.active]
    shares = np.sort(nmi / np.maximum(nmi.sum(axis=0), 1e-12), axis=0)[::-1]
    mean = shares.mean(axis=1) if shares.size else np.zeros(len(nmi))
    return Curve(list(range(1, len(nmi) + 1)), mean.tolist(), "factor, best known first", "share of information")


def _information_picture(scores: InfoMEC, names: Sequence[str]) -> UInt8[np.ndarray, "height width 3"]:
    """NMI of every factor with every latent in use, latents sorted by the factor that they know best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = _order(scores.nmi, scores.active)
    cell, left, below, above = 0.42, 1.3, 0.6, 0.4  # inches
    wide, tall = cell * max(len(order), 6), cell * len(names)
    width, height = wide + left + 0.2, tall + below + above
    figure = Figure(figsize=(width, height), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((left / width, below / height, wide / width, tall / height))
    shown = scores.nmi[:, order] if len(order) else np.zeros((len(names), 1))
    axis.imshow(shown, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (source, column), value in np.ndenumerate(shown):
        axis.text(column, source, f"{100 * value:.0f}", ha="center", va="center", color="w" if value > 0.5 else "k")
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.set_xticks(range(len(order)), [str(latent) for latent in order])
    axis.set_xlabel("latent")
    axis.set_title(f"NMI in %; InfoM {scores.infom:.2f}, InfoE {scores.infoe:.2f}", fontsize=10)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


@torch.no_grad()
def _traversals(
    model: nn.Module, first: Float[Tensor, "1 channel height width"], reading: Reading, scores: InfoMEC
) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
    """An image; below it, for each latent in use, what is decoded as it runs through its values and the others stay.

    There is none where the decoder does not read one number per latent (VQ-VAE).
    """
    if reading.inputs.shape != reading.latents.shape:
        return {}
    rows = [first.expand(_SHOWN, -1, -1, -1)]
    device = next(model.parameters()).device
    for latent in _order(scores.nmi, scores.active):
        values = _values(reading.inputs[:, latent], reading.latents[:, latent], reading.discrete)
        changed = reading.inputs[:1].repeat(len(values), 1)
        changed[:, latent] = values
        rows.append(model.get_submodule("decoder")(changed.to(device)).sigmoid().cpu())
    side, gap = first.shape[-1], 1
    canvas = torch.ones(3, len(rows) * (side + gap), _SHOWN * (side + gap))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (side + gap), column * (side + gap)
            canvas[:, top : top + side, left : left + side] = picture.expand(3, -1, -1)
    zoom = max(1, 32 // side)
    pixels = (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return {"traversals": pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()}


def _values(inputs: Float[Tensor, " n"], codes: Tensor, discrete: bool) -> Float[Tensor, " shown"]:
    """The values that one latent runs through: those of its codes, or its range in even steps."""
    if not discrete:
        return torch.linspace(float(inputs.min()), float(inputs.max()), _SHOWN)
    seen = codes.unique()[:_SHOWN]
    return torch.stack([inputs[codes == code].mean() for code in seen])


def _order(nmi: Float[np.ndarray, "source latent"], active: np.ndarray) -> list[int]:
    used = np.flatnonzero(active)
    return sorted(used.tolist(), key=lambda latent: (int(nmi[:, latent].argmax()), -float(nmi[:, latent].max())))
