"""Packing: every example once an epoch, full rows, and batches that depend on (seed, step) only."""

import numpy as np
import pytest

from glm_jax.data.packing import Batches, Piece, Shape, assemble, once, plan, stream
from glm_jax.errors import UserError


class Numbered:
    """Example i is `lengths[i]` times the token i + 1; the label is its number."""

    def __init__(self, lengths):
        self.sizes = np.asarray(lengths)

    def lengths(self, epoch):
        return self.sizes

    def piece(self, index, epoch):
        return Piece(np.full(self.sizes[index], index + 1, np.int32), label=index,
                     label_weight=0.5)


def like_reviews(count, seed=0):
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(3.5, 0.8, count).astype(int), 3, 256)


@pytest.mark.parametrize("shape", [Shape(8, 256, 48), Shape(3, 300, 2), Shape(4, 256, 1)])
def test_every_example_once_and_never_too_much_in_a_row(shape):
    lengths = like_reviews(5000)
    batches = plan(lengths, shape, np.random.default_rng(0))
    rows = [row for batch in batches for row in batch]
    assert sorted(i for row in rows for i in row) == list(range(5000))
    assert all(sum(lengths[row]) <= shape.length and 0 < len(row) <= shape.examples
               for row in rows)
    assert all(len(batch) == shape.rows for batch in batches[:-1])


def like_questions(count):
    """Lengths as of benchmarks/packing.py: short questions, and 4 % of long texts to sum up."""
    draw = np.random.default_rng(0)
    short = np.clip(draw.lognormal(3.4, 0.35, count).astype(int), 19, 512)
    return np.where(draw.random(count) < 0.04, draw.integers(200, 513, count), short)


@pytest.mark.parametrize(("lengths", "shape"), [
    (like_reviews(14_000), Shape(8, 256, 48)), (like_questions(14_000), Shape(8, 512, 512))])
def test_rows_are_full(lengths, shape):
    batches = plan(lengths, shape, np.random.default_rng(0))
    rows = [row for batch in batches for row in batch]
    assert max(lengths[row].sum() for row in rows) == shape.length
    assert lengths.sum() / (len(batches) * shape.rows * shape.length) > 0.95


def test_the_arrays_of_a_batch():
    pieces = [[Piece(np.array([7, 8, 9]), label=1), Piece(np.array([5]), label=2,
                                                           label_weight=0.25)],
              [Piece(np.arange(1, 9), label=3)]]
    batch = assemble(pieces, Shape(3, 6, 2), pad_id=99)
    np.testing.assert_array_equal(batch.tokens, [[7, 8, 9, 5, 99, 99], [1, 2, 3, 4, 5, 6],
                                                 [99] * 6])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 0, 0], [1] * 6, [0] * 6])
    np.testing.assert_array_equal(batch.positions[:, 0], [[0, 1, 2, 0, 0, 0], range(6), [0] * 6])
    np.testing.assert_array_equal(batch.order, [range(6)] * 3)
    np.testing.assert_array_equal(batch.pool_index, [[2, 3], [5, 0], [0, 0]])
    np.testing.assert_array_equal(batch.labels, [[1, 2], [3, 0], [0, 0]])
    np.testing.assert_array_equal(batch.label_weights, [[1, 0.25], [1, 0], [0, 0]])
    assert batch.targets is None


def test_targets_a_token():
    piece = Piece(np.array([1, 2, 3]), np.array([2, 3, 4]), np.array([0, 1, 1], np.float32))
    batch = assemble([[piece, piece]], Shape(1, 8, 8), pad_id=0)
    np.testing.assert_array_equal(batch.targets, [[2, 3, 4, 2, 3, 4, 0, 0]])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 0, 1, 1, 0, 0]])
    assert batch.labels is None


def seen(batch):
    """The numbers of the examples of a batch."""
    return sorted(batch.labels[batch.label_weights > 0].tolist())


def test_each_epoch_has_every_example_once_in_another_order():
    batches = Batches(Numbered(like_reviews(200)), Shape(2, 256, 16), 0, seed=3)
    steps = [batches.epoch_steps(epoch) for epoch in range(3)]
    start, orders = 0, []
    for count in steps:
        epoch = [batches[step] for step in range(start, start + count)]
        assert sorted(i for batch in epoch for i in seen(batch)) == list(range(200))
        orders.append([seen(batch) for batch in epoch])
        start += count
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_is_a_function_of_seed_and_step():
    def make(seed=3):
        return Batches(Numbered(like_reviews(100)), Shape(2, 256, 16), 0, seed)

    forward = [make()[0].tokens]  # epochs of about a dozen steps: 40 is in the third
    walked, fresh = make(), make()
    forward = [walked[step].tokens for step in range(41)]
    for step in (40, 3, 27, 0, 40):  # in any order, without having been at the steps before
        np.testing.assert_array_equal(fresh[step].tokens, forward[step])
    assert any((make(4)[step].tokens != forward[step]).any() for step in range(3))


def test_the_iterator_goes_on_from_its_state():
    def make():
        return stream(Batches(Numbered(like_reviews(100)), Shape(2, 256, 16), 0, 3))

    iterator = make()
    for _ in range(17):
        next(iterator)
    state = iterator.get_state()
    wanted = [next(iterator).tokens for _ in range(15)]  # over the end of an epoch
    restored = make()
    restored.set_state(state)
    for tokens in wanted:
        np.testing.assert_array_equal(next(restored).tokens, tokens)


def test_once_says_which_example_stands_where():
    lengths = like_reviews(300)
    found = []
    for rows, batch in once(Numbered(lengths), Shape(4, 256, 8), 0):
        for r, row in enumerate(rows):
            for n, index in enumerate(row):
                assert batch.labels[r, n] == index
                assert batch.tokens[r, batch.pool_index[r, n]] == index + 1
                found.append(index)
    assert sorted(found) == list(range(300))


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="nothing to train on"):
        Batches(Numbered([]), Shape(2, 16, 4), 0, 0)[0]


def test_a_process_reads_its_own_rows_and_the_first():
    """Which shows what arrays a batch has, also where its own rows are empty."""
    asked = set()

    class Asked(Numbered):
        def piece(self, index, epoch):
            asked.add(index)
            return super().piece(index, epoch)
    source, shape = Asked(like_reviews(40)), Shape(4, 256, 8)
    own = shape._replace(own=frozenset({2, 3}))
    for (rows, whole), (_, part) in zip(once(source, shape, 0), once(source, own, 0), strict=True):
        for name, a in vars(whole).items():
            b = getattr(part, name)
            if not isinstance(a, np.ndarray):
                assert a == b, name
            else:
                assert a.shape == b.shape
                np.testing.assert_array_equal(a[[0, 2, 3]], b[[0, 2, 3]], name)
        assert not part.segments[1].any() and whole.segments[:len(rows)].any(axis=1).all()
    rows = plan(source.sizes, shape, np.random.default_rng((0, 0)))[0]
    asked.clear()
    Batches(source, own, 0, 0)[0]
    assert asked == {index for r in (0, 2, 3) for index in rows[r]}
