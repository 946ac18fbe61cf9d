"""Each format of release in and out again, to the byte; ChatGLM as glm; quantised weights."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import glm_jax
from glm_jax.convert.hf import conversion, flat, load_model, save_model
from glm_jax.convert.released import Released
from glm_jax.convert.renamed import renamed
from glm_jax.convert.verify import different
from glm_jax.errors import UserError

torch = pytest.importorskip("torch")

CONFIG = {"model_type": "chatglm", "num_layers": 2, "padded_vocab_size": 61, "hidden_size": 16,
          "ffn_hidden_size": 20, "num_attention_heads": 4, "kv_channels": 8,
          "multi_query_attention": True, "multi_query_group_num": 2, "rope_ratio": 50,
          "seq_length": 64, "eos_token_id": [1, 2], "pad_token_id": 3, "torch_dtype": "float32"}
TOKENS = np.random.default_rng(0).integers(4, 61, (2, 9))
LINEAR = ("query_key_value.weight", "dense.weight", "4h.weight", "to_h.weight")


def release(dtype=np.float32, head="lm"):
    """Tensors under the names and shapes that THUDM released."""
    draw = np.random.default_rng(7)
    hidden, inner, qkv = 16, 20, (4 + 2 * 2) * 8
    shapes = {"transformer.embedding.word_embeddings.weight": (61, hidden),
              "transformer.encoder.final_layernorm.weight": (hidden,),
              "transformer.output_layer.weight": (61, hidden)}
    for n in range(2):
        layer = f"transformer.encoder.layers.{n}."
        shapes |= {layer + "input_layernorm.weight": (hidden,),
                   layer + "self_attention.query_key_value.weight": (qkv, hidden),
                   layer + "self_attention.query_key_value.bias": (qkv,),
                   layer + "self_attention.dense.weight": (hidden, 32),
                   layer + "post_attention_layernorm.weight": (hidden,),
                   layer + "mlp.dense_h_to_4h.weight": (2 * inner, hidden),
                   layer + "mlp.dense_4h_to_h.weight": (hidden, inner)}
    if head == "sequence":
        shapes |= {"classifier_head.weight": (3, hidden), "classifier_head.bias": (3,)}
    tensors = {name: draw.normal(0, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
    return tensors | {"transformer.rotary_pos_emb.inv_freq": inv_freq(4, dtype)}


def inv_freq(dim, dtype):
    """As the released code makes it."""
    kind = {"float32": torch.float32, "float16": torch.float16,
            "bfloat16": torch.bfloat16}[np.dtype(dtype).name]
    made = 1.0 / (10000 ** (torch.arange(0, dim, 2).to(dtype=kind) / dim))
    return made.float().numpy().astype(dtype)


def folder_of(path, tensors, form="safetensors", **fields):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | fields))
    names = sorted(tensors)
    shards = [names] if "sharded" not in form else [names[:5], names[5:]]
    single, ending = (("pytorch_model.bin", "bin") if "bin" in form
                      else ("model.safetensors", "safetensors"))
    files = [single] if len(shards) == 1 else [f"part-{n}.{ending}" for n in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        part = {name: tensors[name] for name in shard}
        if ending == "bin":
            torch.save({name: to_torch(array) for name, array in part.items()}, path / file)
        else:
            save_file(part, path / file)
    if len(shards) > 1:
        (path / f"{single}.index.json").write_text(json.dumps({"weight_map": {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard}}))
    return path


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_chatglm_in_and_out_is_the_same_to_the_byte(tmp_path, form, dtype):
    tensors = release(dtype)
    folder = folder_of(tmp_path / "in", tensors, form)
    save_model(load_model(folder, dtype=jnp.dtype(dtype)), tmp_path / "out")
    same_bytes(load_file(tmp_path / "out/model.safetensors"), tensors)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (CONFIG | {"torch_dtype": np.dtype(dtype).name}).items() <= written.items()
    assert written["architectures"] == ["ChatGLMModel"]


def test_a_chatglm_classifier_keeps_its_other_head(tmp_path):
    tensors = release(head="sequence")
    folder = folder_of(tmp_path / "in", tensors, num_labels=3,
                       architectures=["ChatGLMForSequenceClassification"])
    save_model(load_model(folder), tmp_path / "out")
    same_bytes(load_file(tmp_path / "out/model.safetensors"), tensors)


@pytest.mark.parametrize("dim", [4, 6, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_buffer_is_as_the_released_code_makes_it(dim, dtype):
    from glm_jax.models.chatglm import _frequencies
    np.testing.assert_array_equal(_frequencies(dim, np.dtype(dtype)), inv_freq(dim, dtype))


@pytest.mark.parametrize("name", ["Glm4", "Glm4Moe"])
def test_what_transformers_saves_comes_back_the_same(tmp_path, name):
    import transformers
    fields = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
              "attention_bias": True, "pad_token_id": 0}
    if name == "Glm4Moe":
        fields |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                   "use_qk_norm": True, "first_k_dense_replace": 2}
    config = getattr(transformers, f"{name}Config")(**fields)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float16)
    theirs.save_pretrained(tmp_path / "in")
    wanted = load_file(tmp_path / "in/model.safetensors")
    save_model(load_model(tmp_path / "in", dtype=jnp.float16), tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    for key in [key for key in wanted if key.endswith("e_score_correction_bias")]:
        assert ours[key].dtype == np.float32  # whatever the file kept it in
        wanted[key] = wanted[key].astype(np.float32)
    same_bytes(ours, wanted)


# --- pickled and quantised files ----------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def only(tensors):
    return {"a": torch.zeros(2), **tensors}


@pytest.mark.parametrize(("write", "what"), [
    (lambda path: path.write_bytes(b""), "damaged, or not only tensors"),
    (lambda path: path.write_bytes(b"<!DOCTYPE html>" * 9), "damaged, or not only tensors"),
    (lambda path: torch.save(only({"b": Evil()}), path), "damaged, or not only tensors"),
    (lambda path: torch.save(only({"b": 3}), path), "damaged, or not only tensors"),
    (lambda path: torch.save([torch.zeros(2)], path), "damaged, or not only tensors"),
    (lambda path: torch.save(only({1: torch.zeros(2)}), path), "a name that is no text"),
    (lambda path: torch.save(only({"b": torch.zeros(1).expand(10**11)}), path),  # of 400 GB
     "a tensor that is larger than what the file stores of it"),
])
def test_a_pickled_file_that_is_no_table_of_tensors(tmp_path, write, what, capsys):
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=what) as error:
        Released(tmp_path)
    assert str(tmp_path / "pytorch_model.bin") in str(error.value)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["glm", "glm4", "glm4_moe"])
def test_a_tied_head_that_torch_save_keeps(tiny, tmp_path, kind):
    fields = ({"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
              if kind == "glm4_moe" else {})
    model = tiny(model_type=kind, tie_word_embeddings=True, num_hidden_layers=1, head_dim=8,
                 num_key_value_heads=2, intermediate_size=48, **fields)
    save_model(model, tmp_path / "in")
    state = load_file(tmp_path / "in/model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    (tmp_path / "in/model.safetensors").unlink()
    torch.save({name: torch.tensor(array) for name, array in state.items()},
               tmp_path / "in/pytorch_model.bin")
    conversion(tmp_path / "in").write(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert different(tmp_path / "in", tmp_path / "out") == ""


def test_a_truncated_pickled_file(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(1000.0)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="damaged"):
        Released(tmp_path)


def test_files_of_old_torch_and_slices_of_bfloat16(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4).to(torch.bfloat16)
    torch.save({"a": whole}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    released = Released(tmp_path)
    part = released.read("a", (slice(1, 3), slice(0, 3)))
    assert (released.shapes, part.dtype) == ({"a": (3, 4)}, np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(part.astype(np.float32), whole[1:3, :3].float().numpy())


def test_without_torch_a_pickled_file_is_one_clear_message(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"reading a \.bin file needs torch"):
        Released(tmp_path)


def quantised(tensors, bits):
    """THUDM's packing, and what it stands for."""
    packed, wanted = dict(tensors), dict(tensors)
    for name in [name for name in tensors if ".layers." in name and name.endswith(LINEAR)]:
        weight = tensors[name]
        scale = (np.abs(weight).max(1) / (2 ** (bits - 1) - 1)).astype(np.float16)
        q = np.round(weight / scale[:, None].astype(np.float32)).astype(np.int8)
        wanted[name] = q.astype(np.float32) * scale.astype(np.float32)[:, None]
        packed[name] = q if bits == 8 else (q[:, ::2] << 4) | (q[:, 1::2] & 15)
        packed[name + "_scale"] = scale
    return packed, wanted


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_quantised_weights_load_as_what_they_stand_for(tmp_path, bits, form):
    packed, wanted = quantised(release(), bits)
    folder = folder_of(tmp_path / "in", packed, form, quantization_bit=bits)
    from glm_jax.parallel.mesh import make_mesh
    for mesh in (None, make_mesh({"fsdp": 2, "tensor": 4})):  # odd slices of bytes, too
        save_model(load_model(folder, mesh=mesh), tmp_path / "out")
        same_bytes(load_file(tmp_path / "out/model.safetensors"), wanted)
    assert "quantization_bit" not in json.loads((tmp_path / "out/config.json").read_text())


