"""Several processes as one job: what all do together, how all end, and how it goes on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import pytest

from glm_jax.errors import UserError
from glm_jax.parallel import processes
from tests.folders import content, rows
from tests.launch.conftest import ROOT

SMOKE = "--config=configs/sentiment.py:smoke"
HEARTBEAT = 3
TWO = ("--config.mesh.cpu_devices=2", "--config.mesh.fsdp=2", f"--heartbeat={HEARTBEAT}")

# A program without a model: `joined` of the processes that its arguments name, and a few lines.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from absl import flags
from glm_jax.errors import Interrupted, UserError
from glm_jax.parallel import processes
from launch import door

def main():
    import jax
    from jax.experimental import multihost_utils
    together = multihost_utils.sync_global_devices
    processes.TELL_SECONDS = 4  # shorter than a user's, for a test's sake
    {before}
    with door.joined():
        first, folder = processes.speaks(), Path(sys.argv[0]).parent
{lines}

door.flags_of_processes()
door.run(main)
"""


@pytest.fixture
def program(pod, tmp_path):
    """`program(2, "together('x')", …)`: how that many processes end that run these lines."""
    def run(processes, *lines, before="", own=None):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(before=before,
                                       lines="\n".join("        " + line for line in lines)))
        return pod(processes, path.with_suffix(""), f"--heartbeat={HEARTBEAT}", own=own)
    return run


def told(result):
    """The lines of standard error."""
    return result.err.splitlines()


def when(folder, step, act):
    """Acts on the processes as soon as that step is logged."""
    def wait(pids):
        end = time.monotonic() + 200
        path = folder / "metrics.jsonl"
        while time.monotonic() < end and not (
                path.exists() and path.read_text().count('"train/loss"') >= step):
            time.sleep(0.01)
        act(pids)
    return wait


