"""BERT (Devlin et al. 2019, arXiv:1810.04805; `model_type: bert`): a bidirectional encoder.

Layer norms behind each residual, learned positions, token types, GELU with the error function.
The released dropout rates are kept in the config and not applied.
"""

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.models.config import MultiHeadConfig
from glm_jax.models.weights import Weight, linear, norm
from glm_jax.nn.attention import Cache, Mask
from glm_jax.nn.batch import Array, Batch, bidirectional_batch
from glm_jax.nn.blocks import MLP, Keys, SelfAttention, pooled, run
from glm_jax.nn.compute import Compute
from glm_jax.nn.layers import Embedding, LayerNorm, Linear, gelu, stack
from glm_jax.parallel.mesh import constrain

# What each head is called in transformers.
CLASSES = {"base": "BertModel", "mlm": "BertForMaskedLM",
           "sequence": "BertForSequenceClassification", "token": "BertForTokenClassification",
           "qa": "BertForQuestionAnswering"}


@dataclasses.dataclass(frozen=True)
class BertConfig(MultiHeadConfig):
    """Fields and defaults of the released `config.json`."""

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0

    supported: ClassVar = {
        "hidden_act": ("gelu",), "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None), "add_cross_attention": (False, None),
        "tie_word_embeddings": (True,)}


class Layer(nnx.Module):
    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        hidden, std = config.hidden_size, config.initializer_range
        self.self_attn = SelfAttention(hidden, config.num_attention_heads, std, rngs)
        self.attention_layernorm = LayerNorm(hidden, config.layer_norm_eps)
        self.mlp = MLP(hidden, config.intermediate_size, gelu, std, rngs)
        self.output_layernorm = LayerNorm(hidden, config.layer_norm_eps)

    def __call__(self, x: jax.Array, mask: Mask, kv: Any, start: Any, keys: Keys
                 ) -> tuple[jax.Array, Any]:
        attended, kv = self.self_attn(x, mask, kv, start, keys[:4])
        x = self.attention_layernorm(x + attended)
        return self.output_layernorm(x + self.mlp(x, keys[4:])), kv


class Bert(nnx.Module):
    """The encoder and one head.

    Args:
      config: the architecture.
      head: one of `CLASSES`, as Hugging Face builds each of them: `"base"` (none), `"mlm"`
        (masked language model), `"sequence"`, `"token"` or `"qa"` (start and end of an answer).
    """

    def __init__(self, config: BertConfig, head: str = "base", dtype: Any = jnp.float32, *,
                 rngs: nnx.Rngs):
        self.config, self.head, self.dtype = config, head, dtype
        self.compute = Compute()
        hidden, std, eps = config.hidden_size, config.initializer_range, config.layer_norm_eps
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=std, rngs=rngs)
        self.embed_positions = Embedding(config.max_position_embeddings, hidden, std=std, rngs=rngs)
        self.embed_types = Embedding(config.type_vocab_size, hidden, std=std, rngs=rngs)
        self.embed_layernorm = LayerNorm(hidden, eps)
        self.layers = stack(lambda rngs: Layer(config, rngs), config.num_hidden_layers, rngs)
        if head in ("base", "sequence"):
            self.pooler = Linear(hidden, hidden, ("embed", "mlp"), bias=True, std=std, rngs=rngs)
        if head == "mlm":
            self.transform = Linear(hidden, hidden, ("embed", "mlp"), bias=True, std=std, rngs=rngs)
            self.transform_layernorm = LayerNorm(hidden, eps)
            self.vocabulary_bias = nnx.Param(jnp.zeros(config.vocab_size), axes=("vocab",))
        elif head != "base":
            labels = 2 if head == "qa" else config.num_labels
            self.score = Linear(hidden, labels, ("embed", "labels"), bias=True, std=std, rngs=rngs)

    def __call__(self, batch: Batch, cache: Cache | None = None, key: jax.Array | None = None
                 ) -> tuple[jax.Array, Cache | None]:
        """Hidden states of the last layer, `[batch, length, hidden]`; see `nn.blocks.run`."""
        tokens = jnp.asarray(batch.tokens)
        types = jnp.zeros_like(tokens) if batch.token_types is None else batch.token_types
        x = (self.embed_tokens(tokens, self.dtype)
             + self.embed_positions(jnp.asarray(batch.positions)[:, 0], self.dtype)
             + self.embed_types(jnp.asarray(types), self.dtype))
        x = self.embed_layernorm(constrain(x, "batch", "length", None))
        return run(self.layers, self.compute, x, batch, cache, key)

    def pool(self, hidden: jax.Array) -> jax.Array:
        """The pooler's output for hidden states of first tokens, `[..., hidden]`."""
        return jnp.tanh(self.pooler(hidden))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head on hidden states `[..., hidden]`, float32; those themselves without a head."""
        if self.head == "mlm":
            hidden = self.transform_layernorm(gelu(self.transform(hidden)))
            kernel = self.embed_tokens.embedding[...].T.astype(hidden.dtype)
            return (hidden @ kernel + self.vocabulary_bias[...]).astype(jnp.float32)
        if self.head == "sequence":
            hidden = self.pool(hidden)
        return (hidden if self.head == "base" else self.score(hidden)).astype(jnp.float32)

    def classify(self, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Logits `[batch, examples, labels]` float32 at the first token of each example."""
        return self.logits(pooled(self(batch, key=key)[0], batch))


