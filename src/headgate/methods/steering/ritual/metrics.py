"""How much a vision-language model makes up: POPE, CHAIR and MME.

- POPE (Li et al., EMNLP 2023): yes/no questions about objects. An answer is "no" if it holds a negative word, else "yes".
- CHAIR (Rohrbach et al., EMNLP 2018): objects that captions mention and that are not in the picture.
- MME (Fu et al., arXiv 2306.13394): two questions per picture; points for each right answer and for pictures with both right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headgate.methods.steering.ritual.coco import COCO_OBJECTS

__all__ = [
    "MME_HALLUCINATION",
    "CHAIRScores",
    "MMEScores",
    "POPEScores",
    "chair_scores",
    "mentioned_objects",
    "mme_answer",
    "mme_scores",
    "pope_answer",
    "pope_scores",
]

MME_HALLUCINATION = ("existence", "count", "position", "color")
"""The tasks of MME that ask about hallucinated objects and attributes."""

_NEGATIVE = ("No", "not", "no", "NO")


@dataclass(frozen=True)
class POPEScores:
    """Scores of yes/no answers with "yes" as the positive class; all in [0, 1], 0 where a ratio has nothing below it."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


@dataclass(frozen=True)
class CHAIRScores:
    """Hallucination in captions; all in [0, 1].

    Attributes:
        sentence: captions with at least one object that is not there (CHAIR_s).
        instance: mentions of objects that are not there, of all mentions of objects (CHAIR_i).
        recall: objects in the pictures that their captions mention.
    """

    sentence: float
    instance: float
    recall: float


@dataclass(frozen=True)
class MMEScores:
    """One task of MME.

    Attributes:
        accuracy: right answers, in [0, 1].
        accuracy_plus: pictures with both answers right, in [0, 1].
        score: 100 times both, added; at most 200.
    """

    accuracy: float
    accuracy_plus: float
    score: float


def pope_answer(text: str) -> bool:
    """Whether an answer counts as "yes": it holds none of No, not, no, NO and words on n't. A refusal is a yes, too."""
    words = text.replace(".", "").replace(",", "").split()
    return not any(word in _NEGATIVE or word.endswith("n't") for word in words)


def pope_scores(pred: Sequence[str | bool], label: Sequence[str | bool]) -> POPEScores:
    """Score answers to yes/no questions.

    Args:
        pred: answers as the model gave them, or whether each was "yes".
        label: ``"yes"`` or ``"no"``, or whether it is yes.

    Raises:
        ValueError: none, different numbers, or another label.
    """
    if len(pred) != len(label) or not label:
        raise ValueError(f"pred and label must be of one positive length, got {len(pred)} and {len(label)}")
    said = [pope_answer(answer) if isinstance(answer, str) else bool(answer) for answer in pred]
    true = [_label(answer) for answer in label]
    hits = sum(mine and right for mine, right in zip(said, true, strict=True))
    precision, recall = _ratio(hits, sum(said)), _ratio(hits, sum(true))
    return POPEScores(
        accuracy=sum(mine == right for mine, right in zip(said, true, strict=True)) / len(true),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_ratio=sum(said) / len(said),
    )


def chair_scores(
    captions: Sequence[str],
    objects: Sequence[Iterable[str]],
    synonyms: Mapping[str, Sequence[str]] = COCO_OBJECTS,
) -> CHAIRScores:
    """Score captions against the objects of their pictures.

    Args:
        captions: as the model gave them.
        objects: per caption, the objects in the picture, named by keys of ``synonyms``.
        synonyms: object → other words and phrases for it, lower case, singular; default: COCO's 80 objects.

    Raises:
        ValueError: none, different numbers, or an unknown object.
    """
    if len(captions) != len(objects) or not captions:
        raise ValueError(f"captions and objects must be of one positive length, got {len(captions)}, {len(objects)}")
    sentences = wrong = mentions = found = there = 0
    for caption, names in zip(captions, objects, strict=True):
        present = set(names)
        unknown = sorted(present - set(synonyms))
        if unknown:
            raise ValueError(f"objects must be keys of synonyms, got {', '.join(unknown)}")
        said = mentioned_objects(caption, synonyms)
        invented = [name for name in said if name not in present]
        sentences += bool(invented)
        wrong += len(invented)
        mentions += len(said)
        found += len(present & set(said))
        there += len(present)
    return CHAIRScores(sentences / len(captions), _ratio(wrong, mentions), _ratio(found, there))


def mentioned_objects(caption: str, synonyms: Mapping[str, Sequence[str]] = COCO_OBJECTS) -> list[str]:
    """The objects that a caption mentions, in order and as often as it does.

    The longest phrase counts ("hot dog" is no dog), plurals count as their singulars.
    """
    phrases = {tuple(name.split()): name for name in synonyms}
    for name, others in synonyms.items():
        for phrase in others:
            phrases.setdefault(tuple(phrase.split()), name)
    longest = max(map(len, phrases), default=0)
    words = re.findall(r"[a-z]+", caption.lower().replace("'s ", " "))
    found, place = [], 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            *before, last = words[place : place + length]
            thing = next((phrases[(*before, form)] for form in _singulars(last) if (*before, form) in phrases), None)
            if thing is not None:
                found.append(thing)
                place += length
                break
        else:
            place += 1
    return found


def mme_answer(text: str) -> str:
    """``"yes"``, ``"no"`` or ``"other"``, from the first four characters of an answer."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_scores(pairs: Sequence[Sequence[tuple[str, str]]]) -> MMEScores:
    """Score one task of MME.

    Args:
        pairs: per picture, its two questions, each as (the model's answer, ``"yes"`` or ``"no"``).

    Raises:
        ValueError: no picture, a picture with another number of questions than two, or another label.
    """
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("pairs must hold one picture or more with two questions each")
    right = [[mme_answer(answer) == ("yes" if _label(label) else "no") for answer, label in pair] for pair in pairs]
    accuracy = sum(map(sum, right)) / (2 * len(pairs))
    plus = sum(map(all, right)) / len(pairs)
    return MMEScores(accuracy, plus, 100 * accuracy + 100 * plus)


def _label(answer: str | bool) -> bool:
    if isinstance(answer, str):
        if answer.strip().lower() not in ("yes", "no"):
            raise ValueError(f"label must be 'yes' or 'no', got {answer!r}")
        return answer.strip().lower() == "yes"
    return bool(answer)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _singulars(word: str) -> list[str]:
    """The word, and what it may be the plural of."""
    forms = [word]
    if word in _IRREGULAR:
        forms.append(_IRREGULAR[word])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("s"):
        forms.append(word[:-1])
    return forms


_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "mice": "mouse",
    "geese": "goose",
    "calves": "calf",
    "oxen": "ox",
    "policemen": "policeman",
    "firemen": "fireman",
    "businessmen": "businessman",
    "fishermen": "fisherman",
    "snowmen": "snowman",
}
