r"""Associative recall: the MQAR task, and which tokens of real text are recalled rather than predicted.

**MQAR**, multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927): a sequence shows D key-value pairs
and then asks for all of them, each key once, at distances that follow a power law. :func:`mqar` draws one.

**Recall tokens** of text: a token whose bigram (the token before it, itself) stood in the same document before, and is
not one of the bigrams that are frequent anyway. They are what a model can copy from its context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headgate.data.seeding import stream_generator
from headgate.validate import check_integer, check_positive, check_shape

__all__ = ["IGNORED", "RecallData", "frequent_bigrams", "mqar", "query_distance", "recall_mask"]

IGNORED = -100
"""The label of a position that is not scored."""

_ROWS_AT_ONCE = 1 << 22


class RecallData(NamedTuple):
    """Sequences, labels, and the setting they were drawn from.

    Attributes:
        inputs: token ids, int64 ``(examples, length)``.
        labels: int64 of the same shape; ``-100`` where nothing is scored.
        slices: ``num_kv_pairs`` and ``input_seq_len``, to group results by.
    """

    inputs: Int[Tensor, "examples length"]
    labels: Int[Tensor, "examples length"]
    slices: Mapping[str, int]


def mqar(
    vocab_size: int = 8192,
    num_examples: int = 1000,
    input_seq_len: int = 64,
    num_kv_pairs: int = 8,
    *,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    seed: int = 0,
    legacy_rng: bool = False,
    filler_seed: int | None = None,
    generator: torch.Generator | None = None,
) -> RecallData:
    """Draw multi-query associative recall examples.

    With ``vocab_size=18, input_seq_len=16, num_kv_pairs=2, random_non_queries=False``, for example::

                key   val   key   val               query                               query
        inputs  2     12    4     9     0     0     4     0     0     0     0     0     2     0     0     0
        labels  -100  -100  -100  -100  -100  -100  9     -100  -100  -100  -100  -100  12    -100  -100  -100

    The label stands at the query's own position; the answer is never shown. Keys come from 1 … V // 2 - 1, values from
    V // 2 … V - 1.

    Two streams of random numbers are on offer, and give different examples of one distribution. By default everything
    is drawn at once from a PyTorch generator (100,000 examples of four pairs in about a second). With ``legacy_rng``
    the published generator's stream is followed draw by draw (some 20 s for them), so that its data sets can be made
    again, integer for integer. Global random state is neither read nor changed by either.

    Args:
        vocab_size: V, number of token ids.
        num_examples: number of sequences.
        input_seq_len: T, length of a sequence; even.
        num_kv_pairs: D, pairs per sequence, each asked for once.
        power_a: a of the distances: a query stands at token 2D + 2(i - 1) with weight a · i^(a - 1), i = 1, 2, …; close
            to 1/i for 0.01, uniform for 1.
        random_non_queries: whether the positions that hold neither a pair nor a query are filled with random tokens in
            place of zeros. A filler may equal a key, and then looks like a query without a label.
        seed: seed of either stream.
        legacy_rng: whether to follow the published stream: NumPy's legacy generator, row by row.
        filler_seed: with ``legacy_rng``, seed of PyTorch's stream for the fillers (published: whatever the global
            generator held; ``torch.manual_seed(s)`` before the call is ``filler_seed=s``); default ``seed``.
        generator: CPU generator to draw from in place of ``seed``.

    Returns:
        The examples as :class:`RecallData`.

    Raises:
        ValueError: T is odd, V ≤ T, 4D > T, D ≥ V // 2, ``power_a`` or a size is not positive, or two streams are asked
            for.
    """
    check_positive(
        vocab_size=vocab_size,
        num_examples=num_examples,
        input_seq_len=input_seq_len,
        num_kv_pairs=num_kv_pairs,
        power_a=power_a,
    )
    if input_seq_len % 2:
        raise ValueError(f"input_seq_len must be even, got input_seq_len={input_seq_len}")
    if num_kv_pairs >= vocab_size // 2:
        raise ValueError(
            "num_kv_pairs < vocab_size // 2 is needed (keys differ and 0 is none), got "
            f"num_kv_pairs={num_kv_pairs}, vocab_size={vocab_size}"
        )
    if vocab_size <= input_seq_len:
        raise ValueError(
            f"vocab_size > input_seq_len is needed, got vocab_size={vocab_size}, input_seq_len={input_seq_len}"
        )
    if 4 * num_kv_pairs > input_seq_len:
        raise ValueError(
            "4 * num_kv_pairs <= input_seq_len is needed (pairs and queries, two tokens each), got "
            f"num_kv_pairs={num_kv_pairs}, input_seq_len={input_seq_len}"
        )
    if legacy_rng and generator is not None:
        raise ValueError("generator and legacy_rng=True exclude each other: the legacy stream starts from a seed")
    if filler_seed is not None and not legacy_rng:
        raise ValueError("filler_seed needs legacy_rng=True; otherwise seed or generator gives the fillers, too")

    context = 2 * num_kv_pairs
    space = (input_seq_len - context) // 2
    weights = power_a * np.arange(1, space + 1) ** (power_a - 1)
    weights = weights / weights.sum()
    if legacy_rng:
        keys, values, gaps = _draw_legacy(vocab_size, num_examples, num_kv_pairs, weights, seed)
        generator = torch.Generator().manual_seed(seed if filler_seed is None else filler_seed)
    else:
        generator = stream_generator(seed, "mqar") if generator is None else generator
        keys, values, gaps = _draw(vocab_size, num_examples, num_kv_pairs, weights, generator)

    inputs = torch.zeros(num_examples, input_seq_len, dtype=torch.int64)
    inputs[:, 0:context:2] = keys
    inputs[:, 1:context:2] = values
    queries = context + 2 * gaps
    inputs.scatter_(1, queries, keys)
    labels = torch.full_like(inputs, IGNORED).scatter_(1, queries, values)
    if random_non_queries:
        fillers = torch.randint(vocab_size, size=inputs.shape, generator=generator)
        inputs = torch.where(inputs == 0, fillers, inputs)
    return RecallData(inputs, labels, {"num_kv_pairs": num_kv_pairs, "input_seq_len": input_seq_len})


def query_distance(data: RecallData) -> Int[Tensor, "examples length"]:
    """How many tokens back the value of every query stands; 0 where there is no query.

    Args:
        data: examples of :func:`mqar`.

    Returns:
        int64 ``(examples, length)``.
    """
    pairs = data.slices["num_kv_pairs"]
    values = data.inputs[:, 1 : 2 * pairs : 2]
    same = data.labels[:, :, None] == values[:, None, :]
    place = 1 + 2 * same.long().argmax(-1)
    distance = torch.arange(data.labels.shape[1]) - place
    return torch.where(data.labels == IGNORED, 0, distance)


def recall_mask(
    tokens: Int[Tensor, "batch length"],
    frequent: Int[Tensor, "bigrams 2"] | None = None,
    document_ids: Int[Tensor, "batch length"] | None = None,
) -> Bool[Tensor, "batch length"]:
    """Mark the tokens whose bigram stood in the same document before.

    Args:
        tokens: token ids, at least 0. A row is a document, unless ``document_ids`` says otherwise.
        frequent: bigrams that never count, such as :func:`frequent_bigrams` of the training set.
        document_ids: which document a token belongs to, at least 0; a bigram lies within one document.

    Returns:
        True at the second token of a bigram that is repeated; ``(batch, length)``.

    Raises:
        TypeError: an argument holds no integers.
        ValueError: wrong shape or a negative id.
    """
    check_shape("tokens", tokens, (None, None), "batch, length")
    check_integer("tokens", tokens)
    if tokens.numel() and int(tokens.min()) < 0:
        raise ValueError(f"tokens must be at least 0, got {int(tokens.min())}")
    if document_ids is None:
        documents = torch.zeros_like(tokens, dtype=torch.int64)
    else:
        check_shape("document_ids", document_ids, tuple(tokens.shape), "batch, length")
        check_integer("document_ids", document_ids)
        documents = document_ids.long()
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    if tokens.shape[1] < 3:
        return mask
    bigrams = torch.stack((tokens[:, :-1], tokens[:, 1:]), dim=-1).long()
    within = documents[:, :-1] == documents[:, 1:]
    if frequent is not None:
        check_shape("frequent", frequent, (None, 2), "bigrams, 2")
        check_integer("frequent", frequent)
    known = bigrams.new_zeros((0, 2)) if frequent is None else frequent.to(bigrams)
    # Number the bigrams, so that (document, bigram) fits into one integer whatever the vocabulary.
    _, numbers = torch.cat((bigrams.flatten(0, 1), known)).unique(dim=0, return_inverse=True)
    count = int(numbers.max()) + 1
    codes, known_codes = numbers.split((within.numel(), known.shape[0]))
    codes = codes.view_as(within)
    # A bigram across a border gets a code of its own, so that it repeats nothing.
    alone = -1 - torch.arange(within.shape[1], device=tokens.device)
    ordered, order = torch.where(within, documents[:, 1:] * count + codes, alone).sort(dim=1, stable=True)
    # Of equal neighbours in a stable sort, all but the first are repeats.
    same = ordered[:, 1:] == ordered[:, :-1]
    repeated = torch.zeros_like(within).scatter(1, order, torch.nn.functional.pad(same, (1, 0)))
    mask[:, 1:] = repeated & ~torch.isin(codes, known_codes)
    return mask


def frequent_bigrams(tokens: Int[Tensor, "batch length"], min_count: int = 1250) -> Int[Tensor, "bigrams 2"]:
    """The bigrams that occur at least ``min_count`` times in ``tokens``, such as a training set.

    Args:
        tokens: token ids ``(batch, length)``; bigrams lie within a row.
        min_count: how often a bigram must occur.

    Returns:
        int64 ``(bigrams, 2)``, in ascending order.
    """
    check_shape("tokens", tokens, (None, None), "batch, length")
    check_integer("tokens", tokens)
    check_positive(min_count=min_count)
    bigrams = torch.stack((tokens[:, :-1], tokens[:, 1:]), dim=-1).long().flatten(0, 1)
    found, counts = bigrams.unique(dim=0, return_counts=True)
    return found[counts >= min_count]


def _draw_legacy(
    vocab_size: int, num_examples: int, num_kv_pairs: int, weights: np.ndarray, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gaps ``(examples, pairs)`` from the published stream: all keys, then all values, then all gaps."""
    stream = np.random.RandomState(seed)

    def rows(choices: np.ndarray, p: np.ndarray | None = None) -> Tensor:
        drawn = [stream.choice(choices, size=num_kv_pairs, replace=False, p=p) for _ in range(num_examples)]
        return torch.from_numpy(np.stack(drawn).astype(np.int64))

    half = vocab_size // 2
    return rows(np.arange(1, half)), rows(np.arange(half, vocab_size)), rows(np.arange(len(weights)), weights)