def test_two_processes_train_and_go_on_after_a_kill_and_elsewhere(pod, door, base, reviews,
                                                                  tmp_path):
    """With the same bytes in two processes, and the same losses in one on another mesh."""
    command = ["train", SMOKE, f"--config.model.path={base}", f"--config.task.train={reviews}",
               "--config.steps=8", "--config.eval.every=4", "--config.checkpoint.every=2",
               "--config.batch.length=72"]
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    # A third, which process 0 does not know of, does them no harm.
    one, other, third = pod(3, *command, *TWO, f"--workdir={whole}",
                            own=[["--processes=2"], ["--processes=2"], []])
    assert (one.code, other.code, third.code) == (0, 0, 1), (one.err, other.err, third.err)
    assert told(third)[-1].startswith("error: process 0 refuses process 2: another one has come")
    assert "accuracy" in one.out and told(one) == told(other) == []
    assert other.out == ""
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoints", "adapter", "result.json",
        "report.html"}

    scores = tmp_path / "scores.json"
    both = pod(2, "evaluate", f"--model={whole}", f"--json={scores}")
    assert [result.code for result in both] == [0, 0], both
    test = json.loads((whole / "result.json").read_text())["test"]
    assert json.loads(scores.read_text())["accuracy"] == test["accuracy"]
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(reviews.read_text().splitlines(keepends=True)[:101]))
    for own, message in ((f"data={fewer}", "data sha256: "), ("mesh=tensor=2", "mesh: '' there"),
                         ("split=dev", "split: None there, 'dev' here")):
        one, other = pod(2, "evaluate", f"--model={whole}", f"--data={reviews}",
                         own=[[], [f"--{own}"]])
        assert (one.code, other.code) == (2, 2) and message in told(other)[-1], (one, other)

    ended = []

    def kill(pids):
        os.kill(pids[1], signal.SIGKILL)
        ended.append(time.monotonic())
    one, other = pod(2, *command, *TWO, f"--workdir={killed}", meanwhile=when(killed, 3, kill))
    assert time.monotonic() - ended[0] < 2 * HEARTBEAT + 5
    assert (one.code, other.code) == (1, -signal.SIGKILL), one.err
    assert told(one) == [f"error: process 1 died: nothing was heard of it for {HEARTBEAT} s; the "
                         "same commands go on from the last checkpoint"]
    shutil.copytree(killed, moved)
    assert [r.code for r in pod(2, *command, *TWO, f"--workdir={killed}")] == [0, 0]
    assert content(killed / "adapter") == content(whole / "adapter")
    assert rows(killed) == rows(whole)

    assert len(rows(moved)) < len(rows(whole))
    result = door(*command, "--config.mesh.cpu_devices=2", "--config.mesh.tensor=2",
                  f"--workdir={moved}")
    assert result.code == 0 and "going on from step" in result.out, result.err
    for here, there in zip(rows(moved), rows(whole), strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_questions_and_answers_in_two_processes(pod, door, base, tmp_path):
    """The losses of one process with one device, on dev too, whose rows end unevenly."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": "房间早餐床"[n % 5] * (1 + n % 4),
                                        "response": "干净周到差"[n % 4:] * (1 + n % 3)},
                                       ensure_ascii=False) + "\n" for n in range(90)))
    command = ["train", "--config=configs/chat.py:smoke", f"--config.model.path={base}",
               f"--config.task.train={file}", "--config.steps=4", "--config.eval.every=2",
               "--config.batch.length=24"]
    two, one = tmp_path / "two", tmp_path / "one"
    assert [result.code for result in pod(2, *command, *TWO, f"--workdir={two}")] == [0, 0]
    result = door(*command, f"--workdir={one}")
    assert result.code == 0, result.err
    assert [set(row) for row in rows(one)] == [set(row) for row in rows(two)]
    assert sum("eval/loss" in row for row in rows(one)) == 2
    for here, there in zip(rows(two), rows(one), strict=True):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize(("command", "own", "devices"), [
    (("predict", "--jsonl"), (), 2),
    (("generate", "--jsonl", "--batch=2", "--mesh=fsdp=2,tensor=2"), ("--file=asked.jsonl",), 2),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        (("predict", "--jsonl"), ("--file=texts.txt",), 1),
        (("generate", "--num_beams=2", "--repetition_penalty=1.5", "--batch=2", "--mesh=fsdp=2"),
         ("--file=texts.txt",), 1),
        (("generate",), ("房间干净",), 1)))])
def test_predictions_and_answers_in_two_processes(pod, door, trained, base, tmp_path, command, own,
                                                  devices):
    """Those of one process, printed by the first; the second has no text of its own."""
    texts = [("房间干净", "早餐差", "服务周到，早餐很好")[n % 3] * (1 + n) for n in range(5)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    own = [one.replace("--file=", f"--file={tmp_path}/") for one in own]
    door_name, *flags = command
    flags += ([f"--model={trained}"] if door_name == "predict" else
              [f"--model={base}", "--max_new_tokens=5"])
    stdin = "\n".join(texts).encode()
    alone = door(door_name, *(flag for flag in flags if flag[:6] != "--mesh"), *own, stdin=stdin)
    one, other = pod(2, door_name, *flags, own=[own, []], devices=devices, stdin=stdin)
    assert (alone.code, one.code, other.code) == (0, 0, 0), (alone, one, other)
    assert told(one) == told(other) == [] and other.out == ""
    if door_name == "generate":
        assert one.out == alone.out
        return
    here, there = ([json.loads(line) for line in result.out.splitlines()]
                   for result in (one, alone))
    assert [row["text"] for row in here] == texts
    for row, wanted in zip(here, there, strict=True):
        assert row["label"] == wanted["label"]
        assert row["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-6)


def test_bad_texts_end_all_with_the_message_of_the_first(pod, trained, base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "text": "a"}\n{"label": "b"}\n')
    for command, message in (
            (("predict", f"--model={trained}", f"--file={bad}"), f"{bad}:2: no field 'text'"),
            (("generate", f"--model={base}"), "no prompt: give one")):
        one, other = pod(2, *command, stdin=b"\n")
        assert (one.code, other.code) == (2, 2), (one, other)
        (line,) = told(one)
        assert line.startswith(f"error: {message}")
        assert told(other) == [line.replace("error: ", "error: process 0 failed: ")]
        assert one.out == other.out == ""
    one, other = pod(2, "generate", f"--model={base}", own=[["a", "--batch=2"], ["--batch=3"]])
    assert (one.code, other.code) == (2, 2), (one, other)
    assert "model than process 0 has (batch: 2 there, 3 here): start all" in told(other)[0]
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    command = "generate", "--max_new_tokens=2", "房间"
    own = [[f"--model={base}"], [f"--model={copy}"]]
    assert [result.code for result in pod(2, *command, own=own)] == [0, 0]
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    one, other = pod(2, *command, own=own)
    assert (one.code, other.code) == (2, 2) and "(model sha256: " in told(other)[0], (one, other)


def test_what_only_one_process_sees_ends_all_with_its_message(pod, base, reviews, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    bad, other = tmp_path / "bad.csv", tmp_path / "other.csv"
    bad.write_text(reviews.read_text() + "没有标签,\n", encoding="utf-8")
    other.write_text(reviews.read_text() + "另一条评论很好,好\n", encoding="utf-8")
    command = ["train", SMOKE, f"--config.model.path={base}", *TWO,
               f"--workdir={tmp_path / 'run'}"]
    for own, message in ((f"config.task.train={bad}", "bad.csv:242: the label"),
                         (f"config.task.train={other}", "data sha256"),
                         (f"config.model.path={model}", "(weights sha256: "),
                         ("config.adapter.r=4", "adapter.r: 8 there, 4 here"),
                         ("config.model.remat=full", "remat: 'none' there, 'full' here"),
                         (f"workdir={tmp_path / 'own'}", "workdir: "),
                         ("heartbeat=4", f"heartbeat: {HEARTBEAT} there, 4 here")):
        first, second = pod(2, *command, f"--config.task.train={reviews}",
                            own=[[], [f"--{own}"]])
        assert (first.code, second.code) == (2, 2), (first.err, second.err)
        (line,) = told(second)
        assert line.startswith("error: ") and message in line
        assert told(first) == [line.replace("error: ", "error: process 1 failed: ")]
    assert not (tmp_path / "run").exists() and not (tmp_path / "own").exists()


def test_python_ends_as_always(tmp_path):
    """Also while a look for the dead would still last; a fork of the server's ends otherwise."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(before="processes.WATCH_SECONDS = 2", lines="        pass"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, path, f"--coordinator=127.0.0.1:{port}", "--processes=2"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    both = [subprocess.Popen([*command, f"--process={number}"], env=env, stderr=subprocess.PIPE,
                             text=True) for number in range(2)]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert ends == [("", 0)] * 2


