"""The claim's experiments: networks and data of every arm, scores by hand, costs, and the paper's recipe in small."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headgate.catalog import read_card
from headgate.data import IGNORED
from headgate.data.markers import MarkerGrids, marker_targets
from headgate.errors import HeadgateError
from headgate.methods.vision.vig import claim, experiments, imagenet
from headgate.methods.vision.vig.claim import RATES, SCALES, CostScale, ImageScale, MarkerScale, PaperScale, measure
from headgate.methods.vision.vig.experiments import (
    GridClassifier,
    MarkerNet,
    MarkerScores,
    Sizes,
    Training,
    score_markers,
    train_markers,
)
from headgate.timing import Effort, PeakMemory, load_builder
from headgate.train import DivergedError, History, count_parameters

CARD = read_card(Path(claim.__file__).parent / "card.toml", claim.__package__ or "")
TINY = Sizes(dim=12, depth=1, mlp_dim=16, vit_mlp_dim=20)
TRAINED = [scale for scale, settings in SCALES.items() if not isinstance(settings, CostScale)]


def arms_at(scale: str) -> set[str]:
    settings = SCALES[scale]
    return set(claim._CONTENDERS) if isinstance(settings, CostScale) else set(settings.rates)


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale in SCALES:
        assert arms_at(scale) == {arm.name for arm in CARD.claim.arms_at(scale)}


def measured_at(scale: str) -> dict[str, set[str]]:
    """Arm → the metrics that it reports."""
    settings = SCALES[scale]
    if isinstance(settings, CostScale):
        common = {"time_exponent", "last_exponent", "block_milliseconds", "block_mebibytes"}
        of_vig = {"multiply_adds", "multiply_adds_published", "block_memory_ratio"}
        of_vig |= {"model_speed_ratio", "model_memory_share"}
        return {"vig": common | of_vig, "vit": common | {"multiply_adds"}, "explicit": common}
    metrics = {"accuracy"}
    if isinstance(settings, MarkerScale):
        metrics |= {"last_f", "next_b", "above"}
    if isinstance(settings, PaperScale):
        metrics |= {f"accuracy_{size}" for size in settings.test_sizes[1:]}
    return dict.fromkeys(settings.rates, metrics)


@pytest.mark.parametrize("scale", SCALES)
def test_every_criterion_s_metrics_are_measured_at_its_scales(scale: str) -> None:
    criteria = CARD.claim.criteria_at(scale)
    assert criteria
    for criterion in criteria:
        assert criterion.metric in measured_at(scale)[criterion.arm]
        if criterion.against is not None:
            assert (criterion.against_metric or criterion.metric) in measured_at(scale)[criterion.against]
    for metrics in measured_at(scale).values():
        assert metrics <= set(CARD.claim.metrics)


def test_criteria_of_the_laptop_are_those_of_the_paper_s_card() -> None:
    margins = {
        (criterion.arm, criterion.against, criterion.metric): criterion.margin
        for criterion in CARD.claim.criteria_at("laptop")
    }
    assert margins == {
        ("vig", "shared_gate", "last_f"): 0.04,
        ("vig", "shared_gate", "next_b"): 0.04,
        ("vig", "forward_only", "next_b"): 0.15,
        ("vig", "no_2d", "above"): 0.25,
        **{("vig", arm, "accuracy"): 0 for arm in ("shared_gate", "forward_only", "no_2d", "vit")},
    }


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="arm must be one of vig, vit, shared_gate, forward_only, no_2d at scale smoke"
    ):
        measure("explicit", 0, "smoke")
    with pytest.raises(ValueError, match="arm must be one of vig, vit, explicit at scale cost, got 'no_2d'"):
        measure("no_2d", 0, "cost")
    with pytest.raises(ValueError, match=r"scale must be one of smoke, laptop, .*, got 'huge'"):
        measure("vig", 0, "huge")


# --- networks -------------------------------------------------------------------------------------------------------


def networks(scale: str) -> dict[str, nn.Module]:
    settings = SCALES[scale]
    if isinstance(settings, PaperScale):
        with torch.device("meta"):
            return {arm: imagenet.build_classifier(arm, **settings.options) for arm in settings.rates}
    if isinstance(settings, MarkerScale):
        return {arm: MarkerNet(arm, settings.sizes, settings.grid) for arm in settings.rates}
    assert isinstance(settings, ImageScale)
    shape = (1, 8, 8) if scale == "digits" else (3, 32, 32)
    return {arm: GridClassifier(arm, settings.sizes, shape, settings.patch_size, 10) for arm in settings.rates}


@pytest.mark.parametrize("scale", ["laptop", "digits", "cifar10", "paper"])
def test_arms_have_equally_many_parameters(scale: str) -> None:
    counts = {arm: count_parameters(network) for arm, network in networks(scale).items()}
    for arm, count in counts.items():
        limit = 0.005 if arm == "vit" and scale != "paper" else 0.025
        assert abs(count / counts["vig"] - 1) <= limit, (arm, counts)


def test_the_laptop_s_network_is_as_large_as_the_card_says() -> None:
    counts = {arm: count_parameters(network) for arm, network in networks("laptop").items()}
    assert counts["vig"] == 56_017
    # Per block a shared gate saves 24 · 16 weights and 24 biases.
    assert counts["vig"] - counts["shared_gate"] == 2 * (24 * 16 + 24)
    assert counts["forward_only"] == counts["shared_gate"]
    assert counts["vig"] - counts["no_2d"] == 2 * (48 * 9 + 16)


def test_the_paper_s_models_are_the_presets() -> None:
    models = networks("paper")
    assert count_parameters(models["vig"]) == 5_834_536
    assert count_parameters(models["vit"]) == 5_717_416
    assert models["vit"].blocks[11].drop_path.rate == pytest.approx(0.1)
    assert models["vig"].blocks[11].drop_path.rate == 0
    assert models["no_2d"].blocks[0].mixer.conv is None
    assert not models["forward_only"].blocks[0].mixer.bidirectional


@pytest.mark.parametrize("kind", ["markers", "images"])
def test_arms_start_from_the_same_numbers_where_they_have_the_same_parts(kind: str) -> None:
    states = []
    for arm in ("vig", "vit", "no_2d"):
        torch.manual_seed(3)
        network = MarkerNet(arm, TINY, (4, 4)) if kind == "markers" else GridClassifier(arm, TINY, (3, 8, 8), 2, 5)
        states.append({name: tensor for name, tensor in network.state_dict().items() if "blocks" not in name})
    for state in states[1:]:
        for name in states[0]:
            if "norm" not in name and "positions" not in name:
                assert torch.equal(state[name], states[0][name]), name


def test_weights_start_as_those_of_vig_but_for_the_centre_tap() -> None:
    torch.manual_seed(0)
    network = MarkerNet("vig", Sizes(dim=96, depth=1, mlp_dim=128, vit_mlp_dim=8), (4, 4))
    block = network.trunk.blocks[0]
    assert block.mlp.gate_value.weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = 2**-2.5 * math.sqrt(6 / (96 + 192))
    assert block.mixer.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    taps = block.mixer.conv.weight[:, 0]
    reach = 2**-2.5 * math.sqrt(6 / (9 + 9 * 96))
    assert (taps[:, 1, 1] - 0.3).abs().max().item() <= reach
    outer = taps.flatten(1)[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    assert outer.abs().max().item() <= reach
    assert not network.heads[0].bias.any()
    assert network.trunk.positions.std().item() == pytest.approx(0.02, rel=0.1)


def randomised(arm: str, position_std: float = 0.0) -> MarkerNet:
    """A network with large random weights, so that nothing is hidden by small numbers."""
    torch.manual_seed(0)
    network = MarkerNet(arm, dataclasses.replace(TINY, depth=2, position_std=position_std), (4, 5)).double()
    for name, parameter in network.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.5)
    return network.eval()


def mirrored(arm: str, position_std: float = 0.0) -> float:
    """How far the answers for a grid turned upside down are from the turned answers."""
    symbols = torch.randint(17, (3, 4, 5), generator=torch.Generator().manual_seed(1))
    network = randomised(arm, position_std)
    with torch.no_grad():
        plain, turned = network(symbols), network(symbols.flip(1, 2))
    return max(float((a.flip(1, 2) - b).abs().max()) for a, b in zip(plain, turned, strict=True))


def test_only_a_shared_gate_without_windows_and_positions_is_blind_to_direction() -> None:
    assert mirrored("symmetric") < 1e-9
    for arm in ("vig", "shared_gate", "forward_only", "no_2d"):
        assert mirrored(arm) > 1e-3, arm
    assert mirrored("symmetric", position_std=0.02) > 1e-3


def test_a_network_of_attention_without_positions_knows_no_places() -> None:
    symbols = torch.randint(17, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    network = randomised("vit")
    plain = network(symbols)[2].flatten(1, 2)
    shuffled = network(symbols.flatten(1)[:, order].view(2, 4, 5))[2].flatten(1, 2)
    torch.testing.assert_close(shuffled, plain[:, order])


def test_classifiers_average_over_patches_in_their_places() -> None:
    torch.manual_seed(0)
    network = GridClassifier("vig", TINY, (2, 6, 8), 2, 5).double()
    images = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    features = network.patch_embedding(images)
    assert features.shape == (2, 12, 3, 4)
    tokens = network.trunk(features)
    torch.testing.assert_close(network(images), network.head(tokens.mean(1)))
    one = network.trunk.blocks[0](features + network.trunk.positions)
    torch.testing.assert_close(tokens[1, 4 * 2 + 3], network.trunk.norm(one[1, :, 2, 3]))


# --- grids of markers -----------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Answers every question right, but those of ``last_f`` in the first column."""

    def forward(self, symbols: Tensor) -> tuple[Tensor, ...]:
        grids = marker_targets(symbols)
        answers = [target.clamp_min(0) for target in grids[1:]]
        answers[0][:, :, 0] = (answers[0][:, :, 0] + 1) % 8
        return tuple(nn.functional.one_hot(answer, 17).float() for answer in answers)


