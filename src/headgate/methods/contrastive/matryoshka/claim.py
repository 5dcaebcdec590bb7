"""The claim: prefixes as good as models of their size, far above slices; a short shortlist loses nothing.

One encoder with nested classifiers is measured against as many independent trainings as there are sizes, and against
three ways to cut an embedding that has no order of its own: the first coordinates of an ordinary one, its principal
directions, and MRL's coordinates shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from headgate.data import stream_generator
from headgate.evaluate import map_at_k, rank_by_label, rerank, search
from headgate.measurement import Curve, Measurement
from headgate.methods.contrastive.matryoshka.cascade import MatryoshkaCascade
from headgate.methods.contrastive.matryoshka.head import MatryoshkaHead, nested_logits
from headgate.methods.contrastive.matryoshka.imagenet import imagenet_schedule, imagenet_world
from headgate.methods.contrastive.matryoshka.loss import MatryoshkaLoss
from headgate.methods.contrastive.matryoshka.sizes import nested_dims
from headgate.methods.contrastive.matryoshka.worlds import World, cifar_world, digits_world, procedural_world
from headgate.train import DivergedError, base_model, fit, make_optimizer, one_cycle, seeded

__all__ = ["SCALES", "measure"]

ARMS = ("mrl", "mrl_e", "ff", "slice", "svd", "permuted")


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        world: seed → data and encoder.
        dims: the nesting set M.
        short: size at which prefixes are compared with slices; shorter ones have no part in the choice of a rate.
        shortlist_dim: D_s of adaptive retrieval; it reranks with all coordinates.
        shortlist: its K.
        steps: updates per training.
        batch_size: items per update.
        learning_rates: the grid; every training chooses from it by validation accuracy.
        weight_decay: of the optimizer.
        optimizer: its name.
        schedule: number of steps → schedule.
        label_smoothing: in the cross-entropy.
    """

    world: Callable[[int], World]
    dims: tuple[int, ...]
    short: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    shortlist_dim: int = 8
    shortlist: int = 100
    weight_decay: float = 1e-3
    optimizer: str = "adamw"
    schedule: Callable[[int], Callable[[int], float]] = one_cycle
    label_smoothing: float = 0.0


_SIZES = (2, 4, 8, 16, 32, 64)

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        world=lambda seed: digits_world(seed, (64, 32, 64)),
        dims=_SIZES,
        short=2,
        steps=40,
        batch_size=64,
        learning_rates=(8e-3, 3.2e-2),
    ),
    "laptop": Scale(
        world=lambda seed: digits_world(seed, (64, 128, 128, 64)),
        dims=_SIZES,
        short=2,
        steps=600,
        batch_size=128,
        learning_rates=(2e-3, 8e-3, 3.2e-2, 1.28e-1),
    ),
    "synthetic": Scale(
        world=lambda seed: procedural_world(seed, (96, 256, 256, 64)),
        dims=_SIZES,
        short=4,
        steps=1200,
        batch_size=256,
        learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
    ),
    "cifar10": Scale(
        world=lambda seed: cifar_world(seed, (512, 256, 256, 64), filters=256, dropout=0.3, gallery=10_000),
        dims=_SIZES,
        short=2,
        steps=2400,
        batch_size=256,
        learning_rates=(1e-3, 4e-3, 1.6e-2, 6.4e-2),
        weight_decay=1e-2,
    ),
    "paper": Scale(
        world=imagenet_world,
        dims=nested_dims(2048),
        short=8,
        shortlist_dim=16,
        shortlist=200,
        steps=40 * (1_281_167 // 512),
        batch_size=512,
        learning_rates=(0.425,),
        weight_decay=1e-4,
        optimizer="sgd",
        schedule=imagenet_schedule,
        label_smoothing=0.1,
    ),
}


