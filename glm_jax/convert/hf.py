"""Hugging Face folders: a model from one, streamed into sharded arrays, and one from a model.

And one folder from another, tensor by tensor, with no model between them.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh

from glm_jax.convert.parameters import (
    Source,
    Stored,
    cast,
    check_tensors,
    flat,
    held,
    planned,
    readers,
    tensor_shapes,
)
from glm_jax.convert.released import Dequantised, Index, Released, inside, read_json
from glm_jax.convert.renamed import renamed_config
from glm_jax.convert.written import Tensor, whole_folder, write_safetensors
from glm_jax.errors import FETCH, UserError
from glm_jax.models import Architecture, architecture_of, head_of
from glm_jax.models.weights import Weight
from glm_jax.parallel.mesh import make_mesh, sharding

SHARD_BYTES = 5 * 10**9  # of a file, as Hugging Face has it
_AT_ONCE = 2**26  # bytes of a stack's layers that are read together


class Folder(NamedTuple):
    """What a Hugging Face folder says of itself, and its tensors by their plain names.

    Attributes:
      head: the one wanted; `named`, the one that `config.json` names.
      bits: of its quantised weights; 0 where they are not.
    """

    architecture: Architecture
    config: Any
    head: str
    named: str
    source: Source
    bits: int


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
    found = open_folder(folder, head, **overrides)
    return assemble(found.architecture, found.config, found.head, found.source, dtype=dtype,
                    param_dtype=param_dtype or dtype, mesh=mesh or make_mesh({"data": 1}),
                    seed=seed, named=found.named)


def open_folder(folder: str | Path, head: str | None = None, **overrides: Any) -> Folder:
    """Reads the config of a folder and the names, shapes and types of its tensors, not these.

    Args and errors are those of `load_model`, but for what a tensor's shape should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a Hugging Face checkpoint folder is wanted. "
                        f"{FETCH}")
    raw = read_json(inside(folder, "config.json"))
    architecture = architecture_of(raw, str(folder / "config.json"))
    fields = [field.name for field in dataclasses.fields(architecture.config)]
    if unknown := [name for name in overrides if name not in fields]:
        near = difflib.get_close_matches(unknown[0], [*fields, "dtype", "head", "mesh"], 1)
        raise UserError(f"{unknown[0]!r} is no field of a {architecture.name} config"
                        + (f"; is {near[0]!r} meant?" if near else ""))
    if "num_labels" in overrides:  # the file's names are of other classes
        raw.pop("id2label", None)
    if raw.get("quantization_config"):
        raise UserError(f"{folder / 'config.json'}: quantization_config is not supported, only "
                        "THUDM's quantization_bit: take the folder that is not quantised")
    bits = raw.pop("quantization_bit", None) or 0
    config = architecture.config.from_dict({**raw, **overrides})
    named, released = head_of(raw, architecture), Released(folder)
    return Folder(architecture, config, head or named, named,
                  _Plain(Dequantised(released, bits) if bits else released, architecture.plain),
                  bits)


def init_model(architecture: Any, config: Any, head: str, *, dtype: Any = jnp.float32,
               param_dtype: Any = None, mesh: Mesh | None = None, seed: int = 0,
               abstract: bool = False) -> Any:
    """The same model with random weights: truncated at nothing, std `initializer_range`.

    With `abstract` it has none: in their place stand `jax.ShapeDtypeStruct`s with shardings, from
    which a step can be compiled for devices that are not there.
    """
    return assemble(architecture, config, head, None, dtype=dtype, param_dtype=param_dtype or dtype,
                    mesh=mesh or make_mesh({"data": 1}), seed=seed, abstract=abstract)


