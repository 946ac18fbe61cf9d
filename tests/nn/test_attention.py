"""Attention against loops in numpy, and the cache's bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from glm_jax.nn.attention import Cache, Mask, attention, reference
from glm_jax.nn.batch import causal_batch
from glm_jax.nn.compute import Compute


def naive(query, key, value, mask):
    batch, queries, heads, dim = query.shape
    out = np.zeros(query.shape)
    for b, h, i in np.ndindex(batch, heads, queries):
        group = h // (heads // key.shape[2])
        seen = [j for j in range(key.shape[1]) if mask[b, i, j]]
        scores = np.array([query[b, i, h] @ key[b, j, group] / dim**0.5 for j in seen])
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        out[b, i, h] = sum(s * value[b, j, group] for s, j in zip(shares, seen, strict=True))
    return out


def inputs(heads: int, groups: int, queries: int = 5, keys: int = 7):
    rng = np.random.default_rng(0)
    query = 3 * rng.standard_normal((2, queries, heads, 8))
    key, value = (3 * rng.standard_normal((2, keys, groups, 8)) for _ in range(2))
    mask = rng.random((2, queries, keys)) < 0.5
    mask[:, :, 0] = True
    return query, key, value, mask


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_equals_loops(heads, groups):
    query, key, value, mask = inputs(heads, groups)
    ours = reference(*(jnp.asarray(a, jnp.float32) for a in (query, key, value)), mask)
    np.testing.assert_allclose(ours, naive(query, key, value, mask), rtol=1e-4, atol=1e-5)


def test_gradients():
    query, key, value, mask = (jnp.asarray(a) for a in inputs(4, 2, queries=2, keys=3))
    check_grads(lambda q, k, v: reference(q, k, v, mask),
                tuple(a.astype(jnp.float32) / 3 for a in (query, key, value)),
                order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_rows_that_see_nothing_are_finite_and_harmless():
    query, key, value, mask = inputs(4, 2)
    mask[0, 1] = False
    args = [jnp.asarray(a, jnp.float32) for a in (query, key, value)]
    out = reference(*args, mask)
    assert np.isfinite(out).all()
    grads = jax.grad(lambda *a: reference(*a, mask)[0, 0].sum(), argnums=(0, 1, 2))(*args)
    assert all(np.isfinite(g).all() for g in grads)
    assert not np.asarray(grads[0])[0, 1].any()


def test_scores_are_float32_in_bfloat16():
    """A score near 20 would be rounded to a sixteenth, its share be wrong by several percent."""
    query, key, value, mask = inputs(4, 2, keys=64)
    args = [jnp.asarray(a, jnp.bfloat16) for a in (query, key, value)]
    out = reference(*args, mask)
    assert out.dtype == jnp.bfloat16
    exact = naive(*(np.asarray(a, np.float64) for a in args), mask)
    assert np.abs(out.astype(jnp.float32) - exact).mean() < 0.003 * exact.std()


def test_cache_takes_segments_and_order_at_its_length():
    empty = jnp.zeros((1, 1, 4, 1, 2))
    slots = jnp.zeros((1, 4), jnp.int32)
    cache = Cache(empty, empty, slots, slots, jnp.zeros((1, 1), jnp.int32), jnp.int32(1))
    batch = causal_batch(np.zeros((1, 2), int), segments=np.array([[3, 4]]))
    np.testing.assert_array_equal(cache.extend(batch).segments, [[0, 3, 4, 0]])
    np.testing.assert_array_equal(cache.extend(batch).order, [[0, 0, 1, 0]])
    np.testing.assert_array_equal(cache.extend(batch).positions, [[1]])


def test_a_mask_is_dense_for_the_reference_and_with_a_cache():
    slots = jnp.zeros((1, 4), jnp.int32)
    cache = Cache(None, None, slots, slots, slots[:, :1], jnp.int32(1))
    batch = causal_batch(np.zeros((1, 2), int), segments=np.array([[3, 4]]))
    splash = Compute(kernel="splash")
    assert Mask.of(splash, batch, batch).dense is None
    np.testing.assert_array_equal(Mask.of(Compute(), batch, batch).dense, [np.eye(2)])
    kept = Mask.of(splash, batch, cache.extend(batch))
    assert kept.kernel == "reference"
    np.testing.assert_array_equal(kept.dense, [np.eye(2, 4, 1)])


def test_what_attention_may_compute_again_is_not_kept():
    query, key, value, _ = inputs(4, 2, 6, 6)
    batch = causal_batch(np.zeros((2, 6), int))

    def kept(remat):
        mask = Mask.of(Compute(remat=remat), batch, batch)
        arrays = (jnp.float32(x) for x in (query, key, value))
        saved = jax.vjp(lambda *a: attention(*a, mask), *arrays)[1]
        return [x for x in jax.tree.leaves(saved)
                if x.shape[-2:] == (6, 6) and x.dtype == jnp.float32]
    assert kept("none") and not kept("attention")