def measure(arm: str, seed: int, scale: str) -> Measurement:
    """Measure one arm with one seed.

    Args:
        arm: one of the card's arms.
        seed: decides the data, the initial weights and the order of batches, alike for all arms.
        scale: one of :data:`SCALES`.

    Raises:
        ValueError: unknown arm or scale.
        DataError: the scale's data are missing.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    settings = SCALES[scale]
    world = settings.world(seed)
    trainer = _Trainer(settings, world, scale, seed)
    models = [trainer.train(dims, tied) for dims, tied in _trainings(arm, settings.dims)]
    if arm in ("mrl", "mrl_e"):
        representation = _nested(world, models[0], settings.dims)
    elif arm == "ff":
        representation = _independent(world, models, settings.dims)
    else:
        representation = _cut(world, models[0], settings.dims, _BASES[arm](world, models[0], seed))
    return _measurement(representation, settings, world, models, trainer.base_seconds)


def _trainings(arm: str, dims: tuple[int, ...]) -> list[tuple[tuple[int, ...], bool]]:
    """Sizes and tying of each model that the arm trains."""
    trainings: dict[str, list[tuple[tuple[int, ...], bool]]] = {
        "mrl": [(dims, False)],
        "mrl_e": [(dims, True)],
        "ff": [((size,), False) for size in dims],
        "slice": [(dims[-1:], False)],
        "svd": [(dims[-1:], False)],
        "permuted": [(dims, False)],
    }
    return trainings[arm]


class _Nested(nn.Module):
    """An encoder and a head on its first coordinates."""

    learning_rate: Tensor

    def __init__(self, encoder: nn.Module, head: MatryoshkaHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        # Kept with the weights, so that a shared model knows which rate it was trained with.
        self.register_buffer("learning_rate", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.classify(self.encoder(x))

    def classify(self, z: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, "n classes"], ...]:
        return self.head(z[:, : self.head.dims[-1]])


class _Trainer:
    """Trains a model at every rate of the grid and keeps the one that validates best."""

    def __init__(self, settings: Scale, world: World, scale: str, seed: int) -> None:
        self.settings, self.world, self.scale, self.seed = settings, world, scale, seed
        self.base_seconds = world.base_seconds

    def train(self, dims: tuple[int, ...], tied: bool) -> _Nested:
        """The model that several arms may share, from the cache where one of them has trained it."""
        with seeded(self.seed):
            encoder = self.world.encoder()
        name = f"matryoshka-{self.scale}-{'tied' if tied else 'free'}-{'-'.join(map(str, dims))}"
        recipe = {
            "seed": self.seed,
            "encoder": str(encoder),
            "steps": self.settings.steps,
            "batch_size": self.settings.batch_size,
            "rates": list(self.settings.learning_rates),
            "weight_decay": self.settings.weight_decay,
            "label_smoothing": self.settings.label_smoothing,
            "recipe": 1,
        }

        def build() -> _Nested:
            return self._build(dims, tied)

        model, seconds = base_model(name, build, self._search, recipe)
        assert isinstance(model, _Nested)
        if not tied and dims[-1] == self.settings.dims[-1]:
            self.base_seconds += seconds  # MRL and the full-size model serve more than one arm
        return model

    def _build(self, dims: tuple[int, ...], tied: bool) -> _Nested:
        with seeded(self.seed):
            encoder = self.world.encoder()
            return _Nested(encoder, MatryoshkaHead(dims, self.world.num_classes, tied=tied))

    def _search(self, model: nn.Module) -> None:
        assert isinstance(model, _Nested)
        best, best_score = None, -1.0
        for rate in self.settings.learning_rates:
            candidate = self._build(model.head.dims, model.head.tied)
            try:
                self._fit(candidate, rate)
            except DivergedError:  # a rate beyond what this training can take is no choice
                continue
            z, labels = self.world.embed(candidate.eval().encoder, "validation")
            found = dict(zip(model.head.dims, _accuracies(candidate.classify(z), labels), strict=True))
            # Sizes that are too short for the number of classes do not count where there are others.
            counted = [value for size, value in found.items() if size >= self.settings.short] or list(found.values())
            score = float(np.mean(counted))
            if score > best_score:
                candidate.learning_rate.fill_(rate)
                best, best_score = candidate.state_dict(), score
        if best is None:
            raise DivergedError(f"training diverged at every learning rate of {self.settings.learning_rates}")
        model.load_state_dict(best)

    def _fit(self, model: _Nested, rate: float) -> None:
        settings = self.settings
        criterion = MatryoshkaLoss(nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing), model.head.dims)
        model.to(_device())
        criterion.to(_device())
        fit(
            model,
            self.world.batches(settings.batch_size, self.seed),
            lambda wrapped, batch: criterion(wrapped(batch[0]), batch[1]),
            steps=settings.steps,
            optimizer=make_optimizer(model, settings.optimizer, rate, settings.weight_decay),
            schedule=settings.schedule(settings.steps),
            seed=self.seed,
        )
        model.cpu()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Representation(NamedTuple):
    """What an arm offers at each size: embeddings to search with, and class probabilities.

    Attributes:
        gallery: per size, ``(N, m)``.
        test: per size, ``(Q, m)``.
        validation_probs: ``(G, V, C)``.
        test_probs: ``(G, Q, C)``.
        gallery_labels: ``(N,)``.
        validation_labels: ``(V,)``.
        test_labels: ``(Q,)``.
    """

    gallery: list[Tensor]
    test: list[Tensor]
    validation_probs: Float[Tensor, "sizes v classes"]
    test_probs: Float[Tensor, "sizes q classes"]
    gallery_labels: Int[np.ndarray, " n"]
    validation_labels: Int[np.ndarray, " v"]
    test_labels: Int[np.ndarray, " q"]


def _represent(
    world: World,
    encoder: nn.Module,
    dims: Sequence[int],
    change: Callable[[Tensor], Tensor],
    classify: Callable[[Tensor], Sequence[Tensor]],
) -> _Representation:
    gallery, validation, test = (world.embed(encoder, part) for part in ("train", "validation", "test"))
    known, held, new = change(gallery.inputs), change(validation.inputs), change(test.inputs)
    return _Representation(
        [known[:, :size] for size in dims],
        [new[:, :size] for size in dims],
        _probabilities(classify(held)),
        _probabilities(classify(new)),
        gallery.labels.numpy(),
        validation.labels.numpy(),
        test.labels.numpy(),
    )


def _nested(world: World, model: _Nested, dims: Sequence[int]) -> _Representation:
    """Prefixes of one embedding, with a classifier for each."""
    return _represent(world, model.encoder, dims, lambda z: z, model.classify)


def _cut(world: World, model: _Nested, dims: Sequence[int], basis: Float[Tensor, "dim dim"]) -> _Representation:
    """Prefixes of an embedding in another orthogonal basis, with its full-size classifier cut alike."""
    full = model.head.classifier(dims[-1])

    def classify(z: Tensor) -> Sequence[Tensor]:
        return nested_logits(z, full.weight @ basis, full.bias, dims)

    return _represent(world, model.encoder, dims, lambda z: z @ basis, classify)


def _independent(world: World, models: Sequence[_Nested], dims: Sequence[int]) -> _Representation:
    """A model of its own for each size."""
    singles = [
        _represent(world, model.encoder, [size], lambda z: z, model.classify)
        for model, size in zip(models, dims, strict=True)
    ]
    return singles[0]._replace(
        gallery=[single.gallery[0] for single in singles],
        test=[single.test[0] for single in singles],
        validation_probs=torch.cat([single.validation_probs for single in singles]),
        test_probs=torch.cat([single.test_probs for single in singles]),
    )


def _identity(world: World, model: _Nested, seed: int) -> Float[Tensor, "dim dim"]:
    return torch.eye(model.head.dims[-1])


def _principal(world: World, model: _Nested, seed: int) -> Float[Tensor, "dim dim"]:
    """Right singular vectors of the training embeddings, largest first."""
    z = world.embed(model.encoder, "train").inputs.double()
    return torch.linalg.eigh(z.T @ z).eigenvectors.flip(1).float()


def _permutation(world: World, model: _Nested, seed: int) -> Float[Tensor, "dim dim"]:
    dim = model.head.dims[-1]
    return torch.eye(dim)[:, torch.randperm(dim, generator=stream_generator(seed, "permutation"))]


_BASES = {"slice": _identity, "svd": _principal, "permuted": _permutation}


@torch.no_grad()
def _probabilities(logits: Sequence[Tensor]) -> Float[Tensor, "sizes n classes"]:
    return torch.stack([entry.detach().double().softmax(dim=1) for entry in logits])


def _accuracies(logits: Sequence[Tensor], labels: Int[Tensor, " n"]) -> list[float]:
    return [float((entry.argmax(dim=1) == labels).double().mean()) for entry in logits]


def _measurement(
    found: _Representation, settings: Scale, world: World, models: Sequence[_Nested], base_seconds: float
) -> Measurement:
    dims, labels = settings.dims, found.test_labels
    head = _accuracies(list(found.test_probs), torch.from_numpy(labels))
    nearest = [
        search(new, known, 1, zero="ignore").ids[:, 0] for new, known in zip(found.test, found.gallery, strict=True)
    ]
    one_nn = [float((found.gallery_labels[ids] == labels).mean()) for ids in nearest]

    short = dims.index(settings.shortlist_dim)
    shortlist = search(found.test[short], found.gallery[short], settings.shortlist, zero="ignore").ids
    full = search(found.test[-1], found.gallery[-1], 10, zero="ignore").ids
    reranked = rerank(found.test[-1], found.gallery[-1], shortlist, zero="ignore").ids

    def precision(ids: np.ndarray) -> float:
        return map_at_k(rank_by_label(ids[:, :10], labels, found.gallery_labels), 10, norm="k")

    cascade = MatryoshkaCascade(dims).fit(found.validation_probs, found.validation_labels)
    curve = cascade.curve(found.test_probs, labels)
    picture = _neighbour_picture(world, nearest, labels, found.gallery_labels)
    return Measurement(
        metrics={
            **{f"head_{size}": value for size, value in zip(dims, head, strict=True)},
            **{f"nn_{size}": value for size, value in zip(dims, one_nn, strict=True)},
            "nn_short": one_nn[dims.index(settings.short)],
            "map_full": precision(full),
            "map_short": precision(shortlist),
            "map_adaptive": precision(reranked),
            "cascade_accuracy": float(curve.accuracy[-1]),
            "cascade_share": float(curve.expected_dim[-1]) / dims[-1],
        },
        curves={
            "classifier": Curve(dims, head, "coordinates", "classifier accuracy", log_x=True),
            "1-NN": Curve(dims, one_nn, "coordinates", "1-NN accuracy", log_x=True),
            "cascade": Curve(
                curve.expected_dim.tolist(), curve.accuracy.tolist(), "expected coordinates", "accuracy", log_x=True
            ),
        },
        pictures={} if picture is None else {"neighbours": picture},
        notes={
            "learning rates": ", ".join(f"{float(model.learning_rate):g}" for model in models),
            "parameters": sum(parameter.numel() for model in models for parameter in model.parameters()),
        },
        base_seconds=base_seconds,
    )


def _neighbour_picture(
    world: World, nearest: Sequence[np.ndarray], labels: np.ndarray, gallery_labels: np.ndarray
) -> UInt8[np.ndarray, "height width 3"] | None:
    """A row per class: a test image, then its nearest neighbour at each size, framed red where the class is wrong."""
    queries, gallery = world.images("test"), world.images("train")
    if queries is None or gallery is None:
        return None
    rows = []
    for label in range(world.num_classes):
        query = int(np.flatnonzero(labels == label)[0])
        tiles = [_tile(queries[query], (90, 90, 90))]
        for ids in nearest:
            right = gallery_labels[ids[query]] == label
            tiles.append(_tile(gallery[ids[query]], (26, 127, 55) if right else (207, 34, 46)))
        rows.append(np.concatenate(tiles, axis=1))
    return np.concatenate(rows, axis=0)


def _tile(image: UInt8[Tensor, "height width"], frame: tuple[int, int, int]) -> UInt8[np.ndarray, "side side 3"]:
    enlarged = F.interpolate(image[None, None].float(), scale_factor=3, mode="nearest")[0, 0].to(torch.uint8)
    inner = enlarged[:, :, None].expand(-1, -1, 3).numpy()
    tile = np.empty((inner.shape[0] + 4, inner.shape[1] + 4, 3), dtype=np.uint8)
    tile[:] = np.array(frame, dtype=np.uint8)
    tile[2:-2, 2:-2] = inner
    return tile
