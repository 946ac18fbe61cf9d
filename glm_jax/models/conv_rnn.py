"""The baseline of the field's tutorials: embedding, convolution, LSTM, attention, output.

Trained from scratch, on rows that hold one example each; no released checkpoint has it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.models.config import Config
from glm_jax.models.weights import Weight
from glm_jax.nn.batch import Batch
from glm_jax.nn.layers import Embedding, Linear
from glm_jax.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True)
class ConvRNNConfig(Config):
    """Sizes of the layers; `kernel_size` is the convolution's width in tokens."""

    model_type: str = "conv_rnn"
    vocab_size: int = 16384
    hidden_size: int = 128
    kernel_size: int = 3
    rnn_size: int = 128
    dropout: float = 0.3
    pad_token_id: int = 0


class ConvRNN(nnx.Module):
    """Classifies each row of a batch as one example."""

    def __init__(self, config: ConvRNNConfig, head: str = "sequence", dtype: Any = jnp.float32, *,
                 rngs: nnx.Rngs):
        self.config, self.head, self.dtype = config, head, dtype
        hidden, rnn = config.hidden_size, config.rnn_size
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=0.1, rngs=rngs)
        self.convolution = Linear(config.kernel_size * hidden, hidden, ("embed", "mlp"), bias=True,
                                  std=(config.kernel_size * hidden) ** -0.5, rngs=rngs)
        self.lstm = Linear(hidden + rnn, 4 * rnn, ("embed", "mlp"), bias=True,
                           std=(hidden + rnn) ** -0.5, rngs=rngs)
        self.attention = Linear(rnn, 1, ("embed", "labels"), std=rnn ** -0.5, rngs=rngs)
        self.score = Linear(rnn, config.num_labels, ("embed", "labels"), bias=True,
                            std=rnn ** -0.5, rngs=rngs)

    def classify(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Logits `[batch, 1, labels]` float32."""
        real = jnp.asarray(batch.segments) > 0
        x = constrain(self.embed_tokens(jnp.asarray(batch.tokens), self.dtype),
                      "batch", "length", None) * real[..., None]
        keys = (None, None) if key is None else jax.random.split(key)
        x = self._drop(x, keys[0])
        left = (self.config.kernel_size - 1) // 2
        padded = jnp.pad(x, ((0, 0), (left, self.config.kernel_size - 1 - left), (0, 0)))
        windows = [padded[:, i:i + x.shape[1]] for i in range(self.config.kernel_size)]
        x = jax.nn.relu(self.convolution(jnp.concatenate(windows, axis=-1)))
        states = self._recur(x)
        scores = jnp.where(real, self.attention(jnp.tanh(states))[..., 0], -1e30)
        pooled = jnp.einsum("bl,bld->bd", jax.nn.softmax(scores), states)
        return self.score(self._drop(pooled, keys[1]))[:, None].astype(jnp.float32)

    def _recur(self, x: jax.Array) -> jax.Array:
        """An LSTM (Hochreiter and Schmidhuber 1997) over `[batch, length, hidden]`."""
        size = self.config.rnn_size
        kernel, bias = self.lstm.kernel[...].astype(x.dtype), self.lstm.bias[...].astype(x.dtype)
        into = x @ kernel[:-size] + bias  # the inputs' part, for all steps at once

        def step(carry: Any, into: jax.Array) -> tuple[Any, jax.Array]:
            h, c = carry
            i, f, o, g = jnp.split(into + h @ kernel[-size:], 4, axis=-1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros((x.shape[0], size), x.dtype)
        return jax.lax.scan(step, (zero, zero), into.swapaxes(0, 1))[1].swapaxes(0, 1)

    def _drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is None or not self.config.dropout:
            return x
        keep = 1 - self.config.dropout
        return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)


def weights(config: ConvRNNConfig, head: str) -> list[Weight]:
    """No released checkpoint has this architecture."""
    return []
