"""Conversations as token ids, for training and inference alike, by the template of each version.

A message is a table: `role`, `content`, and where the version has them `metadata` (the name of the
tool that an assistant calls), `tools` (of a system message), `tool_calls`, `reasoning_content`.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox

from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError

Message = Mapping[str, Any]


class Rules(NamedTuple):
    """What a template of ours takes; one of a model's folder is asked by what it mentions.

    Attributes:
      roles, fields: that messages may have, the latter besides role and content.
      tools: whether it takes tools; `turns`: whether user and assistant must alternate.
    """

    roles: tuple[str, ...]
    fields: tuple[str, ...] = ()
    tools: bool = True
    turns: bool = False


ROLES = ("system", "user", "assistant", "observation", "tool")
FIELDS = ("metadata", "tools", "tool_calls", "reasoning_content")
_ROUNDS = Rules(("user", "assistant"), tools=False, turns=True)
TEMPLATES = {  # templates/NAME.jinja
    "chatglm1": _ROUNDS, "chatglm2": _ROUNDS,
    "chatglm3": Rules(ROLES[:4], ("metadata", "tools")),
    "glm4_9b_chat": Rules(ROLES[:4], ("metadata", "tools")),
    "glm4_0414": Rules(ROLES[:4], ("metadata",)),
    "z1": Rules(ROLES[:4], ("metadata",)),
    "glm45": Rules(("system", "user", "assistant", "tool"), ("tool_calls", "reasoning_content")),
}
_DEFAULTS = {"chatglm1": "chatglm1", "chatglm2": "chatglm2", "chatglm3": "chatglm3",
             "glm4": "glm4_9b_chat"}  # by Tokenizer.version
_THOUGHT = ("<think>", "</think>")  # an assistant's text may hold them: templates look for them
_SPECIAL = r"\[gMASK\]|<sop>|(?<=\])sop|<\|\w+\|>"
_ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def render(messages: Sequence[Message], tools: Sequence[Any] | None = None, *, template: str,
           add_generation_prompt: bool = False, **variables: Any) -> str:
    """A conversation as text.

    Args:
      tools: what the assistant may call, as JSON tables.
      template: a name of TEMPLATES, or Jinja text.
      add_generation_prompt: end where the assistant's answer begins.
      variables: further ones of the template, such as `enable_thinking`.

    Raises:
      UserError: for a message that the template has no place for, by number and field, or a
        template that is unknown or fails.
    """
    rules, source = _rules(template)
    checked = _check(messages, tools, rules, add_generation_prompt)
    try:
        return _compiled(source).render(messages=checked, tools=tools or None,
                                        add_generation_prompt=add_generation_prompt, **variables)
    except UserError:
        raise
    except Exception as error:  # whatever a template of a folder stumbles over
        raise UserError(f"the chat template fails: {type(error).__name__}: {error}") from None


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message],
                tools: Sequence[Any] | None = None, *, template: str | None = None,
                add_generation_prompt: bool = False, **variables: Any
                ) -> tuple[list[int], list[bool]]:
    """A conversation as token ids, and which of them are to be learned.

    To learn is what follows `<|assistant|>` up to and with the next role token or the end, which
    tells that the answer is over; of ChatGLM-6B and ChatGLM2 only the last answer is. Special
    tokens come from the template alone, never from what stands in messages, tools or variables.

    Args:
      template: as in `render`; by default that of the tokenizer's folder, else its version's.
      add_generation_prompt: True to generate; False to train, with the answer's end token.

    Returns:
      Two lists of one length: ids, and True where an id is a target.

    Raises:
      UserError: as `render`, and where no template is known.
    """
    source = template or template_of(tokenizer, bool(tools))
    # Private-use characters that the input does not have mark borders, and break up what looks
    # like a special token; they are taken out again before anything is tokenised.
    text = _dump([messages, tools, variables])
    unused = (c for c in map(chr, range(0xF0000, 0xF1000)) if c not in text)
    guard, cut, learn = itertools.islice(unused, 3)
    special = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True)))
    special = special or "(?!)"  # matches nothing

    def guarded(value: Any, own: tuple[str, ...] = ()) -> Any:
        if isinstance(value, str):
            return re.sub(special, lambda found: found[0] if found[0] in own else
                          found[0][0] + guard + found[0][1:], value)
        if isinstance(value, Mapping):
            own = _THOUGHT if value.get("role") == "assistant" else own
            return {guarded(key, own): guarded(item, own) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [guarded(item, own) for item in value]
        return value

    rendered = render(guarded(messages), guarded(tools), template=source, cut=cut,
                      learn=learn, add_generation_prompt=add_generation_prompt,
                      **guarded(variables))
    ids: list[int] = []
    mask: list[bool] = []
    learning = False
    for part in re.split(f"({special}|{cut}|{learn})", rendered):
        if part == learn:
            learning = True
        elif part in tokenizer.special:
            ids.append(tokenizer.special[part])
            mask.append(learning)
            if part in _ROLE_TOKENS:
                learning = part == "<|assistant|>"
        elif part != cut:
            found = tokenizer.encode(part.replace(guard, ""), add_special_tokens=False)
            ids += found
            mask += [learning] * len(found)
    if learning and not add_generation_prompt:
        ids.append(_end_id(tokenizer))
        mask.append(True)
    return ids, mask


def chats(tokenizer: Tokenizer, ends: Sequence[int]) -> bool:
    """Whether a model was trained to: ChatGLM, or one whose files end a text at `<|user|>`.

    Args:
      ends: the ids at which they do.
    """
    return (tokenizer.version in ("chatglm1", "chatglm2", "chatglm3")
            or tokenizer.special.get("<|user|>") in ends)


def speaking(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with the template that a run names in its files: what it learns to answer in.

    The same for `plain`, or none, or where the files have the `chat` template that is asked for.

    Raises:
      UserError: for a template that is unknown.
    """
    if template in ("", "plain"):
        return tokenizer
    found = template_of(tokenizer, False) if template == "chat" else template
    source = _rules(found)[1]
    if found == template_of(tokenizer, False) and found not in TEMPLATES:
        return tokenizer
    config = {name: value for name, value in tokenizer.config.items() if name != "chat_template"}
    files = {"chat_template.jinja": source.encode()}
    if config != tokenizer.config:  # one place for it: the file goes first, and has no others
        files["tokenizer_config.json"] = (
            json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
    return Tokenizer(tokenizer.files | files, tokenizer.where)


def unknown_tokens(tokenizer: Tokenizer) -> list[str]:
    """The special tokens that the tokenizer's template writes and its vocabulary does not have."""
    source = _rules(template_of(tokenizer, False))[1]
    return sorted(set(re.findall(_SPECIAL, source)) - set(tokenizer.special))


def taught_ends(tokenizer: Tokenizer, template: str, ends: Sequence[int]) -> list[int]:
    """Where answers end of a model that a run teaches to give them in its template.

    So that `chats` says of it what it has learned; but a ChatGLM always chats.

    Args:
      ends: the ids at which they ended before.
    """
    if not template:
        return list(ends)
    plain = template == "plain"
    roles = {tokenizer.special.get(name) for name in _ROLE_TOKENS} if plain else set()
    kept = [number for number in ends if number not in roles] or [tokenizer.eos_id]
    end = _plain_end(tokenizer) if plain else _end_id(tokenizer)
    return kept if end in kept else [*kept, end]


def completion(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text to go on with, in the frame of its version.

    GLM (2021) fills a blank instead: the mask token that the text has, or one put behind it.
    """
    if tokenizer.version != "glm2021":
        return tokenizer.encode(text)
    blanks = {tokenizer.token_id(name) for name in ("[MASK]", "[gMASK]", "[sMASK]")}
    ids = tokenizer.encode(text, parse_special=True)
    if not blanks.intersection(ids):
        ids = tokenizer.encode(text + "[gMASK]", parse_special=True)
    return [*ids, tokenizer.token_id("<|startofpiece|>")]


def encode_answers(tokenizer: Tokenizer, messages: Sequence[Message],
                   tools: Sequence[Any] | None = None, template: str | None = None
                   ) -> list[tuple[list[int], list[bool]]]:
    """A conversation as rows that teach its answers: ids, and which of them are targets.

    What stands before an answer is what the model is given to generate it; the token that ends it
    is a target too. One row, where the template shows every answer in its history as it was given;
    else one for each answer: rounds of ChatGLM-6B and ChatGLM2, thoughts that are forgotten. An
    answer with `loss` False is not a target.

    Args:
      template: as of `encode_chat`; "plain" for `completion` of one question and its answer.

    Raises:
      UserError: as `encode_chat`, and for a template whose answers do not follow its prompt.
    """
    if template == "plain":
        return [_plain(tokenizer, messages)]
    learned = [n for n, message in enumerate(messages) if isinstance(message, Mapping)
               and message.get("role") == "assistant" and message.get("loss") is not False]
    whole, shown = encode_chat(tokenizer, messages, tools, template=template)
    rows = [_answer(tokenizer, messages, n, tools, template) for n in learned]
    ends = [len(ids) for ids, _ in rows]
    one = [False] * len(whole)
    for ids, mask in rows:
        begins, end = mask.index(True), len(ids)
        if whole[:end - 1] != ids[:-1] or not all(shown[begins:end]):
            return rows
        one[begins:end] = mask[begins:]
    return [(whole[:max(ends)], one[:max(ends)])] if rows else []


def _answer(tokenizer: Tokenizer, messages: Sequence[Message], number: int,
            tools: Sequence[Any] | None, template: str | None) -> tuple[list[int], list[bool]]:
    """The ids of message `number` behind its prompt, and which are its own."""
    if number == 0:
        raise UserError("message 1, role: 'assistant': nobody has asked yet")
    prompt, _ = encode_chat(tokenizer, messages[:number], tools, template=template,
                            add_generation_prompt=True)
    # What a tool sees ends a call, and does not make the template forget what led to it.
    seen = messages[number + 1:number + 2]
    called = bool(seen) and seen[0].get("role") in ("observation", "tool")
    ids, shown = encode_chat(tokenizer, messages[:number + 1 + called], tools, template=template)
    begins = len(prompt)
    if ids[:begins] != prompt or not any(shown[begins:begins + 1]):
        raise UserError(f"message {number + 1}: the chat template shows an answer otherwise than "
                        "it asks for one, so there is nothing to train on: name another, "
                        f"--config.task.template={'|'.join(TEMPLATES)}|plain")
    end = next((n for n in range(begins, len(ids)) if not shown[n]), len(ids))
    while shown[begins - 1]:  # ChatGLM-6B's <sop> is a target that the prompt has
        begins -= 1
    return ids[:end], [False] * begins + [True] * (end - begins)


def _plain(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    if [message.get("role") for message in messages] != ["user", "assistant"]:
        raise UserError("task.template=plain: one question and its answer are wanted, nothing "
                        "said to the system and no history; name a chat template")
    _check(messages, None, TEMPLATES["chatglm1"], prompt=False)
    prompt = completion(tokenizer, messages[0]["content"])
    answer = tokenizer.encode(messages[1]["content"], add_special_tokens=False)
    ids = [*prompt, *answer, _plain_end(tokenizer)]
    return ids, [n >= len(prompt) for n in range(len(ids))]


def _plain_end(tokenizer: Tokenizer) -> int:
    return tokenizer.special.get("<|endofpiece|>", tokenizer.eos_id)


def _end_id(tokenizer: Tokenizer) -> int:
    """What ends the last answer: GLM-4 and later stop where the next question would begin."""
    if tokenizer.version.startswith("chatglm") or "<|user|>" not in tokenizer.special:
        return tokenizer.eos_id
    return tokenizer.special["<|user|>"]


def template_of(tokenizer: Tokenizer, tools: bool) -> str:
    """The template of a tokenizer's folder, or the name of its version's."""
    if "chat_template.jinja" in tokenizer.files:
        return tokenizer.files["chat_template.jinja"].decode("utf-8", "replace")
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in found}
        found = named.get("tool_use" if tools else "default") or named.get("default")
    found = found or _DEFAULTS.get(tokenizer.version)
    if not found:
        raise UserError(f"{tokenizer.where}: neither chat_template.jinja nor a chat_template in "
                        f"tokenizer_config.json; name a template: {', '.join(TEMPLATES)}")
    return found


@functools.lru_cache(maxsize=32)
def _rules(template: str) -> tuple[Rules, str]:
    if template in TEMPLATES:
        path = Path(__file__).with_name("templates") / f"{template}.jinja"
        return TEMPLATES[template], path.read_text(encoding="utf-8")
    if "{" not in template:
        raise UserError(f"chat template {template!r}: there are {', '.join(TEMPLATES)}")
    for name in TEMPLATES:  # one of ours, from the files of what a run has taught
        if _rules(name)[1] == template:
            return _rules(name)
    fields = tuple(field for field in FIELDS if field in template)
    return Rules(ROLES, fields, tools="tools" in template), template


def _check(messages: Sequence[Message], tools: Any, rules: Rules, prompt: bool
           ) -> list[dict[str, Any]]:
    """The messages, content never missing; UserError by number and field."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError("messages: a list of at least one message is wanted")
    _check_tools(tools, "tools")
    if tools and not rules.tools:
        raise UserError("tools: this version's chat template takes none (template=… names another)")
    checked = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: a table with role and content is wanted, not {message!r}")
        role, calls = message.get("role"), message.get("tool_calls")
        if role not in rules.roles:
            raise UserError(f"{where}, role: {role!r} is not one of {', '.join(rules.roles)}")
        turn = ("user", "assistant")[(number - 1) % 2]
        if rules.turns and role != turn:
            raise UserError(f"{where}, role: {role!r}, where {turn!r} is wanted: this version's "
                            "users and assistants take turns")
        content = message.get("content")
        if content is None and calls:
            content = ""
        for field, value in (("content", content), ("metadata", message.get("metadata", "")),
                             ("reasoning_content", message.get("reasoning_content") or "")):
            if not isinstance(value, str):
                raise UserError(f"{where}, {field}: a text is wanted, not {value!r}")
        for field in FIELDS:
            if message.get(field) and field not in rules.fields:
                raise UserError(f"{where}, {field}: this version's chat template takes none")
        if message.get("tools") and role != "system":
            raise UserError(f"{where}, tools: they belong to the system's message")
        _check_tools(message.get("tools"), f"{where}, tools")
        for call in calls or []:
            call = call.get("function", call) if isinstance(call, Mapping) else {}
            if not isinstance(call.get("arguments"), Mapping) or "name" not in call:
                raise UserError(f"{where}, tool_calls: a name and a table of arguments are wanted, "
                                f"not {call!r}")
        checked.append({**message, "content": content})
    if rules.turns and (checked[-1]["role"] == "user") != prompt:
        raise UserError(f"message {len(checked)}, role: to train, the last message is the "
                        "assistant's; to generate (add_generation_prompt), the user's")
    return checked


def _check_tools(tools: Any, where: str) -> None:
    if tools is not None and not (isinstance(tools, list | tuple)
                                  and all(isinstance(tool, Mapping) for tool in tools)):
        raise UserError(f"{where}: a list of JSON tables is wanted")


def _dump(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)
    except (TypeError, ValueError) as error:
        raise UserError(f"messages and tools: they are no JSON: {error}") from None


def _fail(message: str) -> None:
    raise UserError(f"the chat template refuses: {message}")


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    # As transformers sets it up: templates of model folders are written for that.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _dump
    environment.globals["raise_exception"] = _fail
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template, line {error.lineno}: {error.message}") from None
