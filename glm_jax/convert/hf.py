"""Hugging Face folders: a model from one, streamed into sharded arrays, and one from a model."""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from glm_jax.convert.released import Dequantised, Released, read_json, write_safetensors
from glm_jax.errors import UserError
from glm_jax.models import architecture_of, head_of
from glm_jax.models.weights import Weight
from glm_jax.parallel.mesh import make_mesh, sharding

# The files of a checkpoint folder: weights, configs, tokenizer, model card.
_CHECKPOINT = re.compile(
    r"(\w*config|tokenizer|special_tokens_map|added_tokens|vocab|labels|.*\.index)\.json|README\.md"
    r"|.*\.(safetensors|bin|model|jinja)|(vocab|merges)\.txt|(config|model|tok)\w*chatglm\.py")


class Source(Protocol):
    """Tensors by name: `Released`, `Dequantised`, or one of them under other names."""

    @property
    def folder(self) -> Path: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


def flat(model: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter of a model by its dotted path."""
    state = nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}


def load_model(folder: str | Path, *, head: str | None = None, dtype: Any = jnp.float32,
               param_dtype: Any = None, mesh: Mesh | None = None, seed: int = 0,
               **overrides: Any) -> Any:
    """A model with the weights of a Hugging Face folder.

    Each device's part of each parameter is read by itself: no whole checkpoint is held.

    Args:
      folder: holds `config.json` and safetensors files, or PyTorch's `.bin` files. Weights that
        THUDM quantised (`quantization_bit`) are loaded as what they stand for.
      head: one of the architecture's (`lm`, `sequence`, `token` …); by default the one that
        `config.json` names. What another head needs begins random, from `seed`, where the folder
        has none.
      dtype: what the model computes in; `param_dtype`, what it keeps: `dtype` by default.
      mesh: where the parameters lie; one device by default.
      overrides: config fields that replace those of the file (`id2label=…`).

    Raises:
      UserError: for a folder that is missing, damaged, or does not fit the config: missing,
        unexpected or mis-shaped tensors by name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face checkpoint folder is wanted")
    raw = read_json(folder / "config.json")
    architecture = architecture_of(raw, str(folder / "config.json"))
    fields = [field.name for field in dataclasses.fields(architecture.config)]
    if unknown := [name for name in overrides if name not in fields]:
        near = difflib.get_close_matches(unknown[0], [*fields, "dtype", "head", "mesh"], 1)
        raise UserError(f"{unknown[0]!r} is no field of a {architecture.name} config"
                        + (f"; is {near[0]!r} meant?" if near else ""))
    if "num_labels" in overrides:  # the file's names are of other classes
        raw.pop("id2label", None)
    bits = raw.pop("quantization_bit", None) or 0
    config = architecture.config.from_dict({**raw, **overrides})
    named, released = head_of(raw, architecture), Released(folder)
    return assemble(architecture, config, head or named,
                    Dequantised(released, bits) if bits else released, dtype=dtype,
                    param_dtype=param_dtype or dtype, mesh=mesh or make_mesh({"data": 1}),
                    seed=seed, named=named)


def init_model(architecture: Any, config: Any, head: str, *, dtype: Any = jnp.float32,
               param_dtype: Any = None, mesh: Mesh | None = None, seed: int = 0) -> Any:
    """The same model with random weights: truncated at nothing, std `initializer_range`."""
    return assemble(architecture, config, head, None, dtype=dtype, param_dtype=param_dtype or dtype,
                    mesh=mesh or make_mesh({"data": 1}), seed=seed)


def assemble(architecture: Any, config: Any, head: str, released: Source | None, *, dtype: Any,
             param_dtype: Any, mesh: Mesh, seed: int, named: str = "") -> Any:
    """Builds the module abstractly, then fills each parameter from the file or at random.

    `named` is the head of the folder; what another one needs besides begins random.

    Raises:
      UserError: for a head that Hugging Face has no class of, so that none could be exported.
    """
    if architecture.classes and head not in architecture.classes:
        raise UserError(f"{architecture.name} has no head {head!r}; it has "
                        + ", ".join(architecture.classes))

    def build() -> Any:
        return architecture.model(config, head, dtype, rngs=nnx.Rngs(seed))

    model = nnx.eval_shape(build)
    abstract = flat(model)
    table = plain_table(architecture, config, head)
    exact = exact_paths(model)
    kept = {path: jnp.float32 if path in exact else param_dtype for path in abstract}
    random: set[str] = set(abstract)
    if released is not None:
        released = _Plain(released, architecture.plain)
        random = check(released, architecture, config, head, named or head, abstract)
    shardings = {path: sharding(p.get_metadata("axes"), p.get_value().shape, mesh)
                 for path, p in abstract.items()}
    initial: dict[str, jax.Array] = {}
    if random:
        def draw() -> dict[str, jax.Array]:
            drawn = flat(build())
            return {path: drawn[path].get_value().astype(kept[path]) for path in sorted(random)}
        initial = jax.jit(draw, out_shardings={path: shardings[path] for path in random})()
    read = readers(released, table, abstract) if released is not None else {}
    for path, param in abstract.items():
        shape = param.get_value().shape
        param.set_value(initial[path] if path in random else
                        _sharded(shape, shardings[path], read[path], kept[path]))
    nnx.update(model, nnx.from_flat_state(
        [(tuple(path.split(".")), param) for path, param in abstract.items()]))
    return model


class _Plain:
    """The tensors of `released` by their plain names (see `Architecture`)."""

    def __init__(self, released: Source, plain: Callable[[str], str]):
        self.folder, self._released = released.folder, released
        self._names = {plain(name): name for name in released.shapes}
        self.shapes = {name: released.shapes[own] for name, own in self._names.items()}

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return self._released.read(self._names[name], index)


def plain_table(architecture: Any, config: Any, head: str) -> list[Weight]:
    """The weight table with plain names."""
    return [row._replace(name=architecture.plain(row.name))
            for row in architecture.weights(config, head)]


def check(released: Source, architecture: Any, config: Any, head: str, named: str,
          abstract: dict[str, nnx.Param]) -> set[str]:
    """Holds a folder's tensors to the table; returns the parameters that must begin random.

    Those are at most the parameters of `head` that the head which the folder names lacks.

    Raises:
      UserError: listing what is missing, unexpected and mis-shaped.
    """
    tables = {h: plain_table(architecture, config, h)
              for h in {head, named, *architecture.classes}}
    promised = {row.name for row in tables[named] if not row.optional}
    # What other heads have may lie there; it is not read.
    expected = {row.name for table in tables.values() for row in table if not row.stacked}
    faults: list[str] = []
    random: set[str] = set()
    for row in tables[head]:
        if not row.read:
            layers = (abstract[row.paths[0]].get_value().shape if row.paths
                      else (config.num_hidden_layers,))
            expected.update(name for _, name in row.names(layers))
            continue
        for name, shape in tensor_shapes(row, abstract):
            expected.add(name)
            if name not in released.shapes:
                if row.name in promised:
                    faults.append(f"missing: {name} {list(shape)}")
                else:
                    random.update(row.paths)
            elif released.shapes[name] != shape:
                faults.append(f"wrong shape: {name} is {list(released.shapes[name])}, "
                              f"the config wants {list(shape)}")
    ignored = architecture.ignored(config)
    faults += [f"unexpected: {name} {list(shape)}" for name, shape in released.shapes.items()
               if name not in expected and not re.fullmatch(ignored, name)]
    if lacking := sorted(path for row in tables[named] if row.optional for path in row.paths
                         if path in random):
        logging.warning("%s: it holds no %s, which begin random", released.folder,
                        ", ".join(lacking))
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"{released.folder}: the weights do not fit config.json:\n  "
                        + "\n  ".join(faults[:10]) + more)
    return random