def as_batch(config: BertConfig, tokens: Array, attention_mask: Array | None = None) -> Batch:
    """The batch of plain tokens; see `bidirectional_batch`.

    Raises:
      UserError: for rows longer than the table of positions.
    """
    if tokens.shape[1] > config.max_position_embeddings:
        raise UserError(f"{tokens.shape[1]} tokens in a row, but this model has only "
                        f"{config.max_position_embeddings} positions")
    return bidirectional_batch(tokens, attention_mask)


def weights(config: BertConfig, head: str) -> list[Weight]:
    """The released names of every parameter of `Bert(config, head)`."""
    bert = "" if head == "base" else "bert."
    names = {"attention.self.query": "self_attn.query", "attention.self.key": "self_attn.key",
             "attention.self.value": "self_attn.value", "attention.output.dense": "self_attn.dense",
             "intermediate.dense": "mlp.up", "output.dense": "mlp.down"}
    rows = [Weight(f"{bert}embeddings.{kind}_embeddings.weight", f"embed_{ours}.embedding")
            for kind, ours in (("word", "tokens"), ("position", "positions"),
                               ("token_type", "types"))]
    rows += norm(f"{bert}embeddings.LayerNorm", "embed_layernorm", bias=True)
    for name, path in names.items():
        rows += linear(f"{bert}encoder.layer.{{}}.{name}", f"layers.{path}", bias=True)
    for name, path in (("attention.output", "attention"), ("output", "output")):
        rows += norm(f"{bert}encoder.layer.{{}}.{name}.LayerNorm", f"layers.{path}_layernorm",
                     bias=True)
    if head in ("base", "sequence"):
        # Encoders that are trained for sentence vectors are released without it.
        rows += [row._replace(optional=head == "base")
                 for row in linear(f"{bert}pooler.dense", "pooler", bias=True)]
    if head == "mlm":
        rows += linear("cls.predictions.transform.dense", "transform", bias=True)
        rows += norm("cls.predictions.transform.LayerNorm", "transform_layernorm", bias=True)
        rows += [Weight("cls.predictions.bias", "vocabulary_bias")]
    elif head != "base":
        rows += linear("qa_outputs" if head == "qa" else "classifier", "score", bias=True)
    return rows


def plain(name: str) -> str:
    """A released name without what files differ in: the prefix, and TensorFlow's LayerNorm."""
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("bert."))
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def ignored(config: BertConfig) -> str:
    """Buffers, copies of the embedding, and the head for the next sentence."""
    return r"embeddings\.position_ids|cls\.(predictions\.decoder|seq_relationship)\..*"
