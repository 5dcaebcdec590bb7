r"""A click log from a procedural shop: users with several interests, their histories, and what they click.

Items have a category, a latent vector z, a brand tier, four attributes, a popularity with a long tail, a text feature that
reveals z, and a group of companions that nothing else reveals. A user has one to six interests, each near the centre of a
category, and an archetype that decides which attributes please; only the brand tiers of the history tell it::

    user 7: 3 interests, archetype 2        history  c4 c4 c19 c19 c4 c31      items by category, oldest first
    impression of an item of category 19    counts the history's two items of category 19, the nearer the more
    impression of an item of category 52    finds nothing in the history

The click's logit (:class:`Impressions` keeps it as the oracle) is::

    b + w_m M + w_a (W_r · attributes) + 0.2 log(popularity · num_items)
    M = min(2, log2(1 + Σ_j [c_j = c] exp(-‖z_j - z‖² / 6)))          over the history's items j

Everything comes from the seed: the same seed gives the same log on every machine, up to the last bit of exponentials and
logarithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from headgate.data.seeding import portable_normal, stream_generator
from headgate.validate import check_positive, check_probability

__all__ = [
    "CLICK_LOG_PRESETS",
    "ClickItems",
    "ClickLog",
    "ClickLogSettings",
    "ClickUsers",
    "Impressions",
    "make_click_log",
]

_LATENT = 8
_TEXT = 64
_ATTRIBUTES = 4
_TIERS = 4
_SPREAD = 0.6  # of items and interests around the centre of their category
_KEEP = 0.6  # probability that the next event keeps the interest of the last one
_COMPANIONS = 10
_CLOSENESS = 6.0
_LARGEST_MATCH = 2.0
# P(K interests), K = 1 … 6.
_INTEREST_SHARES = (0.15, 0.17, 0.17, 0.17, 0.17, 0.17)
# W_r: how the four attributes please the archetype r.
_TASTES = np.array([[1, 1, 0, 0], [-1, 0, 1, 0], [0, -1, 0, 1], [0, 0, -1, -1]], dtype=np.float64)
_CHUNK = 4096


@dataclass(frozen=True)
class ClickLogSettings:
    """The sizes and weights of a click log.

    Attributes:
        match_weight: w_m, how much the history's matching items count for a click.
        attribute_weight: w_a, how much the archetype's taste counts.
        bias: b.
        tier_weight: how strongly a history prefers the brand tier that is named as the user's archetype.
        companion_probability: that the next event is a companion of the last one.
        num_items: items.
        num_categories: categories, drawn with p ∝ rank^-0.8.
        num_users: users.
        train_impressions: per user.
        test_impressions: per user.
        max_history: longest history; lengths are exp N(2.3, 0.9) within [3, max_history].

    Raises:
        ValueError: a number is not positive, the probability lies outside [0, 1], or there are too few items or categories.
    """

    match_weight: float = 3.0
    attribute_weight: float = 0.6
    bias: float = -2.0
    tier_weight: float = 0.8
    companion_probability: float = 0.2
    num_items: int = 1500
    num_categories: int = 80
    num_users: int = 2500
    train_impressions: int = 16
    test_impressions: int = 10
    max_history: int = 40

    def __post_init__(self) -> None:
        check_positive(num_users=self.num_users, train_impressions=self.train_impressions)
        check_positive(test_impressions=self.test_impressions)
        check_probability(companion_probability=self.companion_probability)
        if self.num_items < 2 or self.max_history < 3:
            raise ValueError(
                f"num_items must be at least 2 and max_history at least 3, got {self.num_items} and {self.max_history}"
            )
        if self.num_categories < len(_INTEREST_SHARES):
            raise ValueError(f"num_categories must be at least {len(_INTEREST_SHARES)}, got {self.num_categories}")


CLICK_LOG_PRESETS: Mapping[str, ClickLogSettings] = MappingProxyType(
    {
        "interests": ClickLogSettings(),
        "archetypes": ClickLogSettings(match_weight=1.5, attribute_weight=1.2, bias=-1.2, tier_weight=1.5),
        "sequences": ClickLogSettings(companion_probability=0.35, tier_weight=0.0, num_items=600, num_categories=20),
    }
)
"""Preset → settings: many interests (DIN), archetypes to be inferred (AW-MoE), companions that follow each other (DiscRec)."""


@dataclass(frozen=True, eq=False)
class ClickItems:
    """The items.

    Attributes:
        category: int64 ``(items,)``.
        latent: float64 ``(items, 8)``, z: the category's centre and a deviation of 0.6.
        tier: int64 ``(items,)`` in [0, 4), the brand tier.
        attributes: float32 ``(items, 4)``, standard normal.
        popularity: float64 ``(items,)``, ∝ rank^-0.9, sums to 1.
        text: float32 ``(items, 64)``, unit length: a fixed map of z and noise. It reveals what an item is.
        companions: int64 ``(items,)``, a group of some ten items that follow each other, drawn regardless of all else.
    """

    category: Int64[np.ndarray, " items"]
    latent: Float64[np.ndarray, "items 8"]
    tier: Int64[np.ndarray, " items"]
    attributes: Float32[np.ndarray, "items 4"]
    popularity: Float64[np.ndarray, " items"]
    text: Float32[np.ndarray, "items 64"]
    companions: Int64[np.ndarray, " items"]


@dataclass(frozen=True, eq=False)
class ClickUsers:
    """The users and what they did before.

    Attributes:
        num_interests: int64 ``(users,)``, K in [1, 6].
        interests: int64 ``(users, 6)``, the K categories of a user, all different; -1 behind them.
        weights: float64 ``(users, 6)``, how often each interest is taken up; sums to 1.
        archetype: int64 ``(users,)``, r in [0, 4).
        history: int64 ``(users, max_history)``, items oldest first, padded with 0 on the right.
        length: int64 ``(users,)``, in [3, max_history].
        next_item: int64 ``(users,)``, the item that follows the history.
    """

    num_interests: Int64[np.ndarray, " users"]
    interests: Int64[np.ndarray, "users 6"]
    weights: Float64[np.ndarray, "users 6"]
    archetype: Int64[np.ndarray, " users"]
    history: Int64[np.ndarray, "users max_history"]
    length: Int64[np.ndarray, " users"]
    next_item: Int64[np.ndarray, " users"]

    @property
    def mask(self) -> Bool[np.ndarray, "users max_history"]:
        """True where the history holds an item."""
        return np.arange(self.history.shape[1]) < self.length[:, None]


class Impressions(NamedTuple):
    """Items that were shown, user by user.

    Attributes:
        user: int64 ``(rows,)``.
        item: int64 ``(rows,)``.
        clicked: int64 ``(rows,)``, 0 or 1.
        logit: float64 ``(rows,)``, that of the click's probability: no model ranks better, on average.
    """

    user: Int64[np.ndarray, " rows"]
    item: Int64[np.ndarray, " rows"]
    clicked: Int64[np.ndarray, " rows"]
    logit: Float64[np.ndarray, " rows"]


@dataclass(frozen=True, eq=False)
class ClickLog:
    """A whole log: items, users with their histories, and impressions to learn from and to test on."""

    items: ClickItems
    users: ClickUsers
    train: Impressions
    test: Impressions
    settings: ClickLogSettings


def make_click_log(seed: int, preset: str | ClickLogSettings = "interests") -> ClickLog:
    """Draw a click log.

    Half of a user's impressions are of the user's own categories (an interest with equal probability, an item by
    popularity), half of any, by popularity.

    Args:
        seed: of everything, the map from z to text excepted, which is always the same.
        preset: a key of :data:`CLICK_LOG_PRESETS`, or settings of your own.

    Returns:
        The log, as NumPy arrays.

    Raises:
        ValueError: an unknown preset.
    """
    if isinstance(preset, str):
        if preset not in CLICK_LOG_PRESETS:
            raise ValueError(f"preset must be one of {', '.join(CLICK_LOG_PRESETS)}, got {preset!r}")
        preset = CLICK_LOG_PRESETS[preset]
    centres = _normal((preset.num_categories, _LATENT), seed, "centres")
    items = _draw_items(seed, preset, centres)
    users = _draw_users(seed, preset, items, centres)
    parts = [
        _draw_impressions(seed, part, count, preset, items, users)
        for part, count in (("train", preset.train_impressions), ("test", preset.test_impressions))
    ]
    return ClickLog(items, users, parts[0], parts[1], preset)


def _draw_items(seed: int, settings: ClickLogSettings, centres: np.ndarray) -> ClickItems:
    count = settings.num_items
    shares = np.arange(1, settings.num_categories + 1) ** -0.8
    category = _pick(shares, _uniform((count,), seed, "category"))
    latent = centres[category] + _SPREAD * _normal((count, _LATENT), seed, "latent")
    popularity = (1.0 + _permutation(count, seed, "popularity")) ** -0.9
    reveal = _normal((_LATENT, _TEXT), 0, "text map") / _LATENT**0.5
    text = latent @ reveal + 0.3 * _normal((count, _TEXT), seed, "text")
    groups = max(1, count // _COMPANIONS)
    return ClickItems(
        category=category,
        latent=latent,
        tier=(_uniform((count,), seed, "tier") * _TIERS).astype(np.int64),
        attributes=_normal((count, _ATTRIBUTES), seed, "attributes").astype(np.float32),
        popularity=popularity / popularity.sum(),
        text=(text / np.linalg.norm(text, axis=1, keepdims=True)).astype(np.float32),
        companions=_permutation(count, seed, "companions") * groups // count,
    )


def _draw_users(seed: int, settings: ClickLogSettings, items: ClickItems, centres: np.ndarray) -> ClickUsers:
    count, most = settings.num_users, len(_INTEREST_SHARES)
    num_interests = 1 + _pick(np.array(_INTEREST_SHARES), _uniform((count,), seed, "number of interests"))
    held = np.arange(most) < num_interests[:, None]
    # Different categories, each with a probability ∝ its items: the largest of log(u) / size (Efraimidis and Spirakis).
    sizes = np.bincount(items.category, minlength=settings.num_categories)
    keys = np.log(_uniform((count, settings.num_categories), seed, "interests")) / np.maximum(sizes, 1e-9)
    chosen = np.argsort(-keys, axis=1, kind="stable")[:, :most]
    # Dirichlet(1): exponential numbers, normalised.
    weights = np.where(held, -np.log(_uniform((count, most), seed, "weights")), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    archetype = (_uniform((count,), seed, "archetype") * len(_TASTES)).astype(np.int64)
    drawn = np.exp(2.3 + 0.9 * _normal((count,), seed, "length"))
    length = np.clip(np.rint(drawn), 3, settings.max_history).astype(np.int64)
    spots = centres[chosen] + _SPREAD * _normal((count, most, _LATENT), seed, "spots")
    events = _walk(seed, settings, items, weights, spots, archetype, length)
    within = np.arange(settings.max_history) < length[:, None]
    return ClickUsers(
        num_interests=num_interests,
        interests=np.where(held, chosen, -1),
        weights=weights,
        archetype=archetype,
        history=np.where(within, events[:, :-1], 0),
        length=length,
        next_item=events[np.arange(count), length],
    )


def _walk(
    seed: int,
    settings: ClickLogSettings,
    items: ClickItems,
    weights: np.ndarray,
    spots: np.ndarray,
    archetype: np.ndarray,
    length: np.ndarray,
) -> np.ndarray:
    """The events of every user, ``length + 1`` of them: a companion of the last one, or an item near an interest."""
    count, steps = len(length), settings.max_history + 1
    draws = _uniform((steps, 4, count), seed, "walk")
    base = 0.5 * np.log(items.popularity) - 0.5 * (items.latent**2).sum(axis=1)
    liked = np.stack([settings.tier_weight * (items.tier == tier) for tier in range(_TIERS)])
    members = np.argsort(items.companions, kind="stable")
    sizes = np.bincount(items.companions)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    place = np.empty(len(members), dtype=np.int64)
    place[members] = np.arange(len(members)) - starts[items.companions[members]]
    events = np.zeros((count, steps), dtype=np.int64)
    interest = np.zeros(count, dtype=np.int64)
    for step in range(steps):
        going = np.flatnonzero(length >= step)
        follows, keeps, which, item = draws[step][:, going]
        fresh = _pick_rows(weights[going], which)
        interest[going] = np.where((keeps < _KEEP) & (step > 0), interest[going], fresh)
        spot = spots[going, interest[going]]
        # exp(-‖z - s‖² / 2) up to a factor that a user's items share.
        logits = base + spot @ items.latent.T + liked[archetype[going]]
        near = _pick_rows(np.exp(logits - logits.max(axis=1, keepdims=True)), item)
        last = events[going, max(step - 1, 0)]
        group = items.companions[last]
        others = sizes[group] - 1
        offset = 1 + (item * others).astype(np.int64)
        companion = members[starts[group] + (place[last] + offset) % sizes[group]]
        is_companion = (follows < settings.companion_probability) & (step > 0) & (others > 0)
        events[going, step] = np.where(is_companion, companion, near)
    return events


def _draw_impressions(
    seed: int, part: str, per_user: int, settings: ClickLogSettings, items: ClickItems, users: ClickUsers
) -> Impressions:
    count = settings.num_users
    which, draws, click = _uniform((3, count, per_user), seed, f"{part} impressions")
    by_category = np.argsort(items.category, kind="stable")
    summed = np.concatenate([[0.0], np.cumsum(items.popularity[by_category])])
    ends = np.cumsum(np.bincount(items.category, minlength=settings.num_categories))
    interest = (which * users.num_interests[:, None]).astype(np.int64)
    category = np.take_along_axis(users.interests, interest, axis=1)
    low, high = summed[np.concatenate([[0], ends[:-1]])][category], summed[ends][category]
    own = np.arange(per_user) < (per_user + 1) // 2
    mass = np.where(own & (high > low), low + draws * (high - low), draws * summed[-1])
    place = np.clip(np.searchsorted(summed, mass, side="right") - 1, 0, settings.num_items - 1)
    item = by_category[place].ravel()
    user = np.repeat(np.arange(count), per_user)
    taste = (_TASTES[users.archetype[user]] * items.attributes[item]).sum(axis=1)
    fame = 0.2 * np.log(items.popularity[item] * settings.num_items)
    logit = settings.bias + settings.match_weight * _match(items, users, user, item)
    logit += settings.attribute_weight * taste + fame
    clicked = (click.ravel() < 1 / (1 + np.exp(-logit))).astype(np.int64)
    return Impressions(user, item, clicked, logit)


def _match(items: ClickItems, users: ClickUsers, user: np.ndarray, item: np.ndarray) -> Float64[np.ndarray, " rows"]:
    """M of every impression."""
    mask, result = users.mask, np.empty(len(user))
    for start in range(0, len(user), _CHUNK):
        rows = slice(start, start + _CHUNK)
        history, candidate = users.history[user[rows]], item[rows]
        same = mask[user[rows]] & (items.category[history] == items.category[candidate][:, None])
        distance = ((items.latent[history] - items.latent[candidate][:, None]) ** 2).sum(axis=2)
        closeness = np.where(same, np.exp(-distance / _CLOSENESS), 0.0)
        result[rows] = np.minimum(_LARGEST_MATCH, np.log2(1 + closeness.sum(axis=1)))
    return result


def _pick(shares: np.ndarray, draws: np.ndarray) -> Int64[np.ndarray, " draws"]:
    """Draw indices with p ∝ ``shares`` from uniform numbers."""
    summed = np.cumsum(shares)
    return np.minimum(np.searchsorted(summed, draws * summed[-1], side="right"), len(shares) - 1).astype(np.int64)


def _pick_rows(shares: np.ndarray, draws: np.ndarray) -> Int64[np.ndarray, " rows"]:
    """Draw one index per row with p ∝ the row's shares; an index without a share is never drawn."""
    summed = np.cumsum(shares, axis=1)
    return (summed <= (draws * summed[:, -1])[:, None]).sum(axis=1).clip(max=shares.shape[1] - 1)


def _normal(shape: tuple[int, ...], seed: int, stream: str) -> np.ndarray:
    return portable_normal(shape, stream_generator(seed, f"click log: {stream}")).double().numpy()


def _uniform(shape: tuple[int, ...], seed: int, stream: str) -> np.ndarray:
    """Uniform numbers in (0, 1)."""
    generator = stream_generator(seed, f"click log: {stream}")
    return ((torch.randint(2**52, shape, generator=generator).double() + 0.5) / 2**52).numpy()


def _permutation(count: int, seed: int, stream: str) -> np.ndarray:
    return torch.randperm(count, generator=stream_generator(seed, f"click log: {stream}")).numpy()
