"""The gate ablation: what each gate computes, what the arms share, and that a cell gives the same numbers again."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headgate.catalog import read_card
from headgate.data.overwrite_recall import OverwriteRecallData, label_overwrites, overwrite_recall
from headgate.data.recall import IGNORED
from headgate.errors import DataError
from headgate.measurement import Measurement
from headgate.methods.sequence.gla import GatedLinearAttention, claim
from headgate.methods.sequence.gla.claim import ARMS, SCALES, LanguageSettings, RecallSettings, Tokens, measure
from headgate.methods.sequence.gla.experiments import (
    GateKind,
    HeadLogGate,
    LanguageNet,
    RecallNet,
    RotaryAttention,
    kept_memory,
    set_gate,
)
from headgate.nn import LowRankLogGate
from headgate.train import count_parameters, seeded

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")
GATES: tuple[GateKind, ...] = ("vector", "scalar", "fixed", "fast", "none", "blind")


def gated_layer(kind: GateKind, normalizer: float = 4.0) -> GatedLinearAttention:
    with seeded(0):
        layer = GatedLinearAttention(12, 3, gate_low_rank_dim=5, gate_logit_normalizer=normalizer)
        set_gate(layer, kind)
        for parameter in layer.log_gate.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return layer


def tokens_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# The gates.


def test_the_scalar_gate_is_one_number_per_head_and_token_by_the_published_formula() -> None:
    layer = gated_layer("scalar")
    gate = layer.log_gate
    assert isinstance(gate, HeadLogGate)
    x = tokens_of(2, 7, 12)
    logits = x @ gate.gate.down.weight.T @ gate.gate.up.weight.T + gate.gate.up.bias
    assert logits.shape == (2, 7, 3)
    expected = (torch.sigmoid(logits) ** (1 / 4)).log()
    found = gate(x).unflatten(-1, (3, 2))
    torch.testing.assert_close(found[..., 0], expected)
    assert torch.equal(found[..., 0], found[..., 1])
    assert (found[:, 0] != found[:, 1]).all()


def test_fixed_decays_are_those_of_retnet_or_four_times_as_fast_and_no_gate_is_one() -> None:
    x = tokens_of(2, 7, 12)
    fixed = gated_layer("fixed").log_gate(x).exp().unflatten(-1, (3, 2))
    expected = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128])[:, None].expand(2, 7, 3, 2)
    torch.testing.assert_close(fixed, expected)
    fast = gated_layer("fast").log_gate(x).exp().unflatten(-1, (3, 2))
    torch.testing.assert_close(fast, 1 - 4 * (1 - expected))
    none = gated_layer("none").log_gate(x)
    assert none.shape == (2, 7, 6)
    assert (none == 0).all()


def test_without_a_gate_the_layer_is_plain_linear_attention() -> None:
    layer = gated_layer("none")
    x = tokens_of(2, 9, 12)
    q, k, v = (proj(x).unflatten(-1, (3, -1)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = (q @ k.mT * 2**-0.5).tril() @ v
    expected = layer.o_proj(layer.norm(o.transpose(1, 2)).flatten(2) * F.silu(layer.g_proj(x)))  # type: ignore[misc]
    torch.testing.assert_close(layer(x), expected)


def test_the_blind_gate_is_one_learned_constant_per_channel() -> None:
    layer = gated_layer("blind")
    gate = layer.log_gate
    assert isinstance(gate, LowRankLogGate)
    found = gate(tokens_of(2, 7, 12))
    torch.testing.assert_close(found, (F.logsigmoid(gate.up.bias) / 4).expand(2, 7, 6))
    assert len(found[0, 0].unique()) == 6


def test_the_blind_gate_stays_blind_under_weight_decay_while_its_constants_learn() -> None:
    settings = dataclasses.replace(smoke(), steps=5, num_test=4)
    net, _ = claim._train_recall("bias_only", 100, settings, 1e-2)
    gate = net.mixer.log_gate
    assert isinstance(gate, LowRankLogGate)
    assert (gate.down.weight == 0).all()
    assert (gate.up.bias != 0).all()


def test_the_vector_gate_is_the_layer_s_own() -> None:
    with seeded(0):
        plain = GatedLinearAttention(12, 3)
    with seeded(0):
        layer = GatedLinearAttention(12, 3)
        set_gate(layer, "vector")
    x = tokens_of(2, 7, 12)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("kind", GATES)
def test_nets_with_every_gate_are_causal_and_can_carry_on_from_their_gates(kind: GateKind) -> None:
    with seeded(3):
        net = RecallNet(4, 6, 16, 2, kind, 1.0)
    data = overwrite_recall(3, 20, 4, 6, seed=1)
    changed = data.values.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 7
    before, after = net(data.keys, data.values), net(data.keys, changed)
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert not torch.allclose(after[:, 12:], before[:, 12:])


def test_rotary_attention_is_causal_and_sees_distances_not_places() -> None:
    with seeded(0):
        mixer = RotaryAttention(16, 2)
        for parameter in mixer.parameters():
            nn.init.normal_(parameter, std=0.5)
    x = tokens_of(1, 10, 16)
    y = mixer(x)
    torch.testing.assert_close(mixer(x[:, :6]), y[:, :6], rtol=1e-4, atol=1e-5)
    # Two equal tokens in other order: without positions the last output would be the same.
    swapped = x[:, [1, 0, *range(2, 10)]]
    assert not torch.allclose(mixer(swapped)[:, -1], y[:, -1], atol=1e-3)


# Sizes.


def test_parameters_are_the_promised_ones_and_equal_within_eight_percent() -> None:
    # Embeddings 8·64 + 17·64, two norms, head 64·16 + 16; q, k 64·32 each, v, output gate, output 64·64 each, norm 32.
    rest = 25 * 64 + 2 * 64 + 65 * 16 + 2 * 64 * 32 + 3 * 64 * 64 + 32
    expected = {
        "vector": rest + 64 * 16 + 17 * 32,
        "scalar": rest + 64 * 16 + 17 * 2,
        "fixed": rest,
        "fixed_fast": rest,
        "none": rest,
        "bias_only": rest + 64 * 16 + 17 * 32,
        "vector_16": rest + 64 * 16 + 17 * 32,
        "scalar_16": rest + 64 * 16 + 17 * 2,
        "attention": 25 * 64 + 2 * 64 + 65 * 16 + 4 * 64 * 64,
    }
    assert set(expected) == set(ARMS)
    for arm, (gate, normalizer) in ARMS.items():
        net = RecallNet(8, 16, 64, 2, gate, normalizer)
        assert count_parameters(net) == expected[arm]
        assert abs(expected[arm] / expected["vector"] - 1) <= 0.08


@pytest.mark.parametrize("scale", ["text", "paper"])
def test_language_models_are_equal_within_eight_percent(scale: str) -> None:
    settings = SCALES[scale]
    assert isinstance(settings, LanguageSettings)
    counts = {}
    with torch.device("meta"):
        for arm in settings.learning_rates:
            gate, normalizer = ARMS[arm]
            assert gate is not None
            net = LanguageNet(settings.vocab_size, gate, gate_logit_normalizer=normalizer, **settings.sizes)
            counts[arm] = count_parameters(net)
    assert min(counts.values()) >= 0.92 * counts["vector_16"] == 0.92 * max(counts.values())
    if scale == "paper":
        assert counts["vector_16"] == 341_707_776


# What the arms share.


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "vector"])
def test_all_arms_start_alike_outside_their_gate(arm: str) -> None:
    nets = []
    for gate, normalizer in (ARMS["vector"], ARMS[arm]):
        with seeded(5):
            nets.append(RecallNet(8, 16, 64, 2, gate, normalizer))
    first, other = (dict(net.named_parameters()) for net in nets)
    shared = [name for name in other if "log_gate" not in name and name in first]
    assert len(shared) >= (6 if arm == "attention" else 12)
    assert all(torch.equal(first[name], other[name]) for name in shared)


def test_all_arms_see_the_same_data_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def recorded(*args: Any, **options: Any) -> OverwriteRecallData:
        data = overwrite_recall(*args, **options)
        seen.append(torch.stack((data.keys, data.values)))
        return data

    monkeypatch.setattr(claim, "overwrite_recall", recorded)
    monkeypatch.setitem(SCALES, "smoke", dataclasses.replace(smoke(), steps=3))
    courses = []
    for arm in ("vector", "none", "attention"):
        measure(arm, 100, "smoke")
        courses.append(list(seen))
        seen.clear()
    assert [len(course) for course in courses] == [5, 5, 5]  # three steps, the test, the long test
    assert all(torch.equal(a, b) for course in courses[1:] for a, b in zip(courses[0], course, strict=True))
    assert not torch.equal(courses[0][0], courses[0][1])


def test_training_validation_and_test_draw_from_streams_of_their_own() -> None:
    settings = dataclasses.replace(smoke(), num_test=16)
    parts = [claim._batch(0, settings, 0), *(claim._draw(0, part, settings, 1) for part in ("validation", "test"))]
    parts.append(claim._draw(1, "test", settings, 1))
    for index, part in enumerate(parts):
        assert all(not torch.equal(part.keys, other.keys) for other in parts[index + 1 :])


# The card.


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    assert set(ARMS) == {arm.name for arm in CARD.claim.arms}
    for scale, settings in SCALES.items():
        assert set(settings.learning_rates) == {arm.name for arm in CARD.claim.arms_at(scale)}


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"arm must be one of vector, scalar, fixed, .* at scale 'smoke', got 'mamba'"):
        measure("mamba", 0, "smoke")
    with pytest.raises(
        ValueError, match="arm must be one of vector_16, scalar_16, fixed, fixed_fast, none at scale 'text'"
    ):
        measure("bias_only", 0, "text")
    with pytest.raises(ValueError, match="scale must be one of smoke, laptop, longer, text, paper, got 'huge'"):
        measure("vector", 0, "huge")


# Cells.


def smoke() -> RecallSettings:
    settings = SCALES["smoke"]
    assert isinstance(settings, RecallSettings)
    return settings


@pytest.fixture(scope="module")
def cells() -> dict[str, Measurement]:
    return {arm: measure(arm, 100, "smoke") for arm in SCALES["smoke"].learning_rates}


def test_every_criterion_s_metric_is_measured(cells: dict[str, Measurement]) -> None:
    for criterion in CARD.claim.criteria_at("smoke"):
        for arm in (criterion.arm, criterion.against):
            assert criterion.metric in cells[arm or ""].metrics


def test_a_cell_is_the_same_when_measured_again(cells: dict[str, Measurement]) -> None:
    before = torch.get_rng_state()
    for arm in ("vector", "attention"):
        again = measure(arm, 100, "smoke")
        assert again.metrics == cells[arm].metrics
        assert again.curves == cells[arm].curves
        assert again.notes == cells[arm].notes
        for name, picture in again.pictures.items():
            np.testing.assert_array_equal(picture, cells[arm].pictures[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_is_another_cell(cells: dict[str, Measurement]) -> None:
    assert measure("fixed", 101, "smoke").curves["training loss"].y != cells["fixed"].curves["training loss"].y


def test_gates_are_reported_as_they_are(cells: dict[str, Measurement]) -> None:
    name = "gates by step"
    assert list(cells["none"].curves[name].y) == pytest.approx([1] * 4)
    fixed = cells["fixed"].curves[name].y
    assert max(fixed) - min(fixed) < 1e-5
    assert 1 - 1 / 32 <= fixed[0] <= 1 - 1 / 64
    assert all(0.4 < value < 0.6 for value in cells["vector"].curves[name].y)  # hardly trained: σ(0)
    assert all(0.94 < value < 0.97 for value in cells["vector_16"].curves[name].y)  # σ(0)^(1/16)
    blind = cells["bias_only"].curves[name].y
    assert max(blind) - min(blind) < 1e-5
    assert name not in cells["attention"].curves
    assert {arm for arm, cell in cells.items() if cell.pictures} == {
        "vector", "scalar", "bias_only", "vector_16", "scalar_16",
    }  # fmt: skip


# How cells are scored.


class Dictionary(nn.Module):
    """Answers every query from a dictionary; asked to forget nothing, it gives the first value of a key."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        logits = torch.zeros(*keys.shape, 16)
        for row in range(len(keys)):
            memory: dict[int, int] = {}
            for step, (key, value) in enumerate(zip(keys[row].tolist(), values[row].tolist(), strict=True)):
                if value < 16 and not (self.first and key in memory):
                    memory[key] = value
                logits[row, step, memory.get(key, 0)] = 1
        return logits


