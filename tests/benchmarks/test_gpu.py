"""benchmarks/gpu.py at toy size: both sides train on the same tokens, and every figure is there."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import JOBS, ROOT, SHAPES, Ours, Theirs, texts

pytest.importorskip("peft")


def test_rows_are_full_of_texts():
    for job in JOBS.values():
        rows = texts(job)
        assert len(rows) == job.rows and {sum(map(len, row)) for row in rows} == {job.length}
        assert 3 < np.mean([len(row) for row in rows]) < 12
        assert max(t.max() for row in rows for t in row) < SHAPES[job.shape]["vocab_size"]


@pytest.mark.slow
def test_the_peer_keeps_the_texts_of_a_row_apart():
    job = JOBS["full-2b"]._replace(shape="toy", rows=1, length=1024)
    lengths = [len(text) for text in texts(job)[0]]
    assert len(lengths) > 1

    def logits(side):
        peer = Theirs(job, side, checkpoint=False)
        with peer.torch.no_grad():
            whole = peer.model(**peer.inputs).logits[0].numpy()
            ids, begin, alone = peer.inputs["input_ids"][0], 0, []
            for length in lengths:
                alone.append(peer.model(input_ids=ids[None, begin:begin + length]).logits[0])
                begin += length
        return whole, np.concatenate(alone), peer.inputs["labels"][0].numpy()
    whole, alone, labels = logits("theirs")
    np.testing.assert_allclose(whole, alone, rtol=1e-3, atol=1e-4)
    assert sorted(np.flatnonzero(labels == -100)) == [0, *np.cumsum(lengths)[:-1]]
    whole, alone, _ = logits("joined")
    assert np.abs(whole - alone).max() > 0.01


def test_a_profile_tells_kinds_of_kernels_and_the_slowest():
    ours = Ours(JOBS["lora-2b"]._replace(shape="toy", rows=2, length=64, dtype="float32"))
    ours.step()
    found = ours.profile()
    assert {"products", "elementwise", "optimizer"} <= set(found["kinds"])
    assert len(found["slowest"]) == 10
    for ms, times, _, _ in found["slowest"]:
        assert times >= 1 and 0 < ms <= sum(found["kinds"].values())
    assert any(source.endswith("dot_general") for *_, source in found["slowest"])


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
