"""Cuts examples into train, dev and test by hash, near-duplicates kept together."""

import hashlib
import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from glm_jax.data.records import BUILT_IN, Example, load_records
from glm_jax.errors import UserError

SPLITS = ("train", "dev", "test")
HEAD = 20  # texts that share this many first normalised characters are near-duplicates, ...
FEW = 5  # ... unless more texts than this share them: then they are a form, not a repetition


class Row(Protocol):
    """What is cut: `text` tells near-duplicates."""

    @property
    def text(self) -> str: ...


R = TypeVar("R", bound=Row)


class Grams(NamedTuple):
    """Two texts are near-duplicates from this Jaccard similarity of their character n-grams on."""

    length: int
    similar: float


# One word changed in ten leaves about as much of either. Three letters of an alphabet are in
# every text, so that all would have to be compared with all.
WIDE = Grams(3, 0.7)  # Chinese, Japanese, Korean
ALPHABETIC = Grams(8, 0.5)


def normalise(text: str) -> str:
    """The letters of a text, lower case, NFKC: no digits, spaces, punctuation or emoji."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalpha())


def grams_of(key: str) -> Grams:
    """The kind of n-grams a normalised text is compared by: what most of its letters are."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in key)
    return WIDE if 2 * wide >= len(key) else ALPHABETIC


