"""benchmarks/cross_entropy.py at toy size: both heads, and less memory than the plain loss."""

import json

from benchmarks import cross_entropy
from glm_jax.nn import loss


def test_both_heads_are_measured_and_hold_less(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loss, "LOGITS", 2**14)
    monkeypatch.setattr("sys.argv", ["", "--vocabulary=1031", "--tokens=256", "--hidden=16",
                                     "--rounds=1", f"--json={tmp_path / 'found.json'}"])
    cross_entropy.main()
    assert capsys.readouterr().out.count("| 1/") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    for head in ("frozen", "trained"):
        assert found[head]["memory ratio"] < 1 / 4 and found[head]["relative difference"] < 1e-5
