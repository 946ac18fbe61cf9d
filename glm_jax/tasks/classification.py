"""Classify texts: sentiment, topics, any file with a text and a label column."""

import functools
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.data.packing import Piece, Shape
from glm_jax.data.records import Example
from glm_jax.data.split import load_splits
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError
from glm_jax.nn.batch import Batch
from glm_jax.nn.loss import classification_loss
from glm_jax.tasks import Evaluation, Run, each, sizes
from glm_jax.tasks.metrics import classification_metrics

SHOWN = 10  # labels in a message, at most
# What to do about a label that training does not have: in a file of its own, and in a split of one.
MEND = "Mend the label, leave the row out, or train on rows of that class too"
NOT_FINITE = ("the model's probabilities are not finite: its training went wrong, or its weights "
              "are damaged; take another checkpoint or model")
CUT = ("No row of that class fell into train when the data was split. Mend the label if it is "
       "misspelt, give more rows of it, or name files: --config.task.dev=FILE "
       "--config.task.test=FILE")


class Texts(NamedTuple):
    """Tokenised examples, as the packer reads them.

    Attributes:
      word_dropout: of an example's tokens, its number and the epoch: what is read instead.
    """

    tokens: list[np.ndarray]
    labels: list[int]
    class_weights: Sequence[float]
    word_dropout: Callable[[np.ndarray, int, int], np.ndarray] | None = None

    def lengths(self, epoch: int) -> np.ndarray:
        return np.array([len(t) for t in self.tokens])

    def piece(self, index: int, epoch: int) -> Piece:
        label = self.labels[index]
        tokens = self.tokens[index]
        if self.word_dropout is not None:
            tokens = self.word_dropout(tokens, index, epoch)
        return Piece(tokens, label=label, label_weight=self.class_weights[label])


class Classification(NamedTuple):
    """`config.task` for `name = "classification"`; see configs/sentiment.py for its fields.

    Attributes:
      examples: by split.
      labels: the classes as they are written, sorted; their place is their number.
      class_weights: one a class; what an example's loss counts in training.
    """

    config: Any
    tokenizer: Tokenizer
    shape: Shape
    examples: dict[str, list[Example]]
    labels: tuple[str, ...]
    class_weights: tuple[float, ...]
    seed: int = 0
    head: str = "sequence"
    final: str = "test"
    metrics: tuple[str, ...] = ("accuracy", "f1", "loss")

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @classmethod
    def load(cls, config: Any, tokenizer: Tokenizer, shape: Shape, seed: int = 0
             ) -> "Classification":
        """Reads the data that `config` names.

        Raises:
          UserError: for bad files (see `load_splits`), a single class, a label that training
            does not have, or class weights that don't fit.
        """
        examples = load_splits(config.train, config.dev, config.test,
                               text_field=config.text, label_field=config.label)
        counts = Counter(example.label for example in examples["train"])
        labels = tuple(sorted(counts))
        if len(labels) < 2:
            raise UserError(f"task.train={config.train}: every row has the label {labels[0]!r}; "
                            f"is {config.label!r} the label column?")
        if len(labels) > max(SHOWN, 0.9 * len(examples["train"])):
            raise UserError(f"task.train={config.train}: its {len(examples['train'])} training "
                            f"rows have {len(labels)} different labels; is {config.label!r} the "
                            "label column? Name it with --config.task.label=NAME")
        if not 0 <= config.word_dropout < 1:
            raise UserError(f"task.word_dropout={config.word_dropout}: a share from 0 to below 1 "
                            "is wanted")
        for split, rows in examples.items():
            check_labels(rows, labels, split, CUT if not config.get(split) else MEND)
        return cls(config, tokenizer, shape, examples, labels,
                   weigh_classes(tuple(config.class_weights), counts), seed)

    def fingerprint(self) -> str:
        """SHA-256 of every split's texts and labels."""
        splits = {split: [(row.text, row.label) for row in rows]
                  for split, rows in self.examples.items()}
        return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()

    def about(self) -> str:
        return f"{sizes(self.examples)} rows; classes: {shown(self.labels)}"

    def encode(self, texts: Sequence[str], name: str = "texts") -> list[np.ndarray]:
        """Token ids, framed and cut to a row: what Hugging Face's tokenizer gives.

        How many are cut is logged, once of each `name`.
        """
        framed, length = self.tokenizer.encode_batch(list(texts)), self.shape.length
        if cut := sum(len(ids) > length for ids in framed):
            _log_cut(name, cut, len(framed), length)
        return [np.asarray(ids, np.int32) for ids in self.tokenizer.cut(framed, length)]

    def texts(self, rows: Sequence[Example], name: str = "texts") -> Texts:
        number = {label: i for i, label in enumerate(self.labels)}
        return Texts(self.encode([row.text for row in rows], name),
                     [number.get(row.label, 0) for row in rows], (1.0,) * len(self.labels))

    def source(self, split: str) -> Texts:
        texts = self.texts(self.examples[split], split)
        if split != "train":
            return texts
        texts = texts._replace(class_weights=self.class_weights)
        rate = self.config.word_dropout
        if not rate:
            return texts
        mask, frame = np.int32(self.tokenizer.mask_id), self.tokenizer.encode("")

        def hide(tokens: np.ndarray, index: int, epoch: int) -> np.ndarray:
            """A share of a text's tokens becomes [MASK] (Iyyer et al. 2015), never its frame."""
            rng = np.random.default_rng((self.seed, 3, epoch, index))
            hidden = (rng.random(len(tokens)) < rate) & ~np.isin(tokens, frame)
            return np.where(hidden, mask, tokens)

        return texts._replace(word_dropout=hide)

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Sum over examples of weight * cross-entropy, at each example's last token."""
        return classification_loss(model.classify(batch, key), jnp.asarray(batch.labels),
                                   jnp.asarray(batch.label_weights), self.config.label_smoothing)

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """Class probabilities `[batch, examples, labels]`."""
        return jax.nn.softmax(model.classify(batch, None))

    def evaluate(self, run: Run, split: str) -> Evaluation:
        """Accuracy, macro F1 and mean loss; for the report also classes, confusion and rows."""
        return self.score(run, self.examples[split], split)

    def probabilities(self, run: Run, texts: Sequence[str]) -> np.ndarray:
        """Class probabilities of any texts, `[texts, labels]`.

        Raises:
          UserError: when one is NaN.
        """
        rows = self.texts([Example(text, "", "") for text in texts])
        found = each(run, rows, self.shape, self.pad_id)
        if not np.isfinite(found).all():
            raise UserError(NOT_FINITE)
        return found

    def score(self, run: Run, examples: Sequence[Example], name: str = "texts") -> Evaluation:
        """`evaluate` on any labelled examples."""
        texts = self.texts(examples, name)
        probabilities = each(run, texts, self.shape, self.pad_id)
        truth = np.array(texts.labels)
        losses = -np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-30))
        result = classification_metrics(truth, probabilities.argmax(1), self.labels, losses)
        rows = [{"text": example.text, "label": example.label, "where": example.where,
                 "predicted": self.labels[p.argmax()], "probability": float(p.max()),
                 "probabilities": [float(x) for x in p]}
                for example, p in zip(examples, probabilities, strict=True)]
        return Evaluation({name: result[name] for name in self.metrics}, {**result, "rows": rows})


