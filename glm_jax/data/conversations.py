"""Conversations out of the records that users have: Alpaca's, ShareGPT's, OpenAI's, ADGEN's …

Which format a record has is told by its fields; what is wrong with one is a UserError that says
the file, the line and the field.
"""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from glm_jax.data import questions
from glm_jax.data.records import NO_ROWS, load_rows, nested, written
from glm_jax.errors import UserError

# A question and its answer: Alpaca, swift, ptuning of ChatGLM, ADGEN.
PAIRS = (("instruction", "output"), ("query", "response"), ("prompt", "response"),
         ("content", "summary"))
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "function_call": "assistant",
            "observation": "observation"}
OPENAI = {"user": "human", "assistant": "gpt", "tool": "observation"}  # to those of ShareGPT
MEDIA = ("images", "videos", "audios")
BUILT_IN = {"questions": questions.unseen}


class Conversation(NamedTuple):
    """One record.

    Attributes:
      messages, tools: as `data/chat.py` takes them; a message's `loss` says whether it is learned.
      where: "chats.jsonl:12", the file and the line on which the record begins.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: str

    @property
    def text(self) -> str:
        """What was asked first: records with the same belong into one split."""
        asked = (m.get("content") for m in self.messages if m.get("role") == "user")
        return str(next(asked, ""))


def load_conversations(source: str, prompt: str = "", answer: str = ""
                       ) -> dict[str, list[Conversation]]:
    """The conversations of a file, a `datasets` data set or a BUILT_IN, by split name.

    Args:
      prompt, answer: the fields of a question and its answer; what PAIRS know when empty.

    Raises:
      UserError: for bad input.
    """
    if source in BUILT_IN:
        return {"all": [conversation(row, where) for row, where in BUILT_IN[source]()]}
    found = {split: [conversation(row, where, prompt, answer) for row, where in rows]
             for split, rows in load_rows(source).items()}
    if not all(found.values()):
        raise UserError(NO_ROWS.format(source))
    return found


def conversation(row: Mapping[str, Any], where: str, prompt: str = "", answer: str = ""
                 ) -> Conversation:
    """A record as a conversation. Raises UserError when it is of no known format."""
    row = _present(row)  # columns of a table are None where a row has no such field
    if seen := next((field for field in MEDIA if row.get(field)), ""):
        raise UserError(f"{where}: {seen}: the models here read text only; leave out such records")
    tools = _list(row.get("tools") or None, "tools", where)
    if prompt or answer:
        pair = (prompt, answer)
    elif "messages" in row:
        return _checked(_list(row["messages"], "messages", where), tools, where, row)
    elif "conversations" in row:
        entries = _list(row["conversations"], "conversations", where)
        shared = any("from" in _table(entry, n, where) for n, entry in enumerate(entries, 1))
        turn = _shared if shared else _released
        return _checked([message for n, entry in enumerate(entries, 1)
                         for message in turn(_table(entry, n, where), f"{where}: message {n}")],
                        tools, where, row)
    elif "conversation" in row:  # swift
        turns = [_table(entry, n, where) for n, entry in
                 enumerate(_list(row["conversation"], "conversation", where), 1)]
        return _checked(_turns([(t.get("human"), t.get("assistant")) for t in turns],
                               "conversation", where), tools, where, row)
    else:
        pair = next((pair for pair in PAIRS if row.keys() >= set(pair)), ("", ""))
    if not row.keys() >= set(pair):
        raise UserError(
            f"{where}: no format that is known: there are the fields "
            f"{', '.join(map(repr, row)) or 'none'}; wanted are messages, conversations, "
            f"{', '.join(' and '.join(pair) for pair in PAIRS)}, or those that "
            f"--config.task.prompt=NAME and --config.task.answer=NAME name.{nested(row)}")
    asked, answered = (written(row[field], kind, field, where)
                       for kind, field in zip(("prompt", "answer"), pair, strict=True))
    if pair[0] == "instruction" and row.get("input"):
        asked += "\n" + written(row["input"], "input", "input", where)
    history = _list(row.get("history") or [], "history", where)
    return _checked([*_turns(history, "history", where), *_turns([(asked, answered)], "", where)],
                    tools, where, row)


def _checked(messages: Sequence[Any], tools: Any, where: str, row: Mapping[str, Any]
             ) -> Conversation:
    """The conversation, what a record says to the system in front. No answer may be empty."""
    found = [dict(_present(_table(message, n, where))) for n, message in enumerate(messages, 1)]
    for n, message in enumerate(found, 1):
        if "role" not in message:
            raise UserError(f"{where}: message {n} has no 'role' (it has "
                            f"{', '.join(map(repr, message)) or 'no fields'})")
    if row.get("system"):
        found.insert(0, {"role": "system",
                         "content": written(row["system"], "system", "system", where)})
    if not found or found[-1].get("role") != "assistant":
        raise UserError(f"{where}: message {len(found)}, role: the last message must be the "
                        "assistant's: there is no answer to learn")
    for n, message in enumerate(found, 1):
        said = message.get("content")
        if message.get("role") == "assistant" and not message.get("tool_calls") and not (
                isinstance(said, str) and said.strip()):
            raise UserError(f"{where}: message {n}, content: the answer is empty")
    return Conversation(found, tools, where)


def _turns(pairs: Sequence[Any], field: str, where: str) -> list[dict[str, Any]]:
    """Questions and answers as messages."""
    messages = []
    for n, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or [type(text) for text in pair] != [str, str]:
            raise UserError(f"{where}: {field}, entry {n}: a question and an answer are wanted, "
                            f"not {pair!r}")
        messages += [{"role": "user", "content": pair[0]},
                     {"role": "assistant", "content": pair[1]}]
    return messages


def _shared(entry: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A message of ShareGPT; a call becomes what GLM-4 says: the name, then the arguments."""
    role = SHAREGPT.get(str(entry.get("from")))
    if role is None:
        near = OPENAI.get(str(entry.get("from")))
        raise UserError(f"{where}, from: {entry.get('from')!r} is not one of "
                        f"{', '.join(SHAREGPT)}" + (f"; write {near!r}" if near else ""))
    message = {"role": role, "content": entry.get("value")}
    if entry["from"] == "function_call":
        try:
            call = json.loads(str(entry.get("value")))
            message |= {"metadata": call["name"], "content": json.dumps(
                call["arguments"], ensure_ascii=False)}
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{where}, value: a function_call is JSON with name and arguments"
                            ) from None
    return [message]


def _released(entry: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A message of ChatGLM3's files; a tool's entry is the call and what came of it."""
    if entry.get("role") != "tool" or "parameters" not in entry:
        return [dict(entry)]
    name, parameters, seen = (entry.get(key) for key in ("name", "parameters", "observation"))
    if not isinstance(name, str) or not isinstance(parameters, Mapping):
        raise UserError(f"{where}: of a tool a name and a table of parameters are wanted")
    call = ast.unparse(ast.Call(ast.Name("tool_call"), [], [
        ast.keyword(key, ast.Constant(value)) for key, value in parameters.items()]))
    seen = seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False)
    return [{"role": "assistant", "metadata": name, "content": f"```python\n{call}\n```",
             **{key: entry[key] for key in ("loss",) if key in entry}},
            {"role": "observation", "content": seen}]


def _present(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _table(value: Any, number: int, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: message {number}: a table is wanted, not {value!r}")
    return value


def _list(value: Any, field: str, where: str) -> Any:
    """A field that holds a list, or JSON text of one, as in tables and ShareGPT's `tools`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where}: {field}: a list is wanted, not {value[:40]!r}") from None
    if value is not None and not isinstance(value, list):
        raise UserError(f"{where}: {field}: a list is wanted, not {value!r}")
    return value
