"""Whatever a header, an index or a config says: one line, nothing read elsewhere, nothing reserved.

Headers are damaged at random; what opens all the same must be what lies in the file.
"""

import contextlib
import copy
import json
import logging
import resource
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from glm_jax.convert.hf import conversion, load_model, save_model
from glm_jax.convert.released import INDEX, SINGLE, Released, all_finite
from glm_jax.convert.written import other_files
from glm_jax.errors import UserError

DATA = np.random.default_rng(0).integers(0, 2, 160).astype(np.uint8).tobytes()
HEADER = {"__metadata__": {"format": "pt"},
          "a": {"dtype": "F32", "shape": [4, 5], "data_offsets": [0, 80]},
          "b": {"dtype": "BF16", "shape": [20], "data_offsets": [80, 120]},
          "c": {"dtype": "I64", "shape": [5], "data_offsets": [120, 160]}}
ROOM = 2**28  # bytes that a test may reserve beyond what the process has


@contextlib.contextmanager
def no_more_memory():
    """Within: nothing large can be reserved, touched or not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def file_of(header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 3, 4, 5, 20, 79, 80, 81, 119, 120, 160, 161, 2**31, 2**32, 2**62,
                     2**63, 2**64, 2**64 - 1, 10**30, 100 * 2**30, 1.5, -0.0, True, None, "4", [],
                     {}, float("inf"), float("nan")]),
    st.integers(-200, 200))
VALUES = st.one_of(
    NUMBERS, st.lists(NUMBERS, max_size=4), st.just([2**32, 2**32]), st.just([0, 2**63]),
    st.sampled_from(["F32", "BF16", "F4", "F8_E8M0", "f32", "", "F" * 5000, "\n\n", "../../x"]))


@st.composite
def damaged(draw):
    header = copy.deepcopy(HEADER)
    data, length, kind = DATA, None, draw(st.integers(0, 5))
    for _ in range(draw(st.integers(0, 3))):
        tensor = draw(st.sampled_from(["a", "b", "c"]))
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))
        if isinstance(header.get(tensor), dict):
            header[tensor][field] = draw(VALUES)
    for _ in range(draw(st.integers(0, 1))):
        name = draw(st.sampled_from(["a", "b", "../c", "/etc/passwd", "", "\0", "__metadata__"]))
        header[name] = draw(st.one_of(VALUES, st.sampled_from([HEADER["a"], HEADER["c"]])))
    text = json.dumps(header).encode()
    if kind == 0:
        length = draw(st.one_of(st.integers(0, 400), st.integers(0, 2**64 - 1)))
    if kind == 1:
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 4)):]
    if kind == 2:
        text = draw(st.sampled_from([b"", b"[" * 50000, b'{"a":' * 50000, b"\xff\xfe{}", b"null",
                                     b"9" * 9999, text + b"\0" * 9, text[:-1] + b',"a":{}}']))
    whole = file_of(text, data, length)
    if kind == 3:
        whole = whole[:draw(st.integers(0, len(whole)))]
    if kind == 4:
        whole += draw(st.binary(max_size=40))
    return whole


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck),
          derandomize=True, phases=(Phase.generate,))
@given(damaged())
def test_damaged_headers(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / SINGLE).write_bytes(content)
    with no_more_memory():
        try:
            released = Released(folder)
        except UserError as error:
            message = str(error)
            assert message.startswith(str(folder)) and len(message) < 600, message
            assert "\n" not in message and message.isprintable(), message
            return
        held = 0
        for name, shape in released.shapes.items():
            array = released.read(name)
            assert (array.shape, array.dtype) == (shape, released.dtypes[name])
            assert array.tobytes() in content
            held += array.nbytes
    assert held <= len(content)


def test_the_file_that_is_damaged_above_is_read(tmp_path):
    (tmp_path / SINGLE).write_bytes(file_of(HEADER))
    released = Released(tmp_path)
    assert b"".join(released.read(name).tobytes() for name in "abc") == DATA


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5),
                              st.sampled_from(["one.safetensors", "../one.safetensors", "/dev/zero",
                                               "config.json", ".", "..", "x" * 5000, "a\0b"])),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=3),
                        st.dictionaries(st.sampled_from(["a", "b", "weight_map"]), inner,
                                        max_size=3)), max_leaves=6)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck),
          derandomize=True, phases=(Phase.generate,))
@given(JSON, st.booleans())
def test_damaged_indices(tmp_path_factory, value, wrapped):
    folder = tmp_path_factory.getbasetemp() / "indices" / "model"
    folder.mkdir(exist_ok=True, parents=True)
    for place in (folder, folder.parent):
        save_file({"a": np.ones(2), "b": np.ones(2)}, place / "one.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_text(json.dumps({"weight_map": value} if wrapped else value))
    try:
        released = Released(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        return
    assert [path.resolve().parent for path in released.files()] == [folder.resolve()]
    assert set(value.values() if wrapped else value["weight_map"].values()) == {"one.safetensors"}


# --- what lies outside the folder -----------------------------------------------------------------

@pytest.fixture
def folder(tiny, tmp_path):
    save_model(tiny(), tmp_path / "home" / "model")
    return tmp_path / "home" / "model"


@pytest.mark.parametrize("name", ["config.json", SINGLE])
@pytest.mark.parametrize("reader", [load_model, conversion])
def test_a_link_that_leads_outside_is_not_followed(folder, tmp_path, name, reader):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: it is a link to .*, which lies outside"):
        reader(folder)


def test_a_shard_that_is_a_link_and_files_to_copy(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "notes.txt").write_text("not of a checkpoint")
    # Loading remote code, transformers wants every module that one of them imports.
    code = ["configuration_chatglm.py", "modeling_glm.py", "quantization.py"]
    for name in (*code, "model.py"):
        (folder / name).write_text("")
    assert list(other_files(folder)) == [*code, "tokenizer_config.json"]
    assert list(other_files(folder, code=False)) == ["tokenizer_config.json"]
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match="lies outside the folder"):
        other_files(folder)
    (folder / SINGLE).rename(tmp_path / "shard.safetensors")
    (folder / "shard.safetensors").symlink_to("../../shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "shard.safetensors"}}))
    with pytest.raises(UserError, match="lies outside the folder"):
        load_model(folder)


def test_the_hubs_cache_links_to_its_blobs(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--x/snapshots/0a1b", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    load_model(snapshot)
    (blobs / "0").rename(tmp_path / "0")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../0")
    with pytest.raises(UserError, match="lies outside the folder"):
        load_model(snapshot)


@pytest.mark.parametrize("what", ["folder", "circle"])
def test_what_is_no_file(folder, what):
    (folder / SINGLE).unlink()
    if what == "folder":
        (folder / SINGLE).mkdir()
    else:
        (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(UserError) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


# --- damage that shows only when tensors are read -------------------------------------------------

def test_a_file_that_becomes_shorter_while_it_is_read(folder, tmp_path):
    found = conversion(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-9000])
    with pytest.raises(UserError, match="has changed since it was opened"):
        found.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_values_that_are_not_finite_are_seen(value, dtype):
    from glm_jax.convert.released import DTYPES
    array = np.linspace(-100, 100, 50).astype(DTYPES[dtype]).reshape(5, 10)
    assert all_finite(array) and all_finite(array.T) and all_finite(array[:, ::2])
    assert all_finite(np.array([np.finfo(np.float16).max, -0.0]).astype(DTYPES[dtype]))
    array[3, 4] = value
    assert not all_finite(array) and not all_finite(array.T) and all_finite(array[:3])
    assert all_finite(np.zeros((0, 3), np.float32)) and all_finite(np.arange(-3, 3))


@pytest.mark.parametrize("reader", [load_model, lambda folder: conversion(folder).write(
    folder.parent / "out")])
def test_weights_that_are_not_finite_are_warned_of_once(tiny, tmp_path, caplog, reader):
    save_model(tiny(), tmp_path / "model")
    path = tmp_path / "model" / SINGLE
    tensors = load_file(path)
    tensors["lm_head.weight"][3, 4] = np.nan
    save_file(tensors, path)
    with caplog.at_level(logging.WARNING):
        reader(tmp_path / "model")
    assert [f"{path}: lm_head.weight holds NaN or infinite values; perhaps others do too"] == [
        record.getMessage() for record in caplog.records]


# --- mixed-up and mis-shaped shards, and configs --------------------------------------------------

def test_shards_whose_files_are_mixed_up(tiny, tmp_path):
    save_model(tiny(), tmp_path / "model", max_shard_bytes=20000)
    one, two, *_ = sorted((tmp_path / "model").glob("*.safetensors"))
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    with pytest.raises(UserError, match=r"is not in this shard, but .*index\.json says so"):
        load_model(tmp_path / "model")


def test_a_shard_of_another_model(tiny, tmp_path):
    for name, inner in (("model", 48), ("other", 56)):
        save_model(tiny(intermediate_size=inner), tmp_path / name, max_shard_bytes=30000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    with pytest.raises(UserError, match=r"not in this shard|wrong shape: .* the config wants"):
        conversion(tmp_path / "model")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_shard_that_no_index_names_is_told_of(tiny, tmp_path, caplog, shards):
    save_model(tiny(), tmp_path / "model", max_shard_bytes=10**6 if shards == 1 else 40000)
    some = min((tmp_path / "model").glob("*.safetensors"))
    (tmp_path / "model/model-00009-of-00009.safetensors").write_bytes(some.read_bytes())
    with caplog.at_level(logging.WARNING):
        conversion(tmp_path / "model")
    (record,) = caplog.records
    assert "model-00009-of-00009.safetensors is not read" in record.getMessage()


@pytest.mark.parametrize(("fields", "what"), [
    ({"model_type": "llama"}, "'llama' with these fields is not supported; supported: glm, glm4"),
    ({"model_type": None}, "is not supported"),
    ({"hidden_act": "relu"}, "hidden_act='relu' is not supported; supported: 'silu'"),
    ({"hidden_size": "32"}, "hidden_size must be int, not '32'"),
    ({"rope_scaling": 3}, "rope_scaling must be a table, not 3"),
    ({"quantization_bit": 3}, "quantization_bit=3 is not supported"),
    ({"quantization_bit": "8"}, "quantization_bit='8' is not supported; supported: 4, 8"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is not supported"),
    ({"hidden_size": 64}, "wrong shape: model.embed_tokens.weight"),
    ({"hidden_size": -1}, "hidden_size must be 0 or more, not -1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be 0 or more, not nan"),
    ({"rope_theta": 0}, "the base of the rotary angles is 0"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 is no multiple of num_key_value_heads=2"),
    ({"architectures": 3}, "architectures must be a list of class names, not 3"),
    ({"num_hidden_layers": 10**12}, f"it wants {10**12} model.layers.{{}}.input_layernorm.weight, "
                                    "but there are only"),
    ({"num_labels": 10**12, "id2label": None},
     f"num_labels={10**12}: at most 1000000 are supported"),
    ({"model_type": "glm4_moe", "n_routed_experts": 6, "n_group": 4},
     "n_routed_experts=6 is no multiple of n_group=4"),
    ({"model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 5},
     "num_experts_per_tok=5, but there are 4"),
    ({"model_type": "glm4_moe", "num_nextn_predict_layers": 10**12},
     f"num_nextn_predict_layers={10**12}, but there are 2"),
    ({"model_type": "bert", "num_attention_heads": 3, "hidden_act": "gelu",
      "tie_word_embeddings": True}, "hidden_size=32 is no multiple of num_attention_heads=3"),
    ({"model_type": "chatglm", "position_encoding_2d": True, "tie_word_embeddings": True,
      "alpha_layers": "x"},
     "alpha_layers must be int, not 'x'"),
])
def test_a_config_with_what_is_not_known(folder, fields, what):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))
    with pytest.raises(UserError) as error:
        conversion(folder)
    assert what in str(error.value)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_])
def test_weights_of_whole_numbers_are_refused(tiny, tmp_path, dtype):
    save_model(tiny(), tmp_path / "model")
    path, name = tmp_path / "model" / SINGLE, "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name].astype(dtype)
    save_file(tensors, path)
    for reader in (load_model, conversion):
        with pytest.raises(UserError, match=f"no floating-point numbers: {name} is "
                                            f"{np.dtype(dtype)}$"):
            reader(tmp_path / "model")
