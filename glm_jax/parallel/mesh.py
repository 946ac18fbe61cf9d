"""The device mesh and the one table that maps logical axes to it.

Parameters and activations carry logical axis names; `RULES` says which mesh axes each is split
over. A dimension that its mesh axes do not divide is split over the first of them that do, or
replicated, with a log line. A name may carry the size of blocks that are never cut:
`heads:128` is split only between heads of 128 features.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

Rules = Mapping[str, str | Sequence[str] | None]

# Axes that split activations' batch or length hold different tokens: parameters may be stored
# split over them, and are gathered where a layer computes. Experts lie on `expert` by number.
RULES: Rules = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "sequence", "expert"),
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "experts_embed": ("fsdp", "sequence"),
    "norm": None,
    "rank": None,
    "labels": None,
}
# What `use_rules` puts in place of rows of it. Part of what jitted functions are cached by.
_OVERRIDES = jax.make_user_context(())


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None
              ) -> Mesh:
    """Builds the mesh with the axes `AXES`; axes that `sizes` leaves out have size 1.

    At most one size may be -1: it takes the devices that the others leave. With no sizes at all
    every device goes to `data`. The devices are ordered by their topology: neighbours on an axis
    are neighbours in the torus. Between slices (TPU multislice, GPU hosts) the network is slow:
    only `data` reaches across them, and `fsdp` where `data` is too small.

    Args:
      sizes: by axis.
      devices: all of JAX's by default; or those of a topology that is compiled for.

    Raises:
      UserError: for an unknown axis, when there are not as many devices as asked for, or when
        they can't be laid out so.
    """
    ours, devices = devices is None, list(jax.devices() if devices is None else devices)
    shape, asked = _shape(sizes, len(devices), ours)
    wanted = math.prod(shape)
    if wanted > len(devices):
        raise UserError(
            f"mesh: {asked} needs {wanted} devices, but there are {len(devices)}; "
            f"{_remedy(wanted, ours)}")
    devices = devices[:wanted]
    held = {device.process_index for device in devices}
    if ours and len(held) < jax.process_count():
        raise UserError(f"mesh: {asked or 'one device'} lies in {len(held)} of "
                        f"{jax.process_count()} processes; take sizes that reach into all of them")
    return Mesh(_arranged(shape, devices, asked), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes: Mapping[str, int] | None, count: int, slices: int = 1) -> AbstractMesh:
    """A mesh of so many devices that are nowhere: for shapes and shardings, by which it plans.

    Raises:
      UserError: as `make_mesh` on as many devices in so many slices.
    """
    shape, asked = _shape(sizes, count, ours=False)
    if math.prod(shape) == count:  # else the planner says what is wrong with it
        across_slices(dict(zip(AXES, shape, strict=True)), slices, asked)
    return AbstractMesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def across_slices(sizes: Mapping[str, int], slices: int, asked: str = "") -> dict[str, int]:
    """Over how many slices each axis of a mesh reaches; the network between them is slow.

    Raises:
      UserError: where `data` and `fsdp` together can't reach all of them.
    """
    across, left = dict.fromkeys(AXES, 1), slices
    for axis in ("data", "fsdp"):
        across[axis] = math.gcd(sizes[axis], left)
        left //= across[axis]
    if left > 1:
        raise UserError(f"mesh: {asked or 'one device'} on {slices} slices (of GPUs: hosts): "
                        f"data × fsdp must be a multiple of {slices}, for no other axis may reach "
                        "across")
    return across


def _shape(sizes: Mapping[str, int] | None, count: int, ours: bool) -> tuple[list[int], str]:
    """The size of each of `AXES` with so many devices, and how a message names what was asked."""
    sizes = dict(sizes or {"data": -1})
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise UserError(f"mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise UserError(f"mesh: {name} must be a whole number of devices, not {size!r}")
    shape = [sizes.get(name, 1) for name in AXES]
    asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size != 1)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh: sizes must be positive and at most one may be -1, not {asked}")
    if -1 in shape:
        known = -math.prod(shape)
        if count % known:
            raise UserError(f"mesh: {asked} needs a multiple of {known} devices, "
                            f"there are {count}; {_remedy(known, ours)}")
        shape[shape.index(-1)] = count // known
    return shape, asked


def _remedy(count: int, ours: bool) -> str:
    return "lower the sizes" + (
        f" or simulate {count} on a CPU: --config.mesh.cpu_devices={count}, or in a program "
        f"jax.config.update('jax_num_cpu_devices', {count}) before all else" if ours else "")


def _arranged(shape: Sequence[int], devices: Sequence[Any], asked: str) -> np.ndarray:
    """The devices in an array of this shape, by topology."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = list(across_slices(dict(zip(AXES, shape, strict=True)), slices, asked).values())
    inside = [size // over for size, over in zip(shape, across, strict=True)]
    if across[1] > 1:
        logging.info("mesh axis 'fsdp' reaches across slices: its gathers take the slow network")
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(inside, across, devices,
                                                    allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise UserError(f"mesh: {asked} does not fit the devices' topology: {error}") from None


def use_rules(overrides: Rules) -> AbstractContextManager[Any]:
    """A context in which these rows replace those of `RULES`, for loading and for tracing.

    Raises:
      UserError: for an unknown logical or mesh axis.
    """
    for name, over in overrides.items():
        if name not in RULES:
            raise UserError(f"mesh.rules: {name!r} is no axis of an array; those are "
                            + ", ".join(RULES))
        if not isinstance(over, str | list | tuple | None) or set(_tuple(over)) - set(AXES):
            raise UserError(f"mesh.rules.{name}={over!r}: some axes of the mesh, or None; those "
                            f"are {', '.join(AXES)}")
    return _OVERRIDES(tuple((name, _tuple(over)) for name, over in sorted(overrides.items())))


def _tuple(over: str | Sequence[str] | None) -> tuple[str, ...]:
    return (over,) if isinstance(over, str) else tuple(over or ())


def _entry(over: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """These mesh axes as a `PartitionSpec` has them."""
    return over[0] if len(over) == 1 else over or None


def _rule(name: str, spread: bool = False) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over."""
    axes = _tuple(dict(_OVERRIDES.value).get(name, RULES[name]))
    if not spread or name not in ("batch", "length", "vocab"):
        return axes
    stored = [a for a in _rule("embed") if a in (*_rule("batch"), *_rule("length"))]
    if name == "vocab":
        return (*axes, *stored)
    return tuple(a for a in axes if a not in stored)


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int],
              gathered: bool = False, spread: bool = False) -> PartitionSpec:
    """The spec of an array with these logical axes and this shape.

    `axes` may be shorter than `shape`: leading dimensions without a name are stacked layers.
    With `gathered`, parameters are taken whole along the axes that split tokens, as a layer
    computes with them. `spread` is the opposite, for a table that is larger than the tokens: these
    are taken whole along the axes that parameters are stored over, and the vocabulary is split
    over those too.

    Raises:
      UserError: when two dimensions would lie on one mesh axis.
    """
    names = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    whole = (*_rule("batch"), *_rule("length")) if gathered else ()
    spec: list[tuple[str, ...] | str | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(names, shape, strict=True):
        name, _, block = (axis or "").partition(":")
        asked = tuple(a for a in (_rule(name, spread) if name else ())
                      if mesh_shape.get(a, 1) > 1 and a not in whole)
        for a in asked:
            if a in used:
                raise UserError(f"mesh.rules: {used[a]!r} and {name!r} both lie on mesh axis {a!r},"
                                f" but there are arrays with both: {names}")
            used[a] = name
        unit, over = int(block or 1), asked
        parts = 1 if size % unit else size // unit
        while parts % math.prod(mesh_shape[a] for a in over):
            over = over[:-1]
        if over != asked:
            _log_replicated(axis or "", size, asked, over)
        spec.append(_entry(over))
    return PartitionSpec(*spec)


@functools.cache
def _log_replicated(axis: str, size: int, asked: tuple[str, ...], over: tuple[str, ...]) -> None:
    logging.info("axis %r of size %d is %s: mesh axes %s do not divide it", axis, size,
                 f"split over {', '.join(over)} only" if over else "replicated", ", ".join(asked))


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
             ) -> NamedSharding:
    """`partition` on a mesh."""
    return NamedSharding(mesh, partition(axes, shape, mesh.shape))


def constrain(x: jax.Array, *axes: str | None, gathered: bool = False, spread: bool = False
              ) -> jax.Array:
    """Pins the layout of `x` under the mesh of `jax.set_mesh`; does nothing without one.

    What is `gathered` has its derivative pinned to where it lies: so the sum over devices goes to
    each in parts, where all would get it whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    if gathered and len(stages := _stages(axes, x.shape, mesh.shape)) > 1:
        return _gather(stages, x)
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh.shape, spread=spread))


def _stages(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]
            ) -> tuple[PartitionSpec, ...]:
    """From where a parameter lies to where it is gathered, a mesh axis at a time, the last first.

    Over three sides of a torus of 4x4x4 at once a TPU's compiler gathers by an all-reduce, which
    sends twice as much (github.com/pytorch/xla/pull/6528), and sums gradients whole; not so over
    one side or two.
    """
    lies = partition(axes, shape, mesh_shape)
    whole = partition(axes, shape, mesh_shape, gathered=True)
    stages = [lies]
    for dimension, kept in enumerate(whole):
        over = _tuple(lies[dimension])
        for axis in reversed([a for a in over if a not in _tuple(kept)]):
            over = tuple(a for a in over if a != axis)
            stages.append(PartitionSpec(*stages[-1][:dimension], _entry(over),
                                        *stages[-1][dimension + 1:]))
    return tuple(stages) if stages[-1] == whole else (*stages, whole)


