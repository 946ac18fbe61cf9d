"""Pre-training examples: left to right, and blank infilling as data (Du et al. 2022, 2103.10360).

A masked span leaves one mask token behind and follows at the end, behind `<sop>`; what it ends
with is `<eop>`. As in GLM-4, attention stays causal and positions just count on.
"""

import numpy as np

from glm_jax.data.packing import Piece

SPAN = 3  # mean length of a masked span, in tokens
RATIO = 0.15  # of the tokens that are masked


def span_count(lengths: np.ndarray) -> np.ndarray:
    """How many spans are masked in texts of these lengths."""
    return np.maximum(1, np.rint(lengths * (RATIO / SPAN))).astype(np.int64)


def left_to_right(text: np.ndarray, special: dict[str, int], ends: bool) -> Piece:
    """`[gMASK] <sop> text`, to predict the text and, where the document ends, `<|endoftext|>`."""
    tokens = np.concatenate(([special["[gMASK]"], special["<sop>"]], text)).astype(np.int32)
    targets = np.append(tokens[1:], special["<|endoftext|>"]).astype(np.int32)
    weights = np.ones(len(tokens), np.float32)
    weights[0] = 0
    weights[-1] = float(ends)
    return Piece(tokens, targets, weights)


def summary(text: np.ndarray, special: dict[str, int], vector: np.ndarray) -> Piece:
    """`[gMASK] <sop> text [sMASK]`: a whole document left to right, and behind it what it means.

    Nothing is predicted at `[sMASK]`; its hidden state learns the direction of `vector`.
    """
    tokens, targets, weights = left_to_right(text, special, ends=True)[:3]
    tokens = np.append(tokens, special["[sMASK]"]).astype(np.int32)
    assert targets is not None and weights is not None
    return Piece(tokens, np.append(targets, 0).astype(np.int32),
                 np.append(weights, np.float32(0)), vector=vector)


def continuation(text: np.ndarray, special: dict[str, int], rng: np.random.Generator) -> Piece:
    """`beginning [gMASK] <sop> rest`: the rest is one long span at the end."""
    cut = int(rng.integers(1, max(2, len(text))))
    return _piece(text[:cut], [text[cut:]], special["[gMASK]"], special)


def infill(text: np.ndarray, special: dict[str, int], rng: np.random.Generator) -> Piece:
    """Short spans become `[MASK]` and follow, in their order, each behind a `<sop>`."""
    count = int(span_count(np.array([len(text)]))[0])
    # Spans and the gaps between them: random cuts; a gap inside is at least one token.
    masked = min(max(count, round(RATIO * len(text))), len(text) - count)
    if masked < count:
        return left_to_right(text, special, ends=False)
    spans = np.diff(np.r_[0, np.sort(rng.choice(np.arange(1, masked), count - 1, False)), masked])
    free = len(text) - masked - (count - 1)
    gaps = np.diff(np.r_[0, np.sort(rng.integers(0, free + 1, count)), free])
    gaps[1:-1] += 1
    source, targets, at = [], [], 0
    for gap, span in zip(gaps, spans, strict=False):
        source.append(text[at:at + gap])
        source.append(np.array([special["[MASK]"]]))
        targets.append(text[at + gap:at + gap + span])
        at += gap + span
    source.append(text[at:])
    return _piece(np.concatenate(source), targets, None, special)


def _piece(source: np.ndarray, spans: list[np.ndarray], mask: int | None,
           special: dict[str, int]) -> Piece:
    parts, goals = [source], [source[1:]]
    if mask is not None:
        parts.append(np.array([mask]))
        goals.append(np.array([mask]))
    for number, span in enumerate(spans):
        if number == 0:
            goals.append(np.array([special["<sop>"]]))
        parts += [np.array([special["<sop>"]]), span]
        goals += [span, np.array([special["<eop>"]])]
    tokens, targets = (np.concatenate(x).astype(np.int32) for x in (parts, goals))
    # Where a blank lies is chance: nobody is asked to predict it.
    unasked = [special["[MASK]"], special["[gMASK]"], special["<sop>"]]
    return Piece(tokens, targets, (~np.isin(targets, unasked)).astype(np.float32))
