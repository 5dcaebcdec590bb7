"""A model small enough for a laptop that looks at a picture with a question in mind, and answers yes or no."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from headgate.data.seeding import stream_generator
from headgate.methods.steering.ritual.worlds import OBJECTS, Scenes, ask
from headgate.train import fit, make_optimizer

__all__ = ["Reader", "train_reader"]


class Reader(nn.Module):
    """Two convolutions, attention of the question over the 6 x 6 features, and a perceptron.

    Args:
        dim: channels of the second convolution, and of the question's embedding.
        hidden: units of the perceptron.
    """

    def __init__(self, dim: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, dim, 3, stride=2, padding=1), nn.ReLU()
        )
        self.position = nn.Parameter(0.02 * torch.randn(36, dim))
        self.question = nn.Embedding(OBJECTS, dim)
        self.attention = nn.MultiheadAttention(dim, num_heads=2, batch_first=True)
        self.answer = nn.Sequential(nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(
        self, images: Float[Tensor, "batch 3 24 24"], things: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch 2"]:
        """Logits of the two words "no" and "yes"."""
        cells = self.features(images).flatten(2).transpose(1, 2) + self.position
        question = self.question(things)
        seen, _ = self.attention(question[:, None], cells, cells, need_weights=False)
        return self.answer(torch.cat([seen[:, 0], question], dim=1))


def train_reader(
    model: Reader, scenes: Scenes, *, steps: int, learning_rate: float = 2e-3, batch_size: int = 64, seed: int = 0
) -> None:
    """Train on questions of the kind "random", drawn anew for every step."""

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        questions = ask(scenes, batch_size, "random", stream_generator(seed, "training questions", step))
        return scenes.images[questions.scene], questions.thing, questions.answer.long()

    fit(
        model,
        batch,
        _loss,
        steps=steps,
        optimizer=make_optimizer(model, learning_rate=learning_rate, weight_decay=0.01),
    )


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    images, things, answers = batch
    return F.cross_entropy(model(images, things), answers)
