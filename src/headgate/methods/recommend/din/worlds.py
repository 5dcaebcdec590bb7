"""The data on which the claim is measured: a procedural click log, MovieLens, and Amazon's reviews of electronics.

All three have one form. *Behaviours* are items in one long row; an impression has a candidate, a stretch of behaviours that
came before it, and a label::

    behaviours    u0: i4 i9 i2 | u1: i7 i7 | u2: …
    impression    user 0, candidate i5, behaviours 0 to 2 (i4 i9), clicked 1
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from headgate.data import Interactions, make_click_log, read_movielens, stream_generator
from headgate.data.click_log import ClickLogSettings, Impressions
from headgate.data.text import read_rows
from headgate.errors import DataError
from headgate.methods.recommend.din.fields import Field

__all__ = ["Rows", "World", "amazon_world", "click_world", "movielens_world", "read_reviews"]

# Shares of the users: as in the paper's split of MovieLens-20M (100,000 of 138,493 train), a tenth of the former to choose.
_TEST_SHARE = 0.278
_CHOOSE_SHARE = 0.0722


class Rows(NamedTuple):
    """Impressions.

    Attributes:
        user: int64 ``(n,)``, groups of GAUC.
        item: int64 ``(n,)``, the candidates.
        start: int64 ``(n,)``, first behaviour.
        end: int64 ``(n,)``, behind the last behaviour.
        clicked: int64 ``(n,)``, 0 or 1.
    """

    user: Int64[Tensor, " n"]
    item: Int64[Tensor, " n"]
    start: Int64[Tensor, " n"]
    end: Int64[Tensor, " n"]
    clicked: Int64[Tensor, " n"]

    def take(self, chosen: Tensor | slice) -> Rows:
        """Some of them."""
        return Rows(*(column[chosen] for column in self))


@dataclass(frozen=True, eq=False)
class World:
    """Impressions to train on, perhaps some to choose with, and those that are reported.

    Attributes:
        ids: name → number of ids, and the id of every item.
        numbers: name → what is known of every item in numbers, ``(items, dim)``.
        behaviours: items, int64 ``(all,)``.
        max_history: behaviours that a model sees, the last ones.
        train: impressions.
        choose: impressions that choose rate and epoch; ``None`` where nothing is chosen.
        test: impressions.
        num_interests: int64 ``(users,)``, where it is known.
        oracle: float64 ``(test,)``, the true logits, where they are known.
    """

    ids: Mapping[str, tuple[int, Int64[Tensor, " items"]]]
    numbers: Mapping[str, Float[Tensor, "items dim"]]
    behaviours: Int64[Tensor, " all"]
    max_history: int
    train: Rows
    choose: Rows | None
    test: Rows
    num_interests: Int64[np.ndarray, " users"] | None = None
    oracle: np.ndarray | None = None

    @property
    def target(self) -> tuple[str, ...]:
        """Names of the candidate's inputs."""
        return (*self.ids, *self.numbers)

    @property
    def history(self) -> tuple[str, ...]:
        """Names of the history's inputs."""
        return tuple(f"{name}_history" for name in self.target)

    def fields(self, dims: Mapping[str, int]) -> dict[str, Field]:
        """The fields of a model.

        Args:
            dims: name of an input with ids → size of its embedding.
        """
        ids = {name: Field(dims[name], count) for name, (count, _) in self.ids.items()}
        return ids | {name: Field(values.shape[1]) for name, values in self.numbers.items()}

    def history_of(self, rows: Rows) -> tuple[Int64[Tensor, "n length"], Bool[Tensor, "n length"]]:
        """The last behaviours before each impression, oldest first, padded on the right; and where they are."""
        start = torch.maximum(rows.start, rows.end - self.max_history)
        place = start.unsqueeze(1) + torch.arange(self.max_history)
        mask = place < rows.end.unsqueeze(1)
        return self.behaviours[place.clamp_max(len(self.behaviours) - 1)].masked_fill(~mask, 0), mask

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        """What a model takes, and ``clicked``."""
        history, mask = self.history_of(rows)
        batch = {"mask": mask, "clicked": rows.clicked.float()}
        tables = {name: values for name, (_, values) in self.ids.items()} | dict(self.numbers)
        for name, values in tables.items():
            batch[name], batch[f"{name}_history"] = values[rows.item], values[history]
        return batch