def assemble(architecture: Any, config: Any, head: str, released: Source | None, *, dtype: Any,
             param_dtype: Any, mesh: Mesh, seed: int, named: str = "", abstract: bool = False
             ) -> Any:
    """Builds the module abstractly, then fills each parameter from the file or at random.

    `named` is the head of the folder; what another one needs besides begins random. `abstract` is
    that of `init_model`.

    Raises:
      UserError: for a head that Hugging Face has no class of, so that none could be exported.
    """
    if architecture.classes and head not in architecture.classes:
        raise UserError(f"{architecture.name} has no head {head!r}; it has "
                        + ", ".join(architecture.classes))

    def build() -> Any:
        return architecture.model(config, head, dtype, rngs=nnx.Rngs(seed))

    model = nnx.eval_shape(build)
    params = flat(model)
    table = plain_table(architecture, config, head)
    exact = exact_paths(model)
    kept = {path: jnp.float32 if path in exact else param_dtype for path in params}
    random: set[str] = set(params)
    if released is not None:
        random = check(released, architecture, config, head, named or head, params)
    shardings = {path: sharding(p.get_metadata("axes"), p.get_value().shape, mesh)
                 for path, p in params.items()}
    initial: dict[str, Any] = {}
    if abstract:
        initial = {path: jax.ShapeDtypeStruct(p.get_value().shape, kept[path],
                                              sharding=shardings[path])
                   for path, p in params.items()}
    elif random:
        def draw() -> dict[str, jax.Array]:
            drawn = flat(build())
            return {path: drawn[path].get_value().astype(kept[path]) for path in sorted(random)}
        initial = jax.jit(draw, out_shardings={path: shardings[path] for path in random})()
    read = readers(released, table, params) if released is not None else {}
    for path, param in params.items():
        param.set_value(initial[path] if path in random else
                        _sharded(read[path], shardings[path], kept[path]))
    nnx.update(model, nnx.from_flat_state(
        [(tuple(path.split(".")), param) for path, param in params.items()]))
    return model


