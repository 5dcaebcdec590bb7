"""The closed language of captions and questions: under 60 words.

[size] [texture] hue shape                     large striped red circle
a {A} {relation} a {B}                         a red circle left of a blue square
{count} {A}s                                   two red circles
is there …, are there more … than …            is there a red circle
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from headgate.data.scenes.facts import ATTRIBUTES, Description, Statement
from headgate.data.scenes.world import World

__all__ = ["Grammar", "Tokenizer"]

_COUNTS = ("two", "three", "four", "five", "six")
_RELATION_WORDS = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "below": "below",
    "larger": "larger than",
    "smaller": "smaller than",
    "same_colour": "same colour as",
    "same_shape": "same shape as",
    "and": "and",
}
_TEXTURE_WORDS = {"solid": "solid", "stripes": "striped", "dots": "dotted"}
_FILLER = "nice"
_QUESTION_WORDS = ("is", "there", "are", "more", "than", "shape", "shapes")


class Tokenizer:
    """Words split at spaces, of a fixed length with a beginning, an end and padding.

    Args:
        words: the vocabulary; its tokens follow on pad 0, bos 1, eos 2 and unk 3.
        length: tokens of an encoded text, bos and eos included.
    """

    pad, bos, eos, unk = 0, 1, 2, 3

    def __init__(self, words: Sequence[str], length: int = 16) -> None:
        self.words = ("<pad>", "<bos>", "<eos>", "<unk>", *words)
        self.length = length
        self._token = {word: token for token, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def token(self, word: str) -> int:
        """Give the token of a word, unk if it is not in the vocabulary."""
        return self._token.get(word, self.unk)

    def encode(self, text: str) -> Int[Tensor, " length"]:
        """Turn a text into tokens.

        Raises:
            ValueError: longer than the fixed length.
        """
        return torch.tensor(self._numbers(text))

    def encode_all(self, texts: Sequence[str]) -> Int[Tensor, "texts length"]:
        """Turn texts into a batch of tokens."""
        return torch.tensor([self._numbers(text) for text in texts], dtype=torch.int64).view(-1, self.length)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Turn tokens back into words, without bos, eos and padding."""
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        return " ".join(self.words[number] for number in numbers if number not in (self.pad, self.bos, self.eos))

    def _numbers(self, text: str) -> list[int]:
        tokens = [self.bos, *(self.token(word) for word in text.split()), self.eos]
        if len(tokens) > self.length:
            raise ValueError(f"text must have at most {self.length - 2} words, got {len(tokens) - 2}: {text!r}")
        return [*tokens, *[self.pad] * (self.length - len(tokens))]