def test_who_remembers_the_last_value_is_always_right() -> None:
    data = claim._draw(0, "test", dataclasses.replace(smoke(), num_test=20), 1)
    assert claim._hits(Dictionary(first=False), data).mean() == 1  # type: ignore[arg-type]


def test_who_never_forgets_is_right_on_first_values_alone() -> None:
    data = claim._draw(0, "test", dataclasses.replace(smoke(), num_test=60), 4)
    hits = claim._hits(Dictionary(first=True), data)  # type: ignore[arg-type]
    curve = claim._binned(data.writes, hits, 4, "writes", "accuracy")
    assert curve.y[0] == 1
    assert max(curve.y[1:]) < 0.4
    assert hits.mean() < 0.5


def test_bins_double_and_are_named_by_their_ends() -> None:
    number = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 9]])
    values = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    curve = claim._binned(number, values, 4, "n", "accuracy")
    assert curve.x == [1, 2, 4, 8, 16]
    assert curve.y == [1, 0, 0.5, 1, 0]
    shorter = claim._binned(number, values, 3, "n", "accuracy")
    assert (shorter.x, shorter.y) == ([1, 2, 4, 8], [1, 0, 0.5, 0.5])  # the last bin holds all above
    assert math.isnan(claim._binned(number, values, 5, "n", "accuracy").y[5])


