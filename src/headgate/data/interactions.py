"""Users, items and ratings: MovieLens in each of its public layouts, with the splits and histories that ranking models need.

Source: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015.

=================== ======================================== ==========================================
layout              files                                    published with
=================== ======================================== ==========================================
RecBole atomic      ``*.inter``, ``*.item``, ``*.user``      RecBole's converted data sets
tab                 ``u.data``, ``u.item``, ``u.user``       MovieLens 100K
double colon        ``ratings.dat``, ``movies.dat``, …       MovieLens 1M and 10M
CSV                 ``ratings.csv``, ``movies.csv``          MovieLens latest, 20M, 25M, 32M
=================== ======================================== ==========================================

A ranking model such as DIN (Zhou et al., KDD 2018, arXiv 1706.06978) scores an item for a user from the items that the
user met *before*: row ``r`` of the table with the user's earlier rows, oldest first and padded on the right::

    user 7 in time order      item 3   item 9   item 4   item 1
    histories_before(row of item 1, max_length=2)  →  items [9, 4], mask [True, True]
    histories_before(row of item 9, max_length=2)  →  items [3, 0], mask [True, False]
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, Shaped
from torch import Tensor

from headgate.data.text import read_rows
from headgate.errors import DataError
from headgate.validate import check_integer, check_positive, check_shape

__all__ = ["Histories", "InteractionSplits", "Interactions", "Items", "read_movielens"]


class InteractionSplits(NamedTuple):
    """Row numbers of the table for training, for choosing, and for the final figure; each in time order."""

    train: Int64[np.ndarray, " train"]
    validation: Int64[np.ndarray, " validation"]
    test: Int64[np.ndarray, " test"]


class Histories(NamedTuple):
    """Items in time order, oldest first, padded on the right.

    Attributes:
        items: int64 of shape (batch, max_length); 0 where ``mask`` is False.
        rows: the table's row of each item, for its rating and time; 0 where ``mask`` is False.
        mask: bool of shape (batch, max_length), True for an item and False for padding.
    """

    items: Int64[Tensor, "batch max_length"]
    rows: Int64[Tensor, "batch max_length"]
    mask: Bool[Tensor, "batch max_length"]


@dataclass(frozen=True, eq=False)
class Items:
    """What is known of the items, in the order of their ids.

    Attributes:
        titles: the titles, without the year.
        genres: the genres of each, possibly none.
        years: int64, the year of release; 0 where unknown.
    """

    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    years: Int64[np.ndarray, " items"]

    @cached_property
    def genre_names(self) -> tuple[str, ...]:
        """All genres that occur, sorted."""
        return tuple(sorted({genre for genres in self.genres for genre in genres}))


@dataclass(frozen=True, eq=False)
class Interactions:
    """A table of ratings, in the order of the file.

    Ids are contiguous: ``user`` lies in [0, num_users) and ``item`` in [0, num_items), in the order of the original ids,
    and every id occurs in the table.

    Attributes:
        user: int64 of shape (rows,).
        item: int64 of shape (rows,).
        rating: float64 of shape (rows,).
        timestamp: int64 of shape (rows,), seconds since 1970.
        user_ids: the original id of each user (int64, or strings where not all are whole numbers).
        item_ids: the original id of each item.
        items: titles, genres and years, where the data set has them.
        users: the users' attributes by name (``age``, ``gender``, ``occupation``, ``zip_code``), as strings.
    """

    user: Int64[np.ndarray, " rows"]
    item: Int64[np.ndarray, " rows"]
    rating: Float64[np.ndarray, " rows"]
    timestamp: Int64[np.ndarray, " rows"]
    user_ids: Shaped[np.ndarray, " users"]
    item_ids: Shaped[np.ndarray, " items"]
    items: Items | None = None
    users: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = [len(self.user), len(self.item), len(self.rating), len(self.timestamp)]
        if len(set(lengths)) != 1 or lengths[0] == 0:
            raise ValueError(f"user, item, rating and timestamp must have one equal, positive length, got {lengths}")
        for name, ids, count in (("user", self.user, self.num_users), ("item", self.item, self.num_items)):
            if not 0 <= ids.min() <= ids.max() < count:
                raise ValueError(f"{name} must lie in [0, {count}), got {ids.min()} to {ids.max()}")

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_users(self) -> int:
        """The number of different users."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """The number of different items."""
        return len(self.item_ids)

    def leave_one_out(self) -> InteractionSplits:
        """Give each user's last row to test, the last but one to validation and the others to training.

        Rows of one time keep the order of the file. A user with fewer than three rows stays in training whole.
        """
        sizes = np.diff(self._starts)
        place_from_end = np.repeat(self._starts[1:], sizes) - np.arange(len(self))
        long_enough = np.repeat(sizes >= 3, sizes)
        test, validation = long_enough & (place_from_end == 1), long_enough & (place_from_end == 2)
        sides = (~test & ~validation, validation, test)
        return InteractionSplits(*(self._by_time(self._user_order[side]) for side in sides))

    def split_by_time(self, validation: float = 0.1, test: float = 0.1) -> InteractionSplits:
        """Cut the whole table at two moments, so that training knows nothing of the future.

        Rows of one time are never parted: a cut moves to the later side of its moment, so the shares are near the wanted
        ones, not exact.

        Args:
            validation: share of the rows for validation.
            test: share of the rows for test, the latest.

        Raises:
            ValueError: shares outside (0, 1) or that leave a side without a row.
        """
        if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
            raise ValueError(f"validation and test must be positive and add up to below 1, got {validation} and {test}")
        order = self._by_time(np.arange(len(self)))
        times = self.timestamp[order]
        cuts = []
        for share in (1 - validation - test, 1 - test):
            last = max(math.ceil(share * len(self) - 1e-6), 1) - 1
            cuts.append(int(np.searchsorted(times, times[last], side="right")))
        parts = InteractionSplits(order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :])
        if min(map(len, parts)) == 0:
            sizes = [len(part) for part in parts]
            raise ValueError(f"validation={validation} and test={test} leave a side without a row, got sizes {sizes}")
        return parts

    def select(self, rows: Int64[np.ndarray, " chosen"]) -> Interactions:
        """Keep the given rows, in the given order; ids keep their meaning, so some may no longer occur."""
        rows = np.asarray(rows, dtype=np.int64)
        return Interactions(
            self.user[rows],
            self.item[rows],
            self.rating[rows],
            self.timestamp[rows],
            self.user_ids,
            self.item_ids,
            self.items,
            self.users,
        )

    def sequences(self, max_length: int) -> Histories:
        """Give every user's last ``max_length`` items in time order; rows of one time keep the order of the file.

        Returns:
            Histories of shape (num_users, max_length).

        Raises:
            ValueError: a length below 1.
        """
        return self._histories(self._starts[:-1], self._starts[1:], max_length)

    def histories_before(self, rows: Int64[np.ndarray, " batch"], max_length: int) -> Histories:
        """Give for each row the last ``max_length`` items that its user met before it.

        Args:
            rows: row numbers of this table.
            max_length: items to keep, the latest ones.

        Returns:
            Histories of shape (batch, max_length); the mask of a user's first row is all False.

        Raises:
            ValueError: a length below 1.
            IndexError: a row outside the table.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows must lie in [0, {len(self)}), got {rows.min()} to {rows.max()}")
        return self._histories(self._starts[self.user[rows]], self._places[rows], max_length)

    def sample_negatives(
        self, users: Int64[Tensor, " batch"], count: int, generator: torch.Generator
    ) -> Int64[Tensor, "batch count"]:
        """Draw items that a user has no row with, each such item with the same probability.

        Args:
            users: user ids of shape (batch,).
            count: items per user, drawn independently (one can come twice).
            generator: a CPU generator.

        Returns:
            Item ids of shape (batch, count).

        Raises:
            TypeError: ids that are not int64 or int32.
            ValueError: a wrong rank, an id out of range, a count below 1, or a user who has met every item.
        """
        check_shape("users", users, (None,), "batch")
        check_integer("users", users)
        check_positive(count=count)
        if len(users) and not 0 <= int(users.min()) <= int(users.max()) < self.num_users:
            raise ValueError(f"users must lie in [0, {self.num_users}), got {int(users.min())} to {int(users.max())}")
        who = users.cpu().numpy().astype(np.int64)[:, None]
        keys, starts = self._met
        unmet = self.num_items - np.diff(starts)[who]
        if (unmet == 0).any():
            raise ValueError(f"users must have an item left to draw, got user {who[unmet == 0][0]} who met all")
        # The r-th item that a user has not met is r plus the number of the met ones with s_j − j ≤ r.
        rank = torch.randint(2**62, (len(who), count), generator=generator).numpy() % unmet
        smaller = np.searchsorted(keys, who * (self.num_items + 1) + rank, side="right") - starts[who]
        return torch.from_numpy(rank + smaller)

    @cached_property
    def _user_order(self) -> Int64[np.ndarray, " rows"]:
        """Row numbers by user, then time, then place in the file."""
        return np.lexsort((self.timestamp, self.user))

    @cached_property
    def _places(self) -> Int64[np.ndarray, " rows"]:
        """Where each row stands in :attr:`_user_order`."""
        places = np.empty(len(self), dtype=np.int64)
        places[self._user_order] = np.arange(len(self))
        return places

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " users_and_one"]:
        """Where each user's rows start in :attr:`_user_order`; the last entry is their end."""
        return np.concatenate([[0], np.bincount(self.user, minlength=self.num_users).cumsum()])

    @cached_property
    def _met(self) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " users_and_one"]]:
        """The different items s_0 < s_1 < … of every user as rising keys, and where each user's keys start.

        The key of s_j is ``user · (num_items + 1) + s_j − j``: s_j − j never falls with j, so a binary search counts the
        met items below the r-th unmet one.
        """
        pairs = np.unique(self.user * self.num_items + self.item)
        starts = np.searchsorted(pairs, np.arange(self.num_users + 1) * self.num_items)
        user, item = np.divmod(pairs, self.num_items)
        return user * (self.num_items + 1) + item - (np.arange(len(pairs)) - starts[user]), starts

    def _by_time(self, rows: np.ndarray) -> np.ndarray:
        rows = np.sort(rows)
        return rows[np.argsort(self.timestamp[rows], kind="stable")]

    def _histories(self, starts: np.ndarray, ends: np.ndarray, max_length: int) -> Histories:
        """The last entries of the ranges [start, end) of :attr:`_user_order`."""
        check_positive(max_length=max_length)
        firsts = np.maximum(starts, ends - max_length)
        places = firsts[:, None] + np.arange(max_length)
        mask = places < ends[:, None]
        rows = np.where(mask, self._user_order[np.where(mask, places, 0)], 0)
        return Histories(
            torch.from_numpy(np.where(mask, self.item[rows], 0)), torch.from_numpy(rows), torch.from_numpy(mask)
        )


