"""benchmarks/noise.py: labels that were turned round are found, and texts with both labels."""

import numpy as np
import pytest

from benchmarks import noise
from glm_jax.data.records import Example


def test_a_turned_label_is_contradicted_and_a_doubtful_one_is_not():
    right = np.linspace(0.7, 0.95, 40)
    labels = np.arange(40) % 2
    p = np.where(labels == 1, right, 1 - right)
    p[[3, 8]] = 0.5  # the model can't tell
    labels[[28, 31]] ^= 1
    found = noise.contradicted(np.stack([1 - p, p], axis=1), labels)
    assert np.flatnonzero(found).tolist() == [28, 31]


def test_a_text_counts_as_there_twice_by_its_letters():
    rows = [Example(text, label, "") for text, label in (
        ("好,好", "1"), ("好好!", "0"), ("坏", "0"), ("坏。", "0"), ("once", "1"))]
    assert noise.twice(rows) == (2, 1)


def test_it_reads_a_file(toy_reviews, capsys):
    pytest.importorskip("sklearn")
    noise.main([f"--data={toy_reviews}", "--show=3"])
    out = capsys.readouterr().out
    assert "labels contradicted 0.000; texts that stand there twice 0, with both labels 0" in out
