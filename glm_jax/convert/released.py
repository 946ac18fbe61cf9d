"""The weight files of a released folder: every tensor's name and shape, read slice by slice."""

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from glm_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What safetensors calls the types that we read and write.
DTYPES = {name: np.dtype(kind) for name, kind in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
    "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_}.items()}

Shapes = dict[str, tuple[int, ...]]
# One index for each of the first axes: a slice, or on the first the numbers of the rows.
Index = tuple[slice | np.ndarray, ...]
Read = Callable[[str, Index], np.ndarray]


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
    except (RecursionError, ValueError, OSError) as error:  # nested without end, endless numbers
        raise UserError(f"{path}: can't be read as JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is wanted, not {type(value).__name__}")
    return value


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder.

    A link may lead elsewhere within the folder, and from a snapshot in the hub's cache to its
    blobs.

    Raises:
      UserError: for a name or a link that leads outside, or no file.
    """
    path = folder / name
    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise UserError(f"{folder}: {name[:80]!r} lies outside the folder")
    try:
        real, home = path.resolve(), folder.resolve()
        snapshot = home.parent.name == "snapshots"
        if not (real.is_relative_to(home)
                or (snapshot and real.parent == home.parent.parent / "blobs")):
            raise UserError(f"{path}: it is a link to {real}, which lies outside the folder; put "
                            "the file itself there")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a file")
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise UserError(f"{folder}: {name[:80]!r} is no file name ({error})") from None
    return path


class Released:
    """The tensors of a folder, or of one file, without reading them.

    Safetensors are preferred; PyTorch's own files are read where torch is installed, and only when
    they hold nothing but tensors: loading never executes what a file says.

    Attributes:
      shapes: name -> shape, of every tensor; `dtypes` its numpy dtype.

    Raises:
      UserError: for no weights, a missing or damaged shard, an index that names a tensor which
        its shard does not hold, or a shard outside the folder.
    """

    def __init__(self, folder: Path, *singles: str):
        self.folder = folder
        self.shapes: Shapes = {}
        self.dtypes: dict[str, np.dtype] = {}
        self._shards: dict[str, tuple[Path, Read]] = {}
        self._warned = False
        singles = singles or (SINGLE, INDEX, PICKLED, PICKLED_INDEX)
        found = next((name for name in singles if (folder / name).exists()), None)
        if found is None:
            raise UserError(f"{folder}: no weights: neither {' nor '.join(singles)} is there")
        if not found.endswith(".index.json"):
            self._open(found, None, found)
            self._warn_of_others(found)
            return
        index = read_json(inside(folder, found)).get("weight_map")
        if (not isinstance(index, dict) or not index
                or not all(isinstance(shard, str) for shard in index.values())):
            raise UserError(f"{folder / found}: weight_map is not a table of tensors and files")
        for shard in dict.fromkeys(index.values()):
            self._open(shard, {name for name, s in index.items() if s == shard}, found)
        self._warn_of_others(found)

    def _warn_of_others(self, found: str) -> None:
        stem, kind = found.split(".")[:2]
        others = {path.name for path in self.folder.glob(f"{stem}-*-of-*.{kind}")}
        if others := others - {path.name for path in self.files()}:
            logging.warning("%s: %s is not read: %s is, which does not name it", self.folder,
                            min(others), found)

    def _open(self, shard: str, expected: set[str] | None, index: str) -> None:
        path = inside(self.folder, shard)
        if not path.exists():
            raise UserError(f"{path}: shard is missing; {index} names it for {len(expected or ())} "
                            "tensors. Copy it again")
        shapes, dtypes, read = (_safetensors if shard.endswith(".safetensors") else _pickled)(path)
        if expected is not None and (lacking := sorted(expected - shapes.keys())):
            raise UserError(f"{path}: tensor {lacking[0]!r} is not in this shard, "
                            f"but {index} says so")
        if twice := sorted(shapes.keys() & self.shapes.keys()):
            raise UserError(f"{path}: tensor {twice[0]!r} is also in another shard")
        self.shapes.update(shapes)
        self.dtypes.update(dtypes)
        self._shards.update(dict.fromkeys(shapes, (path, read)))

    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted({path for path, _ in self._shards.values()})

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A slice of one tensor, in the file's dtype; warns of the first that isn't finite.

        Raises:
          UserError: when the file has become shorter since it was opened.
        """
        path, read = self._shards[name]
        array = read(name, index)
        if not self._warned and not all_finite(array):
            self._warned = True
            logging.warning("%s: %s holds NaN or infinite values; perhaps others do too", path,
                            name)
        return array


def all_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; by the bits, without a copy as large as the array."""
    if not array.size or array.dtype.kind not in "fV" or array.dtype.itemsize == 1:
        return True
    signed, unsigned = (np.dtype(f"{kind}{array.dtype.itemsize}") for kind in "iu")
    infinity, negative = (np.array(sign * np.inf).astype(array.dtype) for sign in (1, -1))
    return bool(array.view(signed).max() < infinity.view(signed)
                and array.view(unsigned).max() < negative.view(unsigned))


def _safetensors(path: Path) -> tuple[Shapes, dict[str, np.dtype], Read]:
    """The library checks the header; a tensor's bytes are then read from their place.

    So nothing stays mapped into memory, where it would count as ours.
    """
    shapes, dtypes, places = {}, {}, {}
    try:
        with open(path, "rb") as raw:
            place = 8 + int.from_bytes(raw.read(8), "little")
        with safe_open(path, framework="numpy") as file:
            for name in file.offset_keys():  # one behind the other, says the library
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: tensor {name!r} is of type {part.get_dtype()}, which "
                                    "is not supported")
                shapes[name], dtypes[name] = tuple(part.get_shape()), DTYPES[part.get_dtype()]
                places[name] = place
                place += math.prod(shapes[name]) * dtypes[name].itemsize
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or truncated safetensors file "
                        f"({ascii(str(error)[:200])[1:-1]}); copy it again") from None

    def read(name: str, index: Index) -> np.ndarray:
        shape, dtype, place = shapes[name], dtypes[name], places[name]
        rows = index[0] if index else slice(None)
        whole = all(isinstance(s, slice) and s.indices(n) == (0, n, 1)
                    for s, n in zip(index[1:], shape[1:], strict=False))
        try:
            if isinstance(rows, slice) and whole:
                start, stop, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
                row = math.prod(shape[1:])
                array = np.fromfile(path, dtype, (stop - start) * row,
                                    offset=place + start * row * dtype.itemsize)
                return array.reshape(stop - start, *shape[1:]) if shape else array.reshape(())
            return np.array(np.memmap(path, dtype, "r", place, shape)[index])
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: {name} can't be read; the file has changed since it was "
                            f"opened ({error})") from None
    return shapes, dtypes, read


def _pickled(path: Path) -> tuple[Shapes, dict[str, np.dtype], Read]:
    """PyTorch's file, mapped into memory only while a tensor is read."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading a .bin file needs torch; install it, or save the weights "
                        "as safetensors") from None
    # Files of torch before 1.6 are no archives, and can't be mapped.
    mapped = zipfile.is_zipfile(path)

    def load() -> Any:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises pickle's, zipfile's and its own
            raise damaged(error) from None

    def damaged(error: Exception) -> UserError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(f"{path}: damaged, or not only tensors ({reason})")

    def array(part: Any) -> np.ndarray:
        if part.dtype == torch.bfloat16:  # which numpy has from ml_dtypes only
            return part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()

    def read(name: str, index: Index) -> np.ndarray:
        part = (load() if kept is None else kept)[name].detach()[index if index else ...]
        return np.array(array(part))  # a copy: the file is let go

    tensors = load()
    try:
        if not all(isinstance(name, str) for name in tensors):
            raise ValueError("a name that is no text")
        if any(tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
               for tensor in tensors.values()):
            raise ValueError("a tensor that is larger than what the file stores of it")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        dtypes = {name: array(tensor.detach()[:0] if tensor.ndim else tensor.detach()).dtype
                  for name, tensor in tensors.items()}
    except Exception as error:
        raise damaged(error) from None
    kept = None if mapped else tensors
    return shapes, dtypes, read


