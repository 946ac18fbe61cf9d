"""Language-model pre-training: packed text left to right, mixed with blank infilling as data."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.data import infill
from glm_jax.data.corpus import TokenCorpus
from glm_jax.data.packing import Piece, Shape, once
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError
from glm_jax.files import sha256_of_all
from glm_jax.nn.batch import Batch
from glm_jax.nn.loss import cross_entropy
from glm_jax.tasks import Evaluation, Run, sizes
from glm_jax.tasks.metrics import perplexity

SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|endoftext|>")
LEFT_TO_RIGHT, CONTINUATION, INFILL, SUMMARY = range(4)


class Texts:
    """The documents of a split, cut to rows; each epoch draws another objective for each."""

    def __init__(self, corpus: TokenCorpus, shape: Shape, special: Mapping[str, int],
                 mixture: tuple[float, float, float], seed: int, summaries: float = 0.0):
        """`summaries`: the share of the documents with a teacher's vector that learn it."""
        self.corpus, self.special, self.mixture, self.seed = corpus, dict(special), mixture, seed
        self.summaries = summaries
        longest = int((shape.length - 3) / (1 + 2 * infill.RATIO / infill.SPAN + 0.01)) - 2
        if longest < 1:
            raise UserError(f"batch.length={shape.length} is too short for a text and its frame")
        counts = -(-np.asarray(corpus.lengths) // longest)
        self.document = np.repeat(np.arange(len(corpus.lengths)), counts)
        first = np.cumsum(counts) - counts
        self.start = (np.arange(len(self.document)) - first[self.document]) * longest
        self.size = np.minimum(corpus.lengths[self.document] - self.start, longest)
        self.objectives = functools.lru_cache(2)(self._objectives)  # threads may be an epoch apart
        if summaries:
            vectors, of = corpus.vectors()
            if vectors.shape[1] < shape.features:
                raise UserError(f"task.summaries: the teacher's vectors have {vectors.shape[1]} "
                                f"features, the model's hidden states {shape.features}")
            vectors = vectors[:, :shape.features]
            self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            self.vector_of = np.where(counts == 1, of, -1)[self.document]  # whole texts only

    def _objectives(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, 1, epoch))
        drawn = rng.choice(3, size=len(self.size), p=np.array(self.mixture) / sum(self.mixture))
        kinds = np.where(self.size < 8, LEFT_TO_RIGHT, drawn)
        if self.summaries:
            chosen = np.random.default_rng((self.seed, 3, epoch)).random(len(kinds))
            kinds[(chosen < self.summaries) & (self.vector_of >= 0)] = SUMMARY
        return kinds

    def lengths(self, epoch: int) -> np.ndarray:
        # A text left to right has two more tokens, a continuation too, a masked text two a span.
        kinds = self.objectives(epoch)
        added = np.where(kinds == INFILL, 2 * infill.span_count(self.size), 2)
        return self.size + added + (kinds == SUMMARY)

    def piece(self, index: int, epoch: int) -> Piece:
        text = self.corpus[int(self.document[index])]
        start, size = int(self.start[index]), int(self.size[index])
        ends = start + size == len(text)
        text = np.asarray(text[start:start + size], np.int64)
        kind = self.objectives(epoch)[index]
        rng = np.random.default_rng((self.seed, 2, epoch, index))
        if kind == CONTINUATION:
            return infill.continuation(text, self.special, rng)
        if kind == SUMMARY:
            return infill.summary(text, self.special, self.vectors[self.vector_of[index]])
        if kind == INFILL:
            return infill.infill(text, self.special, rng)
        return infill.left_to_right(text, self.special, ends)


