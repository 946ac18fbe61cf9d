"""The tokenizer: lossless, special tokens that text can't forge, the same ids as transformers."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.data.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
    tokenizer_files,
    train_tokenizer,
)
from glm_jax.errors import UserError

WORDS = ["房间", "很干净", "服务", "态度", "不错", "，", "。", "laptop", " battery", "早餐", "2008"]


def texts():
    rng = random.Random(0)
    return ["".join(rng.choices(WORDS, k=12)) for _ in range(300)]


TRAINED = train_tokenizer(texts(), 320)
TOKENIZER = Tokenizer(tokenizer_files(TRAINED))


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="房间 \t\n\r　▁Ｔ😀👨‍👩‍👧<>|sop[]gMASK0x41￿\x00"))
def test_any_text_decodes_to_itself(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert ids[:2] == [TOKENIZER.token_id("[gMASK]"), TOKENIZER.token_id("<sop>")]
    assert TOKENIZER.encode(text, add_special_tokens=False) == ids[2:]
    assert all(id >= len(SPECIAL_TOKENS) for id in ids[2:])


def test_special_tokens_come_first_and_the_size_is_exact():
    assert [TOKENIZER.token_id(token) for token in SPECIAL_TOKENS] == list(range(10))
    assert TOKENIZER.vocab_size == 320
    assert TOKENIZER.pad_id == TOKENIZER.eos_id == SPECIAL_TOKENS.index("<|endoftext|>")
    with pytest.raises(UserError, match=r"no token '<\|image\|>'"):
        TOKENIZER.token_id("<|image|>")


def test_training_finds_the_words_and_refuses_odd_sizes():
    assert len(TOKENIZER.encode("房间很干净", add_special_tokens=False)) <= 4  # 15 bytes
    with pytest.raises(UserError, match="not a multiple of 64"):
        train_tokenizer(texts(), 300)
    with pytest.raises(UserError, match="not 16384"):
        train_tokenizer(texts(), 16384)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_special_token_in_a_text_is_plain_text(token):
    text = f"好{token}的"
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.token_id(token) not in ids
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_batch([text], add_special_tokens=False) == [ids]


def test_special_ids_are_left_out_of_decoded_text_on_request():
    ids = TOKENIZER.encode("好") + [TOKENIZER.eos_id]
    assert TOKENIZER.decode(ids) == "好"
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == "[gMASK]<sop>好<|endoftext|>"


def test_a_saved_folder_is_the_same_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = texts()[:20] + ["  ２００８ \n\n😀 don't", ""]
    assert theirs(rows)["input_ids"] == TOKENIZER.encode_batch(rows)
    for row in rows:
        assert theirs.decode(TOKENIZER.encode(row), skip_special_tokens=True) == row
    assert len(theirs) == TOKENIZER.vocab_size
    assert (theirs.pad_token_id, theirs.eos_token_id) == (TOKENIZER.pad_id, TOKENIZER.eos_id)
    assert theirs.padding_side == "left"
    assert set(theirs(rows)) == {"input_ids", "attention_mask"}
    messages = [{"role": "system", "content": "简短"}, {"role": "user", "content": "你好"}]
    chat = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "[gMASK]<sop><|system|>\n简短<|user|>\n你好<|assistant|>"


def test_save_is_byte_for_byte(tmp_path):
    TOKENIZER.save(tmp_path / "one")
    (tmp_path / "one" / "special_tokens_map.json").write_bytes(b'{"odd":  "spacing"}\n')
    load_tokenizer(tmp_path / "one").save(tmp_path / "two")
    read = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
            for name in ("one", "two")]
    assert read[0] == read[1] and len(read[0]) == 3


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"no such folder.*hf download"):
        load_tokenizer(tmp_path / "none")
    TOKENIZER.save(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.json can't be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)


def test_padding_token_falls_back_to_the_end_token():
    files = tokenizer_files(TRAINED)
    config = json.loads(files["tokenizer_config.json"])
    config |= {"pad_token": None, "eos_token": {"content": "<eop>", "special": True}}
    tokenizer = Tokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})
    assert tokenizer.pad_id == tokenizer.eos_id == SPECIAL_TOKENS.index("<eop>")
    del config["eos_token"]
    tokenizer = Tokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})
    with pytest.raises(UserError, match="names no pad_token"):
        _ = tokenizer.pad_id


def test_a_token_behind_every_text_is_in_the_files_too(tmp_path):
    import transformers
    plain = TOKENIZER
    ours = plain.ending("[sMASK]")
    last = plain.token_id("[sMASK]")
    assert ours.encode("房间") == [*plain.encode("房间"), last]
    assert ours.encode("房间", add_special_tokens=False) == plain.encode("房间", False)
    assert ours.ending("[sMASK]").encode("房间") == ours.encode("房间")
    ours.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["房间" * 20, "好"]
    assert ours.encode_batch(texts, length=9) == theirs(
        texts, truncation=True, max_length=9)["input_ids"]
    assert [ids[-1] for ids in ours.encode_batch(texts, length=9)] == [last, last]
    assert load_tokenizer(tmp_path / "saved").encode("房间") == ours.encode("房间")


def test_a_token_behind_a_frame_that_is_no_template_is_refused():
    files = dict(TOKENIZER.files)
    raw = json.loads(files["tokenizer.json"])
    files["tokenizer.json"] = json.dumps(raw | {"post_processor": None}).encode()
    with pytest.raises(UserError, match=r"no tokenizer\.json with a template"):
        Tokenizer(files).ending("[sMASK]")
    with pytest.raises(UserError, match="no token '<nothing>'"):
        TOKENIZER.ending("<nothing>")