def test_slices_that_begin_within_a_byte(tmp_path):
    from glm_jax.convert.released import Dequantised
    packed, wanted = quantised(release(), 4)
    released = Dequantised(Released(folder_of(tmp_path / "in", packed)), 4)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    for start in range(4):
        for stop in range(start, 7):
            np.testing.assert_array_equal(released.read(name, (slice(1, 3), slice(start, stop))),
                                          wanted[name][1:3, start:stop])


@pytest.mark.parametrize(("bits", "what"), [
    (2, "quantization_bit=2 is not supported; supported: 4, 8"),
    (8, "quantization_bit=8, but no tensor has a weight_scale"),
])
def test_other_quantisations_are_refused(tmp_path, bits, what):
    with pytest.raises(UserError, match=what):
        load_model(folder_of(tmp_path / "in", release(), quantization_bit=bits))


# --- chatglm and glm ------------------------------------------------------------------------------

def test_as_glm_transformers_computes_the_same(tmp_path):
    import transformers
    model = load_model(folder_of(tmp_path / "in", release()))
    glm_jax.save_pretrained(model, tmp_path / "glm", architecture="glm")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "glm", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.rope_parameters["rope_theta"] == 500000.0  # 10000 * rope_ratio
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(glm_jax.forward(model, TOKENS), wanted, rtol=1e-4, atol=1e-4)
    assert theirs.config.eos_token_id == [1, 2]


