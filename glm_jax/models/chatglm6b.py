"""ChatGLM-6B, the first one (`model_type: chatglm` with `position_encoding_2d`).

A context that sees itself both ways, then causal; each head is rotated half by a token's position
and half by its place behind `<sop>`; layers take their residuals from a LayerNorm's output.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.models.config import MultiHeadConfig
from glm_jax.models.head import Headed
from glm_jax.models.weights import Weight, linear, transformer
from glm_jax.nn.attention import Cache, Mask
from glm_jax.nn.batch import Array, Batch, blank_batch
from glm_jax.nn.blocks import MLP, Keys, SelfAttention, run
from glm_jax.nn.compute import Compute
from glm_jax.nn.layers import Embedding, LayerNorm, Linear, gelu_tanh, stack
from glm_jax.nn.rotary import rotate_halves
from glm_jax.parallel.mesh import constrain

# The release of March 2023 has 20,000 tokens for images in front, and a config without these.
FIRST_VOCABULARY, FIRST_IDS = 150528, {
    "bos_token_id": 150004, "eos_token_id": 150005, "mask_token_id": 150000,
    "gmask_token_id": 150001, "pad_token_id": 20003}


@dataclasses.dataclass(frozen=True)
class ChatGLM6BConfig(MultiHeadConfig):
    """Fields of the released `config.json`, and defaults for its vocabulary of 130,528.

    Attributes:
      alpha_layers: residuals are scaled by sqrt(2 * alpha_layers); `num_layers` by default. The
        released code has 28 there whatever the number of layers.
    """

    model_type: str = "chatglm"
    vocab_size: int = 130528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    bos_token_id: int = 130004
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pad_token_id: int | None = 3
    initializer_range: float = 0.02
    alpha_layers: int | None = None

    supported: ClassVar = {"position_encoding_2d": (True,), "pre_seq_len": (None,),
                           "tie_word_embeddings": (True,)}
    streams: ClassVar = 2
    max_position_embeddings = property(lambda self: self.max_sequence_length)
    num_hidden_layers = property(lambda self: self.num_layers)
    start_token_id = property(lambda self: self.bos_token_id)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        first = FIRST_IDS if raw.get("vocab_size") == FIRST_VOCABULARY else {}
        return super().from_dict({**first, **raw})

    @property
    def alpha(self) -> float:
        return math.sqrt(2 * (self.alpha_layers or self.num_layers))


def inverse_frequencies(config: ChatGLM6BConfig) -> np.ndarray:
    """`[head_dim / 4]` float16: the released code rounds them, whatever it computes in."""
    dim = config.head_dim // 2
    return (1 / 10000 ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float16)


def rotary_table(positions: Array, frequencies: np.ndarray, dtype: Any
                 ) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[batch, length, head_dim / 4]` of one stream `[batch, length]`.

    A float16 model has its angles rounded to float16 too, as it was trained; others have not.
    """
    wide = jnp.float16 if dtype == jnp.float16 else jnp.float32
    angles = jnp.asarray(positions).astype(wide)[..., None] * frequencies.astype(wide)
    angles = angles.astype(jnp.float32)
    return jnp.cos(angles).astype(wide), jnp.sin(angles).astype(wide)


class Layer(nnx.Module):
    def __init__(self, config: ChatGLM6BConfig, rngs: nnx.Rngs):
        self.alpha = config.alpha
        hidden, std, eps = config.hidden_size, config.initializer_range, config.layernorm_epsilon
        self.input_layernorm = LayerNorm(hidden, eps)
        self.self_attn = SelfAttention(hidden, config.num_attention_heads, std, rngs)
        self.post_attention_layernorm = LayerNorm(hidden, eps)
        self.mlp = MLP(hidden, config.inner_hidden_size, gelu_tanh, std, rngs)

    def __call__(self, x: jax.Array, mask: Mask, kv: Any, start: Any, keys: Keys, tables: Any
                 ) -> tuple[jax.Array, Any]:
        def turn(y: jax.Array) -> jax.Array:
            halves = jnp.split(y, 2, axis=-1)
            return jnp.concatenate([rotate_halves(half, *table) for half, table
                                    in zip(halves, tables, strict=True)], axis=-1)

        x = self.input_layernorm(x)
        attended, kv = self.self_attn(x, mask, kv, start, keys[:4], turn)
        x = self.post_attention_layernorm(self.alpha * x + attended)
        return self.alpha * x + self.mlp(x, keys[4:]), kv


class ChatGLM6B(Headed):
    """The decoder and one head.

    Args:
      config: the architecture.
      head: `"lm"` (language model, tied to the embedding), `"sequence"` or `"token"`
        (classification; there is no released class for these: as of `Glm`).
    """

    def __init__(self, config: ChatGLM6BConfig, head: str = "lm", dtype: Any = jnp.float32, *,
                 rngs: nnx.Rngs):
        self.config, self.head, self.dtype = config, head, dtype
        self.compute = Compute()
        hidden, std = config.hidden_size, config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=std, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, rngs), config.num_layers, rngs)
        self.norm = LayerNorm(hidden, config.layernorm_epsilon)
        if head != "lm":
            self.score = Linear(hidden, config.num_labels, ("embed", "labels"),
                                bias=head == "token", std=std, rngs=rngs)

    def __call__(self, batch: Batch, cache: Cache | None = None, key: jax.Array | None = None
                 ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the last norm, `[batch, length, hidden]`; see `nn.blocks.run`."""
        frequencies, positions = inverse_frequencies(self.config), jnp.asarray(batch.positions)
        tables = [rotary_table(positions[:, n], frequencies, self.dtype) for n in range(2)]
        x = constrain(self.embed_tokens(jnp.asarray(batch.tokens), self.dtype),
                      "batch", "length", None)
        x, cache = run(self.layers, self.compute, x, batch, cache, key, tables)
        return self.norm(x), cache


def as_batch(config: ChatGLM6BConfig, tokens: Array, attention_mask: Array | None = None) -> Batch:
    """The batch of `context [gMASK] <sop> answer`; see `blank_batch`.

    The blank is the first [gMASK], or [MASK] where there is none. Without `<sop>` all is context.
    """
    return blank_batch(tokens, attention_mask, config.bos_token_id,
                       ((config.gmask_token_id,), (config.mask_token_id,)), unstarted=True)


def weights(config: ChatGLM6BConfig, head: str) -> list[Weight]:
    """The released names of every parameter of `ChatGLM6B(config, head)`."""
    rows = [Weight("transformer.word_embeddings.weight", "embed_tokens.embedding"),
            Weight("transformer.layers.{}.attention.rotary_emb.inv_freq", (),
                   constant=lambda _: inverse_frequencies(config)),
            *transformer(heads=config.num_attention_heads)]
    if head == "lm":
        return [*rows, Weight("lm_head.weight", "embed_tokens.embedding", copy=True)]
    return rows + linear("score", "score", bias=head == "token")
