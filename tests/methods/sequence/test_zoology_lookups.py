"""Sparse lookups: who looks up, what it finds, what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headgate.methods.sequence.zoology import SparseLookups
from headgate.methods.sequence.zoology.selectors import (
    RepeatSelector,
    SequenceSoftmaxSelector,
    SigmoidSelector,
    SoftmaxPairSelector,
)

DIM, LENGTH = 8, 20


class Given(nn.Module):
    """A selector that returns stored scores."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.register_buffer("scores", scores)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        return self.scores[:, : x.shape[1]]


def draw(seed: int = 0, batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(seed: int = 0, **options: object) -> tuple[SparseLookups, Tensor]:
    torch.manual_seed(seed)
    scores = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SparseLookups(DIM, 2, selector=Given(scores), **options).double(), scores  # type: ignore[arg-type]


def test_training_mixes_every_token_by_its_score() -> None:
    layer, scores = given()
    x = draw()
    torch.testing.assert_close(layer(x), x + scores[..., None] * layer.attention(x))


@pytest.mark.parametrize("num_lookups", [None, 3, 50])
def test_evaluation_lets_the_highest_scores_attend_and_passes_the_others_through(num_lookups: int | None) -> None:
    layer, scores = given(num_lookups=num_lookups)
    x = draw()
    count = min(math.ceil(math.sqrt(LENGTH)) if num_lookups is None else num_lookups, LENGTH)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(3):
        chosen[row, scores[row].argsort(descending=True)[:count]] = True
    expected = torch.where(chosen[..., None], x + scores[..., None] * layer.attention(x), x)
    layer.eval()
    assert torch.equal(layer.selected(x), chosen)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("num_lookups", [None, 3])
def test_the_prefix_rule_counts_among_the_tokens_so_far(num_lookups: int | None) -> None:
    layer, scores = given(selection="prefix", num_lookups=num_lookups)
    layer.eval()
    x = draw()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(3):
        for t in range(LENGTH):
            budget = math.ceil(math.sqrt(t + 1)) if num_lookups is None else num_lookups
            chosen[row, t] = int((scores[row, :t] > scores[row, t]).sum()) < budget
    assert torch.equal(layer.selected(x), chosen)
    torch.testing.assert_close(layer(x), torch.where(chosen[..., None], x + scores[..., None] * layer.attention(x), x))


def test_the_threshold_rule_and_rows_of_different_counts() -> None:
    layer, scores = given(selection="threshold", threshold=0.8)
    layer.eval()
    x = draw()
    chosen = scores > 0.8
    assert len({int(count) for count in chosen.sum(1)}) > 1
    torch.testing.assert_close(layer(x), torch.where(chosen[..., None], x + scores[..., None] * layer.attention(x), x))
    layer.threshold = 1.0
    assert torch.equal(layer(x), x)


def test_whole_sequence_selection_looks_ahead_as_published() -> None:
    torch.manual_seed(0)
    layer = SparseLookups(DIM, num_lookups=2).double().eval()
    x = draw()
    louder = x.clone()
    louder[:, -3:] = 50 * layer.selector.proj.weight
    assert layer.selected(x)[:, :-3].any()
    assert not layer.selected(louder)[:, :-3].any()


def test_positions_from_outside_take_the_place_of_the_selection() -> None:
    layer, scores = given()
    layer.eval()
    x = draw()
    positions = torch.tensor([[0, 7], [3, 19], [1, 2]])
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, positions, True)
    expected = torch.where(chosen[..., None], x + scores[..., None] * layer.attention(x), x)
    torch.testing.assert_close(layer(x, positions=positions), expected)
    with pytest.raises(ValueError, match="positions must have batch=3"):
        layer(x, positions=positions[:2])


def test_evaluation_computes_attention_for_the_chosen_queries_only() -> None:
    def flops(num_lookups: int, training: bool) -> int:
        layer = SparseLookups(64, num_lookups=num_lookups).train(training)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            layer(torch.randn(1, 512, 64))
        return counter.get_total_flops()

    scores_keys_and_values = 2 * 512 * 64 * (1 + 128)
    assert flops(512, False) == flops(512, True)
    few, all_of_them = (flops(count, False) - scores_keys_and_values for count in (8, 512))
    assert few == all_of_them / 64