def test_as_glm_and_back_is_the_same_to_the_byte(tmp_path):
    model = load_model(folder_of(tmp_path / "in", release()))
    save_model(renamed(model, "glm"), tmp_path / "glm")
    again = renamed(load_model(tmp_path / "glm"), "chatglm")
    assert again.config == model.config
    save_model(again, tmp_path / "out")
    same_bytes(load_file(tmp_path / "out/model.safetensors"), release())
    assert flat(again).keys() == flat(model).keys()


@pytest.mark.parametrize(("fields", "named"), [
    ({"partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0,
                       "original_max_position_embeddings": 8}}, "rope_scaling="),
    ({"model_type": "glm4"}, "model_type='glm4'"),
])
def test_what_chatglm_cannot_be_is_named(tiny, fields, named):
    from glm_jax.convert.hf import init_model
    from glm_jax.models import architecture_of
    raw = tiny().config.to_dict() | fields
    architecture = architecture_of(raw)
    model = init_model(architecture, architecture.config.from_dict(raw), "lm")
    with pytest.raises(UserError) as error:
        renamed(model, "chatglm")
    assert named in str(error.value)


def test_a_classifier_is_not_renamed(tiny):
    with pytest.raises(UserError, match="architectures: the sequence classifiers"):
        renamed(tiny("sequence"), "chatglm")
