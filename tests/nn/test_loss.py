"""The losses against log_softmax, whole and in chunks, and their gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.nn import loss
from glm_jax.nn.loss import classification_loss, cross_entropy
from glm_jax.parallel.mesh import make_mesh, sharding


def plain(hidden, kernel, targets, weights):
    logp = jax.nn.log_softmax(hidden.astype(jnp.float32) @ kernel.astype(jnp.float32))
    return -(weights * jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]).sum()


def inputs(batch=3, length=7, features=8, vocabulary=37):
    keys = jax.random.split(jax.random.key(0), 4)
    weights = jax.random.uniform(keys[3], (batch, length)) * (jnp.arange(length) != 2)
    return (jax.random.normal(keys[0], (batch, length, features)),
            jax.random.normal(keys[1], (features, vocabulary)),
            jax.random.randint(keys[2], (batch, length), 0, vocabulary), weights)


@pytest.mark.parametrize("chunk", [1, 6, 9, 1000])
def test_cross_entropy_in_chunks_of_any_size(chunk):
    args = inputs()
    wanted = jax.value_and_grad(plain, (0, 1))(*args)
    ours = jax.value_and_grad(lambda *a: cross_entropy(*a, chunk=chunk), (0, 1))(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits", [30, 150])
def test_the_number_of_logits_bounds_tokens_and_the_heads_parts(logits, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", logits)  # of 37 columns: 1 token and feature, or 4
    args = inputs()
    ours = jax.jit(jax.value_and_grad(cross_entropy, (0, 1))).lower(*args)
    sizes = {math.prod(map(int, shape.split("x"))) for shape in
             re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", ours.as_text())}
    assert max(sizes) == max(3, logits // 37) * 37  # a chunk has a token of each of the 3 rows
    for a, b in zip(jax.tree.leaves(ours.compile()(*args)),
                    jax.tree.leaves(jax.value_and_grad(plain, (0, 1))(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_on_a_gpu_the_heads_gradient_is_one_product_a_chunk(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 10)
    monkeypatch.setattr(loss, "platform", lambda: "gpu")
    args = inputs()
    ours = jax.jit(jax.value_and_grad(cross_entropy, (0, 1))).lower(*args)
    head = "x".join(map(str, args[1].shape))
    assert re.search(rf"dot_general.*-> tensor<([1x]*){head}xf32>", ours.as_text())
    for a, b in zip(jax.tree.leaves(ours.compile()(*args)),
                    jax.tree.leaves(jax.value_and_grad(plain, (0, 1))(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_differentiated():
    """A frozen head must not cost its gradient: [features, vocabulary] is the largest array."""
    hidden, kernel, targets, weights = inputs()

    def of_hidden(hidden):
        return cross_entropy(hidden, kernel, targets, weights)
    np.testing.assert_allclose(jax.grad(of_hidden)(hidden),
                               jax.grad(plain)(hidden, kernel, targets, weights), atol=1e-5)
    frozen = jax.make_jaxpr(jax.grad(of_hidden))(hidden)
    trained = jax.make_jaxpr(jax.grad(cross_entropy, (0, 1)))(hidden, kernel, targets, weights)
    assert [str(program).count("dot_general[") for program in (frozen, trained)] == [2, 3]


def test_gradients_scale_with_what_follows():
    args = inputs()
    ours = jax.grad(lambda *a: jnp.sin(cross_entropy(*a) / 50), (0, 1))(*args)
    wanted = jax.grad(lambda *a: jnp.sin(plain(*a) / 50), (0, 1))(*args)
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_large_logits_do_not_overflow():
    hidden, kernel, targets, weights = inputs()
    assert np.isfinite(cross_entropy(1e4 * hidden, kernel, targets, weights))


def test_bfloat16_keeps_a_float32_sum():
    hidden, kernel, targets, weights = inputs()
    args = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), targets, weights
    value, (dhidden, dkernel) = jax.value_and_grad(cross_entropy, (0, 1))(*args)
    assert (value.dtype, dhidden.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(value, plain(*args), rtol=1e-2)


def test_classification_loss_leaves_out_what_has_no_weight():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    labels, weights = jnp.array([[0, 1, 2], [3, 0, 0]]), jnp.array([[1.0, 0, 2], [0.5, 0, 0]])
    logp = np.asarray(jax.nn.log_softmax(logits))
    wanted = -(logp[0, 0, 0] + 2 * logp[0, 2, 2] + 0.5 * logp[1, 0, 3])
    np.testing.assert_allclose(classification_loss(logits, labels, weights), wanted, rtol=1e-5)


def test_classification_loss_smooths_labels_as_torch_does():
    import torch
    logits = np.array(jax.random.normal(jax.random.key(0), (2, 3, 4)))
    labels = np.array([[0, 1, 2], [3, 0, 0]])
    wanted = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(6, 4), torch.tensor(labels).reshape(6), reduction="sum",
        label_smoothing=0.3)
    ours = classification_loss(jnp.asarray(logits), jnp.asarray(labels), jnp.ones((2, 3)), 0.3)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def softened(hidden, kernel, targets, weights, cap, smoothing):
    """What soft_cap and smoothing mean, on all the logits."""
    logp = jax.nn.log_softmax(cap * jnp.tanh(hidden @ kernel / cap))
    own = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return -(weights * ((1 - smoothing) * own + smoothing * logp.mean(-1))).sum()


@pytest.mark.parametrize(("sizes", "vocabulary"), [
    ({"data": 1}, 37),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 37),  # more tokens than columns, and padded columns
    ({"data": 2, "fsdp": 2, "sequence": 2}, 401)])  # fewer
def test_caps_and_smoothing_on_any_mesh_and_odd_vocabularies(sizes, vocabulary):
    args, mesh = inputs(4, 16, 8, vocabulary), make_mesh(sizes)
    wanted = jax.value_and_grad(lambda *a: softened(*a, 3.0, 0.2), (0, 1))(*args)
    axes = [("batch", "length", None), ("embed", "vocab"), *[("batch", "length")] * 2]
    args = [jax.device_put(a, sharding(x, a.shape, mesh)) for a, x in zip(args, axes, strict=True)]
    with jax.set_mesh(mesh):
        ours = jax.jit(jax.value_and_grad(lambda *a: cross_entropy(
            *a, soft_cap=3.0, smoothing=0.2, chunk=5), (0, 1)))(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def collectives(text):
    """(kind, elements, whether within a loop) of each collective in a compiled program."""
    bodies, found, name = set(re.findall(r"body=%?([\w.\-]+)", text)), [], ""
    for line in text.splitlines():
        if line.endswith("{") and (begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            name = begins[1]
        if use := re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
                            r"collective-permute)(?:-start)?\(", line):
            sizes = [math.prod(map(int, filter(None, dims.split(","))))
                     for dims in re.findall(r"\w\d+\[([\d,]*)\]", use[1])]
            found.append((use[2], sum(sizes), name in bodies))
    return found


@pytest.mark.parametrize(("sizes", "length", "fewer"), [
    ({"fsdp": 4, "tensor": 2}, 16, True), ({"fsdp": 4, "tensor": 2}, 128, False),
    ({"fsdp": 2, "tensor": 2, "sequence": 2}, 16, True)])
def test_no_logits_move_and_the_head_does_once(sizes, length, fewer):
    """Tokens are gathered, chunk by chunk, where they are fewer than the vocabulary."""
    mesh, features, vocabulary = make_mesh(sizes), 64, 160
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(axes, shape, mesh))
              for shape, dtype, axes in (
                  ((8, length, features), jnp.float32, ("batch", "length", None)),
                  ((features, vocabulary), jnp.float32, ("embed", "vocab")),
                  ((8, length), jnp.int32, ("batch", "length")),
                  ((8, length), jnp.float32, ("batch", "length")))]
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(
            functools.partial(cross_entropy, chunk=16), (0, 1))).lower(*arrays).compile()
    found = collectives(compiled.as_text())
    inside = [(kind, size) for kind, size, looped in found if looped]
    outside = [(kind, size) for kind, size, looped in found if not looped]
    # The chunk's 16 tokens' hidden states, and none of their 40 or 80 columns each.
    assert 0 < max(size for _, size in inside) <= 16 * features
    part = features * vocabulary // 8  # of the head, on a device
    if fewer:  # the head and its gradient change from cut rows to cut columns, no device has more
        assert outside == [("all-to-all", part)] * 2
    else:
        assert not any(kind == "all-gather" for kind, _ in inside)
        assert [kind for kind, _ in outside][:1] == ["all-gather"] and len(outside) == 2
        assert {size for _, size in outside} <= {part, 4 * part}
