"""Random small configs of each family against transformers; experts on a mesh; their load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import glm_jax
from glm_jax.adapters import partition
from glm_jax.adapters.lora import LoRAConfig, attach, merged
from glm_jax.convert.hf import exact_paths, flat, load_model, save_model
from glm_jax.errors import UserError
from glm_jax.infer.cache import empty_cache
from glm_jax.models import REGISTRY, architecture_of
from glm_jax.nn.batch import causal_batch
from glm_jax.parallel.mesh import make_mesh, use_mesh_of
from tests.nn.test_loss import collectives

MOE = {"model_type": "glm4_moe", "num_hidden_layers": 3, "n_routed_experts": 8,
       "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
       "attention_bias": True, "use_qk_norm": True, "num_attention_heads": 6, "head_dim": 8,
       "num_key_value_heads": 2, "routed_scaling_factor": 1.5}
SMALL = MOE | {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 20}
TOKENS = np.random.default_rng(0).integers(1, 61, (2, 11))


@st.composite
def configs(draw, kind):
    """A config of this kind whose heads need not fill the hidden size."""
    groups, dim = draw(st.sampled_from([1, 2])), draw(st.sampled_from([8, 12, 16]))
    config = {
        "model_type": kind, "vocab_size": 61, "hidden_size": draw(st.sampled_from([16, 20])),
        "intermediate_size": draw(st.sampled_from([12, 28])),
        "num_hidden_layers": draw(st.integers(1, 2)), "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.integers(1, 3)), "head_dim": dim,
        "attention_bias": draw(st.booleans()), "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([1e2, 1e6])), "pad_token_id": 0,
        "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-2])), "max_position_embeddings": 64,
        "initializer_range": 0.3}
    if draw(st.booleans()):
        config["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": draw(
                                      st.sampled_from([8, 16])),
                                  **draw(st.sampled_from([{}, {"attention_factor": 1.3},
                                                          {"beta_fast": 4, "beta_slow": 2},
                                                          {"truncate": False}]))}
    if kind == "glm4_moe":
        groups = draw(st.sampled_from([1, 2, 4]))
        config |= {"n_routed_experts": 8, "n_group": groups, "moe_intermediate_size": 8,
                   "topk_group": draw(st.integers(1, groups)), "num_experts_per_tok": 2,
                   "n_shared_experts": draw(st.integers(1, 2)),
                   "norm_topk_prob": draw(st.booleans()), "use_qk_norm": draw(st.booleans()),
                   "first_k_dense_replace": draw(st.integers(0, 2)),
                   "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5]))}
    return config


def shaken(raw, seed=0, head="lm"):
    """A model whose norms are not one, and biases not zero."""
    from glm_jax.convert.hf import init_model
    architecture = architecture_of(raw)
    model = init_model(architecture, architecture.config.from_dict(raw), head, seed=seed)
    draw = np.random.default_rng(seed)
    for param in flat(model).values():
        value = param.get_value()
        param.set_value(value + 0.1 * draw.normal(size=value.shape).astype(np.float32))
    return model


@pytest.mark.parametrize("kind", ["glm", "glm4", "glm4_moe"])
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate],
          suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_transformers_computes_the_same(kind, data, tmp_path_factory):
    import torch
    import transformers
    raw = data.draw(configs(kind))
    folder = tmp_path_factory.mktemp("drawn") / "model"
    model = shaken(raw)
    save_model(model, folder)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    mask = np.ones_like(TOKENS)
    mask[1, 7:] = 0
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(TOKENS), attention_mask=torch.tensor(mask)).logits
    ours = np.asarray(glm_jax.forward(model, TOKENS, mask))
    np.testing.assert_allclose(ours[mask == 1], wanted.numpy()[mask == 1], rtol=1e-3, atol=1e-3)


def loss(model):
    """The sum of squared logits' mean, and its gradients by path."""
    graphdef, state = nnx.split(model)
    batch = causal_batch(np.tile(TOKENS, (2, 1))[:, :8])

    @jax.jit
    @jax.value_and_grad
    def run(state):
        model = nnx.merge(graphdef, state)
        return jnp.square(model.logits(model(batch)[0])).mean()
    with use_mesh_of(state):
        value, gradients = run(state)
    return value, flat(nnx.merge(graphdef, gradients))


