"""cuDNN and splash against the reference, and which of them is taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.data import blanks
from glm_jax.errors import UserError
from glm_jax.models import as_batch
from glm_jax.nn.attention import Mask, reference
from glm_jax.nn.batch import Batch, reach, visible
from glm_jax.nn.compute import Compute
from glm_jax.nn.kernels import choose, cudnn, cudnn_packed, over_mesh, packs, splash
from glm_jax.parallel.mesh import make_mesh, sharding
from tests.packed import KINDS, MASK, SOP, batches, model_of

each = pytest.mark.parametrize("kind", KINDS)


def dense(batch):
    return np.asarray(visible(*(batch.segments, batch.order) * 2))


def assert_reaches(batch):
    first, last = (np.asarray(x)[:, :, None] for x in reach(*map(jnp.asarray, (
        batch.segments, batch.order))))
    keys = np.arange(batch.segments.shape[1])
    real = np.asarray(batch.segments)[:, :, None] > 0
    np.testing.assert_array_equal((first <= keys) & (keys <= last) & real, dense(batch) & real)


@each
def test_a_query_sees_all_keys_that_it_reaches_and_no_others(tiny, kind):
    model = model_of(tiny, kind)
    for batch in batches(model):
        assert_reaches(batch)
    tokens = np.array([[0, 0, 5, MASK, 7, SOP, 8, 9], [3, 4, MASK, 6, SOP, 7, 0, 0]])
    assert_reaches(as_batch(model.config, tokens, tokens > 0))  # padding on either side


def test_blanks_that_follow_each_other_are_reached_too():
    special = blanks.Special(cls=65, eos=66, mask=MASK, gmask=61, smask=63, sop=SOP, eop=64,
                             block=59)
    piece = blanks.assemble(np.arange(1, 30), [(3, 7), (20, 24), (10, 12)], MASK, special)
    ones = np.ones((1, len(piece.tokens)), np.int32)
    assert_reaches(Batch(piece.tokens[None], piece.positions[None], ones, piece.order[None]))


def rows():
    """Packed rows, causal, with a prefix and bidirectional, and padding; segments and order."""
    segments = np.repeat([[1, 2, 0, 0], [1, 2, 3, 0]], [100, 90, 5, 5], axis=1).astype(np.int32)
    order = np.tile(np.arange(200, dtype=np.int32), (2, 1))
    order[0, 100:160], order[1, :100] = 100, 0
    return segments, order


def assert_equal_reference(kernel, dtype=jnp.float32, tolerance=1e-5, causal=False):
    """Values and gradients, of all that is not padding."""
    draw = np.random.default_rng(0)
    segments, order = rows()
    order = np.broadcast_to(np.arange(200), order.shape) if causal else order
    query, key, value, along = (
        jnp.asarray(2 * draw.standard_normal((2, 200, heads, 64)), dtype) for heads in (4, 2, 2, 4))
    along *= (segments > 0)[..., None, None]
    mask = visible(segments, order, segments, order)

    def run(attend):
        def total(*args):
            out = attend(*args)
            return jnp.vdot(out.astype(jnp.float32), along.astype(jnp.float32)), out
        (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(
            query, key, value)
        assert all(np.isfinite(x).all() for x in (out, *grads))
        return out * (segments > 0)[..., None, None], *grads
    found = run(lambda *args: kernel(*args, segments, order))
    for one, wanted in zip(found, run(lambda *args: reference(*args, mask)), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one, wanted)), rtol=0,
                                   atol=tolerance * np.abs(wanted).max().astype(np.float32))


def test_splash_equals_the_reference():
    assert_equal_reference(functools.partial(splash, block=128, interpret=True))


def by_cudnn(query, key, value, segments, order, implementation):
    batch = Batch(segments, order, segments, order)
    mask = Mask.of(Compute(kernel="cudnn"), batch, batch)
    return cudnn(query, key, value, mask.dense, implementation)


def test_what_cudnn_is_asked_for_equals_the_reference():
    """By XLA's implementation of the same call."""
    assert_equal_reference(functools.partial(by_cudnn, implementation="xla"))


@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="there is no GPU")
def test_cudnn_equals_the_reference():
    assert_equal_reference(functools.partial(by_cudnn, implementation="cudnn"), jnp.bfloat16, 0.02)
    if packs():
        def packed(query, key, value, segments, order):
            return cudnn_packed(query, key, value, segments, count=4)
        assert_equal_reference(packed, jnp.bfloat16, 0.02, causal=True)


