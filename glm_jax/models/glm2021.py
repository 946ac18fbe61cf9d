"""GLM (Du et al. 2022, arXiv:2103.10360; `model_type: glm` with `block_position_encoding`).

Two learned positions a token, layer norms ahead of each block, GELU with the error function. What
fills a blank stands behind the text and sees all of it; logits are of the token's own place.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.models.config import MultiHeadConfig
from glm_jax.models.head import Headed
from glm_jax.models.weights import Weight, transformer
from glm_jax.nn.attention import Cache, Mask
from glm_jax.nn.batch import Array, Batch, blank_batch
from glm_jax.nn.blocks import MLP, Keys, SelfAttention, run
from glm_jax.nn.compute import Compute
from glm_jax.nn.layers import Embedding, LayerNorm, gelu, stack
from glm_jax.nn.loss import cross_entropy
from glm_jax.parallel.mesh import constrain

# <sop>, [MASK], [gMASK] and [sMASK] by vocabulary size and width: the released files leave them
# to the tokenizer. GLM-RoBERTa-large, with GPT-2's size and other ids, is 1,024 wide.
_NAMES = ("sop_token_id", "mask_token_id", "gmask_token_id", "smask_token_id")
_BERT, _GPT2 = (30522, 103, None, None), (50257, 50260, 50263, 50264)
_IDS = {30592: lambda width: _BERT, 50304: lambda width: (None,) * 4 if width == 1024 else _GPT2,
        50048: lambda width: (50006, 50003, 50009, 50008)}


@dataclasses.dataclass(frozen=True)
class Glm2021Config(MultiHeadConfig):
    """Fields and defaults of the released `config.json`.

    Attributes:
      attention_scale: only guards float16; our scores are float32.
      sop_token_id: `<|startofpiece|>`, behind which a blank is filled; with those of the blanks it
        is known of the released vocabularies, but for GLM-RoBERTa's, and else to be given.
    """

    model_type: str = "glm"
    vocab_size: int = 30592
    hidden_size: int = 768
    num_layers: int = 12
    num_attention_heads: int = 12
    max_sequence_length: int = 512
    block_position_encoding: bool = True
    attention_scale: float = 1.0
    initializer_range: float = 0.02
    sop_token_id: int | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    smask_token_id: int | None = None
    pad_token_id: int | None = None

    supported: ClassVar = {"block_position_encoding": (True,), "relative_encoding": (False,),
                           "spell_length": (None,)}
    streams: ClassVar = 2
    max_position_embeddings = property(lambda self: self.max_sequence_length)
    num_hidden_layers = property(lambda self: self.num_layers)
    start_token_id = property(lambda self: self.sop_token_id)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        size = raw.get("vocab_size", cls.vocab_size)
        known = _IDS.get(size if isinstance(size, int) else 0, lambda width: (None,) * 4)
        ids = dict(zip(_NAMES, known(raw.get("hidden_size")), strict=True))
        return super().from_dict({**ids, **raw})


class Layer(nnx.Module):
    def __init__(self, config: Glm2021Config, rngs: nnx.Rngs):
        hidden, std = config.hidden_size, config.initializer_range
        self.input_layernorm = LayerNorm(hidden, 1e-5)
        self.self_attn = SelfAttention(hidden, config.num_attention_heads, std, rngs)
        self.post_attention_layernorm = LayerNorm(hidden, 1e-5)
        self.mlp = MLP(hidden, 4 * hidden, gelu, std, rngs)

    def __call__(self, x: jax.Array, mask: Mask, kv: Any, start: Any, keys: Keys
                 ) -> tuple[jax.Array, Any]:
        attended, kv = self.self_attn(self.input_layernorm(x), mask, kv, start, keys[:4])
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), keys[4:]), kv


class Glm2021(Headed):
    """The language model, its head tied to the embedding. `head` is `"lm"`; there is no other."""

    def __init__(self, config: Glm2021Config, head: str = "lm", dtype: Any = jnp.float32, *,
                 rngs: nnx.Rngs):
        if head != "lm":
            raise UserError(f"GLM (2021) has no head {head!r}, only 'lm'; classes can be scored as "
                            "choices (see glm_jax/models/glm2021.py)")
        self.config, self.head, self.dtype = config, head, dtype
        self.compute = Compute()
        hidden, std, places = (config.hidden_size, config.initializer_range,
                               config.max_sequence_length + 1)
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=std, rngs=rngs)
        self.embed_positions = Embedding(places, hidden, std=std, rngs=rngs)
        self.embed_blocks = Embedding(places, hidden, std=std, rngs=rngs)
        self.layers = stack(lambda rngs: Layer(config, rngs), config.num_layers, rngs)
        self.norm = LayerNorm(hidden, 1e-5)

    def __call__(self, batch: Batch, cache: Cache | None = None, key: jax.Array | None = None
                 ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the last norm, `[batch, length, hidden]`; see `nn.blocks.run`."""
        positions = jnp.asarray(batch.positions)
        x = (self.embed_tokens(jnp.asarray(batch.tokens), self.dtype)
             + self.embed_positions(positions[:, 0], self.dtype)
             + self.embed_blocks(positions[:, 1], self.dtype))
        x = constrain(x, "batch", "length", None)
        x, cache = run(self.layers, self.compute, x, batch, cache, key)
        return self.norm(x), cache

    def score(self, batch: Batch) -> jax.Array:
        """The sum of the targets' log-probabilities in each row, `[batch]` float32."""
        hidden, _ = self(batch)
        one = jax.vmap(lambda h, t, w: -cross_entropy(h[None], self.vocabulary_kernel(), t[None],
                                                      w[None]))
        return one(hidden, jnp.asarray(batch.targets), jnp.asarray(batch.weights))


