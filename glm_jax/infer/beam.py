"""Beam search, as Hugging Face's `generate(num_beams=…, do_sample=False)` does it."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.infer.generate import ROOM, Generation, Room, Stop, make_prompt, step
from glm_jax.infer.sampling import penalise
from glm_jax.nn.attention import Cache
from glm_jax.nn.batch import Array
from glm_jax.parallel.mesh import on_host, use_mesh_of

_NEVER = -1e9  # Hugging Face's score of what must not be chosen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """How beams are searched; the two penalties may change without a compilation.

    Attributes:
      width: how many there are.
      length_penalty: a finished beam's log-probability is divided by its length to this power.
      early_stopping: True ends when there are as many finished beams as beams; False when no
        running beam, were it as long as now, would be better; "never" looks as far as it may grow.
      repetition_penalty: see `Sampling`.
    """

    width: int = dataclasses.field(metadata={"static": True})
    length_penalty: float | jax.Array = 1.0
    early_stopping: bool | str = dataclasses.field(default=False, metadata={"static": True})
    repetition_penalty: float | jax.Array | None = None


class _Search(NamedTuple):
    length: jax.Array  # tokens of a running beam
    tokens: jax.Array  # [batch, beams, size] the running beams
    scores: jax.Array  # [batch, beams] their log-probabilities, the largest first
    origin: jax.Array  # [batch * beams] the cache's row that each continues
    ended: jax.Array  # [batch, beams, size] the best finished ones
    ended_scores: jax.Array  # [batch, beams]
    ended_lengths: jax.Array
    finished: jax.Array  # [batch, beams] bool, whether there is one
    open: jax.Array  # [batch] bool, whether a running one may still become better
    going: jax.Array  # bool
    seen: jax.Array | None  # [batch * beams, vocabulary] bool


def beam_search(model: Any, tokens: Array, attention_mask: Array | None = None, *,
                max_new_tokens: int, beams: Beams, stop_ids: Iterable[int] = (), pad_id: int = 0,
                room: Room = ROOM) -> tuple[Generation, np.ndarray]:
    """The best continuation of each row, and its score `[batch]` float32.

    Args, Raises: as of `generate`.
    """
    most = (2**31 - 1) // model.config.vocab_size  # what top_k can count
    if type(beams.width) is not int or not 1 <= beams.width <= most:
        raise UserError(f"num_beams must be at least 1, a whole number, and at most {most}, "
                        f"not {beams.width!r}")
    if isinstance(beams.length_penalty, bool) or not isinstance(beams.length_penalty, int | float):
        raise UserError(f"length_penalty must be a number, not {beams.length_penalty!r}")
    if beams.early_stopping not in (True, False, "never"):
        raise UserError("early_stopping must be true, false or 'never', not "
                        f"{beams.early_stopping!r}")
    prompt = make_prompt(model, tokens, attention_mask, max_new_tokens, room)
    stop = Stop(jnp.asarray(list(stop_ids), jnp.int32), jnp.int32(pad_id),
                jnp.int32(max_new_tokens))
    with use_mesh_of(prompt.state):
        logits, cache = prompt.prefill()
        seen = None if beams.repetition_penalty is None else prompt.seen(logits.shape[-1])
        out, lengths, scores = search(prompt.graphdef, prompt.state, cache, logits, seen, stop,
                                      beams, size=prompt.size)
        return (Generation(on_host(out)[:, :max_new_tokens], on_host(lengths)),
                on_host(scores))


@functools.partial(jax.jit, static_argnames=("graphdef", "size"))
def search(graphdef: Any, state: Any, cache: Cache, logits: jax.Array, seen: jax.Array | None,
           stop: Stop, beams: Beams, *, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best tokens `[batch, size]`, their number and score `[batch]`, after the prompts.

    Each prompt has been run once; here `beams.width` rows of the cache stand for its beams.
    """
    model = nnx.merge(graphdef, state)
    batch, vocabulary = logits.shape
    count, early, length_penalty = beams.width, beams.early_stopping, beams.length_penalty
    keep = min(max(2, 1 + len(stop.ids)) * count, count * vocabulary)

    def pick(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index[..., None] if x.ndim == 3 else index, axis=1)

    def select(now: _Search, logits: jax.Array) -> _Search:
        each = jax.nn.log_softmax(logits, axis=-1)
        if beams.repetition_penalty is not None:
            assert now.seen is not None
            each = penalise(each, now.seen, beams.repetition_penalty)
        total = (each.reshape(batch, count, vocabulary) + now.scores[..., None]).reshape(batch, -1)
        top, index = jax.lax.top_k(total, keep)
        beam, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
        tokens = pick(now.tokens, beam).at[:, :, now.length].set(token)
        length = now.length + 1
        hits = jnp.any(token[..., None] == stop.ids, axis=-1) | (length >= stop.limit)
        # A beam that has just ended runs on only where there are no others.
        scores, on = jax.lax.top_k(top + hits * _NEVER, count)
        origin = (pick(beam, on) + jnp.arange(batch)[:, None] * count).reshape(-1)
        seen = now.seen
        if seen is not None:
            seen = seen[origin].at[jnp.arange(batch * count), pick(token, on).reshape(-1)].set(True)
        # The best `count` of those finished before and now.
        new = hits & (jnp.arange(keep) < count)
        full = jnp.all(now.finished, axis=1, keepdims=True) & (early is True)
        barred = (~new).astype(jnp.float32) + full + ~now.open[:, None]
        scored = top / length.astype(jnp.float32) ** length_penalty + barred * _NEVER

        def merged(old: jax.Array, more: jax.Array) -> jax.Array:
            return pick(jnp.concatenate((old, more), axis=1), best)

        _, best = jax.lax.top_k(jnp.concatenate((now.ended_scores, scored), axis=1), count)
        ended_scores, finished = merged(now.ended_scores, scored), merged(now.finished, new)
        reach = stop.limit if early == "never" else length
        reach = jnp.where(length_penalty > 0, reach, length).astype(jnp.float32)
        worst = jnp.where(finished, jnp.min(ended_scores, axis=1, keepdims=True), _NEVER)
        still = now.open & jnp.any(scores[:, :1] / reach ** length_penalty > worst, axis=1)
        going = jnp.any(still) & ~(jnp.all(finished) & (early is True)) & ~jnp.all(hits)
        lengths = merged(now.ended_lengths, jnp.broadcast_to(length, hits.shape))
        return _Search(length, pick(tokens, on), scores, origin, merged(now.ended, tokens),
                       ended_scores, lengths, finished, still, going, seen)

    def body(carry: tuple[_Search, Cache]) -> tuple[_Search, Cache]:
        now, cache = carry
        last = jax.lax.dynamic_index_in_dim(now.tokens, now.length - 1, 2, keepdims=False)
        logits, cache = step(model, last.reshape(-1), cache.rows(now.origin))
        return select(now, logits), cache

    every = jnp.repeat(jnp.arange(batch), count)
    nothing = jnp.full((batch, count, size), stop.pad)
    first = jnp.broadcast_to(jnp.where(jnp.arange(count) == 0, 0, _NEVER), (batch, count))
    start = _Search(jnp.int32(0), nothing, first, every, nothing, jnp.full((batch, count), _NEVER),
                    jnp.zeros((batch, count), jnp.int32), jnp.zeros((batch, count), bool),
                    jnp.ones(batch, bool), jnp.bool_(True), None if seen is None else seen[every])
    now = select(start, logits[every])
    now, _ = jax.lax.while_loop(lambda carry: carry[0].going, body, (now, cache.rows(every)))
    return now.ended[:, 0], now.ended_lengths[:, 0], now.ended_scores[:, 0]