def similar_pairs(keys: Sequence[str]) -> list[tuple[int, int]]:
    """All pairs i < j of normalised texts with the same `Grams` whose similarity reaches theirs.

    Exact: with a text's grams ordered from rare to common, two similar texts share one of the
    first few of each (Xiao et al. 2008), so only texts that meet there are compared. These
    are rare as long as `Grams` are long enough, so the time is about that of reading the texts;
    it grows with the number of pairs where most texts are similar.
    """
    kinds: dict[Grams, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        kinds[grams_of(key)].append(i)
    return [(min(places[i], places[j]), max(places[i], places[j]))
            for kind, places in kinds.items()
            for i, j in _pairs([keys[i] for i in places], kind)]


def _pairs(keys: Sequence[str], kind: Grams) -> Iterator[tuple[int, int]]:
    length, threshold = kind
    grams = [{key[i : i + length] for i in range(max(1, len(key) - length + 1))} for key in keys]
    counts = Counter(gram for found in grams for gram in found)
    seen: dict[str, list[int]] = defaultdict(list)
    for i in sorted(range(len(keys)), key=lambda i: (len(grams[i]), i)):
        ranked = sorted(grams[i], key=lambda gram: (counts[gram], gram))
        size = len(ranked)
        # Against smaller texts they share `threshold size`, against larger ones, which come
        # later, more; 1e-9 since a rounding error must not shorten what is looked at.
        smaller = size - math.ceil(threshold * size - 1e-9) + 1
        larger = size - math.ceil(2 * threshold / (1 + threshold) * size - 1e-9) + 1
        for j in {j for gram in ranked[:smaller] for j in seen.get(gram, ())}:
            if len(grams[j]) >= threshold * size:
                both = len(grams[i] & grams[j])
                if both >= threshold * (size + len(grams[j]) - both):
                    yield i, j
        for gram in ranked[:larger]:
            if counts[gram] > 1:
                seen[gram].append(i)


def duplicate_groups(texts: Sequence[str]) -> list[str]:
    """For each text, its group's name; near-duplicates have the same.

    Near-duplicates are texts that are equal after `normalise`, share their first HEAD
    normalised characters with a FEW, or are `similar_pairs`. The name is the first
    normalised text of the group in sorted order, so it does not depend on the order of rows.
    """
    keys = [normalise(text) or text for text in texts]
    unique = sorted(set(keys))
    pairs = similar_pairs(unique)
    for _, same in groupby(range(len(unique)), lambda i: unique[i][:HEAD]):  # sorted
        first, *others = same
        if len(unique[first]) >= HEAD and len(others) < FEW:
            pairs += [(first, other) for other in others]
    graph = csr_array((np.ones(len(pairs)), np.array(pairs, int).reshape(-1, 2).T),
                      (len(unique), len(unique)))
    _, groups = connected_components(graph, directed=False)
    _, firsts = np.unique(groups, return_index=True)
    name = {key: unique[firsts[group]] for key, group in zip(unique, groups, strict=True)}
    return [name[key] for key in keys]


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def hash_split(
    examples: Sequence[R], fractions: Sequence[float] = (0.8, 0.1, 0.1)
) -> dict[str, list[R]]:
    """Examples cut into train, dev and test by the hash of their near-duplicate group.

    The same rows land in the same split in whatever order they come; inside a split they keep
    the given order. A fraction of 0 leaves that split out. An empty split is not an error here.
    """
    groups = duplicate_groups([example.text for example in examples])
    names = [name for name, part in zip(SPLITS, fractions, strict=True) if part]
    bounds = [sum(fractions[: i + 1]) for i, part in enumerate(fractions) if part]
    bounds[-1] = 1.0
    cut: dict[str, list[R]] = {name: [] for name in names}
    for example, group in zip(examples, groups, strict=True):
        at = unit_hash(group)
        cut[next(n for n, bound in zip(names, bounds, strict=True) if at < bound)].append(example)
    return cut


_NAMES = {"train": ("train", "all"), "dev": ("dev", "validation", "valid", "all"),
          "test": ("test", "all")}


def load_splits(
    train: str = BUILT_IN,
    dev: str | None = None,
    test: str | None = None,
    text_field: str = "text",
    label_field: str = "label",
) -> dict[str, list[Example]]:
    """{"train": …, "dev": …, "test": …} from sources that `load_records` reads; see `split`."""
    return split(lambda source: load_records(source, text_field, label_field), train,
                 {"dev": dev, "test": test})


def split(load: Callable[[str], dict[str, list[R]]], train: str,
          others: Mapping[str, str | None]) -> dict[str, list[R]]:
    """The rows of `train` and of the `others`, "dev" or both "dev" and "test", by name.

    What names no source and is no split of `train` either is cut from `train` by `hash_split`, a
    tenth of it each; where all are named `train` is used whole. Raises UserError for an empty
    split; logs when the cut is far from that, and how many of its rows repeat a training row.

    Args:
      load: gives the rows of a source by split, as `load_records` does.
    """
    if not train.strip():
        raise UserError("task.train is empty: name a file or a data set, such as "
                        f"--config.task.train=reviews.csv or {BUILT_IN}")
    found = load(train)
    splits = {"train": pick(found, "train", train)}
    for name, source in others.items():
        if source:
            splits[name] = pick(load(source), name, source)
        else:
            own = next((found[n] for n in _NAMES[name] if n in found and n != "all"), None)
            splits |= {} if own is None else {name: own}
    cut = [name for name in others if name not in splits]
    if cut:
        rows = len(splits["train"])
        parts = [0.1 if name in cut else 0.0 for name in ("dev", "test")]
        splits |= hash_split(splits["train"], (1 - sum(parts), *parts))
        for name in ("train", *cut):
            if not splits[name]:
                raise UserError(
                    f"{train}: cut by hash with near-duplicates kept together, its {rows} rows "
                    f"leave {name} empty. Give more rows, or rows that differ more, or name "
                    f"another file: --config.task.{cut[-1] if name == 'train' else name}=FILE"
                )
        _warn_shares(train, {name: len(splits[name]) for name in ("train", *cut)})
    _warn_repeats(splits)
    return {name: splits[name] for name in SPLITS if name in splits}


def pick(found: Mapping[str, list[R]], name: str, source: str) -> list[R]:
    """The split of a source that stands for `name`; the only one where there is one."""
    for key in _NAMES[name]:
        if key in found:
            return found[key]
    if len(found) == 1:
        return next(iter(found.values()))
    raise UserError(f"{source}: no split for {name}; it has {', '.join(found) or 'none'}")


def _warn_shares(source: str, sizes: dict[str, int]) -> None:
    """Logs where a split is far from the tenth that was wanted, by more than chance."""
    total = sum(sizes.values())
    for name, size in sizes.items():
        wanted = total * (0.1 if name != "train" else 1.1 - len(sizes) / 10)
        if abs(size - wanted) > max(wanted / 2, 4 * math.sqrt(wanted)):
            logging.warning("%s: %d of its %d rows are in %s, where %d were wanted: many are "
                            "near-duplicates, which stay together", source, size, total, name,
                            round(wanted))


def _warn_repeats(splits: Mapping[str, Sequence[Row]]) -> None:
    known = {example.text for example in splits["train"]}
    for name in (name for name in SPLITS[1:] if name in splits):
        repeats = sum(example.text in known for example in splits[name])
        if repeats:
            logging.warning("%d of %d rows of %s stand in train too: its scores will be too good",
                            repeats, len(splits[name]), name)
