"""Language-model pre-training: packed text left to right, mixed with blank infilling as data."""

import hashlib
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
from glm_jax.nn.batch import Batch
from glm_jax.nn.loss import cross_entropy
from glm_jax.tasks import Evaluation, Run
from glm_jax.tasks.metrics import perplexity

SPECIAL = ("[MASK]", "[gMASK]", "<sop>", "<eop>", "<|endoftext|>")
LEFT_TO_RIGHT, CONTINUATION, INFILL = range(3)


class Texts:
    """The documents of a split, cut to rows; each epoch draws another objective for each."""

    def __init__(self, corpus: TokenCorpus, shape: Shape, special: Mapping[str, int],
                 mixture: tuple[float, float, float], seed: int):
        self.corpus, self.special, self.mixture, self.seed = corpus, dict(special), mixture, seed
        longest = int((shape.length - 3) / (1 + 2 * infill.RATIO / infill.SPAN + 0.01)) - 2
        if longest < 1:
            raise UserError(f"batch.length={shape.length} is too short for a text and its frame")
        counts = -(-np.asarray(corpus.lengths) // longest)
        self.document = np.repeat(np.arange(len(corpus.lengths)), counts)
        first = np.cumsum(counts) - counts
        self.start = (np.arange(len(self.document)) - first[self.document]) * longest
        self.size = np.minimum(corpus.lengths[self.document] - self.start, longest)
        self._drawn: tuple[int, np.ndarray] = -1, np.empty(0)

    def objectives(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, 1, epoch))
        drawn = rng.choice(3, size=len(self.size), p=np.array(self.mixture) / sum(self.mixture))
        return np.where(self.size < 8, LEFT_TO_RIGHT, drawn)

    def lengths(self, epoch: int) -> np.ndarray:
        # A text left to right has two more tokens, a continuation too, a masked text two a span.
        kinds = self.objectives(epoch)
        return self.size + np.where(kinds == INFILL, 2 * infill.span_count(self.size), 2)

    def piece(self, index: int, epoch: int) -> Piece:
        text = self.corpus[int(self.document[index])]
        start, size = int(self.start[index]), int(self.size[index])
        ends = start + size == len(text)
        text = np.asarray(text[start:start + size], np.int64)
        kind = self._kinds(epoch)[index]
        rng = np.random.default_rng((self.seed, 2, epoch, index))
        if kind == CONTINUATION:
            return infill.continuation(text, self.special, rng)
        if kind == INFILL:
            return infill.infill(text, self.special, rng)
        return infill.left_to_right(text, self.special, ends)

    def _kinds(self, epoch: int) -> np.ndarray:
        drawn = self._drawn  # once: another thread may be in another epoch
        if drawn[0] != epoch:
            self._drawn = drawn = epoch, self.objectives(epoch)
        return drawn[1]


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
        digest = hashlib.sha256()
        for split in ("train", "dev"):
            TokenCorpus(self.config.corpus, split)  # says what is wrong when it is not there
            for name in ("bin", "offsets.npy"):
                with open(Path(self.config.corpus) / f"{split}.{name}", "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def source(self, split: str) -> Texts:
        special = {name: self.tokenizer.token_id(name) for name in SPECIAL}
        mixture = tuple(self.config.mixture) if split == "train" else (1, 0, 0)
        if len(mixture) != 3 or min(mixture) < 0 or not sum(mixture):
            raise UserError(f"task.mixture={mixture}: three shares are wanted: "
                            "left to right, continuation, infilling")
        corpus = TokenCorpus(self.config.corpus, split)
        return Texts(corpus, self.shape, special, mixture, self.seed)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Sum of the weighted cross-entropies of the targets."""
        hidden, _ = model(batch, key=key)
        return cross_entropy(hidden, model.vocabulary_kernel(), jnp.asarray(batch.targets),
                             jnp.asarray(batch.weights))

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """The loss of a batch and its weight, `[2]`."""
        return jnp.stack([self.loss(model, batch, None), jnp.sum(jnp.asarray(batch.weights))])

    def evaluate(self, run: Run, split: str) -> Evaluation:
        """Loss and perplexity a token, of the split's text left to right."""
        batches = once(self.source(split), self.shape, self.pad_id)
        loss, weight = np.sum([np.asarray(run(batch)) for _, batch in batches], axis=0)
        return Evaluation({"loss": float(loss / weight),
                           "perplexity": perplexity(float(loss), float(weight))}, {})
