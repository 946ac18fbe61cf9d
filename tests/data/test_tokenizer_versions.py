"""The released versions' tokenizers: frames, special ids, nothing that a text can forge."""

import base64
import itertools
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.data.bpe import GLM4_WORDS
from glm_jax.data.tokenizer import Tokenizer, check_belongs, load_tokenizer, vocabulary_file
from glm_jax.errors import UserError
from tests.data.versions import TEXTS, VERSIONS, files, ranks_file, sentencepiece_file, tokenizer

SPECIAL = sorted({name for version in VERSIONS for name in tokenizer(version).special})
PIECES = st.sampled_from([*SPECIAL, "<", "|", "user", "[g", "MASK]", "sop", "你好", " ", "a", "\n"])
FORGERIES = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=100, deadline=None)
@given(text=FORGERIES | st.text(alphabet="你好世界 \t\n😀ü<>|[]gMASKsop\x00"))
def test_no_text_makes_a_special_token_and_none_is_lost(version, text):
    ours = tokenizer(version)
    ids = ours.encode(text, add_special_tokens=False)
    assert not set(ids) & set(ours.special.values())
    assert max(ids, default=0) < ours.vocab_size
    assert ours.decode(ids) == text


@pytest.mark.parametrize("version", VERSIONS)
def test_special_tokens_are_found_in_a_text_that_is_trusted(version):
    ours = tokenizer(version)
    ids = ours.encode("你好[MASK]世界", parse_special=True)
    assert ids.count(ours.special["[MASK]"]) == 1
    assert ours.encode("你好[MASK]世界", False, parse_special=True) == [
        i for i in ids if i == ours.special["[MASK]"] or i not in ours.special.values()]
    assert ours.special["[MASK]"] not in ours.encode("你好[MASK]世界")


@pytest.mark.parametrize(("version", "before", "after", "end"), [
    ("chatglm1", "", "[gMASK] <sop>", "<eop>"), ("chatglm2", "[gMASK] sop", "", "<eos>"),
    ("chatglm3", "[gMASK] sop", "", "<eos>"), ("glm4", "[gMASK] <sop>", "", "<|endoftext|>"),
    ("glm2021", "[CLS]", "<|endoftext|>", None)])
def test_frames(version, before, after, end):
    ours = tokenizer(version)

    def ids(names):
        return [ours.token_id(name) for name in names.split()]

    a, b = (ours.encode(text, add_special_tokens=False) for text in ("你好", "Hello"))
    assert ours.encode("你好") == ids(before) + a + ids(after)
    assert ours.encode_batch(["你好", "Hello"])[1] == ids(before) + b + ids(after)
    assert ours.decode(ours.encode("你好")) == "你好"
    if end is None:
        with pytest.raises(UserError, match="no pairs"):
            ours.encode("你好", pair="Hello")
    else:
        assert ours.encode("你好", pair="Hello") == ids(before) + a + ids(after) + b + ids(end)


def test_special_tokens_follow_the_pieces():
    first = tokenizer("chatglm2").special["[MASK]"]
    names = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>"
    for i, name in enumerate(names.split()):
        assert tokenizer("chatglm3").token_id(name) == first + i
    assert tokenizer("chatglm2").vocab_size == first + 5
    assert "<|user|>" not in tokenizer("chatglm2").special
    assert (tokenizer("chatglm3").eos_id, tokenizer("chatglm3").pad_id) == (2, 0)
    assert tokenizer("chatglm1").eos_id == tokenizer("chatglm1").token_id("<eop>")
    assert tokenizer("chatglm1").pad_id == 3
    assert tokenizer("glm4").eos_id == tokenizer("glm4").pad_id == len(ranks_file().split()) // 2
    with pytest.raises(UserError, match="no token '<sop>'"):
        tokenizer("chatglm2").token_id("<sop>")


