"""Texts and labels to arrays, class weights, and what is refused."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.sentiment import get_config
from glm_jax.data.packing import Shape, assemble
from glm_jax.data.records import Example
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError
from glm_jax.nn.loss import classification_loss
from glm_jax.tasks import each
from glm_jax.tasks.classification import MEND, Classification, check_labels, shown, weigh_classes

SHAPE = Shape(4, 32, 4)


@pytest.fixture
def load(base, tmp_path):
    """`load(train rows, dev rows, test rows, field=…)`: rows are (text, label)."""
    def make(*splits, **fields):
        names = {}
        for name, rows in zip(("train", "dev", "test"), splits, strict=False):
            path = tmp_path / f"{name}.csv"
            path.write_text("text,label\n" + "".join(f"{t},{label}\n" for t, label in rows))
            names[name] = str(path)
        config = ConfigDict({"train": "", "dev": "", "test": "", "text": "text", "label": "label",
                             "class_weights": (), "word_dropout": 0.0, "label_smoothing": 0.0}
                            | names | fields)
        return Classification.load(config, load_tokenizer(base), SHAPE)
    return make


TRAIN = [("很好", "b"), ("不好", "a"), ("还行", "c"), ("太好了", "b")]


def test_examples_as_arrays(load):
    task = load(TRAIN, [("房间好", "b")], [("床脏", "a")])
    assert task.labels == ("a", "b", "c")
    source = task.source("train")
    prefix = [task.tokenizer.token_id(name) for name in ("[gMASK]", "<sop>")]
    for i, (text, label) in enumerate(TRAIN):
        piece = source.piece(i, 0)
        assert piece.tokens[:2].tolist() == prefix
        assert task.tokenizer.decode(piece.tokens.tolist()) == text
        assert (piece.label, piece.label_weight) == ("abc".index(label), 1.0)
        assert source.lengths(0)[i] == len(piece.tokens)


def test_a_long_text_is_cut_to_a_row(load):
    task = load([("好坏" * 50, "a"), ("床", "b")], [("房", "a")], [("房", "a")])
    tokens = task.source("train").piece(0, 0).tokens
    assert len(tokens) == SHAPE.length
    assert tokens.tolist() == task.tokenizer.encode("好坏" * 50)[:SHAPE.length]


def test_a_class_that_a_split_lacks_is_warned_of(load, caplog):
    load(TRAIN, TRAIN, [("很好", "b"), ("太好了", "b")])
    assert [text for text in caplog.messages if "no row of" in text] == [
        "test: it has no row of a, c; macro F1 counts 0 for such a class where it is predicted"]


def test_texts_that_are_cut_are_counted_once_a_split(load, caplog):
    encode = load(TRAIN, TRAIN, TRAIN).tokenizer.encode
    draw = np.random.default_rng(0)
    texts = ("".join(draw.choice(list("房间干净早餐"), n)) for n in range(90))
    fits = next(text for text in texts if len(encode(text)) == SHAPE.length)
    task = load([(fits, "a"), (fits + "!", "b"), (fits * 3, "b")], [(fits, "a")],
                [(fits * 2, "a")])
    with caplog.at_level(logging.WARNING):
        for split in ("train", "dev", "test", "train"):
            task.source(split)
    said = [text for text in caplog.messages if "longer" in text]
    assert [text.partition(" tokens")[0] for text in said] == [
        "train: 2 of 3 are longer than batch.length=32",
        "test: 1 of 1 are longer than batch.length=32"]


def test_class_weights_count_in_training_only(load):
    task = load(TRAIN, TRAIN, TRAIN, class_weights=(1, 2.5, 3))
    assert [task.source("train").piece(i, 0).label_weight for i in range(4)] == [2.5, 1, 3, 2.5]
    assert [task.source("dev").piece(i, 0).label_weight for i in range(4)] == [1] * 4
    assert load(TRAIN, TRAIN, TRAIN, class_weights=("balanced",)).class_weights == pytest.approx(
        [4 / 3, 4 / 6, 4 / 3])


def test_word_dropout_hides_some_tokens_of_the_training_texts(load):
    rows = [("房间很干净下次还会来" * 3, "a"), ("床", "b")]
    task = load(rows, rows, rows, word_dropout=0.3)
    plain, mask = task.source("dev").piece(0, 0).tokens, task.tokenizer.token_id("[MASK]")
    shares = []
    for epoch in range(40):
        tokens = task.source("train").piece(0, epoch).tokens
        hidden = tokens != plain
        assert (tokens[hidden] == mask).all() and not hidden[:2].any()  # [gMASK] <sop> stay
        assert (task.source("train").piece(0, epoch).tokens == tokens).all()
        shares.append(hidden[2:].mean())
    assert 0.25 < np.mean(shares) < 0.35 and len(set(shares)) > 5
    with pytest.raises(UserError, match=r"task.word_dropout=1.5: a share from 0 to below 1"):
        load(rows, rows, rows, word_dropout=1.5)


@pytest.mark.parametrize("weights", [(1, 2), (1, 2, -1), (1, 2, 0), ("balance",), ("a", "b", "c"),
                                     (1, 2, float("nan"))])
def test_bad_class_weights(weights):
    with pytest.raises(UserError, match="one positive number for each of the 3 classes"):
        weigh_classes(weights, {"a": 1, "b": 2, "c": 3})


def test_the_weighted_loss_is_pytorchs():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(4, 5, 3)).astype(np.float32)
    labels = draw.integers(0, 3, (4, 5))
    weights = np.array([0.3, 1.0, 2.2], np.float32)
    there = draw.random((4, 5)) < 0.7
    counted = weights[labels] * there
    ours = classification_loss(jnp.asarray(logits), labels, counted) / counted.sum()
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits[there]), torch.tensor(labels[there]), torch.tensor(weights))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_labels_unseen_in_training_are_refused_by_file_and_line(load, tmp_path):
    with pytest.raises(UserError) as error:
        load(TRAIN, [("好", "a")], [("好", "a"), ("坏", "d")])
    assert str(error.value) == (f"{tmp_path / 'test.csv'}:3: label 'd' in test does not occur in "
                                f"training, which has a, b, c. {MEND}")
    check_labels([Example("好", "a", "x:1")], ("a", "b"), "dev")


def test_a_rare_class_that_the_split_leaves_out_of_training_says_what_to_do(base, tmp_path):
    def message(rare):
        rows = [f"{chr(0x4e00 + 37 * i) * 6},{'好坏'[i % 2]}" for i in range(60)] + [f"{rare},平"]
        (tmp_path / "all.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
        config = get_config().task
        config.train = str(tmp_path / "all.csv")
        try:
            Classification.load(config, load_tokenizer(base), SHAPE)
        except UserError as error:
            return str(error)
    said = list(filter(None, map(message, "一二三四五六七八九十甲乙丙丁")))
    assert said and all("give more rows of it, or name files: --config.task.dev" in s for s in said)


def test_probabilities_that_are_not_finite_are_refused(load):
    task = load(TRAIN, TRAIN, TRAIN)
    with pytest.raises(UserError, match="not finite: its training went wrong"):
        task.probabilities(lambda batch: biased(task)(batch) * np.nan, ["好"])


def test_one_class_is_no_classification(load):
    with pytest.raises(UserError, match="every row has the label 'a'; is 'label' the label column"):
        load([("好", "a"), ("坏", "a")], [("好", "a")], [("坏", "a")])


def test_the_fingerprint_is_that_of_all_splits(load):
    same = [load(TRAIN, TRAIN[:1], TRAIN[1:3]).fingerprint() for _ in range(2)]
    assert same[0] == same[1]
    assert load(TRAIN, TRAIN[:1], TRAIN[1:4]).fingerprint() != same[0]
    assert load(TRAIN, [("很好", "a")], TRAIN[1:3]).fingerprint() != same[0]


def biased(task):
    """A `run` that gives each example probabilities made from its first letter's token."""
    def run(batch):
        first = np.take_along_axis(batch.tokens, batch.pool_index, 1)  # the last token
        scores = np.stack([np.sin(first * k) for k in (1, 2, 3)], -1)
        return jax.nn.softmax(scores)
    return run


