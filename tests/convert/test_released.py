"""Damaged and lying checkpoint files: each is one clear message, and none is believed."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from glm_jax.convert.released import INDEX, SINGLE, Released
from glm_jax.errors import UserError

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


def single(folder):
    save_file(TENSORS, folder / SINGLE)


def sharded(folder, weight_map=None):
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    index(folder, weight_map or {"a": "one.safetensors", "b": "two.safetensors"})


def index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("write", [single, sharded])
def test_reads_names_shapes_and_slices(tmp_path, write):
    write(tmp_path)
    released = Released(tmp_path)
    assert released.shapes == {"a": (2, 3), "b": (4,)}
    np.testing.assert_array_equal(released.read("a"), TENSORS["a"])
    np.testing.assert_array_equal(released.read("a", (slice(1, 2), slice(0, 2))),
                                  TENSORS["a"][1:2, 0:2])


def no_weights(folder):
    (folder / "tf_model.h5").write_bytes(b"")


def missing_shard(folder):
    sharded(folder)
    (folder / "two.safetensors").unlink()


def truncated(folder):
    single(folder)
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_the_header(folder):
    single(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:20])


def empty_file(folder):
    (folder / SINGLE).write_bytes(b"")


def header_of_100_gb(folder):
    (folder / SINGLE).write_bytes(struct.pack("<Q", 100 * 2**30) + b"{}")


def tensor_of_100_gb(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [5**10, 2560],
                               "data_offsets": [0, 5**10 * 2560 * 4]}}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def broken_header(folder):
    (folder / SINGLE).write_bytes(struct.pack("<Q", 9) + b'{"a": nul')


def a_page_of_html(folder):
    (folder / SINGLE).write_text("<!DOCTYPE html><title>Sign in</title>" * 50)


@pytest.mark.parametrize(("damage", "where", "what"), [
    (no_weights, "", "no weights: neither model.safetensors nor"),
    (missing_shard, "two.safetensors", "shard is missing"),
    (truncated, SINGLE, "damaged or truncated"),
    (cut_in_the_header, SINGLE, "damaged or truncated"),
    (empty_file, SINGLE, "damaged or truncated"),
    (header_of_100_gb, SINGLE, "damaged or truncated"),
    (tensor_of_100_gb, SINGLE, "damaged or truncated"),
    (broken_header, SINGLE, "damaged or truncated"),
    (a_page_of_html, SINGLE, "damaged or truncated"),
])
def test_damaged_files(tmp_path, damage, where, what):
    damage(tmp_path)
    with pytest.raises(UserError, match=what) as error:
        Released(tmp_path)
    assert str(tmp_path / where) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("weight_map", "what"), [
    ({"a": "one.safetensors", "b": "one.safetensors"}, "tensor 'b' is not in this shard"),
    ({"a": "one.safetensors", "c": "two.safetensors"}, "tensor 'c' is not in this shard"),
    ({"a": "../one.safetensors"}, "'../one.safetensors' lies outside the folder"),
    ({"a": "/one.safetensors"}, "lies outside the folder"),
    ({"a": "sub/one.safetensors"}, "lies outside the folder"),
    ({"a": ".."}, "lies outside the folder"),
    ({"a": ""}, "lies outside the folder"),
    ({"a": None}, "weight_map is not a table"),
    ({"a": ["one.safetensors"]}, "weight_map is not a table"),
    ({}, "weight_map is not a table"),
    (["one.safetensors"], "weight_map is not a table"),
])
def test_an_index_that_lies(tmp_path, weight_map, what):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "one.safetensors")  # there to be found, were it believed
    sharded(folder)
    index(folder, weight_map)
    with pytest.raises(UserError, match=what):
        Released(folder)


def test_a_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="'a' is also in another shard"):
        Released(tmp_path)
