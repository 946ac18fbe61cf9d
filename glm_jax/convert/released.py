"""Safetensors files of a released folder: every tensor's name and shape, read slice by slice."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glm_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names file, line and column."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON at column {error.colno}: "
                        f"{error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(value).__name__}")
    return value


class Released:
    """The tensors of a folder, or of one file, without reading them.

    Attributes:
      shapes: name -> shape, of every tensor.

    Raises:
      UserError: for no weights, a missing or damaged shard, an index that names a tensor which
        its shard does not hold, or a shard outside the folder.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._shards: dict[str, tuple[Path, Any]] = {}
        if (folder / single).exists():
            self._open(single, None)
        elif (folder / INDEX).exists():
            index = read_json(folder / INDEX).get("weight_map")
            if (not isinstance(index, dict) or not index
                    or not all(isinstance(shard, str) for shard in index.values())):
                raise UserError(f"{folder / INDEX}: weight_map is not a table of tensors and files")
            for shard in dict.fromkeys(index.values()):
                self._open(shard, {name for name, s in index.items() if s == shard})
        else:
            raise UserError(f"{folder}: no weights: neither {single} nor {INDEX} is there")

    def _open(self, shard: str, expected: set[str] | None) -> None:
        path = self.folder / shard
        if Path(shard).name != shard or shard in ("", ".."):
            raise UserError(f"{self.folder / INDEX}: shard {shard!r} lies outside the folder")
        if not path.exists():
            raise UserError(f"{path}: shard is missing; {INDEX} names it for {len(expected or ())} "
                            "tensors. Copy it again")
        try:
            file = safe_open(path, framework="numpy")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: damaged or truncated safetensors file ({error}); "
                            "copy it again") from None
        if expected is not None and (lacking := sorted(expected - shapes.keys())):
            raise UserError(f"{path}: tensor {lacking[0]!r} is not in this shard, "
                            f"but {INDEX} says so")
        if twice := sorted(shapes.keys() & self.shapes.keys()):
            raise UserError(f"{path}: tensor {twice[0]!r} is also in another shard")
        self.shapes.update(shapes)
        self._shards.update(dict.fromkeys(shapes, (path, file)))

    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted({path for path, _ in self._shards.values()})

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of one tensor, in the file's dtype."""
        part = self._shards[name][1].get_slice(name)
        return part[index] if index else part[...]


def write_safetensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]],
                      max_shard_bytes: int) -> None:
    """Writes tensors one shard at a time, with the index when there are several.

    Names in `folder` are final only when everything is written.
    """
    sizes: list[dict[str, int]] = []
    for number, shard in enumerate(_in_shards(tensors, max_shard_bytes)):
        try:
            save_file(dict(shard), folder / f"shard-{number}", metadata={"format": "pt"})
            (folder / f"shard-{number}").chmod(0o644)  # safetensors writes for the owner only
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        sizes.append({name: array.nbytes for name, array in shard.items()})
    if len(sizes) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, tensor_sizes in enumerate(sizes):
        name = f"model-{number + 1:05d}-of-{len(sizes):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / name)
        weight_map.update(dict.fromkeys(tensor_sizes, name))
    index = {"metadata": {"total_size": sum(sum(s.values()) for s in sizes)},
             "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _in_shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int
               ) -> Iterator[Mapping[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = np.ascontiguousarray(array)
        size += array.nbytes
    yield shard
