"""The procedural click log: its distributions, what clicks follow from, and that a seed decides it all."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from headgate.data import CLICK_LOG_PRESETS, ClickLog, ClickLogSettings, make_click_log

TASTES = ((1, 1, 0, 0), (-1, 0, 1, 0), (0, -1, 0, 1), (0, 0, -1, -1))


@pytest.fixture(scope="module")
def log() -> ClickLog:
    return make_click_log(3)


def arrays(log: ClickLog) -> dict[str, np.ndarray]:
    found = {f"{part}.{field.name}": getattr(getattr(log, part), field.name)
             for part in ("items", "users") for field in dataclasses.fields(getattr(log, part))}  # fmt: skip
    return found | {f"{part}.{name}": getattr(getattr(log, part), name)
                    for part in ("train", "test") for name in log.train._fields}  # fmt: skip


def test_one_seed_gives_one_log_and_another_seed_another() -> None:
    small = ClickLogSettings(num_users=50, num_items=100, num_categories=10)
    first, second, other = (arrays(make_click_log(seed, small)) for seed in (1, 1, 2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    differing = {name for name, values in first.items() if not np.array_equal(values, other[name])}
    assert set(first) - differing == {"train.user", "test.user"}


def test_users_and_items_are_drawn_as_documented(log: ClickLog) -> None:
    users, items = log.users, log.items
    assert np.median(users.length) == pytest.approx(10, abs=1)
    assert (users.length <= 8).mean() == pytest.approx(0.43, abs=0.03)
    assert (users.length.min(), users.length.max()) == (3, 40)
    shares = np.bincount(users.num_interests, minlength=7)[1:] / len(users.length)
    np.testing.assert_allclose(shares, [0.15, *[0.17] * 5], atol=0.025)
    np.testing.assert_allclose(users.weights.sum(axis=1), 1)
    for row in range(200):
        held = users.interests[row][users.interests[row] >= 0]
        assert len(set(held)) == len(held) == users.num_interests[row]
        assert (users.weights[row] > 0).sum() == len(held)
    ranked = np.sort(items.popularity)[::-1]
    assert ranked[0] / ranked[9] == pytest.approx(10**0.9)
    sizes = np.sort(np.bincount(items.category, minlength=80))[::-1]
    assert sizes[0] / len(items.category) == pytest.approx(1 / (np.arange(1, 81) ** -0.8).sum(), abs=0.03)
    assert set(np.bincount(items.companions)) == {10}
    np.testing.assert_allclose(np.linalg.norm(items.text, axis=1), 1, rtol=1e-5)


def test_the_logit_is_that_of_its_formula_and_clicks_follow_it(log: ClickLog) -> None:
    settings, items, users = log.settings, log.items, log.users
    for part in (log.train, log.test):
        for row in range(0, len(part.user), 1999):
            user, item = part.user[row], part.item[row]
            total = 0.0
            for event in users.history[user, : users.length[user]]:
                if items.category[event] == items.category[item]:
                    total += math.exp(-float(((items.latent[event] - items.latent[item]) ** 2).sum()) / 6)
            match = min(2.0, math.log2(1 + total))
            taste = sum(
                w * float(a) for w, a in zip(TASTES[users.archetype[user]], items.attributes[item], strict=True)
            )
            fame = 0.2 * math.log(items.popularity[item] * len(items.category))
            logit = settings.bias + settings.match_weight * match + settings.attribute_weight * taste + fame
            assert part.logit[row] == pytest.approx(logit)
        probability = 1 / (1 + np.exp(-part.logit))
        assert part.clicked.mean() == pytest.approx(probability.mean(), abs=0.01)
        high = probability > 0.8
        assert part.clicked[high].mean() == pytest.approx(probability[high].mean(), abs=0.02)


def test_half_of_a_user_s_impressions_are_of_the_user_s_categories(log: ClickLog) -> None:
    for part, count in ((log.train, 16), (log.test, 10)):
        np.testing.assert_array_equal(part.user, np.repeat(np.arange(2500), count))
        categories = log.items.category[part.item].reshape(2500, count)
        own = (categories[:, :, None] == log.users.interests[:, None]).any(axis=2)
        assert own[:, : count // 2].all()
        assert own[:, count // 2 :].mean() < 0.3


@pytest.mark.parametrize("preset", ["interests", "sequences"])
def test_histories_follow_companions_and_archetypes(preset: str) -> None:
    log = make_click_log(5, preset)
    users, groups = log.users, log.items.companions
    pairs = users.mask[:, 1:]
    followed = (groups[users.history[:, 1:]] == groups[users.history[:, :-1]])[pairs].mean()
    by_chance = 10 / len(groups)
    expected = log.settings.companion_probability
    assert expected < followed < expected + 0.08 + by_chance
    assert (users.history[~users.mask] == 0).all()
    own_tier = (log.items.tier[users.history] == users.archetype[:, None])[users.mask].mean()
    if log.settings.tier_weight:
        assert own_tier > 0.33  # a tier that nobody prefers would be met 25 times in 100
    else:
        assert own_tier == pytest.approx(0.25, abs=0.02)


def test_companions_tell_nothing_of_what_text_reveals(log: ClickLog) -> None:
    text, groups = log.items.text.astype(np.float64), log.items.companions
    cosine = text @ text.T
    others = ~np.eye(len(groups), dtype=bool)
    same_group = (groups[:, None] == groups) & others
    same_category = (log.items.category[:, None] == log.items.category) & others
    assert abs(cosine[same_group].mean() - cosine[others].mean()) < 0.02
    assert cosine[same_category].mean() > cosine[others].mean() + 0.3


def test_presets_differ_where_the_three_methods_need_it() -> None:
    assert set(CLICK_LOG_PRESETS) == {"interests", "archetypes", "sequences"}
    assert (CLICK_LOG_PRESETS["archetypes"].match_weight, CLICK_LOG_PRESETS["archetypes"].tier_weight) == (1.5, 1.5)
    assert (CLICK_LOG_PRESETS["sequences"].num_items, CLICK_LOG_PRESETS["sequences"].companion_probability) == (
        600,
        0.35,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_users": 0}, "num_users must be positive"),
        ({"companion_probability": 1.5}, "companion_probability must lie in"),
        ({"num_categories": 5}, "num_categories must be at least 6"),
        ({"max_history": 2}, "max_history at least 3"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClickLogSettings(**settings)  # type: ignore[arg-type]


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="preset must be one of interests, archetypes, sequences, got 'shop'"):
        make_click_log(0, "shop")
