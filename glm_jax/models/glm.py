"""GLM-4-9B as Hugging Face names it (`model_type: glm`), and GLM-Edge: a causal decoder.

RMSNorm, rotary in adjacent pairs on part of each head, grouped-query attention, packed SwiGLU.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.models.config import Config
from glm_jax.models.weights import Weight, linear
from glm_jax.nn.attention import Cache, attention
from glm_jax.nn.batch import Array, Batch, visible
from glm_jax.nn.layers import Embedding, Linear, RMSNorm, scan, stack, swiglu
from glm_jax.nn.rotary import rotary_table, rotate_interleaved
from glm_jax.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True)
class GlmConfig(Config):
    """Fields and defaults of the released `config.json`."""

    model_type: str = "glm"
    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    hidden_act: str = "silu"
    attention_bias: bool = True
    attention_dropout: float = 0.0
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-07
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = 151329

    supported: ClassVar = {"hidden_act": ("silu",), "attention_dropout": (0.0,),
                           "rope_scaling": (None,)}


class Attention(nnx.Module):
    def __init__(self, config: GlmConfig, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        hidden, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        into, out, bias = ("embed", "heads"), ("heads", "embed"), config.attention_bias
        self.q_proj = Linear(hidden, queries, into, bias=bias, std=std, rngs=rngs)
        self.k_proj = Linear(hidden, keys, into, bias=bias, std=std, rngs=rngs)
        self.v_proj = Linear(hidden, keys, into, bias=bias, std=std, rngs=rngs)
        self.o_proj = Linear(queries, hidden, out, std=std, rngs=rngs)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], mask: Array,
                 cache: tuple[jax.Array, jax.Array] | None, start: jax.Array | int,
                 keys: list[jax.Array | None]) -> tuple[jax.Array, Any]:
        """`[batch, length, hidden]`, and the layer's keys and values, those of `cache` included."""
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query = rotate_interleaved(heads(self.q_proj(x, keys[0])), *rotary)
        key = rotate_interleaved(heads(self.k_proj(x, keys[1])), *rotary)
        value = heads(self.v_proj(x, keys[2]))
        if cache is not None:
            key, value = (jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0))
                          for old, new in zip(cache, (key, value), strict=True))
        out = attention(query, key.astype(x.dtype), value.astype(x.dtype), mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys[3]), (key, value)


class MLP(nnx.Module):
    def __init__(self, config: GlmConfig, rngs: nnx.Rngs):
        hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.gate_up_proj = Linear(hidden, 2 * inner, ("embed", "mlp"), std=std, rngs=rngs)
        self.down_proj = Linear(inner, hidden, ("mlp", "embed"), std=std, rngs=rngs)

    def __call__(self, x: jax.Array, keys: list[jax.Array | None]) -> jax.Array:
        return self.down_proj(swiglu(self.gate_up_proj(x, keys[0])), keys[1])


class Layer(nnx.Module):
    def __init__(self, config: GlmConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], mask: Array,
                 cache: tuple[jax.Array, jax.Array] | None = None, start: jax.Array | int = 0,
                 key: jax.Array | None = None) -> tuple[jax.Array, Any]:
        x = constrain(x, "batch", "length", None)
        keys = [None] * 6 if key is None else list(jax.random.split(key, 6))
        attended, kv = self.self_attn(self.input_layernorm(x), rotary, mask, cache, start, keys[:4])
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x), keys[4:])
        return constrain(x, "batch", "length", None), kv


class Glm(nnx.Module):
    """The decoder and one head.

    Args:
      config: the architecture.
      head: `"lm"` (language model), `"sequence"` or `"token"` (classification into
        `config.num_labels` classes), as Hugging Face builds each of them.
    """

    def __init__(self, config: GlmConfig, head: str = "lm", dtype: Any = jnp.float32, *,
                 rngs: nnx.Rngs):
        self.config, self.head, self.dtype = config, head, dtype
        hidden, std = config.hidden_size, config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=std, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        if head == "lm" and not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, config.vocab_size, ("embed", "vocab"), std=std, rngs=rngs)
        elif head in ("sequence", "token"):
            self.score = Linear(hidden, config.num_labels, ("embed", "labels"),
                                bias=head == "token", std=std, rngs=rngs)

    def __call__(self, batch: Batch, cache: Cache | None = None, key: jax.Array | None = None
                 ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the last norm, `[batch, length, hidden]`.

        Args:
          batch: the tokens; with a cache, those that follow what it holds.
          cache: keys and values so far; the one returned holds this batch's too.
          key: for the adapters' dropout; none without.
        """
        config = self.config
        x = constrain(self.embed_tokens(jnp.asarray(batch.tokens), self.dtype),
                      "batch", "length", None)
        rotated = int(config.head_dim * config.partial_rotary_factor)
        rotary = rotary_table(jnp.asarray(batch.positions)[:, 0], rotated, config.rope_theta)
        keys = None if key is None else jax.random.split(key, config.num_hidden_layers)
        seen = batch if cache is None else cache.extend(batch)
        start = 0 if cache is None else cache.length
        mask = visible(batch.segments, batch.order, seen.segments, seen.order)

        def call(layer: Layer, x: jax.Array, kv: Any, key: Any) -> tuple[jax.Array, Any]:
            x, kv = layer(x, rotary, mask, kv, start, key)
            return x, None if cache is None else kv

        kv = None if cache is None else (cache.keys, cache.values)
        x, kv = scan(self.layers, call, x, kv, keys, unroll=cache is None)
        if isinstance(seen, Batch):
            return self.norm(x), None
        length = seen.length + batch.tokens.shape[1]
        return self.norm(x), dataclasses.replace(seen, keys=kv[0], values=kv[1], length=length)

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
        hidden, _ = self(batch, key=key)
        pooled = jnp.take_along_axis(hidden, jnp.asarray(batch.pool_index)[..., None], axis=1)
        return self.logits(pooled)


def weights(config: GlmConfig, head: str) -> list[Weight]:
    """The released names of every parameter of `Glm(config, head)`."""
    attn, bias = "layers.{}.self_attn", config.attention_bias
    rows = [
        Weight("model.embed_tokens.weight", "embed_tokens.embedding"),
        Weight("model.norm.weight", "norm.scale"),
        Weight("model.layers.{}.input_layernorm.weight", "layers.input_layernorm.scale"),
        Weight("model.layers.{}.post_attention_layernorm.weight",
               "layers.post_attention_layernorm.scale"),
    ]
    for name in ("q_proj", "k_proj", "v_proj"):
        rows += linear(f"model.{attn}.{name}", f"layers.self_attn.{name}", bias)
    rows += linear(f"model.{attn}.o_proj", "layers.self_attn.o_proj")
    for name in ("gate_up_proj", "down_proj"):
        rows += linear("model.layers.{}.mlp." + name, f"layers.mlp.{name}")
    if head == "lm" and not config.tie_word_embeddings:
        rows += linear("lm_head", "lm_head")
    elif head in ("sequence", "token"):
        rows += linear("score", "score", bias=head == "token")
    return rows
