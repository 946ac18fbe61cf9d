"""ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2 and GLM-4-9B in their original naming.

`model_type: chatglm` with `multi_query_group_num`; ChatGLM-6B shares the first, not the second.
The module is `decoder.Decoder` (its attention is `decoder.Attention`), and the parameter tree is
that of `glm`: here are the config, the released names, and the way from one config to the other.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from glm_jax.errors import UserError
from glm_jax.models.decoder import DecoderConfig
from glm_jax.models.glm import GlmConfig
from glm_jax.models.weights import Weight, gated, linear, norm

BASE = 10000.0  # what rope_ratio multiplies


@dataclasses.dataclass(frozen=True)
class ChatGLMConfig(DecoderConfig):
    """Fields of the released `config.json`; what a file leaves out is ChatGLM3-6B's."""

    model_type: str = "chatglm"
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    layernorm_epsilon: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    rope_ratio: float = 1
    seq_length: int = 8192
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0

    supported: ClassVar = {
        "multi_query_attention": (True,), "add_bias_linear": (False,), "rmsnorm": (True,),
        "post_layer_norm": (True,), "apply_residual_connection_post_layernorm": (False,),
        "fp32_residual_connection": (False,), "hidden_dropout": (0.0,),
        "attention_dropout": (0.0,), "tie_word_embeddings": (False,), "pre_seq_len": (None, 0),
    }
    pools_last: ClassVar = True
    keeps_lm_head: ClassVar = True

    # What the decoder calls them.
    vocab_size = property(lambda self: self.padded_vocab_size)
    intermediate_size = property(lambda self: self.ffn_hidden_size)
    num_hidden_layers = property(lambda self: self.num_layers)
    num_key_value_heads = property(lambda self: self.multi_query_group_num)
    head_dim = property(lambda self: self.kv_channels)
    attention_bias = property(lambda self: self.add_qkv_bias)
    rms_norm_eps = property(lambda self: self.layernorm_epsilon)
    max_position_embeddings = property(lambda self: self.seq_length)
    rope_theta = property(lambda self: BASE * self.rope_ratio)
    partial_rotary_factor = 0.5
    rope_scaling = None
    initializer_range = 0.02


def weights(config: ChatGLMConfig, head: str) -> list[Weight]:
    """The released names of every parameter of `Decoder(config, head)`.

    There is no released class for the token classifier: its head is named and biased as that of
    `ChatGLMForSequenceClassification`.
    """
    layer = "transformer.encoder.layers.{}."
    fused = layer + "self_attention.query_key_value"
    kernels, biases = (tuple(f"layers.self_attn.{x}_proj.{kind}" for x in "qkv")
                       for kind in ("kernel", "bias"))
    frequencies = functools.partial(_frequencies, config.kv_channels // 2)
    rows = [
        Weight("transformer.embedding.word_embeddings.weight", "embed_tokens.embedding"),
        Weight("transformer.rotary_pos_emb.inv_freq", (), constant=frequencies),
        *norm(layer + "input_layernorm", "layers.input_layernorm"),
        *norm(layer + "post_attention_layernorm", "layers.post_attention_layernorm"),
        Weight(fused + ".weight", kernels, transpose=True),
        *([Weight(fused + ".bias", biases)] if config.add_qkv_bias else []),
        *linear(layer + "self_attention.dense", "layers.self_attn.o_proj"),
        gated(layer + "mlp.dense_h_to_4h"),
        *linear(layer + "mlp.dense_4h_to_h", "layers.mlp.down_proj"),
        *norm("transformer.encoder.final_layernorm", "norm"),
        *linear("transformer.output_layer", "lm_head"),
    ]
    return rows + (linear("classifier_head", "score", bias=True) if head != "lm" else [])


def _frequencies(dim: int, dtype: np.dtype) -> np.ndarray:
    """A release's buffer `[dim / 2]`: each step rounded to its dtype, the base also; no ratio."""
    exponents = (np.arange(0, dim, 2).astype(dtype) / np.float32(dim)).astype(dtype)
    base = np.asarray(BASE).astype(dtype).astype(np.float64)
    powers = np.power(base, exponents.astype(np.float64)).astype(dtype)
    return (1 / powers.astype(np.float32)).astype(dtype)


# ours -> what `glm` calls it
_NAMES = {
    "padded_vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "kv_channels": "head_dim",
    "multi_query_group_num": "num_key_value_heads", "add_qkv_bias": "attention_bias",
    "layernorm_epsilon": "rms_norm_eps", "seq_length": "max_position_embeddings",
    "pad_token_id": "pad_token_id", "num_labels": "num_labels", "id2label": "id2label",
}
_KEPT = ("eos_token_id", "bos_token_id", "torch_dtype")  # of what the model does not use


def to_glm(config: ChatGLMConfig) -> GlmConfig:
    """The config of the `glm` that computes the same with the same parameters."""
    fields = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    return GlmConfig(**fields, rope_theta=config.rope_theta, extra=_kept(config))


def from_glm(config: GlmConfig) -> ChatGLMConfig:
    """The way back.

    Raises:
      UserError: for a config that ChatGLM's has no field for, by name.
    """
    wanted = {"model_type": "glm", "partial_rotary_factor": 0.5, "rope_scaling": None,
              "tie_word_embeddings": False}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(f"{name}={getattr(config, name)!r}: ChatGLM has only {value!r}, so "
                            "this model can't be written as one")
    fields = {ours: getattr(config, theirs) for ours, theirs in _NAMES.items()}
    return ChatGLMConfig(**fields, rope_ratio=config.rope_theta / BASE, extra=_kept(config))


def _kept(config: DecoderConfig) -> dict[str, Any]:
    return {name: config.extra[name] for name in _KEPT if name in config.extra}