def read_movielens(path: str | os.PathLike[str]) -> Interactions:
    """Read MovieLens in any of its public layouts (see the module's table).

    Titles, genres and users' attributes are read from the files beside the ratings, where they exist. Items that nobody
    rated are left out.

    Args:
        path: the file of ratings, or a folder that holds exactly one of ``*.inter``, ``u.data``, ``ratings.dat`` and
            ``ratings.csv``.

    Raises:
        DataError: no such file, more than one, an empty one, missing columns (named), a row with a wrong number of cells,
            a cell that is no number, a rating outside [0.5, 5] (line and column named), text that is not UTF-8 (the byte
            offset is named), or an id that the file of items or users lacks or has twice.
    """
    path = _ratings_file(Path(path))
    layout = _LAYOUTS[path.suffix]
    users, items, ratings, timestamps = _rating_columns(path, layout.ratings)
    user_ids, user = np.unique(_whole_numbers(users), return_inverse=True)
    item_ids, item = np.unique(_whole_numbers(items), return_inverse=True)
    return Interactions(
        user.astype(np.int64),
        item.astype(np.int64),
        ratings,
        timestamps,
        user_ids,
        item_ids,
        _read_items(path, layout, item_ids),
        _read_users(path, layout, user_ids),
    )


class _Table(NamedTuple):
    """How one file is written."""

    name: str  # "*" stands for the stem of the file of ratings
    delimiter: str
    columns: tuple[str, ...] | None  # None: the first row names them


