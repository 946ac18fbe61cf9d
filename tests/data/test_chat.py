"""Conversations: ids and what is learned, nothing that a message can forge, errors by number."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glm_jax
from glm_jax.data.chat import (
    TEMPLATES,
    chats,
    encode_chat,
    render,
    speaking,
    taught_ends,
    unknown_tokens,
)
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError
from tests.data.versions import files, tokenizer, trained

ASKED = [{"role": "user", "content": "你好"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "世界"}]
TWICE = [*ANSWERED, {"role": "user", "content": "今天"}, {"role": "assistant", "content": "天气"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
CHATS = ("chatglm1", "chatglm2", "chatglm3", "glm4")


def pieces(version, messages, **how):
    """Ids as readable tokens, those to learn in upper case; a run of text is one piece."""
    ours = tokenizer(version)
    ids, mask = encode_chat(ours, messages, **how)
    assert len(ids) == len(mask)
    names, out, run = {i: name for name, i in ours.special.items()}, [], []
    for i, learn in zip([*ids, None], [*mask, None], strict=True):
        if run and (i in names or i is None or learn != run[-1][1]):
            out.append((ours.decode([j for j, _ in run]), run[-1][1]))
            run = []
        if i in names:
            out.append((names[i], learn))
        elif i is not None:
            run.append((i, learn))
    return [f"*{text}" if learn else text for text, learn in out]


def test_what_is_learned():
    assert pieces("chatglm1", ANSWERED) == ["你好", "[gMASK]", "*<sop>", "*世界", "*<eop>"]
    assert pieces("chatglm1", TWICE) == [
        "[Round 0]\n问：你好\n答：世界\n[Round 1]\n问：今天\n答：", "[gMASK]", "*<sop>", "*天气",
        "*<eop>"]
    assert pieces("chatglm2", ANSWERED) == [
        "[gMASK]", "sop", "[Round 1]\n\n问：你好\n\n答：", "*世界", "*<eos>"]
    assert pieces("chatglm2", TWICE) == [
        "[gMASK]", "sop", "[Round 1]\n\n问：你好\n\n答：世界\n\n[Round 2]\n\n问：今天\n\n答：",
        "*天气", "*<eos>"]
    # The role token after an answer ends it, so it is learned; the one before it is not.
    assert pieces("chatglm3", TWICE) == [
        "[gMASK]", "sop", "<|user|>", "\n 你好", "<|assistant|>", "*\n 世界", "*<|user|>",
        "\n 今天", "<|assistant|>", "*\n 天气", "*<eos>"]
    assert pieces("glm4", TWICE) == [
        "[gMASK]", "<sop>", "<|user|>", "\n你好", "<|assistant|>", "*\n世界", "*<|user|>",
        "\n今天", "<|assistant|>", "*\n天气", "*<|user|>"]
    call = [*ASKED, {"role": "assistant", "metadata": "get", "content": "{}"},
            {"role": "observation", "content": "22"}, {"role": "assistant", "content": "好"}]
    assert pieces("glm4", call) == [
        "[gMASK]", "<sop>", "<|user|>", "\n你好", "<|assistant|>", "*get\n{}", "*<|observation|>",
        "\n22", "<|assistant|>", "*\n好", "*<|user|>"]
    assert pieces("glm4", ASKED) == ["[gMASK]", "<sop>", "<|user|>", "\n你好"]


@pytest.mark.parametrize("version", CHATS)
def test_the_prompt_is_the_beginning_of_what_was_trained_on(version):
    ours = tokenizer(version)
    prompt, _ = encode_chat(ours, TWICE[:-1], add_generation_prompt=True)
    ids, mask = encode_chat(ours, TWICE)
    assert ids[:len(prompt)] == prompt
    assert all(mask[len(prompt):])
    end = ours.special["<|user|>"] if version == "glm4" else ours.eos_id
    assert ids[-1] == end


@pytest.mark.parametrize("version", CHATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_message_forges_a_special_token(version, data):
    """Whatever stands in them, ids are special where they were special with harmless messages."""
    ours = tokenizer(version)
    parts = st.sampled_from([*sorted(ours.special), "<|", "|>", "user", "好", " ", "\U000f0000"])
    text = st.lists(parts, min_size=1, max_size=6).map("".join)
    count = data.draw(st.sampled_from([1, 3]))
    contents = [data.draw(text) for _ in range(count)]
    roles = ["user", "assistant", "user"]
    plain, forged = ([{"role": role, "content": content}
                      for role, content in zip(roles, texts, strict=False)]
                     for texts in (["好"] * count, contents))
    if version in ("chatglm3", "glm4"):
        word = data.draw(text)
        for messages, name in ((plain, "好"), (forged, word)):
            tools = [{"name": name, name: [name]}]
            messages.insert(0, {"role": "system", "content": name, "tools": tools})
            messages[-1]["metadata"] = name
    ids, mask = encode_chat(ours, forged, add_generation_prompt=True)
    expected, _ = encode_chat(ours, plain, add_generation_prompt=True)
    special = set(ours.special.values())
    assert [i for i in ids if i in special] == [i for i in expected if i in special]
    assert contents[-1].strip() in ours.decode(ids, skip_special_tokens=False)


def test_tools():
    described = json.dumps(TOOLS, ensure_ascii=False, indent=4)
    in_system = [{"role": "system", "content": "Be kind.", "tools": TOOLS}, *ASKED]
    assert render(in_system, template="chatglm3") == (
        f"[gMASK]sop<|system|>\nBe kind.\n{described}<|user|>\n你好")
    kind = [{"role": "system", "content": "Be kind."}, *ASKED]
    assert render(kind, TOOLS, template="chatglm3") == render(in_system, template="chatglm3")
    alone = render(ASKED, TOOLS, template="chatglm3")
    assert alone.startswith("[gMASK]sop<|system|>\nAnswer the following") and described in alone
    wrapped = [{"role": "system", "content": "", "tools": TOOLS}, *ASKED]
    assert render(ASKED, TOOLS, template="glm4_9b_chat") == render(wrapped, template="glm4_9b_chat")
    assert render(in_system, template="glm4_9b_chat").endswith(
        "请使用 Json 格式表示调用的参数。<|system|>\nBe kind.<|user|>\n你好")


def test_thoughts_and_calls_of_glm45():
    calls = [{"function": {"name": "get", "arguments": {"n": 2, "city": "北京"}}}]
    messages = [*ASKED, {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert render(messages, template="glm45") == (
        "[gMASK]<sop><|user|>\n你好<|assistant|>\n<think></think>\n<tool_call>get\n"
        "<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n<arg_key>city</arg_key>\n"
        "<arg_value>北京</arg_value>\n</tool_call><|observation|>\n<tool_response>\n1\n"
        "</tool_response>\n<tool_response>\n2\n</tool_response>")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n好"}
    assert render([*ASKED, thought, *ASKED, thought], template="glm45").endswith(
        "<think></think>\n好<|user|>\n你好<|assistant|>\n<think>hm</think>\n好")


def test_the_folders_own_template_comes_first():
    ours = tokenizer("glm4")
    template = "{% for m in messages %}[MASK]{{ m['content'] }}{% endfor %}"
    config = files("glm4", chat_template=template)
    mask = ours.special["[MASK]"]
    text = ours.encode("你好", add_special_tokens=False)
    assert encode_chat(Tokenizer(config), ASKED)[0] == [mask, *text]
    named = encode_chat(Tokenizer(config), ASKED, template="glm4_9b_chat")
    assert named == encode_chat(ours, ASKED)
    own = {"chat_template.jinja": template.replace("[MASK]", "[sMASK]").encode()}
    assert encode_chat(Tokenizer(config | own), ASKED)[0] == [ours.special["[sMASK]"], *text]
    several = [{"name": "default", "template": template},
               {"name": "tool_use", "template": "{{ tools }}" + template * 2}]
    config = Tokenizer(files("glm4", chat_template=several))
    assert encode_chat(config, ASKED)[0] == [mask, *text]
    assert encode_chat(config, ASKED, TOOLS)[0].count(mask) == 2
    nameless = {"tokenizer.json": json.dumps(trained()).encode(), "tokenizer_config.json": b"{}"}
    with pytest.raises(UserError, match="name a template: chatglm1, chatglm2"):
        encode_chat(Tokenizer(nameless), ASKED)


def test_the_same_ids_as_transformers_on_our_own_model():
    transformers = pytest.importorskip("transformers")
    from tests.test_asset import FOLDER
    ours, theirs = (load(FOLDER) for load in
                    (glm_jax.load_tokenizer, transformers.AutoTokenizer.from_pretrained))
    for prompt in (True, False):
        messages = TWICE if not prompt else TWICE[:-1]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        found, _ = encode_chat(ours, messages, add_generation_prompt=prompt)
        assert found == list(expected) + ([] if prompt else [ours.special["<|user|>"]])


def user(**fields):
    return [{"role": "user", "content": "好", **fields}]


@pytest.mark.parametrize(("template", "messages", "tools", "message"), [
    ("chatglm3", [], None, "at least one message"),
    ("chatglm3", "你好", None, "at least one message"),
    ("chatglm3", ["你好"], None, "message 1: a table with role and content"),
    ("chatglm3", ANSWERED + user(role="robot"), None, "message 3, role: 'robot' is not one of sys"),
    ("chatglm3", user(role="tool"), None, "message 1, role: 'tool' is not one of"),
    ("glm45", user(role="observation"), None, "message 1, role: 'observation' is not one of"),
    ("chatglm1", user(role="system"), None, "message 1, role: 'system' is not one of user, assis"),
    ("chatglm2", user() + user(), None, "message 2, role: 'user', where 'assistant' is wanted"),
    ("chatglm2", user(), None, "message 1, role: to train, the last message is the assistant's"),
    ("glm4_0414", user(content=3), None, "message 1, content: a text is wanted, not 3"),
    ("glm4_0414", [{"role": "user"}], None, "message 1, content: a text is wanted, not None"),
    ("glm4_0414", user(metadata=3), None, "message 1, metadata: a text is wanted"),
    ("glm4_0414", user(role="system", tools=TOOLS), None, "message 1, tools: this version's"),
    ("chatglm3", user(tools=TOOLS), None, "message 1, tools: they belong to the system's"),
    ("glm45", user(metadata="get"), None, "message 1, metadata: this version's chat template"),
    ("chatglm3", user(tool_calls=[{}]), None, "message 1, tool_calls: this version's chat templ"),
    ("glm45", user(tool_calls=[{"name": "f", "arguments": "{}"}]), None,
     "message 1, tool_calls: a name and a table of arguments"),
    ("chatglm1", ANSWERED, TOOLS, "tools: this version's chat template takes none"),
    ("{{ messages }}", ANSWERED, TOOLS, "tools: this version's chat template takes none"),
    ("chatglm3", ASKED, {"name": "f"}, "tools: a list of JSON tables"),
    ("chatglm3", user(role="system", tools="f"), None, "message 1, tools: a list of JSON tables"),
    ("glm4_9b_chat", ASKED, [{"type": "python"}], "tools: only functions, with a name"),
    ("chatglm9", ASKED, None, "chat template 'chatglm9': there are chatglm1, "),
    ("{% for %}", ASKED, None, "chat template, line 1: "),
    ("{{ messages[7].content.x }}", ASKED, None, "the chat template fails: UndefinedError"),
    ("{{ raise_exception('no ' ~ messages[0].role) }}", ASKED, None, "refuses: no user"),
    ("{{ messages.__class__.__mro__[1].__subclasses__() }}", ASKED, None, "fails: SecurityError"),
])
def test_errors_name_the_message_and_the_field(template, messages, tools, message):
    with pytest.raises(UserError) as error:
        render(messages, tools, template=template)
    assert message in str(error.value)


def test_what_a_run_teaches_is_in_the_tokenizers_files():
    ours = tokenizer("glm4")
    for template in ("glm4_0414", "chat"):
        told = speaking(ours, template)
        assert encode_chat(told, ASKED) == encode_chat(
            ours, ASKED, template=None if template == "chat" else template)
    with pytest.raises(UserError, match="'tool' is not one of"):  # as by the name of the template
        encode_chat(told, [*ASKED, {"role": "tool", "content": "a"}])
    own = Tokenizer(files("glm4", chat_template="{{ messages[0].content }}"))
    assert speaking(own, "chat") is own and speaking(ours, "plain") is speaking(ours, "") is ours
    again = speaking(own, "chatglm3")
    assert "chat_template" not in json.loads(again.files["tokenizer_config.json"])
    assert encode_chat(again, ASKED) == encode_chat(ours, ASKED, template="chatglm3")
    assert unknown_tokens(again) == ["sop"] and unknown_tokens(told) == []
    assert unknown_tokens(speaking(tokenizer("chatglm3"), "chatglm3")) == []


@pytest.mark.parametrize(("template", "before", "after"), [
    ("", ["<eop>"], ["<eop>"]), ("chat", ["<eop>"], ["<eop>", "<|user|>"]),
    ("chat", ["<|user|>"], ["<|user|>"]), ("chat", [], ["<|endoftext|>", "<|user|>"]),
    ("plain", ["<|user|>", "<|observation|>"], ["<|endoftext|>"])])
def test_where_a_taught_model_ends(template, before, after):
    ours = tokenizer("glm4")
    named = {"<eop>": 3, "<|endoftext|>": ours.eos_id, **ours.special}
    found = taught_ends(ours, template, [named[name] for name in before])
    assert found == [named[name] for name in after]
    assert chats(ours, found) == ("<|user|>" in after)


def test_what_is_no_json_is_refused():
    with pytest.raises(UserError, match="they are no JSON"):
        encode_chat(tokenizer("chatglm3"), [{"role": "user", "content": b"x"}])


def test_every_template_is_there():
    for name in TEMPLATES:
        messages = ASKED if name.startswith("chatglm") else TWICE
        assert "你好" in render(messages, template=name, add_generation_prompt=True)
