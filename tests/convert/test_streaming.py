"""One folder from another with no model between: the same bytes, and little memory.

And what is read for a mesh: each device's slice, a few layers at a time.
"""

import json
import math
import tracemalloc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from glm_jax.convert import hf, written
from glm_jax.convert.hf import conversion, flat, load_model, open_folder, save_model, stored
from glm_jax.convert.renamed import renamed
from glm_jax.convert.verify import different
from glm_jax.convert.written import Tensor, size_in_bytes, whole_folder, write_safetensors
from glm_jax.errors import UserError
from glm_jax.parallel.mesh import make_mesh, sharding
from tests.convert.test_hf import read

CHATGLM = {"model_type": "chatglm", "num_layers": 3, "padded_vocab_size": 61, "hidden_size": 32,
           "ffn_hidden_size": 48, "num_attention_heads": 4, "kv_channels": 8,
           "multi_query_group_num": 2, "rope_ratio": 50, "seq_length": 64}
FAMILY = {
    "glm": {},
    "glm4_moe": {"model_type": "glm4_moe", "intermediate_size": 48, "num_hidden_layers": 3,
                 "num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 8,
                 "num_experts_per_tok": 2, "use_qk_norm": True, "first_k_dense_replace": 1},
    "bert": {"model_type": "bert", "intermediate_size": 48, "num_hidden_layers": 2,
             "max_position_embeddings": 24},
    "chatglm6b": {"model_type": "chatglm", "position_encoding_2d": True, "num_layers": 2,
                  "inner_hidden_size": 48},
    "glm2021": {"model_type": "glm", "block_position_encoding": True, "num_layers": 2,
                "max_sequence_length": 40},
}
HEADS = {"bert": "mlm"}


@pytest.fixture(scope="module")
def chatglm(tiny, tmp_path_factory):
    """A ChatGLM3 in bfloat16, in several files."""
    fields = {name: value for name, value in CHATGLM.items() if name != "model_type"}
    folder = tmp_path_factory.mktemp("chatglm") / "model"
    save_model(tiny(model_type="chatglm", **fields), folder, dtype=jnp.bfloat16,
               max_shard_bytes=20000)
    return folder


@pytest.mark.parametrize("dtype", [None, np.float16])
@pytest.mark.parametrize("name", FAMILY)
def test_a_folder_is_written_again_as_its_model_is(tiny, tmp_path, name, dtype):
    model = tiny(HEADS.get(name, "lm"), **FAMILY[name])
    save_model(model, tmp_path / "in")
    conversion(tmp_path / "in", dtype=dtype).write(tmp_path / "out", 9000)
    save_model(model, tmp_path / "wanted", dtype=dtype)
    assert read(tmp_path / "out") == read(tmp_path / "wanted")
    assert ((tmp_path / "out/config.json").read_text()
            == (tmp_path / "wanted/config.json").read_text())
    assert different(tmp_path / "in", tmp_path / "out") == ""


def test_chatglm_as_glm_and_back(chatglm, tmp_path):
    conversion(chatglm, "glm").write(tmp_path / "glm", 20000)
    save_model(renamed(load_model(chatglm, dtype=jnp.bfloat16), "glm"), tmp_path / "wanted")
    assert read(tmp_path / "glm") == read(tmp_path / "wanted")
    conversion(tmp_path / "glm", "chatglm").write(tmp_path / "back")
    assert read(tmp_path / "back") == read(chatglm)
    assert different(chatglm, tmp_path / "glm") == ""


def test_a_correction_bias_keeps_the_dtype_of_its_file(tiny, tmp_path):
    save_model(tiny(**FAMILY["glm4_moe"]), tmp_path / "in", dtype=np.float16)
    path = tmp_path / "in/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors[name].dtype == np.float32
    save_file(tensors | {name: tensors[name].astype(np.float16)}, path, {"format": "pt"})
    conversion(tmp_path / "in").write(tmp_path / "out")
    assert read(tmp_path / "out") == read(tmp_path / "in")
    conversion(tmp_path / "in", dtype=jnp.bfloat16).write(tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors")[name].dtype == np.float32


def test_a_difference_is_named(chatglm, tmp_path):
    found = conversion(chatglm, "glm")
    at = next(i for i, tensor in enumerate(found.tensors) if "1.mlp.down" in tensor.name)
    good = found.tensors[at]
    found.tensors[at] = good._replace(make=lambda: good.make() * 2)
    found.write(tmp_path / "out")
    assert different(chatglm, tmp_path / "out") == "layers.mlp.down_proj.kernel.1"


def test_an_architecture_or_head_that_is_not_the_same_is_refused(tiny, tmp_path):
    save_model(tiny("sequence"), tmp_path / "in")
    with pytest.raises(UserError, match="the sequence classifiers of chatglm and glm differ"):
        conversion(tmp_path / "in", "chatglm")


def test_the_memory_is_a_few_tensors_whatever_the_number_of_layers(tiny, tmp_path):
    """A model of ten times the memory that is used."""
    save_model(tiny(num_hidden_layers=30, hidden_size=64, intermediate_size=512), tmp_path / "in",
               max_shard_bytes=10**6)
    largest = 2 * 512 * 64 * 4
    tracemalloc.start()
    try:
        found = conversion(tmp_path / "in", "chatglm")
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        found.write(tmp_path / "out", 10**6)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    total = sum(tensor.bytes for tensor in found.tensors)
    assert total > 40 * largest
    assert largest < peak < 4 * largest


@pytest.mark.parametrize("reader", [
    lambda folder: conversion(folder, dtype=np.float16).write(folder.parent / "out"),
    lambda folder: load_model(folder, dtype=jnp.float16)])
def test_a_number_too_large_for_the_dtype_is_refused(tiny, tmp_path, reader):
    save_model(tiny(), tmp_path / "in")
    path, name = tmp_path / "in/model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name][2, 3] = -70000
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"down_proj.weight: 7e\+04 is too large for float16; take"):
        reader(tmp_path / "in")
    assert not (tmp_path / "out").exists()
    load_model(tmp_path / "in", dtype=jnp.bfloat16)


