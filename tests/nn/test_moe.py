"""The router by its definition; grouped products against every expert computed for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.nn import moe

RNG = np.random.default_rng(0)
TOKENS, HIDDEN, INNER, EXPERTS, K = 23, 6, 5, 7, 3


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X, UP, DOWN = draw(TOKENS, HIDDEN), draw(EXPERTS, HIDDEN, INNER), draw(EXPERTS, INNER, HIDDEN)
# Expert 2 has no token, expert 4 is chosen by all.
CHOSEN = jnp.asarray([[4, *RNG.choice([0, 1, 3, 5, 6], K - 1, replace=False)]
                      for _ in range(TOKENS)])
WEIGHTS = jnp.abs(draw(TOKENS, K))


def sparse(x, weights, up, down, first=0, count=EXPERTS):
    return moe.dispatch(x, weights, CHOSEN - first, count,
                        lambda rows, product, _: product(jnp.tanh(product(rows, up)), down),
                        jnp.arange(TOKENS))


def dense(x, weights, up, down, first=0, count=EXPERTS):
    every = jnp.einsum("eti,eih->eth", jnp.tanh(jnp.einsum("th,ehi->eti", x, up)), down)
    share = jnp.einsum("tke,tk->te", jax.nn.one_hot(CHOSEN - first, count), weights)
    return jnp.einsum("eth,te->th", every, share)


@pytest.fixture(params=["blocks", "ragged_dot"])
def path(request, monkeypatch):
    """What a CPU does, and what a TPU or GPU does, computed here."""
    if request.param == "ragged_dot":
        monkeypatch.setattr(jax.lax, "platform_dependent",
                            lambda *args, cpu, default: default(*args))
    jax.clear_caches()
    return request.param


def test_the_sum_over_chosen_experts_and_its_gradients(path):
    def loss(function):
        return jax.jit(jax.value_and_grad(
            lambda *args: (function(*args) * jnp.arange(HIDDEN)).sum(), argnums=(0, 1, 2, 3)))
    args = (X, WEIGHTS, UP, DOWN)
    np.testing.assert_allclose(jax.jit(sparse)(*args), dense(*args), rtol=1e-5, atol=1e-5)
    ours, theirs = loss(sparse)(*args), loss(dense)(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert not np.asarray(ours[1][2][2]).any()  # no token, no gradient


def test_some_of_the_experts_add_only_their_own(path):
    part = (X, WEIGHTS, UP[2:5], DOWN[2:5], 2, 3)
    ours = jax.jit(sparse, static_argnums=(4, 5))(*part)
    np.testing.assert_allclose(ours, dense(*part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 8, 128), (4, 2, 2), (512, 4, 8)])
def test_blocks_that_are_not_in_use_are_not_computed(tokens, k, experts, monkeypatch):
    """Padding is a quarter of the choices at most; a step of decoding reads only its experts."""
    block, blocks = moe._blocks(tokens * k, experts)
    assert block * experts <= max(experts, tokens * k / 4)
    counts = np.bincount(RNG.integers(0, experts, tokens * k), minlength=experts)
    assert np.ceil(counts / block).sum() <= blocks
    assert blocks <= 2 * tokens * k


def test_a_frozen_kernel_has_no_gradient_computed():
    text = jax.jit(jax.grad(lambda x: sparse(x, WEIGHTS, UP, DOWN).sum())).lower(X).as_text()
    both = jax.jit(jax.grad(lambda x, up: sparse(x, WEIGHTS, up, DOWN).sum(),
                            argnums=(0, 1))).lower(X, UP).as_text()
    assert text.count("stablehlo.while") < both.count("stablehlo.while")


def test_the_bias_chooses_and_does_not_weigh():
    logits = draw(9, 8)
    bias = jnp.zeros(8).at[3].set(10.0)
    weights, experts = moe.route(logits, bias, top_k=2, scale=2.5)
    assert (experts == 3).any(axis=1).all()
    scores = np.take_along_axis(np.asarray(jax.nn.sigmoid(logits)), np.asarray(experts), 1)
    np.testing.assert_allclose(weights, 2.5 * scores / scores.sum(1, keepdims=True), rtol=1e-5)
    raw, _ = moe.route(logits, bias, top_k=2, normalised=False)
    np.testing.assert_allclose(raw, scores, rtol=1e-6)


def test_only_the_best_groups_are_chosen_from():
    logits = jnp.log(jnp.asarray([[.9, .1, .6, .5, .7, .3]]))
    logits = logits - jnp.log1p(-jnp.exp(logits))  # whose sigmoids these are
    for top, wanted in ((1, {2, 3}), (2, {2, 4}), (3, {0, 4})):  # sums: 1.0, 1.1, 1.0
        bias = jnp.zeros(6).at[4].add(0.01 * (top > 1))  # no ties
        _, experts = moe.route(logits, bias, top_k=2, groups=3, top_groups=top)
        assert set(np.asarray(experts)[0].tolist()) == wanted, top


@pytest.mark.parametrize(("platform", "ragged"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_the_platform_that_it_is_compiled_for_chooses(platform, ragged):
    """Not the one that compiles: a TPU's program can be made on a CPU."""
    jax.clear_caches()
    gradient = jax.jit(jax.grad(lambda x, up: sparse(x, WEIGHTS, up, DOWN).sum(), argnums=(0, 1)))
    text = gradient.trace(X, UP).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == ragged
    assert (text.count("stablehlo.while") == 0) == ragged
