"""Writing a checkpoint folder: tensor by tensor into shards, and whole or not at all."""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from glm_jax.convert.released import DTYPES, INDEX, SINGLE, inside
from glm_jax.errors import UserError
from glm_jax.parallel.processes import all_raise

# The files of a checkpoint folder: weights, configs, tokenizer, model card.
_CHECKPOINT = re.compile(
    r"(\w*config|tokenizer|special_tokens_map|added_tokens|vocab|labels|.*\.index)\.json|README\.md"
    r"|.*\.(safetensors|bin|model|jinja)|(vocab|merges)\.txt|(config|model|tok)\w*glm\.py"
    r"|quantization\.py")
CARD = "README.md"
_REFUSED = "the first process can't write; its message says why"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Tensor(NamedTuple):
    """A tensor that is yet to be made, by `make`, of this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def size_in_bytes(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a plain number of bytes, as Hugging Face counts them.

    Raises:
      UserError: for anything else, and for nothing at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]I?B)?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if size < 1:
        raise UserError(f"{text!r} is no size: 5GB, 500MB, 2GiB or a number of bytes is wanted")
    return size


def in_shards(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """The tensors of each file, in order; one that is larger than the limit has its own."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def other_files(folder: Path, code: bool = True) -> dict[str, bytes]:
    """A checkpoint folder's files besides config and weights: tokenizer, generation config, card.

    Args:
      code: the modules of a release that needs them in PyTorch, too.
    """
    names = (entry.name for entry in sorted(folder.iterdir())
             if _CHECKPOINT.fullmatch(entry.name) and entry.name != "config.json"
             and not entry.name.endswith((".safetensors", ".bin", ".index.json")))
    return {name: inside(folder, name).read_bytes() for name in names
            if code or not name.endswith(".py")}


def write_safetensors(folder: Path, tensors: Sequence[Tensor], max_shard_bytes: int,
                      wrote: Callable[[Tensor], None] = lambda tensor: None) -> None:
    """Makes and writes tensors one at a time, with the index when there are several shards.

    Of several processes all make them, the first one writes.

    Args:
      max_shard_bytes: of a shard's tensors; a larger tensor has a shard of its own.
      wrote: called behind each.

    Raises:
      UserError: where the disk has less room than they need, before anything is written.
    """
    first = jax.process_index() == 0
    total, free = sum(tensor.bytes for tensor in tensors), shutil.disk_usage(folder).free
    with all_raise(_REFUSED):
        if first and total > free:
            raise UserError(f"{folder.parent}: the tensors are {total / 1e9:.2f} GB, but only "
                            f"{free / 1e9:.2f} GB are free there")
    shards = in_shards(tensors, max_shard_bytes)
    names = ([SINGLE] if len(shards) == 1 else
             [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))])
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name if first else Path(os.devnull), shard, wrote)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True)
                      for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, shard: Sequence[Tensor], wrote: Callable[[Tensor], None]) -> None:
    """The format: the header's length, the header in JSON, the tensors' bytes behind each other."""
    shard = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)  # each at a multiple of it
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in shard:
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape,
                               "data_offsets": [place, place + tensor.bytes]}
        place += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            array = tensor.make()
            if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{tensor.name}: {array.dtype}{array.shape} was made")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            wrote(tensor)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well.

    A README.md stays where the block writes none: it may be somebody's own work.

    Of several processes, which all come here, the first one's does; the others' are let go.

    Raises:
      UserError: when nothing can be written there, the disk is full for one; or when `folder`
        holds anything else than files of a checkpoint, which would be lost.
    """
    partial = Path()
    with all_raise(_REFUSED):
        if jax.process_index() == 0:
            partial = _beside(folder)
    if jax.process_index() > 0:
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere)
        multihost_utils.sync_global_devices("whole_folder")
        return
    try:
        yield partial
        if (folder / CARD).is_file() and not (partial / CARD).exists():
            shutil.copy2(folder / CARD, partial / CARD)
        if folder.exists():  # moved aside first: one of the two is whole at every moment
            old = partial.with_name(partial.name + "-old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
        for left in folder.parent.iterdir():  # of processes that were killed
            if re.fullmatch(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}(-old)?", left.name):
                shutil.rmtree(left)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    multihost_utils.sync_global_devices("whole_folder")


def check_replaceable(folder: Path) -> None:
    """Raises a UserError where a folder holds what a checkpoint in its place would destroy."""
    if foreign := _foreign(folder):
        raise UserError(f"{folder}: is there already and is more than a checkpoint folder "
                        f"({foreign}); name another, or remove it first")


def _beside(folder: Path) -> Path:
    """A new folder beside `folder`, which holds nothing that would be lost."""
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from None
    return partial


def _foreign(folder: Path) -> str:
    """What would be lost if a checkpoint took the folder's place; "" when nothing would."""
    if not folder.is_dir():
        return "a file" if folder.exists() else ""
    names = {entry.name for entry in folder.iterdir()}
    if names and not names & {"config.json", "adapter_config.json"}:
        return "without a config"
    return min((f"with {entry.name}" for entry in folder.iterdir()
                if entry.is_dir() or not _CHECKPOINT.fullmatch(entry.name)), default="")
