"""Toy tokenizer files of every version: a few dozen pieces, the layout of the released ones."""

import base64
import functools
import io
import json

import sentencepiece

from glm_jax.data.bpe import byte_letters
from glm_jax.data.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["你好，世界", "Hello world, get_weather", "今天天气怎么样？", "问：答：Round",
         "the people said"]
V1_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
NAMES = {"chatglm1": "ice_text.model", "glm2021": "cog-pretrain.model"}


@functools.cache
def sentencepiece_file(symbols: tuple[str, ...] = ()) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=out, vocab_size=330 + len(symbols),
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=list(symbols), minloglevel=2)
    return out.getvalue()


def trained() -> dict[str, object]:
    return json.loads(train_tokenizer([text * 3 for text in TEXTS], 320).to_str())


@functools.cache
def ranks_file() -> bytes:
    """tiktoken's form: bytes, then what a trained BPE merged."""
    byte = {letter: b for b, letter in enumerate(byte_letters())}
    tokens = [bytes([b]) for b in range(256)]
    for left, right in trained()["model"]["merges"]:
        tokens.append(bytes(byte[letter] for letter in left + right))
    return b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens)) + b"\n"


def files(version: str, **config: object) -> dict[str, bytes]:
    if version == "glm4":
        content = ranks_file()
    elif version == "chatglm1":
        blanks = ("<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81)))
        content = sentencepiece_file(("<pad>", *blanks, *V1_SPECIAL))
        config = {"num_image_tokens": 0, **config}
    else:
        content = sentencepiece_file()
    if version in ("chatglm2", "chatglm3"):
        config = {"name_or_path": f"THUDM/{version}-6b", **config}
    return {NAMES.get(version, "tokenizer.model"): content,
            "tokenizer_config.json": json.dumps(config).encode()}


VERSIONS = ("chatglm1", "chatglm2", "chatglm3", "glm4", "glm2021")


@functools.cache
def tokenizer(version: str) -> Tokenizer:
    return Tokenizer(files(version), version)
