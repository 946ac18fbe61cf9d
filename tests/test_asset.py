"""The committed glm-nano-zh: PyTorch loads it with none of our code and computes the same."""

from pathlib import Path

import numpy as np
import pytest

import glm_jax

FOLDER = Path(__file__).parents[1] / "glm_jax/assets/glm-nano-zh"
TEXTS = ("房间很干净，服务员也很热情，下次还会来。",
         "电脑用了两天就坏了\n客服 24 小时都没有人回 :(")
SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|endoftext|>", "<|system|>",
           "<|user|>", "<|assistant|>", "<|observation|>")


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "README.md"} <= sizes.keys()
    assert sum(sizes.values()) < 40e6


def test_transformers_loads_it_and_computes_the_same() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    ours, tokenizer = glm_jax.from_pretrained(FOLDER), glm_jax.load_tokenizer(FOLDER)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == their_tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits.numpy()
        np.testing.assert_allclose(glm_jax.forward(ours, np.array([ids])), expected,
                                   atol=1e-4, rtol=1e-4)
    assert theirs.generation_config.eos_token_id == [tokenizer.token_id("<|endoftext|>")]


def test_it_has_learned_chinese() -> None:
    ours, tokenizer = glm_jax.from_pretrained(FOLDER), glm_jax.load_tokenizer(FOLDER)

    def loss(ids: list[int]) -> float:
        logits = np.asarray(glm_jax.forward(ours, np.array([ids])))[0, 1:-1]
        top = logits.max(-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        return -float(np.mean(logs[np.arange(len(logs)), ids[2:]]))

    ids = tokenizer.encode(TEXTS[0])
    backwards = ids[:2] + ids[:1:-1]
    assert loss(ids) < 6.5 < np.log(tokenizer.vocab_size)
    assert loss(ids) < loss(backwards) - 1


def test_the_tokenizer_has_glms_special_tokens() -> None:
    tokenizer = glm_jax.load_tokenizer(FOLDER)
    assert sorted(tokenizer.token_id(token) for token in SPECIAL) == list(range(10))
    assert 16_000 <= tokenizer.vocab_size <= 32_000
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.token_id("<|endoftext|>")
