"""The pre-training corpus: the text of all sources, cleaned, de-duplicated, stored as tokens."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_jax.data.sources import SOURCES, Source, review_splits
from glm_jax.data.split import normalise, unit_hash
from glm_jax.data.tokenizer import Tokenizer, tokenizer_files, train_tokenizer
from glm_jax.errors import UserError

MIN_CHARS = 20
MIN_REVIEW_CHARS = 4
DEV_FRACTION = 0.005
RUN = 20  # a document that shares a run of this many letters with a held-out review is dropped


class Document(NamedTuple):
    """A cleaned text and the index of its source."""

    text: str
    source: int


def clean(text: str) -> str:
    """Without control characters, trailing blanks, or runs of blanks and empty lines.

    Letters, width and punctuation stay as they are: a user's text comes in them too.
    """
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f​‎﻿�]", "", text)
    text = re.sub(r"[ \t\xa0]+", " ", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


class Leaks:
    """Tells which texts repeat a held-out text: wholly, or in a run of RUN letters."""

    def __init__(self, held_out: Iterable[str]):
        keys = {normalise(text) for text in held_out} - {""}
        self.whole = keys
        self.runs = {key[i : i + RUN] for key in keys for i in range(len(key) - RUN + 1)}

    def __contains__(self, text: str) -> bool:
        key = normalise(text)
        return key in self.whole or any(
            key[i : i + RUN] in self.runs for i in range(len(key) - RUN + 1))


def build(sources: Iterable[Source], progress: Callable[[str], None] = print
          ) -> tuple[dict[str, list[Document]], list[dict[str, object]]]:
    """Reads all sources: {"train": …, "dev": …} and the mixture table, one row a source.

    A document occurs once (before weights), is at least MIN_CHARS long (reviews may be
    shorter), and repeats no dev or test review. Dev is cut by the hash of a document's beginning.
    """
    splits = review_splits()
    leaks = Leaks(row.text for name in ("dev", "test") for row in splits[name])
    seen: set[str] = set()
    cut: dict[str, list[Document]] = {"train": [], "dev": []}
    table: list[dict[str, object]] = []
    for index, source in enumerate(sources):
        counts = {"docs": 0, "chars": 0, "dev_docs": 0, "leaked": 0}
        for text in map(clean, source.read()):
            if text in seen or len(text) < (
                MIN_REVIEW_CHARS if source.name == "reviews" else MIN_CHARS
            ):
                continue
            seen.add(text)
            if text in leaks:
                counts["leaked"] += 1
                continue
            dev = unit_hash(normalise(text)[:RUN]) < DEV_FRACTION
            cut["dev" if dev else "train"].append(Document(text, index))
            counts["dev_docs" if dev else "docs"] += 1
            counts["chars"] += 0 if dev else len(text)
        row = {"source": source.name, "weight": source.weight, **counts, "license": source.license}
        table.append(row)
        progress("  ".join(f"{key} {value}" for key, value in row.items()))
    return cut, table


def weighted(documents: Iterable[Document], sources: Sequence[Source]) -> list[Document]:
    """Each document as often as its source's weight says, shuffled by a fixed seed."""
    repeated = [doc for doc in documents for _ in range(sources[doc.source].weight)]
    order = np.random.default_rng(0).permutation(len(repeated))
    return [repeated[i] for i in order]


def write_tokens(folder: Path, split: str, documents: Sequence[Document], tokenizer: Tokenizer
                 ) -> int:
    """Writes `split`.bin (uint16 tokens), its offsets and sources; returns the token count.

    Documents are encoded without the `[gMASK] <sop>` prefix and without an end token.
    """
    if tokenizer.vocab_size > 2**16:
        raise UserError(f"a vocabulary of {tokenizer.vocab_size} does not fit 16-bit tokens")
    folder.mkdir(parents=True, exist_ok=True)
    lengths = []
    with open(folder / f"{split}.bin", "wb") as file:
        for i in range(0, len(documents), 4096):
            texts = [doc.text for doc in documents[i : i + 4096]]
            for ids in tokenizer.encode_batch(texts, add_special_tokens=False):
                lengths.append(len(ids))
                file.write(np.asarray(ids, np.uint16).tobytes())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / f"{split}.offsets.npy", offsets)
    np.save(folder / f"{split}.sources.npy", np.asarray([d.source for d in documents], np.uint8))
    return int(offsets[-1])


