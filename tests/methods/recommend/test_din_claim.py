"""The experiment: its data, what each arm may and may not see, and that it gives the same numbers again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headgate.catalog import read_card
from headgate.data import make_click_log
from headgate.errors import DataError
from headgate.evaluate import gauc
from headgate.measurement import Measurement
from headgate.methods.recommend.din import claim, worlds
from headgate.methods.recommend.din.claim import ARMS, SCALES, measure

CARD = read_card(Path(claim.__file__).parent / "card.toml", "headgate.methods.recommend.din")


@pytest.fixture(scope="module")
def smoke() -> dict[str, Measurement]:
    return {arm: measure(arm, 100, "smoke") for arm in ARMS}


def test_arms_and_scales_are_those_of_the_card() -> None:
    assert set(SCALES) == set(CARD.claim.scales)
    for scale, settings in SCALES.items():
        assert set(settings.rates) == {arm.name for arm in CARD.claim.arms_at(scale)}
        assert set(settings.penalties) == {name for name in settings.rates if ARMS[name].penalty}


def test_single_rates_come_from_the_grid() -> None:
    laptop = SCALES["laptop"]
    assert all(len(rates) == 1 and rates[0] in claim.RATES for rates in laptop.rates.values())
    for arm, weight in laptop.penalties.items():
        penalty = ARMS[arm].penalty
        assert penalty is not None
        assert weight in claim.PENALTIES[penalty]


def test_every_criterion_s_metrics_are_measured(smoke: dict[str, Measurement]) -> None:
    for criterion in CARD.claim.criteria_at("smoke"):
        assert criterion.metric in smoke[criterion.arm].metrics
        if criterion.against is not None:
            assert (criterion.against_metric or criterion.metric) in smoke[criterion.against].metrics


def test_unknown_arms_and_scales_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"scale must be one of smoke, laptop, movielens, paper, got 'huge'"):
        measure("base", 0, "huge")
    with pytest.raises(ValueError, match=r"arm must be one of softmax, raw, .*, l2 at scale smoke, got 'sum'"):
        measure("sum", 0, "smoke")
    with pytest.raises(ValueError, match=r"arm must be one of softmax.*wide at scale movielens, got 'mba'"):
        measure("mba", 0, "movielens")


def test_a_cell_is_the_same_when_measured_again_and_leaves_the_random_state_alone(
    smoke: dict[str, Measurement],
) -> None:
    before = torch.get_rng_state()
    for arm in ("dice", "mba"):
        again = measure(arm, 100, "smoke")
        assert again.metrics == smoke[arm].metrics
        assert again.curves == smoke[arm].curves
    assert torch.equal(before, torch.get_rng_state())


def test_budgets_match(smoke: dict[str, Measurement]) -> None:
    parameters = {arm: measurement.notes["parameters"] for arm, measurement in smoke.items()}
    assert parameters["blind"] == parameters["softmax"] == parameters["raw"]
    # Goods of 6 + 6 + 4 + 4 numbers: a unit of 80 → 36 → 1 with 36 slopes.
    assert parameters["softmax"] - parameters["base"] == 80 * 36 + 36 + 36 + 36 + 1
    assert parameters["wide"] == parameters["none"] == parameters["mba"] == parameters["l2"]
    assert parameters["wide"] > 2 * parameters["base"]
    for arm, measurement in smoke.items():
        epochs = SCALES["smoke"].long_epochs if ARMS[arm].long else SCALES["smoke"].epochs
        assert list(measurement.curves["GAUC by epoch"].x) == list(range(1, epochs + 1))


def test_metrics_agree_with_the_curves_and_with_each_other(smoke: dict[str, Measurement]) -> None:
    for measurement in smoke.values():
        metrics, curve = measurement.metrics, measurement.curves["GAUC by epoch"].y
        assert metrics["gauc"] == curve[-1]
        assert metrics["peak"] == max(curve)
        assert metrics["drop"] == pytest.approx(metrics["peak"] - metrics["gauc"])
        assert metrics["halfway"] == pytest.approx((metrics["peak"] + metrics["gauc"]) / 2)
        assert metrics["contrast"] == pytest.approx(metrics["gauc_many"] - 2 * metrics["gauc_one"])
        assert metrics["gauc_one"] == measurement.curves["GAUC by number of interests"].y[0]
        assert 0.75 < measurement.notes["GAUC of the true probabilities"] < 0.95  # type: ignore[operator]


def test_only_units_show_their_weights(smoke: dict[str, Measurement]) -> None:
    assert {arm for arm, measurement in smoke.items() if measurement.pictures} == {"softmax", "raw", "dice"}
    assert smoke["raw"].pictures["weights"].shape == (420, 950, 3)


def test_the_blind_unit_gives_every_candidate_the_same_interest() -> None:
    settings = SCALES["smoke"]
    world = settings.world(0)
    rows = world.test.take(world.test.user == 3)
    given = world.batch(rows)
    for name, differs in (("blind", False), ("softmax", True)):
        model = claim._build(world, ARMS[name], settings, 0).eval()
        goods = model._embed(model.target, model.target, given)
        pooled = model.pool(goods, model._embed(model.target, model.history, given), given["mask"])
        assert (not torch.allclose(pooled, pooled[:1].expand_as(pooled), atol=1e-6)) is differs


def test_arms_share_their_first_weights() -> None:
    settings = SCALES["smoke"]
    world = settings.world(0)
    first, second = (claim._build(world, ARMS[name], settings, 5).state_dict() for name in ("base", "blind"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(second) > len(first)
    third = claim._build(world, ARMS["raw"], settings, 5).state_dict()
    for name, value in third.items():
        assert torch.equal(value, second[name.replace("pool.", "pool.unit.")])


def test_counts_of_the_penalty_are_those_of_the_training_impressions() -> None:
    settings = SCALES["smoke"]
    world = settings.world(0)
    model = claim._build(world, ARMS["mba"], settings, 0)
    penalty = claim._penalty(world, model, ARMS["mba"], 0.1)
    expected = torch.bincount(world.train.item, minlength=200)
    for start, end in zip(world.train.start.tolist(), world.train.end.tolist(), strict=True):
        expected += torch.bincount(world.behaviours[start:end], minlength=200)
    assert torch.equal(penalty.get_submodule("penalty").get_buffer("counts_item"), expected)


def test_the_grid_is_searched_with_the_given_seeds() -> None:
    found = claim.choose("base", "smoke", seeds=(100,), rates=(4e-3, 1e-6))
    assert set(found) == {(4e-3, 0.0), (1e-6, 0.0)}
    assert found[4e-3, 0.0] == measure("base", 100, "smoke").metrics["gauc"]
    found = claim.choose("l2", "smoke", seeds=(100,), rates=(4e-3, 2e-3), weights=(1e-2,))
    assert set(found) == {(4e-3, 1e-2), (2e-3, 1e-2)}
    assert found[4e-3, 1e-2] == measure("l2", 100, "smoke").metrics["gauc"]


def test_penalties_are_searched_over_grids_of_equal_size() -> None:
    assert len(claim.PENALTIES["batch"]) == len(claim.PENALTIES["table"]) == 6


def test_the_laptop_s_seeds_begin_where_none_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    settings = SCALES["laptop"]

    def world(seed: int) -> worlds.World:
        seen.append(seed)
        raise DataError("no world")

    monkeypatch.setitem(SCALES, "laptop", dataclasses.replace(settings, world=world))
    with pytest.raises(DataError):
        measure("base", 0, "laptop")
    assert seen == [settings.first_seed] == [10]


def test_the_click_world_is_the_log() -> None:
    log, world = make_click_log(4), worlds.click_world(4, "interests")
    rows = world.test.take(slice(500, 520))
    batch = world.batch(rows)
    for place, user in enumerate(rows.user.tolist()):
        length = log.users.length[user]
        assert batch["item_history"][place, :length].tolist() == log.users.history[user, :length].tolist()
        assert batch["mask"][place].sum() == length
    np.testing.assert_array_equal(batch["category"], log.items.category[rows.item])
    np.testing.assert_array_equal(batch["attributes_history"][0, 0], log.items.attributes[batch["item_history"][0, 0]])
    assert world.oracle is not None
    assert gauc(world.test.clicked, world.oracle, world.test.user) == pytest.approx(0.85, abs=0.02)


def write(folder: Path, name: str, *rows: str) -> None:
    (folder / name).write_text("\n".join(row.replace(" ", "\t") for row in rows) + "\n")


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten users; user u rates film f with 5 where u + f is even, else 2, in the order of the films."""
    rows = [
        f"{user} {film} {5 if (user + film) % 2 == 0 else 2} {100 * film}"
        for user in range(1, 11)
        for film in range(1, 6)
    ]
    write(tmp_path, "small.inter", "user_id:token item_id:token rating:float timestamp:float", *rows[::-1])
    genres = ["Drama~War", "War", "", "Drama", "Comedy"]
    header = "item_id:token movie_title:token_seq release_year:token class:token_seq"
    lines = [f"{film} Film 1990 {genre}" for film, genre in enumerate(genres, 1)]
    write(tmp_path, "small.item", header, *lines)
    (tmp_path / "small.item").write_text((tmp_path / "small.item").read_text().replace("~", " "))
    monkeypatch.setenv("HEADGATE_MOVIELENS", str(tmp_path))
    return tmp_path


