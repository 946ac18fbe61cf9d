"""Small files are written whole, and equal values give equal bytes."""

import json
import os

import pytest

from glm_jax import files


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
