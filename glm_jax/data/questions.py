"""Chinese questions and texts to sum up, with answers, out of pinned packages (archives.csv)."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from glm_jax.data import sources

Row = tuple[dict[str, Any], str]  # a record in Alpaca's form, and where it stands


def _row(where: str, asked: str, answer: str, text: str = "") -> Row:
    return {"instruction": asked, "input": text, "output": answer}, where


def riddles() -> Iterator[Row]:
    """Two-part sayings (歇后语), some 14,000: the first half is asked, the second the answer."""
    answers = {first: second for first, second, *_ in sources.dictionary("xiehouyu")}
    for first, second in answers.items():
        if second.strip():
            yield _row(f"xiehouyu, {first}", f"歇后语“{first}”的下一句是什么？", second.strip())


def idioms(wanted: Callable[[str], bool] = bool) -> Iterator[Row]:
    """What an idiom means, some 31,000. `wanted`: of its word."""
    for row in sources.idiom_rows():
        if wanted(row["word"]):
            yield _row(f"idiom, {row['word']}", f"成语“{row['word']}”是什么意思？",
                       row["explanation"].strip())


def words(wanted: Callable[[str], bool] = bool) -> Iterator[Row]:
    """What a word means, some 34,000."""
    for word, meaning, *_ in sources.dictionary("chinese_word_dictionary"):
        if wanted(word):
            yield _row(f"word, {word}", f"“{word}”这个词是什么意思？", meaning.strip())


def headlines() -> Iterator[Row]:
    """The title of a news text, which is cut at 800 characters; some 6,000."""
    for part in ("train", "dev", "test"):
        for number, (title, text) in enumerate(sources.news_rows(part), 1):
            title = re.split(r"[_|丨]| - ", title)[0].strip()  # without the site's name
            text = re.sub(r"\s+", " ", text).strip()[:800]
            if len(title) >= 4 and sum(c in text for c in title) >= len(title) / 2:
                yield _row(f"inews {part}:{number}", "给下面的文章写一个标题。", title, text)


def unseen() -> Iterator[Row]:
    """What glm-nano-zh did not meet in pre-training: riddles, and a tenth of idioms and words."""
    yield from riddles()
    yield from idioms(lambda word: not sources.kept(word))
    yield from words(lambda word: not sources.kept(word))
