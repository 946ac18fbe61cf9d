"""Settings, stop tokens, prompts of each version, and streams that never show half a character."""

import json

import pytest

from glm_jax.convert.hf import load_model
from glm_jax.data.tokenizer import load_tokenizer
from glm_jax.errors import UserError
from glm_jax.infer.text import Speaker, completion, settings, whole_characters
from tests.data.versions import tokenizer


@pytest.fixture(scope="module")
def speaker(base):
    model, tokenizer = load_model(base), load_tokenizer(base)
    return lambda **how: Speaker(model, tokenizer, {"max_new_tokens": 12, **how})


@pytest.mark.parametrize(("file", "given", "wanted"), [
    ({}, {}, {}),
    ({"temperature": 0.8, "top_p": 0.8, "max_length": 9}, {}, {}),
    ({"do_sample": True, "temperature": 0.8, "top_p": 0.8}, {}, {"temperature": 0.8, "top_p": 0.8}),
    ({"do_sample": True, "top_p": 0.8}, {"top_p": 0.5}, {"temperature": 1.0, "top_p": 0.5}),
    ({"do_sample": True, "temperature": 0.8}, {"temperature": 0.0}, {"temperature": 0.0}),
    ({"eos_token_id": [1, 2], "num_beams": 4, "temperature": None}, {"min_p": 0.1},
     {"eos_token_id": [1, 2], "num_beams": 4, "min_p": 0.1, "temperature": 1.0}),
    ({"repetition_penalty": 1.2}, {"max_new_tokens": 5, "top_k": 0},
     {"repetition_penalty": 1.2, "max_new_tokens": 5, "top_k": 0})])
def test_settings_are_the_files_under_those_given(tmp_path, file, given, wanted):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert settings(tmp_path, given | {"seed": None}) == wanted
    assert settings(tmp_path / "none", {}) == {}


def test_answers_end_where_the_files_and_the_roles_say(speaker):
    special = speaker().tokenizer.special
    roles = {special["<|user|>"], special["<|observation|>"]}
    assert set(speaker().stop_ids) == {5} | roles
    assert set(speaker(eos_token_id=17).stop_ids) == {5, 17} | roles
    assert not speaker().chats and speaker(eos_token_id=[5, special["<|user|>"]]).chats


def test_a_prompt_is_a_text_or_a_question(speaker):
    special, text = speaker().tokenizer.special, speaker().tokenizer.encode("房间")
    assert speaker().encode("房间") == text
    asked = speaker().encode("房间", chat=True)
    assert asked[-1] == special["<|assistant|>"] and special["<|user|>"] in asked
    assert speaker(eos_token_id=special["<|user|>"]).encode("房间") == asked
    assert speaker().encode([{"role": "user", "content": "房间"}]) == asked
    with pytest.raises(UserError, match="message 1, role"):
        speaker().encode([{"role": "nobody", "content": ""}])
    with pytest.raises(UserError, match="tools: a text to go on with has none"):
        speaker().encode("房间", tools=[{"name": "f"}])


def test_a_blank_of_glm_2021_is_that_of_the_text_or_one_behind_it():
    ours = tokenizer("glm2021")
    mask, gmask, start = (ours.special[name] for name in ("[MASK]", "[gMASK]", "<|startofpiece|>"))
    framed = ours.encode("你好")
    assert completion(ours, "你好") == [*framed[:-1], gmask, framed[-1], start]
    marked = completion(ours, "你好[MASK]世界")
    assert marked.count(mask) == 1 and gmask not in marked and marked[-1] == start


def test_a_stream_is_the_answer_in_pieces(speaker):
    one = speaker(temperature=1.5)
    row = one.encode("房间")
    ids, score = one.answers([row])[0]
    pieces = list(one.stream(row))
    assert score is None and "".join(pieces) == one.tokenizer.decode(ids) and len(pieces) > 2


def test_half_a_character_waits_for_its_other_half(speaker):
    tokenizer = speaker().tokenizer
    ids = tokenizer.encode("房间龘😀干净é", add_special_tokens=False)
    assert any("\ufffd" in tokenizer.decode(ids[:n]) for n in range(len(ids)))
    pieces = list(whole_characters(tokenizer, (ids[:n] for n in range(1, len(ids) + 1))))
    assert "".join(pieces) == "房间龘😀干净é" and not any("\ufffd" in piece for piece in pieces)
    cut = list(whole_characters(tokenizer, (ids[:n] for n in range(1, len(ids)))))
    assert "".join(cut) == tokenizer.decode(ids[:-1])  # what is broken in the end is shown


def test_beams_give_scores_and_refuse_a_temperature(speaker):
    one = speaker(num_beams=3, length_penalty=0.0)
    row = one.encode("房间")
    ids, score = one.answers([row])[0]
    assert score is not None and score < 0
    assert list(one.stream(row)) == [one.tokenizer.decode(ids)]
    greedy = speaker(num_beams=1).answers([row])[0]
    assert greedy[1] is None
    with pytest.raises(UserError, match="don't go together"):
        speaker(num_beams=3, temperature=0.5).answers([row])


@pytest.mark.parametrize(("how", "message"), [
    ({"num_beams": "4"}, "num_beams must be"), ({"num_beams": 2.0}, "num_beams must be"),
    ({"num_beams": 2, "length_penalty": "x"}, "length_penalty must be"),
    ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping must be"),
    ({"num_beams": 2, "top_p": 7}, "top_p must be"), ({"temperature": "hot"}, "temperature must"),
    ({"max_new_tokens": "many"}, "max_new_tokens must be"),
    ({"eos_token_id": "<eos>"}, "eos_token_id must be a token id"),
    ({"eos_token_id": [1, None]}, "eos_token_id must be a token id")])
def test_what_a_file_says_wrongly_is_one_message(speaker, how, message):
    for ask in (lambda one: one.answers([[1, 2]]), lambda one: list(one.stream([1, 2]))):
        with pytest.raises(UserError, match=message):
            ask(speaker(**how))


def test_rows_of_several_lengths_answer_as_alone(speaker):
    one = speaker(repetition_penalty=1.4)
    rows = [one.encode(text) for text in ("房间", "早餐差早餐差", "床")]
    assert len({len(row) for row in rows}) > 1
    assert one.answers(rows) == [one.answers([row])[0] for row in rows]
