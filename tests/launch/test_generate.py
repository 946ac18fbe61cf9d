"""launch/generate.py: prompts from everywhere, JSON out, a chat, and what it refuses."""

import json
import os
import pty
import subprocess
import sys

import jax
from flax import nnx

import glm_jax
from glm_jax.adapters import lora
from glm_jax.adapters.peft import save_adapter
from glm_jax.data.chat import encode_chat, speaking, taught_ends
from glm_jax.errors import UserError
from glm_jax.infer.generate import generate
from glm_jax.infer.sampling import Sampling
from glm_jax.train.export import model_files
from glm_jax.train.setup import ending_at
from tests.launch.conftest import ROOT

FEW = "--max_new_tokens=5"


def test_prompts_from_arguments_files_and_standard_input(door, base, tmp_path):
    texts, more = ["房间", "早餐很好"], "--jsonl"
    wanted = glm_jax.generate(glm_jax.from_pretrained(base), texts, max_new_tokens=5,
                              tokenizer=glm_jax.load_tokenizer(base))
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("\n".join(texts))
    asked = [{"prompt": texts[0]}, {"messages": [{"role": "user", "content": texts[1]}]}]
    lines.write_text("\n".join(json.dumps(one) for one in asked))
    one = door("generate", f"--model={base}", FEW, texts[0])
    assert (one.code, one.out) == (0, wanted[0] + "\n"), one.err
    for how in ((*texts,), (f"--file={plain}", "--batch=1"), ()):
        done = door("generate", f"--model={base}", FEW, more, *how,
                    stdin=b"" if how else "\n".join(texts).encode())
        assert done.code == 0, done.err
        rows = [json.loads(line) for line in done.out.splitlines()]
        assert [row["text"] for row in rows] == wanted
        assert [row["prompt"] for row in rows] == texts and rows[0]["tokens"] == 5
    done = door("generate", f"--model={base}", FEW, more, f"--file={lines}", "--num_beams=2",
                "--cache_dtype=bfloat16", "--cache_length=64", "--dtype=bfloat16")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert all(row.items() >= one.items() for row, one in zip(rows, asked, strict=True))
    assert all(row["score"] < 0 for row in rows)


def test_an_adapter_answers_in_its_own_template(door, base, tmp_path):
    model, tokenizer = glm_jax.from_pretrained(base), glm_jax.load_tokenizer(base)
    nnx.update(model, jax.tree.map(lambda x: 5 * x, nnx.state(model)))  # that a prompt may count
    base = tmp_path / "base"
    glm_jax.save_pretrained(model, base, tokenizer)
    lora.attach(model, config := lora.LoRAConfig(r=2), seed=0)
    model.config = ending_at(model.config, taught_ends(tokenizer, "glm4_0414", [5]))
    save_adapter(model, adapter := tmp_path / "run/adapter", config, base=str(base),
                 files=model_files(model, speaking(tokenizer, "glm4_0414"), 32))

    flags = FEW, "--temperature=3"
    (base / "generation_config.json").write_text(json.dumps(  # the model's own hold on
        {"do_sample": True, "temperature": 3.0, "max_new_tokens": 5, "eos_token_id": 5}))

    def said(*arguments):
        done = door("generate", "房间", "--jsonl", *arguments)
        assert done.code == 0, done.err
        return json.loads(done.out)["text"]
    taught = said(f"--model={base}", f"--adapter={tmp_path / 'run'}")  # a run's folder
    ids = encode_chat(tokenizer, [{"role": "user", "content": "房间"}], template="glm4_0414",
                      add_generation_prompt=True)[0]
    (wanted,) = generate(glm_jax.from_pretrained(base), [ids], max_new_tokens=5,
                         how=Sampling(temperature=3.0)).tokens
    assert taught == said(f"--model={adapter}", *flags) == tokenizer.decode(wanted)
    assert taught != said(f"--model={base}", *flags)


def test_more_than_the_models_positions_is_told(door, base):
    for how in ((), ("早餐",), ("--num_beams=2",)):
        done = door("generate", f"--model={base}", "--max_new_tokens=200", "房间", *how)
        assert "tokens together: the model was made for 128, and" in done.err, done
        assert len(done.err.splitlines()) == 1
    assert door("generate", f"--model={base}", FEW, "房间").err == ""


def test_a_seed_repeats(door, base):
    def run(seed):
        return door("generate", f"--model={base}", FEW, "房间", "--temperature=2",
                    "--min_p=0.01", f"--seed={seed}").out
    assert run(1) == run(1) != run(2)


def test_what_it_refuses(refused, base, tmp_path):
    def said(*arguments, **how):
        return refused("generate", f"--model={base}", *arguments, **how)
    (bad := tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}')
    assert f"{bad}:2: a prompt (a text) or messages (a list) is wanted" in said(f"--file={bad}")
    bad.write_text('{"messages": [{"role": "king", "content": "b"}]}')
    assert f"{bad}:1: message 1, role: 'king'" in said(f"--file={bad}")
    assert "no such file" in said(f"--file={tmp_path / 'none.jsonl'}")
    assert "no prompt" in said(stdin=b"\n")
    assert "top_p must be above 0" in said("--top_p=2", "a")
    assert "num_beams and a temperature" in said("--num_beams=2", "--temperature=1", "a")
    assert "don't fit into a cache of length 6" in said("--cache_length=6", "a")
    assert "not enough memory" in said(f"--cache_length={2 * 10**14}", "a")
    assert "max_new_tokens must be at least 1" in said(f"--max_new_tokens={3 * 10**9}", "a")
    assert f"{tmp_path / 'n'}" in said(f"--adapter={tmp_path / 'n'}", "a")


def test_a_chat_remembers_also_an_answer_that_was_ended(capsys, monkeypatch):
    from launch.generate import talk
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions, asked = iter(["a", "", KeyboardInterrupt, "b", "too long", "c", EOFError]), []

    def ask(_):
        text = next(questions)
        if not isinstance(text, str):
            raise text
        return text

    def reply(messages):
        asked.append(" ".join(m["content"] for m in messages))
        if messages[-1]["content"] == "too long":
            raise UserError("too long")
        yield " one"
        if messages[-1]["content"] == "a":
            raise KeyboardInterrupt
        yield " two"
    talk(reply, True, ask)
    assert asked == ["a", "a one b", "a one b one two too long", "a one b one two c"]
    said = capsys.readouterr()
    assert said.out == " one\n\n one two\n one two\n\n"
    assert said.err == "error: too long\n"
    questions = iter(["a", "c", EOFError])
    talk(reply, False, ask)
    assert asked[4:] == ["a", "c"]


def test_in_a_terminal_it_talks(base):
    """With a real terminal: two questions, and Ctrl-D."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
            [sys.executable, str(ROOT / "launch/generate.py"), f"--model={base}", FEW, "--chat"],
            stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
        os.write(ours, "房间\n早餐\n\x04".encode())
        out, err = process.communicate(timeout=500)
    os.close(ours), os.close(theirs)
    assert process.returncode == 0, err
    assert out.decode().count("> ") == 3 and "\ufffd" not in out.decode()
