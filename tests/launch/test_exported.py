"""launch/evaluate.py, predict.py and convert.py on run folders, adapters and models."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from glm_jax.parallel.mesh import make_mesh
from glm_jax.train.load import classifier, load_trained
from glm_jax.train.loop import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {}


@pytest.fixture
def run(smoke, runs, tmp_path_factory):
    """`run("full")`: the folder of a finished run, made once."""
    def make(variant=""):
        if variant not in runs:
            runs[variant] = tmp_path_factory.mktemp("runs") / "run"
            train(smoke(variant, **{"optimizer.learning_rate": 0.02, "batch.length": 72}),
                  runs[variant])
        return runs[variant]
    return make


def test_evaluate_measures_what_the_run_measured(door, refused, run, reviews, tmp_path):
    folder = run()
    result = json.loads((folder / "result.json").read_text())
    done = door("evaluate", f"--model={folder}", f"--json={tmp_path / 'scores.json'}")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert done.code == 0 and done.err == "", done.err
    assert {name: scores[name] for name in result["test"]} == pytest.approx(result["test"])
    assert f"accuracy {scores['accuracy']:.4g}" in done.out

    several = []
    for source in (folder, folder / "adapter"):
        data = reviews if several else os.path.relpath(reviews, ROOT)
        done = door("evaluate", f"--model={source}", f"--data={data}",
                    f"--json={tmp_path / 'all.json'}")
        assert done.code == 0, done.err
        assert ("trained on rows of it, which make the scores too good" in done.err) == (
            source == folder)  # an adapter does not say
        several.append(json.loads((tmp_path / "all.json").read_text()))
    assert several[0]["examples"] == 240
    assert several[1]["loss"] == pytest.approx(several[0]["loss"], abs=1e-5)

    other = tmp_path / "other.csv"
    other.write_text("text,label\n好,好\n坏,坏\n")
    assert f"{other}:3: label '坏'" in refused("evaluate", f"--model={folder}", f"--data={other}")
    assert f"--split=test: {reviews} is not split" in refused(
        "evaluate", f"--model={folder}", f"--data={reviews}", "--split=test")
    assert "give --data" in refused("evaluate", f"--model={folder / 'adapter'}")
    assert "neither a run folder" in refused("evaluate", f"--model={tmp_path}")
    assert "no checkpoint '5'" in refused("evaluate", f"--model={folder}", "--step=5")
    assert "has no step 5" in refused("evaluate", f"--model={folder / 'adapter'}", "--step=5")
    assert "--model" in refused("evaluate")


def test_the_exported_tokenizer_gives_transformers_what_was_trained_on(run):
    import transformers
    folder, mesh = run(), make_mesh({"data": 1})
    task, _ = classifier(load_trained(folder, mesh), mesh)
    texts = ["房间喜欢", "电梯糟糕,早餐难吃" * 30]  # one is longer than a row
    ours = [ids.tolist() for ids in task.encode(texts)]
    theirs = transformers.AutoTokenizer.from_pretrained(folder / "adapter")
    assert theirs(texts, truncation=True)["input_ids"] == ours
    assert {ids[-1] for ids in ours} == {theirs.convert_tokens_to_ids("[sMASK]")}
    assert len(ours[1]) == task.shape.length


def test_predict_from_arguments_a_file_and_standard_input(door, refused, run, reviews, tmp_path):
    folder = run()
    texts = ["房间喜欢", "电梯糟糕,早餐难吃" * 30, "好"]  # one is longer than a row
    done = door("predict", f"--model={folder}", "--jsonl", *texts)
    assert done.code == 0 and len(done.err.splitlines()) == 1, done.err
    assert "texts: 1 of 3 are longer than batch.length=" in done.err
    wanted = [json.loads(line) for line in done.out.splitlines()]
    assert [row["text"] for row in wanted] == texts
    for row in wanted:
        assert set(row["probabilities"]) == {"好", "差"}
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)

    def rows(done):
        assert done.code == 0, done.err
        return [pytest.approx(row["probabilities"], abs=1e-5)
                for row in map(json.loads, done.out.splitlines())]
    probabilities = [row["probabilities"] for row in wanted]
    lines = "\n".join(texts) + "\n\n"
    assert probabilities == rows(door("predict", f"--model={folder / 'adapter'}", "--jsonl",
                                      stdin=lines.encode()))
    (tmp_path / "texts.txt").write_text(lines)
    assert probabilities == rows(door("predict", f"--model={folder}", "--jsonl",
                                      f"--file={tmp_path / 'texts.txt'}"))
    with open(tmp_path / "texts.csv", "w") as file:
        csv.writer(file).writerows([["body"], *([text] for text in texts)])
    assert probabilities == rows(door("predict", f"--model={folder}", "--jsonl", "--text=body",
                                      f"--file={tmp_path / 'texts.csv'}"))
    plain = door("predict", f"--model={folder}", texts[0]).out
    label = wanted[0]["label"]
    assert plain.startswith(f"{label}\t好 ") and plain.endswith(f"\t{texts[0]}\n")

    lines = door("predict", f"--model={folder}", "好\n坏\r", "差").out.splitlines()
    assert [line.split("\t")[2] for line in lines] == [r"好\n坏\r", "差"]

    for given, how in (("argument 2: ", {}), ("standard input:2: ", {"stdin": b"a\n \nb\n"})):
        assert f"{given}the text is empty. Fill it in" in refused(
            "predict", f"--model={folder}", *(() if how else ("好", " ")), **how)
    assert "no text" in refused("predict", f"--model={folder}")
    assert "not UTF-8 at byte 3" in refused("predict", f"--model={folder}", stdin=b"abc\xff")
    assert "absent.txt: no such file" in refused("predict", f"--model={folder}",
                                                 "--file=absent.txt")


def test_weights_that_are_not_finite_are_refused(door, run, reviews, tmp_path):
    from safetensors.numpy import load_file, save_file
    folder = tmp_path / "adapter"
    shutil.copytree(run() / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: x * np.float32("nan") for name, x in tensors.items()},
              folder / "adapter_model.safetensors", {"format": "pt"})
    for what in (["predict", "好"], ["evaluate", f"--data={reviews}"]):
        done = door(what[0], f"--model={folder}", what[1])
        warned, refused = done.err.splitlines()
        assert warned.startswith("warning: ") and "holds NaN or infinite values" in warned
        assert done.code == 2 and not done.out
        assert refused.startswith("error: ") and "not finite" in refused


def test_a_run_finds_its_base_from_anywhere_or_says_that_it_is_gone(door, refused, run, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(run(), folder)
    written = json.loads((folder / "config.json").read_text())
    model = written["config"]["model"]
    model["path"] = os.path.relpath(model["path"], ROOT)
    (folder / "config.json").write_text(json.dumps(written))
    (tmp_path / "elsewhere").mkdir()
    there = {"cwd": tmp_path / "elsewhere"}
    assert door("predict", f"--model={folder}", "好", **there).code == 0
    model["path"] = "gone/base"
    (folder / "config.json").write_text(json.dumps(written))
    for name, *arguments in (("predict", "好"), ("convert", "--to=peft", "--out=out")):
        assert "it was trained on gone/base, which is no folder here" in refused(
            name, f"--model={folder}", *arguments, **there)


def test_a_run_in_bfloat16_converts_to_what_pytorch_computes(door, smoke, reviews, tmp_path):
    pytest.importorskip("torch")
    train(smoke("", **{"model.dtype": "bfloat16", "steps": 8}), tmp_path / "run")
    done = door("convert", f"--model={tmp_path / 'run'}", "--to=merged", "--verify",
                f"--out={tmp_path / 'out'}", f"--data={reviews}", "--rows=20")
    found = re.search(r"logits over 20 texts (\S+)", done.out)
    assert done.code == 0 and found and float(found[1]) < 1e-4, (done.out, done.err)


@pytest.mark.parametrize(("variant", "form"), [("", "peft"), ("", "merged"), ("full", "hf")])
def test_pytorch_computes_the_same_from_what_is_converted(door, refused, run, reviews, tmp_path,
                                                          variant, form):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    folder, out = run(variant), tmp_path / "out"
    done = door("convert", f"--model={folder}", f"--to={form}", f"--out={out}", "--verify",
                f"--data={reviews}", "--rows=20")
    assert done.code == 0, done.err
    found = re.search(r"logits over 20 texts (\S+)", done.out)
    assert found and float(found[1]) < 1e-4, done.out
    assert (out / "tokenizer.json").exists()
    if form == "peft":
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    wrong = {"peft": "hf", "merged": "hf", "hf": "merged"}[form]
    assert f"--to={wrong} is not for it" in refused(
        "convert", f"--model={folder}", f"--to={wrong}", f"--out={tmp_path / 'no'}")
    assert not (tmp_path / "no").exists()
    exported = folder / ("model" if form == "hf" else "adapter")
    assert "it is what is converted" in refused(
        "convert", f"--model={exported}", f"--to={form}", f"--out={exported}")
    assert "is more than a checkpoint folder" in refused(
        "convert", f"--model={folder}", f"--to={form}", f"--out={folder.parent}")


def test_a_language_model_converts_and_is_no_classifier(door, refused, base, reviews, tmp_path):
    out = tmp_path / "out"
    done = door("convert", f"--model={base}", "--to=hf", f"--out={out}", "--dtype=bfloat16")
    assert done.code == 0, done.err
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [5]
    for door_name, asked in (("predict", "好"), ("evaluate", f"--data={reviews}")):
        assert "does not classify texts" in refused(door_name, f"--model={base}", asked)


def test_conv_rnn_has_no_export(door, refused, run, tmp_path):
    folder = run("conv-rnn")
    for form in ("hf", "merged"):
        assert "PyTorch has no conv_rnn" in refused("convert", f"--model={folder}", f"--to={form}",
                                                    f"--out={tmp_path / 'out'}")
    assert door("predict", f"--model={folder}", "房间喜欢").code == 0
