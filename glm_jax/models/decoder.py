"""The decoder that GLM-4, GLM-4-0414, GLM-4.5, ChatGLM2 and ChatGLM3 share, by configuration.

RMSNorm, rotary on part of each head, grouped-query attention, SwiGLU or a mixture of experts. Each
family's config and released names are in a file of its own: glm, glm4, glm4_moe, chatglm.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.models.config import Config, want_parts
from glm_jax.models.head import Headed
from glm_jax.nn.attention import Cache, Mask, attention
from glm_jax.nn.batch import Array, Batch
from glm_jax.nn.compute import Compute
from glm_jax.nn.layers import (
    Embedding,
    Linear,
    Product,
    RMSNorm,
    of_one_input,
    scan,
    stack,
    swiglu,
)
from glm_jax.nn.moe import over_mesh, route
from glm_jax.nn.rotary import check_scaling, rotary_table, rotate_halves, rotate_interleaved
from glm_jax.parallel.mesh import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Config):
    """What sets the families apart besides the fields of their configs.

    The decoder reads the fields of `glm.GlmConfig`, under these names.

    Attributes:
      interleaved: the rotary turns adjacent pairs, not those of two halves.
      sandwich: attention and MLP each have a norm after them, too.
      pools_last: a text is classified at its last position, not at the last token that is not
        the padding's; the head then has a bias.
      keeps_lm_head: a classifier has the language-model head besides.
      qk_norm: queries and keys are normalised head by head.
      dense: how many of the first layers have no experts; None: all of them.
    """

    interleaved: ClassVar[bool] = True
    sandwich: ClassVar[bool] = False
    pools_last: ClassVar[bool] = False
    keeps_lm_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        fields: Any = self  # those of the families
        check_scaling(fields.rope_scaling)
        want_parts("num_attention_heads", fields.num_attention_heads,
                   "num_key_value_heads", fields.num_key_value_heads)
        if not fields.rope_theta:
            raise UserError("config.json: the base of the rotary angles is 0")

    @property
    def qk_norm(self) -> bool:
        return False

    @property
    def dense(self) -> int | None:
        return None


class Attention(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        self.rotate = rotate_interleaved if config.interleaved else rotate_halves
        hidden, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        heads = f"heads:{config.head_dim}"  # no device has a part of a head
        into, out, bias = ("embed", heads), (heads, "embed"), config.attention_bias
        self.q_proj = Linear(hidden, queries, into, bias=bias, std=std, rngs=rngs)
        self.k_proj = Linear(hidden, keys, into, bias=bias, std=std, rngs=rngs)
        self.v_proj = Linear(hidden, keys, into, bias=bias, std=std, rngs=rngs)
        self.o_proj = Linear(queries, hidden, out, std=std, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], mask: Mask,
                 cache: tuple[jax.Array, jax.Array] | None, start: jax.Array | int,
                 keys: list[jax.Array | None]) -> tuple[jax.Array, Any]:
        """`[batch, length, hidden]`, and the layer's keys and values, those of `cache` included."""
        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query, key, value = map(heads, of_one_input((self.q_proj, self.k_proj, self.v_proj), x,
                                                    keys[:3]))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self.rotate(query, *rotary), self.rotate(key, *rotary)
        if cache is not None:
            key, value = (jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0))
                          for old, new in zip(cache, (key, value), strict=True))
        out = attention(query, key.astype(x.dtype), value.astype(x.dtype), mask)
        return self.o_proj(out.reshape(*x.shape[:2], -1), keys[3]), (key, value)


class MLP(nnx.Module):
    """SwiGLU of `inner` features.

    Gate and up are two matrices, also where a checkpoint joins them: split over `tensor`, the two
    halves of one would lie on different devices.
    """

    def __init__(self, config: Any, inner: int, rngs: nnx.Rngs):
        hidden, std = config.hidden_size, config.initializer_range
        into = ("embed", "mlp")
        self.gate_proj = Linear(hidden, inner, into, std=std, rngs=rngs)
        self.up_proj = Linear(hidden, inner, into, std=std, rngs=rngs)
        self.down_proj = Linear(inner, hidden, ("mlp", "embed"), std=std, rngs=rngs)

    def __call__(self, x: jax.Array, keys: list[jax.Array | None]) -> jax.Array:
        gate, up = of_one_input((self.gate_proj, self.up_proj), x, keys[:3:2])
        return self.down_proj(swiglu(gate, up), keys[1])