class _Layout(NamedTuple):
    """The files of a data set."""

    ratings: _Table
    items: _Table
    users: _Table | None
    genre_delimiter: str


# fmt: off
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_TAB = _Layout(
    _Table("u.data", "\t", _RATING_COLUMNS),
    _Table("u.item", "|", ("item_id", "title", "year", "video_date", "url", *_GENRES)),
    _Table("u.user", "|", ("user_id", "age", "gender", "occupation", "zip_code")),
    "",
)
_LAYOUTS = {
    ".inter": _Layout(_Table("*.inter", "\t", None), _Table("*.item", "\t", None), _Table("*.user", "\t", None), " "),
    ".data": _TAB,
    ".base": _TAB,
    ".test": _TAB,
    ".dat": _Layout(
        _Table("ratings.dat", "::", _RATING_COLUMNS),
        _Table("movies.dat", "::", ("item_id", "title", "genres")),
        _Table("users.dat", "::", ("user_id", "gender", "age", "occupation", "zip_code")),
        "|",
    ),
    ".csv": _Layout(_Table("ratings.csv", ",", None), _Table("movies.csv", ",", None), None, "|"),
}
# What headers call our columns: RecBole's names (after which ":type" stands) and those of MovieLens' CSV files.
_ALIASES = {
    "userId": "user_id",
    "movieId": "item_id",
    "movie_title": "title",
    "release_year": "year",
    "class": "genres",
    "genre": "genres",
}
_NO_GENRES = "(no genres listed)"
_CHUNK = 100_000
# "(1995)", "(2006–2007)", "(2010–)" at the end of a title, perhaps followed by "(V)" for video or "(TV)".
_YEAR_IN_TITLE = re.compile(r"\s*\((\d{4})(?:[-–]\d{0,4})?\)(?:\s*\(T?V\))?\s*$")
_YEAR = re.compile(r"\b(\d{4})\b")


