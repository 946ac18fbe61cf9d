"""Metrics against figures worked out by hand."""

import math

import numpy as np
import pytest

from glm_jax.tasks.metrics import classification_metrics, perplexity

NAMES = ["负面", "中性", "正面"]


def test_figures_by_hand():
    labels = np.array([0, 0, 0, 2, 2, 2, 2, 1])
    predictions = np.array([0, 0, 2, 2, 2, 2, 0, 2])
    m = classification_metrics(labels, predictions, NAMES, np.arange(8.0))
    assert m["confusion"] == [[2, 0, 1], [0, 0, 1], [1, 0, 3]]
    assert m["accuracy"] == 5 / 8
    assert m["loss"] == 3.5
    negative, neutral, positive = m["classes"]
    assert negative == pytest.approx(
        {"label": "负面", "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3}
    )
    assert (neutral["f1"], neutral["support"]) == (0, 1)
    assert positive["f1"] == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert m["f1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)


def test_a_class_that_never_occurs_does_not_pull_macro_f1_down():
    m = classification_metrics(np.array([0, 2, 2]), np.array([0, 2, 2]), NAMES)
    assert (m["accuracy"], m["f1"]) == (1.0, 1.0)
    assert [row["support"] for row in m["classes"]] == [1, 0, 2]
    assert "loss" not in m


@pytest.mark.parametrize(
    ("labels", "predictions"), [([], []), ([0, 1], [0]), ([0, 3], [0, 1]), ([0, 1], [0, -1])]
)
def test_nonsense_is_refused(labels, predictions):
    with pytest.raises(ValueError):
        classification_metrics(np.array(labels, int), np.array(predictions, int), NAMES)


def test_perplexity():
    assert perplexity(4 * math.log(10), 4) == pytest.approx(10)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError):
        perplexity(1.0, 0.0)