class Router(nnx.Module):
    """Parameters: `kernel [hidden, experts]`, `e_score_correction_bias [experts]`, kept float32."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.how = (("top_k", config.num_experts_per_tok), ("groups", config.n_group),
                    ("top_groups", config.topk_group), ("normalised", config.norm_topk_prob),
                    ("scale", config.routed_scaling_factor))
        shape = (config.hidden_size, config.n_routed_experts)
        self.kernel = nnx.Param(
            config.initializer_range * jax.random.normal(rngs.params(), shape),
            axes=("embed", None))
        self.e_score_correction_bias = nnx.Param(jnp.zeros(shape[1]), axes=(None,))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights and experts `[batch, length, k]` for `[batch, length, hidden]`."""
        return route(self.logits(x), self.e_score_correction_bias[...].astype(jnp.float32),
                     **dict(self.how))

    def logits(self, x: jax.Array) -> jax.Array:
        """`[batch, length, experts]`, in exact float32: near a tie a rounding changes experts."""
        kernel = constrain(self.kernel[...].astype(jnp.float32), "embed", None, gathered=True)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision="highest")

    def load(self, x: jax.Array, segments: Array) -> jax.Array:
        """How many tokens of `x [batch, length, hidden]` choose each expert: `[experts]` float32.

        Those of segment 0 don't count.
        """
        chosen = jax.nn.one_hot(self(x)[1], self.kernel.get_value().shape[-1])
        return jnp.einsum("blke,bl->e", chosen, (jnp.asarray(segments) > 0).astype(jnp.float32))


class Experts(nnx.Module):
    """One SwiGLU for each expert; kernels `[experts, in, out]`."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        count, std = config.n_routed_experts, config.initializer_range
        into, out = ("experts", "experts_embed", "mlp"), ("experts", "mlp", "experts_embed")
        self.gate_proj = Linear(hidden, inner, into, experts=count, std=std, rngs=rngs)
        self.up_proj = Linear(hidden, inner, into, experts=count, std=std, rngs=rngs)
        self.down_proj = Linear(inner, hidden, out, experts=count, std=std, rngs=rngs)

    def __call__(self, rows: jax.Array, product: Product, keys: list[Any]) -> jax.Array:
        """`[rows, hidden]` by the product that knows each row's expert."""
        inner = swiglu(self.gate_proj(rows, keys[0], product),
                       self.up_proj(rows, keys[2], product))
        return self.down_proj(inner, keys[1], product)