def test_places_are_counted_in_halves_of_the_trained_length() -> None:
    keys, values = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1]])
    data = label_overwrites(keys, values, 1)
    curve = claim._along(data, torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]), 4)
    assert curve.x == [2, 4, 6, 8]
    assert curve.y == [1, 0.5, 0, 1]


def test_the_course_averages_equal_parts() -> None:
    curve = claim._course([4.0, 2.0, 3.0, 1.0], "loss", points=2)
    assert (curve.x, curve.y) == ([2, 4], [3.0, 2.0])


def test_kept_memory_equals_a_loop_over_tokens() -> None:
    with seeded(2):
        net = RecallNet(3, 5, 16, 2, "vector", 1.0)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
    data = overwrite_recall(6, 30, 3, 5, seed=4)
    found = kept_memory(net, data)
    x = net.norm(net.embed(data.keys, data.values))
    gates, k = net.mixer.log_gate(x).exp(), net.mixer.k_proj(x)  # type: ignore[operator]
    for own in range(3):
        used = k[(data.keys == own) & (data.values < 5)].square().mean(0)
        for other in range(3):
            for asked in (False, True):
                mean = gates[(data.keys == other) & ((data.values == 5) == asked)].mean(0)
                expected = (used * mean).sum() / used.sum()
                assert found[own, other + 3 * asked].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_gate_that_clears_the_rows_of_the_written_key_shows_as_a_dark_diagonal() -> None:
    class Clears(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.abs() > 0.5, -20.0, 0.0)

    net = RecallNet(2, 1, 4, 1, "vector", 1.0)
    layer = net.mixer
    assert isinstance(layer, GatedLinearAttention)
    # Key 0 lives in row 0, key 1 in row 1; a query has the embedding of neither.
    with torch.no_grad():
        net.key_embedding.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
        net.value_embedding.weight.copy_(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 100.0]]))
        layer.k_proj.weight.copy_(torch.eye(2, 4))
    layer.log_gate = nn.Sequential(Keep(2), Clears())
    kept = kept_memory(net, overwrite_recall(4, 30, 2, 1, seed=1))
    torch.testing.assert_close(kept, torch.tensor([[0.0, 1, 1, 1], [1, 0, 1, 1]]), atol=1e-4, rtol=0)