@pytest.mark.parametrize("num_lookups", [None, 2])
def test_the_auxiliary_loss_is_the_hinge_on_the_mean_score(num_lookups: int | None) -> None:
    torch.manual_seed(0)
    layer = SparseLookups(DIM, num_lookups=num_lookups, penalty=0.5).double()
    x = draw()
    y, aux_loss = layer(x, return_aux=True)
    torch.testing.assert_close(y, layer(x))
    budget = (math.sqrt(LENGTH) if num_lookups is None else num_lookups) / LENGTH
    torch.testing.assert_close(aux_loss, 0.5 * (layer.selector(x).mean() - budget))
    aux_loss.backward()
    assert layer.selector.proj.weight.grad.abs().sum() > 0
    nn.init.zeros_(layer.attention.qkv.weight)
    layer.selector.proj.weight.data = -100 * x.mean((0, 1))[None]
    sleepy = 100 * torch.ones_like(x) * torch.sign(x.mean((0, 1)))
    assert layer(sleepy, return_aux=True)[1] == 0
    assert layer.eval()(x, return_aux=True)[1] == 0


def test_only_the_sigmoid_selector_is_held_to_few_tokens() -> None:
    kinds = ("sigmoid", "sma", "softmax", "repeat")
    assert [SparseLookups(DIM, selector=kind).has_aux_loss for kind in kinds] == [True, False, False, False]  # type: ignore[arg-type]
    assert not SparseLookups(DIM, penalty=0.0).has_aux_loss
    assert [SparseLookups(DIM, selector=kind).needs_tokens for kind in kinds] == [False, False, False, True]  # type: ignore[arg-type]


def test_learned_selectors_are_their_formulas() -> None:
    torch.manual_seed(0)
    x = draw().float()
    sigmoid, pair, sequence = SigmoidSelector(DIM), SoftmaxPairSelector(DIM), SequenceSoftmaxSelector(DIM)
    torch.testing.assert_close(sigmoid(x), torch.sigmoid(x @ sigmoid.proj.weight[0]))
    assert pair.temperature.item() == pytest.approx(0.3 * 8**0.5)
    two = (pair.proj(x) / (0.3 * 8**0.5)).exp()
    torch.testing.assert_close(pair(x), two[..., 1] / two.sum(-1))
    torch.testing.assert_close(sequence(x).sum(1), torch.ones(3))
    torch.testing.assert_close(sequence(x).log().diff(dim=1), sequence.proj(x).squeeze(-1).diff(dim=1))


def test_repeated_tokens_are_those_that_stood_before() -> None:
    tokens = torch.tensor([[4, 4, 1, 0, 4, 0, 1], [3, 2, 1, 0, 5, 6, 7]])
    x = torch.zeros(2, 7, DIM)
    expected = torch.tensor([[0, 1, 0, 0, 1, 1, 1], [0] * 7]).float()
    assert torch.equal(RepeatSelector()(x, tokens), expected)
    expected[0, 5] = 0
    assert torch.equal(RepeatSelector(ignored_token=0)(x, tokens), expected)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (5, 30), generator=generator)
    by_hand = [[float(row.index(token) < place) for place, token in enumerate(row)] for row in tokens.tolist()]
    assert RepeatSelector()(torch.zeros(5, 30, DIM), tokens).tolist() == by_hand


def test_programmed_lookups_attend_from_repeated_tokens_in_both_modes() -> None:
    torch.manual_seed(0)
    layer = SparseLookups(DIM, selector="repeat").double()
    x, tokens = draw(), torch.randint(8, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    repeated = RepeatSelector()(x, tokens)[..., None]
    expected = x + repeated * layer.attention(x)
    torch.testing.assert_close(layer(x, tokens), expected)
    torch.testing.assert_close(layer.eval()(x, tokens), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"selector": "magic"}, "selector must be one of sigmoid"),
        ({"selection": "magic"}, "selection must be"),
        ({"selector": "repeat", "num_lookups": 3}, "leave num_lookups out"),
        ({"selector": "repeat", "selection": "topk"}, "leave num_lookups out"),
        ({"num_lookups": 0}, "num_lookups must be positive"),
        ({"penalty": -1.0}, "penalty"),
        ({"num_heads": 3}, "num_heads must divide dim"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SparseLookups(DIM, **options)  # type: ignore[arg-type]


def test_missing_or_foreign_tokens_are_refused() -> None:
    layer = SparseLookups(DIM, selector="repeat")
    with pytest.raises(TypeError, match="tokens must be given"):
        layer(torch.zeros(2, 5, DIM))
    with pytest.raises(ValueError, match="tokens must have length=5"):
        layer(torch.zeros(2, 5, DIM), torch.zeros(2, 4, dtype=torch.int64))
