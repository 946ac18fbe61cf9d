"""Folders in and out: nothing changes on the way, transformers agrees, a mesh gets its shards."""

import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import glm_jax
from glm_jax.convert.hf import flat, init_model, load_model, save_model
from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.parallel.mesh import make_mesh, partition


def read(folder):
    """Every tensor of a folder, as bytes; with its shape and dtype."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(path).items():
            assert name not in found
            found[name] = (array.dtype.name, array.shape, array.tobytes())
    return found


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "model"
    save_model(tiny(), out)
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "attention_bias": False},
                                    {"num_hidden_layers": 1, "num_key_value_heads": 1}])
def test_in_and_out_again_is_the_same_to_the_byte(tiny, tmp_path, dtype, fields):
    save_model(tiny(**fields), tmp_path / "first", dtype=jnp.dtype(dtype))
    model = load_model(tmp_path / "first", dtype=jnp.dtype(dtype))
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=9000)
    first = read(tmp_path / "first")
    assert {name for name, *_ in first.values()} == {dtype}
    assert first == read(tmp_path / "one") == read(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    for a, b in zip(flat(model).values(), flat(load_model(tmp_path / "many")).values(),
                    strict=True):
        np.testing.assert_array_equal(a.get_value().astype(jnp.float32), b.get_value())


def test_shards_keep_their_limit_and_the_index_is_right(folder, tiny, tmp_path):
    save_model(tiny(), tmp_path / "many", max_shard_bytes=9000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    sizes = {}
    for shard in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "many" / shard)
        sizes[shard] = sum(array.nbytes for array in tensors.values())
        assert sizes[shard] <= 9000 or len(tensors) == 1
        assert {n for n, s in index["weight_map"].items() if s == shard} == set(tensors)
        with safe_open(tmp_path / "many" / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(index["weight_map"]) == set(read(folder))


@pytest.mark.parametrize(("head", "kind"), [
    ("lm", "AutoModelForCausalLM"), ("sequence", "AutoModelForSequenceClassification"),
    ("token", "AutoModelForTokenClassification")])
def test_transformers_computes_the_same(tiny, tmp_path, head, kind):
    import torch
    import transformers
    model = tiny(head, initializer_range=0.1)
    save_model(model, tmp_path / "out", max_shard_bytes=20000)
    tokens = np.random.default_rng(0).integers(1, 67, (3, 8))
    tokens[1, 5:] = 0  # the padding token
    mask = (tokens != 0).astype(int)
    theirs, report = getattr(transformers, kind).from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits
    ours = np.asarray(glm_jax.forward(model, tokens, mask))
    real = slice(None) if head == "sequence" else mask.astype(bool)
    np.testing.assert_allclose(ours[real], wanted.numpy()[real], rtol=1e-4, atol=1e-4)


def test_a_mesh_gets_the_same_parameters_each_split_by_the_rules(folder):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    alone, spread = flat(load_model(folder)), flat(load_model(folder, mesh=mesh))
    for path, param in spread.items():
        array, axes = param.get_value(), param.get_metadata("axes")
        np.testing.assert_array_equal(array, alone[path].get_value())
        assert array.sharding.mesh == mesh
        assert array.sharding.spec == partition(axes, array.shape, mesh.shape), path
    shards = {path: {shard.data.shape for shard in param.get_value().addressable_shards}
              for path, param in spread.items()}
    assert shards["layers.self_attn.q_proj.kernel"] == {(2, 8, 16)}  # of [2, 32, 32]
    assert shards["layers.mlp.down_proj.kernel"] == {(2, 24, 8)}  # of [2, 48, 32]
    assert shards["layers.self_attn.q_proj.bias"] == {(2, 16)}
    assert shards["norm.scale"] == {(32,)}
    assert shards["embed_tokens.embedding"] == {(67, 8)}  # 2 does not divide 67
    assert {len(p.get_value().sharding.device_set) for p in alone.values()} == {1}


def test_a_mesh_exports_the_same_bytes(folder, tmp_path):
    save_model(load_model(folder, mesh=make_mesh({"fsdp": 2, "tensor": 4})), tmp_path / "out")
    assert read(tmp_path / "out") == read(folder)


def test_random_parameters_do_not_depend_on_the_mesh(tiny):
    config = tiny().config
    alone, spread = (flat(init_model(architecture_of(config.to_dict()), config, "lm", seed=3,
                                     mesh=mesh)) for mesh in (None, make_mesh({"fsdp": 4})))
    for path, param in alone.items():
        np.testing.assert_array_equal(param.get_value(), spread[path].get_value())
    assert 0.2 < np.std(alone["lm_head.kernel"].get_value()) < 0.4  # initializer_range 0.3


def test_a_new_head_begins_random_and_the_rest_is_the_files(folder):
    model = load_model(folder, head="sequence", num_labels=5, seed=1)
    again, other = (load_model(folder, head="sequence", num_labels=5, seed=n) for n in (1, 2))
    assert model.score.kernel[...].shape == (32, 5)
    np.testing.assert_array_equal(model.score.kernel[...], again.score.kernel[...])
    assert not np.allclose(model.score.kernel[...], other.score.kernel[...])
    np.testing.assert_array_equal(model.norm.scale[...], load_model(folder).norm.scale[...])
    assert not hasattr(model, "lm_head")


def test_config_fields_can_be_replaced_and_unknown_ones_are_named(folder):
    model = load_model(folder, rope_theta=5e6, id2label={0: "a", 1: "b"})
    assert (model.config.rope_theta, model.config.num_labels) == (5e6, 2)
    with pytest.raises(UserError, match=r"'rope_thta' is no field .* 'rope_theta' meant"):
        load_model(folder, rope_thta=5e6)


def test_weights_of_half_precision_are_read_into_any_dtype(tiny, tmp_path):
    save_model(tiny(), tmp_path / "half", dtype=jnp.float16)
    model = load_model(tmp_path / "half", dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {p.get_value().dtype for p in flat(model).values()} == {jnp.dtype("float32")}
    assert model.dtype == jnp.bfloat16
    np.testing.assert_allclose(model.norm.scale[...], tiny().norm.scale[...], rtol=1e-3)


# --- what does not fit ------------------------------------------------------------------------

def edited(folder, tmp_path, change):
    """A copy of the folder whose tensors `change` has edited."""
    out = tmp_path / "edited"
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(Q), f"missing: {Q} [32, 32]"),
    (lambda t: t.update({"model.extra.weight": t[Q]}), "unexpected: model.extra.weight [32, 32]"),
    (lambda t: t.update({"model.layers.2.self_attn.q_proj.weight": t[Q]}),
     "unexpected: model.layers.2.self_attn.q_proj.weight"),
    (lambda t: t.update({Q: t[Q][:30]}),
     f"wrong shape: {Q} is [30, 32], the config wants [32, 32]"),
    (lambda t: t.update({Q: t[Q].ravel()}), f"wrong shape: {Q} is [1024]"),
])
def test_a_tensor_that_does_not_fit_is_named(folder, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        load_model(edited(folder, tmp_path, change))
    assert message in str(error.value)
    assert "edited" in str(error.value)


def test_many_faults_are_one_message_of_bounded_length(folder, tmp_path):
    with pytest.raises(UserError, match=r"… and \d+ more") as error:
        load_model(edited(folder, tmp_path, lambda t: [t.pop(n) for n in list(t)[1:]]))
    assert len(str(error.value).splitlines()) == 12


def test_the_head_that_the_config_names_must_be_there(tiny, tmp_path):
    save_model(tiny("token"), tmp_path / "out")
    for names in (["score.bias"], ["score.weight"]):
        with pytest.raises(UserError, match=f"missing: {names[0]}"):
            broken = tmp_path / names[0]
            broken.mkdir()
            load_model(edited(tmp_path / "out", broken, lambda t, n=names: [t.pop(x) for x in n]))


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    (lambda f: (f / "config.json").write_text('{"model_type": \n "glm",}'),
     "config.json:2: broken JSON at column"),
    (lambda f: (f / "config.json").write_text("[]"), "a JSON object is wanted, not list"),
    (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "not UTF-8 at byte 7"),
    (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "'llama' with these"),
])
def test_a_config_that_cannot_be_read_is_named(folder, tmp_path, change, message):
    out = edited(folder, tmp_path, lambda tensors: None)
    change(out)
    with pytest.raises(UserError) as error:
        load_model(out)
    assert message in str(error.value)
    assert str(out) in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nope: no such folder.*hf download"):
        load_model(tmp_path / "nope")


# --- writing ----------------------------------------------------------------------------------

def test_a_failed_save_leaves_what_was_there(tiny, folder, tmp_path, monkeypatch):
    save_model(tiny(), tmp_path / "out", files={"tokenizer.json": b"{}"})
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in before

    def full(folder, tensors, limit, wrote):
        tensors[0].make()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("glm_jax.convert.hf.write_safetensors", full)
    with pytest.raises(UserError, match="out: can't be written: No space left on device"):
        save_model(tiny(num_hidden_layers=1), tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_takes_no_more(tiny, tmp_path):
    """safetensors has its own exception for it; a limit on file sizes stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        with pytest.raises(UserError, match=r"out: can't be written: .*File too large"):
            save_model(tiny(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_saving_replaces_a_checkpoint_whole(tiny, tmp_path):
    save_model(tiny(), tmp_path / "out", max_shard_bytes=9000)
    (tmp_path / "out/README.md").write_text("by hand")
    save_model(tiny(), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json",
                                                                    "model.safetensors"]
    assert (tmp_path / "out/README.md").read_text() == "by hand"
    save_model(tiny(), tmp_path / "out", files={"README.md": b"new"})
    assert (tmp_path / "out/README.md").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kept", ["notes.txt", "checkpoints/1", "reviews.csv"])
def test_saving_does_not_destroy_anything_else(tiny, tmp_path, kept):
    path = tmp_path / "out" / kept
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    if kept != "notes.txt":  # a run's folder has a config.json, too
        (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(UserError, match="out: is there already and is more than a checkpoint"):
        save_model(tiny(), tmp_path / "out")
    assert path.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_where_nothing_can_be_written(tiny, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't be written"):
        save_model(tiny(), tmp_path / "out")


def test_equal_models_give_equal_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        save_model(tiny(), tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
                     for name in ("a", "b"))
    assert first == second
    assert jax.device_count() == 8  # what the tests of meshes above count on
