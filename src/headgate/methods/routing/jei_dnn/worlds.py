"""The data and frozen backbones on which the claim is measured, run once: what is left are features at every exit.

``EasyHard`` (procedural) mixes inputs that one linear layer can tell apart with inputs that need depth::

    v ~ U(0, 1) is how hard an input is, x ~ N(0, I_64)
    v ≤ 0.6: one of ten classes y,  x += 2 (1 − v) A_y          A_y ~ N(0, I / 4), fixed
    v > 0.6: class b₀ + 2 b₁ + 4 b₂, b_k = [sign⟨x, p_2k⟩ ≠ sign⟨x, p_2k+1⟩]    six fixed directions p
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from headgate.data import Cifar, load_digits_images, portable_normal, stream_generator
from headgate.data.folders import data_folder
from headgate.errors import DataError
from headgate.methods.routing.jei_dnn.features import collect_features
from headgate.methods.routing.jei_dnn.model import EarlyExit
from headgate.methods.routing.jei_dnn.official import t2t_vit_from_official
from headgate.methods.routing.jei_dnn.profile import profile_costs
from headgate.methods.routing.jei_dnn.trainer import TrainingBatches
from headgate.nn import VisionTransformer
from headgate.train import base_model, epoch_batches, fit, make_optimizer, warmup_cosine

__all__ = ["ExitData", "Live", "Task", "cifar_task", "digits_task", "easy_hard", "easy_hard_task", "published_task"]

PARTS = ("train", "validation", "test")

_CIFAR_COUNTS = (50_000, 10_000)


class ExitData(NamedTuple):
    """What a frozen backbone gives to the exits, and the truth."""

    features: Float[Tensor, "n gates dim"]
    final_logits: Float[Tensor, "n classes"]
    target: Int[Tensor, " n"]


class Live(NamedTuple):
    """A network whose backbone runs while heads and gates are trained, with what it is trained and validated on."""

    model: EarlyExit
    batches: TrainingBatches
    validation: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Everything that the arms share with one seed.

    Attributes:
        train: None where training is :attr:`live`.
        validation: chooses nothing but the weights of the gate loss and the conformal quantiles.
        test: what is reported.
        costs: ``(G + 1,)`` shares of the full cost.
        base_seconds: time taken to train the backbone.
        difficulty: ``(n,)`` of the test inputs in [0, 1], where the data know it.
        live: see :class:`Live`.
    """

    train: ExitData | None
    validation: ExitData
    test: ExitData
    costs: tuple[float, ...]
    base_seconds: float
    difficulty: Float[Tensor, " n"] | None = None
    live: Live | None = None


class Samples(NamedTuple):
    """Inputs with their classes, and how hard they are."""

    x: Float[Tensor, "n ..."]
    target: Int[Tensor, " n"]
    difficulty: Float[Tensor, " n"]


def easy_hard(seed: int, counts: tuple[int, int, int]) -> dict[str, Samples]:
    """Draw EasyHard (see the module docstring).

    Args:
        seed: decides the fixed vectors and the inputs.
        counts: training, validation and test inputs.
    """
    generator = stream_generator(seed, "easy-hard")
    centres = portable_normal((10, 64), generator) / 2
    directions = portable_normal((64, 6), generator)
    parts = {}
    for part, count in zip(PARTS, counts, strict=True):
        difficulty = torch.rand(count, generator=generator)
        x = portable_normal((count, 64), generator)
        target = torch.randint(10, (count,), generator=generator)
        easy = difficulty <= 0.6
        signs = x @ directions > 0
        bits = (signs[:, 0::2] != signs[:, 1::2]).long()
        code = bits @ torch.tensor([1, 2, 4])
        x = torch.where(easy[:, None], x + 2 * (1 - difficulty)[:, None] * centres[target], x)
        parts[part] = Samples(x, torch.where(easy, target, code), difficulty)
    return parts


def easy_hard_task(seed: int, counts: tuple[int, int, int], depth: int, epochs: int) -> Task:
    """EasyHard behind a residual MLP.

    Args:
        seed: decides data, backbone and order of its batches.
        counts: training, validation and test inputs.
        depth: blocks of the backbone.
        epochs: of its training.
    """
    return _mlp_task("easy-hard", easy_hard(seed, counts), seed, depth, epochs)