class MoE(nnx.Module):
    """Each token's chosen experts, weighted, and the shared experts, which all tokens pass."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.gate = Router(config, rngs)
        self.experts = Experts(config, rngs)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts,
                                  rngs)

    def __call__(self, x: jax.Array, keys: list[jax.Array | None]) -> jax.Array:
        weights, experts = self.gate(x)
        graphdef, state = nnx.split(self.experts)

        def run(state: Any, keys: Any, rows: jax.Array, product: Product, numbers: jax.Array
                ) -> jax.Array:
            # A key for each row: which rows lie beside it depends on the mesh.
            own = [None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
                   for key in keys]
            return nnx.merge(graphdef, state)(rows, product, own)

        count = self.gate.kernel.get_value().shape[-1]
        routed = over_mesh(run, x, weights, experts, state, count, keys[:3])
        return routed + self.shared_experts(x, keys[3:])


class Layer(nnx.Module):
    def __init__(self, config: Any, moe: bool, rngs: nnx.Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Attention(config, rngs)
        self.mlp = MoE(config, rngs) if moe else MLP(config, config.intermediate_size, rngs)
        if config.sandwich:
            self.post_self_attn_layernorm, self.post_mlp_layernorm = norm(), norm()

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], mask: Mask,
                 cache: tuple[jax.Array, jax.Array] | None = None, start: jax.Array | int = 0,
                 key: jax.Array | None = None, counted: Array | None = None
                 ) -> tuple[jax.Array, Any, jax.Array | None]:
        """`[batch, length, hidden]`, keys and values, and the experts' load if `counted` asks.

        Args:
          counted: segments `[batch, length]`; tokens of segment 0 don't count.
        """
        x = constrain(x, "batch", "length", None)
        keys = [None] * 10 if key is None else list(jax.random.split(key, 10))
        attended, kv = self.self_attn(self.input_layernorm(x), rotary, mask, cache, start, keys[:4])
        if hasattr(self, "post_self_attn_layernorm"):
            attended = self.post_self_attn_layernorm(attended)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        out = self.mlp(normed, keys[4:])
        if hasattr(self, "post_mlp_layernorm"):
            out = self.post_mlp_layernorm(out)
        load = None
        if counted is not None and isinstance(self.mlp, MoE):
            load = self.mlp.gate.load(normed, counted)
        return constrain(x + out, "batch", "length", None), kv, load


class Decoder(Headed):
    """The decoder and one head.

    Args:
      config: the architecture.
      head: `"lm"` (language model), `"sequence"` or `"token"` (classification into
        `config.num_labels` classes), as Hugging Face builds each of them.
    """

    def __init__(self, config: Any, head: str = "lm", dtype: Any = jnp.float32, *,
                 rngs: nnx.Rngs):
        self.config, self.head, self.dtype = config, head, dtype
        self.compute = Compute()
        hidden, std = config.hidden_size, config.initializer_range
        self.embed_tokens = Embedding(config.vocab_size, hidden, std=std, rngs=rngs)
        for name, moe, part in self._stacks():
            count = len(range(config.num_hidden_layers)[part])
            setattr(self, name, stack(functools.partial(Layer, config, moe), count, rngs))
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        if (head == "lm" or config.keeps_lm_head) and not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, config.vocab_size, ("embed", "vocab"), std=std, rngs=rngs)
        if head in ("sequence", "token"):
            self.score = Linear(hidden, config.num_labels, ("embed", "labels"),
                                bias=head == "token" or config.pools_last, std=std, rngs=rngs)

    def __call__(self, batch: Batch, cache: Cache | None = None, key: jax.Array | None = None
                 ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the last norm, `[batch, length, hidden]`.

        Args:
          batch: the tokens; with a cache, those that follow what it holds.
          cache: keys and values so far; the one returned holds this batch's too.
          key: for the adapters' dropout; none without.
        """
        return self._run(batch, cache, key)[:2]

    def with_expert_load(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Hidden states, as a call gives them, and the experts' load.

        That is how many real tokens choose each expert, `[expert layers, experts]` float32; None
        for a model without experts.
        """
        hidden, _, load = self._run(batch, None, None, loads=self.config.dense is not None)
        return hidden, load

    def _run(self, batch: Batch, cache: Cache | None, key: jax.Array | None, loads: bool = False
             ) -> tuple[jax.Array, Cache | None, Any]:
        config = self.config
        x = constrain(self.embed_tokens(jnp.asarray(batch.tokens), self.dtype),
                      "batch", "length", None)
        rotated = int(config.head_dim * config.partial_rotary_factor)
        rotary = rotary_table(jnp.asarray(batch.positions)[:, 0], rotated, config.rope_theta,
                              config.rope_scaling)
        keys = None if key is None else jax.random.split(key, config.num_hidden_layers)
        seen = batch if cache is None else cache.extend(batch)
        start = 0 if cache is None else cache.length
        mask = Mask.of(self.compute, batch, seen)

        def call(layer: Layer, x: jax.Array, kv: Any, key: Any) -> tuple[jax.Array, Any]:
            x, kv, load = layer(x, rotary, mask, kv, start, key,
                                batch.segments if loads else None)
            return x, (None if cache is None else kv, load)

        kv: Any = None if cache is None else (cache.keys, cache.values)
        filled, stacks = [], self._stacks()
        for name, _, part in stacks:
            own = (kv, keys)
            if len(stacks) > 1:  # else nothing is to be cut, and no cache copied
                own = (kv and (kv[0][part], kv[1][part]), None if keys is None else keys[part])
            x, (kv_out, load) = scan(getattr(self, name), call, x, *own, unroll=cache is None,
                                     compute=self.compute)
            filled.append(kv_out)
        if isinstance(seen, Batch):
            return self.norm(x), None, load
        kv = filled[0] if len(filled) == 1 else tuple(
            sum(parts, ()) if isinstance(parts[0], tuple) else jnp.concatenate(parts)
            for parts in zip(*filled, strict=True))
        seen = dataclasses.replace(seen, keys=kv[0], values=kv[1],
                                   length=seen.length + batch.tokens.shape[1])
        return self.norm(x), seen, load

    def _stacks(self) -> list[tuple[str, bool, slice]]:
        """Name, whether it has experts, and which layers, of each stack."""
        dense, count = self.config.dense, self.config.num_hidden_layers
        if dense is None:
            return [("layers", False, slice(count))]
        stacks = [("dense_layers", False, slice(dense)), ("layers", True, slice(dense, count))]
        return [one for one in stacks if range(count)[one[2]]]
