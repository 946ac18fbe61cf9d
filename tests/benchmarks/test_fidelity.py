"""benchmarks/fidelity.py: the table of a fixture, and of one whose numbers are not ours."""

import json
import runpy
import shutil
import sys

import numpy as np
import pytest

from benchmarks import fidelity
from glm_jax.nn import compute


def test_without_pytest_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(SystemExit, match="pytest is missing: pip install"):
        runpy.run_path(fidelity.__file__)


def test_the_table_says_what_is_near_and_what_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compute, "UNROLLED", compute.UNROLLED)  # which main changes
    right, wrong = fidelity.golden.HERE / "golden/glm_seqcls", tmp_path / "wrong"
    shutil.copytree(right, wrong)
    with np.load(wrong / "outputs.npz") as file:
        arrays = {name: file[name] for name in file.files}
    name = next(name for name in arrays if name.endswith("logits"))
    arrays[name] = arrays[name] + 0.3
    np.savez(wrong / "outputs.npz", **arrays)

    monkeypatch.setattr(fidelity.golden, "FOLDERS", [right])
    assert fidelity.main([f"--json={tmp_path / 'found.json'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | cases | forward | gradient | generation | round trip |"
    assert len(lines) == 3 and lines[2].startswith("| `glm` | 1 | ")
    row, = json.loads((tmp_path / "found.json").read_text())["models"]["glm"]
    assert row["folder"] == "glm_seqcls" and row["round trip"]["error"] == 0
    for kind in ("forward", "gradient"):
        assert 0 < row[kind]["error"] < 1e-3 and 0 < row[kind]["share of tolerance"] <= 1
    assert f"| {row['forward']['error']:.0e} |" in lines[2]

    monkeypatch.setattr(fidelity.golden, "FOLDERS", [wrong])
    assert fidelity.main([]) == 1
    line = capsys.readouterr().out.splitlines()[2]
    assert "FAILED: wrong" in line and "| 3e-01 |" in line
