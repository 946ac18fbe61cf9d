"""benchmarks/sentiment.py on a few rows: the baseline, a variant, the table, and going on."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import sentiment


def test_it_trains_what_is_missing_and_prints_mean_and_deviation(
        toy_model: str, toy_reviews: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(sentiment.ROOT / "benchmarks/sentiment.py"), "--smoke",
               "--variants=tf-idf,head", "--seeds=0,1", f"--data={toy_reviews}", "--markdown",
               f"--out={tmp_path / 'runs'}", f"--json={tmp_path / 'out.json'}", "--",
               f"--config.model.path={toy_model}", "--config.steps=3"]
    finished = tmp_path / "runs/head-1"
    finished.mkdir(parents=True)  # as if it had run before, with every test row right
    (finished / "result.json").write_text(json.dumps(
        {"test": {"accuracy": 1.0, "f1": 1.0}, "seconds": 60,
         "parameters": {"trainable": 64}}))
    out = subprocess.run(command, check=True, cwd=sentiment.ROOT, capture_output=True, text=True,
                         timeout=300).stdout
    assert out.count("launch/train.py") == 1
    rows = {row["variant"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert rows["tf-idf"]["accuracy"]["mean"] > 0.9 and rows["tf-idf"]["accuracy"]["std"] is None
    head = rows["head"]
    assert head["accuracy"]["values"][1] == 1.0 and head["parameters"] == 64
    assert head["accuracy"]["mean"] == sum(head["accuracy"]["values"]) / 2
    table = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and all(len(line) == 5 for line in table)
    assert " ± " in table[3][1] and " ± " not in table[2][1]


def test_the_deviation_is_over_seeds() -> None:
    results = [{"test": {"accuracy": a, "f1": a - 0.1}, "seconds": 60 * a,
                "parameters": {"trainable": 7}} for a in (0.8, 0.9, 1.0)]
    row = sentiment.summary("lora", results)
    assert sentiment.spelled(row["accuracy"]) == "0.9000 ± 0.1000"
    assert sentiment.spelled(row["f1"]) == "0.8000 ± 0.1000"
    assert row["seeds"] == 3 and row["parameters"] == 7
