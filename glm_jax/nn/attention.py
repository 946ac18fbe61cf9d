"""Grouped-query attention and the key-value cache, as functions on arrays."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.nn.batch import Array, Batch, visible
from glm_jax.nn.compute import Compute
from glm_jax.nn.kernels import cudnn, cudnn_packed, over_mesh, packs, splash
from glm_jax.nn.ring import ring
from glm_jax.parallel.mesh import split_over


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees, by the rule of `Batch`; made once, ahead of the layers.

    Attributes:
      segments, order: `[batch, length]` int32, of the queries.
      dense: `[batch, queries, keys]` bool; None where the kernel wants none, and the queries see
        only each other.
      kernel: that computes it: one of `kernels.choose`, or `ring`.
      remat: whether scores and shares are computed again for the derivative of the reference.
      causal: of the batch.
    """

    segments: Array
    order: Array
    dense: Any
    kernel: str = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(metadata={"static": True})
    causal: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, compute: Compute, batch: Batch, seen: Batch | Cache) -> "Mask":
        """What the tokens of `batch` see of `seen`: the batch itself, or a cache that holds it."""
        segments, order, kernel, dense = batch.segments, batch.order, compute.kernel, None
        if isinstance(seen, Cache):  # few queries, and keys in any order
            kernel = "reference"
        elif split_over("length", segments.shape[1]):
            kernel = "ring"
        if kernel == "reference":
            dense = visible(segments, order, seen.segments, seen.order)
        if kernel == "cudnn" and not (batch.causal and packs()):
            # Padding sees itself: rows that see nothing are not defined there.
            dense = visible(segments + 1, order, segments + 1, order)
        return cls(segments, order, dense, kernel, compute.remat == "attention", batch.causal)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v over the keys that `mask` shows, by its kernel.

    What comes out for padding is finite, and differs between kernels.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key, value: `[batch, keys, kv_heads, head_dim]`.

    Returns:
      `[batch, queries, heads, head_dim]`.
    """
    arrays, rows = (query, key, value), (mask.segments, mask.order)
    if mask.kernel == "reference":
        return (_again if mask.remat else reference)(*arrays, mask.dense)
    if mask.kernel == "ring":
        axis = split_over("length", query.shape[1])
        return over_mesh(functools.partial(ring, axis=axis), *arrays, *rows, length="length")
    if mask.kernel == "cudnn" and mask.dense is None:
        return over_mesh(functools.partial(cudnn_packed, count=mask.causal + 2), *arrays,
                         mask.segments)
    if mask.kernel == "cudnn":
        return over_mesh(functools.partial(cudnn, causal=mask.causal > 0), *arrays, mask.dense)
    return over_mesh(splash, *arrays, *rows)


def reference(query: jax.Array, key: jax.Array, value: jax.Array, mask: Array) -> jax.Array:
    """`attention` by the book, with the softmax in float32.

    Query heads that share a key head are folded into rows, so that each group is one matrix
    product. Rows that see nothing (padding) come out as a mean of values, not as NaN.

    Args:
      mask: `[batch, queries, keys]` bool, True where a query sees a key.
    """
    batch, queries, heads, dim = query.shape
    groups = key.shape[2]
    rows = query.reshape(batch, queries, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bgrqd,bkgd->bgrqk", rows, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * dim**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bgrqk,bkgd->bgrqd", weights, value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


@jax.custom_vjp
def _again(query: jax.Array, key: jax.Array, value: jax.Array, dense: jax.Array) -> jax.Array:
    """`reference`, computed again for its derivative, whatever a layer's checkpoint keeps."""
    return reference(query, key, value, dense)


def _again_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, dense = saved
    return *jax.vjp(lambda q, k, v: reference(q, k, v, dense), query, key, value)[1](dy), None


_again.defvjp(lambda *args: (reference(*args), args), _again_backward)
