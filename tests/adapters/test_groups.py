"""Adapters of layers that PyTorch joins (`query_key_value`), or has for each expert."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from glm_jax.adapters import partition
from glm_jax.adapters.lora import LoRAConfig, attach, dropout_mask, merged
from glm_jax.adapters.peft import adapter_tensors, inspect_adapter, load_adapter, save_adapter
from glm_jax.adapters.targets import groups, linears
from glm_jax.convert.hf import flat, save_model, tensors
from glm_jax.errors import UserError
from glm_jax.models import as_batch
from glm_jax.nn.batch import causal_batch

CHATGLM = {"model_type": "chatglm", "padded_vocab_size": 96, "hidden_size": 32,
           "ffn_hidden_size": 48, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 8,
           "multi_query_group_num": 2, "tie_word_embeddings": False}
MOE = {"model_type": "glm4_moe", "num_hidden_layers": 3, "n_routed_experts": 4, "head_dim": 8,
       "num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False,
       "attention_bias": True}
TOKENS = np.random.default_rng(0).integers(2, 90, (3, 8))
FUSED = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value.lora_{}"
SHARED = "layers.self_attn.k_proj.adapter.lora_a"


@jax.jit
def logits(model):
    return model.logits(model(causal_batch(TOKENS))[0])


@pytest.fixture
def chatglm(make, shake):
    def build(targets, head="lm", **config):
        model = make(head, **CHATGLM, **({"num_labels": 3} if head == "sequence" else {}))
        attach(model, LoRAConfig(r=4, target_modules=targets, **config))
        shake(model)
        return model
    return build


@pytest.mark.parametrize("targets", [("query_key_value",), "all-linear",
                                     r".*\.(query_key_value|dense)"])
def test_a_group_has_one_a_and_the_file_of_one_layer(chatglm, make, tmp_path, targets):
    model = chatglm(targets)
    own = [path for path in flat(model) if path.endswith("self_attn.q_proj.adapter.lora_a")
           or path.endswith("k_proj.adapter.lora_a") or path.endswith("v_proj.adapter.lora_a")]
    assert own == [SHARED]
    config = LoRAConfig(r=4, target_modules=targets)
    save_adapter(model, tmp_path / "out", config, base="base")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found[FUSED.format(2, "A.weight")].shape == (4, 32)
    assert found[FUSED.format(2, "B.weight")].shape == (32 + 16 + 16, 4)
    again = make(**CHATGLM)
    assert load_adapter(again, tmp_path / "out").r == 4
    np.testing.assert_allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert adapter_tensors(again).keys() == found.keys()


def test_a_group_adapts_the_joined_matrix(chatglm):
    """W + s B A of the joined W is what the members merge to; the base's own rows are the rest."""
    model = chatglm(("query_key_value",))
    np.testing.assert_allclose(logits(merged(model)), logits(model), rtol=1e-4, atol=1e-4)
    found, layer = adapter_tensors(model), model.layers.self_attn
    delta = 2.0 * found[FUSED.format(1, "B.weight")] @ found[FUSED.format(1, "A.weight")]
    parts = [np.asarray(getattr(merged(model).layers.self_attn, n).kernel[1]
                        - getattr(layer, n).kernel[1]).T for n in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_allclose(np.concatenate(parts), 8 / 4 / 2 * delta, rtol=1e-3, atol=1e-5)


RELEASED = {"chatglm": CHATGLM,
            "chatglm6b": {"model_type": "chatglm", "position_encoding_2d": True, "num_layers": 2,
                          "inner_hidden_size": 48},
            "glm2021": {"model_type": "glm", "block_position_encoding": True, "num_layers": 2,
                        "max_sequence_length": 40}}
EVERY = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.mark.parametrize("targets", [EVERY, EVERY[:1]])
@pytest.mark.parametrize("name", RELEASED)
def test_a_file_of_peft_changes_the_released_matrices_by_b_a(name, targets, tmp_path, tiny):
    """ChatGLM-6B's rows go head by head through query, key and value; those of GLM by the three."""
    model = nnx.merge(*nnx.split(tiny(**RELEASED[name])), copy=True)
    rng = np.random.default_rng(5)
    before, delta, arrays = dict(tensors(model)), {}, {}
    for key, weight in before.items():
        if key.endswith(tuple(f".{target}.weight" for target in targets)):
            a, b = (rng.normal(size=shape).astype(np.float32)
                    for shape in ((3, weight.shape[1]), (weight.shape[0], 3)))
            delta[key] = 6 / 3 * b @ a
            module = "base_model.model." + key.removesuffix(".weight")
            arrays |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    assert len(delta) == model.config.num_hidden_layers * len(targets)
    (tmp_path / "adapter").mkdir()
    save_file(arrays, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 6,
         "target_modules": targets}))
    config = load_adapter(model, tmp_path / "adapter")
    for key, array in tensors(merged(model)):
        np.testing.assert_allclose(array, before[key] + delta.get(key, 0), rtol=1e-5, atol=1e-5,
                                   err_msg=key)
    save_adapter(model, tmp_path / "again", config, base="base")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert again.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(again[key], array, err_msg=key)


