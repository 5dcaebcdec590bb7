"""The claim as an experiment: what the gate of linear attention has to see, and how fine it has to be.

At the small scales the task is overwrite-recall: keys get values again and again, and a query asks for the last one. All
arms share embeddings, projections, output gate and head, their start, the data and their order; only the gate differs.
At the larger scales the same gates stand in a language model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from headgate.data.overwrite_recall import OverwriteRecallData, overwrite_recall
from headgate.data.recall import IGNORED
from headgate.data.seeding import stream_generator
from headgate.data.text import python_documentation
from headgate.errors import DataError
from headgate.measurement import Curve, Measurement
from headgate.methods.sequence.gla.experiments import GateKind, LanguageNet, RecallNet, kept_memory
from headgate.methods.sequence.gla.layer import GatedLinearAttention
from headgate.train import count_parameters, fit, make_optimizer, one_cycle, seeded, warmup_cosine

__all__ = ["ARMS", "SCALES", "measure"]


class Arm(NamedTuple):
    """What stands in an arm's net: the gate (``None`` for softmax attention) and its temperature τ."""

    gate: GateKind | None
    normalizer: float = 1.0


ARMS = {
    "vector": Arm("vector"),
    "scalar": Arm("scalar"),
    "fixed": Arm("fixed"),
    "none": Arm("none"),
    "bias_only": Arm("blind"),
    "fixed_fast": Arm("fast"),
    "vector_16": Arm("vector", 16.0),
    "scalar_16": Arm("scalar", 16.0),
    "attention": Arm(None),
}


@dataclass(frozen=True)
class RecallSettings:
    """The sizes of overwrite-recall.

    Attributes:
        learning_rates: arm → peak learning rate.
        steps: updates.
        num_test: sequences that are scored, at each of the two lengths.
        num_keys: keys.
        num_values: values.
        length: steps of a sequence in training; the long test has ``4 * length``.
        dim: channels of the net.
        num_heads: heads.
        batch_size: sequences per update, fresh every time.
        weight_decay: of AdamW.
        rise: share of the updates in which the learning rate rises.
    """

    learning_rates: Mapping[str, float]
    steps: int
    num_test: int
    num_keys: int = 8
    num_values: int = 16
    length: int = 48
    dim: int = 64
    num_heads: int = 2
    batch_size: int = 16
    weight_decay: float = 0.01
    rise: float = 0.1


@dataclass(frozen=True)
class LanguageSettings:
    """The sizes of a language model.

    Attributes:
        corpus: gives the tokens.
        learning_rates: arm → peak learning rate.
        steps: updates.
        warmup: updates in which the learning rate rises from a tenth of its peak, to which it falls again.
        batch_size: windows per update.
        windows_at_once: of them, how many go through the model together.
        length: tokens of a window in training; the long test has ``4 * length``.
        vocab_size: number of token ids.
        sizes: keywords of :class:`GLAModel`.
        weight_decay: of AdamW.
        clip_norm: largest norm of the gradient.
        mixed_precision: as :func:`headgate.train.fit` takes it.
        accelerate: whether to train on a GPU where there is one.
    """

    corpus: Callable[[], Tokens]
    learning_rates: Mapping[str, float]
    steps: int
    warmup: int
    batch_size: int
    windows_at_once: int
    length: int
    vocab_size: int
    sizes: Mapping[str, int] = field(default_factory=dict)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    mixed_precision: str = "no"
    accelerate: bool = False


