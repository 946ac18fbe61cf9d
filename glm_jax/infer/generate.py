"""Generation with a static key-value cache: a compiled prefill, and a compiled decoding loop."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
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
from glm_jax.nn.layers import apart
from glm_jax.parallel.mesh import on_host, use_mesh_of


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


class Room(NamedTuple):
    """What the cache is like.

    Attributes:
      dtype: what keys and values are kept in; the model's own by default.
      length: slots, for prompt and answer together; as many as the buckets of both have by
        default. With one length for all calls decoding is compiled once.
    """

    dtype: Any = None
    length: int | None = None


ROOM = Room()


class Loop(NamedTuple):
    """Where decoding stands; `size` is the most tokens that there may be."""

    chosen: jax.Array  # tokens chosen so far
    last: jax.Array  # [batch] the newest
    tokens: jax.Array  # [batch, size] all of them
    lengths: jax.Array  # [batch]
    done: jax.Array  # [batch] bool
    seen: jax.Array | None  # [batch, vocabulary] bool, for the repetition penalty
    cache: Cache


class Prompt(NamedTuple):
    """What prefill and decoding take: the model, rows aligned at the right, cache and sizes.

    `graphdef` and `state` are the model as decoding takes it, its layers `apart` on a CPU. Prefill
    takes it in stacks: it is compiled anew for each length, and a loop over layers quickly.
    """

    model: Any
    graphdef: Any
    state: Any
    rows: np.ndarray  # [batch, length]
    mask: np.ndarray
    slots: int
    size: int
    cache_dtype: Any

    def prefill(self) -> tuple[jax.Array, Cache]:
        """The last position's logits `[batch, vocabulary]`, and the cache."""
        graphdef, state = nnx.split(self.model)
        return prefill(graphdef, state, self.rows, self.mask, slots=self.slots,
                       cache_dtype=self.cache_dtype, apart=graphdef != self.graphdef)

    def seen(self, vocabulary: int) -> jax.Array:
        """`[batch, vocabulary]` bool: the tokens of each row."""
        seen = np.zeros((len(self.rows), vocabulary), bool)
        row, column = np.nonzero(self.mask)
        seen[row, self.rows[row, column]] = True
        return jnp.asarray(seen)


def generate(model: Any, tokens: Array, attention_mask: Array | None = None, *,
             max_new_tokens: int, how: Sampling | None = None, stop_ids: Iterable[int] = (),
             pad_id: int = 0, seed: int = 0, room: Room = ROOM) -> Generation:
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
        a prompt without `<sop>` where the model needs one, or a cache that is too short.
    """
    *_, last = stream(model, tokens, attention_mask, every=max_new_tokens,
                      max_new_tokens=max_new_tokens, how=how, stop_ids=stop_ids, pad_id=pad_id,
                      seed=seed, room=room)
    return last


def stream(model: Any, tokens: Array, attention_mask: Array | None = None, *,
           max_new_tokens: int, how: Sampling | None = None, stop_ids: Iterable[int] = (),
           pad_id: int = 0, seed: int = 0, room: Room = ROOM, every: int = 1
           ) -> Iterator[Generation]:
    """As `generate`, giving all there is so far after every `every` tokens: the same in the end."""
    how = how or Sampling()
    prompt = make_prompt(model, tokens, attention_mask, max_new_tokens, room)
    stop = Stop(jnp.asarray(list(stop_ids), jnp.int32), jnp.int32(pad_id),
                jnp.int32(max_new_tokens))
    key = jax.random.key(seed)
    with use_mesh_of(prompt.state):
        logits, cache = prompt.prefill()
        seen = None if how.repetition_penalty is None else prompt.seen(logits.shape[-1])
        loop = begin(cache, logits, seen, how, stop, key, size=prompt.size)
    for until in range(every, max_new_tokens + every, every):
        with use_mesh_of(prompt.state):
            loop = decode(prompt.graphdef, prompt.state, loop, how, stop, key, jnp.int32(until))
        yield Generation(on_host(loop.tokens)[:, :max_new_tokens], on_host(loop.lengths))
        if on_host(loop.done).all():
            return


def make_prompt(model: Any, tokens: Array, attention_mask: Array | None, max_new_tokens: int,
                room: Room) -> Prompt:
    """Checks what a user gave (see `generate`), and chooses the buckets."""
    if model.head != "lm":
        raise UserError(f"generation needs a language-model head; this model's is {model.head!r}")
    if type(max_new_tokens) is not int or not 1 <= max_new_tokens < 2**30:
        raise UserError("max_new_tokens must be at least 1, a whole number, and below 2**30, "
                        f"not {max_new_tokens!r}")
    tokens, mask = check_tokens(model.config, tokens, attention_mask)
    longest = int(mask.sum(axis=1).max())
    width, size = bucket(longest), bucket(max_new_tokens)
    if room.length is not None:
        if longest + max_new_tokens > room.length:
            raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones don't fit "
                            f"into a cache of length {room.length}")
        width = min(width, room.length - max_new_tokens)
    rows, mask = _right_aligned(tokens, mask, width)
    if model.config.streams == 2:
        check_start(model.config, rows, mask, max_new_tokens)
    graphdef, state = nnx.split(apart(model))
    return Prompt(model, graphdef, state, rows, mask, room.length or width + size, size,
                  jnp.dtype(room.dtype or model.dtype))


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their mask `[batch, length]` int32, of rows that all end together."""
    longest = max(map(len, rows), default=0)
    tokens = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row):] = row
        mask[i, longest - len(row):] = 1
    return tokens, mask


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


