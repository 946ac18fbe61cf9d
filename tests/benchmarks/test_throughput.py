"""benchmarks/throughput.py at toy size: both sides do the same work, and every figure is there."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sides import Ours, Theirs
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
    ours, theirs = Ours(toy_model, head), Theirs(toy_model, head, threads=1)
    mine, other = ours.feed(rows, labels, 12), theirs.feed(rows, labels, 12)
    if head == "sequence":  # each side draws its own
        score = theirs.model.base_model.model.score.modules_to_save["default"].weight
        ours.state["trainable"]["score.kernel"] = ours.state["trainable"]["score.kernel"] * 0 + \
            score.detach().numpy().T
    assert ours.step(mine) == pytest.approx(theirs.step(other), rel=1e-4)


def test_step_and_examples_are_measured(toy_model: str, toy_reviews: Path, tmp_path: Path) -> None:
    result = run("step,examples", toy_model, toy_reviews, tmp_path / "out.json")
    step, examples = result["step"], result["examples"]
    ours, theirs = (np.array(step["seconds_a_step"][side]) for side in ("ours", "theirs"))
    assert len(ours) == 2 and step["ratio"] == pytest.approx(np.median(ours / theirs))
    assert (step["ours_s"], step["theirs_s"]) == pytest.approx((ours.mean(), theirs.mean()))
    assert set(step["torch_step_s_by_threads"]) == {"1"}
    # The training share of 120 short reviews goes into one step, which they don't fill.
    assert 80 <= examples["examples_a_step"] <= 110 and 0.1 < examples["ours_fill"] < 0.9
    rates = {name: np.array(rate) for name, rate in examples["examples_a_second"].items()}
    assert examples["ratio"] == pytest.approx(np.median(rates["ours"] / rates["theirs"]))
    assert examples["ratio_grouped"] == pytest.approx(
        np.median(rates["ours"] / rates["theirs_grouped"]))
    assert "--rounds=2" in result["command"]
    assert result["machine"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.slow
def test_memory_and_start_are_measured(toy_model: str, toy_reviews: Path, tmp_path: Path) -> None:
    result = run("memory,start", toy_model, toy_reviews, tmp_path / "out.json")
    memory, start = result["memory"], result["start"]
    np.testing.assert_allclose(*(losses[0] for losses in memory["losses"].values()), rtol=1e-3)
    for side in ("ours", "theirs"):
        assert 0 < memory["beyond_imports_mib"][side] < memory["peak_mib"][side]
        # A process holds the embedding of 65k pieces at least, and its imports take a while.
        assert memory["beyond_imports_mib"][side] > 65024 * 32 * 4 / 2**20
        assert 0.5 < start[f"{side}_s"] == np.median(start["first_step_s"][side])
    assert 0 < start["dispatch_ms"] < 1e3 * start["ours_s"]
