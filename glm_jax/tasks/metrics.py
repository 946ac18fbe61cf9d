"""Metrics from label ids and predictions, in numpy: pure functions, no model and no device."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_metrics(
    labels: np.ndarray,
    predictions: np.ndarray,
    names: Sequence[str],
    losses: np.ndarray | None = None,
) -> dict[str, Any]:
    """What a classifier got right.

    labels, predictions: [examples] integer ids into `names`; losses: [examples] float, optional.
    Returns `accuracy`; `f1` (macro: the mean over the classes that occur in either array);
    `loss` (the mean, if losses are given); `examples`; `labels` (the names); `classes`, a row of
    label, precision, recall, f1 and support for each name; `confusion` [truth][prediction].
    Raises ValueError without examples, or if an id is no name's.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape or labels.ndim != 1 or not labels.size:
        raise ValueError(f"labels {labels.shape} and predictions {predictions.shape}: [examples]?")
    ids = np.arange(len(names))
    if not np.isin([labels, predictions], ids).all():
        raise ValueError(f"a label or prediction is not one of the {len(names)} classes")
    scores = precision_recall_fscore_support(labels, predictions, labels=ids, zero_division=0)
    occurs = np.isin(ids, np.concatenate([labels, predictions]))
    result: dict[str, Any] = {
        "accuracy": float(np.mean(labels == predictions)),
        "f1": float(np.mean(scores[2][occurs])),
        "examples": int(labels.size),
        "labels": list(names),
        "classes": [
            {"label": name, "precision": float(p), "recall": float(r), "f1": float(f),
             "support": int(n)}
            for name, p, r, f, n in zip(names, *scores, strict=True)
        ],
        "confusion": confusion_matrix(labels, predictions, labels=ids).tolist(),
    }  # fmt: skip
    if losses is not None:
        result["loss"] = float(np.mean(losses, dtype=np.float64))
    return result


def perplexity(total_loss: float, total_weight: float) -> float:
    """exp of the mean loss of a token, from sums over tokens; infinity where that overflows."""
    if not total_weight > 0:
        raise ValueError(f"perplexity of {total_weight} tokens")
    try:
        return math.exp(total_loss / total_weight)
    except OverflowError:
        return math.inf