class Pretrain(NamedTuple):
    """`config.task` for `name = "pretrain"`; see configs/pretrain.py for its fields."""

    config: Any
    tokenizer: Tokenizer
    shape: Shape
    seed: int
    head: str = "lm"
    labels: tuple[str, ...] = ()
    final: str = "dev"
    metrics: tuple[str, ...] = ("loss", "perplexity")

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def fingerprint(self) -> str:
        """SHA-256 of the tokens of both splits, and of where documents end."""
        files = ["bin", "offsets.npy"]
        files += ["vectors.npy", "vector_of.npy"] if self.config.summaries else []
        for split in ("train", "dev"):
            corpus = TokenCorpus(self.config.corpus, split)  # says what is wrong with it
            if self.config.summaries:
                corpus.vectors()
        return sha256_of_all(Path(self.config.corpus) / f"{split}.{name}"
                             for split in ("train", "dev") for name in files)

    def about(self) -> str:
        corpora = {split: TokenCorpus(self.config.corpus, split) for split in ("train", "dev")}
        return f"{sizes(corpora)} documents"

    def source(self, split: str) -> Texts:
        special = {name: self.tokenizer.token_id(name) for name in SPECIAL}
        mixture = tuple(self.config.mixture) if split == "train" else (1, 0, 0)
        if len(mixture) != 3 or min(mixture) < 0 or not sum(mixture):
            raise UserError(f"task.mixture={mixture}: three shares are wanted: "
                            "left to right, continuation, infilling")
        corpus = TokenCorpus(self.config.corpus, split)
        summaries = self.config.summaries if split == "train" else float(self.config.summaries > 0)
        return Texts(corpus, self.shape, special, mixture, self.seed, summaries)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Sum of the weighted cross-entropies of the targets, and of what summaries lack."""
        hidden, _ = model(batch, key=key)
        loss = cross_entropy(hidden, model.vocabulary_kernel(), jnp.asarray(batch.targets),
                             jnp.asarray(batch.weights), smoothing=self.config.label_smoothing)
        if batch.vectors is None:
            return loss
        lack = jnp.sum(jnp.asarray(batch.label_weights)) - cosines(hidden, batch)
        return loss + self.config.summary_weight * lack

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """Cross-entropy of a batch, its weight, and the same of cosines and summaries: `[4]`.

        Behind them the load of each expert of each layer, where the model has any.
        """
        hidden, load = (model.with_expert_load(batch) if hasattr(model, "with_expert_load")
                        else (model(batch)[0], None))
        weights = jnp.asarray(batch.weights)
        loss = cross_entropy(hidden, model.vocabulary_kernel(), jnp.asarray(batch.targets), weights)
        count = jnp.float32(0) if batch.vectors is None else jnp.sum(
            jnp.asarray(batch.label_weights))
        cosine = jnp.float32(0) if batch.vectors is None else cosines(hidden, batch)
        return jnp.concatenate([jnp.stack([loss, jnp.sum(weights), cosine, count]),
                                jnp.zeros(0) if load is None else load.ravel()])

    def evaluate(self, run: Run, split: str) -> Evaluation:
        """Loss and perplexity a token, of the split's text left to right; the mean cosine.

        And `expert_load`: the busiest expert's tokens, beside an even share of its layer's.
        """
        batches = once(self.source(split), self.shape, self.pad_id)
        loss, weight, cosine, count, *load = np.sum(
            [np.asarray(run(batch)) for _, batch in batches], axis=0)
        metrics = {"loss": float(loss / weight),
                   "perplexity": perplexity(float(loss), float(weight))}
        metrics |= {"cosine": float(cosine / count)} if count else {}
        metrics |= {"expert_load": float(np.max(load) / np.mean(load))} if load else {}
        return Evaluation(metrics, {})


def cosines(hidden: jax.Array, batch: Batch) -> jax.Array:
    """The sum of the cosines of pooled hidden states and their vectors (of length 1), float32.

    Args:
      hidden: `[batch, length, hidden]`.
    """
    pooled = jnp.take_along_axis(hidden, jnp.asarray(batch.pool_index)[..., None], axis=1)
    pooled = pooled.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(pooled * pooled, axis=-1) + 1e-12)
    cosine = jnp.sum(pooled * jnp.asarray(batch.vectors), axis=-1) / norm
    return jnp.sum(cosine * jnp.asarray(batch.label_weights))
