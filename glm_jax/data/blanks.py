"""Blank infilling for the GLM of 2021 (Du et al. 2022, 2103.10360): two positions a token.

What `infill.py` is to the models with one. Every draw is that of the released training code, in
its order, so that a seed gives its batches; the pieces are packed and trained on as any other.
"""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from glm_jax.data.packing import Piece

Span = tuple[int, int]  # start and stop


class Text(NamedTuple):
    """Tokens `[length]`, `[CLS]` first, and which of them a continuation may have to predict."""

    tokens: np.ndarray
    asked: np.ndarray


class Special(NamedTuple):
    """Ids of special tokens; `ends` are the tokens that hold the end of a sentence."""

    cls: int
    eos: int
    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    block: int
    ends: frozenset[int] = frozenset()


class Mixture(NamedTuple):
    """The released arguments, and their defaults.

    Attributes:
      bert_prob, gap_sentence_prob: of batches with short spans, and with sentences; else one long
        blank, which `gpt_infill_prob` puts at the end and `gpt_min_ratio` bounds from below.
      bert_ratio, gap_sentence_ratio: the share of a text that is masked.
      average_block_length, max_block_length: of short spans, Poisson's; `max` is beyond the last.
      block_mask_prob: of hiding a token of a short span where it is read.
      short_seq_prob: of a batch of shorter texts; single_span_prob: of one short span a text.
      task_mask: other mask tokens for sentences and for long blanks.
    """

    bert_prob: float = 0.5
    gap_sentence_prob: float = 0.0
    gpt_infill_prob: float = 0.5
    gpt_min_ratio: float = 0.5
    bert_ratio: float = 0.15
    gap_sentence_ratio: float = 0.15
    average_block_length: float = 3
    max_block_length: int = 40
    block_mask_prob: float = 0.0
    short_seq_prob: float = 0.0
    single_span_prob: float = 0.0
    task_mask: bool = False

    @property
    def lengths(self) -> range:
        return range(1, self.max_block_length)

    @property
    def length_weights(self) -> list[float]:
        mean = self.average_block_length
        return [math.exp(-mean) * mean**n / math.factorial(n) for n in self.lengths]


def construct(texts: Sequence[Text], mixture: Mixture, special: Special, max_length: int,
              rng: random.Random) -> tuple[str, list[Piece]]:
    """The objective that is drawn for a batch of texts, and its pieces.

    A text that the drawn spans don't fit in is left out. The released seed of a batch is
    `(number * workers + worker) * processes + process`.

    Args:
      max_length: what texts were cut to; a batch of shorter ones is drawn by it.

    Returns:
      `bert` (short spans), `sentence` or `gpt` (one long blank); pieces with positions `[2, n]`.
    """
    hiding = random.Random()  # the released code takes these draws from elsewhere
    hiding.setstate(rng.getstate())
    if rng.random() < mixture.short_seq_prob:
        texts = shorter(texts, max_length, special, rng)
    single = rng.random() < mixture.single_span_prob
    kind = 0.0 if single else rng.random()
    pieces: list[Piece] = []
    if kind < mixture.bert_prob:
        for text in texts:
            lengths: list[int] = []
            least = 1 if single else int(mixture.bert_ratio * len(text.tokens))
            while sum(lengths) < least:
                lengths += rng.choices(mixture.lengths, mixture.length_weights)
            spans = draw_spans(text.tokens, lengths, mixture.bert_ratio, special, rng)
            if spans is not None:
                hidden = [i for start, stop in spans for i in range(start, stop)
                          if mixture.block_mask_prob and hiding.random() < mixture.block_mask_prob]
                pieces.append(assemble(text.tokens, spans, special.mask, special, hidden))
        return "bert", pieces
    if kind < mixture.bert_prob + mixture.gap_sentence_prob:
        for text in texts:
            found = sentences(text.tokens, special)
            rng.shuffle(found)
            sizes = itertools.accumulate((stop - start for start, stop in found), initial=0)
            least = max(1, int(mixture.gap_sentence_ratio * len(text.tokens)))
            spans = [span for span, before in zip(found, sizes, strict=False) if before < least]
            rng.shuffle(spans)
            mask = special.smask if mixture.task_mask else special.mask
            pieces.append(assemble(text.tokens, spans, mask, special))
        return "sentence", pieces
    sizes_of = [len(text.tokens) for text in texts]
    longest = rng.randint(int(mixture.gpt_min_ratio * min(sizes_of)), max(sizes_of) - 2)
    mask = special.gmask if mixture.task_mask else special.mask
    for text in texts:
        length = len(text.tokens)
        size = min(longest, length - 2)
        several = bool((text.tokens[:-1] == special.eos).any())
        if several or rng.random() < mixture.gpt_infill_prob:
            pieces.append(assemble(text.tokens, [(length - size, length)], mask, special,
                                   rest=text.asked[length - size:]))
            continue
        one = draw_spans(text.tokens, [size], mixture.bert_ratio, special, rng)
        if one is not None:
            pieces.append(assemble(text.tokens, one, mask, special))
    return "gpt", pieces


