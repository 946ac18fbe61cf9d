"""Fine-tune on questions and answers or whole chats: the loss is that of the answers alone."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.data.chat import encode_answers, unknown_tokens
from glm_jax.data.conversations import Conversation, load_conversations
from glm_jax.data.packing import Piece, Shape, once
from glm_jax.data.split import split
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError
from glm_jax.nn.batch import Batch
from glm_jax.nn.loss import cross_entropy
from glm_jax.tasks import Evaluation, Run, sizes
from glm_jax.tasks.metrics import perplexity


class Rows(NamedTuple):
    """Encoded conversations, as the packer reads them.

    Attributes:
      ids: of each row; the last is only a target.
      learned: which of them are targets.
    """

    ids: list[np.ndarray]
    learned: list[np.ndarray]

    def lengths(self, epoch: int) -> np.ndarray:
        return np.array([len(ids) - 1 for ids in self.ids])

    def piece(self, index: int, epoch: int) -> Piece:
        ids = self.ids[index]
        return Piece(ids[:-1], ids[1:], self.learned[index][1:].astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`config.task` for `name = "instruction"`; see configs/chat.py for its fields.

    Attributes:
      conversations: by split, train and dev.
      template: of `encode_answers`; none: that of the tokenizer.
      encoded: the rows of the splits that were asked for: templates take their time.
    """

    config: Any
    tokenizer: Tokenizer
    shape: Shape
    conversations: dict[str, list[Conversation]]
    template: str | None = None
    head: str = "lm"
    labels: tuple[str, ...] = ()
    final: str = "dev"
    metrics: tuple[str, ...] = ("loss", "perplexity")
    encoded: dict[str, Rows] = dataclasses.field(default_factory=dict)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @classmethod
    def load(cls, config: Any, tokenizer: Tokenizer, shape: Shape, chats: bool) -> "Instruction":
        """Reads the data that `config` names.

        Args:
          shape: of batches; a row takes as many examples as fit.
          chats: whether the model was trained to, so that its own template is the default.

        Raises:
          UserError: for bad files (see `load_conversations`), and conversations (see `encode`).
        """
        def load(source: str) -> dict[str, list[Conversation]]:
            return load_conversations(source, config.prompt, config.answer)
        template = config.template or ("chat" if chats else "plain")
        if config.template not in ("", "plain") and (unknown := unknown_tokens(tokenizer)):
            logging.warning("task.template=%s: the vocabulary has no %s, which the template "
                            "writes: it is spelled as plain text", template, ", ".join(unknown))
        task = cls(config, tokenizer, shape._replace(examples=shape.length),
                   split(load, config.train, {"dev": config.dev}),
                   None if template == "chat" else template)
        for name in task.conversations:  # what is wrong in any is told before training
            task.source(name)
        return task

    def fingerprint(self) -> str:
        """SHA-256 of every split's conversations."""
        splits = {name: [(row.messages, row.tools) for row in rows]
                  for name, rows in self.conversations.items()}
        return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()

    def about(self) -> str:
        return f"{sizes(self.conversations)} conversations"

    def encode(self, conversations: Sequence[Conversation], name: str = "") -> Rows:
        """Conversations as rows of at most `shape.length` tokens.

        One that is longer is cut behind its last answer that fits as a whole, and left out where
        none does; how many is logged.

        Raises:
          UserError: for a conversation that the template can't show, and where nothing is left.
        """
        rows, cut, out = Rows([], []), 0, 0
        for one in conversations:
            try:
                found = encode_answers(self.tokenizer, one.messages, one.tools, self.template)
            except UserError as error:
                raise UserError(f"{one.where}: {error}") from None
            for ids, learned in found:
                end = whole_answers(learned, self.shape.length + 1)
                cut, out = cut + (0 < end < len(ids)), out + (end == 0)
                if end:
                    rows.ids.append(np.asarray(ids[:end], np.int32))
                    rows.learned.append(np.asarray(learned[:end]))
        if cut or out:
            logging.warning("%s: of %d rows longer than batch.length=%d, %d are cut behind an "
                            "answer and %d, whose first answer does not fit, are left out",
                            name, cut + out, self.shape.length, cut, out)
        if not rows.ids:
            raise UserError(f"task.{name}: no row of at most batch.length={self.shape.length} "
                            "tokens has an answer to learn: raise it")
        return rows

    def source(self, split: str) -> Rows:
        if split not in self.encoded:
            self.encoded[split] = self.encode(self.conversations[split], split)
        return self.encoded[split]

    def loss(self, model: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Sum of the cross-entropies of the answers' tokens."""
        hidden, _ = model(batch, key=key)
        return cross_entropy(hidden, model.vocabulary_kernel(), jnp.asarray(batch.targets),
                             jnp.asarray(batch.weights), smoothing=self.config.label_smoothing)

    def predict(self, model: Any, batch: Batch) -> jax.Array:
        """The cross-entropy of a batch and the number of its answers' tokens, `[2]`."""
        hidden, weights = model(batch)[0], jnp.asarray(batch.weights)
        loss = cross_entropy(hidden, model.vocabulary_kernel(), jnp.asarray(batch.targets), weights)
        return jnp.stack([loss, jnp.sum(weights)])

    def evaluate(self, run: Run, split: str) -> Evaluation:
        """Loss and perplexity of a token of an answer."""
        batches = once(self.source(split), self.shape, self.pad_id)
        loss, weight = np.sum([np.asarray(run(batch)) for _, batch in batches], axis=0)
        return Evaluation({"loss": float(loss / weight),
                           "perplexity": perplexity(float(loss), float(weight))}, {})


def whole_answers(learned: Sequence[bool], longest: int) -> int:
    """Where the last answer ends that lies within `longest` ids as a whole; 0 without any."""
    ends = [n for n, (this, then) in enumerate(zip(learned, [*learned[1:], False], strict=True), 1)
            if this and not then and n <= longest]
    return ends[-1] if ends else 0
