"""Records of every format as conversations; what is wrong is said by file, line and field."""

import json

import pytest

from glm_jax.data.conversations import conversation, load_conversations
from glm_jax.errors import UserError

Q, A = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
BEFORE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(("row", "messages"), [
    ({"instruction": "问", "input": "", "output": "答"}, [Q, A]),
    ({"instruction": "问", "input": "x", "output": "答", "system": "s", "history": [["a", "b"]]},
     [SYSTEM, *BEFORE, {"role": "user", "content": "问\nx"}, A]),
    ({"query": "问", "response": "答", "history": [["a", "b"]]}, [*BEFORE, Q, A]),
    ({"prompt": "问", "response": "答", "history": []}, [Q, A]),
    ({"content": "问", "summary": "答", "messages": None}, [Q, A]),
    ({"messages": [Q, {**A, "loss": False}, Q, A], "images": [], "videos": None},
     [Q, {**A, "loss": False}, Q, A]),
    ({"conversations": [SYSTEM, Q, A]}, [SYSTEM, Q, A]),
    ({"conversation": [{"human": "a", "assistant": "b"}, {"human": "问", "assistant": "答"}],
      "system": "s"}, [SYSTEM, *BEFORE, Q, A]),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "function_call", "value":
        '{"name": "get", "arguments": {"n": 1}}'}, {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "答"}]},
     [Q, {"role": "assistant", "metadata": "get", "content": '{"n": 1}'},
      {"role": "observation", "content": "1"}, A]),
    ({"conversations": [Q, {"role": "tool", "name": "get", "parameters": {"n": "x"},
                            "observation": {"t": 2}}, A]},
     [Q, {"role": "assistant", "metadata": "get",
          "content": "```python\ntool_call(n='x')\n```"},
      {"role": "observation", "content": '{"t": 2}'}, A]),
])
def test_every_format(row, messages):
    assert conversation(row, "x:1").messages == messages
    assert conversation(row, "x:1").text == next(m["content"] for m in messages
                                                 if m["role"] == "user")


@pytest.mark.parametrize(("row", "message"), [
    ({"text": "a"}, "x:1: no format that is known: there are the fields 'text'"),
    ({"data": [{"prompt": "a"}]}, "name. If 'data' holds the records: wanted is one object a line"),
    ({"prompt": "a", "response": " "}, "x:1: the answer (field 'response') is empty"),
    ({"messages": [Q]}, "message 1, role: the last message must be the assistant's"),
    ({"messages": []}, "the last message must be"),
    ({"messages": "你好"}, "messages: a list is wanted"),
    ({"messages": [Q, "a"]}, "message 2: a table is wanted"),
    ({"messages": [Q, {"role": "assistant", "content": ""}]}, "message 2, content: the answer is"),
    ({"conversations": [{"from": "robot", "value": "a"}]}, "message 1, from: 'robot' is not one"),
    ({"conversations": [{"from": "user", "value": "a"}]}, "observation; write 'human'"),
    ({"messages": [Q, {"from": "gpt", "value": "b"}], "system": "s"},
     "message 2 has no 'role' (it has 'from', 'value')"),
    ({"messages": [Q, A], "images": ["a.png"]}, "images: the models here read text only"),
    ({"conversations": [{"from": "function_call", "value": "a"}]}, "message 1, value: a function"),
    ({"query": "a", "response": "b", "history": [["a"]]}, "history, entry 1: a question and an"),
])
def test_what_is_refused(row, message):
    with pytest.raises(UserError) as error:
        conversation(row, "x:1")
    assert message in str(error.value) and str(error.value).startswith("x:1: ")


def test_an_array_of_alpaca_says_on_which_line_a_record_begins(tmp_path):
    path = tmp_path / "a.json"
    rows = [{"instruction": "问", "output": "答"}, {"instruction": "]", "output": "[,"}]
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    found = load_conversations(str(path))["all"]
    assert [one.where for one in found] == [f"{path}:2", f"{path}:6"]
    assert found[1].messages[0]["content"] == "]"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(UserError, match=r"a\.json:\d+: broken JSON"):
        load_conversations(str(path))


def test_fields_of_ones_own(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("title,body\n答,问\n")
    assert load_conversations(str(path), "body", "title")["all"][0].messages == [Q, A]
