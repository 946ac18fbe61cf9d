"""launch/convert.py on folders, and launch/models.py."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from glm_jax.convert.hf import save_model
from tests.convert.test_streaming import CHATGLM, FAMILY, HEADS, read
from tests.folders import content
from tests.launch.conftest import ROOT


@pytest.fixture(scope="module")
def chatglm(tiny, tmp_path_factory):
    fields = {name: value for name, value in CHATGLM.items() if name != "model_type"}
    folder = tmp_path_factory.mktemp("door") / "chatglm"
    save_model(tiny(model_type="chatglm", **fields), folder, dtype=jnp.bfloat16,
               files={"tokenizer_config.json": b"{}", "modeling_chatglm.py": b"raise"})
    (folder / "training_args.bin").write_bytes(b"no weights")
    return folder


def test_a_dry_run_prints_all_and_writes_nothing(door, chatglm, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = door("convert", f"--model={chatglm}", "--architecture=glm", "--dry-run",
                "--max-shard-size=20KB")
    assert done.code == 0 and done.err == "", done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["model.layers.1.mlp.gate_up_proj.weight", "96x32", "bfloat16", "0.006", "MB"] in lines
    assert ["lm_head.weight", "61x32", "bfloat16", "0.004", "MB"] in lines
    assert "glm, lm: 36 tensors, 0.055 MB in 3 files" in done.out, done.out
    assert "besides: config.json, generation_config.json, tokenizer_config.json\n" in done.out
    assert "memory: about 200.0" in done.out
    assert [path for path in sorted(tmp_path.iterdir()) if path not in before] == [
        tmp_path / "door0"]


def test_without_pytorch_nothing_is_written_that_was_to_be_verified(chatglm, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/convert.py"), f"--model={chatglm}", "--verify",
         f"--out={tmp_path / 'out'}"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "torch is not installed: pip install" in done.stderr
    assert not (tmp_path / "out").exists()


def test_there_and_back_verified(door, chatglm, tmp_path):
    pytest.importorskip("transformers")
    there = door("convert", f"--model={chatglm}", "--architecture=glm", "--verify",
                 f"--out={tmp_path / 'glm'}", "--max-shard-size=20KB")
    assert there.code == 0, there.err
    assert f"every parameter is that of {chatglm}" in there.out
    assert "PyTorch: largest difference of the logits over 4 random rows" in there.out
    assert "wrote" in there.out and "glm, bfloat16, generation_config.json, tok" in there.out
    names = {path.name for path in (tmp_path / "glm").iterdir()}
    assert "modeling_chatglm.py" not in names and "training_args.bin" not in names
    assert len([name for name in names if name.endswith(".safetensors")]) == 3

    back = door("convert", f"--model={tmp_path / 'glm'}", "--architecture=chatglm", "--verify",
                f"--out={tmp_path / 'back'}", "--to=hf")
    assert back.code == 0, back.err
    assert ("no ChatGLMModel without remote code in transformers; the source: largest difference "
            "of the logits over 4 random rows 0.00e+00") in back.out
    assert read(tmp_path / "back") == read(chatglm)

    again = door("convert", f"--model={chatglm}", f"--out={tmp_path / 'again'}", "--dtype=float16")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again/config.json").read_text())["torch_dtype"] == "float16"
    assert {dtype for dtype, *_ in read(tmp_path / "again").values()} == {"float16"}
    assert (tmp_path / "again/modeling_chatglm.py").read_bytes() == b"raise"


@pytest.mark.parametrize("head", ["base", "mlm", "qa"])
def test_each_head_of_bert_is_verified_by_pytorch(door, tiny, tmp_path, head):
    pytest.importorskip("transformers")
    save_model(tiny(head, num_labels=2, **FAMILY["bert"]), tmp_path / "in")
    done = door("convert", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--verify")
    assert done.code == 0, (done.out, done.err)
    assert "PyTorch: largest difference" in done.out


@pytest.mark.parametrize("name", ["chatglm6b", "glm2021", "glm4_moe"])
def test_the_others_are_verified(door, tiny, tmp_path, name):
    pytest.importorskip("transformers")
    extra = {"bos_token_id": 62, "mask_token_id": 60, "gmask_token_id": 61}
    fields = FAMILY[name] | (extra if name == "chatglm6b" else {})
    save_model(tiny(HEADS.get(name, "lm"), **fields), tmp_path / "in")
    done = door("convert", f"--model={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--verify")
    assert done.code == 0, (done.out, done.err)
    assert ("PyTorch: largest" if name == "glm4_moe" else "without remote code") in done.out


def test_what_is_not_used_is_said(door, tiny, tmp_path):
    save_model(tiny("mlm", **FAMILY["bert"]), tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    save_file(load_file(path) | {"cls.seq_relationship.bias": np.ones(2, np.float32)}, path)
    done = door("convert", f"--model={tmp_path / 'in'}", "--dry_run")
    assert "not written, since the model does not use them: cls.seq_relationship.bias" in done.out


def test_what_convert_refuses(refused, chatglm, tmp_path):
    model, out = f"--model={chatglm}", f"--out={tmp_path / 'out'}"
    assert "--out=FOLDER is wanted" in refused("convert", model)
    assert "'5 apples' is no size" in refused("convert", model, out, "--max_shard_size=5 apples")
    assert "has no adapter: --to=merged is not for it" in refused("convert", model, out,
                                                                  "--to=merged")
    assert "it is what is converted" in refused("convert", model, f"--out={chatglm}")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_replaced_when_that_is_asked_for(door, refused, chatglm, tmp_path):
    command = ["convert", f"--model={chatglm}", f"--out={tmp_path / 'out'}"]
    assert door(*command).code == 0
    (tmp_path / "out/README.md").write_text("by hand")
    before = content(tmp_path / "out")
    assert "it holds a checkpoint already; name another folder, or replace it with --overwrite" in \
        refused(*command, "--dtype=float16")
    assert content(tmp_path / "out") == before
    assert door(*command, "--dtype=float16", "--dry-run").code == 0
    assert door(*command, "--dtype=float16", "--overwrite").code == 0
    after = content(tmp_path / "out")
    assert after.keys() == before.keys() and after["README.md"] == b"by hand"
    assert after["model.safetensors"] != before["model.safetensors"]


def test_models_lists_the_registry(door):
    done = door("models", "--json")
    found = {row["architecture"]: row for row in json.loads(done.out)}
    assert found.keys() == {"glm", "glm4", "glm4_moe", "chatglm", "glm2021", "chatglm6b", "bert"}
    assert found["chatglm"]["writes"] == ["chatglm", "glm"]
    assert found["chatglm"]["reads"] == ["safetensors", "bin", "int4", "int8"]
    assert found["bert"]["heads"]["mlm"] == "BertForMaskedLM"
    text = door("models").out
    assert all(f"{name}  " in text for name in found) and "Glm4MoeForCausalLM" in text