class Tokens(NamedTuple):
    """The ids of a corpus, in parts that do not overlap.

    Attributes:
        train: integers ``(tokens,)``, in memory or on disk.
        validation: the same; chooses learning rates.
        test: the same; gives the result.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def documentation_bytes() -> Tokens:
    """The Python documentation as UTF-8: the first 80% train, the next 10% choose the learning rate, the last 10% test."""
    text = np.frombuffer(python_documentation().text.encode(), dtype=np.uint8)
    return Tokens(*np.split(text, [len(text) * 8 // 10, len(text) * 9 // 10]))


def slimpajama() -> Tokens:
    """SlimPajama as ids of the Mistral tokenizer: ``train.npy``, ``validation.npy``, ``test.npy`` in $HEADGATE_SLIMPAJAMA.

    Raises:
        DataError: the variable is not set, or a file is missing or holds no vector of integers.
    """
    folder = os.environ.get("HEADGATE_SLIMPAJAMA")
    if folder is None:
        raise DataError(
            "SlimPajama was not found; set HEADGATE_SLIMPAJAMA to a folder with the token ids of its parts (Mistral's "
            "tokenizer, one vector of integers each): train.npy, validation.npy, test.npy"
        )
    return Tokens(*(_read_tokens(Path(folder) / f"{part}.npy") for part in Tokens._fields))


_RECALL_RATES = {
    "vector": 6e-3,
    "scalar": 6e-3,
    "fixed": 3e-3,
    "none": 1.2e-2,
    "bias_only": 1.2e-2,
    "fixed_fast": 3e-3,
    "vector_16": 2.4e-2,
    "scalar_16": 6e-3,
    "attention": 6e-3,
}
"""Of 1.5e-3, 3e-3, 6e-3, 1.2e-2 and 2.4e-2 the best for each arm by its mean accuracy on validation sequences after 500
updates, with seeds 100 to 102, which are not reported."""

SCALES: dict[str, RecallSettings | LanguageSettings] = {
    "smoke": RecallSettings(
        learning_rates=dict.fromkeys(ARMS, 6e-3),
        steps=20,
        num_test=40,
        length=24,
    ),
    "laptop": RecallSettings(learning_rates=_RECALL_RATES, steps=500, num_test=500),
    # At the laptop scale some seeds are still learning when the training ends.
    "longer": RecallSettings(learning_rates=_RECALL_RATES, steps=1500, num_test=500),
    "text": LanguageSettings(
        corpus=documentation_bytes,
        # Of 7.5e-4, 1.5e-3, 3e-3 and 6e-3 the best for each arm by its bits on the validation text with seed 100.
        learning_rates={"vector_16": 3e-3, "scalar_16": 1.5e-3, "fixed": 1.5e-3, "fixed_fast": 3e-3, "none": 1.5e-3},
        steps=1600,
        warmup=160,
        batch_size=4,
        windows_at_once=4,
        length=256,
        vocab_size=256,
        sizes={"dim": 128, "depth": 3, "num_heads": 4, "hidden_dim": 256},
    ),
    "paper": LanguageSettings(
        corpus=slimpajama,
        learning_rates=dict.fromkeys(("vector_16", "scalar_16", "fixed", "none"), 3e-4),
        steps=13_352,  # 7B tokens in batches of 0.5M
        warmup=954,  # 0.5B tokens
        batch_size=256,
        windows_at_once=8,
        length=2048,
        vocab_size=32_000,
        sizes={"dim": 1024, "depth": 24, "num_heads": 4},
        mixed_precision="bf16",
        accelerate=True,
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Train one arm with one seed and measure it at the length of its training and at four times that.

    Args:
        arm: an arm that the card has at this scale.
        seed: of data, initial weights and the order of the data.
        scale: a key of :data:`SCALES`.

    Raises:
        ValueError: unknown scale, or an arm that the scale does not have.
        DataError: the scale's data are missing.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    if arm not in settings.learning_rates:
        raise ValueError(f"arm must be one of {', '.join(settings.learning_rates)} at scale {scale!r}, got {arm!r}")
    if isinstance(settings, RecallSettings):
        return _measure_recall(arm, seed, settings)
    return _measure_language(arm, seed, settings)


def _measure_recall(arm: str, seed: int, settings: RecallSettings) -> Measurement:
    net, losses = _train_recall(arm, seed, settings, settings.learning_rates[arm])
    short, long = (_draw(seed, "test", settings, factor) for factor in (1, 4))
    short_hits, long_hits = _hits(net, short), _hits(net, long)
    curves = {
        "accuracy by age": _binned(short.ages, short_hits, 5, "steps since the last write", "accuracy"),
        "accuracy by writes": _binned(long.writes, long_hits, 5, "writes to the key in the long test", "accuracy"),
        "accuracy by place": _along(long, long_hits, settings.length),
        "training loss": _course(losses, "cross-entropy of the answers"),
    }
    pictures = {}
    if isinstance(net.mixer, GatedLinearAttention):
        kept = kept_memory(net, short)
        curves["gates by step"] = _kept_by_kind(kept)
        if ARMS[arm].gate in ("vector", "scalar", "blind"):
            pictures["kept"] = _kept_picture(kept)
    return Measurement(
        metrics={"accuracy": float(short_hits.mean()), "accuracy_long": float(long_hits.mean())},
        curves=curves,
        pictures=pictures,
        notes={
            "learning rate": settings.learning_rates[arm],
            "parameters": count_parameters(net),
            "steps": settings.steps,
        },
    )


def _train_recall(arm: str, seed: int, settings: RecallSettings, learning_rate: float) -> tuple[RecallNet, list[float]]:
    """The trained net and the loss of every step."""
    kind, normalizer = ARMS[arm]
    with seeded(seed):
        net = RecallNet(settings.num_keys, settings.num_values, settings.dim, settings.num_heads, kind, normalizer)
    history = fit(
        net,
        lambda step: _batch(seed, settings, step),
        _recall_loss,
        steps=settings.steps,
        optimizer=make_optimizer(net, learning_rate=learning_rate, weight_decay=settings.weight_decay),
        schedule=one_cycle(settings.steps, settings.rise),
        seed=seed,
    )
    return net.eval(), history.losses


def _batch(seed: int, settings: RecallSettings, step: int) -> OverwriteRecallData:
    generator = stream_generator(seed, "train", step)
    return overwrite_recall(
        settings.batch_size, settings.length, settings.num_keys, settings.num_values, generator=generator
    )


def _draw(seed: int, part: str, settings: RecallSettings, factor: int) -> OverwriteRecallData:
    """Sequences of ``factor`` times the length of the training."""
    generator = stream_generator(seed, part, factor)
    return overwrite_recall(
        settings.num_test, factor * settings.length, settings.num_keys, settings.num_values, generator=generator
    )


def _recall_loss(net: nn.Module, batch: OverwriteRecallData) -> Tensor:
    return F.cross_entropy(net(batch.keys, batch.values).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def _hits(net: RecallNet, data: OverwriteRecallData) -> Float[Tensor, " queries"]:
    """Per query with an answer, row by row: 1 if it is found."""
    guess = net(data.keys, data.values).argmax(-1)
    return (guess == data.targets)[data.targets != IGNORED].double()


def _binned(
    number: Int64[Tensor, "examples length"], values: Float[Tensor, " queries"], top: int, x_label: str, y_label: str
) -> Curve:
    """Mean of ``values`` over a positive number, in bins that double: 1, 2, 3-4, …, named by their ends.

    The last bin is named 2^top and holds all above 2^(top - 1), so that every cell has the same bins; an empty one has
    no mean (NaN).
    """
    bins = number[number > 0].double().log2().ceil().clamp(max=top)
    ends = [2**kind for kind in range(top + 1)]
    means = [float(values[bins == kind].mean()) for kind in range(top + 1)]
    return Curve(ends, means, f"{x_label}, at most ({ends[-1]}: or more)", y_label, log_x=True)


def _along(data: OverwriteRecallData, hits: Tensor, length: int) -> Curve:
    """Mean of ``hits`` over where in the sequence a query stands, in halves of the training length."""
    step = torch.arange(data.keys.shape[1]).expand_as(data.keys)[data.targets != IGNORED]
    block = step * 2 // length
    kinds = block.unique().tolist()
    return Curve(
        [(kind + 1) * length / 2 for kind in kinds],
        [float(hits[block == kind].mean()) for kind in kinds],
        f"step in the sequence (trained to {length})",
        "accuracy",
    )


def _course(losses: list[float], label: str, points: int = 20) -> Curve:
    """Mean loss over equal parts of the training."""
    parts = np.array_split(np.array(losses), min(points, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return Curve(ends.tolist(), [float(part.mean()) for part in parts], "step", label)


def _kept_by_kind(kept: Float[Tensor, "keys tokens"]) -> Curve:
    """Means over the keys of what a step of each kind leaves of a key's memory."""
    keys = len(kept)
    own = torch.eye(keys, dtype=torch.bool)
    write, query = kept.split(keys, dim=1)
    means = [float(part.mean()) for part in (write[own], query[own], write[~own], query[~own])]
    label = "1: write to the key, 2: query for it, 3: write to another, 4: query for another"
    return Curve([1, 2, 3, 4], means, label, "mean gate on the key's rows")


