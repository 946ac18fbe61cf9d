"""benchmarks/conversion.py at toy size: what is written comes back, and every figure is there."""

import json
import subprocess
import sys

from benchmarks.conversion import ROOT, STEPS


def test_there_and_back(tmp_path):
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/conversion.py"), str(tmp_path / "scratch"),
         "--layers=2", "--hidden=64", "--inner=96", "--heads=2", "--vocabulary=128",
         "--max-shard-size=100KB", f"--json={tmp_path / 'out.json'}"],
        check=True, cwd=ROOT, timeout=600)
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found)[1:] == list(STEPS)
    assert found["hash"]["equal"] and found["hash"]["tensors"] == found["write"]["tensors"] == 18
    assert found["import"]["arrays GB"] > 0
    assert all(0.01 < found[step]["peak GB"] < 2.5 for step in STEPS)
    assert all(min(found[step]["cp seconds"]) > 0 for step in ("glm", "back"))
    assert not (tmp_path / "scratch").exists()
