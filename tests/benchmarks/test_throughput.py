"""benchmarks/throughput.py at toy size: both sides do the same work, and every figure is there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sides import Job, Ours, Theirs
from benchmarks.throughput import ROOT

pytest.importorskip("peft")


def run(parts: str, model: str, reviews: Path, out: Path) -> dict[str, Any]:
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/throughput.py"), f"--model={model}",
         f"--data={reviews}", f"--parts={parts}", "--rounds=2", "--steps=1", "--rows=2",
         "--length=16", "--layers=3", "--threads=1", f"--json={out}"],
        check=True, cwd=ROOT, capture_output=True, timeout=300)
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("head", ["sequence", "lm"])
def test_both_sides_have_the_same_loss_on_the_same_batch(head: str, toy_model: str) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(10, 1000, size).astype(np.int32) for size in (5, 9, 12, 7) * 2]
    labels = [0, 1, 1, 0] * 2
    ours, theirs = Ours(toy_model, Job(head)), Theirs(toy_model, Job(head), threads=1)
    mine, other = ours.feed(rows, labels, 12), theirs.feed(rows, labels, 12)
    if head == "sequence":  # each side draws its own
        score = theirs.model.base_model.model.score.modules_to_save["default"].weight
        ours.state["trainable"]["score.kernel"] = ours.state["trainable"]["score.kernel"] * 0 + \
            score.detach().numpy().T
    assert ours.step(mine) == pytest.approx(theirs.step(other), rel=1e-4)


def test_step_and_examples_are_measured(toy_model: str, toy_reviews: Path, tmp_path: Path) -> None:
    result = run("step,examples", toy_model, toy_reviews, tmp_path / "out.json")
    step, examples = result["step"], result["examples"]
    assert step["ratio"] > 0 and len(step["seconds_a_step"]["ours"]) == 2
    assert set(step["torch_step_s_by_threads"]) == {"1"}
    assert 1 < examples["examples_a_step"] <= 120 and 0 < examples["ours_fill"] <= 1
    assert examples["ours"] > 0 < examples["theirs_grouped"]
    assert "throughput.py" in result["command"] and result["machine"]["torch"]


@pytest.mark.slow
def test_memory_and_start_are_measured(toy_model: str, toy_reviews: Path, tmp_path: Path) -> None:
    result = run("memory,start", toy_model, toy_reviews, tmp_path / "out.json")
    memory, start = result["memory"], result["start"]
    np.testing.assert_allclose(*(losses[0] for losses in memory["losses"].values()), rtol=1e-3)
    for side in ("ours", "theirs"):
        assert 0 < memory["beyond_imports_mib"][side] < memory["peak_mib"][side]
        assert start[f"{side}_s"] > 0.5
    assert 0 < start["dispatch_ms"] < 1000
