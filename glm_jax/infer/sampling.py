"""Choosing the next token: pure functions on logits `[batch, vocabulary]`, float32.

Filters set the logits that they exclude to minus infinity and never exclude all of a row. They
mean what Hugging Face's logits warpers of the same names mean, and are applied in the same order.
"""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from glm_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; what is `None` is off, and no temperature means greedily.

    Only `top_k`, and which of the others are on, is compiled in: their values may change.

    Attributes:
      temperature: divides the logits; a positive number.
      top_k: keep the k likeliest tokens (and those as likely as the k-th).
      top_p: keep the fewest tokens that hold this share of the probability, in (0, 1).
      min_p: keep tokens at least this share as likely as the likeliest, in (0, 1].
      repetition_penalty: makes what already stands in the row less likely where above 1.
    """

    temperature: float | jax.Array | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: float | jax.Array | None = None
    min_p: float | jax.Array | None = None
    repetition_penalty: float | jax.Array | None = None


def sampling(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
             min_p: float | None = None, repetition_penalty: float | None = None) -> Sampling:
    """Checks the settings, and turns off those that would change nothing.

    Raises:
      UserError: for a value out of its range.
    """
    def check(name: str, value: float | None, low: float, high: float, wanted: str) -> None:
        if value is not None and not (isinstance(value, numbers.Real) and low <= value <= high):
            raise UserError(f"{name} must be {wanted}, not {value!r}")

    tiny, huge = 1e-6, 1e6
    check("temperature", temperature or None, tiny, huge, "0 (greedy) or positive")
    check("top_p", top_p, tiny, 1, "above 0 and at most 1")
    check("min_p", min_p, 0, 1, "between 0 and 1")
    check("repetition_penalty", repetition_penalty, tiny, huge, "positive")
    if top_k is not None and (not isinstance(top_k, numbers.Integral) or top_k < 0):
        raise UserError(f"top_k must be a positive whole number, or 0 for no limit, not {top_k!r}")
    penalty = None if repetition_penalty == 1 else repetition_penalty
    if not temperature:
        return Sampling(repetition_penalty=penalty)
    return Sampling(temperature, int(top_k) if top_k else None, None if top_p == 1 else top_p,
                    min_p or None, penalty)


def choose(logits: jax.Array, how: Sampling, seen: jax.Array | None, key: jax.Array) -> jax.Array:
    """The next token of each row, `[batch]` int32.

    Args:
      seen: `[batch, vocabulary]` bool, the tokens that stand in the row; only the repetition
        penalty asks for it.
    """
    if how.repetition_penalty is not None:
        assert seen is not None
        logits = penalise(logits, seen, how.repetition_penalty)
    if how.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits, ids = candidates(logits, how)
    token = jax.random.categorical(key, logits)
    if ids is not None:
        token = jnp.take_along_axis(ids, token[:, None], axis=1)[:, 0]
    return token.astype(jnp.int32)


def candidates(logits: jax.Array, how: Sampling) -> tuple[jax.Array, jax.Array | None]:
    """The logits to draw from, and with `top_k`, which cuts them to `[batch, k]`, their ids."""
    assert how.temperature is not None
    logits, ids = logits / how.temperature, None
    if how.top_k is not None:
        logits, ids = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))
    if how.top_p is not None:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p is not None:
        logits = keep_min_p(logits, how.min_p)
    return logits, ids


def keep_top_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """The fewest largest of each row with a joint probability of at least p (Holtzman 2020).

    The least that stays is found by halving an interval: on a CPU, sorting 151552 logits would
    take longer than many a model's step.
    """
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    share = jax.nn.softmax(logits, axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(share, axis=-1, keepdims=True, where=below >= middle) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    high = jnp.zeros_like(below[:, :1])
    low = high - 104  # what lies below has a probability of 0 in float32
    low, _ = jax.lax.fori_loop(0, 40, halve, (low, high))
    return jnp.where(below < low, -jnp.inf, logits)


def keep_min_p(logits: jax.Array, p: float | jax.Array) -> jax.Array:
    """Those at least p times as likely as the likeliest of their row (Nguyen 2024)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits < least, -jnp.inf, logits)


def penalise(logits: jax.Array, seen: jax.Array, penalty: float | jax.Array) -> jax.Array:
    """Divides positive logits of seen tokens by the penalty, multiplies negative ones by it."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
