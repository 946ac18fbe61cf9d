"""GLM-4.5, 4.5-Air, 4.6 and 4.7 (`model_type: glm4_moe`): a GLM with a mixture of experts.

The module is `decoder.Decoder`: the first layers are dense (`dense_layers`), the others route each
token to a few experts (`layers`). Rotary splits the head in halves, as no other of them does.
"""

import dataclasses
from typing import ClassVar

from glm_jax.errors import UserError
from glm_jax.models import glm
from glm_jax.models.config import want_parts
from glm_jax.models.glm import GlmConfig, around, block
from glm_jax.models.weights import Weight, linear


@dataclasses.dataclass(frozen=True)
class Glm4MoeConfig(GlmConfig):
    """Fields and defaults of the released `config.json`."""

    model_type: str = "glm4_moe"
    intermediate_size: int = 10944
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 0  # 0: as many as the heads of `hidden_size` have
    attention_bias: bool = False
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    moe_intermediate_size: int = 1408
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    n_routed_experts: int = 128
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = True
    use_qk_norm: bool = False
    num_nextn_predict_layers: int = 1

    interleaved: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        want_parts("n_routed_experts", self.n_routed_experts, "n_group", self.n_group)
        for name, most in (("num_experts_per_tok", self.n_routed_experts),
                           ("topk_group", self.n_group),
                           ("num_nextn_predict_layers", self.num_hidden_layers)):
            if getattr(self, name) > most:
                raise UserError(f"config.json: {name}={getattr(self, name)}, but there are {most}")

    @property
    def qk_norm(self) -> bool:
        return self.use_qk_norm

    @property
    def dense(self) -> int:
        return min(self.first_k_dense_replace, self.num_hidden_layers)


def weights(config: Glm4MoeConfig, head: str) -> list[Weight]:
    """The released names of every parameter of `Decoder(config, head)`."""
    rows, dense, layer = around(config, head), config.dense, "model.layers.{}.mlp."
    projections = ("gate_proj", "up_proj", "down_proj")
    if dense:
        rows += block(config, "dense_layers")
        for name in projections:
            rows += linear(layer + name, f"dense_layers.mlp.{name}")
    if dense < config.num_hidden_layers:
        rows += block(config, "layers", dense)
        moe = [Weight(layer + "gate.weight", "layers.mlp.gate.kernel", transpose=True),
               Weight(layer + "gate.e_score_correction_bias",
                      "layers.mlp.gate.e_score_correction_bias", exact=True)]
        for name in projections:
            moe += linear(layer + "shared_experts." + name, f"layers.mlp.shared_experts.{name}")
            moe += linear(layer + "experts.{}." + name, f"layers.mlp.experts.{name}")
        rows += [row._replace(first=dense) for row in moe]
    return rows


def ignored(config: Glm4MoeConfig) -> str:
    """As of `glm`, and the layers after the last, which transformers ignores too.

    They predict further tokens.
    """
    last = config.num_hidden_layers
    layers = "|".join(map(str, range(last, last + config.num_nextn_predict_layers))) or "none"
    return rf"model\.layers\.({layers})\..*|" + glm.ignored(config)
