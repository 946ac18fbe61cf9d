"""Cuts examples into train, dev and test by hash, near-duplicates kept together."""

import hashlib
import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from glm_jax.data.records import BUILT_IN, Example, load_records
from glm_jax.errors import UserError

SPLITS = ("train", "dev", "test")
SIMILAR = 0.7  # Jaccard similarity of character 3-grams from which two texts are near-duplicates
HEAD = 20  # two texts that share this many first normalised characters are near-duplicates


def normalise(text: str) -> str:
    """The letters of a text, lower case, NFKC: no digits, spaces, punctuation or emoji."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalpha())


def _grams(key: str) -> set[str]:
    return {key[i : i + 3] for i in range(max(1, len(key) - 2))}


def similar_pairs(keys: Sequence[str], threshold: float = SIMILAR) -> list[tuple[int, int]]:
    """All pairs i < j of normalised texts whose 3-gram Jaccard similarity reaches `threshold`.

    Exact: with a text's grams ordered from rare to common, similar texts share one of the
    first `n - ceil(threshold n) + 1`, so only texts that meet there are compared.
    """
    grams = [_grams(key) for key in keys]
    counts = Counter(gram for found in grams for gram in found)
    order = sorted(range(len(keys)), key=lambda i: (len(grams[i]), i))
    seen: dict[str, list[int]] = defaultdict(list)
    pairs = []
    for i in order:
        ranked = sorted(grams[i], key=lambda gram: (counts[gram], gram))
        size = len(ranked)
        prefix = ranked[: size - math.ceil(threshold * size) + 1]
        candidates = {j for gram in prefix for j in seen[gram]}
        for j in candidates:
            if len(grams[j]) >= threshold * size:
                both = len(grams[i] & grams[j])
                if both >= threshold * (size + len(grams[j]) - both):
                    pairs.append((min(i, j), max(i, j)))
        for gram in prefix:
            seen[gram].append(i)
    return pairs


def duplicate_groups(texts: Sequence[str]) -> list[str]:
    """For each text, its group's name; near-duplicates have the same.

    Near-duplicates are texts that are equal after `normalise`, share their first HEAD
    normalised characters, or whose character 3-grams are SIMILAR. The name is the first
    normalised text of the group in sorted order, so it does not depend on the order of rows.
    """
    keys = [normalise(text) or text for text in texts]
    unique = sorted(set(keys))
    parent = list(range(len(unique)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        first, second = sorted((root(i), root(j)))
        parent[second] = first

    for i in range(1, len(unique)):  # sorted: equal heads stand side by side
        if len(unique[i]) >= HEAD and unique[i][:HEAD] == unique[i - 1][:HEAD]:
            join(i - 1, i)
    for i, j in similar_pairs(unique):
        join(i, j)
    name = {key: unique[root(i)] for i, key in enumerate(unique)}
    return [name[key] for key in keys]


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text only."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def hash_split(
    examples: Sequence[Example], fractions: Sequence[float] = (0.8, 0.1, 0.1)
) -> dict[str, list[Example]]:
    """Examples cut into train, dev and test by the hash of their near-duplicate group.

    The same rows land in the same split in whatever order they come; inside a split they keep
    the given order. A fraction of 0 leaves that split out. An empty split is not an error here.
    """
    groups = duplicate_groups([example.text for example in examples])
    names = [name for name, part in zip(SPLITS, fractions, strict=True) if part]
    bounds = [sum(fractions[: i + 1]) for i, part in enumerate(fractions) if part]
    bounds[-1] = 1.0
    cut: dict[str, list[Example]] = {name: [] for name in names}
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
    """{"train": …, "dev": …, "test": …} from sources that `load_records` reads.

    What is not named and is no split of `train` either is cut from `train` by `hash_split`, a
    tenth of it each; when both are named `train` is used whole. Raises UserError for an empty
    split; logs how many dev and test rows repeat a training row.
    """
    found = load_records(train, text_field, label_field)
    splits = {"train": _pick(found, "train", train)}
    for name, source in (("dev", dev), ("test", test)):
        if source:
            splits[name] = _pick(load_records(source, text_field, label_field), name, source)
        else:
            own = next((found[n] for n in _NAMES[name] if n in found and n != "all"), None)
            splits |= {} if own is None else {name: own}
    cut = [name for name in ("dev", "test") if name not in splits]
    if cut:
        rows = len(splits["train"])
        parts = [0.1 if name in cut else 0.0 for name in ("dev", "test")]
        splits |= hash_split(splits["train"], (1 - sum(parts), *parts))
        for name in ("train", *cut):
            if not splits[name]:
                raise UserError(
                    f"{train}: cut by hash, its {rows} rows leave {name} empty. Give more rows, or "
                    f"name another file: --config.task.{cut[-1] if name == 'train' else name}=FILE"
                )
    _warn_repeats(splits)
    return {name: splits[name] for name in SPLITS}


def _pick(found: dict[str, list[Example]], name: str, source: str) -> list[Example]:
    """The split of a source that stands for `name`; the only one where there is one."""
    for key in _NAMES[name]:
        if key in found:
            return found[key]
    if len(found) == 1:
        return next(iter(found.values()))
    raise UserError(f"{source}: no split for {name}; it has {', '.join(found) or 'none'}")


def _warn_repeats(splits: dict[str, list[Example]]) -> None:
    known = {example.text for example in splits["train"]}
    for name in ("dev", "test"):
        repeats = sum(example.text in known for example in splits[name])
        if repeats:
            logging.warning("%d of %d rows of %s stand in train too: its scores will be too good",
                            repeats, len(splits[name]), name)