def test_each_process_has_the_rows_of_its_devices(program):
    both = program(2, "from glm_jax.parallel.mesh import make_mesh, own_rows",
                   "for sizes in ({'data': 4}, {'data': 2, 'fsdp': 2}, {'tensor': 4}):",
                   "    print(sorted(own_rows(8, make_mesh(sizes))), file=sys.stderr)",
                   before="door.start_devices(2)")
    assert [told(result) for result in both] == [
        [str([0, 1, 2, 3])] * 2 + [str(list(range(8)))],
        [str([4, 5, 6, 7])] * 2 + [str(list(range(8)))]]


def test_a_mistake_in_one_process_ends_those_that_wait_for_it(program):
    one, other = program(2, "if not first: raise ZeroDivisionError('of ours')", "together('x')")
    assert (one.code, other.code) == (1, 1)
    assert told(one) == ["error: process 1 failed: ZeroDivisionError: of ours"]
    assert told(other)[0].startswith("Traceback") and told(other)[-1].endswith("of ours")


def test_a_dead_process_is_told_in_place_of_what_its_death_broke(program):
    """JAX raises that from a small computation as a ValueError."""
    one, other = program(2, "together('x')", "if not first: time.sleep(1)",
                         "if not first: os.kill(os.getpid(), signal.SIGKILL)", "together('y')")
    assert (one.code, other.code) == (1, -signal.SIGKILL), one.err
    assert told(one) == [f"error: process 1 died: nothing was heard of it for {HEARTBEAT} s; "
                         "start all processes again"]


