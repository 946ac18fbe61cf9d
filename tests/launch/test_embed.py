"""launch/embed.py: a teacher's vectors for a corpus, and a student that learns them."""

import pytest

from glm_jax.data.corpus import Document, TokenCorpus, write_tokens
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.train.loop import train


@pytest.fixture
def corpus(base, tmp_path):
    tokenizer = load_tokenizer(base)
    texts = [f"房间{'很' * n}干净" for n in range(12)] + ["早餐差" * 40]
    for split, copies in (("train", 2), ("dev", 1)):
        documents = [Document(text, 0) for text in texts * copies]
        write_tokens(tmp_path / "corpus", split, documents, tokenizer)
    tokenizer.save(tmp_path / "corpus" / "tokenizer")
    return tmp_path / "corpus"


@pytest.fixture
def teacher(base, tmp_path):
    import torch
    import transformers
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, pad_token_id=5)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "teacher")
    load_tokenizer(base).save(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_short_documents_get_vectors_that_pretraining_learns(door, corpus, teacher, tmp_path):
    done = door("embed", f"--corpus={corpus}", f"--teacher={teacher}", "--tokens=30",
                "--documents=8")
    assert done.code == 0, done.err
    assert "8 vectors of train, 8 vectors of dev" in done.out
    read = TokenCorpus(corpus, "train")
    vectors, of = read.vectors()
    assert vectors.shape == (8, 32) and sorted(of) == sorted([-1] * 10 + [*range(8)] * 2)
    assert read.lengths[of >= 0].max() <= 30
    from configs.pretrain import get_config
    config = get_config("smoke")
    config.update_from_flattened_dict({
        "task.corpus": str(corpus), "model.tokenizer": str(corpus / "tokenizer"),
        "task.summaries": 1.0, "task.summary_weight": 1000.0,
        "model.config.vocab_size": 320, "model.config.hidden_size": 32,
        "mesh.data": 1, "log.tensorboard": False})
    assert train(config, tmp_path / "run").result["dev"]["cosine"] > 0.2  # 0 on average if random


def test_a_corpus_without_short_documents_is_refused(refused, corpus, teacher):
    assert "no document of at most 1 tokens" in refused(
        "embed", f"--corpus={corpus}", f"--teacher={teacher}", "--tokens=1")
    none = corpus / "no"
    for command in (("embed", f"--corpus={none}", f"--teacher={teacher}"),
                    ("train", "--config=configs/pretrain.py:smoke", f"--config.task.corpus={none}",
                     f"--config.model.tokenizer={none}/tokenizer")):
        assert (f"error: {none}/train: no corpus there. Build it: python launch/corpus.py "
                f"--out={none}") == refused(*command)
    assert "no such folder" in refused("embed", f"--corpus={corpus}", f"--teacher={corpus / 'no'}")