def as_batch(config: Glm2021Config, tokens: Array, attention_mask: Array | None = None) -> Batch:
    """The batch of `text with a blank <sop> filling`; see `blank_batch`.

    The blank is the first mask token of any kind. Without `<sop>` a row is causal.

    Raises:
      UserError: for positions beyond the tables, where the tokens are known (not traced).
    """
    blanks = (config.mask_token_id, config.gmask_token_id, config.smask_token_id)
    batch = blank_batch(tokens, attention_mask, config.sop_token_id, (blanks,), unstarted=False)
    places = config.max_sequence_length + 1
    if isinstance(tokens, np.ndarray) and (last := int(batch.positions.max())) >= places:
        raise UserError(f"a context or an answer of {last + 1} tokens, but this model has only "
                        f"{places} positions")
    return batch


def choices_batch(config: Glm2021Config, source: Sequence[int],
                  choices: Sequence[Sequence[int]]) -> Batch:
    """Rows `source <sop> choice`, with the choice for `targets`: what `Glm2021.score` compares.

    The released code puts all choices behind one source and lets none see another; that is the
    same, a row for each.

    Raises:
      UserError: where the config doesn't know `<sop>`, and for too long rows.
    """
    if config.sop_token_id is None:
        raise UserError("the config doesn't say which token starts a filling: sop_token_id")
    length = len(source) + max(map(len, choices))
    tokens, targets, mask = (np.zeros((len(choices), length), np.int32) for _ in range(3))
    weights = np.zeros(tokens.shape, np.float32)
    for row, choice in enumerate(choices):
        stop = len(source) + len(choice)
        tokens[row, :stop] = [*source, config.sop_token_id, *choice[:-1]]
        targets[row, len(source):stop], mask[row, :stop] = choice, 1
        weights[row, len(source):stop] = 1
    return dataclasses.replace(as_batch(config, tokens, mask), targets=targets, weights=weights)


def weights(config: Glm2021Config, head: str) -> list[Weight]:
    """The released names of every parameter of `Glm2021(config)`."""
    return [Weight("word_embeddings.weight", "embed_tokens.embedding"),
            Weight("transformer.position_embeddings.weight", "embed_positions.embedding"),
            Weight("transformer.block_position_embeddings.weight", "embed_blocks.embedding"),
            *transformer()]


def plain(name: str) -> str:
    """A released name without the prefix that files saved by Hugging Face have."""
    return name.removeprefix("glm.")
