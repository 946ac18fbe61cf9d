"""Moments in fewer bytes: the 8-bit numbers beside the paper's, rounding at random, layer by layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.train.moments import Blocks, compact, decode, each_layer, encode, round_at_random


def dynamic_map(signed):
    """The 256 numbers of Dettmers et al. 2021, as bitsandbytes' `create_dynamic_map` lists them."""
    numbers = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**(i + (not signed)) + 1)
        middles = 10.0**(i - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += [*middles, *-middles] if signed else list(middles)
    assert len(numbers) == 256
    return np.sort(numbers)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_its_number(signed):
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16)
    got = decode(Blocks(codes, jnp.full((1, 1), 3.0)), signed)
    np.testing.assert_allclose(got.ravel(), 3 * dynamic_map(signed), rtol=1e-6)
    again = encode(got, signed)  # each number is the nearest to itself
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.scale, [[3.0]])


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_as_in_the_paper(signed):
    """Each tile over its largest magnitude, then to the nearest of the 256 numbers."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(48, 80)) * 10.0**draw.uniform(-9, 3, (48, 80))  # every decade, and below
    x[:16, :16] = 0  # a block without a scale
    x[20:30, 20:30] = 0
    x = (x if signed else np.abs(x)).astype(np.float32)
    got = jax.jit(encode, static_argnums=1)(x, signed)
    numbers = dynamic_map(signed)
    for row in range(3):
        for column in range(5):
            tile = (slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
            block, scale = x[tile].astype(np.float64), np.abs(x[tile]).max()
            assert got.scale[row, column] == scale
            y = block / (scale or 1)
            nearest = np.abs(y[..., None] - numbers).argmin(-1)
            if not signed:  # a positive number stays one
                nearest = np.where(y > 0, np.maximum(nearest, 1), nearest)
            codes = np.asarray(got.codes[tile]).astype(int)
            # Half way between two numbers float32 may take either.
            tie = np.abs(y - numbers[codes]) - np.abs(y - numbers[nearest]) < 1e-6 * np.abs(y)
            assert ((codes == nearest) | (tie & (np.abs(codes - nearest) == 1))).all()
            assert (codes == nearest).mean() > 0.99
            np.testing.assert_allclose(decode(got, signed)[tile], scale * numbers[codes], rtol=2e-6)


def test_a_matrix_that_16_does_not_divide():
    x = np.random.default_rng(0).normal(size=(67, 24)).astype(np.float32)
    blocks = encode(x, True)
    assert blocks.scale.shape == (67, 3)
    np.testing.assert_array_equal(blocks.scale, np.abs(x).reshape(67, 3, 8).max(-1))
    np.testing.assert_allclose(decode(blocks, True), x, atol=0.02 * np.abs(x).max())


def test_rounding_at_random_is_exact_on_average_and_between_neighbours():
    x = jnp.float32([1.001, -3.3e-9, 0.0, 2.0, 1e30])
    draws = np.float64([round_at_random(x, jax.random.key(i)).astype(jnp.float32)
                        for i in range(4000)])
    np.testing.assert_allclose(draws.mean(0), x, rtol=3e-4)
    assert all(len(set(column)) == (1 if i in (2, 3) else 2) for i, column in enumerate(draws.T))
    assert (np.abs(draws - x) <= 2.0**-7 * np.abs(x)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_slow_mean_does_not_stand_still(dtype):
    """With b2=0.999 bfloat16 to the nearest would stay where the first steps left it."""
    adam = compact(optax.scale_by_adam(b2=0.999), dtype, "a")
    exact = optax.scale_by_adam(b2=0.999)
    large = jax.random.normal(jax.random.key(0), (64, 64)) + 3

    @jax.jit
    def run(state, other):
        def step(carry, size):
            _, one = adam.update(size * large, carry[0])
            _, two = exact.update(size * large, carry[1])
            return (one, two), None
        sizes = jnp.where(jnp.arange(1200) < 200, 1.0, 0.1)
        return jax.lax.scan(step, (state, other), sizes)[0]
    state, wanted = run(adam.init(large), exact.init(large))
    nu = decode(state.nu, False) if dtype == "int8" else state.nu
    ratio = np.float32(nu) / wanted.nu
    assert ratio.mean() == pytest.approx(1, abs=0.02 if dtype == "bfloat16" else 0.1)


def test_each_layer_is_by_itself():
    def of(path):
        return optax.clip_by_block_rms(0.5 if path == "a" else 2.0)
    draw = np.random.default_rng(0)
    grads = {"a": draw.normal(size=(3, 8, 4)), "b": 9 * draw.normal(size=(2, 5, 3, 4)),
             "c": 9 * draw.normal(size=(4, 4))}
    optimizer = each_layer(of, lambda path: 2)
    got, _ = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    for path, value in grads.items():
        for index in np.ndindex(value.shape[:-2]):
            rms = np.sqrt(np.mean(value[index]**2))
            wanted = value[index] / max(1, rms / (0.5 if path == "a" else 2.0))
            np.testing.assert_allclose(got[path][index], wanted, rtol=1e-5)


@pytest.mark.parametrize("of", [
    lambda path: compact(optax.scale_by_adam(), "bfloat16", path),
    lambda path: optax.chain(optax.identity(), compact(optax.ema(0.9), "bfloat16", path))])
def test_every_matrix_is_rounded_by_a_chance_of_its_own(of):
    """Equal gradients of two parameters, of layers and of their experts: no two round alike."""
    matrix = jax.random.normal(jax.random.key(0), (64, 64))
    grads = {path: jnp.broadcast_to(matrix, shape + matrix.shape)
             for path, shape in {"a": (), "b": (), "stack": (2,), "experts": (2, 2)}.items()}
    optimizer = each_layer(of, lambda path: 2)
    update = jax.jit(optimizer.update)
    state = update(grads, optimizer.init(grads), grads)[1]
    moments = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    every = np.concatenate([np.float32(x).reshape(-1, 64 * 64) for x in moments])
    kinds = every.shape[0] // 8  # one moment or two of each of eight matrices
    shares = [(one == other).mean() for kind in range(kinds)
              for same in [[x for x in every if (x.min() < 0) == (kind == 0)]]
              for i, one in enumerate(same) for other in same[:i]]
    assert len(shares) == kinds * 8 * 7 / 2
    assert min(shares) > 0.5 and max(shares) < 0.8  # alike by chance: 2/3 where evenly spread
    again = update(grads, optimizer.init(grads), grads)[1]
    jax.tree.map(np.testing.assert_array_equal, state, again)