def click_world(seed: int, settings: str | ClickLogSettings) -> World:
    """The procedural click log; see :mod:`headgate.data.click_log`.

    Args:
        seed: of the log.
        settings: of the log.
    """
    log = make_click_log(seed, settings)
    items, users = log.items, log.users
    ends = np.cumsum(users.length)

    def rows(part: Impressions) -> Rows:
        columns = (part.user, part.item, (ends - users.length)[part.user], ends[part.user], part.clicked)
        return Rows(*map(torch.from_numpy, columns))

    return World(
        ids={
            "item": (len(items.category), torch.arange(len(items.category))),
            "category": (log.settings.num_categories, torch.from_numpy(items.category)),
            "tier": (4, torch.from_numpy(items.tier)),
        },
        numbers={"attributes": torch.from_numpy(items.attributes)},
        behaviours=torch.from_numpy(users.history[users.mask]),
        max_history=log.settings.max_history,
        train=rows(log.train),
        choose=None,
        test=rows(log.test),
        num_interests=users.num_interests,
        oracle=log.test.logit,
    )


def movielens_world(seed: int, max_history: int = 50, users: int | None = None) -> World:
    """MovieLens: will a user rate a film 4 or more, given the films that the user rated so before?

    In ``$HEADGATE_MOVIELENS`` (a file or folder that :func:`headgate.data.read_movielens` takes), or in ``data/ml-100k`` of
    ``$HEADGATE_SHARED``. As in the paper, users are split, not their ratings; a film's category is its first genre.

    Args:
        seed: of the split.
        max_history: films that a model sees.
        users: number of users to keep, for a smaller experiment.

    Raises:
        DataError: no such data.
    """
    table = read_movielens(_movielens_path())
    if table.items is None:
        raise DataError("MovieLens must come with its file of films, whose genres are the categories")
    names = table.items.genre_names
    first = [1 + names.index(genres[0]) if genres else 0 for genres in table.items.genres]
    order = np.lexsort((table.timestamp, table.user))
    clicked = table.rating[order] >= 4
    user, item = table.user[order], table.item[order]
    before: Int64[np.ndarray, " rows"] = np.cumsum(clicked) - clicked
    start: Int64[np.ndarray, " rows"] = before[np.searchsorted(user, user)]
    rows = Rows(*map(torch.from_numpy, (user, item, start, before, clicked.astype(np.int64))))
    drawn = torch.randperm(table.num_users, generator=stream_generator(seed, "users"))[:users]
    cuts = [round(share * len(drawn)) for share in (_TEST_SHARE, _TEST_SHARE + _CHOOSE_SHARE)]
    parts = [rows.take(torch.isin(rows.user, part)) for part in drawn.tensor_split(cuts)]
    return World(
        ids={
            "item": (table.num_items, torch.arange(table.num_items)),
            "category": (len(names) + 1, torch.tensor(first)),
        },
        numbers={},
        behaviours=torch.from_numpy(item[clicked]),
        max_history=max_history,
        train=parts[2],
        choose=parts[1],
        test=parts[0],
    )


