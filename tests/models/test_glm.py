"""What must hold for any GLM whatever its parameters; tests/test_golden.py has the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax.infer.cache import empty_cache
from glm_jax.nn.batch import causal_batch
from glm_jax.parallel.mesh import make_mesh, use_mesh_of

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 67, (2, 9))


@jax.jit
def hidden(model, batch):
    return model(batch)[0]


@jax.jit
def advance(model, batch, cache):
    return model(batch, cache)


def same(a, b, tolerance=2e-4):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_no_token_sees_a_later_one(tiny):
    model, changed = tiny(), TOKENS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 67
    before, after = (hidden(model, causal_batch(t)) for t in (TOKENS, changed))
    same(before[:, :5], after[:, :5], 1e-6)
    assert np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1).min() > 1e-3


def test_padding_on_either_side_changes_nothing(tiny):
    model = tiny()
    plain = hidden(model, causal_batch(TOKENS))
    left = np.pad(TOKENS, ((0, 0), (3, 0)), constant_values=5)
    right = np.pad(TOKENS, ((0, 0), (0, 3)), constant_values=5)
    mask = np.ones((2, 12), int)
    mask[:, :3] = 0
    same(hidden(model, causal_batch(left, mask))[:, 3:], plain)
    same(hidden(model, causal_batch(right, mask[:, ::-1]))[:, :9], plain)


def test_texts_in_one_row_do_not_see_each_other(tiny):
    model = tiny()
    row, segments = TOKENS.reshape(1, -1), np.repeat([[1, 2]], 9, axis=1)
    positions = np.tile(np.arange(9), 2)[None]
    packed = hidden(model, causal_batch(row, positions=positions, segments=segments))
    same(packed.reshape(2, 9, -1), hidden(model, causal_batch(TOKENS)))


def test_a_prefix_sees_itself_both_ways(tiny):
    model, changed = tiny(), TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 67
    order = np.maximum(np.arange(9) - 3, 0)[None].repeat(2, axis=0)  # tokens 0 to 3 are the prefix
    before, after = (hidden(model, dataclasses.replace(causal_batch(t), order=order))
                     for t in (TOKENS, changed))
    assert np.abs(before[:, 0] - after[:, 0]).max() > 1e-3


@pytest.mark.parametrize("pieces", [(4, 5), (1,) * 9])
def test_a_cache_in_pieces_equals_the_whole(tiny, pieces):
    model = tiny()
    mask = np.ones((2, 9), int)
    mask[1, :2] = 0
    whole = causal_batch(TOKENS, mask)
    cache, start, parts = empty_cache(model.config, 2, 12, jnp.float32), 0, []
    for size in pieces:
        part = jax.tree.map(lambda a, i=start, n=size: a[..., i:i + n], whole)
        out, cache = advance(model, part, cache)
        parts.append(out)
        start += size
    real = mask.astype(bool)
    same(jnp.concatenate(parts, axis=1)[real], hidden(model, whole)[real])
    assert cache.length == 9
    np.testing.assert_array_equal(cache.segments[:, 9:], 0)


def test_untied_and_tied_heads(tiny):
    model = tiny()
    features = jnp.ones((1, 32))
    same(model.logits(features), features @ model.lm_head.kernel[...])
    tied = tiny(tie_word_embeddings=True)
    assert not hasattr(tied, "lm_head")
    same(tied.logits(features), features @ tied.embed_tokens.embedding[...].T)


def test_classify_pools_where_it_is_told(tiny):
    model = tiny("sequence")
    batch = dataclasses.replace(causal_batch(TOKENS), pool_index=np.array([[8, 2], [0, 4]]))
    logits = model.classify(batch)
    every = model.logits(hidden(model, batch))
    assert logits.shape == (2, 2, 3)
    same(logits, np.take_along_axis(np.asarray(every), batch.pool_index[..., None], axis=1))
    assert not hasattr(model.score, "bias")
    assert hasattr(tiny("token").score, "bias")


def test_bfloat16_is_near_float32(tiny):
    model = tiny(initializer_range=0.1)
    graphdef, state = nnx.split(model)
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    half.dtype = jnp.bfloat16
    batch = causal_batch(TOKENS)
    exact, rough = hidden(model, batch), hidden(half, batch)
    assert rough.dtype == jnp.bfloat16
    assert half.logits(rough).dtype == jnp.float32
    assert 0 < np.abs(exact - rough.astype(jnp.float32)).mean() < 0.02 * np.std(exact)


def test_loss_and_gradients_on_a_mesh_equal_one_device(tiny):
    batch = causal_batch(np.tile(TOKENS, (4, 1)))

    def run(model):
        graphdef, state = nnx.split(model)

        @jax.jit
        @jax.value_and_grad
        def loss(state):
            model = nnx.merge(graphdef, state)
            return jnp.square(model.logits(model(batch)[0])).mean()
        with use_mesh_of(state):
            return loss(state)

    # 67 tokens and 2 key heads: not everything is divided by the mesh
    alone, spread = run(tiny()), run(tiny(mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2})))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())