def test_the_gradient_of_the_one_a_is_the_sum_over_the_group(chatglm):
    apart, joined = chatglm(("q_proj", "k_proj", "v_proj")), chatglm(("query_key_value",))
    one = joined.layers.self_attn.q_proj.adapter.lora_a.get_value()
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(apart.layers.self_attn, name).adapter.lora_a.set_value(one)

    def gradient(model):
        graphdef, trainable, frozen = partition(model, ("adapter",))
        found = jax.jit(jax.grad(lambda t: jnp.square(logits.__wrapped__(
            nnx.merge(graphdef, t, frozen, copy=True))).mean()))(trainable)
        return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(found)}
    ours, theirs = gradient(joined), gradient(apart)
    assert len(ours) == 4 and len(theirs) == 6
    total = sum(theirs[SHARED.replace("k_proj", name)] for name in ("q_proj", "k_proj", "v_proj"))
    np.testing.assert_allclose(ours[SHARED], total, rtol=1e-3, atol=1e-5 * np.abs(total).max())


def test_members_alone_have_no_file(chatglm, tmp_path):
    with pytest.raises(UserError, match=r"are one layer in PyTorch, named .*query_key_value"):
        save_adapter(chatglm(("q_proj", "v_proj")), tmp_path / "out",
                     LoRAConfig(r=4, target_modules=("q_proj", "v_proj")), base="base")


def test_a_classifier_of_chatglm_is_saved_by_its_name(chatglm, make, tmp_path):
    config = LoRAConfig(r=4, target_modules=("query_key_value",), modules_to_save=("score",))
    model = chatglm(("query_key_value",), "sequence", modules_to_save=("score",))
    save_adapter(model, tmp_path / "out", config, base="base")
    assert "classifier_head" in inspect_adapter(tmp_path / "out").config.modules_to_save
    again = make("sequence", **CHATGLM, num_labels=3)
    again.score.kernel.set_value(jnp.zeros_like(again.score.kernel.get_value()))
    load_adapter(again, tmp_path / "out")
    np.testing.assert_array_equal(again.score.kernel[...], model.score.kernel[...])
    np.testing.assert_array_equal(again.score.bias[...], model.score.bias[...])


