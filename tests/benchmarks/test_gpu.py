"""benchmarks/gpu.py at toy size: both sides train on the same tokens, and every figure is there."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import JOBS, ROOT, SHAPES, texts

pytest.importorskip("peft")


def test_rows_are_full_of_texts():
    for job in JOBS.values():
        rows = texts(job)
        assert len(rows) == job.rows and {sum(map(len, row)) for row in rows} == {job.length}
        assert 3 < np.mean([len(row) for row in rows]) < 12
        assert max(t.max() for row in rows for t in row) < SHAPES[job.shape]["vocab_size"]


@pytest.mark.slow
@pytest.mark.parametrize("job", ["lora-2b", "full-2b"])
def test_both_sides_train(job: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    subprocess.run([sys.executable, str(ROOT / "benchmarks/gpu.py"), "--size=toy", f"--jobs={job}",
                    "--sides=ours,theirs", "--steps=2", f"--json={out}"],
                   check=True, cwd=ROOT, capture_output=True, timeout=500)
    sides = json.loads(out.read_text())["results"][job]
    assert set(sides) == {"ours", "theirs"}
    for found in sides.values():
        assert "error" not in found, found["error"]
        assert len(found["seconds"]) == 2 and found["tokens_a_second"] > 0
        assert found["losses"][-1] < found["losses"][0] < 8  # about log(1003) for random weights
    assert sides["ours"]["flops"] > 0