def _ratings_file(path: Path) -> Path:
    names = [layout.ratings.name for layout in dict.fromkeys(_LAYOUTS.values())]
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path} does not exist; expected a file of ratings or a folder with one")
        if path.suffix not in _LAYOUTS:
            raise DataError(f"{path} is no file of ratings; expected {', '.join(names)}")
        return path
    found = [file for name in names for file in sorted(path.glob(name))]
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise DataError(
            f"{path} must hold exactly one file of ratings; expected one of {', '.join(names)}, found {listed}"
        )
    return found[0]


def _rows(path: Path, table: _Table, needed: Sequence[str]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The names of the columns and the rows below them, each checked for its number of cells."""
    # Tables with a header are UTF-8; the older ones without are Latin-1 in some releases.
    rows = read_rows(path, table.delimiter, quoted=table.delimiter == ",", latin1=table.columns is not None)
    if table.columns is None:
        header = [cell.partition(":")[0].strip() for cell in next(rows)[1]]
        columns = [_ALIASES.get(name, name) for name in header]
    else:
        columns = header = list(table.columns)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; found {', '.join(header)}")

    def checked() -> Iterator[tuple[int, list[str]]]:
        for line, cells in rows:
            if len(cells) != len(columns):
                raise DataError(f"{path}, line {line}: expected {len(columns)} cells, found {len(cells)}")
            yield line, cells

    return columns, checked()


def _rating_columns(path: Path, table: _Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users and items as strings, ratings and times as numbers; by chunks, because a cell's object needs much memory."""
    columns, rows = _rows(path, table, _RATING_COLUMNS)
    places = [columns.index(name) for name in _RATING_COLUMNS]
    chunks = []
    while chunk := list(itertools.islice(rows, _CHUNK)):
        lines = [line for line, _ in chunk]
        users, items, ratings, times = ([cells[place] for _, cells in chunk] for place in places)
        for name, cells in (("user_id", users), ("item_id", items)):
            _check_ids(path, lines, name, cells, numeric=path.suffix != ".inter")
        rating = _numbers(path, lines, "rating", ratings)
        time = _numbers(path, lines, "timestamp", times)
        _refuse(path, lines, "rating", ratings, (rating < 0.5) | (rating > 5), "a rating in [0.5, 5]")
        _refuse(path, lines, "timestamp", times, (time < 0) | (time % 1 != 0), "whole seconds since 1970")
        chunks.append((np.array(users), np.array(items), rating, time.astype(np.int64)))
    if not chunks:
        raise DataError(f"{path} holds a header and no rows; expected ratings")
    user, item, rating, time = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return user, item, rating, time


def _check_ids(path: Path, lines: Sequence[int], name: str, cells: Sequence[str], numeric: bool) -> None:
    for line, cell in zip(lines, cells, strict=True):
        if not cell or (numeric and not (cell.isascii() and cell.isdigit())):
            expected = "a whole number" if numeric else "an id"
            raise DataError(f"{path}, line {line}, column {name!r}: expected {expected}, found {cell!r}")


def _numbers(path: Path, lines: Sequence[int], name: str, cells: Sequence[str]) -> np.ndarray:
    values = np.empty(len(cells))
    for place, cell in enumerate(cells):
        try:
            values[place] = float(cell)
        except ValueError:
            values[place] = math.nan
    _refuse(path, lines, name, cells, ~np.isfinite(values), "a finite number")
    return values


def _refuse(
    path: Path, lines: Sequence[int], name: str, cells: Sequence[str], wrong: np.ndarray, expected: str
) -> None:
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(f"{path}, line {lines[place]}, column {name!r}: expected {expected}, found {cells[place]!r}")


def _whole_numbers(ids: np.ndarray) -> np.ndarray:
    """Ids as int64 where every one is a whole number in its usual form, else as they are."""
    try:
        numbers = ids.astype(np.int64)
    except (ValueError, OverflowError):
        return ids
    return numbers if (numbers.astype(ids.dtype) == ids).all() else ids


def _read_items(ratings: Path, layout: _Layout, item_ids: np.ndarray) -> Items | None:
    side = _side_table(ratings, layout.items, "item_id", item_ids, ("title",))
    if side is None:
        return None
    columns, rows = side
    titles, years, genres = [], [], []
    for cells in rows:
        record = dict(zip(columns, cells, strict=True))
        title, year = _title_and_year(record["title"], record.get("year", ""))
        titles.append(title)
        years.append(year)
        if "genres" in record:
            listed = record["genres"].strip()
            names = [] if listed == _NO_GENRES else listed.split(layout.genre_delimiter)
            genres.append(tuple(name for name in names if name))
        else:
            genres.append(tuple(name for name in _GENRES if record.get(name) == "1"))
    return Items(tuple(titles), tuple(genres), np.array(years, dtype=np.int64))


def _read_users(ratings: Path, layout: _Layout, user_ids: np.ndarray) -> dict[str, tuple[str, ...]]:
    side = _side_table(ratings, layout.users, "user_id", user_ids, ()) if layout.users is not None else None
    if side is None:
        return {}
    columns, rows = side
    return {name: values for name, values in zip(columns, zip(*rows, strict=True), strict=True) if name != "user_id"}


def _side_table(
    ratings: Path, table: _Table, key: str, ids: np.ndarray, needed: Sequence[str]
) -> tuple[list[str], list[list[str]]] | None:
    """The row of each id, in their order; None where the file does not exist."""
    path = ratings.parent / table.name.replace("*", ratings.stem)
    if not path.exists():
        return None
    columns, rows = _rows(path, table, (key, *needed))
    place = columns.index(key)
    by_id: dict[str, list[str]] = {}
    for line, cells in rows:
        if cells[place] in by_id:
            raise DataError(f"{path}, line {line}: the {key} {cells[place]!r} comes twice; expected different ids")
        by_id[cells[place]] = cells
    names = [str(name) for name in ids]
    lacking = [name for name in names if name not in by_id]
    if lacking:
        raise DataError(f"{path} lacks {len(lacking)} ids that {ratings.name} has, the first {key} {lacking[0]!r}")
    return columns, [by_id[name] for name in names]


def _title_and_year(title: str, year: str) -> tuple[str, int]:
    """Take the year off the end of a title; where it has none, it is that of the column (1995 or 01-Jan-1995)."""
    in_column, in_title = _YEAR.search(year), _YEAR_IN_TITLE.search(title)
    bare = _YEAR_IN_TITLE.sub("", title).strip()
    found = in_title or in_column
    return bare, int(found[1]) if found else 0
