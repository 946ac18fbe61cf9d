"""benchmarks/packing.py at toy size: both sides learn the same, and each figure is what it says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def toy_questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 60 questions, whose answers have 1 to 31 characters or so."""
    path = tmp_path_factory.mktemp("toy") / "questions.jsonl"
    rows = [{"prompt": f"{chr(0x4E00 + 97 * n)}？", "response": "好" * (1 + n * n % 31)}
            for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_every_figure_is_there(toy_model: str, toy_questions: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [
        "packing.py", f"--model={toy_model}", f"--data={toy_questions}", "--rounds=2", "--steps=1",
        "--rows=2", "--length=64", "--batch=4", "--threads=1"])
    args = packing.flags()
    rows, shape = packing.examples(args)
    result = packing.measure(args)  # exits where a step of theirs has another loss than ours
    assert result["losses"]["ours"] == pytest.approx(np.log(16384), rel=0.05)
    lengths = np.array([len(ids) - 1 for ids in rows.ids])
    assert (result["examples"], result["tokens"]) == (60, lengths.sum())
    steps = round(lengths.sum() / result["tokens_a_step"]["packed"])
    assert result["fill"]["packed"] == pytest.approx(lengths.sum() / (steps * 2 * 64))
    assert result["examples_a_step"] == 4 * round(60 / steps / 4) == \
        4 * result["micro_batches_a_step"]
    assert result["fill"]["packed"] > 0.9 and result["fill"]["padded"] < result["fill"]["grouped"]
    for name in ("padded", "grouped"):
        mine, other = (np.array(result["tokens_a_second_by_round"][side])
                       for side in ("packed", name))
        assert result["ratio"][name] == pytest.approx(np.median(mine / other))
        # Each step has that many examples of the mean length, or about so.
        assert 0.5 < result["tokens_a_step"][name] / result["tokens_a_step"]["packed"] < 1.5
    result |= {"command": "packing", "machine": {"cores": 2}}
    packing.show(result)


def test_their_batches_have_every_example_once(toy_model: str, toy_questions: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["packing.py", f"--model={toy_model}",
                                      f"--data={toy_questions}", "--length=64"])
    rows, _ = packing.examples(packing.flags())
    padded = packing.Padded(toy_model, rows, 4)
    steps = padded.steps(lambda: list(range(59, -1, -1)), 12)
    found = []
    for _ in range(5):
        parts = next(steps)
        assert [len(part["labels"]) for part in parts] == [4, 4, 4]
        for part in parts:
            for ids, mask, labels in zip(*(part[name].numpy() for name in (
                    "input_ids", "attention_mask", "labels")), strict=True):
                at = 59 - len(found)
                size = len(rows.ids[at])
                np.testing.assert_array_equal(ids[:size], rows.ids[at])
                np.testing.assert_array_equal(mask, np.arange(len(ids)) < size)
                np.testing.assert_array_equal(labels[:size], np.where(
                    rows.learned[at], rows.ids[at], -100))
                assert (labels[size:] == -100).all()
                found.append(size)
        longest = [max(found[n:n + 4]) for n in range(len(found) - 12, len(found), 4)]
        np.testing.assert_array_equal(packing.count(parts), [
            sum(found[-12:]) - 12, sum(found[-12:]), 4 * sum(longest)])
    assert len(found) == 60