class Dequantised:
    """`Released` of THUDM's int8 and int4 checkpoints, as if they were not quantised.

    A quantised `<name>` is int8, with `<name>_scale` float16 for each output row: the weight is
    their product. Of four bits two columns share a byte, the even one in its high half.

    Raises:
      UserError: for other bits, or when no tensor has a scale.
    """

    def __init__(self, released: Released, bits: int):
        if bits not in (4, 8):
            raise UserError(f"{released.folder / 'config.json'}: quantization_bit={bits!r} is not "
                            "supported; supported: 4, 8")
        self.folder, self._released, self._columns = released.folder, released, 8 // bits
        shapes = released.shapes
        self._scaled = {name for name, shape in shapes.items()
                        if len(shape) == 2 and shapes.get(f"{name}_scale") == shape[:1]}
        if not self._scaled:
            raise UserError(f"{released.folder}: quantization_bit={bits}, but no tensor has a "
                            "weight_scale: the weights are not quantised, or quantised otherwise")
        scales = {f"{name}_scale" for name in self._scaled}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in scales}
        for name in self._scaled:
            self.shapes[name] = (*shapes[name][:-1], shapes[name][-1] * self._columns)
        self.dtypes = {name: np.dtype(np.float32) if name in self._scaled else released.dtypes[name]
                       for name in self.shapes}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """As `Released.read`; float32 where the tensor is quantised."""
        if name not in self._scaled:
            return self._released.read(name, index)
        rows, columns = index or (slice(None), slice(None))
        assert isinstance(columns, slice)
        start, stop, _ = columns.indices(self.shapes[name][1])
        n = self._columns
        packed = self._released.read(name, (rows, slice(start // n, -(-stop // n))))
        if packed.dtype != np.int8:
            raise UserError(f"{self.folder}: {name} is {packed.dtype}, but its scale says int8")
        if n == 2:  # shifts of signed bytes keep the sign
            packed = np.stack((packed >> 4, (packed << 4) >> 4), axis=-1).reshape(len(packed), -1)
        values = packed[:, start % n:start % n + stop - start]
        scale = self._released.read(f"{name}_scale", (rows,))
        return values.astype(np.float32) * scale.astype(np.float32)[:, None]
