"""GLM-4-9B as Hugging Face names it (`model_type: glm`), and GLM-Edge.

The module is `decoder.Decoder`; here are its config and the released names.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from glm_jax.models.decoder import DecoderConfig
from glm_jax.models.weights import Weight, gated, linear, norm


@dataclasses.dataclass(frozen=True)
class GlmConfig(DecoderConfig):
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
    rope_scaling: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = 151329

    supported: ClassVar = {"hidden_act": ("silu",), "attention_dropout": (0.0,)}


def weights(config: GlmConfig, head: str) -> list[Weight]:
    """The released names of every parameter of `Decoder(config, head)`."""
    rows = around(config, head) + block(config, "layers")
    mlp = "model.layers.{}.mlp."
    return [*rows, gated(mlp + "gate_up_proj"), *linear(mlp + "down_proj", "layers.mlp.down_proj")]


def ignored(config: GlmConfig) -> str:
    """The copy of a tied head, which `torch.save` of a whole state keeps."""
    return r"lm_head\.weight" if config.tie_word_embeddings else ""


def around(config: GlmConfig, head: str) -> list[Weight]:
    """The rows of embedding, last norm and head."""
    rows = [Weight("model.embed_tokens.weight", "embed_tokens.embedding"),
            *norm("model.norm", "norm")]
    if head == "lm" and not config.tie_word_embeddings:
        rows += linear("lm_head", "lm_head")
    elif head in ("sequence", "token"):
        rows += linear("score", "score", bias=head == "token")
    return rows


def block(config: GlmConfig, stack: str, first: int = 0) -> list[Weight]:
    """The rows of a stack of layers that begins with layer `first`, without their MLPs."""
    names = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich:
        names += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    if config.qk_norm:
        names += ["self_attn.q_norm", "self_attn.k_norm"]
    rows = [row for name in names for row in norm("model.layers.{}." + name, f"{stack}.{name}")]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        rows += linear("model.layers.{}.self_attn." + name, f"{stack}.self_attn.{name}",
                       config.attention_bias and name != "o_proj")
    return [row._replace(first=first) for row in rows]