class Keep(nn.Module):
    """The first channels."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.count]


# Language models.


def pattern(length: int = 3000) -> np.ndarray:
    return np.tile(np.arange(6, dtype=np.uint8), length // 6)


TINY = LanguageSettings(
    corpus=lambda: Tokens(pattern(), pattern(600), pattern(600)),
    learning_rates={"vector_16": 1e-2, "none": 1e-2},
    steps=30,
    warmup=5,
    batch_size=4,
    windows_at_once=2,
    length=12,
    vocab_size=8,
    sizes={"dim": 16, "depth": 2, "num_heads": 2, "hidden_dim": 16},
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LanguageSettings:
    monkeypatch.setitem(SCALES, "text", TINY)
    return TINY


def test_a_language_model_learns_a_pattern_and_the_cell_is_the_same_again(tiny: LanguageSettings) -> None:
    first, again = measure("vector_16", 100, "text"), measure("vector_16", 100, "text")
    assert first == again
    assert first.metrics["bits"] < 1.5 < math.log2(8)
    assert first.metrics["perplexity"] == pytest.approx(2 ** first.metrics["bits"])
    for criterion in CARD.claim.criteria_at("text"):
        assert criterion.metric in first.metrics
    assert measure("vector_16", 101, "text").metrics != first.metrics


def test_the_gates_of_all_blocks_are_reported(tiny: LanguageSettings) -> None:
    assert set(measure("none", 100, "text").curves["gates"].y) == {1.0}
    gates = measure("vector_16", 100, "text").curves["gates"]
    assert gates.x[0] == 0
    assert gates.x[-1] == 100
    assert list(gates.y) == sorted(gates.y)
    assert 0 < gates.y[0] < gates.y[-1] < 1


def test_windows_are_scored_side_by_side_each_from_an_empty_memory() -> None:
    with seeded(1):
        net = LanguageNet(8, "vector", **TINY.sizes)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    tokens = pattern(120)[:100]
    scores = claim._score_language(net, tokens, TINY, factor=2)
    assert scores.bits.shape == (4, 24)  # starts 0, 24, 48, 72: each window needs one token more
    for row in range(4):
        window = torch.from_numpy(tokens[24 * row : 24 * row + 25].astype(np.int64))
        probabilities = net(window[None, :-1])[0].double().softmax(-1)
        expected = -probabilities[torch.arange(24), window[1:]].log2()
        torch.testing.assert_close(scores.bits[row], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(scores.hits[row] == 1, probabilities.argmax(-1) == window[1:])


def test_the_rate_rises_from_a_tenth_and_falls_back_to_it() -> None:
    factor = claim._schedule(100, 20)
    assert [factor(step) for step in (0, 10, 20)] == pytest.approx([0.1, 0.55, 1.0])
    assert factor(60) == pytest.approx(0.55)
    assert factor(100) == pytest.approx(0.1)


def test_the_documentation_is_cut_into_parts_that_make_up_the_whole() -> None:
    parts = claim.documentation_bytes()
    whole = np.concatenate(parts)
    assert whole.tobytes().decode().startswith("The ")
    assert [round(len(part) / len(whole), 3) for part in parts] == [0.8, 0.1, 0.1]


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of token files, and the paper's scale with a small model."""
    monkeypatch.setenv("HEADGATE_SLIMPAJAMA", str(tmp_path))
    monkeypatch.setitem(SCALES, "paper", dataclasses.replace(TINY, corpus=claim.slimpajama, steps=6))
    for part in Tokens._fields:
        np.save(tmp_path / f"{part}.npy", pattern(600).astype(np.uint16))
    return tmp_path


