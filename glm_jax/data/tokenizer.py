"""Loads tokenizer folders of every version, and trains a byte-level BPE tokenizer of GLM's kind.

A folder holds the released files: tokenizer.json, tokenizer.model (sentencepiece or tiktoken),
ice_text.model, cog-pretrain.model or vocab.txt (BERT), with tokenizer_config.json.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from glm_jax.data.bpe import Bpe, is_ranks, read_json, read_ranks, read_wordpiece
from glm_jax.data.pieces import LAYOUTS, Pieces
from glm_jax.errors import FETCH, UserError

SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|endoftext|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)
PREFIX = ("[gMASK]", "<sop>")  # how every encoding begins, as GLM-4's does
# What holds the vocabulary, the first that is there; and what else belongs to a tokenizer.
VOCABULARIES = ("tokenizer.json", "ice_text.model", "tokenizer.model", "cog-pretrain.model",
                "vocab.txt")
FILES = (*VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "chat_template.jinja", "vocab.json", "merges.txt")
CHAT_TEMPLATE = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A word, one digit, a run of punctuation, or blanks: pieces never cross these borders.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
MAX_PIECE_BYTES = 12  # four Chinese characters: longer pieces would be memorised phrases


def train_tokenizer(texts: Iterable[str], vocab_size: int = 16384) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, SPECIAL_TOKENS first.

    It is lossless: any text that UTF-8 can hold decodes to itself. Raises UserError when the
    size is no multiple of 64 or the texts are too few to fill it.
    """
    if vocab_size % 64:
        raise UserError(f"vocab_size {vocab_size} is not a multiple of 64")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    trained.pre_tokenizer = pre.Sequence([
        pre.Split(tokenizers.Regex(WORDS), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        max_token_length=MAX_PIECE_BYTES,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    if trained.get_vocab_size() != vocab_size:
        raise UserError(
            f"these texts give {trained.get_vocab_size()} tokens, not {vocab_size}: "
            "train on more text, or ask for fewer tokens"
        )
    prefix = " ".join(PREFIX)
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{prefix} $A", pair=f"{prefix} $A $B",
        special_tokens=[(token, trained.token_to_id(token)) for token in PREFIX],
    )
    return trained


def tokenizer_files(trained: tokenizers.Tokenizer) -> dict[str, bytes]:
    """The files of a trained tokenizer's folder, as transformers' AutoTokenizer reads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "padding_side": "left",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "[MASK]",
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    return {"tokenizer.json": trained.to_str(pretty=True).encode(),
            "tokenizer_config.json": text.encode()}


class Tokenizer:
    """Lists of ids in and out, by the files of any version.

    Special tokens that stand in a text are encoded as plain text: only this library puts
    their ids into a sequence, so a user's text can't pose as another role. Transformers'
    AutoTokenizer, reading the same folder, does parse them.

    Attributes:
      files: the folder's files by name.
      config: tokenizer_config.json.
      version: `chatglm1`, `chatglm2`, `chatglm3`, `glm4` (tiktoken's form) or `glm2021`, each with
        the rules of its released code; `bert` for a vocab.txt; `json` for a tokenizer.json, which
        says all itself.
      special: ids of the special tokens by name.
    """

    def __init__(self, files: dict[str, bytes], where: str = "tokenizer"):
        """Builds it from a folder's files. Raises UserError when they are damaged."""
        self.files = files
        self.where = where
        try:
            self.config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
        except ValueError as error:
            raise UserError(f"{where}: tokenizer_config.json is not JSON: {error}") from None
        if not isinstance(self.config, dict):
            raise UserError(f"{where}: tokenizer_config.json must be a table")
        self.version, self._backend = _read(files, self.config, where)
        self.special: Mapping[str, int] = self._backend.special

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return self._backend.vocab_size

    def token_id(self, token: str) -> int:
        """The id of one token, such as "[gMASK]"; UserError when the vocabulary lacks it."""
        found = self._backend.token_id(token)
        if found is None:
            raise UserError(f"{self.where}: the vocabulary has no token {token!r}")
        return found

    def named_id(self, name: str) -> int | None:
        """The id of what tokenizer_config.json or the version calls `eos_token`, `pad_token`,
        `bos_token`, or of a special token by its own name; None where there is none.
        """
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return self.token_id(token)
        return self.special.get(_DEFAULTS[self.version].get(name, name))

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        found = self.named_id("eos_token")
        if found is None:
            raise UserError(f"{self.where}: tokenizer_config.json names no eos_token")
        return found

    @property
    def pad_id(self) -> int:
        """The id that fills a batch; the end-of-text token where no padding token is named."""
        found = self.named_id("pad_token")
        if found is None:
            found = self.named_id("eos_token")
        if found is None:
            raise UserError(f"{self.where}: tokenizer_config.json names no pad_token")
        return found

    @property
    def mask_id(self) -> int:
        """The id that stands for a hidden token."""
        found = self.named_id("mask_token")
        if found is None:
            raise UserError(f"{self.where}: tokenizer_config.json names no mask_token")
        return found

    def encode(self, text: str, add_special_tokens: bool = True, *, pair: str | None = None,
               parse_special: bool = False) -> list[int]:
        """The ids of a text in the version's frame, such as `[gMASK] <sop> text`.

        Args:
          add_special_tokens: False leaves the frame out.
          pair: a second text, framed together with the first.
          parse_special: special tokens count as such where the text spells them, a `[MASK]` to
            fill, say. Only for text that is trusted.

        Raises:
          UserError: for a pair where the version has none.
        """
        if pair is not None:
            if parse_special or not add_special_tokens:
                raise ValueError("a pair is always framed, and never parsed")
            return self._backend.encode_pair(text, pair)
        if parse_special:
            return self._backend.encode_special(text, add_special_tokens)
        return self._backend.encode([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True,
                     length: int | None = None) -> list[list[int]]:
        """`encode` of many texts at once, in parallel where the library can.

        Texts are cut so that at most `length` ids are left, the frame's own included.
        """
        found = self._backend.encode(texts, add_special_tokens)
        return found if length is None else self.cut(found, length, add_special_tokens)

    def cut(self, encoded: list[list[int]], length: int, framed: bool = True) -> list[list[int]]:
        """At most `length` ids of each text; where they are framed, the frame stays whole."""
        if all(len(ids) <= length for ids in encoded):
            return encoded
        closing = self._closing if framed else 0
        return [ids if len(ids) <= length else ids[:length - closing] + ids[len(ids) - closing:]
                for ids in encoded]

    @functools.cached_property
    def _closing(self) -> int:
        """How many ids of the frame stand behind a text."""
        framed, plain = (self._backend.encode(["a"], special)[0] for special in (True, False))
        begins = next(n for n in range(len(framed)) if framed[n:n + len(plain)] == plain)
        return len(framed) - begins - len(plain)

    def ending(self, token: str) -> "Tokenizer":
        """The same, with a special token behind every framed text, also in its files.

        Raises:
          UserError: for an unknown token, or files whose frame is not a template.
        """
        raw = json.loads(self.files.get("tokenizer.json", b"{}"))
        template = raw.get("post_processor") or {}
        if template.get("type") != "TemplateProcessing":
            raise UserError(f"{self.where}: it has no tokenizer.json with a template, behind which "
                            f"{token!r} could be put; use --config.task.suffix=")
        last = {"SpecialToken": {"id": token, "type_id": 0}}
        if template["single"][-1] == last:
            return self
        template["single"].append(last)
        template["special_tokens"][token] = {
            "id": token, "ids": [self.token_id(token)], "tokens": [token]}
        content = json.dumps(raw, ensure_ascii=False, indent=2).encode()
        return Tokenizer(self.files | {"tokenizer.json": content}, self.where)

    def fast_files(self) -> dict[str, bytes]:
        """A tokenizer.json and its config, which transformers reads with no remote code.

        None of a version that `tokenizers` would encode otherwise, or that has it already. There
        is no chat template among them: the released ones are code that cuts where no text can say.
        """
        fast = None if "tokenizer.json" in self.files else self._backend.fast()
        if fast is None:
            return {}
        names = {field: fast.id_to_token(i) for field, i in (("eos_token", self.eos_id),
                                                             ("pad_token", self.pad_id))}
        config = {"name_or_path": self.version, **self.config, **names,
                  "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",
                  "clean_up_tokenization_spaces": False,
                  "model_input_names": ["input_ids", "attention_mask"]}
        config.pop("auto_map", None)
        return {"tokenizer.json": fast.to_str(pretty=True).encode(),
                "tokenizer_config.json":
                    (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._backend.decode(ids, skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the files into `folder`, byte for byte as they were read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


# The tokens that end a text and fill a batch, where tokenizer_config.json names none.
_DEFAULTS = {version: {"eos_token": layout.eos, "pad_token": layout.pad}
             for version, layout in LAYOUTS.items()}
_DEFAULTS["glm4"] = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
# BERT's, whose files name none
_DEFAULTS["json"] = _DEFAULTS["bert"] = {"eos_token": "[SEP]", "pad_token": "[PAD]"}
for _names in _DEFAULTS.values():
    _names["mask_token"] = "[MASK]"


def _read(files: Mapping[str, bytes], config: Mapping[str, Any], where: str
          ) -> tuple[str, Bpe | Pieces]:
    """The version that the files are of, and what encodes by them."""
    name = next((name for name in VOCABULARIES if name in files), None)
    if name is None:
        raise UserError(f"{where}: tokenizer.json is missing (or {', '.join(VOCABULARIES[1:])}); "
                        "copy it from the model's source")
    if name == "tokenizer.json" and "tokenizer.model" in files and _marked(config):
        name = "tokenizer.model"  # which the other is made of, as far as it can be
    content = files[name]
    if name == "tokenizer.json":
        if "tokenizer_config.json" not in files:
            raise UserError(f"{where}: tokenizer_config.json is missing; copy it from the model's "
                            "source")
        return "json", read_json(content, where)
    if name == "vocab.txt":
        return "bert", read_wordpiece(content, config, where)
    if name == "tokenizer.model" and is_ranks(content):
        return "glm4", read_ranks(content, config, where)
    version, first = {"ice_text.model": "chatglm1", "cog-pretrain.model": "glm2021"}.get(name), 0
    if version is None:
        version = _chatglm_version(config, where)
    elif version == "chatglm1":
        first = int(config.get("num_image_tokens", 20000))  # the first release does not write it
    return version, Pieces(content, version, f"{where}: {name}", first)


def _chatglm_version(config: Mapping[str, Any], where: str) -> str:
    """ChatGLM2 or ChatGLM3: their sentencepiece files are the same."""
    if "<|user|>" in json.dumps(config):
        return "chatglm3"
    if version := _marked(config):
        return version
    raise UserError(f"{where}: this tokenizer.model may be ChatGLM2's or ChatGLM3's: set "
                    "name_or_path in tokenizer_config.json to chatglm2-6b or chatglm3-6b")


def _marked(config: Mapping[str, Any]) -> str:
    """The version of ChatGLM that `name_or_path` tells; "" for another."""
    name = str(config.get("name_or_path", "")).lower()
    marks = (("glm3", "chatglm3"), ("glm2", "chatglm2"), ("codegeex2", "chatglm2"))
    return next((version for mark, version in marks if mark in name), "")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder. Raises UserError for a missing or damaged file."""
    if not isinstance(folder, str | Path):
        raise UserError(f"folder must be a path, not {folder!r}")
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a tokenizer is a folder with tokenizer.json. "
                        f"{FETCH}")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return Tokenizer(files, str(folder))


def vocabulary_file(folder: str | Path) -> Path | None:
    """The file of a folder that holds the vocabulary, if there is one."""
    return next((path for path in (Path(folder) / name for name in VOCABULARIES)
                 if path.is_file()), None)


# Fields of config.json, and the names of their tokens: in tokenizer_config.json, or themselves.
_IDS = {"eos_token_id": "eos_token", "pad_token_id": "pad_token", "bos_token_id": "bos_token",
        "mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]"}


def check_belongs(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Raises a UserError when a tokenizer is not the one of a model's weights.

    Args:
      config: the contents of config.json. Only the special ids that it names are compared; of
        several `eos_token_id`, the tokenizer's must be one.
    """
    if tokenizer.vocab_size > config["vocab_size"]:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                        f"{config['vocab_size']}; is it the tokenizer of these weights?")
    for field, token in _IDS.items():
        theirs = config.get(field)
        ours = tokenizer.named_id(token)
        several = theirs if isinstance(theirs, list | tuple) else [theirs]
        # An id outside the vocabulary is a default of the config's class, not the file's.
        several = [i for i in several if i is not None and i < config["vocab_size"]]
        if ours is not None and several and ours not in several:
            raise UserError(f"{field}: {ours} in the tokenizer ({tokenizer.where}), {theirs} in "
                            "the model's config.json; is it the tokenizer of these weights?")
