"""Fine-tuning BERT by configs/sentiment.py: whole, and with an adapter that PEFT reads."""

import numpy as np
import pytest

from glm_jax.convert.hf import init_model, save_model
from glm_jax.convert.verify import torch_logits
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