def test_a_second_process_of_a_number_ends_all(program):
    """JAX lets it in as that one started again, and would not miss the first any more."""
    *both, second = program(
        3, "(folder / 'joined').touch()", "together('x')", "time.sleep(60)",
        before="while '--process=2' in sys.argv and not Path(sys.argv[0]).with_name('joined')"
               ".exists(): time.sleep(0.1)",
        own=[["--processes=2"], ["--processes=2"], ["--processes=2", "--process=1"]])
    why = "the number 1 is taken: start all again, each with a --process of its own"
    assert (second.code, told(second)) == (1, [f"error: {why}"])
    for result in both:
        assert (result.code, told(result)) == (
            1, [f"error: process 1 (a second one) failed: {why}"])


def test_what_all_find_wrong_at_once_is_told_once_by_each(program):
    both = program(2, "together('x')", "raise UserError('so')")
    assert [result.code for result in both] == [2, 2]
    teller = int(told(both[0]) != ["error: so"])
    assert told(both[teller]) == ["error: so"]
    assert told(both[1 - teller]) == [f"error: process {teller} failed: so"]


@pytest.mark.parametrize("then", ["together('y')", "time.sleep(30)", "pass"])
def test_the_first_process_dies(program, then):
    """JAX's own words may come before; whatever the other does, the last line is ours."""
    start = time.monotonic()
    one, other = program(2, "together('x')", "if first: os.kill(os.getpid(), signal.SIGKILL)", then)
    assert (one.code, other.code) == (-signal.SIGKILL, 1), other.err
    assert told(other)[-1] == ("error: process 0 died: it can't be reached; "
                               "start all processes again")
    assert other.err.count("process 0 died") == 1 and "Fatal Python error" not in other.err
    assert time.monotonic() - start < 25


@pytest.mark.slow
def test_the_first_process_hangs(program):
    """It can be connected to all the same."""
    one, other = program(
        2, "import subprocess", "together('x')", f"kill = 'sleep {4 * HEARTBEAT}; kill -9 '",
        "if first: subprocess.Popen(['sh', '-c', kill + str(os.getpid())])",
        "if first: os.kill(os.getpid(), signal.SIGSTOP)", "together('y')")
    assert (one.code, other.code) == (-signal.SIGKILL, 1), other.err
    assert told(other)[-1].startswith("error: process 0 died: it can't be reached"), other.err


def test_another_abort_is_not_laid_to_the_first_process(program):
    one, other = program(2, "together('x')", "if first: time.sleep(2)", "if not first: os.abort()",
                         "together('y')")
    assert (one.code, other.code) == (1, -signal.SIGABRT), (one.err, other.err)
    assert "most recent call first" in other.err and "process 0 died" not in other.err
    assert told(one)[-1].startswith("error: process 1 died"), one.err


def test_none_goes_on_before_all_have_read_the_same(program, tmp_path):
    """Nor says that one is slow which has died, or ends before what differs is told."""
    same, late = "processes.check_same('data', {'a': 1})", "processes.READ_SECONDS = 1"
    mark = "(folder / str(int(first))).touch()"
    one, other = program(2, f"processes.check_same('data', {{'a': int(first)}}); {mark}")
    assert (one.code, other.code) == (2, 2)
    assert "another config, data or model than process 0 has (a: 1 " in told(other)[0]
    assert told(one) == [told(other)[0].replace("error: ", "error: process 1 failed: ")]
    one, other = program(2, f"processes.check_same('data', {{'a': 1}} if first else {{}}); {mark}")
    assert (one.code, other.code) == (2, 2) and "(a: 1 there, None here)" in told(other)[0]
    one, other = program(2, late, "time.sleep(0 if first else 3)", f"{same}; {mark}")
    assert any("not all processes had read the data within 1 s" in result.err
               for result in (one, other)), (one, other)
    one, other = program(2, "if not first: os.kill(os.getpid(), signal.SIGKILL)", f"{same}; {mark}")
    assert (one.code, other.code) == (1, -signal.SIGKILL)
    assert told(one)[-1].startswith("error: process 1 died: nothing was heard of it"), one.err
    assert not any((tmp_path / name).exists() for name in "01")


