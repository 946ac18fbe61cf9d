"""A parameter of ours in a folder or a model, and the released tensors that are made of them.

What joins and parts them is the weight table's (`models.weights`); here is what reads and plans.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax import nnx

from glm_jax.convert.released import Index, all_finite
from glm_jax.convert.written import Tensor
from glm_jax.errors import UserError
from glm_jax.models.weights import Weight
from glm_jax.parallel.mesh import on_host


class Source(Protocol):
    """Tensors by name: `Released`, `Dequantised`, or one of them under other names."""

    @property
    def folder(self) -> Path: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def dtypes(self) -> Mapping[str, np.dtype]: ...
    def read(self, name: str, index: Index = ()) -> np.ndarray: ...


class Parameter(Protocol):
    """One of our parameters, of a model or in a folder."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def dtype(self, place: tuple[int, ...]) -> np.dtype: ...
    def at(self, place: tuple[int, ...]) -> np.ndarray:
        """What lies at a place of the stack: a layer's, or a layer's expert's; else all."""


def flat(model: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter of a model by its dotted path."""
    state = nnx.state(model, nnx.Param)
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}


def tensor_shapes(row: Weight, parameters: Mapping[str, nnx.Param]
                  ) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The released names and the shape of a row's tensors."""
    shapes = [parameters[path].get_value().shape for path in row.paths]
    for _, name in row.names(shapes[0]):
        yield name, row.tensor(shapes)


def check_tensors(released: Source, wanted: Mapping[str, tuple[int, ...]], trouble: str,
                  whose: str, known: Callable[[str], bool] = lambda name: False) -> None:
    """Holds the tensors of a folder to the wanted names and shapes.

    Raises:
      UserError: `trouble`, and each tensor that is missing, mis-shaped, of whole numbers, or
        neither wanted nor `known`.
    """
    faults = []
    for name, shape in wanted.items():
        if name not in released.shapes:
            faults.append(f"missing: {name} {list(shape)}")
        elif released.shapes[name] != shape:
            faults.append(f"wrong shape: {name} is {list(released.shapes[name])}, {whose} "
                          f"{list(shape)}")
        elif released.dtypes[name].kind not in "fV":  # V: bfloat16 and float8
            faults.append(f"no floating-point numbers: {name} is {released.dtypes[name]}")
    faults += [f"unexpected: {name} {list(shape)}" for name, shape in released.shapes.items()
               if name not in wanted and not known(name)]
    if faults:
        more = f"\n  … and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"{released.folder}: {trouble}:\n  " + "\n  ".join(faults[:10]) + more)


def readers(released: Source, table: list[Weight], abstract: Mapping[str, nnx.Param]
            ) -> dict[str, "Stored"]:
    """Each of our parameters as it lies in the folder."""
    found = {}
    for row in filter(lambda row: row.read, table):
        shapes = [abstract[path].get_value().shape for path in row.paths]
        sizes = [row.released(shape)[0] for shape in shapes]
        for which, (path, shape) in enumerate(zip(row.paths, shapes, strict=True)):
            found[path] = Stored(released, row, which, sizes, shape)
    return found


class Stored:
    """One of our parameters in a folder: any slice is read from the tensors that hold it.

    Attributes:
      stacked: how many of its leading axes are layers and experts.
    """

    def __init__(self, released: Source, row: Weight, which: int, sizes: list[int],
                 shape: tuple[int, ...]):
        self.shape, self.stacked = shape, row.stacked
        self._released, self._row, self._which, self._sizes = released, row, which, sizes
        self._names = dict(row.names(shape))

    @property
    def names(self) -> set[str]:
        """The names of all tensors that hold it."""
        return set(self._names.values())

    @property
    def dtypes(self) -> set[np.dtype]:
        """What the file keeps them in."""
        return {self._released.dtypes[name] for name in self.names}

    def dtype(self, place: tuple[int, ...]) -> np.dtype:
        """What the file keeps it in there."""
        return self._released.dtypes[self._names[place]]

    def at(self, place: tuple[int, ...]) -> np.ndarray:
        return self._one(place, tuple(map(slice, self.shape[self.stacked:])))

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the whole parameter, stacked."""
        bounds = [slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)]
        leading, inner = bounds[:self.stacked], tuple(bounds[self.stacked:])
        places = itertools.product(*(range(s.start, s.stop) for s in leading))
        if not self.stacked:
            return self._one((), inner)
        sizes = [s.stop - s.start for s in leading]
        whole = np.stack([self._one(place, inner) for place in places])
        return whole.reshape(*sizes, *whole.shape[1:])

    def _one(self, place: tuple[int, ...], inner: tuple[slice, ...]) -> np.ndarray:
        row, which = self._row, self._which
        outputs, *rest = inner[::-1] if row.transpose else inner
        start, stop, _ = outputs.indices(self._sizes[which])
        rows = row.rows(which, self._sizes, start, stop)
        array = self._released.read(self._names[place], (rows, *rest))
        return array.T if row.transpose else array


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


class Held:
    """One of a model's parameters."""

    def __init__(self, param: nnx.Param):
        self._array = param.get_value()
        self.shape = self._array.shape

    def dtype(self, place: tuple[int, ...]) -> np.dtype:
        return self._array.dtype

    def at(self, place: tuple[int, ...]) -> np.ndarray:
        return on_host(self._array[place] if place else self._array)


def held(model: nnx.Module) -> dict[str, Held]:
    """Every parameter of a model by its dotted path, to be written."""
    return {path: Held(param) for path, param in flat(model).items()}


def planned(table: Iterable[Weight], parameters: Mapping[str, Parameter], dtype: Any,
            main: Any = None, layers: int = 0) -> list[Tensor]:
    """The released tensors of these rows, yet to be made.

    Args:
      parameters: by path; rows of those that are not there are left out.
      dtype: of all but those that stay float32; None: each parameter's own.
      main: what constants are made for, one a layer.
    """
    out = []
    for row in table:
        if row.constant is not None:
            array = row.constant(main)
            out += [Tensor(name, array.shape, array.dtype, functools.partial(np.asarray, array))
                    for _, name in row.names((layers,))]
            continue
        parts = [parameters[path] for path in row.paths if path in parameters]
        for place, name in row.names(parts[0].shape if parts else (0,) * row.stacked):
            kind = _common(part.dtype(place) for part in parts)
            kind = np.dtype((np.float32 if row.exact else dtype) if dtype else kind)
            out.append(Tensor(name, row.tensor([part.shape for part in parts]), kind,
                              functools.partial(_make, row, parts, place, kind, name)))
    return out


def _make(row: Weight, parts: Sequence[Parameter], place: tuple[int, ...], dtype: np.dtype,
          name: str) -> np.ndarray:
    return cast(row.join([part.at(place) for part in parts]), dtype, name)


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """`array` in another dtype, itself where it has it.

    Raises:
      UserError: where a number becomes infinite by it.
    """
    with np.errstate(over="ignore"):
        out = array.astype(dtype, copy=False)
    if out is not array and not all_finite(out) and all_finite(array):
        raise UserError(f"{name}: {np.abs(array).max():.3g} is too large for {out.dtype}; take "
                        "bfloat16 or float32")
    return out
