"""The weight files of a released folder: every tensor's name and shape, read slice by slice."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from glm_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


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

    Safetensors are preferred; PyTorch's own files are read where torch is installed, and only when
    they hold nothing but tensors: loading never executes what a file says.

    Attributes:
      shapes: name -> shape, of every tensor.

    Raises:
      UserError: for no weights, a missing or damaged shard, an index that names a tensor which
        its shard does not hold, or a shard outside the folder.
    """

    def __init__(self, folder: Path, *singles: str):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._shards: dict[str, tuple[Path, Read]] = {}
        singles = singles or (SINGLE, INDEX, PICKLED, PICKLED_INDEX)
        found = next((name for name in singles if (folder / name).exists()), None)
        if found is None:
            raise UserError(f"{folder}: no weights: neither {' nor '.join(singles)} is there")
        if not found.endswith(".index.json"):
            self._open(found, None, found)
            return
        index = read_json(folder / found).get("weight_map")
        if (not isinstance(index, dict) or not index
                or not all(isinstance(shard, str) for shard in index.values())):
            raise UserError(f"{folder / found}: weight_map is not a table of tensors and files")
        for shard in dict.fromkeys(index.values()):
            self._open(shard, {name for name, s in index.items() if s == shard}, found)

    def _open(self, shard: str, expected: set[str] | None, index: str) -> None:
        path = self.folder / shard
        if Path(shard).name != shard or shard in ("", ".."):
            raise UserError(f"{self.folder / index}: shard {shard!r} lies outside the folder")
        if not path.exists():
            raise UserError(f"{path}: shard is missing; {index} names it for {len(expected or ())} "
                            "tensors. Copy it again")
        shapes, read = (_safetensors if shard.endswith(".safetensors") else _pickled)(path)
        if expected is not None and (lacking := sorted(expected - shapes.keys())):
            raise UserError(f"{path}: tensor {lacking[0]!r} is not in this shard, "
                            f"but {index} says so")
        if twice := sorted(shapes.keys() & self.shapes.keys()):
            raise UserError(f"{path}: tensor {twice[0]!r} is also in another shard")
        self.shapes.update(shapes)
        self._shards.update(dict.fromkeys(shapes, (path, read)))

    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted({path for path, _ in self._shards.values()})

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of one tensor, in the file's dtype."""
        return self._shards[name][1](name, index)


Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str, tuple[slice, ...]], np.ndarray]


def _safetensors(path: Path) -> tuple[Shapes, Read]:
    try:
        file = safe_open(path, framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error}); "
                        "copy it again") from None
    return shapes, lambda name, index: file.get_slice(name)[index if index else ...]


def _pickled(path: Path) -> tuple[Shapes, Read]:
    """PyTorch's file, mapped into memory: a slice is read when it is asked for."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading a .bin file needs torch; install it, or save the weights "
                        "as safetensors") from None
    try:
        # Files of torch before 1.6 are no archives, and can't be mapped.
        mapped = zipfile.is_zipfile(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except Exception as error:  # torch raises pickle's, zipfile's and its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: damaged, or not only tensors ({reason})") from None

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = tensors[name].detach()[index if index else ...]
        if part.dtype == torch.bfloat16:  # which numpy has from ml_dtypes only
            return part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return part.numpy()
    return shapes, read


class Dequantised:
    """`Released` of THUDM's int8 and int4 checkpoints, as if they were not quantised.

    A quantised `<name>` is int8, with `<name>_scale` float16 for each output row: the weight is
    their product. Of four bits two columns share a byte, the even one in its high half.

    Raises:
      UserError: for other bits, or when no tensor has a scale.
    """

    def __init__(self, released: Released, bits: int):
        self.folder, self._released, self._columns = released.folder, released, 8 // (bits or 8)
        shapes = released.shapes
        if bits not in (4, 8):
            raise UserError(f"{released.folder / 'config.json'}: quantization_bit={bits!r} is not "
                            "supported; supported: 4, 8")
        self._scaled = {name for name in shapes if f"{name}_scale" in shapes}
        if not self._scaled:
            raise UserError(f"{released.folder}: quantization_bit={bits}, but no tensor has a "
                            "weight_scale: the weights are not quantised, or quantised otherwise")
        scales = {f"{name}_scale" for name in self._scaled}
        self.shapes = {name: shape for name, shape in shapes.items() if name not in scales}
        for name in self._scaled:
            self.shapes[name] = (*shapes[name][:-1], shapes[name][-1] * self._columns)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `Released.read`; float32 where the tensor is quantised."""
        if name not in self._scaled:
            return self._released.read(name, index)
        rows, columns = index or (slice(None), slice(None))
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
