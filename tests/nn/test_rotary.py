"""Rotary against multiplication by complex numbers of modulus one."""

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.nn.rotary import rotary_table, rotate_interleaved


def rotated(x, positions, dim, theta=10000.0):
    table = rotary_table(jnp.asarray(positions), dim, theta)
    return np.asarray(rotate_interleaved(jnp.asarray(x, jnp.float32), *table))


@pytest.mark.parametrize(("dim", "theta"), [(4, 10000.0), (8, 10000.0), (8, 5e6)])
def test_equals_complex_multiplication(dim, theta):
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 5, 3, 8)), rng.integers(0, 1000, (2, 5))
    pairs = x[..., :dim:2] + 1j * x[..., 1:dim:2]
    speeds = theta ** (-2 * np.arange(dim // 2) / dim)
    pairs *= np.exp(1j * positions[..., None, None] * speeds)
    ours = rotated(x, positions, dim, theta)
    np.testing.assert_allclose(ours[..., :dim:2], pairs.real, atol=2e-4)
    np.testing.assert_allclose(ours[..., 1:dim:2], pairs.imag, atol=2e-4)
    np.testing.assert_array_equal(ours[..., dim:], x[..., dim:].astype(np.float32))


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 1, 1, 1, 8))

    def score(i, j):
        return (rotated(query, [[i]], 8) * rotated(key, [[j]], 8)).sum()
    np.testing.assert_allclose(score(3, 1), score(103, 101), rtol=1e-4)
    assert abs(score(3, 1) - score(1, 3)) > 1e-2


@pytest.mark.parametrize("more", [{}, {"beta_fast": 4, "beta_slow": 2}, {"truncate": False},
                                  {"attention_factor": 1.25}])
@pytest.mark.parametrize(("dim", "context"), [(16, 64), (64, 32768), (8, 8)])
def test_yarn_is_that_of_transformers(dim, context, more):
    from transformers import Glm4Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from glm_jax.nn.rotary import yarn
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": context,
               **more}
    config = Glm4Config(head_dim=dim, max_position_embeddings=4 * context, rope_parameters={
        **scaling, "rope_theta": 10000.0, "partial_rotary_factor": 1.0})
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    shares, ours = yarn(dim, 10000.0, scaling)
    plain = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    np.testing.assert_allclose(shares * plain, theirs.numpy(), rtol=1e-5)
    assert ours == pytest.approx(factor)