class Grammar:
    """Says statements in words, and reads them back.

    Args:
        world: whose names.
        length: tokens of an encoded text.
    """

    def __init__(self, world: World, length: int = 16) -> None:
        textures = tuple(_TEXTURE_WORDS[name] for name in world.names("texture"))
        self._names = {
            "size": world.names("size"),
            "texture": textures,
            "hue": world.names("hue"),
            "shape": world.names("shape"),
        }
        self.named = tuple(name for name in ATTRIBUTES if name != "texture" or len(textures) > 1)
        self._plural = {name: name + ("es" if name.endswith("s") else "s") for name in (*world.names("shape"), "shape")}
        words = [word for name in self.named for word in self._names[name]]
        words += [self._plural[name] for name in world.names("shape")]
        words += ["a", "an", "nice", *_COUNTS, *" ".join(_RELATION_WORDS.values()).split(), *_QUESTION_WORDS]
        self.tokenizer = Tokenizer(list(dict.fromkeys(words)), length)

    def phrase(self, description: Description) -> str:
        """Name an object, without an article."""
        return " ".join(word for _, word in self._said(description, plural=False))

    def write(self, statement: Statement, filler: bool = False) -> tuple[str, list[dict[str, tuple[int, int]]]]:
        """Say a statement.

        Args:
            statement: what to say.
            filler: whether to add a word that says nothing.

        Returns:
            The text, and for each description in it: attribute → (first, one past the last) token in the encoded text,
            whose token 0 is bos. The subject has ``count`` or ``relation``, too, where they are said.
        """
        said: list[tuple[str | None, str]] = []
        spans: list[dict[str, tuple[int, int]]] = []

        def say(words: list[tuple[str | None, str]]) -> None:
            start = len(said) + 1
            for offset, (attribute, _) in enumerate(words):
                if attribute is not None:
                    first, _ = spans[-1].get(attribute, (start + offset, 0))
                    spans[-1][attribute] = (first, start + offset + 1)
            said.extend(words)

        extra: list[tuple[str | None, str]] = [(None, _FILLER)] if filler else []
        spans.append({})
        if statement.other is None:
            counted: list[tuple[str | None, str]] = []
            if statement.count > 1:
                counted = [("count", _COUNTS[statement.count - 2])]
            say([*counted, *extra, *self._said(statement.subject, plural=statement.count > 1)])
        else:
            assert statement.relation is not None
            say(_with_article([*extra, *self._said(statement.subject, plural=False)]))
            attribute = None if statement.relation == "and" else "relation"
            say([(attribute, word) for word in _RELATION_WORDS[statement.relation].split()])
            spans.append({})
            say(_with_article(self._said(statement.other, plural=False)))
        return " ".join(word for _, word in said), spans

    def ask(self, statement: Statement) -> str:
        """Ask whether something exists, alone or in relation to something."""
        if statement.other is not None:
            return f"is there {self.write(statement)[0]}"
        article, *_ = _with_article(self._said(statement.subject, plural=False))
        return f"is there {article[1]} {self.phrase(statement.subject)}"

    def ask_more(self, first: Description, second: Description) -> str:
        """Ask whether there are more objects of one description than of another."""
        many = [" ".join(word for _, word in self._said(thing, plural=True)) for thing in (first, second)]
        return f"are there more {many[0]} than {many[1]}"

    def parse(self, text: str) -> Statement:
        """Read a caption back.

        Raises:
            ValueError: not a caption of this grammar.
        """
        words = [word for word in text.split() if word not in (_FILLER, "a", "an")]
        count = 1
        if words and words[0] in _COUNTS:
            count = _COUNTS.index(words.pop(0)) + 2
        subject = self._read(words, text)
        if not words:
            return Statement(subject, count=count)
        for relation, spoken in _RELATION_WORDS.items():
            parts = spoken.split()
            if words[: len(parts)] == parts:
                del words[: len(parts)]
                other = self._read(words, text)
                if not words and count == 1:
                    return Statement(subject, relation, other)
        raise ValueError(f"text must be a caption of this grammar, got {text!r}")

    def _said(self, description: Description, plural: bool) -> list[tuple[str | None, str]]:
        said: list[tuple[str | None, str]] = []
        for name, value in description.given().items():
            if name in self.named:
                word = self._names[name][value]
                said.append((name, self._plural[word] if name == "shape" and plural else word))
        if description.shape is None:
            said.append((None, "shapes" if plural else "shape"))
        return said

    def _read(self, words: list[str], text: str) -> Description:
        found: dict[str, int] = {}
        while words:
            word = words.pop(0)
            singular = next((one for one, many in self._plural.items() if many == word), word)
            if singular == "shape":
                return Description(**found)
            name = next((name for name in self.named if singular in self._names[name]), None)
            if name is None:
                break
            found[name] = self._names[name].index(singular)
            if name == "shape":
                return Description(**found)
        raise ValueError(f"text must be a caption of this grammar, got {text!r}")


def _with_article(words: list[tuple[str | None, str]]) -> list[tuple[str | None, str]]:
    return [(None, "an" if words[0][1][0] in "aeiou" else "a"), *words]