@pytest.mark.parametrize("config", [{"num_image_tokens": 20000}, {}])
def test_the_first_vocabulary_of_chatglm_has_image_tokens_first(config):
    both = files("chatglm1")
    old = Tokenizer(both | {"tokenizer_config.json": json.dumps(config).encode()})
    new = tokenizer("chatglm1")
    text = "你好  world\n\t"
    assert old.encode(text) == [20000 + i for i in new.encode(text)]
    assert old.decode([7, *old.encode(text)]) == text
    assert old.vocab_size == 20000 + new.vocab_size
    assert old.pad_id == 20003


def test_blanks_of_chatglm_are_pieces():
    ours = tokenizer("chatglm1")
    ids = ours.encode("a" + " " * 100 + "b", add_special_tokens=False)
    assert {ours.token_id("<|blank_80|>"), ours.token_id("<|blank_20|>")} <= set(ids)
    assert ours.decode(ids) == "a" + " " * 100 + "b"


def test_ids_that_stand_for_nothing_decode_to_nothing():
    for version in ("chatglm1", "chatglm3"):
        ours = tokenizer(version)
        assert ours.decode([*ours.encode("你好"), ours.vocab_size + 9]) == "你好"


def by_ranks(text, content):
    """tiktoken's algorithm: of all neighbours, the first of the lowest rank are merged."""
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1])
             for line in content.splitlines()}
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(GLM4_WORDS), "isolated")
    ids = []
    for word, _ in split.pre_tokenize_str(text):
        if word.encode() in ranks:
            ids.append(ranks[word.encode()])
            continue
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in
                        enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="你好世界天气 thepolsaid get_wr\n'123") | st.text())
def test_the_same_ids_as_tiktoken(text):
    assert tokenizer("glm4").encode(text, add_special_tokens=False) == by_ranks(text, ranks_file())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=16),
       st.text(alphabet="abcd", max_size=12))
def test_the_same_ids_as_tiktoken_with_any_ranks(pairs, text):
    tokens = [bytes([b]) for b in b"abcd"]
    for i, j in pairs:
        tokens.append(tokens[i % len(tokens)] + tokens[j % len(tokens)])
    tokens = list(dict.fromkeys(tokens + [bytes([b]) for b in range(256)]))
    content = b"\n".join(base64.b64encode(t) + b" %d" % i for i, t in enumerate(tokens))
    ours = Tokenizer({"tokenizer.model": content})
    assert ours.encode(text, add_special_tokens=False) == by_ranks(text, content)


def test_where_glm4_cuts_a_text():
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(GLM4_WORDS), "isolated")
    words = [word for word, _ in split.pre_tokenize_str("I'Ve 12345  你好,\n\n  a+= b \n")]
    assert words == ["I", "'Ve", " ", "123", "45", " ", " 你好", ",\n\n", " ", " a", "+=", " b",
                     " \n"]


def test_chatglm2_and_3_are_told_apart():
    config = {"tokenizer_class": "ChatGLMTokenizer"}
    model = {"tokenizer.model": sentencepiece_file()}
    for fields, version in (({"name_or_path": "THUDM/codegeex2-6b"}, "chatglm2"),
                            ({"name_or_path": "x/ChatGLM3-6B-32k"}, "chatglm3"),
                            ({"chat_template": "[gMASK]sop<|user|>"}, "chatglm3")):
        text = json.dumps(config | fields).encode()
        assert Tokenizer(model | {"tokenizer_config.json": text}).version == version
    with pytest.raises(UserError, match=r"may be ChatGLM2's or ChatGLM3's: set name_or_path"):
        Tokenizer(model | {"tokenizer_config.json": json.dumps(config).encode()})


