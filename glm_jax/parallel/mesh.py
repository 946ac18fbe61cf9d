"""The device mesh and the one table that maps logical axes to it.

Parameters and activations carry logical axis names; `RULES` says which mesh axis each is split
over. A dimension that its mesh axis does not divide is replicated, with a log line.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": "sequence",
    # parameters
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "norm": None,
    "rank": None,
    "labels": None,
}


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
    """Builds the mesh with the axes `AXES`; axes that `sizes` leaves out have size 1.

    At most one size may be -1: it takes the devices that the others leave. With no sizes at all
    every device goes to `data`.

    Raises:
      UserError: for an unknown axis, or when there are not as many devices as asked for.
    """
    sizes = dict(sizes or {"data": -1})
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise UserError(f"mesh: unknown axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise UserError(f"mesh: {name} must be a whole number of devices, not {size!r}")
    shape = [sizes.get(name, 1) for name in AXES]
    devices = jax.devices()
    asked = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size != 1)
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh: sizes must be positive and at most one may be -1, not {asked}")
    if -1 in shape:
        known = -math.prod(shape)
        if len(devices) % known:
            raise UserError(f"mesh: {asked} needs a multiple of {known} devices, "
                            f"there are {len(devices)}")
        shape[shape.index(-1)] = len(devices) // known
    wanted = math.prod(shape)
    if wanted > len(devices):
        raise UserError(
            f"mesh: {asked} needs {wanted} devices, but there are {len(devices)}; lower the sizes "
            f"or, to simulate them on a CPU, set --config.mesh.cpu_devices={wanted}")
    held = {device.process_index for device in devices[:wanted]}
    if len(held) < jax.process_count():
        raise UserError(f"mesh: {asked or 'one device'} lies in {len(held)} of "
                        f"{jax.process_count()} processes; take sizes that reach into all of them")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                         devices=devices[:wanted])


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int],
              gathered: bool = False) -> PartitionSpec:
    """The spec of an array with these logical axes and this shape.

    `axes` may be shorter than `shape`: leading dimensions without a name are stacked layers.
    With `gathered`, parameters are taken whole along `fsdp`, as a layer computes with them.

    Raises:
      ValueError: when two dimensions would lie on one mesh axis.
    """
    names = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    spec: list[tuple[str, ...] | str | None] = []
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        rule = RULES[name] if name else None
        over = tuple(a for a in ((rule,) if isinstance(rule, str) else rule or ())
                     if mesh_shape.get(a, 1) > 1 and not (gathered and a == "fsdp"))
        if used.intersection(over):
            raise ValueError(f"axes {names}: two dimensions on mesh axis {over}")
        ways = math.prod(mesh_shape[a] for a in over)
        if size % ways:
            _log_replicated(name or "", size, over)
            over = ()
        used.update(over)
        spec.append(over[0] if len(over) == 1 else over or None)
    return PartitionSpec(*spec)


@functools.cache
def _log_replicated(name: str, size: int, over: tuple[str, ...]) -> None:
    logging.info("axis %r of size %d is replicated: mesh axes %s do not divide it", name, size,
                 ", ".join(over))


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """`partition` on a concrete mesh."""
    return NamedSharding(mesh, partition(axes, shape, mesh.shape))


def constrain(x: jax.Array, *axes: str | None, gathered: bool = False) -> jax.Array:
    """Pins the layout of `x` under the mesh of `jax.set_mesh`; does nothing without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, mesh.shape, gathered))


def put(tree: Any, mesh: Mesh) -> Any:
    """Host arrays `[batch, …]` to the mesh, the batch over the data axes.

    With several processes each gives the same whole batch; a device takes its rows.
    """
    def one(x: Any) -> jax.Array:
        where = sharding(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    return jax.tree.map(one, tree)


def data_ways(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def use_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """A context in which `constrain` pins to the mesh that the arrays of `tree` lie on."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else nullcontext()
    return nullcontext()
