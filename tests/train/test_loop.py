"""The loop: stops and goes on, keeps the best, stops early, and leaves nothing doubled or lost."""

import json
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax.errors import Interrupted, UserError
from glm_jax.parallel.mesh import make_mesh
from glm_jax.tasks import Evaluation
from glm_jax.tasks.classification import Classification
from glm_jax.train import loop, setup
from glm_jax.train.flops import Flops
from glm_jax.train.load import load_trained
from glm_jax.train.profile import Profile
from glm_jax.train.step import by_path
from tests.folders import content, rows


def parameters(folder):
    return nnx.state(load_trained(folder, make_mesh({"data": 1})).model, nnx.Param)


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(3)`: the process is sent SIGTERM when step 3 is logged."""
    def set_step(step, signum=signal.SIGTERM):
        put = loop.Log.put

        def put_and_stop(self, number, metrics):
            put(self, number, metrics)
            if number == step:
                os.kill(os.getpid(), signum)
        monkeypatch.setattr(loop.Log, "put", put_and_stop)
    return set_step


@pytest.fixture
def scores(monkeypatch):
    """`scores(0.5, 0.8)`: what dev's evaluations give; the list returned is what was evaluated."""
    def set_scores(*values):
        asked, left = [], iter(values)

        def evaluate(self, run, split):
            asked.append(split)
            accuracy = next(left) if split == "dev" else 0.25
            return Evaluation({"accuracy": accuracy, "f1": 0.0, "loss": 1 - accuracy}, {})
        monkeypatch.setattr(Classification, "evaluate", evaluate)
        return asked
    return set_scores


def test_stopped_and_gone_on_is_the_same_as_never_stopped(smoke, stop_at, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished = loop.train(smoke(), whole)
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 3, 4, 5, 6, 6]
    for step, name in ((1, signal.SIGTERM), (4, signal.SIGINT)):
        before = signal.getsignal(name)
        stop_at(step, name)
        with pytest.raises(Interrupted, match=f"{name.name} after step {step}, which"):
            loop.train(smoke(), parts)
        monkeypatch.undo()
        assert signal.getsignal(name) is before
    # Rows of a past that did not happen, and one torn by a crash.
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/loss": 99}\n{"step": 6, "tr')
    again = loop.train(smoke(), parts)
    assert rows(parts) == rows(whole)
    assert content(parts / "adapter") == content(whole / "adapter")
    assert again.result["test"] == finished.result["test"]
    assert again.result["seconds"] > 0


def test_a_finished_run_is_not_trained_again(smoke, tmp_path, monkeypatch, caplog):
    loop.train(smoke(**{"log.tensorboard": True}), tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(loop.Log, "put", lambda *a: pytest.fail("it trains again"))
    loop.train(smoke(**{"log.tensorboard": True}), tmp_path)
    assert content(tmp_path) == before and "no trace" not in caplog.text
    (tmp_path / "result.json").unlink()  # killed before it was written
    loop.train(smoke(**{"log.tensorboard": True, "profile.steps": 1, "profile.start": 0}), tmp_path)
    assert set(content(tmp_path)) == set(before)
    assert "no trace: this run is over" in caplog.text


def test_the_best_on_dev_is_what_is_tested_and_exported(smoke, scores, stop_at, tmp_path,
                                                        monkeypatch):
    """Two evaluations without a better one end the run, also when it was stopped in between."""
    fields = {"eval.every": 1, "eval.patience": 2, "checkpoint.every": 0, "steps": 20,
              "optimizer.schedule": "constant"}
    seen = {}
    evaluate = loop.Loop.evaluate

    def remember(self, split):
        seen.setdefault(split, []).append(jax.tree.map(np.asarray, loop.judged(self.state)))
        return evaluate(self, split)
    monkeypatch.setattr(loop.Loop, "evaluate", remember)
    asked = scores(0.5, 0.8, 0.8, 0.9)
    stop_at(3)
    with pytest.raises(Interrupted):
        loop.train(smoke(**fields), tmp_path)
    monkeypatch.undo()
    assert asked == ["dev"] * 3  # the test split has not been looked at
    monkeypatch.setattr(loop.Loop, "evaluate", remember)
    asked = scores(0.7, 0.99)
    result = loop.train(smoke(**fields), tmp_path).result
    assert asked == ["dev", "test"]  # stale since step 2: once more is twice
    assert (result["steps"], result["best_step"], result["best"]) == (4, 2, {"accuracy": 0.8})
    assert result["test"]["accuracy"] == 0.25
    best, tested = seen["dev"][1], seen["test"][0]
    for name, value in best.items():
        np.testing.assert_array_equal(tested[name], value)
        assert (value != seen["dev"][-1][name]).any()
    exported = by_path(parameters(tmp_path / "adapter"))
    for name, value in best.items():
        np.testing.assert_array_equal(exported[name], value, name)
    loop.train(smoke(**fields), tmp_path)  # it is over, although steps are left
    assert asked == ["dev", "test", "test"]


def test_lower_is_better_for_a_loss(smoke, scores, tmp_path):
    scores(0.2, 0.6, 0.4)
    result = loop.train(smoke(**{"eval.every": 2, "eval.metric": "loss"}), tmp_path).result
    assert (result["best_step"], result["best"]) == (4, {"loss": 0.4})


def test_losses_that_stay_infinite_stop_the_run_and_the_good_steps_stay(smoke, tmp_path, caplog):
    fields = {"optimizer.learning_rate": 1e30, "max_skipped": 2, "checkpoint.every": 1}
    with pytest.raises(UserError, match=r"not finite for 2 steps in a row.*learning_rate"):
        loop.train(smoke(**fields), tmp_path)
    assert "not finite; the step is skipped" in caplog.text
    skipped = [row["train/skipped"] for row in rows(tmp_path)]
    assert skipped[:2] == [0, 1], skipped
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "result.json").exists()
    state = parameters(tmp_path)  # the last checkpoint is whole
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    # The count of skipped steps is in the checkpoint: going on stops at once.
    with pytest.raises(UserError, match="steps in a row"):
        loop.train(smoke(**fields), tmp_path)
    assert len(rows(tmp_path)) <= len(skipped) + 1


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(smoke, tmp_path):
    """The first step spoils them; the others are skipped, and the run would end well."""
    for rate in (1e38, 1e30):  # infinite weights, and finite ones that give nothing finite
        folder = tmp_path / str(rate)
        with pytest.raises(UserError, match=r"nothing to export. Lower .* a new --workdir"):
            loop.train(smoke(**{"optimizer.learning_rate": rate, "eval.every": 1}), folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl"}


def test_steps_that_are_skipped_push_no_good_checkpoint_out(smoke, tmp_path, monkeypatch, stop_at):
    """From step 3 on each loss is infinite: step 2 stays the last, and is what is exported."""
    make = setup.make_step

    def make_step(*a, **how):
        step = make(*a, **how)

        def spoiled(state, frozen, batch):
            state, metrics = step(state, frozen, batch)
            if int(state["step"]) >= 3:
                metrics |= {"loss": np.float32("inf"), "skipped_in_a_row": 1}
            return state, {name: jax.numpy.asarray(value) for name, value in metrics.items()}
        return spoiled
    monkeypatch.setattr(setup, "make_step", make_step)
    fields = {"checkpoint.every": 1, "eval.every": 2}
    stop_at(5)
    with pytest.raises(Interrupted, match=r"not saved, .* goes on from the last good"):
        loop.train(smoke(**fields), tmp_path)
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert sorted(steps) == ["1", "2"]
    monkeypatch.undo()
    monkeypatch.setattr(setup, "make_step", make_step)
    assert loop.train(smoke(**fields), tmp_path).result["best_step"] == 2


def damage(folder):
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def test_a_damaged_best_checkpoint_ends_nothing(smoke, scores, stop_at, tmp_path, monkeypatch,
                                                caplog):
    """Seen before it trains on, after the end, and when it is evaluated."""
    fields = {"eval.every": 1, "checkpoint.every": 0}
    scores(0.5, 0.8, 0.6, 0.7)
    stop_at(4)
    with pytest.raises(Interrupted):
        loop.train(smoke(**fields), tmp_path)
    monkeypatch.undo()
    damage(tmp_path / "checkpoints" / "2")
    asked = scores(0.4, 0.3, 0.35)
    result = loop.train(smoke(**fields), tmp_path).result
    assert "checkpoint 2 is not used" in caplog.text
    # Nothing whole was marked: step 5 is the best of what came after.
    assert (result["best_step"], result["best"]) == (5, {"accuracy": 0.4})
    damage(tmp_path / "checkpoints" / "5")
    caplog.clear()
    assert parameters(tmp_path)
    assert "its best step, 5, is not whole: step 6 stands in" in caplog.text
    result = loop.train(smoke(**fields), tmp_path).result
    assert asked == ["dev", "dev", "test", "dev", "test"]
    assert (result["best_step"], result["best"]) == (6, {"accuracy": 0.35})


def test_the_speed_is_that_of_the_step_where_each_ends_before_the_next_begins(monkeypatch):
    """As on a CPU, and a step that is read at once, as before saving: a second and 100 tokens.

    On two v5e chips, of 197e12 operations a second each, 3.94e12 are one in a hundred.
    """
    now, seen = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    log = loop.Log(SimpleNamespace(log=SimpleNamespace(every=1), max_skipped=9), lambda step: 0.1,
                   SimpleNamespace(log=lambda step, values: seen.append(values)),
                   Flops(3e10, 1e8), [SimpleNamespace(device_kind="TPU v5 lite")] * 2)
    for step in (1, 2, 3):
        log.before_step()
        now[0] += 1
        log.put(step, {"tokens": 100, "pairs": 9400.0, "skipped_in_a_row": 0, "skipped": 0,
                       "grad_norm": 1.0, "loss": jax.block_until_ready(jax.numpy.float32(1))})
    log.flush()
    assert [values["train/tokens_per_second"] for values in seen] == [100, 100, 100]
    for values in seen:
        assert values["train/tokens_per_second_per_device"] == 50
        assert values["train/mfu"] == pytest.approx((3e12 + 9.4e11) / (2 * 197e12))


def test_a_checkpoint_with_a_changed_byte_is_not_used(smoke, stop_at, tmp_path, caplog,
                                                      monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(smoke(), whole)
    stop_at(4)
    with pytest.raises(Interrupted):
        loop.train(smoke(), parts)
    monkeypatch.undo()
    damage(parts / "checkpoints" / "4")
    loop.train(smoke(), parts)
    assert "has changed since it was written: checkpoint 4 is not used" in caplog.text
    assert rows(parts) == rows(whole)
    assert content(parts / "adapter") == content(whole / "adapter")


@pytest.mark.parametrize(("fields", "message"), [
    ({"steps": 0, "epochs": 1e300}, r"epochs=1e\+300: .* steps; at most 2147483647"),
    ({"steps": 0, "epochs": 1e308}, r"epochs=1e\+308: inf steps"),
    ({"log.wandb_project": "x"}, "pip install wandb"),
])
def test_what_is_refused_leaves_no_folder(smoke, tmp_path, monkeypatch, fields, message):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=message):
        loop.train(smoke(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_evaluating_is_not_counted_in_the_speed(smoke, tmp_path, monkeypatch):
    evaluate = loop.Loop.evaluate

    def slowly(self, split):
        time.sleep(3 if split == "dev" else 0)
        return evaluate(self, split)
    monkeypatch.setattr(loop.Loop, "evaluate", slowly)
    loop.train(smoke(**{"checkpoint.every": 0}), tmp_path)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    after = next(row["train/tokens_per_second"] for row in found if row["step"] == 4)
    assert after > 256 / 3


def test_rules_of_the_config_hold_in_the_step(smoke, tmp_path):
    config = smoke(**{"mesh.data": 2})
    config.mesh.rules = {"length": "data"}  # no parameter has both; activations have
    with pytest.raises(UserError, match="'batch' and 'length' both lie on mesh axis 'data'"):
        loop.train(config, tmp_path)


def test_compiling_is_not_counted_in_the_speed(smoke, tmp_path, monkeypatch, capsys):
    made, tokens = setup.make_step, []

    def slow(*args, **kwargs):
        step = made(*args, **kwargs)

        def call(*args):
            time.sleep(0.5 if tokens else 4)
            state, metrics = step(*args)
            tokens.append(float(metrics["tokens"]))
            return state, metrics
        return call
    monkeypatch.setattr(setup, "make_step", slow)
    loop.train(smoke(**{"log.every": 3, "eval.every": 6, "checkpoint.every": 0}), tmp_path)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found[0]["step"] == 3
    assert 1 < sum(tokens[1:3]) / found[0]["train/tokens_per_second"] < 2.5  # seconds of 2 and 3
    data, first = capsys.readouterr().out.splitlines()[:2]
    assert re.fullmatch(r"train \d+, dev \d+, test \d+ rows; classes: 好, 差", data)
    assert re.match(r".*: [\d,]+ of [\d,]+ parameters train for 6 steps, on 1 cpu; comp", first)


def test_a_trace_of_some_steps(smoke, tmp_path, monkeypatch):
    """Of as many as there are; here the run ends first."""
    loop.train(smoke(**{"profile.start": 4, "profile.steps": 9, "steps": 5}), tmp_path)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "train/tokens_per_second_per_device" in metrics and "mfu" not in metrics  # on a CPU

    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(profile.done))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(profile.done))
    profile = Profile(SimpleNamespace(start=2, steps=3), tmp_path)
    for _ in range(9):
        profile.before_step()
        profile.after_step(None)
    profile.close()
    assert calls == [2, 5]


def test_a_trace_that_can_not_be_is_refused_or_told(smoke, tmp_path, caplog):
    with pytest.raises(UserError, match=r"profile\.start=5: .* there are 5"):
        loop.train(smoke(**{"profile.start": 5, "profile.steps": 2, "steps": 5}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    profile = Profile(SimpleNamespace(start=2, steps=3), tmp_path)
    for _ in range(2):  # what a run that goes on had left
        profile.before_step()
        profile.after_step(None)
    profile.close()
    assert "no trace: profile.start=2" in caplog.text
