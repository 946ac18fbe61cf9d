"""Texts and conversations in, text out: settings, stop tokens, and streams of whole characters."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from glm_jax.convert.released import read_json
from glm_jax.data.chat import chats, completion, encode_chat
from glm_jax.data.tokenizer import Tokenizer, check_belongs
from glm_jax.errors import UserError
from glm_jax.infer.beam import Beams, beam_search
from glm_jax.infer.generate import ROOM, Generation, Room, generate, left_padded, stream
from glm_jax.infer.sampling import Sampling, sampling
from glm_jax.nn.batch import Array

_ENDS = ("<|user|>", "<|observation|>", "<|endofpiece|>")  # whoever speaks next ends an answer
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SETTINGS = (*_SAMPLING, "num_beams", "length_penalty", "early_stopping", "max_new_tokens")


def settings(folder: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The SETTINGS of a folder's `generation_config.json`, under those `given` that are not None.

    As in transformers its temperature counts only with `do_sample`; a given top_k, top_p or min_p
    asks for sampling too. Transformers' own default of `top_k=50` is not taken over.
    """
    path = Path(folder) / "generation_config.json"
    found = {name: value for name, value in (read_json(path) if path.is_file() else {}).items()
             if value is not None}
    if not found.get("do_sample"):
        found = {name: value for name, value in found.items() if name not in _SAMPLING[:4]}
    elif "temperature" not in found:
        found["temperature"] = 1.0
    chosen = {name: value for name, value in given.items() if value is not None}
    if "temperature" not in found and any(chosen.get(name) for name in _SAMPLING[1:4]):
        found["temperature"] = 1.0
    known = {name: found[name] for name in (*SETTINGS, "eos_token_id") if name in found}
    return known | chosen


def ids_of(value: Any) -> list[int]:
    """An `eos_token_id` as a list: it may be none, one, or several."""
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    for number in ids:
        if not isinstance(number, int | np.integer) or isinstance(number, bool):
            raise UserError(f"eos_token_id must be a token id, or several, not {number!r}")
    return ids


def chosen_by(how: Mapping[str, Any]) -> Sampling | Beams:
    """How tokens are chosen by these SETTINGS. Raises UserError for impossible ones."""
    found = sampling(**{name: how[name] for name in _SAMPLING if name in how})
    if how.get("num_beams", 1) == 1:
        return found
    if found.temperature is not None:
        raise UserError("num_beams and a temperature don't go together: give temperature 0")
    return Beams(how["num_beams"], how.get("length_penalty", 1.0),
                 how.get("early_stopping", False), found.repetition_penalty)


def run(model: Any, tokens: Array, attention_mask: Array | None, how: Mapping[str, Any],
        seed: int = 0, **arguments: Any) -> tuple[Generation, np.ndarray | None]:
    """`beam_search` or `generate`, as SETTINGS say; only the first gives scores."""
    found = chosen_by(how)
    if isinstance(found, Beams):
        return beam_search(model, tokens, attention_mask, beams=found, **arguments)
    return generate(model, tokens, attention_mask, how=found, seed=seed, **arguments), None


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A language model with its tokenizer, which answers.

    Attributes:
      how: what `settings` gives.
      room: of the cache.
    """

    model: Any
    tokenizer: Tokenizer
    how: Mapping[str, Any]
    seed: int = 0
    room: Room = ROOM

    def __post_init__(self) -> None:
        check_belongs(self.tokenizer, self.model.config.to_dict())

    @property
    def config_ends(self) -> list[int]:
        """Where the model's files say that an answer ends."""
        return ids_of(self.how.get("eos_token_id", self.model.config.extra.get(
            "eos_token_id", getattr(self.model.config, "eos_token_id", None))))

    @property
    def stop_ids(self) -> list[int]:
        """Those, the tokenizer's end of text, and the tokens with which another one speaks."""
        special = self.tokenizer.special
        own = [special[name] for name in _ENDS if name in special]
        end = self.tokenizer.named_id("eos_token")
        return sorted({*self.config_ends, *own, *([] if end is None else [end])})

    @property
    def chats(self) -> bool:
        """Whether it was trained to."""
        return chats(self.tokenizer, self.config_ends)

    def encode(self, prompt: str | Sequence[Mapping[str, Any]], chat: bool | None = None,
               tools: Sequence[Any] | None = None) -> list[int]:
        """The ids of a text or of a conversation that the model is to continue.

        Args:
          chat: whether a text is a user's question; what `chats` says by default.
        """
        if isinstance(prompt, str):
            if not (self.chats if chat is None else chat):
                if tools:
                    raise UserError("tools: a text to go on with has none; give messages, or chat")
                return completion(self.tokenizer, prompt)
            prompt = [{"role": "user", "content": prompt}]
        return encode_chat(self.tokenizer, prompt, tools, add_generation_prompt=True)[0]

    def _arguments(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        tokens, mask = left_padded(rows)
        return {"tokens": tokens, "attention_mask": mask, "stop_ids": self.stop_ids,
                "max_new_tokens": self.how.get("max_new_tokens", 128), "seed": self.seed,
                "pad_id": self.model.config.pad_token_id or 0, "room": self.room}

    def answers(self, rows: Sequence[Sequence[int]]) -> list[tuple[list[int], float | None]]:
        """The ids of the answers to rows of ids, and with beams their scores."""
        out, scores = run(self.model, how=self.how, **self._arguments(rows))
        self._mind(max(len(row) + length for row, length in zip(rows, out.lengths, strict=True)))
        found = [None] * len(rows) if scores is None else scores.tolist()
        return [(row[:length].tolist(), score)
                for row, length, score in zip(out.tokens, out.lengths, found, strict=True)]

    def stream(self, row: Sequence[int]) -> Iterator[str]:
        """The answer to a row of ids, piece by piece as it comes; with beams as a whole."""
        how = chosen_by(self.how)
        if isinstance(how, Beams):
            yield self.tokenizer.decode(self.answers([row])[0][0])
            return
        def growing() -> Iterator[list[int]]:
            for out in stream(self.model, how=how, **self._arguments([row])):
                yield out.tokens[0, :out.lengths[0]].tolist()
            self._mind(len(row) + int(out.lengths[0]))
        yield from whole_characters(self.tokenizer, growing())

    def _mind(self, tokens: int) -> None:
        """Tells, once, of texts that are longer than what the model was made for."""
        most = getattr(self.model.config, "max_position_embeddings", math.inf)
        if tokens > most:
            logging.log_first_n(logging.WARNING, "prompt and answer have %d tokens together: the "
                                "model was made for %d, and what comes after them may be nonsense",
                                1, tokens, most)


def whole_characters(tokenizer: Tokenizer, growing: Iterator[Sequence[int]]) -> Iterator[str]:
    """The text of ids that grow, in pieces: what may still change is held back.

    A character of several tokens decodes to U+FFFD until it is whole.
    """
    said, text = "", ""
    for ids in growing:
        text = tokenizer.decode(ids)
        ready = text.rstrip("\ufffd")
        if len(ready) > len(said) and ready.startswith(said):
            yield ready[len(said):]
            said = ready
    if text.startswith(said) and text != said:
        yield text[len(said):]