def test_each_keeps_the_order_of_the_examples(load):
    draw = np.random.default_rng(0)
    texts = ["".join(draw.choice(list("房间干净早餐差"), draw.integers(1, 9))) for _ in range(40)]
    task = load(TRAIN, TRAIN, TRAIN)
    run = biased(task)
    together = task.probabilities(run, texts)
    alone = np.concatenate([task.probabilities(run, [text]) for text in texts])
    np.testing.assert_array_equal(together, alone)
    assert len(np.unique(together[:, 0])) > 3
    source = task.texts([Example(text, "", "") for text in texts])
    lengths = each(lambda batch: batch.pool_index, source, SHAPE, task.pad_id)
    assert lengths.shape == (40,)


def test_figures_of_an_evaluation(load):
    rows = [(text, label) for text, label in zip("房间干净早餐差床", "abcabcab", strict=True)]
    task = load(TRAIN, rows, rows)
    result = task.evaluate(biased(task), "dev")
    p = task.probabilities(biased(task), [text for text, _ in rows])
    truth = np.array(["abc".index(label) for _, label in rows])
    assert result.metrics["accuracy"] == np.mean(p.argmax(1) == truth)
    assert result.metrics["loss"] == pytest.approx(-np.log(p[np.arange(8), truth]).mean(), rel=1e-5)
    assert tuple(result.metrics) == task.metrics
    row = result.report["rows"][3]
    assert (row["text"], row["label"], row["predicted"]) == ("净", "a", "abc"[p[3].argmax()])
    assert row["where"].endswith("dev.csv:5")
    assert assemble([[task.source("dev").piece(3, 0)]], SHAPE, 0).labels[0, 0] == 0


def test_many_labels_are_not_all_printed(load):
    assert shown("abc") == "a, b, c"
    assert shown(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … and 2 more"
    many = {str(i): 1 for i in range(10, 110)}
    with pytest.raises(UserError, match=r"100 classes is wanted \(10, .*, … and 90 m") as error:
        weigh_classes(tuple(range(99)), many)
    assert len(str(error.value)) < 300
    with pytest.raises(UserError, match=r"has 10, .*, … and 90 more\. Mend"):
        check_labels([Example("好", "a", "x:1")], sorted(many), "dev")
    rows = [(f"房{i}", f"说{i}") for i in range(12)]
    with pytest.raises(UserError, match="its 12 training rows have 12 different labels; is 'la"):
        load(rows, rows, rows)
    task = load(rows * 100, rows, rows)
    assert len(task.labels) == 12
    assert task.about().startswith("train 1,200, dev 12, test 12 rows; classes: 说0, 说1, 说10, ")
    assert task.about().endswith("说7, … and 2 more")
