"""An empty key-value cache for a model, and the buckets that lengths are rounded up to."""

from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.nn.attention import Cache
from glm_jax.parallel.mesh import constrain


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96 …: few lengths to compile for, at most 1/3 padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def empty_cache(config: Any, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache of `slots` unused slots a row, laid out on the mesh of `jax.set_mesh`.

    Args:
      config: a model's; its layers, key-value heads, head size and position streams are read.
      dtype: what the keys and values are kept in.
    """
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)

    def empty() -> jax.Array:
        return constrain(jnp.zeros(shape, dtype), None, "batch", None, "heads", None)

    unused = constrain(jnp.zeros((batch, slots), jnp.int32), "batch", None)
    positions = constrain(jnp.zeros((batch, config.streams), jnp.int32), "batch", None)
    return Cache(empty(), empty(), unused, unused, positions, jnp.zeros((), jnp.int32))
