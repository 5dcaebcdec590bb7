"""Text: files read whole or row by row, character tokens, and windows for language models.

A corpus that needs no download is the Python documentation inside CPython itself (:func:`python_documentation`).
A window at position ``p`` of length 4 holds the inputs and, one character later, the targets::

    tokens    F  i  r  s  t  ␣  C  i  t  i  z  e  n
    inputs       i  r  s  t
    targets         r  s  t  ␣
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from headgate.errors import DataError
from headgate.validate import check_integer, check_positive, check_shape

__all__ = [
    "CharTokenizer",
    "Corpus",
    "TextWindows",
    "python_documentation",
    "read_rows",
    "read_text",
    "split_by_position",
]


class Corpus(NamedTuple):
    """A text and where it came from.

    Attributes:
        text: the text.
        fingerprint: SHA-256 of the text in UTF-8, as 64 hexadecimal digits.
        source: one line that names the origin and its version.
    """

    text: str
    fingerprint: str
    source: str


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file whole; line ends stay as they are, a byte order mark is dropped.

    Args:
        path: the file, or a folder that holds exactly one ``*.txt``.

    Raises:
        DataError: no such file, an empty one, or one that is not UTF-8 (the byte offset is named).
    """
    path = _text_file(Path(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, data[error.start], error.start) from error
    if not text:
        raise DataError(f"{path} is empty; expected text")
    return text


def read_rows(
    path: str | os.PathLike[str], delimiter: str = ",", quoted: bool = True, latin1: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Read a table row by row, so that a file larger than memory can be read; empty lines are left out.

    Args:
        path: the file.
        delimiter: what stands between cells; may be longer than one character, then ``quoted`` must be False.
        quoted: whether cells may stand in double quotes.
        latin1: read a line that is not UTF-8 as Latin-1 (older public tables mix them up) instead of refusing it.

    Yields:
        The number of the row's last line (from 1) and its cells.

    Raises:
        DataError: no such file, no row at all, a malformed quote, or a line that is not UTF-8 (the byte offset is named).
    """
    path = Path(path)
    lines = _decoded_lines(path, latin1)
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        rows = ((reader.line_num, row) for row in reader)
    else:
        rows = ((number, line.rstrip("\r\n").split(delimiter)) for number, line in enumerate(lines, 1))
    empty = True
    try:
        for number, row in rows:
            if row and row != [""]:
                empty = False
                yield number, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; expected a table with {delimiter!r}") from error
    if empty:
        raise DataError(f"{path} is empty; expected a table with {delimiter!r} between cells")


def python_documentation() -> Corpus:
    """The reference texts of the Python documentation (``pydoc_data.topics``): about 465,000 characters, no download.

    Its content changes with the Python version, so figures measured on it belong to a fingerprint.

    Returns:
        The topics in the order of their names, an empty line between two.

    Raises:
        DataError: this Python was installed without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python lacks the module pydoc_data.topics; expected a full CPython, e.g. from python.org"
        ) from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(text, fingerprint, f"pydoc_data.topics of CPython {platform.python_version()}")


class CharTokenizer:
    """Characters ↔ integers; the id of a character is its place in the alphabet.

    Args:
        alphabet: the known characters, each once.

    Raises:
        ValueError: the alphabet is empty or holds a character twice.
    """

    def __init__(self, alphabet: str) -> None:
        if not alphabet:
            raise ValueError("alphabet must hold at least one character, got an empty string")
        repeated = sorted(character for character in set(alphabet) if alphabet.count(character) > 1)
        if repeated:
            raise ValueError(f"alphabet must hold every character once, got {repeated[0]!r} more than once")
        self.alphabet = alphabet
        codes = _codes(alphabet)
        self._order = np.argsort(codes)
        self._sorted_codes = codes[self._order]

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        """Take the characters of ``text``, sorted, as the alphabet."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""
        return len(self.alphabet)

    def encode(self, text: str) -> Int64[Tensor, " length"]:
        """Turn a text into ids in [0, vocab_size).

        Raises:
            ValueError: a character outside the alphabet; it and its position are named.
        """
        codes = _codes(text)
        places = np.searchsorted(self._sorted_codes, codes).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._sorted_codes[places] != codes)
        if unknown.size:
            position = int(unknown[0])
            raise ValueError(
                f"text must hold characters of the alphabet only, got {text[position]!r} at position {position}"
            )
        return torch.from_numpy(self._order[places].astype(np.int64))

    def decode(self, tokens: Int64[Tensor, " length"]) -> str:
        """Turn ids back into the text.

        Raises:
            TypeError: ids that are not int64 or int32.
            ValueError: a wrong rank, or an id outside [0, vocab_size).
        """
        check_shape("tokens", tokens, (None,), "length")
        check_integer("tokens", tokens)
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"tokens must lie in [0, {self.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        return "".join(self.alphabet[token] for token in tokens.tolist())


class TextWindows(Dataset[tuple[Tensor, Tensor]]):
    """All windows of a token sequence, with random access: item ``i`` starts at position ``i · stride``.

    An item depends on its index alone, so any order, number of workers or restart gives the same items.

    Args:
        tokens: int64 ids of shape (total,).
        length: tokens of one window, L.
        stride: tokens between the starts of two neighbouring windows; ``length`` gives windows without overlap.

    Raises:
        TypeError: ids that are not int64 or int32.
        ValueError: a wrong rank, a length or stride below 1, or fewer than ``length + 1`` tokens.
    """

    def __init__(self, tokens: Int64[Tensor, " total"], length: int, stride: int = 1) -> None:
        check_shape("tokens", tokens, (None,), "total")
        check_integer("tokens", tokens)
        check_positive(length=length, stride=stride)
        if len(tokens) < length + 1:
            raise ValueError(f"tokens must hold at least length + 1 = {length + 1} entries, got {len(tokens)}")
        self.tokens = tokens.long()
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Int64[Tensor, " length"], Int64[Tensor, " length"]]:
        """Give inputs and targets, the tokens one position later, each of shape (length,)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in [-{len(self)}, {len(self)}), got {index}")
        start = index % len(self) * self.stride
        window = self.tokens[start : start + self.length + 1]
        return window[:-1], window[1:]

    def batch(
        self, indices: Int64[Tensor, " batch"] | Sequence[int]
    ) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
        """Give the items of many indices at once: inputs and targets, each of shape (batch, length).

        Raises:
            IndexError: an index outside [-len, len).
        """
        starts = torch.as_tensor(indices, dtype=torch.int64)
        outside = (starts < -len(self)) | (starts >= len(self))
        if outside.any():
            raise IndexError(f"indices must lie in [-{len(self)}, {len(self)}), got {int(starts[outside][0])}")
        starts = starts % len(self) * self.stride
        windows = self.tokens[starts[:, None] + torch.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]

    def sample(
        self, batch_size: int, generator: torch.Generator
    ) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
        """Draw windows at random, with replacement, as language models are trained."""
        return self.batch(torch.randint(len(self), (batch_size,), generator=generator))


def split_by_position(
    tokens: Int64[Tensor, " total"], fractions: Sequence[float] = (0.9, 0.1)
) -> tuple[Int64[Tensor, " part"], ...]:
    """Cut a sequence into consecutive parts, so that no window of one part holds tokens of another.

    Args:
        tokens: ids of shape (total,).
        fractions: the share of each part, first part first; they add up to 1.

    Returns:
        Views of ``tokens``, one per fraction; the cuts are rounded down to whole tokens.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1, or a part without a token.
    """
    check_shape("tokens", tokens, (None,), "total")
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be positive and add up to 1, got {tuple(fractions)}")
    # The small number keeps 0.1 + 0.2 from losing a token to rounding.
    cuts = [int(sum(fractions[:part]) * len(tokens) + 1e-6) for part in range(len(fractions))] + [len(tokens)]
    parts = tuple(tokens[start:end] for start, end in itertools.pairwise(cuts))
    if any(len(part) == 0 for part in parts):
        raise ValueError(f"every part must hold a token, got {[len(part) for part in parts]} of {len(tokens)} tokens")
    return parts


def _text_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.txt"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path} is a folder; expected exactly one *.txt in it, found {found}")
    return files[0]


def _decoded_lines(path: Path, latin1: bool) -> Iterator[str]:
    offset = 0
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    if not latin1:
                        raise _not_utf8(path, line[error.start], offset + error.start) from error
                    text = line.decode("latin-1")
                yield text.removeprefix("\ufeff") if offset == 0 else text
                offset += len(line)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist; expected a file")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{path} is a folder; expected a file")
    return DataError(f"{path} cannot be read: {error.strerror or error}; expected a readable file")


def _not_utf8(path: Path, byte: int, offset: int) -> DataError:
    return DataError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset}; expected UTF-8 text")


def _codes(text: str) -> np.ndarray:
    """Code points of the characters; ``surrogatepass`` because a Python string may hold half a surrogate pair."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
