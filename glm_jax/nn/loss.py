"""Losses as sums over weighted items, so that micro-batches and devices add up to one mean."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm_jax.nn.matmul import matmul, over_outputs, over_tokens

LOGITS = 2**25  # so many exist at a time, in float32


def cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array,
                  weights: jax.Array, chunk: int = 0) -> jax.Array:
    """Sum of weight * -log softmax(hidden kernel)[target], never holding all the logits.

    The gradient is formed in the same pass over chunks of tokens; that of `kernel` only when it
    is asked for. log-sum-exp is in float32.

    Args:
      hidden: `[batch, length, hidden]`.
      kernel: `[hidden, vocabulary]`.
      targets: `[batch, length]` int32.
      weights: `[batch, length]` float32.
      chunk: about how many tokens a chunk has; rows are cut along their length. 0: as many as
        give `LOGITS`, and at least 1,024.

    Returns:
      A float32 scalar.
    """
    batch, length, _ = hidden.shape
    chunk = chunk or max(1024, LOGITS // kernel.shape[1])
    size = min(length, max(1, chunk // batch))
    pad = -length % size

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    return _cross_entropy(cut(hidden), kernel.astype(hidden.dtype), cut(targets),
                          cut(weights.astype(jnp.float32)))


def _chunk_loss(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
                ) -> tuple[jax.Array, jax.Array]:
    """The loss of a chunk and its gradient for the logits."""
    logits = matmul(hidden, kernel, jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    loss = jnp.sum(weights * (jnp.log(total) + top - own)[..., 0])
    one_hot = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    return loss, (exp / total - one_hot) * weights[..., None]


@jax.custom_vjp
def _cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
                   ) -> jax.Array:
    def body(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _chunk_loss(part[0], kernel, *part[1:])[0], None
    return jax.lax.scan(body, jnp.float32(0), (hidden, targets, weights))[0]


def _forward(hidden: Any, kernel: Any, targets: Any, weights: Any) -> tuple[jax.Array, Any]:
    trained, matrix = kernel.perturbed, kernel.value

    def body(carry: Any, part: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, dkernel = carry
        loss, dlogits = _chunk_loss(part[0], matrix, *part[1:])
        dlogits = dlogits.astype(matrix.dtype)
        if trained:
            dkernel += over_tokens(part[0], dlogits)
        return (total + loss, dkernel), over_outputs(dlogits, matrix)

    zero = jnp.zeros(matrix.shape, jnp.float32) if trained else None
    (total, dkernel), dhidden = jax.lax.scan(
        body, (jnp.float32(0), zero), (hidden.value, targets.value, weights.value))
    return total, (dhidden, None if dkernel is None else dkernel.astype(matrix.dtype))


def _backward(saved: Any, g: Any) -> tuple[Any, ...]:
    dhidden, dkernel = saved
    return (dhidden * g.astype(dhidden.dtype),
            None if dkernel is None else dkernel * g.astype(dkernel.dtype), None, None)


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def classification_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array,
                        smoothing: float = 0.0) -> jax.Array:
    """Sum of weight * -log softmax(logits)[label].

    Args:
      logits: `[batch, examples, labels]` float32.
      labels: `[batch, examples]` int32.
      weights: `[batch, examples]` float32; 0 where there is no example.
      smoothing: the share of each target that goes to all labels alike (Szegedy et al. 2016).
    """
    own = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype),
                              smoothing)
    return -jnp.sum(weights * jnp.sum(own * jax.nn.log_softmax(logits), axis=-1))
