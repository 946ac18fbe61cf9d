"""Trains a byte-level BPE tokenizer with GLM's special tokens, and loads tokenizer folders.

A folder holds Hugging Face's files (tokenizer.json, tokenizer_config.json, perhaps more).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from glm_jax.errors import UserError

SPECIAL_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|endoftext|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)
PREFIX = ("[gMASK]", "<sop>")  # how every encoding begins, as GLM-4's does
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt",
         "tokenizer.model")
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
    """A thin wrapper over `tokenizers.Tokenizer`: lists of ids in and out.

    Special tokens that stand in a text are encoded as plain text: only this library puts
    their ids into a sequence, so a user's text can't pose as another role. Transformers'
    AutoTokenizer, reading the same folder, does parse them.
    """

    def __init__(self, files: dict[str, bytes], where: str = "tokenizer"):
        """Builds it from a folder's files. Raises UserError when they are damaged."""
        self.files = files
        self.where = where
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(f"{where}: tokenizer.json can't be read: {error}. "
                            "Copy the file again from its source.") from None
        try:
            self.config: dict[str, Any] = json.loads(files["tokenizer_config.json"])
        except ValueError as error:
            raise UserError(f"{where}: tokenizer_config.json is not JSON: {error}") from None
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()

    @property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int:
        """The id of one token, such as "[gMASK]"; UserError when the vocabulary lacks it."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"{self.where}: the vocabulary has no token {token!r}")
        return found

    def _named(self, *names: str) -> int:
        for name in names:
            token = self.config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                return self.token_id(token)
        raise UserError(f"{self.where}: tokenizer_config.json names no {names[0]}")

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""
        return self._named("eos_token")

    @property
    def pad_id(self) -> int:
        """The id that fills a batch; the end-of-text token where no padding token is named."""
        return self._named("pad_token", "eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, behind the model's prefix (`[gMASK] <sop>`) unless switched off."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True
                     ) -> list[list[int]]:
        """`encode` of many texts at once, in parallel."""
        found = self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the files into `folder`, byte for byte as they were read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder. Raises UserError for a missing or damaged file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a tokenizer is a folder with tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing; copy it from the model's source")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return Tokenizer(files, str(folder))