def apart(query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """What JAX documents of cuDNN's packed texts, text by text; NaN where there is none."""
    assert mask_type.name == "PADDING_CAUSAL" and q_offsets.shape[1] == q_seqlen.shape[1] + 1
    assert scale == query.shape[-1]**-0.5 and query.shape == key.shape == value.shape
    out = np.full(query.shape, np.nan, np.float32)
    for row, (sizes, starts) in enumerate(zip(q_seqlen, q_offsets, strict=True)):
        assert (sizes >= 0).sum() == (starts >= 0).sum() > 0
        for start, size in zip(starts, sizes, strict=False):
            if size >= 0:
                here = (slice(row, row + 1), slice(start, start + size))
                causal = np.tril(np.ones((1, size, size), bool))
                out[here] = reference(query[here], key[here], value[here], causal)
    return jnp.asarray(out)


def test_packed_texts_are_told_to_cudnn_one_by_one(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", apart)
    draw = np.random.default_rng(0)
    query, key, value = (jnp.asarray(4 * draw.standard_normal((3, 24, heads, 8)), jnp.float32)
                         for heads in (4, 2, 2))
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 1, 1], [0, 1, 2, 2]], [1, 11, 8, 4], axis=1)
    order = np.tile(np.arange(24), (3, 1))
    found = cudnn_packed(query, key, value, segments, count=4)
    wanted = reference(query, key, value, visible(segments + 1, order, segments + 1, order))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_batches_know_whether_they_are_causal(tiny):
    causal = {kind: as_batch(model_of(tiny, kind).config, np.ones((1, 4), np.int32)).causal
              for kind in KINDS}
    assert causal.pop("glm") == 1 and not any(causal.values()), causal


def test_cudnn_is_what_a_gpu_gets(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    arrays = [jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    mask = jax.ShapeDtypeStruct((2, 128, 128), bool)

    def total(*args):
        return over_mesh(cudnn, *args).astype(jnp.float32).sum()
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays, mask)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("fmhaScaleBiasSoftmax(", "fmhaScaleBiasSoftmaxBackward("):
        assert text.count(f"custom_call @__cudnn${name}") == 1
    assert "tensor<1x128x1x64xbf16>" in text  # a row and a head for each device


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "tensor": 4}])
def test_every_device_has_the_keys_of_its_queries(sizes):
    draw = np.random.default_rng(0)
    query, key, value = (draw.standard_normal((2, 6, heads, 8)) for heads in (8, 2, 2))
    mask = np.tril(np.ones((2, 6, 6), bool))
    with jax.set_mesh(make_mesh(sizes)):
        found = jax.jit(functools.partial(over_mesh, reference))(query, key, value, mask)
    np.testing.assert_allclose(found, reference(query, key, value, mask), atol=1e-5)


@pytest.mark.parametrize(("asked", "platform", "dtype", "dim", "length", "chosen"), [
    ("auto", "cpu", jnp.float32, 64, 256, "reference"),
    ("auto", "tpu", jnp.float32, 64, 250, "splash"),
    ("auto", "gpu", jnp.bfloat16, 64, 256, "cudnn"),
    ("auto", "gpu", jnp.float32, 64, 256, "reference"),
    ("auto", "gpu", jnp.bfloat16, 20, 256, "reference"),
    ("auto", "gpu", jnp.bfloat16, 64, 255, "reference"),
    ("reference", "tpu", jnp.bfloat16, 64, 256, "reference"),
    ("cudnn", "gpu", jnp.float32, 64, 256, "model.attention='cudnn': it computes in bfloat16"),
    ("cudnn", "gpu", jnp.bfloat16, 256, 256, "at most 128, and have 256; use 'auto'"),
    ("cudnn", "tpu", jnp.bfloat16, 64, 256, "it is for a GPU, and the mesh is one of TPUs"),
    ("sdpa", "tpu", jnp.bfloat16, 64, 256, "choose one of auto, reference, cudnn, splash"),
])
def test_which_kernel(asked, platform, dtype, dim, length, chosen):
    if " " not in chosen:
        assert choose(asked, platform, dtype, dim, length) == chosen
        return
    with pytest.raises(UserError, match=chosen):
        choose(asked, platform, dtype, dim, length)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm", "chatglm6b"])
def test_a_model_compiles_for_tpus_with_splash(tiny, kind):
    devices = topologies.get_topology_desc("v5e:2x4", "tpu").devices
    mesh = make_mesh({"fsdp": 2, "tensor": 4}, devices)
    sizes = {"head_dim": 64} if kind == "glm" else {"hidden_size": 256}
    graphdef, state = nnx.split(model_of(tiny, kind, **sizes))
    length = 1096  # nine blocks of 128, and in no other size

    def array(shape, *axes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(axes, shape, mesh))
    state = jax.tree.map(
        lambda p: p.replace(array(p.get_value().shape, *p.get_metadata("axes"),
                                  dtype=jnp.bfloat16)),
        state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    places = jax.ShapeDtypeStruct((4, 2, length), jnp.int32,
                                  sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    batch = Batch(*(array((4, length), "batch", None) for _ in range(2)),
                  *(array((4, length), "batch", None) for _ in range(2)))
    batch = Batch(batch.tokens, places, batch.segments, batch.order)

    def loss(state, batch):
        model = nnx.merge(graphdef, state)
        model.compute = Compute(kernel="splash")
        return jnp.sum(jnp.square(model(batch)[0].astype(jnp.float32)))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(state, batch).compile().as_text()
    for phase in ("fwd_segmented_residuals", "dq_segmented_no_residuals",
                  "dkv_segmented_no_residuals"):
        assert f"splash_mha_{phase}" in text
    assert f"{length},{length}" not in text and "1152,1152" not in text