def digits_task(seed: int, depth: int, epochs: int, copies: int = 8) -> Task:
    """scikit-learn's digits under noise of a strength of their own, σ ~ U(0, 1.2), behind a residual MLP.

    Args:
        seed: decides split, noise, backbone and order of its batches.
        depth: blocks of the backbone.
        epochs: of its training.
        copies: how often each image is drawn, with other noise.
    """
    known, test = load_digits_images("train", seed), load_digits_images("test", seed)
    order = torch.randperm(len(known.labels), generator=stream_generator(seed, "validation"))
    generator = stream_generator(seed, "noise")
    parts = {}
    for part, images, labels in (
        ("train", known.images[order[240:]], known.labels[order[240:]]),
        ("validation", known.images[order[:240]], known.labels[order[:240]]),
        ("test", test.images, test.labels),
    ):
        x = images.flatten(1).repeat(copies, 1) * 2 - 1
        strength = 1.2 * torch.rand(len(x), generator=generator)
        noisy = x + strength[:, None] * portable_normal(x.shape, generator)
        parts[part] = Samples(noisy, labels.repeat(copies), strength / 1.2)
    return _mlp_task("digits", parts, seed, depth, epochs)


def cifar_task(seed: int, dim: int, depth: int, epochs: int, limit: int | None = None) -> Task:
    """CIFAR-10 behind a small vision transformer, 4×4 pixels a token, trained from nothing.

    Args:
        seed: decides validation images, backbone and order of its batches.
        dim: channels of the backbone.
        depth: its blocks.
        epochs: of its training.
        limit: use only so many training and test images.

    Raises:
        DataError: no data in ``$HEADGATE_CIFAR10``, nor in ``data/cifar10`` of ``$HEADGATE_SHARED``.
    """
    folder = data_folder("cifar10")
    sizes = [min(limit or count, count) for count in _CIFAR_COUNTS]
    held = sizes[0] // 10

    def build() -> _FeatureTable:
        backbone = VisionTransformer(dim, depth, dim // 32, img_size=32, patch_size=4, num_classes=10, mlp_dim=2 * dim)
        return _FeatureTable(backbone, "norm", (sizes[0] - held, held, sizes[1]))

    def train(table: nn.Module) -> None:
        assert isinstance(table, _FeatureTable)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        train_set, test_set = Cifar(folder, "train"), Cifar(folder, "test")
        rows = torch.randperm(len(train_set), generator=stream_generator(seed, "validation"))[: sizes[0]]
        learned = rows[held:]
        backbone = table.network.backbone.requires_grad_(True).to(device)
        order = epoch_batches(learned, min(128, len(learned)), seed)
        steps = epochs * order.steps_per_epoch

        def batch(step: int) -> tuple[Tensor, Tensor]:
            return train_set.batch(order(step)[0], augment=stream_generator(seed, "augment", step))

        fit(
            backbone,
            batch,
            _cross_entropy,
            steps=steps,
            optimizer=make_optimizer(backbone, "adamw", 1e-3, 0.05),
            schedule=warmup_cosine(steps, warmup=steps // 10),
            seed=seed,
        )
        table.network.backbone.requires_grad_(False)
        for part, source, chosen in (
            ("train", train_set, learned),
            ("validation", train_set, rows[:held]),
            ("test", test_set, torch.arange(sizes[1])),
        ):
            images, labels = source.batch(chosen)
            features, logits = collect_features(table.network, images)
            table.put(part, ExitData(features, logits, labels))
        table.cpu()

    settings = {"seed": seed, "dim": dim, "depth": depth, "epochs": epochs, "sizes": sizes, "recipe": 1}
    table, seconds = base_model("jei-dnn-cifar10", build, train, settings)
    example = torch.zeros(1, 3, 32, 32)
    costs = tuple(profile_costs(table.network, example).normalized.tolist())
    return Task(table.get("train"), table.get("validation"), table.get("test"), costs, seconds)


def published_task(seed: int) -> Task:
    """The paper's CIFAR-10: a published T2T-ViT-7, fine-tuned there, at 224 pixels; 5,000 images validate.

    Args:
        seed: decides validation images and order of batches.

    Raises:
        DataError: no checkpoint in ``$HEADGATE_T2T_CIFAR10``, or no data.
    """
    folder = data_folder("cifar10")
    checkpoint = os.environ.get("HEADGATE_T2T_CIFAR10")
    if checkpoint is None or not Path(checkpoint).is_file():
        raise DataError(
            f"a T2T-ViT-7 fine-tuned on CIFAR-10 was not found; set HEADGATE_T2T_CIFAR10 to its checkpoint, got {checkpoint}"
        )
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    vit = t2t_vit_from_official(content.get("net", content))
    for index, block in enumerate(vit.blocks):
        cast(nn.Module, block.drop_path).rate = 0.1 * index / (len(vit.blocks) - 1)  # type: ignore[assignment]
    enlarged = nn.Sequential(nn.Upsample(size=vit.img_size, mode="bicubic"), vit)
    model = EarlyExit(enlarged, 10, blocks="1.blocks", dim=vit.num_features, norm="1.norm", pool="token")
    model.set_costs(profile_costs(model, torch.zeros(1, 3, 32, 32)).normalized)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what T2T-ViT was trained with
    train, test = Cifar(folder, "train", mean=mean, std=std), Cifar(folder, "test", mean=mean, std=std)
    rows = torch.randperm(len(train), generator=stream_generator(seed, "validation"))
    held = min(5_000, len(train) // 10)
    validation = train.batch(rows[:held])
    judged = test.batch(torch.arange(len(test)))
    return Task(
        None,
        ExitData(*collect_features(model, validation[0], batch_size=64), validation[1]),
        ExitData(*collect_features(model, judged[0], batch_size=64), judged[1]),
        tuple(model.costs.tolist()),
        0.0,
        live=Live(model, _Augmented(train, rows[held:], seed), validation),
    )


class _Augmented:
    """Batches of 64 shifted and mirrored images."""

    def __init__(self, images: Cifar, rows: Int[Tensor, " n"], seed: int) -> None:
        self.images, self.seed = images, seed
        self.order = epoch_batches(rows, min(64, len(rows)), seed)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.images.batch(self.order(step)[0], augment=stream_generator(self.seed, "augment", step))


class ResidualMLP(nn.Module):
    """Blocks of LayerNorm, Linear, GELU, Linear around a residual stream, a norm, and a linear head.

    Args:
        dim: of inputs and stream.
        depth: blocks.
        num_classes: classes.
    """

    def __init__(self, dim: int = 64, depth: int = 6, num_classes: int = 10) -> None:
        super().__init__()
        self.num_features, self.num_classes = dim, num_classes
        self.blocks = nn.ModuleList(_MLPBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Classify ``x`` ``(batch, dim)``."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _MLPBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def _mlp_task(name: str, parts: dict[str, Samples], seed: int, depth: int, epochs: int) -> Task:
    train = parts["train"]
    batches = epoch_batches((train.x, train.target), min(256, len(train.x)), seed)

    def learn(backbone: nn.Module) -> None:
        fit(
            backbone,
            batches,
            _cross_entropy,
            steps=epochs * batches.steps_per_epoch,
            optimizer=make_optimizer(backbone, "adamw", 1e-3),
            seed=seed,
        )

    counts = [len(part.x) for part in parts.values()]
    settings = {"seed": seed, "depth": depth, "epochs": epochs, "counts": counts, "recipe": 1}
    backbone, seconds = base_model(f"jei-dnn-{name}", lambda: ResidualMLP(depth=depth), learn, settings)
    # The cost of exit l is l / L, as all blocks are alike and heads and gates tiny.
    model = EarlyExit(backbone, norm="norm")
    data = {
        part: ExitData(*collect_features(model, samples.x, batch_size=1024), samples.target)
        for part, samples in parts.items()
    }
    return Task(
        data["train"],
        data["validation"],
        data["test"],
        tuple(model.costs.tolist()),
        seconds,
        parts["test"].difficulty,
    )


class _FeatureTable(nn.Module):
    """A network and what it gives for all images, so that arms share both as they share a base model."""

    def __init__(self, backbone: VisionTransformer, norm: str, counts: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = EarlyExit(backbone, blocks="blocks", norm=norm)
        gates, dim, classes = self.network.num_gates, backbone.num_features, backbone.num_classes
        for part, count in zip(PARTS, counts, strict=True):
            self.register_buffer(f"{part}_features", torch.zeros(count, gates, dim))
            self.register_buffer(f"{part}_logits", torch.zeros(count, classes))
            self.register_buffer(f"{part}_target", torch.zeros(count, dtype=torch.int64))

    def put(self, part: str, data: ExitData) -> None:
        for name, values in zip(("features", "logits", "target"), data, strict=True):
            getattr(self, f"{part}_{name}").copy_(values)

    def get(self, part: str) -> ExitData:
        return ExitData(*(getattr(self, f"{part}_{name}") for name in ("features", "logits", "target")))


def _cross_entropy(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
