"""Generation with a static key-value cache: one compiled prefill, one compiled decode loop."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.infer.cache import bucket, empty_cache
from glm_jax.infer.sampling import Sampling, choose
from glm_jax.models import as_batch
from glm_jax.nn.attention import Cache
from glm_jax.nn.batch import Array, Batch
from glm_jax.parallel.mesh import use_mesh_of


class Generation(NamedTuple):
    """What was generated.

    Attributes:
      tokens: `[batch, max_new_tokens]` int32, the padding id after a row's stop token.
      lengths: `[batch]` int32, how many tokens each row has, its stop token included.
    """

    tokens: np.ndarray
    lengths: np.ndarray


class Stop(NamedTuple):
    """When a row ends: at any of `ids [n]`, or after `limit` tokens. `pad` fills what follows."""

    ids: jax.Array
    pad: jax.Array
    limit: jax.Array


class _Loop(NamedTuple):
    chosen: jax.Array  # tokens chosen so far
    last: jax.Array  # [batch] the newest
    tokens: jax.Array  # [batch, size] all of them
    lengths: jax.Array  # [batch]
    done: jax.Array  # [batch] bool
    seen: jax.Array | None  # [batch, vocabulary] bool, for the repetition penalty
    cache: Cache


def generate(model: Any, tokens: Array, attention_mask: Array | None = None, *,
             max_new_tokens: int, how: Sampling | None = None, stop_ids: Iterable[int] = (),
             pad_id: int = 0, seed: int = 0) -> Generation:
    """Continues each row of tokens until a stop token, or for `max_new_tokens`.

    Lengths are rounded up to buckets, so that most calls find their program compiled; a change of
    the sampling's values, the stop ids (as many), the seed or `max_new_tokens` in its bucket needs
    no compilation either. A row's greedy tokens don't depend on the other rows.

    Args:
      model: a language model; its parameters may lie on a mesh.
      tokens: `[batch, length]` int.
      attention_mask: `[batch, length]`, 1 for real tokens, which may stand on either side.
      how: greedy by default.
      stop_ids: a row ends after any of these.

    Raises:
      UserError: for rows without tokens, ids outside the vocabulary, a model without an LM head,
        or a prompt without `<sop>` where the model needs one.
    """
    if model.head != "lm":
        raise UserError(f"generation needs a language-model head; this model's is {model.head!r}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    how = how or Sampling()
    rows, mask = _right_aligned(*check_tokens(model.config, tokens, attention_mask))
    if model.config.streams == 2:
        check_start(model.config, rows, mask, max_new_tokens)
    stop = Stop(jnp.asarray(list(stop_ids), jnp.int32), jnp.int32(pad_id),
                jnp.int32(max_new_tokens))
    size = bucket(max_new_tokens)
    graphdef, state = nnx.split(model)
    with use_mesh_of(state):
        logits, cache = prefill(graphdef, state, rows, mask, slots=rows.shape[1] + size)
        seen = None if how.repetition_penalty is None else _seen(rows, mask, logits.shape[-1])
        new, lengths = decode(graphdef, state, cache, logits, seen, how, stop,
                              jax.random.key(seed), size=size)
        return Generation(np.asarray(new)[:, :max_new_tokens], np.asarray(lengths))


def check_tokens(config: Any, tokens: Array, attention_mask: Array | None
                 ) -> tuple[np.ndarray, np.ndarray]:
    """`[batch, length]` int32 tokens and their mask, from what a user gave.

    Raises:
      UserError: for another shape, ids outside the vocabulary, or a row without a real token.
    """
    try:
        given = np.asarray(tokens)
    except ValueError:  # rows of several lengths
        given = np.asarray(tokens, object)
    if given.ndim != 2 or given.dtype.kind not in "iu":
        raise UserError("tokens must be whole numbers of shape [batch, length], not "
                        f"{given.dtype} of shape {list(given.shape)}")
    try:
        mask = np.ones(given.shape, np.int32) if attention_mask is None else \
            np.asarray(attention_mask)
    except ValueError:
        mask = np.empty(0)
    if mask.shape != given.shape:
        raise UserError(f"attention_mask has shape {list(mask.shape)}, "
                        f"tokens have {list(given.shape)}")
    mask = (mask != 0).astype(np.int32)
    if not given.size or not mask.any(axis=1).all():
        row = int(np.argmin(mask.any(axis=1))) if given.size else 0
        raise UserError(f"row {row} of tokens is empty: give each at least one token")
    if (bad := given[(given < 0) | (given >= config.vocab_size)]).size:
        raise UserError(f"token id {bad[0]} is outside the vocabulary of {config.vocab_size}: "
                        "was the text encoded with another model's tokenizer?")
    return given.astype(np.int32), mask


def check_start(config: Any, rows: np.ndarray, mask: np.ndarray, more: int) -> None:
    """Raises a UserError unless each row has a start of its answer, and positions for it."""
    start = config.start_token_id
    if start is None:
        raise UserError("the config doesn't say which tokens start and mark a blank: "
                        "from_pretrained(…, sop_token_id=…, mask_token_id=…, gmask_token_id=…)")
    if not (has := (rows == start).any(axis=1)).all():
        raise UserError(f"row {int(np.argmin(has))} has no <sop> (token {start}): a prompt for "
                        "this model is a text with a mask token, then <sop>")
    as_batch(config, *(np.pad(x, ((0, 0), (0, more)), constant_values=1) for x in (rows, mask)))


def _right_aligned(tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every row's real tokens, in order, at the end of rows of a bucketed length."""
    longest = int(mask.sum(axis=1).max())
    order = np.argsort(mask, axis=1, kind="stable")[:, -longest:]
    tokens, mask = (np.take_along_axis(a, order, axis=1) for a in (tokens, mask))
    left = ((0, 0), (bucket(longest) - longest, 0))
    return np.pad(tokens * mask, left), np.pad(mask, left)


