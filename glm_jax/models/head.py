"""The head of the language models: tied to the embedding, of its own, or a classifier's."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.nn.batch import Batch
from glm_jax.nn.blocks import pooled


class Headed(nnx.Module):
    """A model with `embed_tokens`, and `lm_head` or `score` where it has one of its own."""

    head: str
    embed_tokens: Any
    lm_head: Any
    score: Any

    def vocabulary_kernel(self) -> jax.Array:
        """The language-model head's kernel `[hidden, vocabulary]`."""
        if hasattr(self, "lm_head"):
            return self.lm_head.kernel[...]
        return self.embed_tokens.embedding[...].T

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head on hidden states `[..., hidden] -> [..., vocabulary or labels]`, float32."""
        if self.head == "lm":
            return (hidden @ self.vocabulary_kernel().astype(hidden.dtype)).astype(jnp.float32)
        return self.score(hidden).astype(jnp.float32)

    def classify(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Logits `[batch, examples, labels]` float32 at the last token of each example."""
        return self.logits(pooled(self(batch, key=key)[0], batch))