def _along(stages: tuple[PartitionSpec, ...], x: jax.Array) -> jax.Array:
    for stage in stages[1:]:
        x = jax.lax.with_sharding_constraint(x, stage)
    return x


_gather = jax.custom_vjp(_along, nondiff_argnums=(0,))


def _scatter(stages: tuple[PartitionSpec, ...], _: None, dx: jax.Array) -> tuple[jax.Array]:
    # What is split along its last dimension a TPU's compiler sums whole, and cuts afterwards.
    split = [d for d in range(dx.ndim) if stages[0][d] != stages[-1][d]]
    order = (*split, *(d for d in range(dx.ndim) if d not in split))
    dx = jnp.transpose(dx, order)
    for stage in reversed(stages[:-1]):
        dx = jax.lax.with_sharding_constraint(dx, PartitionSpec(*(stage[d] for d in order)))
    return (jnp.moveaxis(dx, range(dx.ndim), order),)


# Not by `_gather` itself: what a layer keeps (`nn.compute`) is chosen by primitive.
_gather.defvjp(lambda stages, x: (_along(stages, x), None), _scatter)


def platform() -> str:
    """Of the mesh of `jax.set_mesh`: cpu, gpu or tpu; cpu without one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else str(device.platform)


def ways(name: str, size: int = 0, spread: bool = False) -> int:
    """Into how many parts the mesh of `jax.set_mesh` cuts a logical axis of this size.

    Of size 0: one that all its mesh axes divide.
    """
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(mesh_shape[axis] for axis in split_over(name, size, spread=spread))


def split_over(name: str, size: int, gathered: bool = False, spread: bool = False
               ) -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh` that a logical axis of this size is split over."""
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    return _tuple(partition((name,), (size,), mesh_shape, gathered, spread)[0])


def put(tree: Any, mesh: Mesh) -> Any:
    """Host arrays `[batch, …]` to the mesh, the batch over the data axes.

    With several processes each gives batches of the same size; a device takes its rows.
    """
    def one(x: Any) -> jax.Array:
        where = sharding(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    return jax.tree.map(one, tree)


def on_host(array: Any) -> np.ndarray:
    """An array whole, also one that lies in parts in several processes; by all of them."""
    if not getattr(array, "is_fully_addressable", True):  # NumPy's are
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def own_rows(rows: int, mesh: Mesh) -> frozenset[int]:
    """Which rows of a batch lie on devices of this process."""
    places = sharding(("batch",), (rows,), mesh).addressable_devices_indices_map((rows,))
    return frozenset(row for place in places.values() if place for row in range(rows)[place[0]])


def data_sizes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The sizes of the axes that the rows of a batch are split over."""
    return {axis: mesh.shape[axis] for axis in _rule("batch")}


def data_ways(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(data_sizes(mesh).values())


def use_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """A context in which `constrain` pins to the mesh that the arrays of `tree` lie on."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else nullcontext()
    return nullcontext()
