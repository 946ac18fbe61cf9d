"""SentencePiece files of ChatGLM-6B, ChatGLM2, ChatGLM3 and GLM (2021), with their special tokens.

The released code that went with these files is data here: a row of LAYOUTS for each version.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import tokenizers

from glm_jax.errors import UserError


class Layout(NamedTuple):
    """Where a version keeps its special tokens, and how it frames a text.

    A text becomes `before, text, after`; of a pair, `second, end` follow.

    Attributes:
      inside: special tokens that are pieces of the file: GLM's name, the piece's.
      appended: special tokens numbered behind the pieces; "" for a number that is not used.
      end: None where the version has no pairs.
      eos, pad: the tokens that end a text and fill a batch.
      blanks: whether newlines, tabs and runs of blanks have pieces of their own.
    """

    inside: Mapping[str, str]
    appended: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    end: tuple[str, ...] | None
    eos: str
    pad: str
    blanks: bool = False


_V1 = ("<unk>", "<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>",
       "<eop>", "<ENC>", "<dBLOCK>")
_V2 = Layout({"<pad>": "<unk>", "<bos>": "<s>", "<eos>": "</s>"},
             ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
             ("[gMASK]", "sop"), (), ("<eos>",), "<eos>", "<pad>")
LAYOUTS = {
    "chatglm1": Layout(dict(zip(_V1, _V1, strict=True)), (), (), ("[gMASK]", "<sop>"),
                       ("<eop>",), "<eop>", "<pad>", blanks=True),
    "chatglm2": _V2,
    "chatglm3": _V2._replace(appended=_V2.appended + (
        "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")),
    "glm2021": Layout({}, ("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", "",
                           "<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
                      ("[CLS]",), ("<|endoftext|>",), None, "<|endoftext|>", "<|endoftext|>"),
}


class Pieces:
    """A sentencepiece file: lists of ids in and out.

    Attributes:
      special: ids of the special tokens by name.
      vocab_size: how many ids there are, special tokens included.
    """

    def __init__(self, model: bytes, version: str, where: str, first: int = 0):
        """Reads the bytes of the file.

        Args:
          where: what to call the file in an error.
          first: the id of its first piece; image tokens lie below.

        Raises:
          UserError: when it is damaged, of another version, or sentencepiece is not installed.
        """
        try:
            from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
        except ImportError as error:
            raise UserError(f"{where}: to read it, pip install sentencepiece protobuf ({error})"
                            ) from None
        self.layout, self.where, self.first = LAYOUTS[version], where, first
        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(model)
            self._reader = SentencePieceProcessor(model_proto=model)
        except Exception as error:  # protobuf's own exception, or a bare RuntimeError
            raise UserError(f"{where}: not a sentencepiece file, or damaged ({error}). "
                            "Copy the file again from its source.") from None
        self._ids = {piece.piece: first + i for i, piece in enumerate(proto.pieces)}
        self._end = first + len(proto.pieces)
        self._pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        self._is_plain_bpe = (proto.trainer_spec.model_type == proto.trainer_spec.BPE
                              and not proto.normalizer_spec.precompiled_charsmap
                              and not proto.normalizer_spec.remove_extra_whitespaces)
        self.vocab_size = self._end + len(self.layout.appended)
        if missing := [p for p in self.layout.inside.values() if p not in self._ids]:
            raise UserError(f"{where}: it has no piece {missing[0]!r}, so it is not the file of "
                            f"{version}")
        self.special = {name: self._ids[piece] for name, piece in self.layout.inside.items()}
        self.special |= {name: self._end + i for i, name in enumerate(self.layout.appended) if name}
        # ChatGLM-6B's file finds its special tokens in any text. Control pieces are never found.
        for piece in proto.pieces:
            if piece.piece in self.layout.inside and piece.type == piece.USER_DEFINED:
                piece.type = piece.CONTROL
        self._writer = SentencePieceProcessor(model_proto=proto.SerializeToString())

    def token_id(self, token: str) -> int | None:
        return self.special.get(token, self._ids.get(token))

    def encode(self, texts: Sequence[str], framed: bool) -> list[list[int]]:
        return [self._framed(self._plain(text)) if framed else self._plain(text) for text in texts]

    def encode_pair(self, text: str, pair: str) -> list[int]:
        if self.layout.end is None:
            raise UserError(f"{self.where}: this version frames no pairs of texts")
        return (self._framed(self._plain(text)) + self._plain(pair)
                + [self.special[token] for token in self.layout.end])

    def encode_special(self, text: str, framed: bool) -> list[int]:
        ids: list[int] = []
        if not self.layout.appended:  # the file itself finds them
            ids = [self.first + i for i in self._reader.encode(self._mark_blanks(text))]
        else:
            for part in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
                ids += [self.special[part]] if part in self.special else self._plain(part)
        return self._framed(ids) if framed else ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of ids; ids that stand for nothing (images, padding of the table) are left out.
        """
        dropped = set(self.special.values()) if skip_special else set()
        text = "".join(self._decoded([i for i in ids if i not in dropped]))
        if not self.layout.blanks:
            return text
        text = re.sub(r"<\|blank_(\d+)\|>", lambda found: " " * int(found[1]), text)
        return text.replace("<n>", "\n").replace("<|tab|>", "\t")

    def fast(self) -> tokenizers.Tokenizer | None:
        """The same as `tokenizers` has it, for a tokenizer.json; None where the two would differ.

        It can be had of ChatGLM2's and ChatGLM3's files: byte-pair encoding of the text as it is.
        `tokenizers` finds special tokens in any text, so `sop` and `eop` become `<sop>` and
        `<eop>`, as GLM-4 spells them: words have these letters.
        """
        if not self._is_plain_bpe or self.layout.after:
            return None
        scores = dict(self._pieces)
        merges = []
        for piece, score in self._pieces:
            halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            known = [pair for pair in halves if all(half in scores for half in pair)]
            merges += [(-score, tuple(self._ids[half] for half in pair), pair) for pair in known]
        out = tokenizers.Tokenizer(tokenizers.models.BPE(
            {piece: i for i, (piece, _) in enumerate(self._pieces)},
            [pair for *_, pair in sorted(merges)],
            unk_token=self._pieces[0][0], fuse_unk=True, byte_fallback=True))
        normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
        out.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
        out.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0)])
        spelt = {"sop": "<sop>", "eop": "<eop>"}
        names = [spelt.get(name, name) for name in self.layout.appended]
        out.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)
                                for name in names])
        before = [spelt.get(name, name) for name in self.layout.before]
        out.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join([*before, "$A"]),
            special_tokens=[(name, out.token_to_id(name)) for name in before])
        return out

    def _decoded(self, ids: Sequence[int]) -> Iterator[str]:
        """Special tokens by their names, and between them runs of pieces, each a text."""
        names = {i: name for name, i in self.special.items()
                 if name not in self._ids}  # those of the file's own name are decoded in a run
        run: list[int] = []
        for i in ids:
            if i in names:
                yield self._reader.decode(run)
                yield names[i]
                run = []
            elif self.first <= i < self._end:
                run.append(i - self.first)
        yield self._reader.decode(run)

    def _framed(self, ids: list[int]) -> list[int]:
        before, after = ([self.special[token] for token in tokens]
                         for tokens in (self.layout.before, self.layout.after))
        return before + ids + after

    def _plain(self, text: str) -> list[int]:
        return [self.first + i for i in self._writer.encode(self._mark_blanks(text))]

    def _mark_blanks(self, text: str) -> str:
        if not self.layout.blanks:
            return text
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return re.sub(" {2,80}", lambda found: f"<|blank_{len(found[0])}|>", text)
