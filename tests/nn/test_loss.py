"""The losses against log_softmax, whole and in chunks, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.nn.loss import classification_loss, cross_entropy


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
    loss, (dhidden, dkernel) = jax.value_and_grad(cross_entropy, (0, 1))(*args)
    assert (loss.dtype, dhidden.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(loss, plain(*args), rtol=1e-2)


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