def assemble(tokens: np.ndarray, spans: Sequence[Span], mask: int, special: Special,
             hidden: Sequence[int] = (), rest: np.ndarray | None = None) -> Piece:
    """A text whose spans are `mask`, then each span in turn behind `<sop>`, to end in `<eop>`.

    The first position is the place in the text with its blanks, of a span its blank's; the second
    counts in a span and is 0 before.

    Args:
      spans: in the order in which they follow.
      hidden: places whose token is not read where it follows.
      rest: of a single span at the end of a text that goes on: its tokens' weights. There is no
        `<eop>` then.
    """
    shown = np.array(tokens)
    shown[list(hidden)] = special.block
    counts = np.ones(len(tokens), np.int64)
    for start, stop in spans:
        counts[start + 1:stop] = 0
    place, at = np.cumsum(counts) - 1, 0
    source: list[Any] = []
    places: list[Any] = []
    for start, stop in sorted(spans):
        source += [tokens[at:start], [mask]]
        places.append(place[at:start + 1])
        at = stop
    source.append(tokens[at:])
    places.append(place[at:])
    read: list[Any] = []
    asked: list[Any] = []
    blocks: list[Any] = []
    for start, stop in spans:
        read += [[special.sop], shown[start:stop]]
        asked += [tokens[start:stop], [special.eop]]
        places.append(np.full(stop - start + 1, place[start]))
        blocks.append(np.arange(1, stop - start + 2))
    context = sum(map(len, source))
    block = np.concatenate((np.zeros(context, np.int64), *blocks))
    order = np.maximum(np.arange(len(block)) - context + 1, 0)
    weights = order > 0
    if rest is not None:
        weights[context:-1] = rest
    kept = slice(None if rest is None else -1)
    return Piece(np.concatenate(source + read)[kept].astype(np.int32),
                 np.concatenate(source + asked)[kept].astype(np.int32),
                 weights[kept].astype(np.float32),
                 positions=np.stack((np.concatenate(places), block))[:, kept].astype(np.int32),
                 order=order[kept].astype(np.int32))


def draw_spans(tokens: np.ndarray, lengths: list[int], ratio: float, special: Special,
               rng: random.Random) -> list[Span] | None:
    """Where spans of these lengths lie, in random order; None when they don't all fit.

    All documents of the text but the longest have at most `ratio` of their tokens masked.
    """
    rng.shuffle(lengths)
    rng.shuffle(lengths)  # twice, as the released code
    spans: list[Span] = []
    found = documents(tokens, special)
    for number, (start, size) in enumerate(found):
        last = number == len(found) - 1
        left = lengths[len(spans):]
        count = fitting(left, size if last else int(size * ratio), gap=int(last))
        if count:
            spans += place_spans(left[:count], size, rng, start)
    if len(spans) < len(lengths):
        return None
    rng.shuffle(spans)
    return spans


def fitting(lengths: Sequence[int], room: int, gap: int) -> int:
    """How many of the first spans fit in `room` tokens, `gap` tokens between any two."""
    ends = itertools.accumulate(lengths)
    return sum(1 for _ in itertools.takewhile(
        lambda end: end[1] + gap * end[0] <= room, enumerate(ends)))


def place_spans(lengths: Sequence[int], room: int, rng: random.Random, start: int = 0
                ) -> list[Span]:
    """Spans of these lengths, in this order, in `room` tokens from `start`; none touch."""
    free = room - sum(lengths) - len(lengths) + 1
    shifts = sorted(rng.randrange(free + 1) for _ in lengths)
    before = itertools.accumulate((length + 1 for length in lengths), initial=start)
    return [(shift + at, shift + at + length)
            for shift, at, length in zip(shifts, before, lengths, strict=False)]


def documents(tokens: np.ndarray, special: Special) -> list[Span]:
    """Start and size of each document, the shortest first; the text's last token is in none."""
    found, stop = [], len(tokens)
    for end in reversed([-1, *np.flatnonzero(tokens == special.eos).tolist()]):
        start = end + 1
        if start < len(tokens) and tokens[start] == special.cls:
            start += 1
        size = stop - start
        found.append((start, size - 1 if stop == len(tokens) and size > 0 else size))
        stop = end
    return sorted(found, key=lambda document: document[1])


def sentences(tokens: np.ndarray, special: Special) -> list[Span]:
    """The sentences of a text; one that a document ends before its end is left out."""
    found, start = [], int(tokens[0] == special.cls)
    for i, token in enumerate(tokens.tolist()):
        if token in special.ends:
            found.append((start, i + 1))
        if token in special.ends or token == special.eos:
            start = i + 1
    return [*found, (start, len(tokens))] if start < len(tokens) else found


def shorter(texts: Sequence[Text], max_length: int, special: Special, rng: random.Random
            ) -> list[Text]:
    """Several pieces of each text, of one random size, cut where sentences end."""
    size = rng.randrange(32, max_length - 1)
    out = []
    for text in texts:
        tokens, asked = text.tokens[1:], text.asked[1:]
        breaks = np.append(False, np.isin(tokens, [*special.ends, special.eos]))
        for _ in range((max_length - 1) // size):
            start, stop = 0, len(tokens)
            if size < len(tokens):
                start = rng.randrange(0, len(tokens) - size)
                while start > 0 and (tokens[start] == special.eos or not breaks[start]):
                    start -= 1
                stop = start + size
                while stop > start and not breaks[stop]:
                    stop -= 1
                if stop - start < size // 2:
                    stop = start + size
            out.append(Text(np.append(special.cls, tokens[start:stop]),
                            np.append(0, asked[start:stop])))
    return out
