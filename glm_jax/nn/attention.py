"""Grouped-query attention and the key-value cache, as functions on arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.nn.batch import Array, Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, with the segment and order of each slot.

    Attributes:
      keys, values: `[layers, batch, slots, kv_heads, head_dim]`, keys after the rotary; a tuple
        with an array for each layer where the model's layers are `apart`.
      segments, order: `[batch, slots]` int32; segment 0 marks a slot that no query sees.
      positions: `[batch, streams]` int32, where the newest token stands.
      length: scalar int32, the slots in use; the next tokens are written from there.
    """

    keys: Any
    values: Any
    segments: jax.Array
    order: jax.Array
    positions: jax.Array
    length: jax.Array

    def extend(self, batch: Batch) -> "Cache":
        """The cache with segments, order and positions of `batch`'s tokens written at `length`.

        The keys and values of these tokens are written by the layers.
        """
        def put(slots: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(slots, new, (0, self.length))
        return dataclasses.replace(self, segments=put(self.segments, jnp.asarray(batch.segments)),
                                   order=put(self.order, jnp.asarray(batch.order)),
                                   positions=jnp.asarray(batch.positions)[:, :, -1])

    def rows(self, index: jax.Array) -> "Cache":
        """The cache of a batch made of the rows `index [new batch]` of this one."""
        keys, values = jax.tree.map(lambda x: jnp.take(x, index, axis=x.ndim - 4),
                                    (self.keys, self.values))
        segments, order, positions = (x[index] for x in (self.segments, self.order, self.positions))
        return Cache(keys, values, segments, order, positions, self.length)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Array) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v, with the softmax in float32.

    Query heads that share a key head are folded into rows, so that each group is one matrix
    product. Rows that see nothing (padding) come out as a mean of values, not as NaN.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key, value: `[batch, keys, kv_heads, head_dim]`.
      mask: `[batch, queries, keys]` bool, True where a query sees a key.

    Returns:
      `[batch, queries, heads, head_dim]`.
    """
    batch, queries, heads, dim = query.shape
    groups = key.shape[2]
    rows = query.reshape(batch, queries, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgrqd,bkgd->bgrqk", rows, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * dim**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bgrqk,bkgd->bgrqd", weights, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)
