"""Instruction tuning: what precedes an answer is its prompt, and only answers are learned."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from glm_jax.data.chat import completion, encode_answers, encode_chat, speaking
from glm_jax.data.conversations import Conversation
from glm_jax.data.packing import Shape, assemble, shape_for
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError
from glm_jax.infer.text import Speaker, settings
from glm_jax.models import architecture_of
from glm_jax.parallel.mesh import make_mesh
from glm_jax.tasks.instruction import Instruction, whole_answers
from glm_jax.train.export import model_files
from glm_jax.train.load import load_trained
from glm_jax.train.loop import train
from tests.data.versions import tokenizer
from tests.folders import rows

TURNS = [("你好", "世界"), ("今天", "天气"), ("问", "答")]
CHAT = [message for q, a in TURNS for message in (
    {"role": "user", "content": q}, {"role": "assistant", "content": a})]


def runs(mask):
    edges = np.flatnonzero(np.diff([0, *map(int, mask), 0]))
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("version", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_every_answer_is_learned_behind_the_prompt_of_inference(version):
    ours = tokenizer(version)
    taught = encode_answers(ours, CHAT)
    assert len(taught) == (3 if version in ("chatglm1", "chatglm2") else 1)
    found = [(ids, *run) for ids, mask in taught for run in runs(mask)]
    assert len(found) == 3
    for turn, (ids, begins, end) in enumerate(found):
        prompt, _ = encode_chat(ours, CHAT[:2 * turn + 1], add_generation_prompt=True)
        assert ids[:len(prompt)] == prompt
        assert begins == len(prompt) - (version == "chatglm1")  # its <sop> is a target too
        assert ours.decode(ids[len(prompt):end - 1]).strip() == TURNS[turn][1]
        ends = {"glm4": "<|user|>", "chatglm3": "<|user|>" if turn < 2 else "<eos>"}
        assert ids[end - 1] == ours.special.get(ends.get(version, ""), ours.eos_id)


def test_thoughts_that_are_forgotten_are_learned_where_they_are_not():
    ours = tokenizer("glm4")
    thought = [*CHAT[:1], {"role": "assistant", "content": "<think>hm</think>世界"}, *CHAT[2:4]]
    first, second = encode_answers(ours, thought, template="glm45")
    assert "hm" in ours.decode(first[0]) and "hm" not in ours.decode(second[0])
    assert len(encode_answers(ours, CHAT, template="glm45")) == 1


def test_a_call_ends_where_its_result_begins_and_unlearned_answers_are_not_targets():
    ours = tokenizer("glm4")
    call = [CHAT[0], {"role": "assistant", "metadata": "get", "content": "{}", "loss": False},
            {"role": "observation", "content": "22"}, CHAT[1]]
    (ids, mask), = encode_answers(ours, call)
    assert len(runs(mask)) == 1 and ours.decode(ids[runs(mask)[0][0]:]).strip() == "世界"
    call[1]["loss"] = True
    (ids, mask), = encode_answers(ours, call)
    assert ids[runs(mask)[0][1] - 1] == ours.special["<|observation|>"]
    # So does one that is a row of its own, since a later question makes its thought forgotten.
    tool = {"function": {"name": "get", "arguments": {"n": 1}}}
    calls = [CHAT[0], {"role": "assistant", "content": "<think>hm</think>", "tool_calls": [tool]},
             {"role": "tool", "content": "22"}, *CHAT[1:4]]
    first, *others = encode_answers(ours, calls, template="glm45")
    assert first[0][-1] == ours.special["<|observation|>"] and len(others) == 2
    assert all(ids[-1] == ours.special["<|user|>"] for ids, _ in others)


@pytest.mark.parametrize("version", ["chatglm1", "glm4", "glm2021"])
def test_plain_is_the_prompt_of_a_text_then_the_answer_and_its_end(version):
    ours = tokenizer(version)
    (ids, mask), = encode_answers(ours, CHAT[:2], template="plain")
    prompt = completion(ours, "你好")
    assert ids[:len(prompt)] == prompt and runs(mask) == [(len(prompt), len(ids))]
    assert ids[-1] == ours.special.get("<|endofpiece|>", ours.eos_id)
    with pytest.raises(UserError, match="one question and its answer"):
        encode_answers(ours, CHAT, template="plain")


def make(version="glm4", length=64, template=None):
    found = [Conversation(CHAT, None, "x:1"), Conversation(CHAT[:2], None, "x:2")]
    shape = Shape(1, length, length)
    return Instruction(ConfigDict(), tokenizer(version), shape, {"train": found}, template)


def test_weights_by_position():
    source = make().source("train")
    batch = assemble([[source.piece(0, 0), source.piece(1, 0)]], Shape(1, 64, 64), 0)
    whole = [encode_answers(tokenizer("glm4"), messages)[0] for messages in (CHAT, CHAT[:2])]
    at = 0
    for ids, mask in whole:
        here = slice(at, at + len(ids) - 1)
        np.testing.assert_array_equal(batch.tokens[0, here], ids[:-1])
        np.testing.assert_array_equal(batch.targets[0, here], ids[1:])
        np.testing.assert_array_equal(batch.weights[0, here], mask[1:])
        at += len(ids) - 1
    assert not batch.weights[0, at:].any() and source.lengths(0).tolist() == [
        len(ids) - 1 for ids, _ in whole]


def test_chatglm6b_sees_the_question_both_ways_and_counts_the_answer():
    ours = tokenizer("chatglm1")
    raw = {"model_type": "chatglm", "position_encoding_2d": True, "num_layers": 1,
           "bos_token_id": ours.special["<sop>"], "gmask_token_id": ours.special["[gMASK]"]}
    config = architecture_of(raw).config.from_dict(raw)
    shape = shape_for(config, 1, 64, 3)
    task = dataclasses.replace(make("chatglm1"), shape=shape)
    source = task.encode([Conversation(CHAT[:2], None, "x:1")] * 2)
    batch = assemble([[source.piece(0, 0), source.piece(1, 0)]], shape, 0)
    length = len(source.ids[0]) - 1
    start = source.ids[0].tolist().index(ours.special["<sop>"])
    for number, at in enumerate((0, length), 1):  # each example begins anew
        here = slice(at, at + length)
        answered = np.maximum(np.arange(length) - start + 1, 0)
        assert (batch.segments[0, here] == number).all()
        np.testing.assert_array_equal(batch.positions[0, 1, here], answered)
        np.testing.assert_array_equal(batch.order[0, here] - batch.order[0, at], answered)
        np.testing.assert_array_equal(batch.positions[0, 0, here],
                                      np.minimum(np.arange(length), start - 1))
        # [gMASK] already predicts <sop>.
        np.testing.assert_array_equal(batch.weights[0, here], np.arange(length) >= start - 1)


def test_long_rows_are_cut_behind_a_whole_answer_and_counted(caplog):
    first = whole_answers(encode_answers(tokenizer("glm4"), CHAT)[0][1], 10**6)
    ends = [end for _, end in runs(encode_answers(tokenizer("glm4"), CHAT)[0][1])]
    assert first == ends[-1]
    with caplog.at_level(logging.WARNING):
        kept = make(length=ends[1]).source("train")
    assert len(kept.ids[0]) == ends[1] and "of 1 rows longer than" in caplog.text
    assert "1 are cut behind an answer and 0," in caplog.text
    with pytest.raises(UserError, match=r"no row of at most batch\.length=4"):
        make(length=4).source("train")
    with pytest.raises(UserError, match=r"x:1: message 1, role"):
        one = Conversation([{"role": "robot", "content": ""}, *CHAT], None, "x:1")
        make().encode([one])


def test_the_config_runs_learns_and_answers_in_the_template_that_was_taught(base, tmp_path):
    """From the run's folder, its adapter, and what PyTorch gets."""
    from configs.chat import get_config
    draw = np.random.default_rng(0)
    lines = [json.dumps({"prompt": "".join(draw.choice(list("房间干净早餐差床单脏"), 9)),
                         "response": "好"}, ensure_ascii=False) for _ in range(120)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = get_config("smoke")
    config.update_from_flattened_dict({
        "task.train": str(tmp_path / "a.jsonl"), "model.path": str(base), "mesh.data": 1,
        "batch.length": 32, "log.tensorboard": False, "optimizer.learning_rate": 0.02,
        "task.template": "glm4_0414"})
    finished = train(config, tmp_path / "run")
    losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
    # The frozen, tied head of this tiny base leaves an answer's token 2.6 nats or so at best.
    assert finished.result["exported"] == "adapter" and len(losses) == 20
    assert finished.result["dev"]["loss"] < losses[0] - 1.5
    ours = load_tokenizer(base)
    for folder in (tmp_path / "run", tmp_path / "run/adapter"):
        trained = load_trained(folder, make_mesh({"data": 1}))
        speaker = Speaker(trained.model, trained.tokenizer, settings(folder, {}))
        assert speaker.chats
        assert speaker.config_ends == [ours.eos_id, ours.special["<|user|>"]]
        assert speaker.encode("房间") == encode_chat(ours, [{"role": "user", "content": "房间"}],
                                                   template="glm4_0414",
                                                   add_generation_prompt=True)[0]
        files = model_files(trained.model, trained.tokenizer, 32)  # as launch/convert.py has them
        assert json.loads(files["generation_config.json"])["eos_token_id"] == speaker.config_ends
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "run/adapter")
    assert theirs.apply_chat_template([{"role": "user", "content": "房间"}], return_dict=False,
                                      add_generation_prompt=True) == speaker.encode("房间")
    assert not Speaker(load_trained(base, make_mesh({"data": 1})).model, ours, {}).chats


