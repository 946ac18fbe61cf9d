"""The shared layers against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from glm_jax.nn.compute import Compute
from glm_jax.nn.layers import Embedding, Linear, RMSNorm, rms_norm, scan, stack, swiglu
from glm_jax.parallel.mesh import constrain, make_mesh, sharding
from tests.nn.test_loss import collectives


def plain_swiglu(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


def test_swiglu_and_its_gradient_equal_the_formula():
    gate, up, weight = 3 * jax.random.normal(jax.random.key(0), (3, 2, 5, 6))
    np.testing.assert_allclose(swiglu(gate, up), plain_swiglu(gate, up), rtol=1e-5, atol=1e-6)
    ours, theirs = (jax.grad(lambda *x, f=f: (f(*x) * weight).sum(), (0, 1))(gate, up)
                    for f in (swiglu, plain_swiglu))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    check_grads(swiglu, (gate / 3, up / 3), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_swiglu_keeps_the_dtype(dtype):
    one = jnp.ones((3, 4), dtype)
    assert swiglu(one, one).dtype == jax.grad(lambda x: swiglu(x, one).sum())(one).dtype == dtype


def test_rms_norm():
    x = 5 * jax.random.normal(jax.random.key(0), (3, 16))
    norm = RMSNorm(16, eps=1e-3)
    norm.scale.set_value(jnp.arange(16.0))
    wide = np.asarray(x, np.float64)
    wanted = np.arange(16) * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(norm(x), wanted, rtol=1e-5, atol=1e-5)
    check_grads(norm, (x,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_rms_norm_rounds_once():
    """What bfloat16 goes in is widened, and only the normalised x is rounded."""
    x = jax.random.normal(jax.random.key(0), (2, 64)).astype(jnp.bfloat16)
    norm = RMSNorm(64, 1e-6)
    np.testing.assert_array_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_linear_and_embedding():
    rngs = nnx.Rngs(0)
    linear, x = Linear(3, 4, ("embed", "mlp"), bias=True, rngs=rngs), jnp.arange(6.0).reshape(2, 3)
    linear.bias.set_value(jnp.arange(4.0))
    wanted = np.asarray(x) @ np.asarray(linear.kernel[...]) + np.arange(4)
    np.testing.assert_allclose(linear(x), wanted, rtol=1e-5, atol=1e-6)
    assert not hasattr(Linear(3, 4, ("embed", "mlp"), rngs=rngs), "bias")
    table = Embedding(7, 4, rngs=rngs)
    out = table(jnp.array([[6, 0]]), jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0], table.embedding[...][jnp.array([6, 0])]
                                  .astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [96, 97])  # 97: no axis divides it
def test_rows_of_a_table_move_and_the_table_does_not(size):
    mesh, batch, length, features = make_mesh({"fsdp": 4, "tensor": 2}), 8, 6, 32
    graphdef, state = nnx.split(Embedding(size, features, rngs=nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, size)
    weight = jax.random.normal(jax.random.key(2), (batch, length, features))

    def loss(state, tokens, weight):
        rows = nnx.merge(graphdef, state)(tokens, jnp.float32)
        return jnp.sum(weight * jnp.sin(constrain(rows, "batch", "length", None)))

    where = sharding(("vocab", "embed"), (size, features), mesh)
    wanted = jax.grad(loss)(state, tokens, weight)
    with jax.set_mesh(mesh):
        args = (jax.device_put(state, where), *(
            jax.device_put(x, sharding(("batch", "length"), x.shape[:2], mesh))
            for x in (tokens, weight)))
        compiled = jax.jit(jax.grad(loss), out_shardings=where).lower(*args).compile()
    for a, b in zip(jax.tree.leaves(compiled(*args)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    found = [(kind, count) for kind, count, _ in collectives(compiled.as_text())]
    assert max(count for _, count in found) <= batch * length * features // 4
    assert {kind for kind, count in found if count > batch * length} >= {"all-to-all"}


def test_an_adapter_sees_input_kernel_and_key():
    linear = Linear(3, 4, ("embed", "mlp"), bias=True, rngs=nnx.Rngs(0))
    linear.bias[...] = jnp.arange(4.0)
    plain, key = linear(jnp.ones((2, 3))), jax.random.key(3)
    linear.adapter = lambda x, kernel, key, low: x @ kernel + x.sum() + jax.random.uniform(key)
    np.testing.assert_allclose(linear(jnp.ones((2, 3)), key), plain + 6 + jax.random.uniform(key),
                               rtol=1e-6)


@pytest.mark.parametrize(("unroll", "remat", "platform", "loops"), [
    (0, "none", "gpu", True), (2, "none", "cpu", True), (3, "none", "cpu", False),
    (3, "dots", "cpu", True), (3, "dots", "gpu", False), (3, "offload", "gpu", True)])
def test_scan_runs_every_layer_in_order_with_its_own_inputs(monkeypatch, unroll, remat, platform,
                                                            loops):
    monkeypatch.setattr("glm_jax.nn.layers.platform", lambda: platform)
    layers = stack(lambda rngs: Linear(4, 4, ("embed", "mlp"), std=1.0, rngs=rngs), 3, nnx.Rngs(0))
    kernels = layers.kernel[...]
    assert kernels.shape == (3, 4, 4)
    assert not np.allclose(kernels[0], kernels[1])
    x, extra = jnp.arange(8.0).reshape(2, 4), jnp.array([1.0, 10.0, 100.0])

    def call(layer, x, add):
        return layer(x) + add, x.sum()

    def run(x):
        return scan(layers, call, x, extra, compute=Compute(remat=remat, unroll=unroll))

    assert ("while" in jax.jit(run).lower(x).as_text()) == loops
    last, sums = run(x)
    wanted, befores = x, []
    for i in range(3):
        befores.append(wanted.sum())
        wanted = wanted @ kernels[i] + extra[i]
    np.testing.assert_allclose(last, wanted, rtol=1e-4)
    np.testing.assert_allclose(sums, np.stack(befores), rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_derivative_of_rms_norm_is_that_of_its_formula(dtype):
    draw = np.random.default_rng(0)
    x, dy = (jnp.asarray(5 * draw.standard_normal((2, 3, 16)), dtype) for _ in range(2))
    scale = jnp.asarray(draw.standard_normal(16), dtype)

    def formula(x, scale):
        x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale

    wanted = jax.vjp(formula, x, scale)[1](dy.astype(jnp.float32))
    found = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-5), x, scale)[1](dy)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32),
                                   rtol=0.01 if dtype == jnp.bfloat16 else 1e-5, atol=1e-5)