@pytest.mark.parametrize(("changed", "message"), [
    ({"tokenizer.model": b"\x0a\xff\xff"}, "tokenizer.model: not a sentencepiece file"),
    ({"tokenizer.model": b""}, "tokenizer.model: it has no piece '<unk>'"),
    ({"tokenizer.model": b"AA== 0\nAQ=="}, "line 2: not a base64 token"),
    ({"tokenizer.model": b"AA== 0\n?? 1"}, "line 2: not a base64 token"),
    ({"tokenizer.model": b"AA== 0\nAQ== 2"}, "ranks are not 0 to 1"),
    ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json must be a table"),
    ({"ice_text.model": sentencepiece_file()}, "no piece '<pad>', so it is not the file of chatg"),
])
def test_files_that_are_damaged_or_of_another_version(changed, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(files("chatglm3") | changed)


def test_ranks_and_special_tokens_that_do_not_belong_together():
    count = len(ranks_file().splitlines())
    names = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>"]
    right = {str(count + i): {"content": name} for i, name in enumerate(names)}
    assert Tokenizer(files("glm4", added_tokens_decoder=right)).special == {
        name: count + i for i, name in enumerate(names)}
    wrong = {str(count + 1 + i): {"content": name} for i, name in enumerate(names)}
    with pytest.raises(UserError, match=rf"has {count} ranks, but .* begin at {count + 1} \(<"):
        Tokenizer(files("glm4", added_tokens_decoder=wrong))
    with pytest.raises(UserError, match="names no special token <sop>"):
        Tokenizer(files("glm4", added_tokens_decoder={str(count): {"content": "[gMASK]"}}))


def test_a_folder_is_saved_as_it_was_read(tmp_path):
    for version in VERSIONS:
        ours = tokenizer(version)
        ours.save(tmp_path / version)
        again = load_tokenizer(tmp_path / version)
        assert again.files == ours.files and again.version == version
        assert vocabulary_file(tmp_path / version).name in ours.files
    assert vocabulary_file(tmp_path) is None


def test_bert():
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##o", "[", "]", "sep"]
    bert = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    bert.normalizer = tokenizers.normalizers.BertNormalizer()
    bert.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    bert.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.add_special_tokens(names[:5])
    ours = Tokenizer({"tokenizer.json": bert.to_str().encode(), "tokenizer_config.json": b"{}"})
    assert ours.encode("Hello [SEP]") == [2, 5, 7, 9, 8, 3]
    assert ours.encode("hello", pair="hello") == [2, 5, 3, 5, 3]
    assert (ours.pad_id, ours.eos_id) == (0, 3)
    check_belongs(ours, {"vocab_size": 10, "pad_token_id": 0})


@pytest.mark.parametrize(("fields", "message"), [
    ({}, None), ({"eos_token_id": [9, 2]}, None), ({"pad_token_id": None}, None),
    ({"pad_token_id": 151329}, None),  # outside the vocabulary: a class's default
    ({"vocab_size": 100}, "the tokenizer has 339 tokens, the model only 100"),
    ({"eos_token_id": 5}, r"eos_token_id: 2 in the tokenizer \(chatglm3\), 5 in the model's"),
    ({"eos_token_id": [5, 6]}, r"eos_token_id: 2 in the tokenizer \(chatglm3\), \[5, 6\] in"),
    ({"pad_token_id": 3}, r"pad_token_id: 0 in the tokenizer \(chatglm3\), 3 in the model's"),
    ({"gmask_token_id": 3}, "gmask_token_id: 331 in the tokenizer"),
    ({"mask_token_id": 3}, "mask_token_id: 330 in the tokenizer"),
])
def test_a_tokenizer_of_other_weights_is_refused(fields, message):
    config = {"vocab_size": 512, "eos_token_id": 2, "pad_token_id": 0, **fields}
    if message is None:
        check_belongs(tokenizer("chatglm3"), config)
    else:
        with pytest.raises(UserError, match=message):
            check_belongs(tokenizer("chatglm3"), config)


def test_the_released_file_of_glm_2021():
    folder = Path(__file__).resolve().parents[3] / "shared/tokenizers"
    if not (folder / "cog-pretrain.model").is_file():
        pytest.skip("shared/tokenizers is not here")
    ours = load_tokenizer(folder)
    assert ours.version == "glm2021" and ours.vocab_size == 50010
    assert ours.special == {
        "<|endoftext|>": 50000, "[SEP]": 50001, "[CLS]": 50002, "[MASK]": 50003, "[UNK]": 50004,
        "<|startofpiece|>": 50006, "<|endofpiece|>": 50007, "[sMASK]": 50008, "[gMASK]": 50009}
    ids = ours.encode("凯旋门位于[gMASK]。", parse_special=True)
    assert ids[0] == 50002 and ids[-1] == ours.eos_id == ours.pad_id == 50000
    assert ids.count(50009) == 1 and len(ids) <= 12
    assert 50009 not in ours.encode("凯旋门位于[gMASK]。")
    assert ours.decode(ours.encode("清华大学位于北京")) == "清华大学位于北京"


# --- BERT's vocab.txt --------------------------------------------------------------------------

WORDPIECES = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "房", "间", "干", "净", "很", "##间", "the",
    "hello", "Hello", "##lo", "hel", "##s", "room", "cafe", "café", "##é", "Zoë", "zo", "##e",
    "ü", "u", "b", "##ber", "ber", "naïve", "i", "İ", "is", "##tan", "ß", "s", "1", "##2", "2",
    ",", "，", "!", "。", "-", "'", "e", "\u0301", "ﬁ", "x", "가", "<mask>",
]
ODD = [
    "房间很干净，hello!", "Hello HELLO hellos 房hello间", "café CAFÉ cafe\u0301 naïve Zoë über",
    "İstanbul ß ﬁ", "a\tb\nc\u00a0d\u3000e", "12,2-1 '1'", "", " ", "\u0000\ufffdroom\u200d x",
    "한국 가", "x" * 101, "[MASK] [CLS] [mask]", "😀 \U00020000房",
]


