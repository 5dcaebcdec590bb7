"""Reading text and tables, character tokens, windows and splits."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from headgate.data.seeding import stream_generator
from headgate.data.text import (
    CharTokenizer,
    TextWindows,
    python_documentation,
    read_rows,
    read_text,
    split_by_position,
)
from headgate.errors import DataError


def test_read_text_gives_every_character_and_keeps_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_bytes("Größe\r\n\x85 €\u2028𝄞\n".encode())
    assert read_text(path) == "Größe\r\n\x85 €\u2028𝄞\n"


def test_read_text_drops_a_byte_order_mark_at_the_start_only(tmp_path: Path) -> None:
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbfb")
    assert read_text(path) == "a\ufeffb"


def test_read_text_takes_a_folder_with_one_text_file(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("abc")
    (tmp_path / "notes.md").write_text("xyz")
    assert read_text(tmp_path) == "abc"


def test_read_text_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"exactly one \*\.txt in it, found none"):
        read_text(tmp_path)
    empty = tmp_path / "b.txt"
    empty.touch()
    with pytest.raises(DataError, match=r"b\.txt is empty"):
        read_text(empty)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"found a\.txt, b\.txt"):
        read_text(tmp_path)


def test_text_that_is_not_utf8_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("äb\n".encode() + b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 7"):
        read_text(path)
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 7"):
        list(read_rows(path))


def test_errors_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('a,"b\nc')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)
    assert "t.csv, line 2" in str(caught.value)


def test_read_rows_splits_quoted_cells_and_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "movies.csv"
    path.write_bytes(b'\xef\xbb\xbfid,title\r\n1,"Heat, ""the"" film"\r\n\r\n2,"two\r\nlines"\r\n3,plain')
    assert list(read_rows(path)) == [
        (1, ["id", "title"]),
        (2, ["1", 'Heat, "the" film']),
        (5, ["2", "two\r\nlines"]),
        (6, ["3", "plain"]),
    ]


def test_read_rows_takes_long_delimiters_and_leaves_quotes_alone(tmp_path: Path) -> None:
    path = tmp_path / "movies.dat"
    path.write_bytes('1::"Heat: a film::Drama\n\n2::Amélie::\n'.encode())
    rows = list(read_rows(path, "::", quoted=False))
    assert rows == [(1, ["1", '"Heat: a film', "Drama"]), (3, ["2", "Amélie", ""])]


def test_read_rows_reads_latin1_lines_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "u.item"
    path.write_bytes("1|Amélie\n".encode() + "2|Misérables, Les\n".encode("latin-1"))
    assert [cells for _, cells in read_rows(path, "|", quoted=False, latin1=True)] == [
        ["1", "Amélie"],
        ["2", "Misérables, Les"],
    ]


def test_read_rows_refuses_a_missing_file_a_folder_and_an_empty_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list(read_rows(tmp_path / "no.csv"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_rows(tmp_path))
    (tmp_path / "blank.csv").write_text("\n\n")
    with pytest.raises(DataError, match=r"blank\.csv is empty"):
        list(read_rows(tmp_path / "blank.csv"))


def test_python_documentation_holds_every_topic_and_its_fingerprint() -> None:
    corpus = python_documentation()
    assert len(corpus.text) > 400_000
    assert all(text in corpus.text for text in topics.values())
    assert corpus.text.startswith(topics[min(topics)])
    assert corpus.fingerprint == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert platform.python_version() in corpus.source


def test_tokenizer_ids_are_places_in_the_alphabet() -> None:
    tokenizer = CharTokenizer("zaé𝄞")
    tokens = tokenizer.encode("é𝄞za")
    assert tokens.tolist() == [2, 3, 0, 1]
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == "é𝄞za"
    assert tokenizer.vocab_size == 4


def test_tokenizer_from_text_sorts_the_characters() -> None:
    assert CharTokenizer.from_text("hello\n").alphabet == "\nehlo"


@given(st.text(st.characters(), min_size=1))
def test_decoding_undoes_encoding(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_takes_an_empty_text() -> None:
    tokenizer = CharTokenizer("ab")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode(tokenizer.encode("")) == ""


def test_tokenizer_names_what_it_does_not_know() -> None:
    tokenizer = CharTokenizer("bdf")
    for text, found in [("bda", "'a' at position 2"), ("bec", "'e' at position 1"), ("z", "'z' at position 0")]:
        with pytest.raises(ValueError, match=found):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 3\), got 0 to 3"):
        tokenizer.decode(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="got -1 to 1"):
        tokenizer.decode(torch.tensor([1, -1]))
    with pytest.raises(TypeError, match="tokens must be int64 or int32"):
        tokenizer.decode(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="'a' more than once"):
        CharTokenizer("aba")
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")


def test_windows_start_at_every_stride_and_targets_are_one_later() -> None:
    windows = TextWindows(torch.arange(10), length=4, stride=2)
    assert len(windows) == 3
    assert [(inputs.tolist(), targets.tolist()) for inputs, targets in windows] == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([2, 3, 4, 5], [3, 4, 5, 6]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
    ]
    assert windows[-1][0].tolist() == [4, 5, 6, 7]


@given(st.integers(2, 40), st.integers(1, 39), st.integers(1, 9))
def test_no_window_is_left_out(total: int, length: int, stride: int) -> None:
    length = min(length, total - 1)
    windows = TextWindows(torch.arange(total), length, stride)
    starts = [start for start in range(0, total, stride) if start + length + 1 <= total]
    assert [int(inputs[0]) for inputs, _ in windows] == starts


def test_a_batch_holds_the_items_of_its_indices() -> None:
    windows = TextWindows(torch.arange(100).flip(0), length=7, stride=3)
    indices = [5, 0, -1, 5]
    inputs, targets = windows.batch(torch.tensor(indices))
    assert torch.equal(inputs, torch.stack([windows[index][0] for index in indices]))
    assert torch.equal(targets, torch.stack([windows[index][1] for index in indices]))
    assert torch.equal(windows.batch(indices)[0], inputs)


def test_sampled_windows_follow_the_generator_and_reach_both_ends() -> None:
    windows = TextWindows(torch.arange(12), length=8)
    first, _ = windows.sample(200, stream_generator(1))
    again, _ = windows.sample(200, stream_generator(1))
    other, _ = windows.sample(200, stream_generator(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first[:, 0].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_same_windows_with_any_number_of_workers(workers: int) -> None:
    windows = TextWindows(torch.arange(30), length=5, stride=5)
    loader = DataLoader(windows, batch_size=2, num_workers=workers)
    inputs = torch.cat([batch[0] for batch in loader])
    assert inputs.tolist() == [list(range(start, start + 5)) for start in range(0, 25, 5)]


def test_windows_refuse_what_they_cannot_cut() -> None:
    tokens = torch.arange(5)
    with pytest.raises(ValueError, match=r"at least length \+ 1 = 6 entries, got 5"):
        TextWindows(tokens, length=5)
    with pytest.raises(ValueError, match="length must be positive"):
        TextWindows(tokens, length=0)
    with pytest.raises(ValueError, match="stride must be positive"):
        TextWindows(tokens, length=2, stride=0)
    with pytest.raises(ValueError, match="shape"):
        TextWindows(tokens[None], length=2)
    with pytest.raises(TypeError, match="int64"):
        TextWindows(tokens.float(), length=2)
    windows = TextWindows(tokens, length=2)
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"got {index}"):
            windows[index]
        with pytest.raises(IndexError, match=f"got {index}"):
            windows.batch([0, index])


def test_split_by_position_cuts_in_order_without_overlap() -> None:
    parts = split_by_position(torch.arange(10), (0.7, 0.2, 0.1))
    assert [part.tolist() for part in parts] == [list(range(7)), [7, 8], [9]]
    # 0.7 + 0.1 is a little below 0.8 in floating point.
    assert [len(part) for part in split_by_position(torch.arange(10), (0.7, 0.1, 0.2))] == [7, 1, 2]
    train, test = split_by_position(torch.arange(1005))
    assert (len(train), len(test)) == (904, 101)


def test_split_by_position_refuses_wrong_shares() -> None:
    tokens = torch.arange(10)
    for fractions in [(0.5, 0.4), (1.5, -0.5), (), (0.0, 1.0)]:
        with pytest.raises(ValueError, match="add up to 1"):
            split_by_position(tokens, fractions)
    with pytest.raises(ValueError, match="every part must hold a token"):
        split_by_position(tokens, (0.99, 0.01 / 2, 0.01 / 2))


def test_tiny_shakespeare_reads_whole(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "tinyshakespeare"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    text = read_text(folder)
    assert len(text) == 1_115_394
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == 65
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens[-1000:]) == text[-1000:]
    train, validation = split_by_position(tokens)
    assert (len(train), len(validation)) == (1_003_854, 111_540)
