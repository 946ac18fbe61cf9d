"""Blank infilling: the text can be rebuilt, and only what can be known is asked for."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.data import infill
from glm_jax.data.packing import Shape
from glm_jax.errors import UserError
from glm_jax.tasks.pretrain import CONTINUATION, INFILL, LEFT_TO_RIGHT, Texts

SPECIAL = {"[MASK]": 0, "[gMASK]": 1, "<sop>": 3, "<eop>": 4, "<|endoftext|>": 5}
MASK, GMASK, SOP, EOP, END = SPECIAL.values()
texts = st.integers(8, 400).map(lambda n: np.arange(100, 100 + n))  # every token differs
seeds = st.integers(0, 2**31)


def spans_of(tokens):
    """What stands before the first `<sop>`, and the spans behind each of them."""
    at = [*np.flatnonzero(tokens == SOP), len(tokens)]
    spans = [tokens[a + 1:b] for a, b in pairwise(at)]
    return tokens[:at[0]], spans


@settings(max_examples=200, deadline=None)
@given(texts, seeds)
def test_infill(text, seed):
    piece = infill.infill(text, SPECIAL, np.random.default_rng(seed))
    source, spans = spans_of(piece.tokens)
    blanks = np.flatnonzero(source == MASK)
    assert len(blanks) == len(spans) == infill.span_count(np.array([len(text)]))[0]
    assert all(len(span) for span in spans)
    assert (np.diff(blanks) > 1).all(), "two blanks side by side can't be told apart"
    rebuilt = np.concatenate([part for at, token in enumerate(source) for part in (
        [spans[np.searchsorted(blanks, at)]] if token == MASK else [np.array([token])])])
    np.testing.assert_array_equal(rebuilt, text)
    assert len(piece.tokens) == len(text) + 2 * len(spans)
    check_targets(piece)


@settings(max_examples=100, deadline=None)
@given(texts, seeds)
def test_continuation(text, seed):
    piece = infill.continuation(text, SPECIAL, np.random.default_rng(seed))
    source, spans = spans_of(piece.tokens)
    assert source[-1] == GMASK and len(spans) == 1 and len(source) > 1 and len(spans[0])
    np.testing.assert_array_equal(np.append(source[:-1], spans[0]), text)
    check_targets(piece)


def check_targets(piece):
    """Each position predicts the next token, a span's last one `<eop>`; blanks aren't asked for."""
    following = np.append(piece.tokens[1:], EOP)
    first = np.flatnonzero(piece.tokens == SOP)[0]
    following[first:][following[first:] == SOP] = EOP  # between two spans
    np.testing.assert_array_equal(piece.targets, following)
    unasked = np.isin(piece.targets, (MASK, GMASK, SOP))
    np.testing.assert_array_equal(piece.weights, ~unasked)
    assert piece.weights[-1] == 1 and piece.targets[-1] == EOP


@pytest.mark.parametrize("ends", [True, False])
def test_left_to_right(ends):
    piece = infill.left_to_right(np.array([10, 11, 12]), SPECIAL, ends)
    assert piece.tokens.tolist() == [GMASK, SOP, 10, 11, 12]
    assert piece.targets.tolist() == [SOP, 10, 11, 12, END]
    assert piece.weights.tolist() == [0, 1, 1, 1, float(ends)]


def test_how_much_is_masked():
    text, draw = np.arange(1000), np.random.default_rng(0)
    masked = [sum(map(len, spans_of(infill.infill(text + 100, SPECIAL, draw).tokens)[1]))
              for _ in range(20)]
    assert np.mean(masked) == pytest.approx(1000 * infill.RATIO, rel=0.05)


class Corpus:
    """Documents of given lengths, all tokens different."""

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths)

    def __getitem__(self, index):
        return np.arange(100, 100 + self.lengths[index], dtype=np.uint16)


def make_texts(lengths=(1, 2, 7, 8, 9, 61, 62, 63, 64, 200, 1000), length=64, mixture=(1, 1, 2)):
    return Texts(Corpus(list(lengths) * 4), Shape(2, length, length), SPECIAL, mixture, seed=0)


@pytest.mark.parametrize("length", [8, 64, 256])
def test_lengths_are_those_of_the_pieces(length):
    """The plan of rows is made from `lengths` alone: a longer piece would not fit."""
    source = make_texts(length=length)
    for epoch in range(3):
        planned = source.lengths(epoch)
        pieces = [source.piece(i, epoch) for i in range(len(planned))]
        assert planned.tolist() == [len(piece.tokens) for piece in pieces]
        assert planned.max() <= length
        assert all(len(p.tokens) == len(p.targets) == len(p.weights) for p in pieces)


def test_long_documents_are_cut_into_rows_and_only_their_ends_end():
    source = make_texts(mixture=(1, 0, 0))
    whole = []
    for index in range(len(source.size)):
        piece = source.piece(index, 0)
        last = source.start[index] + source.size[index] == source.corpus.lengths[
            source.document[index]]
        assert piece.weights[-1] == last
        whole.append((source.document[index], piece.tokens[2:]))
    for document, length in enumerate(source.corpus.lengths):
        parts = [tokens for number, tokens in whole if number == document]
        np.testing.assert_array_equal(np.concatenate(parts), 100 + np.arange(length))


def test_epochs_draw_other_objectives_in_the_shares_of_the_mixture():
    source = make_texts(lengths=[50] * 2000)
    kinds = source.objectives(0)
    shares = [(kinds == kind).mean() for kind in (LEFT_TO_RIGHT, CONTINUATION, INFILL)]
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.03)
    assert (kinds != source.objectives(1)).any()
    assert (kinds == make_texts(lengths=[50] * 2000).objectives(0)).all()


def test_rows_too_short_for_any_text():
    with pytest.raises(UserError, match="too short"):
        make_texts(length=5)
