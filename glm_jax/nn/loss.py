"""Losses as sums over weighted items, so that micro-batches and devices add up to one mean.

A vocabulary's logits are never held whole: neither all tokens', nor, on several devices, a token's.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glm_jax.nn.matmul import matmul, over_outputs, over_tokens
from glm_jax.parallel.mesh import constrain, platform, ways

LOGITS = 2**25  # so many exist at a time on a CPU, in float32
ACCELERATED = 4  # times as many elsewhere, where products of few tokens are slow


class _How(NamedTuple):
    """What a loss is, besides its arrays; `spread` as of `mesh.partition`."""

    soft_cap: float
    smoothing: float
    spread: bool


def cross_entropy(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array,
                  *, soft_cap: float = 0.0, smoothing: float = 0.0, chunk: int = 0) -> jax.Array:
    """Sum of weight * -log softmax(hidden kernel)[target], never holding all the logits.

    The gradient is formed in the same pass over chunks of tokens; that of `kernel` only when it
    is asked for. log-sum-exp is in float32.

    Devices split the vocabulary, and add up what a token's logits sum to. Those that store parts
    of the kernel (`embed`) and have tokens of their own split it too, and each computes with the
    tokens of all of them, where these are fewer than the vocabulary; else the kernel is gathered,
    once. Each chunk has tokens of every device.

    Args:
      hidden: `[batch, length, hidden]`.
      kernel: `[hidden, vocabulary]`.
      targets: `[batch, length]` int32.
      weights: `[batch, length]` float32.
      soft_cap: logits become cap * tanh(logits / cap) (Gemma 2, 2024); 0: they stay.
      smoothing: the share of each target that goes to all tokens alike (Szegedy et al. 2016).
      chunk: about how many tokens a device takes at a time; rows are cut along their length. 0: as
        many as give `LOGITS`, or times `ACCELERATED`.

    Returns:
      A float32 scalar.
    """
    batch, length, _ = hidden.shape
    shares = [ways("batch", batch, spread) * ways("length", length, spread)
              for spread in (False, True)]
    spread = shares[0] != shares[1] and batch * length // shares[1] <= kernel.shape[1]
    columns = -(-kernel.shape[1] // ways("vocab", spread=spread))
    parts = ways("length", length)
    own = length // parts
    size = max(1, (chunk or _most_logits() // columns) * shares[spread] // (batch * parts))
    size = -(-own // -(-own // size))  # all chunks alike

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, parts, own, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, -own % size)] + [(0, 0)] * (x.ndim - 3))
        x = jnp.moveaxis(x.reshape(batch, parts, -1, size, *x.shape[3:]), 2, 0)
        x = x.reshape(len(x), batch, parts * size, *x.shape[4:])
        return constrain(x, None, "batch", "length", *[None] * (x.ndim - 3))

    return _cross_entropy(_How(soft_cap, smoothing, spread), cut(hidden),
                          kernel.astype(hidden.dtype), cut(targets),
                          cut(weights.astype(jnp.float32)))


def _most_logits() -> int:
    return LOGITS if platform() == "cpu" else ACCELERATED * LOGITS


def _head(how: _How, kernel: jax.Array) -> jax.Array:
    """The kernel as chunks are multiplied with it: its columns split, padded to equal parts."""
    kernel = constrain(kernel, "embed", "vocab", gathered=not how.spread)
    pad = -kernel.shape[1] % ways("vocab", spread=how.spread)
    return constrain(jnp.pad(kernel, [(0, 0), (0, pad)]), None, "vocab", spread=how.spread)


def _chunk_loss(how: _How, vocabulary: int, kernel: jax.Array, hidden: jax.Array,
                targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of a chunk and its gradient for the logits `[batch, length, columns]`."""
    logits = constrain(matmul(hidden, kernel, jnp.float32), "batch", "length", "vocab",
                       spread=how.spread)
    slope = jnp.float32(1)
    if how.soft_cap:
        capped = jnp.tanh(logits / how.soft_cap)
        logits, slope = how.soft_cap * capped, 1 - capped * capped
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    target = (1 - how.smoothing) * (column == targets[..., None])
    if how.smoothing:
        target += how.smoothing / vocabulary * (column < vocabulary)
    if logits.shape[-1] > vocabulary:
        logits = jnp.where(column < vocabulary, logits, jnp.finfo(jnp.float32).min)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    total = jnp.sum(exp, axis=-1, keepdims=True)
    meant = jnp.sum(jnp.where(target > 0, target * logits, 0), axis=-1, keepdims=True)
    loss = jnp.sum(weights * (jnp.log(total) + top - meant)[..., 0])
    return loss, (exp / total - target) * weights[..., None] * slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(how: _How, hidden: jax.Array, kernel: jax.Array, targets: jax.Array,
                   weights: jax.Array) -> jax.Array:
    head, vocabulary = _head(how, kernel), kernel.shape[1]

    def body(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
        return total + _chunk_loss(how, vocabulary, head, *_whole(how, *part))[0], None
    return jax.lax.scan(body, jnp.float32(0), (hidden, targets, weights))[0]


def _whole(how: _How, *parts: jax.Array) -> tuple[jax.Array, ...]:
    """A chunk's arrays, with the tokens of all devices that split the vocabulary."""
    return tuple(constrain(x, "batch", "length", *[None] * (x.ndim - 2), spread=how.spread)
                 for x in parts)


def _forward(how: _How, hidden: Any, kernel: Any, targets: Any, weights: Any
             ) -> tuple[jax.Array, Any]:
    trained, matrix = kernel.perturbed, kernel.value
    head, (_, rows, length, features) = _head(how, matrix), hidden.value.shape
    devices = (ways("batch", rows, how.spread), ways("length", length, how.spread))
    # A part's product is as large as the logits; that of all features would be as the head itself,
    # but for a GPU's, which adds to the sum where it lies.
    most = _most_logits() * ways("vocab", spread=how.spread) // head.shape[1]
    width = features if platform() == "gpu" else max(
        n for n in range(1, features + 1) if features % n == 0 and (n == 1 or n <= most))

    def apart(x: jax.Array) -> jax.Array:
        x = x.reshape(devices[0], rows // devices[0], devices[1], length // devices[1], -1)
        return jnp.swapaxes(x, 1, 2)

    def add(x: jax.Array, dlogits: jax.Array, i: Any, dhead: jax.Array) -> jax.Array:
        # Each device adds up its own tokens': the sum over devices can wait.
        x = jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=-1)
        more = jax.vmap(jax.vmap(over_tokens))(x, dlogits)
        more += jax.lax.dynamic_slice_in_dim(dhead, i * width, width, axis=2)
        dhead = jax.lax.dynamic_update_slice_in_dim(dhead, more, i * width, axis=2)
        return constrain(dhead, "batch", "length", None, "vocab", spread=how.spread)

    def body(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        (total, dhead), (x, *rest) = carry, _whole(how, *part)
        loss, dlogits = _chunk_loss(how, matrix.shape[1], head, x, *rest)
        dlogits = dlogits.astype(matrix.dtype)
        if trained:
            dhead = jax.lax.fori_loop(0, features // width, functools.partial(
                add, apart(x), apart(dlogits)), dhead)
        return (total + loss, dhead), constrain(over_outputs(dlogits, head), "batch", "length",
                                                None)

    zero = jnp.zeros((*devices, *head.shape), jnp.float32) if trained else None
    (total, dhead), dhidden = jax.lax.scan(
        body, (jnp.float32(0), zero), (hidden.value, targets.value, weights.value))
    if dhead is None:
        return total, (dhidden, None)
    dkernel = constrain(jnp.sum(dhead, axis=(0, 1)), "embed", "vocab")
    return total, (dhidden, dkernel[:, :matrix.shape[1]].astype(matrix.dtype))


def _backward(how: _How, saved: Any, g: Any) -> tuple[Any, ...]:
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
