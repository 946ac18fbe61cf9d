"""The rule of who sees whom, against what it is meant to express."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.nn.batch import blank_batch, causal_batch, visible

# A text: how many tokens of it see each other both ways, and how many causal ones follow.
texts = st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any)
rows = st.tuples(st.lists(texts, max_size=4), st.integers(0, 3), st.booleans())


def build(row: tuple) -> tuple[np.ndarray, np.ndarray, list]:
    """Segments and order as the data makes them, and for each token (text, its number, prefix)."""
    packed, padding, left = row
    segments, order, tokens, count = [], [], [], 0
    for text, (prefix, causal) in enumerate(packed):
        count += 1
        for i in range(prefix + causal):
            count += i >= prefix
            segments.append(text + 1)
            order.append(count)
            tokens.append((text, i, prefix))
    pad = [0] * padding
    if left:
        return np.array(pad + segments), np.array(pad + order), [None] * padding + tokens
    return np.array(segments + pad), np.array(order + pad), tokens + [None] * padding


def sees(query: tuple | None, key: tuple | None) -> bool:
    if query is None or key is None or query[0] != key[0]:
        return False
    return key[1] <= query[1] or key[1] < query[2]


@settings(max_examples=60, deadline=None)
@given(rows)
def test_visible_is_the_meant_mask(row):
    segments, order, tokens = build(row)
    mask = visible(*(np.array(a, np.int32)[None] for a in (segments, order) * 2))
    wanted = np.array([[sees(q, k) for k in tokens] for q in tokens], bool)
    np.testing.assert_array_equal(np.asarray(mask)[0], wanted.reshape(mask.shape[1:]))


def test_queries_of_a_step_see_all_that_came_before():
    """With a cache, the queries are only the last tokens; the keys all slots, unused ones too."""
    segments = np.array([[1, 1, 1, 0, 0]])
    order = np.array([[0, 1, 2, 0, 0]])
    mask = visible(np.array([[1]]), np.array([[2]]), segments, order)
    np.testing.assert_array_equal(mask, [[[True, True, True, False, False]]])


def test_positions_count_real_tokens_on_either_side():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    batch = causal_batch(np.zeros((2, 4), int), mask)
    np.testing.assert_array_equal(batch.positions[0, 0, 2:], [0, 1])
    np.testing.assert_array_equal(batch.positions[1, 0, :3], [0, 1, 2])
    np.testing.assert_array_equal(batch.segments, mask)
    assert batch.positions.min() == 0


def test_given_positions_and_segments_stay():
    batch = causal_batch(np.zeros((1, 3), int), positions=np.array([[5, 7, 1]]),
                         segments=np.array([[1, 1, 2]]))
    np.testing.assert_array_equal(batch.positions[:, 0], [[5, 7, 1]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 2]])


def test_what_fills_a_blank_sees_the_context_and_stands_at_the_blank():
    pad, mask, gmask, start = 3, 7, 8, 9
    tokens = np.array([[40, 41, gmask, start, 42], [pad, 40, mask, 41, start]])
    batch = blank_batch(tokens, tokens != pad, start, [(gmask,), (mask,)], unstarted=True)
    assert batch.positions.tolist() == [[[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]],
                                        [[0, 0, 1, 2, 1], [0, 0, 0, 0, 1]]]
    seen = visible(batch.segments, batch.order, batch.segments, batch.order)
    np.testing.assert_array_equal(seen[1], [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0],
                                            [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