def tensor_shapes(row: Weight, parameters: Mapping[str, nnx.Param]
                  ) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The released names and the shape of a row's tensors."""
    shapes = [parameters[path].get_value().shape for path in row.paths]
    parts = [row.released(shape) for shape in shapes]
    for _, name in row.names(shapes[0]):
        yield name, (sum(part[0] for part in parts), *parts[0][1:])


Reader = Callable[[tuple[slice, ...]], np.ndarray]


def readers(released: Source, table: list[Weight], abstract: Mapping[str, nnx.Param]
            ) -> dict[str, Reader]:
    """For each of our parameters, the function that reads any slice of it."""
    sources: dict[str, list[tuple[Weight, int, list[int]]]] = {}
    for row in filter(lambda row: row.read, table):
        sizes = [row.released(abstract[path].get_value().shape)[0] for path in row.paths]
        for which, path in enumerate(row.paths):
            sources.setdefault(path, []).append((row, which, sizes))
    return {path: functools.partial(_read, released, sorted(rows, key=lambda r: r[0].part),
                                    abstract[path].get_value().shape)
            for path, rows in sources.items()}


def _read(released: Source, sources: list[tuple[Weight, int, list[int]]],
          shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one of our parameters, of this whole shape, from the tensors that make it up."""
    stacked, transpose = sources[0][0].stacked, sources[0][0].transpose
    bounds = [slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True)]
    leading, inner = bounds[:stacked], bounds[stacked:]
    outputs, *rest = inner[::-1] if transpose else inner
    names = [dict(row.names(shape)) for row, _, _ in sources]

    def one(place: tuple[int, ...]) -> np.ndarray:
        parts, begins = [], 0
        for (row, which, sizes), name in zip(sources, names, strict=True):
            start, stop = (min(max(at - begins, 0), sizes[which])
                           for at in (outputs.start, outputs.stop))
            begins += sizes[which]
            if start < stop:
                rows, taken = row.rows(which, sizes, start, stop)
                parts.append(released.read(name[place], (rows, *rest))[taken])
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.T if transpose else joined

    if not stacked:
        return one(())
    places = itertools.product(*(range(s.start, s.stop) for s in leading))
    sizes = [s.stop - s.start for s in leading]
    whole = np.stack([one(place) for place in places])
    return whole.reshape(*sizes, *whole.shape[1:])


def _sharded(shape: tuple[int, ...], where: jax.sharding.Sharding, read: Reader, dtype: Any
             ) -> jax.Array:
    parts: dict[Any, np.ndarray] = {}  # the callback runs once a device: replicas share a part

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = read(index).astype(dtype)
        return parts[key]

    return jax.make_array_from_callback(shape, where, part)


def exact_paths(model: Any) -> set[str]:
    """The parameters that stay float32 whatever the others are kept in."""
    table = architecture_of(model.config.to_dict()).weights(model.config, model.head)
    return {path for row in table if row.exact for path in row.paths}


def main_dtype(model: Any) -> np.dtype:
    """What a model's parameters are kept in, but for the few that stay float32."""
    return min((p.get_value().dtype for p in flat(model).values()), key=lambda d: d.itemsize)


def tensors(model: Any, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """The released names and arrays of a model, one at a time, in the order of the table."""
    architecture = architecture_of(model.config.to_dict())
    table = architecture.weights(model.config, model.head)
    main, layers = np.dtype(dtype or main_dtype(model)), (model.config.num_hidden_layers,)
    parameters = flat(model)
    for row in table:
        if row.constant is not None:
            constant = row.constant(main) if callable(row.constant) else row.constant
            yield from ((name, constant) for _, name in row.names(layers))
            continue
        for name, array in named_tensors([row], parameters):
            yield name, array if row.exact or dtype is None else array.astype(dtype)


def named_tensors(table: Iterable[Weight], parameters: Mapping[str, nnx.Param]
                  ) -> Iterator[tuple[str, np.ndarray]]:
    """The released names and arrays of these rows, one at a time."""
    for row in table:
        arrays = [parameters[path].get_value() for path in row.paths]
        for place, name in row.names(arrays[0].shape):
            yield name, row.join([np.asarray(array[place] if place else array)
                                  for array in arrays])


def save_model(model: Any, folder: str | Path, *, dtype: Any = None,
               max_shard_bytes: int = 5 * 10**9, files: dict[str, bytes] | None = None) -> None:
    """Writes a Hugging Face folder: config, weights and `files`; whole or not at all.

    Args:
      model: with adapters merged or none.
      folder: replaced when it is there.
      dtype: of the tensors; the model's own by default.
      files: further files by name (tokenizer, generation config, label names).
    """
    config = model.config.to_dict()
    architecture = architecture_of(config)
    config["architectures"] = [architecture.classes[model.head]]
    with whole_folder(Path(folder)) as partial:
        write_safetensors(partial, tensors(model, dtype), max_shard_bytes)
        config["torch_dtype"] = np.dtype(dtype or main_dtype(model)).name
        (partial / "config.json").write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well.

    Raises:
      UserError: when nothing can be written there, the disk is full for one; or when `folder`
        holds anything else than files of a checkpoint, which would be lost.
    """
    if foreign := _foreign(folder):
        raise UserError(f"{folder}: is there already and is more than a checkpoint folder "
                        f"({foreign}); name another, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        partial.chmod(0o755)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}") from None
    try:
        yield partial
        if folder.exists():  # moved aside first: one of the two is whole at every moment
            old = partial.with_name(partial.name + "-old")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _foreign(folder: Path) -> str:
    """What would be lost if a checkpoint took the folder's place; "" when nothing would."""
    if not folder.is_dir():
        return "a file" if folder.exists() else ""
    names = {entry.name for entry in folder.iterdir()}
    if names and not names & {"config.json", "adapter_config.json"}:
        return "without a config"
    return min((f"with {entry.name}" for entry in folder.iterdir()
                if entry.is_dir() or not _CHECKPOINT.fullmatch(entry.name)), default="")
