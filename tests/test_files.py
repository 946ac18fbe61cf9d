"""Small files are written whole, and equal values give equal bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_jax import files
from glm_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_json_is_stable_and_strict(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomic(path, {"b": float("nan"), "a": ["负面", (1, float("-inf"))], 3: 0.1})
    first = path.read_bytes()
    files.write_json_atomic(path, {3: 0.1, "a": ["负面", (1, float("-inf"))], "b": float("nan")})
    assert path.read_bytes() == first
    assert json.loads(first) == {"3": 0.1, "a": ["负面", [1, None]], "b": None}
    assert "负面".encode() in first and first.endswith(b"}\n")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_second_process_is_kept_out_and_a_killed_one_is_not_missed(tmp_path):
    hold = ("import sys, time; from pathlib import Path; from glm_jax.files import locked\n"
            "with locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], stdout=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another process is training in this folder"), \
                files.locked(tmp_path):
            pass
        other.kill()
    with files.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_samples_tell_files_of_one_size_apart_wherever_they_differ(tmp_path):
    """Small files by every byte; of large ones first and last, and what lies in a block."""
    path, seen = tmp_path / "file", set()
    for at in range(-1, 100):
        path.write_bytes(bytes(i == at for i in range(100)))
        seen.add(files.sampled_sha256(path, blocks=4, size=30))
    assert len(seen) == 101
    large = {at: bytearray(1000) for at in (None, 0, 330, 999, 100)}
    for at, content in large.items():
        if at is not None:
            content[at] = 1
        path.write_bytes(content)
        large[at] = files.sampled_sha256(path, blocks=4, size=30)
    assert len({*large.values()}) == 4 and large[100] == large[None]  # between two blocks
    path.write_bytes(bytes(1001))
    assert files.sampled_sha256(path, blocks=4, size=30) not in large.values()
    assert files.sha256_of_all([path], files.sampled_sha256) != files.sha256_of_all([path])
