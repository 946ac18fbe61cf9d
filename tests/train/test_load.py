"""A trained model from a run folder, an adapter or a Hugging Face folder: the same predictions."""

import shutil

import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.parallel.mesh import make_mesh
from glm_jax.train.load import classifier, last_logits, load_trained
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


@pytest.mark.parametrize("variant", ["full", "conv-rnn"])
def test_a_run_without_an_adapter(run, mesh, variant):
    folder = run(variant)
    trained, wanted = predict(folder, mesh)
    assert trained.lora_config is None and wanted.shape == (3, 2)
    if variant == "full":
        np.testing.assert_allclose(predict(folder / "model", mesh)[1], wanted, atol=1e-6)


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
    trained = load_trained(base, mesh)
    assert trained.labels == ()
    with pytest.raises(UserError, match="does not classify texts"):
        classifier(trained, mesh)
    with pytest.raises(UserError, match="only a run folder of a classification"):
        trained.splits()