def _seen(tokens: np.ndarray, mask: np.ndarray, vocabulary: int) -> jax.Array:
    seen = np.zeros((len(tokens), vocabulary), bool)
    row, column = np.nonzero(mask)
    seen[row, tokens[row, column]] = True
    return jnp.asarray(seen)


@functools.partial(jax.jit, static_argnames=("graphdef", "slots"))
def prefill(graphdef: Any, state: Any, tokens: jax.Array, mask: jax.Array, *, slots: int
            ) -> tuple[jax.Array, Cache]:
    """Runs left-padded prompts: the last position's logits `[batch, vocabulary]`, and the cache."""
    model = nnx.merge(graphdef, state)
    cache = empty_cache(model.config, tokens.shape[0], slots, model.dtype)
    hidden, cache = model(as_batch(model.config, tokens, mask), cache)
    return model.logits(hidden[:, -1]), cache


def step(model: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """One more token `[batch]` for each row: the logits `[batch, vocabulary]` after it."""
    streams = cache.positions.shape[1]
    positions = cache.positions + (np.arange(streams) == streams - 1)  # only the last one counts
    here = jnp.ones_like(tokens)[:, None]
    batch = Batch(tokens[:, None], positions[:, :, None], here, here * cache.length)
    hidden, cache = model(batch, cache)
    return model.logits(hidden[:, -1]), cache


@functools.partial(jax.jit, static_argnames=("graphdef", "size"))
def decode(graphdef: Any, state: Any, cache: Cache, logits: jax.Array, seen: jax.Array | None,
           how: Sampling, stop: Stop, key: jax.Array, *, size: int) -> tuple[jax.Array, jax.Array]:
    """Chooses tokens from `logits` on, until every row has ended or `stop.limit` is reached.

    Returns:
      tokens `[batch, size]` and lengths `[batch]`, both int32.
    """
    model = nnx.merge(graphdef, state)
    batch = logits.shape[0]

    def take(loop: _Loop, logits: jax.Array) -> _Loop:
        token = choose(logits, how, loop.seen, jax.random.fold_in(key, loop.chosen))
        token = jnp.where(loop.done, stop.pad, token)
        seen = loop.seen
        if seen is not None:
            seen = seen.at[jnp.arange(batch), token].set(True)
        ended = jnp.any(token[:, None] == stop.ids, axis=1)
        return loop._replace(chosen=loop.chosen + 1, last=token,
                             tokens=loop.tokens.at[:, loop.chosen].set(token),
                             lengths=loop.lengths + ~loop.done, done=loop.done | ended, seen=seen)

    def body(loop: _Loop) -> _Loop:
        logits, cache = step(model, loop.last, loop.cache)
        return take(loop._replace(cache=cache), logits)

    nothing = jnp.zeros(batch, jnp.int32)
    loop = _Loop(jnp.int32(0), nothing, jnp.full((batch, size), stop.pad), nothing,
                 jnp.zeros(batch, bool), seen, cache)
    loop = jax.lax.while_loop(lambda loop: (loop.chosen < stop.limit) & ~jnp.all(loop.done), body,
                              take(loop, logits))
    return loop.tokens, loop.lengths
