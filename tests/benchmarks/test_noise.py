"""benchmarks/noise.py: labels that were turned round are found, and texts with both labels."""

import runpy

import numpy as np
import pytest

from benchmarks import noise
from glm_jax.data.records import Example
from glm_jax.data.split import load_splits
from glm_jax.train.loop import train


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
    assert "labels contradicted 0.000\n" in out
    assert "texts that stand in the data twice 0, with both labels 0\n" in out


def test_a_run_that_is_not_there_is_one_line(toy_reviews, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["noise.py", f"--data={toy_reviews}", "--split=test",
                                     f"--models={tmp_path / 'no'}"])
    with pytest.raises(SystemExit, match=r"error: .*no: no such folder"):
        runpy.run_path(noise.__file__, run_name="__main__")


def test_a_trained_classifier_finds_a_turned_label_of_a_split_it_has_not_seen(
        smoke, reviews, tmp_path, capsys):
    turned = load_splits(str(reviews))["test"][0]
    other = {"好": "差", "差": "好"}[turned.label]
    data, run = tmp_path / "turned.csv", tmp_path / "run"
    data.write_text(reviews.read_text(encoding="utf-8").replace(
        f'"{turned.text}",{turned.label}', f'"{turned.text}",{other}'), encoding="utf-8")
    train(smoke("full", **{"steps": 30, "task.train": str(data), "eval.every": 30,
                           "optimizer.learning_rate": 0.01}), run)
    capsys.readouterr()
    noise.main([f"--data={data}", "--split=test", "--show=5", f"--models={run},{run}"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("accuracies 0.9") and "all of them wrong on" in out[0]
    assert next(line for line in out if line.endswith(turned.text)).startswith(f"{other}\t0.")
    with pytest.raises(SystemExit):
        noise.main([f"--models={run}"])  # the train split
