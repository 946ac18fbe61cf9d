"""Continues texts and answers questions: from arguments, a file, standard input, or in a chat.

    python launch/generate.py --model=glm_jax/assets/glm-nano-zh 这家酒店
    python launch/generate.py --model=chatglm3-6b --file=prompts.jsonl --jsonl --batch=8
    python launch/generate.py --model=chatglm3-6b            # a chat, in a terminal

A .jsonl file has a `prompt`, or `messages` (and `tools`) in each line; of any other file each line
is a prompt. In a chat Ctrl-C ends an answer and Ctrl-D the chat. Settings that are left out are
those of the model's generation_config.json.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from glm_jax.parallel import processes
from launch import door

door.flags_of_mesh()
MODEL = flags.DEFINE_string("model", None, "a model, a run folder or an adapter", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "a PEFT folder, or a run's: on top of --model")
FILE = flags.DEFINE_string("file", "", "a file of prompts")
CHAT = flags.DEFINE_bool("chat", None, "put a prompt into the version's chat template; by default "
                         "if the model's files end a text at <|user|>, or it is a ChatGLM")
JSONL = flags.DEFINE_bool("jsonl", False, "one JSON object a line: what was asked, text, tokens")
BATCH = flags.DEFINE_integer("batch", 8, "prompts at a time", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
HOW = {
    "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "128 by default"),
    "temperature": flags.DEFINE_float("temperature", None, "0: always the likeliest token"),
    "top_k": flags.DEFINE_integer("top_k", None, "sample among so many; 0: among all"),
    "top_p": flags.DEFINE_float("top_p", None, "sample among the fewest with this share"),
    "min_p": flags.DEFINE_float("min_p", None, "sample among those this likely beside the best"),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "above 1: repeat less"),
    "num_beams": flags.DEFINE_integer("num_beams", None, "above 1: beam search"),
    "length_penalty": flags.DEFINE_float("length_penalty", None, "above 0: longer beams"),
}
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"],
                          "what is computed in")
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, ["float32", "bfloat16", "float16"],
                                "what keys and values are kept in; --dtype by default")
CACHE_LENGTH = flags.DEFINE_integer("cache_length", None, "tokens that prompt and answer have "
                                    "together at most; as many as needed by default")


def read_items(path: str) -> list[tuple[dict[str, Any], str]]:
    """What each line of a file asks, and where it stands."""
    from glm_jax.data.records import READERS, read_texts
    from glm_jax.errors import UserError
    if Path(path).suffix.lower() not in (".jsonl", ".json"):
        return [({"prompt": text}, path) for text in read_texts(path)]
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    items: list[tuple[dict[str, Any], str]] = []
    for row, where in READERS[".jsonl"](Path(path), {}):
        if not isinstance(row.get("messages"), list) and not isinstance(row.get("prompt"), str):
            raise UserError(f"{where}: a prompt (a text) or messages (a list) is wanted")
        items.append(({name: row[name] for name in ("prompt", "messages", "tools") if name in row},
                      where))
    return items


def load(mesh: Any) -> Any:
    """The model with its tokenizer and settings."""
    from glm_jax.adapters.peft import adapter_folder, load_adapter
    from glm_jax.data.tokenizer import load_tokenizer, vocabulary_file
    from glm_jax.infer.generate import Room
    from glm_jax.infer.text import Speaker, settings
    from glm_jax.train.load import load_trained

    trained = load_trained(MODEL.value, mesh, dtype=DTYPE.value)
    tokenizer, own = trained.tokenizer, {}
    if ADAPTER.value:
        load_adapter(trained.model, ADAPTER.value)
        folder = adapter_folder(ADAPTER.value)
        own = settings(folder, {})  # where it was taught to end; the rest is the model's
        if vocabulary_file(folder):  # which has the template that was taught
            tokenizer = load_tokenizer(folder)
    given = {name: flag.value for name, flag in HOW.items() if flag.value is not None}
    how = settings(MODEL.value, own | given)
    return Speaker(trained.model, tokenizer, how, SEED.value,
                   Room(CACHE_DTYPE.value, CACHE_LENGTH.value))


def encode(speaker: Any, item: dict[str, Any], where: str) -> list[int]:
    from glm_jax.errors import UserError
    try:
        asked = item["messages"] if "messages" in item else item["prompt"]
        return list(speaker.encode(asked, CHAT.value, item.get("tools")))
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def answer(speaker: Any, items: list[tuple[dict[str, Any], str]]) -> None:
    """Prints an answer to each; a single one as it comes."""
    rows = [encode(speaker, *item) for item in items]
    if len(rows) == 1 and not JSONL.value:
        say(speaker.stream(rows[0]))
        return
    size = min(BATCH.value, len(rows))
    for start in range(0, len(rows), size):
        some = rows[start:start + size]
        full = some + some[-1:] * (size - len(some))  # one shape: nothing more to compile
        for (item, _), (ids, score) in zip(items[start:start + size], speaker.answers(full),
                                           strict=False):
            text = speaker.tokenizer.decode(ids)
            if JSONL.value:
                more = {} if score is None else {"score": score}
                print(json.dumps({**item, "text": text, "tokens": len(ids), **more},
                                 ensure_ascii=False), flush=True)
            else:
                print(text, flush=True)


def say(pieces: Iterable[str]) -> str:
    """Prints pieces as they come, and a line's end; what was said, also when Ctrl-C ends it."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()
    return said


def talk(reply: Callable[[list[dict[str, str]]], Iterator[str]], remember: bool,
         ask: Callable[[str], str] = input) -> None:
    """Asks and replies until Ctrl-D. `remember`: with all that was said before."""
    from glm_jax.errors import UserError
    history: list[dict[str, str]] = []
    while True:
        try:
            text = ask("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not text:
            continue
        asked = history + [{"role": "user", "content": text}]
        try:
            said = say(reply(asked))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if remember:
            history = asked + [{"role": "assistant", "content": said.strip()}]


def given() -> list[tuple[dict[str, Any], str]]:
    """What is asked, and where it stands; nothing where a terminal is to ask."""
    from glm_jax.data.records import split_texts
    from glm_jax.errors import UserError

    items = [({"prompt": text}, "") for text in door.arguments()]
    if FILE.value:
        items += read_items(FILE.value)
    if not items and sys.stdin.isatty():
        if not processes.alone():
            raise UserError("no prompt, and several processes don't chat: give prompts as "
                            "arguments, --file, or standard input")
        return []
    if not items:
        items = [({"prompt": text}, "") for text in split_texts(
            door.read_stdin(), "standard input")]
    if not items:
        raise UserError("no prompt: give one as an argument, --file, or standard input")
    return items


def main() -> None:
    with door.joined():
        items = processes.shared("prompts", given)
        with door.on_mesh(MODEL.value, "tensor") as mesh:  # a token's step gathers no parameters
            reply(load(mesh), items)


def reply(speaker: Any, items: list[tuple[dict[str, Any], str]]) -> None:
    """Answers what was asked, or talks at the terminal."""
    if items:
        answer(speaker, items)
        return
    import readline  # noqa: F401  arrow keys and history at the prompt
    chat = speaker.chats if CHAT.value is None else CHAT.value
    talk(lambda asked: speaker.stream(speaker.encode(asked if chat else asked[0]["content"], chat)),
         remember=chat)


if __name__ == "__main__":
    door.run(main, arguments=True)
