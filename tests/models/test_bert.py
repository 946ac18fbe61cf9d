"""BERT against transformers, for any small config, padded, and packed as in training."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import glm_jax
from glm_jax.convert.hf import flat, load_model, save_model, tensors
from glm_jax.data.packing import Piece, assemble, shape_for
from glm_jax.errors import UserError
from glm_jax.models import as_batch
from glm_jax.models.bert import CLASSES

SMALL = {"model_type": "bert", "intermediate_size": 48, "num_hidden_layers": 2,
         "max_position_embeddings": 24}


@jax.jit
def logits(model, batch):
    return model.logits(model(batch)[0])


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 3))
    return {"hidden_size": heads * draw(st.sampled_from((2, 5, 8))), "num_attention_heads": heads,
            "intermediate_size": draw(st.integers(3, 20)), "vocab_size": draw(st.integers(8, 40)),
            "num_hidden_layers": draw(st.integers(1, 3)), "max_position_embeddings": 9,
            "type_vocab_size": draw(st.integers(1, 3)), "num_labels": draw(st.integers(2, 4)),
            "layer_norm_eps": draw(st.sampled_from((1e-12, 1e-3))), "initializer_range": 0.5}


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
          phases=(Phase.generate,))
@given(configs(), st.sampled_from(sorted(CLASSES)), st.integers(0, 99))
def test_transformers_computes_the_same(tmp_path, fields, head, seed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    theirs = getattr(transformers, CLASSES[head])(transformers.BertConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases are not zero, norms not one
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model, draw = load_model(tmp_path), np.random.default_rng(seed)
    assert model.head == head
    tokens = draw.integers(1, fields["vocab_size"], (2, 9))
    types = draw.integers(0, fields["type_vocab_size"], (2, 9))
    mask = np.ones((2, 9), int)
    mask[1, 6:] = 0
    batch = dataclasses.replace(as_batch(model.config, tokens, mask), token_types=types)
    with torch.no_grad():
        out = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask),
                     token_type_ids=torch.tensor(types))
    ours = np.asarray(logits(model, batch))
    if head == "qa":
        expected = torch.stack((out.start_logits, out.end_logits), -1).numpy()
    else:
        expected = out[0].numpy()
    if head == "sequence":
        np.testing.assert_allclose(ours[:, 0], expected, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_allclose(ours[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-4)


def test_packed_texts_are_classified_as_transformers_does_one_by_one(tiny, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, draw = tiny("sequence", **SMALL), np.random.default_rng(0)
    save_model(model, tmp_path / "bert")
    texts = [draw.integers(1, 67, n).astype(np.int32) for n in (5, 3, 7, 1, 12)]
    rows = [[0, 1, 2], [3, 4]]
    batch = assemble([[Piece(texts[i], label=i) for i in row] for row in rows],
                     shape_for(model.config, 2, 16, 3), pad_id=0)
    found = np.asarray(jax.jit(lambda model, batch: model.classify(batch))(model, batch))
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    for r, row in enumerate(rows):
        for n, i in enumerate(row):
            with torch.no_grad():
                expected = theirs(torch.tensor(texts[i][None], dtype=torch.long)).logits[0]
            np.testing.assert_allclose(found[r, n], expected.numpy(), rtol=1e-4, atol=1e-4)


def rewritten(folder, change):
    arrays = load_file(folder / "model.safetensors")
    save_file({change(name): array for name, array in arrays.items()},
              folder / "model.safetensors")


def old(name):
    name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
    return re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)


@pytest.mark.parametrize("change", [
    old, lambda name: name.removeprefix("bert."),
    lambda name: name if name.startswith(("bert.", "classifier")) else f"bert.{name}"])
@pytest.mark.parametrize("head", ["base", "sequence"])
def test_names_with_and_without_prefix_old_and_new(tiny, tmp_path, head, change):
    model = tiny(head, **SMALL)
    save_model(model, tmp_path / "bert")
    rewritten(tmp_path / "bert", change)
    again = load_model(tmp_path / "bert")
    assert dict(tensors(again)).keys() == dict(tensors(model)).keys()
    for path, param in flat(again).items():
        np.testing.assert_array_equal(param.get_value(), flat(model)[path].get_value())


def test_a_pretrained_folder_gets_a_classifier(tiny, tmp_path):
    """As the released ones: a masked language model, with parts that no class of ours has."""
    save_model(tiny("mlm", **SMALL), tmp_path / "bert")
    arrays = load_file(tmp_path / "bert/model.safetensors")
    more = {"cls.seq_relationship.weight": (2, 32), "bert.embeddings.position_ids": (1, 24),
            "cls.predictions.decoder.weight": (67, 32), "bert.pooler.dense.bias": (32,),
            "bert.pooler.dense.weight": (32, 32)}
    arrays |= {name: np.full(shape, 0.5, np.float32) for name, shape in more.items()}
    save_file(arrays, tmp_path / "bert/model.safetensors")
    model = load_model(tmp_path / "bert", head="sequence", num_labels=4)
    np.testing.assert_array_equal(model.pooler.kernel[...], 0.5)
    assert model.score.kernel[...].shape == (32, 4)
    assert {glm_jax.from_pretrained(tmp_path / "bert", head=head).head for head in CLASSES
            } == set(CLASSES)
    with pytest.raises(UserError, match=r"missing: embeddings\.word_embeddings.weight"):
        rewritten(tmp_path / "bert", lambda name: name.replace("word_emb", "wort_emb"))
        load_model(tmp_path / "bert")


def test_more_tokens_than_positions_are_refused(tiny):
    with pytest.raises(UserError, match="25 tokens in a row, but this model has only 24 positions"):
        as_batch(tiny("base", **SMALL).config, np.ones((1, 25), int))
