"""The batch: a handful of arrays that describe every example of every task, and the mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, possibly several examples to a row, and what is to be learned from them.

    Query i sees key j when both lie in the same segment and `order[j] <= order[i]`: constant
    inside a bidirectional prefix, growing by one with every causal token.

    Attributes:
      tokens: `[batch, length]` int32.
      positions: `[batch, streams, length]` int32; one stream, or two for two-dimensional positions.
      segments: `[batch, length]` int32; 0 is padding, examples packed in a row differ.
      order: `[batch, length]` int32; the running count of causal tokens in the row.
      token_types: `[batch, length]` int32 (BERT).
      targets: `[batch, length]` int32, what each position predicts; `weights`: float32, its weight.
      pool_index: `[batch, examples]` int32, the position whose hidden state stands for an example.
      labels: `[batch, examples]` int32; `label_weights`: float32, 0 where there is no example.
    """

    tokens: Array
    positions: Array
    segments: Array
    order: Array
    token_types: Array | None = None
    targets: Array | None = None
    weights: Array | None = None
    pool_index: Array | None = None
    labels: Array | None = None
    label_weights: Array | None = None


def causal_batch(tokens: Array, attention_mask: Array | None = None,
                 positions: Array | None = None, segments: Array | None = None) -> Batch:
    """A causal batch from what Hugging Face users hold.

    Args:
      tokens: `[batch, length]` int.
      attention_mask: `[batch, length]`, 1 for real tokens; all ones when left out.
      positions: `[batch, length]` int; counted over the real tokens when left out.
      segments: `[batch, length]` int, for several texts in a row; replaces `attention_mask`.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if segments is None:
        mask = jnp.ones_like(tokens) if attention_mask is None else jnp.asarray(attention_mask)
        segments = mask.astype(jnp.int32)
    segments = jnp.asarray(segments, jnp.int32)
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)
    return Batch(tokens, jnp.asarray(positions, jnp.int32)[:, None], segments, order)


def visible(query_segments: Array, query_order: Array, key_segments: Array,
            key_order: Array) -> Array:
    """`[batch, queries, keys]` bool: which keys each query sees (the rule of `Batch`)."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_order[:, None, :] <= query_order[:, :, None]) & (key_segments > 0)[:, None]
