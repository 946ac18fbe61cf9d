"""Attention of rows that are split over devices: keys and values go round (Liu et al. 2023).

Each device keeps its queries and has in turn the keys of every other, so that none holds more of
a row than its part of it (arXiv:2310.01889). The softmax is put together as in FlashAttention (Dao
et al. 2022); the derivative sends the keys round once more, with their gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.nn.batch import Array, visible

SCORES = 2**26  # so many exist on a device at a time, in float32


def ring(query: jax.Array, key: jax.Array, value: jax.Array, segments: Array, order: Array, *,
         axis: str | tuple[str, ...]) -> jax.Array:
    """`attention` within `jax.shard_map`, for rows that lie split over the mesh axis `axis`.

    Args:
      query, key, value: as of `attention`, of this device's part of the rows.
      segments, order: `[batch, length]` of that part.
    """
    batch, length, heads, dim = query.shape
    most = max(1, min(length, SCORES // (batch * heads * length)))
    size = next(n for n in range(most, 0, -1) if length % n == 0)
    grouped = (batch, -1, size, key.shape[2], heads // key.shape[2], dim)
    rows = query.reshape(grouped).transpose(1, 0, 3, 4, 2, 5)
    out = _ring(axis, rows, key, value, jnp.stack([jnp.asarray(segments), jnp.asarray(order)]))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(query.shape)


def _sent(axis: str | tuple[str, ...], tree: Any) -> Any:
    """What the device before this one on the ring has."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % size) for i in range(size)])


def _chunks(seen: jax.Array, count: int) -> jax.Array:
    """Segments and order `[2, batch, length]` of the queries: `[chunks, 2, batch, queries]`."""
    return jnp.moveaxis(seen.reshape(*seen.shape[:2], count, -1), 2, 0)


def _scores(rows: jax.Array, queries: jax.Array, key: jax.Array, keys: jax.Array) -> jax.Array:
    """`[batch, groups, heads, queries, keys]` float32, -inf where a query does not see a key."""
    scores = jnp.einsum("bgrqd,bkgd->bgrqk", rows, key, preferred_element_type=jnp.float32)
    return jnp.where(visible(*queries, *keys)[:, None, None],
                     scores * rows.shape[-1]**-0.5, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(axis: Any, rows: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array
          ) -> jax.Array:
    """`ring`, with queries and result `[chunks, batch, groups, heads, queries, dim]`.

    Args:
      seen: `[2, batch, length]`, segments and order.
    """
    return _forward(axis, rows, key, value, seen)[0]


def _forward(axis: Any, rows: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array
             ) -> tuple[jax.Array, Any]:
    queries = _chunks(seen, len(rows))

    def more(sums: Any, held: Any) -> Any:
        """The sums with those over the keys that are held."""
        key, value, keys = held

        def some(part: Any) -> Any:
            rows, queries, top, total, out = part
            scores = _scores(rows, queries, key, keys)
            new = jnp.maximum(top, jnp.max(scores, axis=-1))
            shares, left = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            out = out * left[..., None] + jnp.einsum(
                "bgrqk,bkgd->bgrqd", shares.astype(value.dtype), value,
                preferred_element_type=jnp.float32)
            return new, total * left + jnp.sum(shares, axis=-1), out
        return jax.lax.map(some, (rows, queries, *sums))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        sums, held = carry
        return (more(sums, held), _sent(axis, held)), None

    zero = jnp.zeros(rows.shape[:-1], jnp.float32)
    start = (zero - 1e30, zero, jnp.zeros(rows.shape, jnp.float32))
    turns = jax.lax.axis_size(axis) - 1
    (sums, held), _ = jax.lax.scan(step, (start, (key, value, seen)), length=turns)
    top, total, out = more(sums, held)
    total = jnp.where(total > 0, total, 1)  # of a row that sees nothing
    out = (out / total[..., None]).astype(value.dtype)
    return out, (rows, key, value, seen, out, top + jnp.log(total))


def _backward(axis: Any, saved: Any, dout: jax.Array) -> tuple[Any, ...]:
    rows, key, value, seen, out, logsum = saved
    scale, queries = rows.shape[-1]**-0.5, _chunks(seen, len(rows))
    inner = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def more(drows: jax.Array, held: Any, sums: Any) -> Any:
        """The gradients of the queries and of the held keys and values, with what these share."""
        key, value, keys = held

        def some(sums: Any, part: Any) -> Any:
            rows, queries, dout, logsum, inner, drows = part
            shares = jnp.exp(_scores(rows, queries, key, keys) - logsum[..., None])
            dshares = product("bgrqd,bkgd->bgrqk", dout, value)
            dscores = (shares * (dshares - inner[..., None]) * scale).astype(rows.dtype)
            dkey = product("bgrqk,bgrqd->bkgd", dscores, rows)
            dvalue = product("bgrqk,bgrqd->bkgd", shares.astype(dout.dtype), dout)
            drows += product("bgrqk,bkgd->bgrqd", dscores, key)
            return (sums[0] + dkey, sums[1] + dvalue), drows
        return jax.lax.scan(some, sums, (rows, queries, dout, logsum, inner, drows))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        drows, held, sums = carry
        sums, drows = more(drows, held, sums)
        return (drows, *_sent(axis, (held, sums))), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (rows, key, value))
    carry = (zeros[0], (key, value, seen), zeros[1:])
    (drows, held, sums), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axis) - 1)
    sums, drows = more(drows, held, sums)
    dkey, dvalue = _sent(axis, sums)  # home
    return drows.astype(rows.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_ring.defvjp(_forward, _backward)