def _kept_picture(kept: Float[Tensor, "keys tokens"]) -> UInt8[np.ndarray, "height width 3"]:
    """The table of what every step leaves of every key's memory, as a heat map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = len(kept)
    figure = Figure(figsize=(6.4, 2.7), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, part, title in zip(panels, kept.split(keys, dim=1), ("write to key", "query for key"), strict=True):
        image = panel.imshow(part.numpy(), cmap="viridis", vmin=0, vmax=1)
        panel.set_xlabel(title)
        panel.set_xticks(range(keys))
        panel.set_yticks(range(keys))
    panels[0].set_ylabel("memory of key")
    figure.colorbar(image, ax=panels, label="kept by one step")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _measure_language(arm: str, seed: int, settings: LanguageSettings) -> Measurement:
    tokens = settings.corpus()
    for part, ids in tokens._asdict().items():
        if len(ids) <= 4 * settings.length:
            raise DataError(f"{part} must hold more than {4 * settings.length} tokens, got {len(ids)}")
    net, losses = _train_language(arm, seed, settings, settings.learning_rates[arm], tokens.train)
    short, long = (_score_language(net, tokens.test, settings, factor) for factor in (1, 4))
    position = torch.arange(1, 4 * settings.length + 1).expand_as(long.bits)
    top = math.ceil(math.log2(4 * settings.length))
    return Measurement(
        metrics={
            "accuracy": float(short.hits.mean()),
            "accuracy_long": float(long.hits.mean()),
            "bits": float(short.bits.mean()),
            "bits_long": float(long.bits.mean()),
            "perplexity": 2 ** float(short.bits.mean()),
        },
        curves={
            "bits by context": _binned(position, long.bits.flatten(), top, "tokens seen", "bits per byte or token"),
            "gates": _gate_quantiles(net, tokens.test, settings),
            "training loss": _course([loss / math.log(2) for loss in losses], "bits per byte or token"),
        },
        notes={
            "learning rate": settings.learning_rates[arm],
            "parameters": count_parameters(net),
            "steps": settings.steps,
        },
    )


def _train_language(
    arm: str, seed: int, settings: LanguageSettings, learning_rate: float, tokens: np.ndarray
) -> tuple[LanguageNet, list[float]]:
    """The trained model and the loss of every step."""
    kind, normalizer = ARMS[arm]
    assert kind is not None
    with seeded(seed):
        net = LanguageNet(settings.vocab_size, kind, gate_logit_normalizer=normalizer, **settings.sizes)
    net.to("cuda" if settings.accelerate and torch.cuda.is_available() else "cpu")

    def batch(index: int) -> Tensor:
        generator = stream_generator(seed, "train", index)
        starts = torch.randint(len(tokens) - settings.length, (settings.windows_at_once,), generator=generator)
        return _windows(tokens, starts, settings.length, settings.vocab_size)

    history = fit(
        net,
        batch,
        lambda model, windows: _token_losses(model(windows[:, :-1]), windows).mean(),
        steps=settings.steps,
        optimizer=make_optimizer(net, learning_rate=learning_rate, weight_decay=settings.weight_decay),
        schedule=_schedule(settings.steps, settings.warmup),
        clip_norm=settings.clip_norm,
        accumulate=settings.batch_size // settings.windows_at_once,
        mixed_precision=settings.mixed_precision,
        seed=seed,
    )
    return net.eval(), history.losses


def _schedule(steps: int, warmup: int, floor: float = 0.1) -> Callable[[int], float]:
    """From ``floor`` linearly to 1 over ``warmup`` steps, and back along half a cosine."""
    fall = warmup_cosine(steps, warmup, floor)

    def factor(step: int) -> float:
        return floor + (1 - floor) * step / warmup if step < warmup else fall(step)

    return factor


class _Scores(NamedTuple):
    """Per predicted token, in windows ``(windows, length)``: its bits, and 1 where it was the likeliest."""

    bits: Tensor
    hits: Tensor


@torch.no_grad()
def _score_language(net: LanguageNet, tokens: np.ndarray, settings: LanguageSettings, factor: int) -> _Scores:
    """Windows of ``factor`` times the length of the training, side by side, each from an empty memory."""
    length = factor * settings.length
    starts = torch.arange(0, len(tokens) - length, length)
    device = next(net.parameters()).device
    bits, hits = [], []
    for some in starts.split(max(1, settings.windows_at_once // factor)):
        windows = _windows(tokens, some, length, settings.vocab_size).to(device)
        logits = net(windows[:, :-1])
        bits.append(_token_losses(logits, windows).view(len(some), length).double().cpu() / math.log(2))
        hits.append((logits.argmax(-1) == windows[:, 1:]).double().cpu())
    return _Scores(torch.cat(bits), torch.cat(hits))


def _token_losses(
    logits: Float[Tensor, "batch length vocab"], windows: Int64[Tensor, "batch length_plus_one"]
) -> Float[Tensor, " tokens"]:
    """Cross-entropy of every token but a window's first, row by row."""
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none")