def test_the_paper_s_experiment_reads_token_files(paper: Path) -> None:
    assert measure("none", 0, "paper").metrics["bits"] < 3.5


def test_missing_and_wrong_token_files_are_named(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(paper / "train.npy", np.full(600, 8))
    with pytest.raises(DataError, match=r"token ids must lie in \[0, 8\), got 8 to 8"):
        measure("none", 0, "paper")
    np.save(paper / "train.npy", np.zeros(48, dtype=np.int64))
    with pytest.raises(DataError, match="train must hold more than 48 tokens, got 48"):
        measure("none", 0, "paper")
    np.save(paper / "train.npy", np.zeros((6, 100), dtype=np.int64))
    with pytest.raises(DataError, match=r"train\.npy must hold a vector of integers, got int64 \(6, 100\)"):
        measure("none", 0, "paper")
    np.save(paper / "train.npy", np.zeros(600))
    with pytest.raises(DataError, match=r"must hold a vector of integers, got float64 \(600,\)"):
        measure("none", 0, "paper")
    (paper / "train.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"train\.npy cannot be read"):
        measure("none", 0, "paper")
    (paper / "train.npy").unlink()
    with pytest.raises(DataError, match=r"train\.npy does not exist"):
        measure("none", 0, "paper")
    monkeypatch.delenv("HEADGATE_SLIMPAJAMA")
    with pytest.raises(DataError, match="set HEADGATE_SLIMPAJAMA"):
        measure("none", 0, "paper")


def test_queries_without_an_answer_train_nothing() -> None:
    with seeded(0):
        net = RecallNet(2, 3, 8, 2, "vector", 1.0)
    data = label_overwrites(torch.tensor([[0, 0, 1]]), torch.tensor([[1, 3, 3]]), 3)
    assert data.targets.tolist() == [[IGNORED, 1, IGNORED]]
    expected = F.cross_entropy(net(data.keys, data.values)[0, 1:2], torch.tensor([1]))
    torch.testing.assert_close(claim._recall_loss(net, data), expected)
