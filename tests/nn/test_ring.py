"""Rows that are split over devices: equal to whole rows, and no device has the keys of a whole row.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.nn import ring
from glm_jax.nn.attention import Mask, attention
from glm_jax.nn.batch import Batch
from glm_jax.nn.compute import Compute
from glm_jax.parallel.mesh import make_mesh
from tests.packed import KINDS, assert_same, batches, loss_and_gradient, model_of

SPLASH = Compute(kernel="splash")  # would fail on a CPU, where the ring does not take its place


def inputs(length):
    """Two rows: a prefix, then causal; bidirectional, a second example, and padding."""
    draw = np.random.default_rng(0)
    query, key, value, along = (2 * draw.standard_normal((2, length, heads, 8)).astype(np.float32)
                                for heads in (4, 2, 2, 4))
    segments, order = np.ones((2, length), np.int32), np.tile(np.arange(length), (2, 1))
    segments[1, length // 3:], segments[1, -length // 4:] = 2, 0
    order[0, :length // 2], order[1, :length // 3] = 0, 0
    along *= (segments > 0)[..., None, None]
    return Batch(segments, order, segments, order), (query, key, value, along)


def run(sizes, compute, length=32):
    """The values and gradients of attention, of all that is not padding."""
    batch, arrays = inputs(length)

    def total(query, key, value, along):
        out = attention(query, key, value, Mask.of(compute, batch, batch))
        return jnp.vdot(out, along), out
    with jax.set_mesh(make_mesh(sizes)):
        (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arrays)
    return [np.asarray(x) for x in (out * (batch.segments > 0)[..., None, None], *grads)]


@pytest.mark.parametrize("sizes", [
    {"data": 2, "sequence": 2, "tensor": 2},
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in (
        {"sequence": 4}, {"sequence": 8}, {"fsdp": 2, "sequence": 4},
        {"sequence": 2, "tensor": 4})),
])
def test_equals_whole_rows(sizes, monkeypatch):
    monkeypatch.setattr(ring, "SCORES", 256)  # of half of the queries or fewer
    for one, wanted in zip(run(sizes, SPLASH), run({"data": 1}, Compute()), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_rows_that_the_axis_does_not_divide_stay_whole():
    for one, wanted in zip(run({"sequence": 4}, Compute(), 30), run({"data": 1}, Compute(), 30),
                           strict=True):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_no_device_has_the_keys_of_a_whole_row():
    """All that is as long as a row, in the compiled program, are the inputs' own numbers."""
    ways, length, memory = 8, 8 * 136, {}
    batch, _ = inputs(length)
    shapes = [jax.ShapeDtypeStruct((2, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]

    def total(query, key, value, segments, order):
        batch = Batch(segments, order, segments, order)
        return attention(query, key, value, Mask.of(Compute(), batch, batch)).sum()
    for sizes in ({"data": 1}, {"sequence": ways}):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            place = jax.sharding.NamedSharding(mesh, jax.P(None, "sequence"))
            where = [place] * 5
            compiled = jax.jit(jax.grad(total, (0, 1, 2)), in_shardings=where).lower(
                *shapes, batch.segments, batch.order).compile()
        memory[len(mesh.devices.flat)] = compiled.memory_analysis().temp_size_in_bytes
    assert not re.search(rf"\b{length}\b[^=]*\]", " ".join(
        re.findall(r"\[[\d,]+\]", compiled.as_text())))
    assert memory[ways] < memory[1] / 16, memory  # scores are a part by a part


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"sequence": 4}, {"fsdp": 2, "sequence": 2, "tensor": 2}])
def test_a_model_is_the_same(tiny, kind, sizes):
    batch, _ = batches(model_of(tiny, kind))
    wanted = loss_and_gradient(model_of(tiny, kind), batch)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        assert_same(loss_and_gradient(model_of(tiny, kind, mesh), batch), wanted)