def test_a_bad_row_of_any_split_is_told_before_training_and_each_is_encoded_once(tmp_path):
    good = {"messages": CHAT}
    bad = {"messages": [{"role": "robot", "content": "a"}, *CHAT[:2]]}
    for name, row in (("train", good), ("dev", bad), ("fine", good)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")

    def load(dev):
        config = ConfigDict({"train": str(tmp_path / "train.jsonl"), "template": "",
                             "dev": str(tmp_path / f"{dev}.jsonl"), "prompt": "", "answer": ""})
        return Instruction.load(config, tokenizer("glm4"), Shape(1, 64, 1), chats=True)
    with pytest.raises(UserError, match=r"dev\.jsonl:1: message 1, role"):
        load("dev")
    task = load("fine")
    assert task.source("dev") is task.source("dev") and len(task.source("train").ids) == 1
    assert task.about() == "train 1, dev 1 conversations"


def test_a_template_of_other_tokens_is_told(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    config = ConfigDict({"train": str(tmp_path / "a.jsonl"), "dev": str(tmp_path / "a.jsonl"),
                         "prompt": "", "answer": "", "template": "chatglm3"})
    for version, told in (("chatglm3", False), ("glm4", True)):
        Instruction.load(config, speaking(tokenizer(version), "chatglm3"), Shape(1, 64, 1), True)
        assert ("chatglm3: the vocabulary has no sop, which" in caplog.text) == told


def test_training_is_smoothed_and_what_is_reported_is_not():
    task, draw = make(), np.random.default_rng(0)
    task = dataclasses.replace(task, config=ConfigDict({"label_smoothing": 0.1}))
    batch = assemble([[task.source("train").piece(0, 0)]], Shape(1, 64, 64), 0)
    size = int(batch.targets.max()) + 2
    hidden = draw.normal(size=(1, 64, 3)).astype(np.float32)
    kernel = draw.normal(size=(3, size)).astype(np.float32)

    class Fixed:
        """A model whose hidden states are given."""
        def __call__(self, batch, key=None):
            return jnp.asarray(hidden), None

        def vocabulary_kernel(self):
            return jnp.asarray(kernel)

    logp = np.asarray(jax.nn.log_softmax(hidden @ kernel))
    own = np.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
    wanted = -(batch.weights * own).sum()
    np.testing.assert_allclose(task.predict(Fixed(), batch), [wanted, batch.weights.sum()],
                               rtol=1e-5)
    np.testing.assert_allclose(task.loss(Fixed(), batch, None), 0.9 * wanted
                               - 0.1 * (batch.weights * logp.mean(-1)).sum(), rtol=1e-5)