# --- sharded import -------------------------------------------------------------------------------

class Counting:
    """A source that counts what is read of it."""

    def __init__(self, source):
        self._source, self.bytes, self.order = source, 0, []
        self.folder, self.shapes, self.dtypes = source.folder, source.shapes, source.dtypes

    def read(self, name, index=()):
        array = self._source.read(name, index)
        self.bytes += array.nbytes
        self.order.append(name)
        return array


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_read_for_a_device_is_what_it_holds(tiny, tmp_path, name):
    head = HEADS.get(name, "lm")
    save_model(tiny(head, **FAMILY[name]), tmp_path / "in")
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    found = open_folder(tmp_path / "in")
    counting = Counting(found.source)
    parameters = stored(found._replace(source=counting))
    model = load_model(tmp_path / "in", mesh=mesh)
    assert counting.bytes == 0
    split = 0
    for path, param in flat(model).items():
        array, one = param.get_value(), parameters[path]
        where = sharding(param.get_metadata("axes"), array.shape, mesh)
        for device, index in where.devices_indices_map(array.shape).items():
            counting.bytes = 0
            part = one(index)
            assert counting.bytes == part.nbytes == math.prod(where.shard_shape(array.shape)) * 4
            shard = next(s for s in array.addressable_shards if s.device == device)
            np.testing.assert_array_equal(part, shard.data)
        split += where.shard_shape(array.shape) != array.shape
    assert split > 3


def test_every_byte_is_read_once_and_layers_in_turn(chatglm, monkeypatch):
    alone = flat(load_model(chatglm, dtype=jnp.bfloat16))
    found = open_folder(chatglm)
    counting = Counting(found.source)
    monkeypatch.setattr(hf, "open_folder", lambda *_, **__: found._replace(source=counting))
    monkeypatch.setattr(hf, "_AT_ONCE", 2000)  # bytes: less than one layer of a matrix
    spread = flat(load_model(chatglm, dtype=jnp.bfloat16, mesh=make_mesh({"fsdp": 4, "tensor": 2})))
    for path, param in spread.items():
        np.testing.assert_array_equal(param.get_value(), alone[path].get_value())
        assert param.get_value().sharding == sharding(
            param.get_metadata("axes"), param.get_value().shape,
            make_mesh({"fsdp": 4, "tensor": 2})), path
    assert counting.bytes == sum(param.get_value().nbytes for param in spread.values())
    down = [int(name.split(".")[3]) for name in counting.order if "4h_to_h" in name]
    assert down == sorted(down) and set(down) == {0, 1, 2}
    assert jax.device_count() == 8


# --- writing --------------------------------------------------------------------------------------

def made(name, array):
    return Tensor(name, array.shape, array.dtype, lambda: array)


def test_what_is_written_the_library_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"half": rng.normal(size=3).astype(np.float16), "α": rng.normal(size=(2, 3)),
              "none": np.zeros((0, 4), np.float32), "one": np.float32(3).reshape(()),
              "bf": rng.normal(size=5).astype(jnp.bfloat16),
              "turned": np.arange(6.0).reshape(2, 3).T,
              "ids": np.arange(3), "flags": np.array([True, False])}
    write_safetensors(tmp_path, [made(*item) for item in arrays.items()], 10**9)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0  # so that the tensors lie at multiples of their size


def test_shards_are_those_of_hugging_face(tmp_path):
    sizes = {"a": 4, "b": 4, "large": 30, "c": 4, "d": 4, "e": 4}
    write_safetensors(tmp_path, [made(n, np.zeros(size, np.uint8)) for n, size in sizes.items()],
                      8)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model-0000{}-of-00004.safetensors".format
    assert index == {"metadata": {"total_size": 50}, "weight_map": {
        "a": name(1), "b": name(1), "large": name(2), "c": name(3), "d": name(3), "e": name(4)}}
    for tensor, file in index["weight_map"].items():
        assert tensor in load_file(tmp_path / file)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(("text", "size"), [
    ("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("0.5 GB", 5 * 10**8),
    ("1000", 1000), ("1KB", 1000)])
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0", "1e9", "5GBs"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is no size"):
        size_in_bytes(text)


def test_a_disk_without_room_is_refused_before_anything_is_written(chatglm, tmp_path, monkeypatch):
    found = conversion(chatglm)
    found.tensors[0] = found.tensors[0]._replace(make=lambda: pytest.fail("it was read"))
    monkeypatch.setattr(written.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the tensors are 0\.00 GB, but only 0\.00 GB are free"):
        found.write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_source_that_breaks_off_leaves_nothing(chatglm, tmp_path):
    found = conversion(chatglm, dtype=np.float32)

    def broken():
        raise UserError("gone")
    found.tensors[-1] = found.tensors[-1]._replace(make=broken)
    with pytest.raises(UserError, match="gone"):
        found.write(tmp_path / "out", 9000)
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_for_ever(tmp_path):
    for name in (".out-ab_d1234", ".out-ab_d1234-old", ".out-more-ab_d1234", ".out-notes"):
        (tmp_path / name).mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out"):
        raise RuntimeError  # what was whole before may be all there is
    assert (tmp_path / ".out-ab_d1234-old").is_dir()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out-more-ab_d1234", ".out-notes"}
