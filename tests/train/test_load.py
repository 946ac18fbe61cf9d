"""A trained model from a run folder, an adapter or a Hugging Face folder: the same predictions."""

import json
import shutil

import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.parallel.mesh import make_mesh, use_rules
from glm_jax.train.load import classifier, last_logits, load_trained, mesh_for
from glm_jax.train.loop import train

TEXTS = ["房间喜欢,早餐满意", "电梯糟糕", "好"]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1})


@pytest.fixture
def run(smoke, tmp_path):
    def make(variant="", **fields):
        train(smoke(variant, **{"steps": 4, "optimizer.learning_rate": 0.05} | fields),
              tmp_path / "run")
        return tmp_path / "run"
    return make


def predict(folder, mesh, **how):
    trained = load_trained(folder, mesh, **how)
    task, function = classifier(trained, mesh)
    return trained, task.probabilities(function, TEXTS)


def test_a_run_and_its_adapter(run, mesh, base, monkeypatch):
    folder = run(**{"eval.every": 2})
    trained, wanted = predict(folder, mesh)
    assert trained.labels == ("好", "差") and trained.lora_config is not None
    assert [len(rows) > 0 for rows in trained.splits().values()] == [True] * 3
    exported, there = predict(folder / "adapter", mesh)
    assert exported.labels == trained.labels and exported.config is None
    np.testing.assert_allclose(there, wanted, atol=1e-6)
    ids = [np.asarray(trained.tokenizer.encode(text)) for text in TEXTS]
    logits = last_logits(exported, ids, mesh)
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), wanted,
                               atol=1e-6)
    with pytest.raises(UserError, match="no checkpoint '3'"):
        load_trained(folder, mesh, step=3)


@pytest.mark.parametrize(("asked", "axis", "sizes"), [
    ("", "", {"fsdp": 4, "tensor": 2}),  # as its run
    ("", "tensor", {"tensor": 8}), ("fsdp=2, tensor=2", "tensor", {"fsdp": 2, "tensor": 2}),
    ("data=-1", "", {"data": 8})])
def test_a_run_on_many_devices(run, mesh, asked, axis, sizes):
    """Its parameters lie in parts on its own mesh, or one that is asked for; the answers stay."""
    folder = run(**{"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "batch.rows": 8,
                    "mesh.rules": {"heads": None}})
    there, rules = mesh_for(folder, asked, axis)
    assert {axis: size for axis, size in there.shape.items() if size > 1} == sizes
    assert rules == {"heads": None}
    with use_rules(rules):
        trained, spread = predict(folder, there)
        task, function = classifier(trained, there)
        np.testing.assert_allclose(task.probabilities(function, TEXTS), spread, atol=1e-6)
    np.testing.assert_allclose(spread, predict(folder, mesh)[1], atol=1e-5)
    kernel = trained.model.layers.mlp.down_proj.kernel.get_value()
    assert kernel.addressable_shards[0].data.size * (
        sizes.get("fsdp", 1) * sizes.get("tensor", 1)) == kernel.size
    query = trained.model.layers.self_attn.q_proj.kernel.get_value()
    assert query.sharding.spec[2] is None  # by the run's rules, whose heads lie whole


def test_meshes_of_other_folders(base, tmp_path):
    """No run's, or a run's on other devices: in as many parts as there are devices."""
    assert mesh_for(base)[0].shape["fsdp"] == mesh_for(base, axis="tensor")[0].shape["tensor"]
    (tmp_path / "config.json").write_text(json.dumps({"identity": {}, "config": {
        "mesh": {"data": 1, "fsdp": 64, "cpu_devices": 0, "rules": {}}}}))
    assert mesh_for(tmp_path)[0].shape["fsdp"] == 8


@pytest.mark.parametrize(("asked", "message"), [
    ("fsdp", "--mesh=fsdp: each axis once with its size is wanted"),
    ("fsdp=2,fsdp=4", "each axis once"), ("4", "each axis once"),
    ("rows=2", "--mesh=rows=2: unknown axis 'rows'"),
    ("fsdp=x", "fsdp must be a whole number of devices, not 'x'"),
    ("fsdp=16", "fsdp=16 needs 16 devices, but there are 8; lower the sizes$"),
    ("tensor=3,fsdp=-1", "a multiple of 3 devices, there are 8; lower the sizes$"),
    ("fsdp=0", "must be positive"), ("fsdp=-1,tensor=-1", "at most one may be -1")])
def test_a_bad_mesh_is_named(base, asked, message):
    with pytest.raises(UserError, match=message):
        mesh_for(base, asked)


@pytest.mark.parametrize("variant", ["full", "conv-rnn"])
def test_a_run_without_an_adapter(run, mesh, variant):
    folder = run(variant)
    trained, wanted = predict(folder, mesh)
    assert trained.lora_config is None and wanted.shape == (3, 2)
    if variant == "full":
        path = folder / "model" / "tokenizer_config.json"
        for length in (48, None):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
            there, found = predict(folder / "model", mesh)
            np.testing.assert_allclose(found, wanted, atol=1e-6)
            assert there.shape.length == (length or 512)


def test_before_the_first_evaluation_the_last_step_is_taken(run, mesh):
    folder = run(**{"eval.every": 4, "checkpoint.every": 2})
    for path in (folder / "checkpoints").glob("4*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert predict(folder, mesh)[1].shape == (3, 2)


def test_a_base_that_has_changed(run, mesh, base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    folder = run("head", **{"model.path": str(tmp_path / "base")})
    weights = tmp_path / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"has changed since .* was trained on it"):
        load_trained(folder, mesh)


def test_what_can_not_be_loaded(base, mesh, tmp_path):
    with pytest.raises(UserError, match="neither a run folder nor an exported model"):
        load_trained(tmp_path, mesh)
    with pytest.raises(UserError, match=r"org/name: no such folder.*hf download"):
        load_trained("org/name", mesh)
    trained = load_trained(base, mesh)
    assert trained.labels == ()
    with pytest.raises(UserError, match="does not classify texts"):
        classifier(trained, mesh)
    with pytest.raises(UserError, match="only a run folder of a classification"):
        trained.splits()
