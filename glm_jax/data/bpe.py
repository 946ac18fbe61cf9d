"""What `tokenizers` encodes by: tokenizer.json, BERT's vocab.txt, GLM-4's tokenizer.model."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from glm_jax.errors import UserError

# How GLM-4 cuts a text before merging, and its special tokens, numbered behind the ranks.
GLM4_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GLM4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)


class Bpe:
    """A `tokenizers.Tokenizer`: lists of ids in and out, framed as its file says.

    Attributes:
      special: ids of the special tokens by name.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self._parser: tokenizers.Tokenizer | None = None
        self.special = {token.content: i for i, token in inner.get_added_tokens_decoder().items()
                        if token.special}

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def encode(self, texts: Sequence[str], framed: bool) -> list[list[int]]:
        found = self.inner.encode_batch(list(texts), add_special_tokens=framed)
        return [encoding.ids for encoding in found]

    def fast(self) -> tokenizers.Tokenizer | None:
        """What a tokenizer.json holds of it."""
        return self.inner

    def encode_pair(self, text: str, pair: str) -> list[int]:
        return self.inner.encode(text, pair).ids

    def encode_special(self, text: str, framed: bool) -> list[int]:
        if self._parser is None:  # a copy: another thread may be encoding what nobody trusts
            self._parser = tokenizers.Tokenizer.from_str(self.inner.to_str())
        return self._parser.encode(text, add_special_tokens=framed).ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=skip_special)


def read_json(content: bytes, where: str) -> Bpe:
    """The tokenizer of a tokenizer.json. Raises UserError when it is damaged."""
    try:
        return Bpe(tokenizers.Tokenizer.from_buffer(content))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{where}: tokenizer.json can't be read: {error}. "
                        "Copy the file again from its source.") from None


def read_wordpiece(content: bytes, config: Mapping[str, Any], where: str) -> Bpe:
    """BERT's tokenizer from a vocab.txt, as transformers' BertTokenizer reads it.

    Args:
      config: tokenizer_config.json, for `do_lower_case`, `tokenize_chinese_chars`, `strip_accents`
        and the names of the special tokens.

    Raises:
      UserError: when it is not UTF-8, or lacks a special token.
    """
    try:
        lines = io.TextIOWrapper(io.BytesIO(content), "utf-8").readlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: vocab.txt is not UTF-8: {error}") from None
    ids = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    named = {name: config.get(f"{name}_token") or f"[{name.upper()}]"
             for name in ("unk", "sep", "pad", "cls", "mask")}
    special = {name: str(token["content"] if isinstance(token, Mapping) else token)
               for name, token in named.items()}
    if lacking := [token for token in special.values() if token not in ids]:
        raise UserError(f"{where}: vocab.txt has no line {lacking[0]}")
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token=special["unk"]))
    inner.normalizer = tokenizers.normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"), lowercase=config.get("do_lower_case", True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    inner.add_special_tokens(list(special.values()))
    cls, sep = special["cls"], special["sep"]
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, ids[token]) for token in (cls, sep)])
    return Bpe(inner)


def is_ranks(content: bytes) -> bool:
    """Whether a tokenizer.model is tiktoken's: lines of a base64 token and its rank."""
    first = content.split(b"\n", 1)[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()


def read_ranks(content: bytes, config: Mapping[str, Any], where: str) -> Bpe:
    """GLM-4's tokenizer from its ranks.

    Args:
      config: tokenizer_config.json; its `added_tokens_decoder` names the special tokens.

    Raises:
      UserError: when a line is damaged, or the special tokens don't follow the ranks.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{where}: tokenizer.model, line {number}: not a base64 token and its "
                            "rank. Copy the file again from its source.") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{where}: tokenizer.model: its ranks are not 0 to {len(ranks) - 1}, each "
                        "once. Copy the file again from its source.")
    added = {int(i): token["content"]
             for i, token in (config.get("added_tokens_decoder") or {}).items()}
    special = [added[i] for i in sorted(added)] or list(GLM4_SPECIAL)
    if added and sorted(added) != list(range(len(ranks), len(ranks) + len(added))):
        raise UserError(f"{where}: tokenizer.model has {len(ranks)} ranks, but the special tokens "
                        f"of tokenizer_config.json begin at {min(added)} ({added[min(added)]}): "
                        "the two files don't belong together")
    letters = byte_letters()
    spelt = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(spelt[a], spelt[b])
                   for a, b in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(
        {spelt[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    pre = tokenizers.pre_tokenizers
    inner.pre_tokenizer = pre.Sequence([
        pre.Split(tokenizers.Regex(GLM4_WORDS), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(special)
    frame = "[gMASK] <sop> $A"
    used = ("[gMASK]", "<sop>", "<|endoftext|>")
    if lacking := [token for token in used if token not in special]:
        raise UserError(f"{where}: tokenizer_config.json names no special token {lacking[0]}")
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=frame, pair=f"{frame} $B <|endoftext|>",
        special_tokens=[(token, inner.token_to_id(token)) for token in used])
    return Bpe(inner)


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones stand for themselves."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]
