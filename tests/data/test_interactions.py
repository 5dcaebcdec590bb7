"""MovieLens in its four layouts, chronological splits, histories and negatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headgate.data.interactions import Interactions, read_movielens
from headgate.data.seeding import stream_generator
from headgate.errors import DataError

# user, movie, rating, time; the original ids have gaps and their order is not that of the file.
_RATINGS = [
    ("30", "7", "4", "1000"),
    ("9", "100", "5", "999"),
    ("30", "100", "0.5", "1000"),
    ("9", "7", "3.5", "1000"),
    ("30", "2", "1", "500"),
]
# fmt: off
_GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on
# Movie 55 was rated by nobody.
_MOVIES = {
    "2": ("Misérables, Les", "1995", ["Drama", "Musical"]),
    "7": ("Twelve Monkeys", "1996", ["Sci-Fi"]),
    "55": ("Unseen", "1990", ["War"]),
    "100": ('Land Before Time, "The"', "1988", ["Animation", "Children's"]),
}
_USERS = {"9": ("24", "M", "other", "02138"), "30": ("53", "F", "writer", "T8H1N")}


def _lines(path: Path, rows: list[str], encoding: str = "utf-8") -> None:
    path.write_bytes(("\n".join(rows) + "\n").encode(encoding))


def _recbole(folder: Path) -> Path:
    _lines(
        folder / "small.inter",
        ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *map("\t".join, _RATINGS)],
    )
    movies = [f"{key}\t{title}\t{year}\t{' '.join(genres)}" for key, (title, year, genres) in _MOVIES.items()]
    _lines(
        folder / "small.item", ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", *movies]
    )
    users = ["\t".join((key, *values)) for key, values in _USERS.items()]
    _lines(
        folder / "small.user",
        ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token", *users],
    )
    return folder / "small.inter"


def _tab(folder: Path) -> Path:
    _lines(folder / "u.data", list(map("\t".join, _RATINGS)))
    movies = [
        "|".join(
            [key, f"{title} ({year})", f"01-Jan-{year}", "", "http://x", *(str(int(g in genres)) for g in _GENRES)]
        )
        for key, (title, year, genres) in _MOVIES.items()
    ]
    _lines(folder / "u.item", movies, "latin-1")
    _lines(folder / "u.user", ["|".join((key, *values)) for key, values in _USERS.items()])
    return folder / "u.data"


def _double_colon(folder: Path) -> Path:
    _lines(folder / "ratings.dat", list(map("::".join, _RATINGS)))
    movies = [f"{key}::{title} ({year})::{'|'.join(genres)}" for key, (title, year, genres) in _MOVIES.items()]
    _lines(folder / "movies.dat", movies, "latin-1")
    _lines(
        folder / "users.dat", ["::".join((key, sex, age, job, code)) for key, (age, sex, job, code) in _USERS.items()]
    )
    return folder / "ratings.dat"


def _csv(folder: Path) -> Path:
    _lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *map(",".join, _RATINGS)])
    quoted = {key: title.replace('"', '""') for key, (title, _, _) in _MOVIES.items()}
    movies = [f'{key},"{quoted[key]} ({year})",{"|".join(genres)}' for key, (_, year, genres) in _MOVIES.items()]
    _lines(folder / "movies.csv", ["movieId,title,genres", *movies])
    return folder / "ratings.csv"


_WRITERS: dict[str, Callable[[Path], Path]] = {"recbole": _recbole, "tab": _tab, "colons": _double_colon, "csv": _csv}
_all_layouts = pytest.mark.parametrize("writer", _WRITERS.values(), ids=_WRITERS.keys())


def _table(
    user: list[int], timestamp: list[int], item: list[int] | None = None, items: int | None = None
) -> Interactions:
    item = item if item is not None else list(range(len(user)))
    return Interactions(
        np.array(user),
        np.array(item),
        np.ones(len(user)),
        np.array(timestamp),
        np.arange(max(user) + 1),
        np.arange(items if items is not None else max(item) + 1),
    )


@_all_layouts
def test_every_layout_gives_the_same_table(tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    file = writer(tmp_path)
    for path in (tmp_path, file):
        data = read_movielens(path)
        assert data.user_ids.tolist() == [9, 30]
        assert data.item_ids.tolist() == [2, 7, 100]
        assert data.user.tolist() == [1, 0, 1, 0, 1]
        assert data.item.tolist() == [1, 2, 2, 1, 0]
        assert data.rating.tolist() == [4, 5, 0.5, 3.5, 1]
        assert data.timestamp.tolist() == [1000, 999, 1000, 1000, 500]
        assert (data.user.dtype, data.item.dtype, data.timestamp.dtype) == (np.int64, np.int64, np.int64)
        assert (len(data), data.num_users, data.num_items) == (5, 2, 3)


@_all_layouts
def test_every_layout_gives_the_same_titles_years_and_genres(tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    items = read_movielens(writer(tmp_path)).items
    assert items is not None
    assert items.titles == ("Misérables, Les", "Twelve Monkeys", 'Land Before Time, "The"')
    assert items.years.tolist() == [1995, 1996, 1988]
    assert items.genres == (("Drama", "Musical"), ("Sci-Fi",), ("Animation", "Children's"))
    assert items.genre_names == ("Animation", "Children's", "Drama", "Musical", "Sci-Fi")


@pytest.mark.parametrize("writer", [_recbole, _tab, _double_colon])
def test_layouts_with_users_give_their_attributes_as_written(tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    users = read_movielens(writer(tmp_path)).users
    assert dict(users) == {
        "age": ("24", "53"),
        "gender": ("M", "F"),
        "occupation": ("other", "writer"),
        "zip_code": ("02138", "T8H1N"),
    }


@_all_layouts
def test_ratings_alone_are_enough(tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    file = writer(tmp_path)
    for other in tmp_path.iterdir():
        if other != file:
            other.unlink()
    data = read_movielens(tmp_path)
    assert data.items is None
    assert data.users == {}
    assert data.item.tolist() == [1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story (1995)", ("Toy Story", 1995)),
        ("1984", ("1984", 0)),
        ("2001: A Space Odyssey (1968)", ("2001: A Space Odyssey", 1968)),
        ("Land Before Time III (1995) (V)", ("Land Before Time III", 1995)),
        ("Death Note (2006–2007)", ("Death Note", 2006)),
        ("Babylon 5", ("Babylon 5", 0)),
        ("Seven (a.k.a. Se7en) (1995) ", ("Seven (a.k.a. Se7en)", 1995)),
    ],
)
def test_the_year_is_taken_off_the_title(tmp_path: Path, title: str, expected: tuple[str, int]) -> None:
    _lines(tmp_path / "ratings.csv", ["userId,movieId,rating,timestamp", "1,1,3,5"])
    _lines(tmp_path / "movies.csv", ["movieId,title,genres", f'1,"{title}",(no genres listed)'])
    items = read_movielens(tmp_path).items
    assert items is not None
    assert (items.titles[0], int(items.years[0])) == expected
    assert items.genres == ((),)


def test_recbole_ids_that_are_no_numbers_stay_strings(tmp_path: Path) -> None:
    header = "item_id:token\tuser_id:token\ttimestamp:float\trating:float"
    _lines(tmp_path / "books.inter", [header, "B07\tA2\t1.365e9\t5.0", "007\tA1\t10.0\t2.0", "7\tA1\t11\t2"])
    data = read_movielens(tmp_path)
    assert data.user_ids.tolist() == ["A1", "A2"]
    assert data.item_ids.tolist() == ["007", "7", "B07"]
    assert data.item.tolist() == [2, 0, 1]
    assert data.timestamp.tolist() == [1_365_000_000, 10, 11]


def test_recbole_ids_with_leading_zeros_stay_different(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    _lines(tmp_path / "books.inter", [header, "1\t007\t5\t1", "1\t7\t5\t2"])
    data = read_movielens(tmp_path)
    assert data.item_ids.tolist() == ["007", "7"]
    assert data.user_ids.tolist() == [1]


def test_the_year_of_the_title_goes_before_the_release_date(tmp_path: Path) -> None:
    _lines(tmp_path / "u.data", ["1\t1\t3\t5", "1\t2\t3\t5"])
    flags = "|".join("0" * 19)
    _lines(tmp_path / "u.item", [f"1|Vertigo (1958)|01-Jan-1996|||{flags}", f"2|Vertigo|01-Jan-1996|||{flags}"])
    items = read_movielens(tmp_path).items
    assert items is not None
    assert items.years.tolist() == [1958, 1996]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("1,2,3", "line 3: expected 4 cells, found 3"),
        ("1,2,3,4,5", "line 3: expected 4 cells, found 5"),
        ("x,2,3,4", "line 3, column 'user_id': expected a whole number, found 'x'"),
        ("1,,3,4", "line 3, column 'item_id': expected a whole number, found ''"),
        ("1,2,good,4", "line 3, column 'rating': expected a finite number, found 'good'"),
        ("1,2,nan,4", "line 3, column 'rating': expected a finite number, found 'nan'"),
        ("1,2,6,4", r"line 3, column 'rating': expected a rating in \[0.5, 5\], found '6'"),
        ("1,2,0,4", r"line 3, column 'rating': expected a rating in \[0.5, 5\], found '0'"),
        ("1,2,3,noon", "line 3, column 'timestamp': expected a finite number, found 'noon'"),
        ("1,2,3,-4", "line 3, column 'timestamp': expected whole seconds since 1970, found '-4'"),
        ("1,2,3,4.5", "line 3, column 'timestamp': expected whole seconds since 1970, found '4.5'"),
        ('1,2,3,"4', "line 3: .*expected a table"),
    ],
)
def test_a_wrong_cell_is_named_by_line_and_column(tmp_path: Path, row: str, match: str) -> None:
    (tmp_path / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n1,2,3,4\n{row}")
    with pytest.raises(DataError, match=match) as caught:
        read_movielens(tmp_path)
    assert "ratings.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_are_counted_over_the_chunks_that_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headgate.data.interactions._CHUNK", 2)
    path = _csv(tmp_path)
    assert read_movielens(tmp_path).timestamp.tolist() == [1000, 999, 1000, 1000, 500]
    path.write_text(path.read_text() + "1,7,9,4\n")
    with pytest.raises(DataError, match="line 7, column 'rating'"):
        read_movielens(tmp_path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    _lines(tmp_path / "a.inter", ["user_id:token\titem_id:token\trating:float", "1\t2\t3"])
    with pytest.raises(DataError, match=r"a\.inter lacks the columns timestamp; found user_id, item_id, rating"):
        read_movielens(tmp_path)
    _recbole(tmp_path)
    _lines(tmp_path / "small.item", ["item_id:token\tname:token", "1\tx"])
    with pytest.raises(DataError, match=r"small\.item lacks the columns title; found item_id, name"):
        read_movielens(tmp_path / "small.inter")


def test_missing_empty_strange_and_doubled_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_movielens(tmp_path / "ml")
    with pytest.raises(DataError, match=r"expected one of \*\.inter, u\.data, ratings\.dat, ratings\.csv, found none"):
        read_movielens(tmp_path)
    (tmp_path / "ratings.json").write_text("{}")
    with pytest.raises(DataError, match=r"ratings\.json is no file of ratings"):
        read_movielens(tmp_path / "ratings.json")
    (tmp_path / "u.data").touch()
    with pytest.raises(DataError, match=r"u\.data is empty"):
        read_movielens(tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(DataError, match=r"found u\.data, ratings\.csv"):
        read_movielens(tmp_path)
    with pytest.raises(DataError, match=r"ratings\.csv holds a header and no rows"):
        read_movielens(tmp_path / "ratings.csv")
    (tmp_path / "ratings.csv").write_bytes(b"userId,movieId,rating,timestamp\n1,2,3,\xe9")
    with pytest.raises(DataError, match="byte 0xe9 at offset 38"):
        read_movielens(tmp_path / "ratings.csv")


@_all_layouts
def test_ids_that_the_items_lack_or_have_twice_are_refused(tmp_path: Path, writer: Callable[[Path], Path]) -> None:
    file = writer(tmp_path)
    items = next(path for path in tmp_path.iterdir() if "item" in path.name or "movies" in path.name)
    rows = items.read_bytes().splitlines(keepends=True)
    kept = [row for row in rows if not row.startswith(b"7")]
    items.write_bytes(b"".join(kept))
    with pytest.raises(DataError, match=f"{items.name} lacks 1 ids that {file.name} has, the first item_id '7'"):
        read_movielens(file)
    items.write_bytes(b"".join([*rows, rows[-1]]))
    with pytest.raises(DataError, match=f"{items.name}, line {len(rows) + 1}: the item_id '100' comes twice"):
        read_movielens(file)


def test_ids_that_the_users_lack_are_refused(tmp_path: Path) -> None:
    _tab(tmp_path)
    (tmp_path / "u.user").write_text("9|24|M|other|02138\n")
    with pytest.raises(DataError, match=r"u\.user lacks 1 ids that u\.data has, the first user_id '30'"):
        read_movielens(tmp_path)


def test_leave_one_out_takes_the_last_two_rows_in_time_with_stable_ties() -> None:
    #             row  0  1  2  3  4  5  6  7
    data = _table([0, 1, 0, 0, 1, 2, 0, 1], [5, 8, 9, 9, 1, 0, 2, 3])
    splits = data.leave_one_out()
    assert splits.test.tolist() == [1, 3]
    assert splits.validation.tolist() == [7, 2]
    # User 2 has a single row: it stays in training. Rows are in time order.
    assert splits.train.tolist() == [5, 4, 6, 0]


def test_rows_of_one_time_keep_the_order_of_the_file_across_users() -> None:
    data = _table([1, 0, 1, 0, 1, 0], [5, 5, 5, 5, 6, 6])
    splits = data.leave_one_out()
    assert [part.tolist() for part in splits] == [[0, 1], [2, 3], [4, 5]]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=40))
def test_leave_one_out_never_trains_on_a_users_future(rows: list[tuple[int, int]]) -> None:
    data = _table([user for user, _ in rows], [time for _, time in rows])
    splits = data.leave_one_out()
    assert sorted(np.concatenate(splits).tolist()) == list(range(len(rows)))
    for user in range(5):
        times = [data.timestamp[part][data.user[part] == user] for part in splits]
        count = sum(map(len, times))
        assert [len(part) for part in times[1:]] == ([1, 1] if count >= 3 else [0, 0])
        joined = np.concatenate(times)
        assert (np.diff(joined) >= 0).all()


def test_split_by_time_cuts_between_moments() -> None:
    data = _table([0] * 10, [3, 1, 2, 3, 9, 8, 7, 3, 5, 4])
    splits = data.split_by_time(validation=0.3, test=0.2)
    assert splits.train.tolist() == [1, 2, 0, 3, 7]
    assert splits.validation.tolist() == [9, 8, 6]
    assert splits.test.tolist() == [5, 4]
    # Training wants three rows here; the third is the first of three at time 3, so the cut moves behind all of them.
    uneven = data.split_by_time(validation=0.5, test=0.2)
    assert data.timestamp[uneven.train].tolist() == [1, 2, 3, 3, 3]
    assert uneven.validation.tolist() == [9, 8, 6]


@given(
    st.lists(st.integers(0, 12), min_size=4, max_size=60),
    st.sampled_from([0.1, 0.25, 0.4]),
    st.sampled_from([0.2, 0.5]),
)
def test_split_by_time_parts_no_moment(times: list[int], validation: float, test: float) -> None:
    data = _table([0] * len(times), times)
    in_time = sorted(times)
    wanted = [math.ceil(len(times) * (1 - validation - test) - 1e-9), math.ceil(len(times) * (1 - test) - 1e-9)]
    last_train, last_validation = (in_time[count - 1] for count in wanted)
    expected = [
        [time for time in in_time if time <= last_train],
        [time for time in in_time if last_train < time <= last_validation],
        [time for time in in_time if time > last_validation],
    ]
    if not all(expected):
        with pytest.raises(ValueError, match="without a row"):
            data.split_by_time(validation, test)
    else:
        assert [data.timestamp[part].tolist() for part in data.split_by_time(validation, test)] == expected


def test_split_by_time_refuses_wrong_shares() -> None:
    data = _table([0, 0, 0], [1, 1, 1])
    for shares in [(0.0, 0.1), (0.1, 1.0), (0.5, 0.5), (-0.1, 0.1)]:
        with pytest.raises(ValueError, match="add up to below 1"):
            data.split_by_time(*shares)
    with pytest.raises(ValueError, match="leave a side without a row"):
        data.split_by_time(0.3, 0.3)


def test_sequences_are_the_latest_items_in_time_order_padded_on_the_right() -> None:
    data = _table([0, 1, 0, 0, 1, 0], [5, 8, 9, 9, 1, 2], item=[4, 1, 3, 2, 0, 1])
    histories = data.sequences(3)
    assert histories.items.tolist() == [[4, 3, 2], [0, 1, 0]]
    assert histories.rows.tolist() == [[0, 2, 3], [4, 1, 0]]
    assert histories.mask.tolist() == [[True, True, True], [True, True, False]]
    assert histories.items.dtype == torch.int64
    assert data.sequences(6).items[0].tolist() == [1, 4, 3, 2, 0, 0]


def test_histories_end_before_their_row() -> None:
    data = _table([0, 1, 0, 0, 1, 0], [5, 8, 9, 9, 1, 2], item=[4, 1, 3, 2, 5, 1])
    histories = data.histories_before(np.array([3, 5, 1, 2]), 2)
    assert histories.items.tolist() == [[4, 3], [0, 0], [5, 0], [1, 4]]
    assert histories.mask.tolist() == [[True, True], [False, False], [True, False], [True, True]]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30), st.integers(1, 8))
def test_histories_equal_a_loop_over_the_sorted_table(rows: list[tuple[int, int]], max_length: int) -> None:
    data = _table([user for user, _ in rows], [time for _, time in rows])
    histories = data.histories_before(np.arange(len(rows)), max_length)
    in_time = sorted(range(len(rows)), key=lambda row: rows[row][1])
    for row in range(len(rows)):
        same_user = [other for other in in_time if rows[other][0] == rows[row][0]]
        expected = same_user[: same_user.index(row)][-max_length:]
        assert histories.rows[row][histories.mask[row]].tolist() == expected
        assert histories.mask[row].tolist() == [place < len(expected) for place in range(max_length)]


def test_histories_refuse_rows_outside_the_table() -> None:
    data = _table([0, 0], [1, 2])
    for row in (-1, 2):
        with pytest.raises(IndexError, match=r"rows must lie in \[0, 2\)"):
            data.histories_before(np.array([0, row]), 3)
    with pytest.raises(ValueError, match="max_length must be positive"):
        data.sequences(0)
    assert data.histories_before(np.array([], dtype=np.int64), 3).items.shape == (0, 3)


def test_negatives_are_uniform_over_the_items_that_the_user_never_met() -> None:
    # User 0 met 0, 3, 4 and 9 (3 twice) of ten items, user 1 met item 5, user 2 all but item 0 and 6.
    user = [0] * 5 + [1] + [2] * 8
    item = [9, 3, 0, 3, 4, 5, 1, 2, 3, 4, 5, 7, 8, 9]
    data = _table(user, list(range(14)), item=item, items=10)
    negatives = data.sample_negatives(torch.tensor([2, 0, 1, 0]), 9000, stream_generator(0))
    assert negatives.shape == (4, 9000)
    assert negatives.dtype == torch.int64
    for row, unmet in [(0, [0, 6]), (1, [1, 2, 5, 6, 7, 8]), (2, [0, 1, 2, 3, 4, 6, 7, 8, 9])]:
        counts = negatives[row].bincount(minlength=10)
        assert counts.nonzero().flatten().tolist() == unmet
        assert (counts[unmet] - 9000 / len(unmet)).abs().max() < 250
    assert not torch.equal(negatives[1], negatives[3])


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7)), min_size=1), st.integers(0, 2**31))
def test_no_negative_was_ever_met(pairs: set[tuple[int, int]], seed: int) -> None:
    rows = sorted(pairs, key=lambda pair: (pair[0] * 7 + pair[1] * 5) % 11)
    data = _table([user for user, _ in rows], [0] * len(rows), item=[item for _, item in rows], items=9)
    users = torch.tensor(sorted({user for user, _ in rows}))
    negatives = data.sample_negatives(users, 20, torch.Generator().manual_seed(seed))
    assert ((negatives >= 0) & (negatives < 9)).all()
    for user, drawn in zip(users.tolist(), negatives.tolist(), strict=True):
        assert not {item for other, item in pairs if other == user} & set(drawn)


def test_negatives_follow_the_generator_alone() -> None:
    data = _table([0, 1, 1], [1, 2, 3], item=[0, 1, 2], items=50)
    users = torch.tensor([0, 1])
    first = data.sample_negatives(users, 8, stream_generator(3))
    torch.manual_seed(0)
    assert torch.equal(first, data.sample_negatives(users, 8, stream_generator(3)))
    assert not torch.equal(first, data.sample_negatives(users, 8, stream_generator(4)))


def test_negatives_refuse_unknown_users_and_users_who_met_everything() -> None:
    data = _table([0, 1, 1], [1, 2, 3], item=[0, 0, 1])
    generator = stream_generator(0)
    with pytest.raises(ValueError, match=r"users must lie in \[0, 2\), got 0 to 2"):
        data.sample_negatives(torch.tensor([0, 2]), 1, generator)
    with pytest.raises(ValueError, match="got user 1 who met all"):
        data.sample_negatives(torch.tensor([0, 1]), 1, generator)
    with pytest.raises(ValueError, match="count must be positive"):
        data.sample_negatives(torch.tensor([0]), 0, generator)
    with pytest.raises(TypeError, match="users must be int64 or int32"):
        data.sample_negatives(torch.tensor([0.0]), 1, generator)


def test_a_selection_keeps_the_meaning_of_ids(tmp_path: Path) -> None:
    data = read_movielens(_recbole(tmp_path))
    part = data.select(np.array([4, 1]))
    assert part.timestamp.tolist() == [500, 999]
    assert part.user.tolist() == [1, 0]
    assert (part.num_users, part.num_items) == (2, 3)
    assert part.items is data.items
    assert part.sequences(2).mask.tolist() == [[True, False], [True, False]]


def test_a_table_with_unequal_columns_or_ids_out_of_range_is_refused() -> None:
    ids = np.arange(2)
    good = np.array([0, 1])
    with pytest.raises(ValueError, match=r"one equal, positive length, got \[2, 2, 1, 2\]"):
        Interactions(good, good, np.ones(1), good, ids, ids)
    with pytest.raises(ValueError, match=r"item must lie in \[0, 2\), got 0 to 2"):
        Interactions(good, np.array([0, 2]), np.ones(2), good, ids, ids)
    with pytest.raises(ValueError, match=r"user must lie in \[0, 2\), got -1 to 0"):
        Interactions(np.array([-1, 0]), good, np.ones(2), good, ids, ids)


def test_movielens_100k_reads_whole(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "ml-100k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    data = read_movielens(folder)
    assert (len(data), data.num_users, data.num_items) == (100_000, 943, 1682)
    assert np.bincount(data.rating.astype(int)).tolist() == [0, 6110, 11_370, 27_145, 34_174, 21_201]
    assert (data.user_ids[data.user[0]], data.item_ids[data.item[0]], data.timestamp[0]) == (196, 242, 881_250_949)
    assert data.items is not None
    assert (data.items.titles[0], data.items.years[0]) == ("Toy Story", 1995)
    assert data.items.genres[0] == ("Animation", "Children's", "Comedy")
    assert [part[0] for part in data.users.values()] == ["24", "M", "technician", "85711"]
    splits = data.leave_one_out()
    assert [len(part) for part in splits] == [98_114, 943, 943]
    negatives = data.sample_negatives(torch.arange(943), 5, stream_generator(0)).numpy()
    met = set(zip(data.user.tolist(), data.item.tolist(), strict=True))
    assert not any((user, item) in met for user in range(943) for item in negatives[user].tolist())