def _draw(
    vocab_size: int, num_examples: int, num_kv_pairs: int, weights: np.ndarray, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gaps ``(examples, pairs)``, all rows at once."""
    half = vocab_size // 2
    keys = 1 + _distinct(half - 1, num_examples, num_kv_pairs, generator)
    values = half + _distinct(vocab_size - half, num_examples, num_kv_pairs, generator)
    return keys, values, _weighted_distinct(torch.from_numpy(weights), num_examples, num_kv_pairs, generator)


def _distinct(size: int, rows: int, count: int, generator: torch.Generator) -> Int[Tensor, "rows count"]:
    """Per row, ``count`` distinct numbers below ``size`` in random order (Floyd's algorithm, then a shuffle)."""
    drawn = torch.empty(rows, count, dtype=torch.int64)
    for place in range(count):
        top = size - count + place
        number = torch.randint(top + 1, (rows,), generator=generator)
        taken = (drawn[:, :place] == number[:, None]).any(1)
        drawn[:, place] = torch.where(taken, top, number)
    return drawn.gather(1, torch.rand(rows, count, generator=generator, dtype=torch.float64).argsort(1))


def _weighted_distinct(weights: Tensor, rows: int, count: int, generator: torch.Generator) -> Int[Tensor, "rows count"]:
    """Per row, ``count`` distinct indices, drawn one after another by weight: the Gumbel top-k trick."""
    at_once = max(1, _ROWS_AT_ONCE // len(weights))
    drawn = []
    for start in range(0, rows, at_once):
        shape = (min(at_once, rows - start), len(weights))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_(min=math.ulp(0.0))
        drawn.append((weights.log() - (-uniform.log()).log()).topk(count, dim=1).indices)
    return torch.cat(drawn)