@functools.cache  # dev is encoded for each evaluation
def _log_cut(name: str, cut: int, rows: int, length: int) -> None:
    logging.warning("%s: %d of %d are longer than batch.length=%d tokens; the rest of each is cut "
                    "off", name, cut, rows, length)


def weigh_classes(weights: tuple[Any, ...], counts: Mapping[str, int]) -> tuple[float, ...]:
    """What an example of each class counts, the classes sorted: `task.class_weights` as numbers.

    Raises:
      UserError: unless there is one positive number a class, or nothing, or "balanced".
    """
    labels = sorted(counts)
    if weights == ("balanced",):
        total = sum(counts.values())
        return tuple(total / (len(labels) * counts[label]) for label in labels)
    if not weights:
        return (1.0,) * len(labels)
    if len(weights) != len(labels) or not all(
            isinstance(w, int | float) and 0 < w < math.inf for w in weights):
        raise UserError(f"task.class_weights={shown(weights)}: one positive number "
                        f"for each of the {len(labels)} classes is wanted ({shown(labels)}), "
                        "or balanced")
    return tuple(map(float, weights))


def shown(values: Sequence[Any]) -> str:
    """The first few of many, for a message: "a, b, … and 90 more"."""
    more = len(values) - SHOWN
    return ", ".join(map(str, values[:SHOWN])) + (f", … and {more} more" if more > 0 else "")


def check_labels(rows: Sequence[Example], labels: Sequence[str], split: str,
                 advice: str = MEND) -> None:
    """Raises a UserError at the first row with another label; warns of labels that no row has."""
    for row in rows:
        if row.label not in labels:
            raise UserError(f"{row.where}: label {row.label!r} in {split} does not occur in "
                            f"training, which has {shown(labels)}. {advice}")
    if absent := sorted(set(labels) - {row.label for row in rows}):
        logging.warning("%s: it has no row of %s; macro F1 counts 0 for such a class where it is "
                        "predicted", split, shown(absent))