class TokenCorpus:
    """A split of a corpus folder, memory-mapped: `corpus[i]` is document i's tokens, uint16."""

    def __init__(self, folder: str | Path, split: str):
        """Raises UserError when the split's files are missing or do not fit each other."""
        base = self._base = Path(folder) / split
        try:
            self.offsets: np.ndarray = np.load(f"{base}.offsets.npy")
            self.sources: np.ndarray = np.load(f"{base}.sources.npy")  # [docs] uint8
            self._tokens: np.ndarray = np.memmap(f"{base}.bin", np.uint16, "r")
        except (OSError, ValueError) as error:
            why = "" if isinstance(error, FileNotFoundError) else f" ({error})"
            raise UserError(
                f"{base}: no corpus there{why}. "
                f"Build it: python launch/corpus.py --out={folder}"
            ) from None
        if len(self._tokens) != self.offsets[-1] or len(self.sources) != len(self):
            raise UserError(f"{base}: its files do not fit each other; build the corpus again")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.asarray(self._tokens[self.offsets[index] : self.offsets[index + 1]])

    @property
    def lengths(self) -> np.ndarray:
        """[docs] int64: tokens in each document."""
        return np.diff(self.offsets)

    def short(self, tokens: int, count: int) -> np.ndarray:
        """Numbers of different documents of at most `tokens` tokens; `count` of them at most.

        Those that stand there most often come first, then by a hash of their tokens.
        """
        copies: dict[bytes, list[int]] = {}
        for i in np.flatnonzero(self.lengths <= tokens):
            copies.setdefault(hashlib.sha256(self[int(i)].tobytes()).digest(), []).append(int(i))
        ranked = sorted(copies, key=lambda key: (-len(copies[key]), key))
        return np.array([copies[key][0] for key in ranked[:count]], np.int64)

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """A teacher's vectors `[n, features]` float32, and `[docs]` which is whose; -1 for none.

        Raises:
          UserError: when launch/embed.py has not written them.
        """
        base = self._base
        try:
            vectors, of = np.load(f"{base}.vectors.npy"), np.load(f"{base}.vector_of.npy")
        except (OSError, ValueError) as error:
            why = "" if isinstance(error, FileNotFoundError) else f" ({error})"
            raise UserError(f"{base}: no sentence vectors there{why}. Write them: "
                            f"python launch/embed.py --corpus={Path(base).parent}") from None
        if len(of) != len(self) or of.max(initial=-1) >= len(vectors):
            raise UserError(f"{base}: its vectors are of another corpus; run launch/embed.py again")
        return vectors.astype(np.float32), of


def write_vectors(folder: str | Path, documents: Mapping[str, np.ndarray],
                  vectors: Mapping[str, np.ndarray]) -> None:
    """Writes sentence vectors beside the tokens: turned to the principal axes of those of train.

    Each axis is divided by the root of its standard deviation: a teacher's few widest axes, which
    tell little, would fill the angle between two vectors otherwise.

    Args:
      documents: by split, numbers of documents, of which others may be copies.
      vectors: by split, theirs `[documents, features]`.
    """
    mean = vectors["train"].mean(axis=0)
    centred = (vectors["train"] - mean).astype(np.float64)
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    axes = (axes * np.maximum(variance, 1e-12) ** -0.25)[:, ::-1]
    for split, numbers in documents.items():
        corpus = TokenCorpus(folder, split)
        known = {corpus[int(i)].tobytes(): n for n, i in enumerate(numbers)}
        of = np.array([known.get(corpus[i].tobytes(), -1) for i in range(len(corpus))], np.int32)
        turned = ((vectors[split] - mean) @ axes).astype(np.float16)
        np.save(Path(folder) / f"{split}.vectors.npy", turned)
        np.save(Path(folder) / f"{split}.vector_of.npy", of)


def write_corpus(folder: str | Path, vocab_size: int, tokenizer: Tokenizer | None = None,
                 sources: Sequence[Source] = SOURCES,
                 progress: Callable[[str], None] = print) -> None:
    """Builds the corpus and its tokenizer (unless one is given) and writes all into `folder`."""
    folder = Path(folder)
    cut, table = build(sources, progress)
    train = weighted(cut["train"], sources)
    if tokenizer is None:
        progress(f"training a tokenizer of {vocab_size} tokens")
        trained = train_tokenizer((doc.text for doc in train), vocab_size)
        tokenizer = Tokenizer(tokenizer_files(trained))
    tokenizer.save(folder / "tokenizer")
    tokens = {"train": write_tokens(folder, "train", train, tokenizer),
              "dev": write_tokens(folder, "dev", cut["dev"], tokenizer)}
    summary = {"tokens": tokens, "vocab_size": tokenizer.vocab_size, "sources": table}
    (folder / "corpus.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    progress(f"{tokens['train']} tokens for training, {tokens['dev']} held out, in {folder}")