def test_only_a_deadline_is_told_as_one(monkeypatch):
    class Client:
        def __init__(self):
            self.values = {}
            self.key_value_set = self.values.__setitem__

        def blocking_key_value_get(self, key, milliseconds):
            return self.values[key]

        @staticmethod
        def wait_at_barrier(name, milliseconds):
            raise RuntimeError("UNAVAILABLE: task 1 is gone")
    state = types.SimpleNamespace(client=Client(), process_id=0)
    monkeypatch.setattr(processes, "_state", lambda: state)
    with pytest.raises(RuntimeError, match="task 1 is gone"):  # and no UserError
        processes.check_same("data", {"a": 1})


@pytest.mark.parametrize(("said", "told"), [
    ("UNAVAILABLE: Connection reset by peer", "process 0 died: it can't be reached; start all"),
    ("INTERNAL: a bug\nfar away", "can't hear of the others: RuntimeError: INTERNAL: a bug; start"),
])
def test_a_failed_look_for_the_dead_is_laid_to_process_0_only_where_it_says_so(monkeypatch, said,
                                                                               told):
    class Client:
        def blocking_key_value_get(self, key, milliseconds):
            raise RuntimeError("DEADLINE_EXCEEDED: nobody has failed")

        def get_live_nodes(self, everyone):
            raise RuntimeError(said)
    ends, client = [], Client()
    monkeypatch.setattr(processes, "_client", client)
    monkeypatch.setattr(processes, "LEAVE_SECONDS", 0)
    monkeypatch.setattr(processes, "_state", lambda: types.SimpleNamespace(num_processes=2))
    monkeypatch.setattr(processes, "_end", ends.append)
    processes._watch(client, 3)
    assert len(ends) == 1 and ends[0].startswith(told), ends


def test_a_job_may_train_twice_and_hand_on_what_is_large(program):
    both = program(2, "processes.PART, text = 7, '好' * 20", "for n in range(2):",
                   "    processes.check_same('data', {'n': n})", "    processes.see(folder)",
                   "    assert processes.shared('text', lambda: text[n:]) == text[n:]",
                   "client = processes._state().client",  # 20 times \u597d and two quotes, by 7
                   "assert client.blocking_key_value_get('text 1', 1000) == '18'")
    assert [(result.code, result.err) for result in both] == [(0, "")] * 2, both


def test_what_one_alone_refuses_is_not_lost(monkeypatch):
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", lambda _: False)
    with pytest.raises(UserError, match="mine"), processes.all_raise("that of process 0"):
        raise UserError("mine")


def test_a_run_folder_of_each_ones_own(program, tmp_path):
    """Of the same name on each machine, and both with a run in it: here by two names."""
    for name in ("False", "True"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".seen").write_text("of another run")
    both = program(2, "processes.see(folder / 'True')")
    assert [result.code for result in both] == [0, 0], both
    assert not (tmp_path / "True/.seen").exists()
    one, other = program(2, "processes.SEE_SECONDS = 1", "processes.see(folder / str(first))")
    assert (one.code, other.code) == (2, 2), (one, other)
    assert "False: what process 0 writes there is not to be seen here" in told(other)[0]
    assert told(one) == [told(other)[0].replace("error: ", "error: process 1 failed: ")]


@pytest.mark.parametrize("late", [0, 1])
def test_a_run_folder_is_seen_when_the_last_has_come(program, late):
    """Process 0 may read the weights as long as it takes; the others are given `READ_SECONDS`."""
    both = program(2, "processes.SEE_SECONDS, processes.TELL_SECONDS = 1, 0",
                   f"processes.READ_SECONDS = {1 + 9 * late}",
                   f"time.sleep(3 * (processes._state().process_id == {late}))",
                   "processes.see(folder)")
    assert [(result.code, result.err) for result in both] == [(0, "")] * 2, both


