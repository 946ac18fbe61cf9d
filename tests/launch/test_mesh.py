"""Doors that load a model, on several devices: by the run's own mesh, or one that is asked for."""

import json

import pytest

MESH = "--mesh=fsdp=2,tensor=2"


def test_evaluation_and_prediction_equal_one_device(trained, door, tmp_path):
    scores = []
    for name, devices, flags in (("one", 1, ()), ("own", 2, ()), ("four", 4, (MESH,))):
        path = tmp_path / f"{name}.json"
        result = door("evaluate", f"--model={trained}", f"--json={path}", *flags, devices=devices)
        assert result.code == 0, result.err
        scores.append(json.loads(path.read_text()))
    for other in scores[1:]:
        assert other["confusion"] == scores[0]["confusion"]
        assert other["accuracy"] == pytest.approx(scores[0]["accuracy"], rel=1e-6)
    told = []
    for devices, flags in ((1, ()), (4, (MESH,))):
        result = door("predict", f"--model={trained}", "--jsonl", *flags, "房间很干净", "服务差",
                      devices=devices)
        assert result.code == 0, result.err
        told.append([json.loads(line)["probabilities"] for line in result.out.splitlines()])
    for one, four in zip(*told, strict=True):
        assert four == pytest.approx(one, abs=1e-5)


def test_generation_equals_one_device(door, base):
    said = [door("generate", f"--model={base}", "--max_new_tokens=5", "--jsonl", *flags, "房间",
                 "早餐", devices=devices) for devices, flags in ((1, ()), (4, ()), (4, (MESH,)))]
    assert [result.code for result in said] == [0] * 3, said[-1].err
    assert said[0].out == said[1].out == said[2].out