def _windows(
    tokens: np.ndarray, starts: Int64[Tensor, " batch"], length: int, vocab_size: int
) -> Int64[Tensor, "batch length_plus_one"]:
    """Inputs and, one token later, targets of windows at ``starts``."""
    rows = np.stack([tokens[start : start + length + 1] for start in starts.tolist()]).astype(np.int64)
    if rows.min() < 0 or rows.max() >= vocab_size:
        raise DataError(f"token ids must lie in [0, {vocab_size}), got {rows.min()} to {rows.max()}")
    return torch.from_numpy(rows)


@torch.no_grad()
def _gate_quantiles(net: LanguageNet, tokens: np.ndarray, settings: LanguageSettings) -> Curve:
    """The gates of all blocks on a few test windows, in order of size."""
    seen: list[Tensor] = []
    hooks = [
        layer.log_gate.register_forward_hook(lambda module, inputs, output: seen.append(output.exp().cpu()))
        for layer in net.mixers()
    ]
    starts = torch.arange(0, len(tokens) - settings.length, settings.length)[: settings.windows_at_once]
    windows = _windows(tokens, starts, settings.length, settings.vocab_size)
    net(windows[:, :-1].to(next(net.parameters()).device))
    for hook in hooks:
        hook.remove()
    gates = np.concatenate([part.float().flatten().numpy() for part in seen])
    shares = np.linspace(0, 1, 21)
    return Curve((100 * shares).tolist(), np.quantile(gates, shares).tolist(), "percent of the gates below", "gate")


def _read_tokens(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; expected a vector of token ids") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; expected a vector of token ids") from error
    if not isinstance(tokens, np.ndarray):
        raise DataError(f"{path} must hold a vector of integers, got an archive of arrays")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{path} must hold a vector of integers, got {tokens.dtype} {tokens.shape}")
    return tokens