def test_movielens_histories_are_the_films_liked_before_and_users_are_split(films: Path) -> None:
    world = worlds.movielens_world(0, max_history=2)
    parts = {"train": world.train, "choose": world.choose, "test": world.test}
    users = {}
    for name, rows in parts.items():
        assert rows is not None
        users[name] = set(rows.user.tolist())
        assert len(rows.user) == 5 * len(users[name])
        history, mask = world.history_of(rows)
        for place in range(len(rows.user)):
            user, film = int(rows.user[place]) + 1, int(rows.item[place]) + 1
            liked = [other - 1 for other in range(1, film) if (user + other) % 2 == 0]
            assert history[place][mask[place]].tolist() == liked[-2:]
            assert bool(rows.clicked[place]) == ((user + film) % 2 == 0)
    assert set.union(*users.values()) == set(range(10))
    assert sum(map(len, users.values())) == 10
    assert (len(users["test"]), len(users["choose"])) == (3, 1)
    count, categories = world.ids["category"]
    assert (count, categories.tolist()) == (4, [2, 3, 0, 2, 1])


def test_a_small_movielens_is_measured_with_rate_and_epoch_chosen_on_users_set_aside(
    shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEADGATE_MOVIELENS", raising=False)
    monkeypatch.setenv("HEADGATE_SHARED", str(shared_dir))
    tiny = dataclasses.replace(
        SCALES["movielens"], world=lambda seed: worlds.movielens_world(seed, max_history=10, users=60), epochs=2
    )
    monkeypatch.setitem(SCALES, "movielens", tiny)
    measured = measure("softmax", 0, "movielens")
    assert measured.metrics["gauc"] == measured.curves["GAUC by epoch"].y[int(measured.notes["epoch"]) - 1]
    assert measured.notes["learning rate"] in (1e-3, 4e-3)
    assert 0.4 < measured.metrics["gauc"] < 0.8
    assert measured.pictures["weights"].ndim == 3


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [f"u{user} p{product} {10 * product}" for user in range(4) for product in range(user, user + 4)]
    write(tmp_path, "shop.inter", "user_id:token item_id:token timestamp:float", *rows[::-1])
    lines = [f"p{product}\t'Electronics', 'Kind {product % 3}'" for product in range(7)]
    (tmp_path / "shop.item").write_text("item_id:token\tcategories:token_seq\n" + "\n".join(lines) + "\n")
    monkeypatch.setenv("HEADGATE_AMAZON", str(tmp_path))
    return tmp_path


def test_amazon_trains_on_all_but_the_last_review_beside_a_product_not_reviewed(reviews: Path) -> None:
    world = worlds.amazon_world(0)
    for rows, per_user in ((world.train, 2), (world.test, 1)):
        assert len(rows.user) == 2 * 4 * per_user
        history, mask = world.history_of(rows)
        for place in range(len(rows.user)):
            user, product = int(rows.user[place]), int(rows.item[place])
            before = history[place][mask[place]].tolist()
            assert before == list(range(user, user + len(before)))
            reviewed = range(user, user + 4)
            assert bool(rows.clicked[place]) == (product in reviewed)
            if rows.clicked[place]:
                assert product == user + len(before)
            assert len(before) == 3 if rows is world.test else len(before) in (1, 2)
    count, categories = world.ids["category"]
    assert (count, categories.tolist()) == (3, [0, 1, 2, 0, 1, 2, 0])


def test_the_published_recipe_runs_and_reports_the_best_test_epoch(
    reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: Any = {
        "dims": {"item": 4, "category": 4},
        "wide_dims": {"item": 8, "category": 8},
        "epochs": 3,
        "batch_size": 4,
    }
    monkeypatch.setitem(SCALES, "paper", dataclasses.replace(SCALES["paper"], **sizes))
    for arm in SCALES["paper"].rates:
        measured = measure(arm, 0, "paper")
        assert measured.metrics["gauc"] == measured.metrics["peak"] == max(measured.curves["GAUC by epoch"].y)
    decay = SCALES["paper"].decay
    assert (decay(0, 335_999), decay(4, 336_000)) == (1.0, 0.1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("shop.item", "item_id:token\tcategories:token_seq\np0\tKind\n", "lacks the categories of 6 items"),
        ("shop.item", "item_id:token\tbrand:token\np0\tX\n", "lacks the columns categories; found item_id, brand"),
        ("shop.inter", "user_id:token\titem_id:token\ttimestamp:float\nu0\tp0\n", "line 2: expected 3 cells, found 2"),
        ("shop.inter", "user_id:token\titem_id:token\ttimestamp:float\nu0\tp0\tnoon\n", "timestamp must hold numbers"),
        ("more.item", "item_id:token\n", r"exactly one \*\.item, found 2"),
    ],
)
def test_broken_reviews_are_refused_by_file_and_place(reviews: Path, name: str, text: str, message: str) -> None:
    (reviews / name).write_text(text)
    with pytest.raises(DataError, match=message):
        worlds.amazon_world(0)


def test_missing_data_are_named_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADGATE_AMAZON", "HEADGATE_MOVIELENS", "HEADGATE_SHARED"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DataError, match="set HEADGATE_AMAZON to the folder"):
        measure("base", 0, "paper")
    with pytest.raises(DataError, match="set HEADGATE_MOVIELENS to its folder"):
        measure("base", 0, "movielens")