def test_scores_are_shares_of_the_questions_asked() -> None:
    scores = score_markers(Oracle(), 600, (4, 4), 0, "test")
    accuracy = scores.accuracy()
    asked = scores.grids.last_f != IGNORED
    assert accuracy[0] == pytest.approx(1 - float(asked[:, :, 0].sum() / asked.sum()))
    assert accuracy[1:] == [1.0, 1.0]
    cells = scores.by_cell()
    assert cells.shape == (3, 4, 4)
    assert cells[0, 1:, 0].tolist() == [0, 0, 0]
    assert (cells[0, :, 1:] == 1).all()
    assert torch.isnan(cells[0, 0, 0])
    assert torch.isnan(cells[1, 3, 3])
    assert torch.isnan(cells[2, 0]).all()


def test_scores_by_distance_are_those_of_bins_that_double() -> None:
    symbols = torch.tensor([[[1, 0, 0, 0, 0, 0, 0]]])
    grids = marker_targets(symbols)
    hits = torch.zeros(3, 1, 1, 7, dtype=torch.bool)
    hits[0, 0, 0, [1, 3, 4, 6]] = True
    asked = torch.stack([target != IGNORED for target in grids[1:]])
    curves = MarkerScores(grids, hits, asked).by_distance()
    # Distances 1 | 2 | 3, 4 | 5, 6.
    assert curves["last_f"] == ([1, 2, 4, 8], [1, 0, 1, 0.5])
    assert curves["next_b"] == ([], [])