def adapted(folder, mesh=None):
    """The model of the folder, with an adapter on its experts that does something."""
    model = load_model(folder, mesh=mesh)
    attach(model, LoRAConfig(r=2, target_modules=("experts.up_proj", "experts.down_proj")))
    b = model.layers.mlp.experts.up_proj.adapter.lora_b
    b.set_value(jax.device_put(jnp.full(b.get_value().shape, 0.3), b.get_value().sharding))
    return model


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder, and its loss and gradients on one device."""
    folder = tmp_path_factory.mktemp("mixture") / "model"
    save_model(shaken(SMALL), folder)
    return folder, *loss(adapted(folder))


@pytest.mark.parametrize("sizes", [  # two rows: split over `expert` only where nothing else does
    {"expert": 8}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"expert": 2, "tensor": 2}])
def test_experts_on_a_mesh_equal_one_device(alone, sizes):
    """With an adapter on them, too; gradients of all parameters."""
    folder, wanted_value, wanted = alone
    spread = adapted(folder, make_mesh(sizes))
    value, gradients = loss(spread)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    for path, gradient in gradients.items():
        ours, theirs = np.asarray(gradient.get_value()), np.asarray(wanted[path].get_value())
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max(),
                                   err_msg=path)
    layer = spread.layers.mlp.experts.up_proj
    for param in (layer.kernel, layer.adapter.lora_a, layer.adapter.lora_b):
        shard = param.get_value().addressable_shards[0].data
        assert shard.shape[1] == 8 // sizes["expert"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("raw", [{}, SMALL], ids=["glm", "glm4_moe"])
def test_a_layer_split_over_tensor_is_only_summed(raw, lora, tiny):
    """Once behind attention and once behind the MLP: nothing changes places between devices."""
    model = nnx.merge(*nnx.split(tiny(mesh=make_mesh({"tensor": 2}), **raw)))
    if lora:
        attach(model, LoRAConfig(r=2))
    trained = ("adapter",) if lora else ("layers",)
    graphdef, trainable, frozen = partition(model, trained)

    def value(trainable):
        whole = nnx.merge(graphdef, trainable, frozen, copy=True)
        return jnp.square(whole(causal_batch(TOKENS))[0]).mean()
    with use_mesh_of(trainable):
        text = jax.jit(jax.value_and_grad(value)).lower(trainable).compile().as_text()
    kinds = {kind for kind, _, _ in collectives(text)}
    assert "all-reduce" in kinds and not kinds & {"all-to-all", "collective-permute"}


def test_adapters_on_experts_merge_into_what_they_compute():
    model = shaken(SMALL)
    attach(model, LoRAConfig(r=2, target_modules=r"(dense_)?layers\..*"))
    assert hasattr(model.layers.mlp.experts.gate_proj, "adapter")
    for path, param in flat(model).items():
        if path.endswith("lora_b"):
            param.set_value(param.get_value() + 0.2)
    plain = shaken(SMALL)
    ours, whole = (np.asarray(glm_jax.forward(m, TOKENS)) for m in (model, merged(model)))
    np.testing.assert_allclose(ours, whole, rtol=1e-3, atol=1e-3)
    assert np.abs(ours - np.asarray(glm_jax.forward(plain, TOKENS))).max() > 0.1
    assert not hasattr(model.layers.mlp.gate, "adapter")  # the router is none of the layers


def test_the_load_counts_real_tokens():
    model = shaken(SMALL)
    mask = np.ones_like(TOKENS)
    mask[0, 4:] = 0
    run = jax.jit(lambda m, b: m.with_expert_load(b)[1])
    load = np.asarray(run(model, causal_batch(TOKENS, mask)))
    assert load.shape == (2, 8)
    np.testing.assert_array_equal(load.sum(1), 2 * mask.sum())


def test_dense_and_expert_layers_share_one_cache():
    model = shaken(SMALL)
    run = jax.jit(lambda model, batch, cache: model(batch, cache))
    whole, cache = causal_batch(TOKENS), empty_cache(model.config, 2, 12, jnp.float32)
    parts = []
    for piece in (slice(0, 7), slice(7, 11)):
        out, cache = run(model, jax.tree.map(lambda a, p=piece: a[..., p], whole), cache)
        parts.append(out)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), run(model, whole, None)[0],
                               rtol=2e-4, atol=2e-4)


def test_the_correction_bias_stays_float32(tmp_path):
    raw = SMALL
    save_model(shaken(raw), tmp_path / "model", dtype=jnp.bfloat16)
    model = load_model(tmp_path / "model", dtype=jnp.bfloat16)
    kinds = {path: p.get_value().dtype.name for path, p in flat(model).items()}
    exact = {"layers.mlp.gate.e_score_correction_bias"}
    assert exact_paths(model) == {p for p, kind in kinds.items() if kind == "float32"} == exact
    np.testing.assert_array_equal(model.layers.mlp.gate.e_score_correction_bias[...],
                                  shaken(raw).layers.mlp.gate.e_score_correction_bias[...])


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    from safetensors.numpy import load_file, save_file
    raw = SMALL
    save_model(shaken(raw), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = np.ones((4, 4), np.float32)
    save_file(tensors | {"model.layers.3.eh_proj.weight": extra}, tmp_path / "model.safetensors")
    load_model(tmp_path)
    save_file(tensors | {"model.layers.4.eh_proj.weight": extra}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected: model\.layers\.4\.eh_proj"):
        load_model(tmp_path)


CHATGLM = {"model_type": "chatglm", "num_layers": 2, "multi_query_group_num": 2}


SMALL_CHATGLM = CHATGLM | {"padded_vocab_size": 61, "hidden_size": 16, "ffn_hidden_size": 20,
                           "num_attention_heads": 2, "kv_channels": 8, "num_labels": 3}


@pytest.mark.parametrize(("raw", "message"), [
    (CHATGLM | {"multi_query_attention": False}, "multi_query_attention=False is not supported"),
    (CHATGLM | {"post_layer_norm": False}, "post_layer_norm=False"),
    (CHATGLM | {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_po"),
    (CHATGLM | {"add_bias_linear": True}, "add_bias_linear=True"),
    (CHATGLM | {"rmsnorm": False}, "rmsnorm=False"),
    (CHATGLM | {"pre_seq_len": 128}, "pre_seq_len=128 is not supported; supported: None, 0"),
    (CHATGLM | {"kv_channels": "128"}, "kv_channels must be int"),
    ({"model_type": "glm4", "rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'yarn'"),
    ({"model_type": "glm4", "rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    ({"model_type": "glm4", "rope_scaling": "yarn"}, "rope_scaling must be a table, not 'yarn'"),
    ({"model_type": "glm4", "rope_scaling": {
        "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "mscale": 1}},
     "mscale is not supported"),
    ({"model_type": "glm4_moe", "hidden_act": "gelu"}, "hidden_act='gelu'"),
])
def test_what_is_not_computed_is_refused(raw, message):
    with pytest.raises(UserError, match=r"config\.json") as error:
        architecture_of(raw).config.from_dict(raw)
    assert message in str(error.value)


def test_a_head_that_hugging_face_has_not_is_refused():
    for raw, head in ((MOE, "sequence"), (CHATGLM, "qa")):
        with pytest.raises(UserError, match=f"has no head '{head}'; it has lm"):
            shaken(raw, head=head)


def test_chatglm_classifies_at_the_last_position_with_a_bias():
    raw = SMALL_CHATGLM
    model, mask = shaken(raw, head="sequence"), np.ones_like(TOKENS)
    mask[1, :4] = 0
    tokens = TOKENS.copy()
    tokens[:, -1] = model.config.pad_token_id  # which is no reason to look elsewhere
    batch = dataclasses.replace(causal_batch(tokens, mask), pool_index=np.full((2, 1), 10))
    np.testing.assert_allclose(glm_jax.forward(model, tokens, mask), model.classify(batch)[:, 0],
                               rtol=1e-4, atol=1e-4)
    assert hasattr(model.score, "bias")
    assert {row.name for row in REGISTRY} >= {"glm", "glm4", "glm4_moe", "chatglm"}


def test_chatglm_classifies_tokens(tmp_path):
    from safetensors.numpy import load_file
    model = shaken(SMALL_CHATGLM, head="token")
    save_model(model, tmp_path / "model")
    arrays = load_file(tmp_path / "model/model.safetensors")
    assert {n: a.shape for n, a in arrays.items() if "head" in n} == {
        "classifier_head.weight": (3, 16), "classifier_head.bias": (3,)}
    again = load_model(tmp_path / "model")
    assert again.head == "token"
    found = glm_jax.forward(again, TOKENS)
    hidden = np.asarray(jax.jit(lambda m: m(causal_batch(TOKENS))[0])(model))
    wanted = hidden @ arrays["classifier_head.weight"].T + arrays["classifier_head.bias"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