def _right_aligned(tokens: np.ndarray, mask: np.ndarray, width: int
                   ) -> tuple[np.ndarray, np.ndarray]:
    """Every row's real tokens, in order, at the end of rows of `width`."""
    order = np.argsort(mask, axis=1, kind="stable")[:, -width:]
    tokens, mask = (np.take_along_axis(a, order, axis=1) for a in (tokens, mask))
    left = ((0, 0), (width - tokens.shape[1], 0))
    return np.pad(tokens * mask, left), np.pad(mask, left)


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "cache_dtype", "apart"))
def prefill(graphdef: Any, state: Any, tokens: jax.Array, mask: jax.Array, *, slots: int,
            cache_dtype: Any = None, apart: bool = False) -> tuple[jax.Array, Cache]:
    """Runs left-padded prompts: the last position's logits `[batch, vocabulary]`, and the cache.

    With `apart` each layer has keys and values of its own there, as a model has layers `apart`.
    """
    model = nnx.merge(graphdef, state)
    cache = empty_cache(model.config, tokens.shape[0], slots, cache_dtype or model.dtype)
    hidden, cache = model(as_batch(model.config, tokens, mask), cache)
    if apart:
        cache = dataclasses.replace(cache, keys=tuple(cache.keys), values=tuple(cache.values))
    return model.logits(hidden[:, -1]), cache


def step(model: Any, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """One more token `[batch]` for each row: the logits `[batch, vocabulary]` after it."""
    streams = cache.positions.shape[1]
    positions = cache.positions + (np.arange(streams) == streams - 1)  # only the last one counts
    here = jnp.ones_like(tokens)[:, None]
    batch = Batch(tokens[:, None], positions[:, :, None], here, here * cache.length)
    hidden, cache = model(batch, cache)
    return model.logits(hidden[:, -1]), cache


def _take(loop: Loop, logits: jax.Array, how: Sampling, stop: Stop, key: jax.Array) -> Loop:
    """The loop with one more token of each row, chosen from `logits [batch, vocabulary]`."""
    token = choose(logits, how, loop.seen, jax.random.fold_in(key, loop.chosen))
    token = jnp.where(loop.done, stop.pad, token)
    seen = loop.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    ended = jnp.any(token[:, None] == stop.ids, axis=1)
    return loop._replace(chosen=loop.chosen + 1, last=token,
                         tokens=loop.tokens.at[:, loop.chosen].set(token),
                         lengths=loop.lengths + ~loop.done, done=loop.done | ended, seen=seen)


@functools.partial(jax.jit, static_argnames="size", donate_argnames=("cache", "seen"))
def begin(cache: Cache, logits: jax.Array, seen: jax.Array | None, how: Sampling, stop: Stop,
          key: jax.Array, *, size: int) -> Loop:
    """The loop with its first token, which prefill's logits give."""
    batch = logits.shape[0]
    nothing = jnp.zeros(batch, jnp.int32)
    loop = Loop(jnp.int32(0), nothing, jnp.full((batch, size), stop.pad), nothing,
                jnp.zeros(batch, bool), seen, cache)
    return _take(loop, logits, how, stop, key)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="loop")
def decode(graphdef: Any, state: Any, loop: Loop, how: Sampling, stop: Stop, key: jax.Array,
           until: jax.Array) -> Loop:
    """Chooses tokens until there are `until`, or `stop.limit`, or every row has ended."""
    model = nnx.merge(graphdef, state)

    def body(loop: Loop) -> Loop:
        logits, cache = step(model, loop.last, loop.cache)
        return _take(loop._replace(cache=cache), logits, how, stop, key)

    limit = jnp.minimum(until, stop.limit)
    return jax.lax.while_loop(lambda loop: (loop.chosen < limit) & ~jnp.all(loop.done), body, loop)