def test_arms_are_trained_on_the_same_fresh_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    original = experiments.marker_grids

    def spy(*arguments: Any, **options: Any) -> MarkerGrids:
        grids = original(*arguments, **options)
        seen.setdefault(arm, []).append(grids.symbols)
        return grids

    monkeypatch.setattr(experiments, "marker_grids", spy)
    for arm in ("vig", "vit"):
        train_markers(arm, TINY, Training(4), 1e-3, 3, (4, 4), seed=5)
    assert len(seen["vig"]) == 3
    for ours, theirs in zip(seen["vig"], seen["vit"], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(seen["vig"][0], seen["vig"][1])
    arm = "test"
    score_markers(Oracle(), 4, (4, 4), 5, "test")
    assert not any(torch.equal(seen["test"][0], grids) for grids in seen["vig"])


def test_training_is_that_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def fit(model: nn.Module, batches: Any, loss: Any, **options: Any) -> History:
        given.update(options, model=model, batches=batches, loss=loss)
        return History(losses=[1.0] * options["steps"])

    monkeypatch.setattr(experiments, "fit", fit)
    settings = SCALES["laptop"]
    assert isinstance(settings, MarkerScale)
    model, losses = train_markers("vig", settings.sizes, settings.training, 3e-3, settings.steps, settings.grid, 0)
    assert len(losses) == given["steps"] == 500
    assert given["clip_norm"] == 5
    assert given["schedule"](149) == 1  # OneCycle: 30% of the steps rise
    assert given["schedule"](499) < 1e-5
    groups = given["optimizer"].param_groups
    assert {group["lr"] for group in groups} == {3e-3}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    undecayed = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert id(model.trunk.positions) in undecayed
    assert id(model.heads[0].weight) not in undecayed
    grids = given["batches"](7)
    assert grids.symbols.shape == (16, 8, 8)
    logits = model(grids.symbols)
    assert [part.shape[-1] for part in logits] == [8, 8, 17]
    total = torch.zeros(())
    for part, target in zip(logits, grids[1:], strict=True):
        asked = target != IGNORED
        total = total - part.log_softmax(-1)[asked].gather(1, target[asked][:, None]).mean()
    torch.testing.assert_close(given["loss"](model, grids), total)


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    return {arm: measure(arm, 100, "smoke") for arm in SCALES["smoke"].rates}  # type: ignore[union-attr]


def test_a_cell_is_the_same_when_measured_again(smoke: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    for arm in ("vig", "vit"):
        again = measure(arm, 100, "smoke")
        assert again.metrics == smoke[arm].metrics
        assert again.curves == smoke[arm].curves
        np.testing.assert_array_equal(again.pictures["cells"], smoke[arm].pictures["cells"])
    assert torch.equal(before, torch.get_rng_state())
    assert measure("vig", 101, "smoke").metrics != smoke["vig"].metrics


def test_a_cell_reports_the_worst_of_three_targets(smoke: dict[str, Any]) -> None:
    for measurement in smoke.values():
        targets = [measurement.metrics[name] for name in ("last_f", "next_b", "above")]
        assert measurement.metrics["accuracy"] == min(targets)
        assert all(0 <= value <= 1 for value in targets)
        assert measurement.curves["training loss"].x[-1] == 4
        assert measurement.notes["learning rate"] in RATES
    assert len({tuple(measurement.curves["training loss"].y) for measurement in smoke.values()}) == 5


def test_the_picture_shows_three_grids(smoke: dict[str, Any]) -> None:
    picture = smoke["vig"].pictures["cells"]
    assert picture.shape == (350, 1050, 3)
    grey = (picture == 0xDD).all(2).sum()
    # Of three grids of 64 cells ten are never asked: the first, the last, and the first row.
    assert grey > 8 * 30 * 30


def test_rates_are_chosen_on_held_out_data_of_other_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def train(arm: str, sizes: Any, training: Any, rate: float, *rest: Any) -> tuple[float, list[float]]:
        if rate == RATES[-1]:
            raise DivergedError("too fast")
        return rate, []

    def score(rate: float, count: int, grid: Any, seed: int, stream: str) -> Any:
        calls.append((seed, stream))
        return dataclasses.make_dataclass("Scores", [])() if count < 0 else _Answers([0.9, rate, 0.8])

    monkeypatch.setattr(claim, "train_markers", train)
    monkeypatch.setattr(claim, "score_markers", score)
    found = claim.choose_rate("vig", "laptop", seeds=(100, 101))
    assert found == {**{rate: rate for rate in RATES[:-1]}, RATES[-1]: 0.0}
    assert set(calls) == {(100, "validation"), (101, "validation")}

    asked: list[Any] = []

    def data(seed: int, choosing: bool) -> str:
        asked.append((seed, choosing))
        return "data"

    monkeypatch.setattr(claim, "train_images", train)
    monkeypatch.setattr(claim, "image_accuracy", lambda rate, data: 2 * rate)
    monkeypatch.setitem(SCALES, "digits", dataclasses.replace(SCALES["digits"], data=data))
    assert claim.choose_rate("vit", "digits")[1e-2] == pytest.approx(0.02)
    assert set(asked) == {(100, True), (101, True), (102, True)}


@dataclasses.dataclass
class _Answers:
    shares: list[float]

    def accuracy(self) -> list[float]:
        return self.shares


@pytest.mark.parametrize("scale", ["laptop", "no_positions", "digits", "cifar10"])
def test_rates_come_from_the_common_grid(scale: str) -> None:
    assert set(SCALES[scale].rates.values()) <= set(RATES)  # type: ignore[union-attr]


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap_cost(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Tiny blocks and models, really timed; peaks of memory that follow a formula."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def peak(build: str, arguments: Any, warm_up: Any, *, threads: int) -> PeakMemory:
        load_builder(build)
        assert warm_up["size"] < arguments["size"]
        asked.append((build, dict(arguments)))
        power = {"vig": 1, "deit": 1.5, "explicit": 2}[arguments["contender"]]
        return PeakMemory(int(2**20 * arguments["size"] ** power), 1)

    effort = Effort(rounds=2, fewest_rounds=2, sample_seconds=1e-4)
    monkeypatch.setattr(claim, "measure_peak", peak)
    monkeypatch.setitem(SCALES, "cost", CostScale((64, 144), 64, effort, effort))
    return asked


def test_costs_of_vig_are_compared_with_explicit_attention_and_deit(
    cheap_cost: list[tuple[str, dict[str, Any]]],
) -> None:
    measurement = measure("vig", 0, "cost")
    metrics = measurement.metrics
    assert set(metrics) == measured_at("cost")["vig"]
    assert metrics["block_mebibytes"] == 144
    assert metrics["block_memory_ratio"] == pytest.approx(144)
    assert metrics["model_memory_share"] == pytest.approx(64**-0.5, rel=1e-3)
    assert metrics["model_speed_ratio"] > 0
    times = measurement.curves["time of one block"]
    assert metrics["time_exponent"] == pytest.approx(math.log(times.y[1] / times.y[0]) / math.log(144 / 64))
    assert metrics["block_milliseconds"] == times.y[1]
    assert list(measurement.curves["peak memory of one block"].y) == [64, 144]
    assert measurement.notes["timed in turns with"] == "explicit"
    kinds = [(build.rpartition(":")[2], arguments["contender"], arguments["size"]) for build, arguments in cheap_cost]
    assert kinds == [
        ("build_block", "vig", 64),
        ("build_block", "vig", 144),
        ("build_block", "explicit", 144),
        ("build_model", "vig", 64),
        ("build_model", "deit", 64),
    ]


@pytest.mark.usefixtures("cheap_cost")
@pytest.mark.parametrize("arm", ["vit", "explicit"])
def test_costs_of_attention_are_measured_in_turns_with_vig(arm: str) -> None:
    measurement = measure(arm, 0, "cost")
    assert set(measurement.metrics) == measured_at("cost")[arm]
    assert measurement.notes["timed in turns with"] == "vig"
    assert measurement.notes["block, times the peer's"] > 0


def test_multiply_adds_at_1024_pixels_are_the_card_s() -> None:
    assert claim.multiply_adds("vig", 1024) / 1e9 == pytest.approx(25.0, abs=0.05)
    assert claim.multiply_adds("vig", 1024, as_paper=True) / 1e9 == pytest.approx(20.2, abs=0.05)
    # 99.1 G without the patch embedding, 0.6 G with it.
    assert claim.multiply_adds("deit", 1024) / 1e9 == pytest.approx(99.7, abs=0.05)


def test_what_cannot_be_timed_is_named() -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(HeadgateError, match=r"\('vit', 9\) could not be timed: RuntimeError: no memory"):
        claim._timed({("vit", 9): fail}, Effort(rounds=1, fewest_rounds=1))


# --- ImageNet -------------------------------------------------------------------------------------------------------