@pytest.mark.parametrize("config", [
    {}, {"do_lower_case": False}, {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False}, {"tokenize_chinese_chars": False},
    {"mask_token": {"content": "<mask>", "__type": "AddedToken"}}])
def test_a_vocab_txt_encodes_as_transformers(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDPIECES) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", **config}))
    theirs, ours = transformers.BertTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert vocabulary_file(tmp_path) == tmp_path / "vocab.txt" and ours.version == "bert"
    seen = set()
    for text in ODD:
        ids = theirs(text)["input_ids"]
        seen.update(ids)
        assert ours.encode(text, parse_special=True) == ids, text
        if text and "[" not in text:
            assert ours.encode(text) == ids
            assert ours.encode("房", pair=text) == theirs("房", text)["input_ids"]
        assert not set(ours.encode(text)[1:-1]) & {0, 2, 3, ours.mask_id}
    assert len(seen) > 20
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (3, 0, len(theirs))
    assert ours.mask_id == theirs.mask_token_id
    assert ours.decode(ours.encode("hellos")) == "hellos"


@pytest.mark.parametrize(("content", "message"), [
    (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"vocab\.txt has no line \[MASK\]"),
    (b"[PAD]\n\xff\n", r"vocab\.txt is not UTF-8")])
def test_a_bad_vocab_txt(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("version", ["chatglm2", "chatglm3", "glm4"])
def test_tokenizer_json_made_of_a_released_file_encodes_the_same(version, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer(version)
    made = ours.files | ours.fast_files()
    for name, content in made.items():
        if name != "tokenizer.model":
            (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    alone = load_tokenizer(tmp_path)
    assert alone.version == "json"
    # Where ChatGLM's released file lies beside it, that one is gone by.
    assert Tokenizer(made).version == ("json" if version == "glm4" else version)
    for text in [*TEXTS, "", " ", "  a  b", "🙂\n\ttab", "▁x ▁", "sop and eop", "<0x41>"]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == alone.encode(text) == ids, text
        assert alone.decode(ids) == ours.decode(ids), text
    assert alone.encode("[gMASK] <|user|>") == tokenizer(version).encode("[gMASK] <|user|>")
    assert (alone.eos_id, alone.pad_id) == (ours.eos_id, ours.pad_id)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    assert alone.vocab_size == ours.vocab_size


def test_versions_that_tokenizers_would_encode_otherwise_have_none():
    assert tokenizer("chatglm1").fast_files() == tokenizer("glm2021").fast_files() == {}
