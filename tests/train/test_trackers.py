"""Trackers: exact rows, cut on resume; purged events; plain lines where nobody watches."""

import io
import json
import struct
import subprocess
import sys
import types

import pytest
from rich.console import Console

from glm_jax.errors import UserError
from glm_jax.train.trackers import Jsonl, TensorBoard, Terminal, cut, open_tracker, read_rows


def events(folder):
    """Every TensorBoard event under a folder, file by file: records of length, crc, bytes, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir(), key=lambda p: int(p.suffix[1:])):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4


def test_rows_are_exact(tmp_path):
    path = tmp_path / "metrics.jsonl"
    jsonl = Jsonl(path)
    row = {"train/loss": 0.1 + 0.2, "train/learning_rate": 1e-5, "eval/examples": 3}
    jsonl.log(1, row)
    jsonl.log(2, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    first, second = path.read_text().splitlines()  # flushed, though not closed
    jsonl.close()
    assert first.startswith('{"step": 1, "train/loss": 0.30000000000000004,')
    assert json.loads(first) == {"step": 1, **row}
    assert second == '{"step": 2, "train/loss": null, "train/grad_norm": null}'


def test_cut_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "train/loss": 1 / (s + 3)} for s in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + '{"step": 3, "train/lo')
    cut(path, 3)
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:4])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    cut(path, None)
    assert path.read_text() == ""
    cut(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


def test_a_resumed_run_reads_as_one(tmp_path):
    for restored, steps, offset in ((None, range(0, 6), 0.0), (3, range(4, 8), 100.0)):
        tracker = open_tracker(tmp_path, 8, restored)
        for step in steps:
            tracker.log(step, {"train/loss": step + offset, "train/tokens_per_second": 1})
        tracker.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["train/loss"] for row in rows] == [0, 1, 2, 3, 104, 105, 106, 107]

    shown: dict[int, float] = {}  # as TensorBoard reads it: a session's start hides what is after
    for event in events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):
            shown = {s: v for s, v in shown.items() if s < event.step}
        for value in event.summary.value:
            if value.tag == "train/loss":
                shown[event.step] = value.simple_value
    assert shown == {row["step"]: row["train/loss"] for row in rows}


def test_tensorboard_does_not_import_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from glm_jax.train.trackers import TensorBoard; "
        "t = TensorBoard(Path(sys.argv[1]), None); t.log(1, {'a': 1.0}); t.close(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 0


def test_tensorboard_leaves_out_what_is_not_finite(tmp_path, caplog):
    board = TensorBoard(tmp_path, None)
    board.log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    board.close()
    assert caplog.text == ""
    assert not [value for event in events(tmp_path) for value in event.summary.value]


def test_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append(())
    )

    def init(**arguments):
        calls.append((arguments["project"], arguments["id"], arguments["config"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        tracker = open_tracker(tmp_path, 1, config={"lr": 1}, tensorboard=False, wandb_project="p")
        tracker.log(1, {"eval/loss": 2.0})
        tracker.close()
    assert calls[:3] == calls[3:]
    assert calls[0][0] == "p" and len(calls[0][1]) == 12 and calls[0][2] == {"lr": 1}
    assert calls[1:3] == [(1, {"eval/loss": 2.0}), ()]


def test_wandb_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_tracker(tmp_path, 1, tensorboard=False, wandb_project="p")


def show(*, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, soft_wrap=True)
    sink = Terminal(40, 10, console, about="runs/x: 7 of 9 parameters train")
    sink.log(15, {"train/loss": 0.75, "train/tokens_per_second": 999.6})
    sink.log(20, {"train/loss": 0.51234, "train/tokens_per_second": 12345.6})
    sink.log(20, {"eval/accuracy": 0.875, "eval/f1": 0.87})
    sink.close()
    return out.getvalue()


def test_a_pipe_gets_plain_lines():
    about, first, compiled, *lines = show(terminal=False).splitlines()
    assert about == "runs/x: 7 of 9 parameters train"
    assert first == "going on from step 10 of 40"
    assert compiled == "step 15/40  loss 0.7500  1,000 tokens/s"  # not how long the rest takes
    assert lines[0].startswith("step 20/40  loss 0.5123  12,346 tokens/s  0:00:0")
    assert lines[0].endswith(" left")
    assert lines[1:] == ["step 20  eval/accuracy 0.8750  eval/f1 0.8700"]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = show(terminal=True)
    assert "20/40" in out and "loss 0.5123  12,346 tokens/s" in out and "\x1b[" in out
    assert "eval/accuracy 0.8750" in out