def amazon_world(seed: int, max_history: int = 100) -> World:
    """Amazon Electronics (5-core), with the published protocol.

    In the folder ``$HEADGATE_AMAZON``: RecBole's atomic files ``*.inter`` and ``*.item``. A user's reviews b_1 … b_n in
    order of time: training predicts b_{k+1} from b_1 … b_k for k = 1 … n - 2, the test b_n from all before; each beside one
    product that the user did not review. The category is the last one listed.

    Args:
        seed: of the products that were not reviewed.
        max_history: products that a model sees.

    Raises:
        DataError: no such data.
    """
    folder = os.environ.get("HEADGATE_AMAZON")
    if folder is None:
        raise DataError("Amazon's reviews were not found; set HEADGATE_AMAZON to the folder with *.inter and *.item")
    table, categories = read_reviews(Path(folder))
    names, category = np.unique(categories, return_inverse=True)
    order = np.lexsort((table.timestamp, table.user))
    user, item = table.user[order], table.item[order]
    start = np.searchsorted(user, user)
    last = np.searchsorted(user, user, side="right") - 1
    place = np.arange(len(user))
    generator = stream_generator(seed, "negatives")
    parts = []
    for kept in ((place > start) & (place < last), (place > start) & (place == last)):
        chosen = np.flatnonzero(kept)
        who = torch.from_numpy(user[chosen])
        ends = torch.from_numpy(chosen)
        begins = torch.from_numpy(start[chosen])
        seen = torch.from_numpy(item[chosen])
        unseen = table.sample_negatives(who, 1, generator)[:, 0]
        ones = torch.ones_like(seen)
        pairs = ((who, who), (seen, unseen), (begins, begins), (ends, ends), (ones, 0 * ones))
        parts.append(Rows(*(torch.cat(pair) for pair in pairs)))
    return World(
        ids={
            "item": (table.num_items, torch.arange(table.num_items)),
            "category": (len(names), torch.from_numpy(category)),
        },
        numbers={},
        behaviours=torch.from_numpy(item),
        max_history=max_history,
        train=parts[0],
        choose=None,
        test=parts[1],
    )


def read_reviews(folder: Path) -> tuple[Interactions, list[str]]:
    """Read reviews in RecBole's atomic files.

    Args:
        folder: holds one ``*.inter`` with user_id, item_id and timestamp, and one ``*.item`` with item_id and categories.

    Returns:
        The reviews (every rating counts as 5), and the last category of every item, empty where none is listed.

    Raises:
        DataError: not exactly one file of each kind, a missing column, or an item without a row.
    """
    users, items, times = _columns(_only(folder, "*.inter"), ("user_id", "item_id", "timestamp"))
    names, listed = _columns(_only(folder, "*.item"), ("item_id", "categories"))
    user_ids, user = np.unique(np.array(users), return_inverse=True)
    item_ids, item = np.unique(np.array(items), return_inverse=True)
    last = {name: cell.split(",")[-1].strip(" '\"[]") for name, cell in zip(names, listed, strict=True)}
    lacking = [str(name) for name in item_ids if str(name) not in last]
    if lacking:
        raise DataError(f"{folder} lacks the categories of {len(lacking)} items, the first {lacking[0]!r}")
    try:
        timestamp = np.array(times, dtype=np.float64).astype(np.int64)
    except ValueError as error:
        raise DataError(f"{folder}: timestamp must hold numbers: {error}") from error
    table = Interactions(user, item, np.full(len(user), 5.0), timestamp, user_ids, item_ids)
    return table, [last[str(name)] for name in item_ids]


def _movielens_path() -> Path:
    own, shared = os.environ.get("HEADGATE_MOVIELENS"), os.environ.get("HEADGATE_SHARED")
    if own is None and shared is None:
        raise DataError(
            "MovieLens was not found; set HEADGATE_MOVIELENS to its folder, or HEADGATE_SHARED to one with data/ml-100k"
        )
    return Path(own) if own is not None else Path(str(shared)) / "data" / "ml-100k"


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{folder} must hold exactly one {pattern}, found {len(found)}")
    return found[0]


def _columns(path: Path, wanted: tuple[str, ...]) -> list[list[str]]:
    """Some columns of a table whose first row names them, as ``name:type``."""
    rows = read_rows(path, "\t", quoted=False)
    header = [cell.partition(":")[0].strip() for cell in next(rows)[1]]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; found {', '.join(header)}")
    places = [header.index(name) for name in wanted]
    columns: list[list[str]] = [[] for _ in wanted]
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} cells, found {len(cells)}")
        for column, place in zip(columns, places, strict=True):
            column.append(cells[place])
    return columns