class _Plain:
    """The tensors of `released` by their plain names (see `Architecture`)."""

    def __init__(self, released: Source, plain: Callable[[str], str]):
        self.folder, self._released = released.folder, released
        self._names = {plain(name): name for name in released.shapes}
        self.shapes = {name: released.shapes[own] for name, own in self._names.items()}
        self.dtypes = {name: released.dtypes[own] for name, own in self._names.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
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
    wanted: dict[str, tuple[int, ...]] = {}
    random: set[str] = set()
    for row in tables[head]:
        stack = (abstract[row.paths[0]].get_value().shape if row.paths
                 else (config.num_hidden_layers,))[:row.stacked]
        if math.prod(stack) > len(released.shapes) + 10:  # whatever a config claims: none is listed
            raise UserError(f"{released.folder}: the weights do not fit config.json: it wants "
                            f"{math.prod(stack)} {row.name}, but there are only "
                            f"{len(released.shapes)} tensors")
        if not row.read:
            expected.update(name for _, name in row.names(stack))
            continue
        for name, shape in tensor_shapes(row, abstract):
            if name in released.shapes or row.name in promised:
                wanted[name] = shape
            else:
                random.update(row.paths)
    if lacking := sorted(path for row in tables[named] if row.optional for path in row.paths
                         if path in random):  # an adapter that is loaded next may have them
        logging.info("%s: it holds no %s, which begin random", released.folder, ", ".join(lacking))
    ignored = architecture.ignored(config)
    check_tensors(released, wanted, "the weights do not fit config.json", "the config wants",
                  lambda name: name in expected or re.fullmatch(ignored, name) is not None)
    return random


def _sharded(stored: Stored, where: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    """A parameter on its devices, a few layers at a time: each process reads what its devices hold.
    """
    shape = stored.shape
    size = math.prod(where.shard_shape(shape)) * len(where.addressable_devices)
    size *= jnp.dtype(dtype).itemsize
    count = max(shape[0] * _AT_ONCE // max(size, 1), 1) if stored.stacked else shape[0]

    def layers(first: int) -> jax.Array:
        parts: dict[Any, np.ndarray] = {}  # the callback runs once a device: replicas share a part

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            key = tuple(s.indices(n)[:2] for s, n in zip(index or (), some, strict=True))
            if key not in parts:
                (start, stop), *rest = key
                own = ((first + start, first + stop), *rest)
                parts[key] = cast(stored(tuple(slice(*s) for s in own)), dtype, min(stored.names))
            return parts[key]

        some = (min(count, shape[0] - first), *shape[1:])
        return jax.make_array_from_callback(some, where, part)

    if count >= shape[0]:
        return layers(0)
    whole = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=where)()
    put = jax.jit(lambda whole, some, first: jax.lax.dynamic_update_slice_in_dim(
        whole, some, first, 0), donate_argnums=0, out_shardings=where)
    for first in range(0, shape[0], count):
        whole = put(whole, layers(first), first)
    return whole


def exact_paths(model: Any) -> set[str]:
    """The parameters that stay float32 whatever the others are kept in."""
    table = architecture_of(model.config.to_dict()).weights(model.config, model.head)
    return {path for row in table if row.exact for path in row.paths}


def tensors(model: Any, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """The released names and arrays of a model, one at a time, in the order of the table."""
    return ((tensor.name, tensor.make()) for tensor in model_conversion(model, dtype).tensors)


def save_model(model: Any, folder: str | Path, *, dtype: Any = None,
               max_shard_bytes: int = SHARD_BYTES, files: Mapping[str, bytes] | None = None,
               wrote: Callable[[Tensor], None] = lambda tensor: None) -> None:
    """Writes a Hugging Face folder: config, weights and `files`; whole or not at all.

    Args:
      model: with adapters merged or none.
      folder: replaced when it is there.
      dtype: of the tensors; the model's own by default.
      files: further files by name (tokenizer, generation config, label names).
      wrote: called behind each tensor.
    """
    model_conversion(model, dtype).write(folder, max_shard_bytes, files, wrote)


class Conversion(NamedTuple):
    """A folder that is yet to be written.

    Attributes:
      dtype: what its config calls that of its weights.
      source: the architecture of what it comes from.
      unused: the tensors of the folder that it comes from which no model reads.
    """

    config: Any
    head: str
    dtype: np.dtype
    tensors: list[Tensor]
    source: str
    unused: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        return architecture_of(self.config.to_dict()).name

    def write(self, folder: str | Path, max_shard_bytes: int = SHARD_BYTES,
              files: Mapping[str, bytes] | None = None,
              wrote: Callable[[Tensor], None] = lambda tensor: None) -> None:
        """Makes and writes one tensor after the other; see `save_model`."""
        config = self.config.to_dict()
        config["architectures"] = [architecture_of(config).classes[self.head]]
        config["torch_dtype"] = self.dtype.name
        with whole_folder(Path(folder)) as partial:
            write_safetensors(partial, self.tensors, max_shard_bytes, wrote)
            (partial / "config.json").write_text(
                json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
            for name, content in (files or {}).items():
                (partial / name).write_bytes(content)


def model_conversion(model: Any, dtype: Any = None) -> Conversion:
    """A model as a folder that is yet to be written; see `save_model`."""
    architecture, parameters = architecture_of(model.config.to_dict()), held(model)
    kept = min((one.dtype(()) for one in parameters.values()), key=lambda kind: kind.itemsize)
    main = np.dtype(dtype or kept)  # a few stay float32
    made = planned(architecture.weights(model.config, model.head), parameters, dtype, main,
                   model.config.num_hidden_layers)
    return Conversion(model.config, model.head, main, made, architecture.name)


def stored(found: Folder) -> dict[str, Stored]:
    """The parameters of a folder's model by path, without those that it leaves to be random.

    Raises:
      UserError: listing what is missing, unexpected and mis-shaped.
    """
    architecture, config, head = found.architecture, found.config, found.head
    abstract = flat(nnx.eval_shape(
        lambda: architecture.model(config, head, jnp.float32, rngs=nnx.Rngs(0))))
    random = check(found.source, architecture, config, head, found.named, abstract)
    read = readers(found.source, plain_table(architecture, config, head), abstract)
    return {path: one for path, one in read.items() if path not in random}


def conversion(folder: str | Path, architecture: str | None = None, dtype: Any = None
               ) -> Conversion:
    """A folder's model in another form, to be written without ever being whole in memory.

    Args:
      architecture: as which it is written (see `renamed_config`); its own by default.
      dtype: each tensor's own by default; float32 where the folder is quantised.

    Raises:
      UserError: as `load_model` does, and where the other architecture does not compute the same.
    """
    found = open_folder(folder)
    config, parameters = found.config, stored(found)
    if architecture is not None:
        config = renamed_config(config, found.head, architecture)
    dtypes = {kind for one in parameters.values() for kind in one.dtypes}
    dtype = np.dtype(dtype or np.float32) if dtype or found.bits else None
    main = dtype or min(dtypes, key=lambda kind: (kind.itemsize, kind.name))

    def made(table: list[Weight], config: Any) -> list[Tensor]:
        return planned(table, parameters, dtype, main, config.num_hidden_layers)

    read = {name for one in parameters.values() for name in one.names}
    again = {tensor.name for tensor in made(plain_table(*found[:3]), found.config)}
    return Conversion(config, found.head, main,
                      made(architecture_of(config.to_dict()).weights(config, found.head), config),
                      found.architecture.name,
                      tuple(sorted(found.source.shapes.keys() - read - again)))
