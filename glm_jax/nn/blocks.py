"""What BERT, GLM (2021) and ChatGLM-6B share: attention and MLP with biases, and their stack."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.nn.attention import Cache, Mask, attention
from glm_jax.nn.batch import Batch
from glm_jax.nn.compute import Compute
from glm_jax.nn.layers import Linear, of_one_input, scan
from glm_jax.parallel.mesh import constrain

Keys = list[jax.Array | None]


class SelfAttention(nnx.Module):
    """Multi-head attention (Vaswani et al. 2017) with a bias in each of its four matrices."""

    def __init__(self, hidden: int, heads: int, std: float, rngs: nnx.Rngs):
        if not heads or hidden % heads:
            raise UserError(f"config.json: hidden_size={hidden} is no multiple of "
                            f"num_attention_heads={heads}")
        self.heads = heads
        whole = f"heads:{hidden // heads}"  # no device has a part of a head
        self.query, self.key, self.value = (
            Linear(hidden, hidden, ("embed", whole), bias=True, std=std, rngs=rngs)
            for _ in range(3))
        self.dense = Linear(hidden, hidden, (whole, "embed"), bias=True, std=std, rngs=rngs)

    def __call__(self, x: jax.Array, mask: Mask, cache: tuple[jax.Array, jax.Array] | None,
                 start: jax.Array | int, keys: Keys,
                 turn: Callable[[jax.Array], jax.Array] = lambda x: x) -> tuple[jax.Array, Any]:
        """`[batch, length, hidden]`, and the layer's keys and values, those of `cache` included.

        Args:
          start: the cache's slot of the first token.
          keys: four, for the adapters' dropout.
          turn: rotates queries and keys `[batch, length, heads, head_dim]`.
        """
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], self.heads, -1)

        query, key, value = map(heads, of_one_input((self.query, self.key, self.value), x,
                                                    keys[:3]))
        query, key = turn(query), turn(key)
        if cache is not None:
            key, value = (jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0))
                          for old, new in zip(cache, (key, value), strict=True))
        out = attention(query, key.astype(x.dtype), value.astype(x.dtype), mask)
        return self.dense(out.reshape(x.shape), keys[3]), (key, value)


class MLP(nnx.Module):
    """Two matrices with biases, `activation` between them."""

    def __init__(self, hidden: int, inner: int, activation: Callable[[jax.Array], jax.Array],
                 std: float, rngs: nnx.Rngs):
        self.activation = activation
        self.up = Linear(hidden, inner, ("embed", "mlp"), bias=True, std=std, rngs=rngs)
        self.down = Linear(inner, hidden, ("mlp", "embed"), bias=True, std=std, rngs=rngs)

    def __call__(self, x: jax.Array, keys: Keys) -> jax.Array:
        return self.down(self.activation(self.up(x, keys[0])), keys[1])


def run(layers: nnx.Module, compute: Compute, x: jax.Array, batch: Batch, cache: Cache | None,
        key: jax.Array | None, *more: Any) -> tuple[jax.Array, Cache | None]:
    """Stacked layers on `x [batch, length, hidden]`, each seeing what `batch` lets it see.

    A layer is called `(x, mask, cache, start, keys, *more)`, with six keys for adapters, and
    gives `x` and its keys and values.

    Args:
      cache: what came before; the one returned holds this batch too.
      key: for the adapters' dropout; none without.
    """
    seen = batch if cache is None else cache.extend(batch)
    start = 0 if cache is None else cache.length
    mask = Mask.of(compute, batch, seen)
    keys = None
    if key is not None:
        keys = jax.random.split(key, (len(jax.tree.leaves(nnx.state(layers))[0]), 6))

    def call(layer: Any, x: jax.Array, kv: Any, key: Any) -> tuple[jax.Array, Any]:
        x = constrain(x, "batch", "length", None)
        x, kv = layer(x, mask, kv, start, [None] * 6 if key is None else list(key), *more)
        return constrain(x, "batch", "length", None), None if cache is None else kv

    kv = None if cache is None else (cache.keys, cache.values)
    x, kv = scan(layers, call, x, kv, keys, unroll=cache is None, compute=compute)
    if isinstance(seen, Batch):
        return x, None
    return x, dataclasses.replace(seen, keys=kv[0], values=kv[1],
                                  length=seen.length + batch.tokens.shape[1])


def pooled(hidden: jax.Array, batch: Batch) -> jax.Array:
    """The hidden state of each example `[batch, examples, hidden]`, at `pool_index`."""
    return jnp.take_along_axis(hidden, jnp.asarray(batch.pool_index)[..., None], axis=1)