def test_experts_have_files_of_their_own(make, shake, tmp_path):
    model, config = make(**MOE), LoRAConfig(r=2, target_modules=("down_proj",))
    attach(model, config)
    shake(model)
    save_adapter(model, tmp_path / "out", config, base="base")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.mlp.experts.{}.down_proj.lora_B.weight"
    b = np.asarray(model.layers.mlp.experts.down_proj.adapter.lora_b.get_value())
    for layer, expert in ((1, 0), (2, 3)):
        np.testing.assert_array_equal(found[name.format(layer, expert)], b[layer - 1, expert].T)
    again = make(**MOE)
    load_adapter(again, tmp_path / "out")
    np.testing.assert_allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_all_linear_leaves_routed_experts_out(make, shake, tmp_path):
    model, config = make(**MOE), LoRAConfig(r=2)
    attach(model, config)
    shake(model)
    adapted = {path for path, layer in linears(model).items() if hasattr(layer, "adapter")}
    assert linears(model).keys() - adapted == {
        "lm_head", *(f"layers.mlp.experts.{name}_proj" for name in ("gate", "up", "down"))}
    save_adapter(model, tmp_path / "out", config, base="base")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert len(found) == 2 * 3 * 7  # A and B of four projections and an MLP in each of three layers
    assert not any(".experts." in name for name in found)
    again = make(**MOE)  # by the names written, which mean no expert
    load_adapter(again, tmp_path / "out")
    assert flat(again).keys() == flat(model).keys()
    np.testing.assert_allclose(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_peft_loads_an_adapter_of_a_mixture(make, shake, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers
    targets = ("q_proj", "o_proj")  # peft takes any down_proj for that of the fused experts
    model, config = make(**MOE), LoRAConfig(r=2, target_modules=targets)
    save_model(model, tmp_path / "base")
    attach(model, config)
    shake(model)
    save_adapter(model, tmp_path / "out", config, base=tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base",
                                                               attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("fields", "wanted"), [
    *((fields, 4) for fields in RELEASED.values()),  # query_key_value, dense and two of the MLP
    ({"num_key_value_heads": 2}, 6),
    ({"model_type": "bert", "head": "sequence"}, 6), (MOE | {"num_key_value_heads": 2}, 7)])
def test_an_input_is_dropped_once_for_each_of_pytorchs_layers(monkeypatch, tiny, fields, wanted):
    model = nnx.merge(*nnx.split(tiny(**fields)), copy=True)
    attach(model, LoRAConfig(r=2, lora_dropout=0.5))
    stacks = 1 + hasattr(model, "dense_layers")
    keys = []

    def recorded(key, shape, rate):
        keys.append(key)
        return dropout_mask(key, shape, rate)
    monkeypatch.setattr("glm_jax.adapters.lora.dropout_mask", recorded)
    batch = as_batch(model.config, np.random.default_rng(1).integers(10, 60, (2, 6)))
    jax.eval_shape(lambda key: model(batch, key=key)[0], jax.random.key(0))
    assert len(keys) == len(set(map(id, keys))) == stacks * wanted


@pytest.mark.parametrize("name", RELEASED)
def test_its_gradients_are_those_of_the_matrices_that_it_changes(name, tiny, shake):
    """dA = s sum(G B^T) over the group and dB = s A^T G, with the gradient G of a merged kernel."""
    model = nnx.merge(*nnx.split(tiny(**RELEASED[name])), copy=True)
    attach(model, LoRAConfig(r=3, lora_alpha=6, target_modules=("query_key_value",)))
    shake(model)
    tokens = np.random.default_rng(1).integers(10, 60, (2, 6))

    def loss(state, graphdef):
        model = nnx.merge(graphdef, state)
        return jnp.mean(jnp.sin(model.logits(model(as_batch(model.config, tokens))[0])))

    def gradients(model):
        graphdef, state = nnx.split(model)
        return linears(nnx.merge(graphdef, jax.jit(jax.grad(loss), static_argnums=1)(
            state, graphdef)))
    ours, whole, layers = gradients(model), gradients(merged(model)), linears(model)
    group, = (paths for paths in groups(model, ("query_key_value",)))
    total = 0
    for path in group:
        a, b = (p.get_value() for p in (layers[path].adapter.lora_a, layers[path].adapter.lora_b))
        g = whole[path].kernel.get_value()
        wanted = 2 * np.swapaxes(a, 1, 2) @ g
        np.testing.assert_allclose(ours[path].adapter.lora_b.get_value(), wanted, rtol=1e-3,
                                   atol=1e-5 * np.abs(wanted).max())
        total += 2 * g @ np.swapaxes(b, 1, 2)
    np.testing.assert_allclose(ours[group[0]].adapter.lora_a.get_value(), total, rtol=1e-3,
                               atol=1e-5 * np.abs(total).max())
