"""Products of rounded inputs: the same numbers as rounding by hand, and float32 where not asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from glm_jax.adapters.lora import LoRA, LoRAConfig
from glm_jax.nn.layers import Linear
from glm_jax.nn.loss import cross_entropy
from glm_jax.nn.matmul import matmul
from tests.nn.test_loss import inputs, plain


def half(x):
    return np.asarray(x.astype(jnp.bfloat16).astype(jnp.float32), np.float64)


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape)
            for key, shape in zip(keys, ((2, 5, 48), (48, 32), (2, 5, 32)), strict=True)]


@jax.jit
def value_and_pullback(x, kernel, dy):
    y, pullback = jax.vjp(matmul, x, kernel)
    return y, *pullback(dy)


def test_inputs_are_rounded_and_sums_are_not(arrays):
    with jax.default_matmul_precision("BF16_BF16_F32"):
        ours = value_and_pullback(*arrays)
    x, kernel, dy = map(half, arrays)
    wanted = x @ kernel, dy @ kernel.T, np.einsum("bli,blo->io", x, dy)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rows_without_a_length_have_a_derivative_too(arrays):
    x, kernel, dy = arrays[0][0], arrays[1], arrays[2][0]
    with jax.default_matmul_precision("BF16_BF16_F32"):
        _, dx, dkernel = value_and_pullback(x, kernel, dy)
    np.testing.assert_allclose(dx, half(dy) @ half(kernel).T, atol=2e-5)
    np.testing.assert_allclose(dkernel, np.asarray(x).T @ np.asarray(dy), rtol=2e-2, atol=5e-2)


def test_without_the_setting_nothing_is_rounded(arrays):
    x, kernel, dy = (np.asarray(a, np.float64) for a in arrays)
    wanted = x @ kernel, dy @ kernel.T, np.einsum("bli,blo->io", x, dy)
    for a, b in zip(value_and_pullback(*arrays), wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_layers_and_the_loss_follow_the_setting(arrays):
    layer = Linear(48, 32, ("embed", "mlp"), rngs=nnx.Rngs(0))
    with jax.default_matmul_precision("BF16_BF16_F32"):
        np.testing.assert_allclose(layer(arrays[0]), half(arrays[0]) @ half(layer.kernel[...]),
                                   atol=1e-5)
        hidden, kernel, *rest = inputs()
        (value, grads) = jax.value_and_grad(cross_entropy, (0, 1))(hidden, kernel, *rest)
    np.testing.assert_allclose(value, plain(jnp.float32(half(hidden)), jnp.float32(half(kernel)),
                                            *rest), rtol=1e-5)
    exact = jax.grad(plain, (0, 1))(hidden, kernel, *rest)
    for a, b in zip(grads, exact, strict=True):
        off = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert 1e-5 < off < 2e-2  # rounded, and not by more than bfloat16 explains


def test_a_small_change_by_an_adapter_is_not_rounded_away():
    """1 + 1e-3 is 1 in bfloat16: the kernel is rounded, but not its sum with the change."""
    config = LoRAConfig(r=2, lora_alpha=2)
    adapter = LoRA(jnp.full((64, 2), 5e-4), jnp.ones((2, 32)), ("embed", "mlp"), config)
    with jax.default_matmul_precision("BF16_BF16_F32"):
        y = adapter(jnp.ones((8, 16, 64)), jnp.full((64, 32), 1 + 2**-10))
    np.testing.assert_allclose(y, 64 * (1 + 1e-3), rtol=1e-5)
