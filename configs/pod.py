"""Fine-tunes the large released models on TPU pods: questions and answers, or whole chats.

    python launch/plan.py --config=configs/pod.py:glm-4-9b-full --topology=v6e:4x4
    python launch/train.py --config=configs/pod.py:glm-4-9b-full \\
        --config.model.path=path/to/glm-4-9b-chat-hf --config.task.train=my.jsonl

The first needs no weights, data or TPU; docs/plans.md has what it says of each.
Meshes are those of the slices named here: for another, set `mesh` and `batch.rows`.

  chatglm3-6b-lora  LoRA on ChatGLM3-6B                    v5e:2x4
  glm-4-9b-full     all parameters of GLM-4-9B             v6e:4x4, v5p:2x2x4
  glm-4-32b-lora    LoRA on GLM-4-32B-0414                 v6e:4x4
  glm-4-32b-full    all its parameters                     v5p:4x4x4
  glm-4.5-air-lora  LoRA on GLM-4.5-Air, 106B, 12B active  v5p:4x4x4
  glm-4.5-lora      LoRA on GLM-4.5, 355B, 32B active      v5p:4x4x8
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import chat, common
from glm_jax.errors import UserError

# What the released config.json files say, as far as shapes and results depend on it.
CHATGLM3_6B = {
    "model_type": "chatglm", "num_layers": 28, "padded_vocab_size": 65024, "hidden_size": 4096,
    "ffn_hidden_size": 13696, "kv_channels": 128, "num_attention_heads": 32,
    "multi_query_attention": True, "multi_query_group_num": 2, "seq_length": 8192,
    "add_qkv_bias": True, "layernorm_epsilon": 1e-5}
GLM_4_9B = {
    "model_type": "glm", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 13696,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "attention_bias": True, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0}
GLM_4_32B = {
    "model_type": "glm4", "vocab_size": 151552, "hidden_size": 6144, "intermediate_size": 23040,
    "num_hidden_layers": 61, "num_attention_heads": 48, "num_key_value_heads": 2, "head_dim": 128,
    "attention_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 32768}
GLM_45_AIR = {
    "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
    "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, "attention_bias": True, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "partial_rotary_factor": 0.5}
GLM_45 = GLM_45_AIR | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 92, "n_routed_experts": 160, "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5, "use_qk_norm": True}


class Pod(NamedTuple):
    """A variant: the model, whether all of it trains, mesh, rows, their length, what is kept."""

    model: dict[str, Any]
    full: bool
    mesh: dict[str, int]
    rows: int
    length: int
    remat: str = "full"


PODS = {
    "chatglm3-6b-lora": Pod(CHATGLM3_6B, False, {"fsdp": -1}, 16, 4096),
    "glm-4-9b-full": Pod(GLM_4_9B, True, {"fsdp": -1}, 16, 8192),
    "glm-4-32b-lora": Pod(GLM_4_32B, False, {"fsdp": -1}, 16, 8192),
    # Two axes, for a gather over all three sides of the torus at once sends twice as much.
    "glm-4-32b-full": Pod(GLM_4_32B, True, {"fsdp": -1, "expert": 4}, 64, 8192),
    "glm-4.5-air-lora": Pod(GLM_45_AIR, False, {"fsdp": -1, "expert": 4}, 64, 8192),
    "glm-4.5-lora": Pod(GLM_45, False, {"fsdp": -1, "expert": 8}, 128, 8192),
}


def get_config(variant: str = "") -> ConfigDict:
    names = common.variants(variant, tuple(PODS))
    if len(names) != 1:
        raise UserError(f"--config=configs/pod.py:NAME: one of {', '.join(PODS)}")
    pod, config = PODS[names[0]], chat.get_config("full" if PODS[names[0]].full else "")
    config.steps = 1000
    config.model.update(path="", config=ConfigDict(pod.model), dtype="bfloat16", remat=pod.remat)
    config.batch.update(rows=pod.rows, length=pod.length)
    config.mesh.update({"data": 1} | pod.mesh)
    config.optimizer.update(learning_rate=1e-5 if pod.full else 2e-4, warmup=0.03,
                            schedule="cosine", final=0.1)
    config.eval.update(every=200, patience=0)
    if pod.model["model_type"] == "glm4_moe":  # adapters on each expert would be many
        config.adapter.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    return config