def test_sigterm_to_one_stops_all_at_the_same_step_and_outside_the_loop_all_at_once(program,
                                                                                    tmp_path):
    both = program(
        2, "with processes.asked_to_stop() as asked:",
        "    for step in range(2000):",
        "        if step == 3 and not first: os.kill(os.getpid(), signal.SIGTERM)",
        "        time.sleep(0.005 + 0.005 * first)",
        "        if stop := asked(step):",
        "            (folder / str(int(first))).write_text(str(step))",
        "            raise Interrupted(stop, step, True)")
    assert [result.code for result in both] == [128 + signal.SIGTERM] * 2, both
    step = (tmp_path / "0").read_text()
    assert (tmp_path / "1").read_text() == step and int(step) < 1999
    assert told(both[0]) == [f"stopped by SIGTERM after step {step}, which is saved; the same "
                             "command goes on from there"]
    assert told(both[1]) == []

    one, other = program(2, "if not first: os.kill(os.getpid(), signal.SIGTERM)", "together('x')")
    assert (one.code, other.code) == (1, 128 + signal.SIGTERM)
    assert told(one) == ["error: process 1 failed: stopped by SIGTERM"]
    assert told(other) == ["stopped by SIGTERM"]


def test_a_process_that_never_comes(doors, tmp_path):
    path = tmp_path / "program.py"
    path.write_text("from glm_jax.parallel import processes\nprocesses.START_SECONDS = 2\n"
                    + PROGRAM.format(before="", lines="        pass"))
    (alone,) = doors((path.with_suffix(""), "--coordinator=127.0.0.1:1", "--processes=2",
                      "--process=1"))
    assert alone.code == 1 and told(alone)[-1].startswith(
        "error: not all processes came within 2 s: each must be started"), alone.err


def test_a_port_that_is_taken(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"can't listen at port {port} of this machine (Address already in use)" in refused(
            "train", SMOKE, f"--coordinator=127.0.0.1:{port}", "--processes=2", "--process=0")


@pytest.mark.parametrize(("arguments", "message"), [
    (("--processes=2", "--process=0"), "--coordinator is missing: --coord"),
    (("--coordinator=host:1", "--processes=2"), "--process is missing: --coordinator, --proc"),
    (("--coordinator=host:1", "--processes=2", "--process=2"), "has the number 1"),
    (("--coordinator=host", "--processes=2", "--process=1"), "host:port is wanted"),
    (("--cluster", "--processes=2"), "--cluster: the cluster says"),
    (("--cluster",), "--cluster: neither Cloud TPU nor Slurm nor a JobSet of Kubernetes says"),
    (("--coordinator=host:99999", "--processes=2", "--process=1"), "host:port is wanted"),
])
def test_flags_that_name_no_job(refused, arguments, message):
    assert message in refused("train", SMOKE, *arguments)


@pytest.mark.slow
def test_four_processes_are_stopped_and_go_on_as_two_and_as_one(pod, door, base, reviews,
                                                                tmp_path):
    """SIGTERM to the third; each time on another mesh, with the losses of one device."""
    command = ["train", SMOKE, f"--config.model.path={base}", f"--config.task.train={reviews}",
               "--config.eval.every=1"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert door(*command, f"--workdir={whole}").code == 0

    def stopped(processes, *mesh):
        done = len(rows(moved)) // 2 if moved.exists() else 0
        results = pod(processes, *command, *mesh, f"--workdir={moved}", meanwhile=when(
            moved, done + 1, lambda pids: os.kill(pids[-2], signal.SIGTERM)))
        assert [result.code for result in results] == [128 + signal.SIGTERM] * processes, results
        assert len(told(results[0])) == 1 and "which is saved" in told(results[0])[0]
        assert all(told(result) == [] for result in results[1:])
    stopped(4, "--config.mesh.cpu_devices=2", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    stopped(2, "--config.mesh.cpu_devices=2", "--config.mesh.sequence=2", "--config.mesh.fsdp=2")
    result = door(*command, "--config.mesh.cpu_devices=2", f"--workdir={moved}")
    assert result.code == 0, result.err
    for here, there in zip(rows(moved), rows(whole), strict=True):
        assert here == pytest.approx(there, rel=1e-5)
    scores = [tmp_path / f"{n}.json" for n in (4, 1)]
    all_four = pod(4, "evaluate", f"--model={moved}", f"--json={scores[0]}")
    assert [result.code for result in all_four] == [0] * 4
    assert door("evaluate", f"--model={moved}", f"--json={scores[1]}").code == 0
    one, four = (json.loads(path.read_text()) for path in reversed(scores))
    assert one["confusion"] == four["confusion"]
    assert four["accuracy"] == pytest.approx(one["accuracy"], rel=1e-6)
