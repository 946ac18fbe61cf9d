"""The batch: a handful of arrays that describe every example of every task, and the mask."""

import dataclasses
from collections.abc import Sequence
from typing import Any

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
    An example lies in one piece, and order does not fall in it: kernels rely on that.

    Attributes:
      tokens: `[batch, length]` int32.
      positions: `[batch, streams, length]` int32; one stream, or two for two-dimensional positions.
      segments: `[batch, length]` int32; 0 is padding, examples packed in a row differ.
      order: `[batch, length]` int32; the running count of causal tokens in the row.
      token_types: `[batch, length]` int32 (BERT).
      targets: `[batch, length]` int32, what each position predicts; `weights`: float32, its weight.
      pool_index: `[batch, examples]` int32, the position whose hidden state stands for an example.
      labels: `[batch, examples]` int32; `label_weights`: float32, 0 where there is no example.
      vectors: `[batch, examples, features]` float32, what the pooled states learn to point along.
      causal: at most so many examples lie in a row, and each is causal; 0 where that isn't known.
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
    vectors: Array | None = None
    causal: int = dataclasses.field(default=0, metadata={"static": True})


def causal_batch(tokens: Array, attention_mask: Array | None = None,
                 positions: Array | None = None, segments: Array | None = None) -> Batch:
    """A causal batch from what Hugging Face users hold; of NumPy's arrays where it gets these.

    Args:
      tokens: `[batch, length]` int.
      attention_mask: `[batch, length]`, 1 for real tokens; all ones when left out.
      positions: `[batch, length]` int; counted over the real tokens when left out.
      segments: `[batch, length]` int, for several texts in a row; replaces `attention_mask`.
    """
    xp, tokens, real = _arrays(tokens, attention_mask)
    several = segments is not None
    segments = xp.asarray(segments, xp.int32) if several else real
    order = xp.broadcast_to(xp.arange(tokens.shape[1], dtype=xp.int32), tokens.shape)
    if positions is None:
        positions = xp.maximum(xp.cumsum(segments > 0, axis=1) - 1, 0)
    return Batch(tokens, xp.asarray(positions, xp.int32)[:, None], segments, order,
                 causal=0 if several else 1)


def _arrays(tokens: Array, attention_mask: Array | None) -> tuple[Any, Any, Any]:
    """NumPy for its arrays, jax.numpy for others; tokens and mask as int32."""
    xp = np if isinstance(tokens, np.ndarray) else jnp
    tokens = xp.asarray(tokens, xp.int32)
    return xp, tokens, (xp.ones_like(tokens) if attention_mask is None
                        else xp.asarray(attention_mask, xp.int32))


def bidirectional_batch(tokens: Array, attention_mask: Array | None = None) -> Batch:
    """Every token sees every other, as in BERT; positions count from the start of the row.

    Padding on the left shifts them, as in the released code.

    Args:
      tokens, attention_mask: as of `causal_batch`.
    """
    xp, tokens, segments = _arrays(tokens, attention_mask)
    positions = xp.broadcast_to(xp.arange(tokens.shape[1], dtype=xp.int32), tokens.shape)
    return Batch(tokens, positions[:, None], segments, xp.zeros_like(tokens))


def blank_batch(tokens: Array, attention_mask: Array | None, start: int | None,
                blanks: Sequence[Sequence[int | None]], unstarted: bool) -> Batch:
    """A context that sees itself both ways, then what fills a blank of it (Du et al. 2022).

    The context ends before the first `start` token of a row. From there on the first position
    stays that of the blank and the second counts 1, 2, 3 …; in the context the first counts and
    the second is 0. Without a blank the first goes on counting. Positions count real tokens.

    Args:
      tokens, attention_mask: as of `causal_batch`.
      start: the id of `<sop>`; none where it isn't known.
      blanks: groups of ids of mask tokens. The blank is the first token of the row that lies in
        the first group that the row has any of.
      unstarted: whether a row without `start` is a context; else it is causal.
    """
    xp, tokens, segments = _arrays(tokens, attention_mask)
    real = segments > 0
    count = xp.maximum(xp.cumsum(real, axis=1) - 1, 0)
    begins = real & (tokens == (-1 if start is None else start))
    block = xp.cumsum(xp.cumsum(begins, axis=1) > 0, axis=1)  # 0 in the context
    blank = count
    for group in reversed(blanks):
        here = real & sum((tokens == i for i in group if i is not None), tokens < 0)
        at = xp.argmax(here, axis=1)[:, None]
        blank = xp.where(xp.any(here, axis=1, keepdims=True),
                         xp.take_along_axis(count, at, axis=1), blank)
    started = xp.any(begins, axis=1, keepdims=True)
    order = block if unstarted else xp.where(started, block, xp.arange(tokens.shape[1]))
    positions = xp.stack((xp.where(block > 0, blank, count), block), axis=1)
    return Batch(tokens, positions.astype(xp.int32), segments, order.astype(xp.int32))


def visible(query_segments: Array, query_order: Array, key_segments: Array,
            key_order: Array) -> Array:
    """`[batch, queries, keys]` bool: which keys each query sees (the rule of `Batch`)."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_order[:, None, :] <= query_order[:, :, None]) & (key_segments > 0)[:, None]


def reach(segments: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first and the last key that each query sees, `[batch, length]` int32 each.

    It sees all between them: a segment lies in one piece, and `order` does not fall in it.
    """
    length = segments.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    other = segments[:, 1:] != segments[:, :-1]
    more = other | (order[:, 1:] != order[:, :-1])
    begins = jnp.pad(other, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(more, ((0, 0), (0, 1)), constant_values=True)
    return (jax.lax.cummax(jnp.where(begins, index, 0), axis=1),
            jax.lax.cummin(jnp.where(ends, index, length), axis=1, reverse=True))


def pairs(batch: Batch) -> jax.Array:
    """How many pairs of a query and a key that it sees a batch has, float32; without the mask."""
    segments = jnp.asarray(batch.segments)
    first, last = reach(segments, jnp.asarray(batch.order))
    return jnp.sum(jnp.where(segments > 0, last - first + 1, 0).astype(jnp.float32))
