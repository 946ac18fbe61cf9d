"""The moments of an optimizer in fewer bytes: bfloat16, or 8 bits in blocks (arXiv:2110.02861)."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SMALLEST = 4096  # matrices of fewer numbers keep their moments in float32, as bitsandbytes does


class Blocks(NamedTuple):
    """A moment in 8 bits, block by block.

    A block is a tile of the matrix, not 256 numbers in a row: so the codes lie on the mesh as the
    parameter does and no block is cut, whichever of its axes is split.

    Attributes:
      codes: uint8, of the matrix's shape.
      scale: float32 `[rows / tile, columns / tile]`, the largest magnitude in each block.
    """

    codes: jax.Array
    scale: jax.Array


def compact(inner: optax.GradientTransformation, dtype: str, path: str
            ) -> optax.GradientTransformationExtraArgs:
    """`inner`, of one array, its moments kept in `dtype`; it computes in float32 all the same.

    To bfloat16 is rounded at random in proportion to the distance: to the nearest, a mean that
    moves by a thousandth a step would stand still. The chance is each parameter's own, by `path`
    and `update`'s number of the `layer` in a stack. To int8 is rounded as in the paper.
    The state of `inner` has a `count`; its second moment is called `nu` and never negative.
    """
    def pack(state: Any, layer: Any = 0) -> Any:
        def one(name: tuple[Any, ...], x: jax.Array) -> Any:
            if x.ndim < 2 or x.size < SMALLEST:
                return x
            signed = name[-1].name != "nu"
            if dtype == "int8":
                return encode(x, signed)
            key = jax.random.key(zlib.crc32(path.encode()))
            for number in (signed, layer, state.count):
                key = jax.random.fold_in(key, number)
            return round_at_random(x, key)
        return state if dtype == "float32" else jax.tree_util.tree_map_with_path(one, state)

    def unpack(state: Any) -> Any:
        def one(name: tuple[Any, ...], x: Any) -> jax.Array:
            if isinstance(x, Blocks):
                return decode(x, signed=name[-1].name != "nu")
            return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
        return jax.tree_util.tree_map_with_path(one, state,
                                                is_leaf=lambda x: isinstance(x, Blocks))

    def update(grads: Any, state: Any, params: Any = None, *, layer: Any = 0, **others: Any
               ) -> tuple[Any, Any]:
        updates, state = inner.update(grads, unpack(state), params)
        return updates, pack(state, layer)

    return optax.GradientTransformationExtraArgs(lambda x: pack(inner.init(x)), update)


def is_large(x: Any) -> bool:
    """Whether a leaf of an optimizer's state is worth the way to the host's memory."""
    return bool(x.ndim > 1 and x.size >= SMALLEST)


class Skipping(optax.GradientTransformationExtraArgs):
    """A transformation whose state stays as it is where `update`'s `fine` is false."""


def skipping(transformation: optax.GradientTransformation) -> Skipping:
    """`transformation`; one that does not skip by itself gets a choice of states behind it."""
    if isinstance(transformation, Skipping):
        return transformation
    plain = optax.with_extra_args_support(transformation)

    def update(grads: Any, state: Any, params: Any = None, *, fine: Any = True, **others: Any
               ) -> tuple[Any, Any]:
        updates, new = plain.update(grads, state, params, **others)
        return updates, optax.tree.where(fine, new, state)

    return Skipping(plain.init, update)


def chain(*transformations: optax.GradientTransformation) -> Skipping:
    """`optax.chain`, each part of which skips."""
    return Skipping(*optax.chain(*map(skipping, transformations)))


def each_layer(of: Callable[[str], optax.GradientTransformation], axes: Callable[[str], int],
               offload: bool = False) -> Skipping:
    """Each parameter of a dict by a transformation of its own, in a stack each layer by itself.

    Layers are taken one after another, since only some steps of a transformation are fused by XLA:
    what lies between them is then a layer's size, not the model's. Each layer's update is written
    over its gradient, its new state over the old: else a GPU holds all of them twice.

    Args:
      of: the transformation for the parameter of this path; `update` is told which `layer` it is.
      axes: how many axes a layer's own array has; those before it are of stacks.
      offload: the large leaves of the state lie in the host's memory, and come a layer at a time.
    """
    def of_a_layer(call: Callable[..., Any], stacked: int) -> Callable[..., Any]:
        for _ in range(stacked - 1):  # its experts
            call = jax.vmap(call)
        return call

    def init(params: Any) -> Any:
        def one(path: str, x: jax.Array) -> Any:
            stacked = x.ndim - axes(path)
            call = of_a_layer(of(path).init, stacked)
            return jax.lax.map(call, x) if stacked > 0 else call(x)
        return {path: one(path, x) for path, x in params.items()}

    def update(grads: Any, state: Any, params: Any, *, fine: Any = True, **others: Any
               ) -> tuple[Any, Any]:
        here, there = jax.memory.Space.Device, jax.memory.Space.Host

        def one(path: str) -> tuple[Any, Any]:
            both = grads[path], state[path]
            far = False, jax.tree.map(lambda x: offload and is_large(x), state[path])
            own = optax.with_extra_args_support(of(path))

            def move(both: Any, where: Any) -> Any:
                return jax.tree.map(lambda x, far: jax.device_put(x, where) if far else x,
                                    both, far)

            def call(both: Any, param: jax.Array, layer: Any) -> tuple[Any, Any]:
                updates, new = own.update(*both, param, layer=layer)
                return updates, optax.tree.where(fine, new, both[1])

            lead = grads[path].shape[:grads[path].ndim - axes(path)]
            layers = jnp.arange(math.prod(lead)).reshape(lead)
            if not lead:
                return move(call(move(both, here), params[path], layers), there)
            update_layer = of_a_layer(call, len(lead))

            def at(both: Any, index: Any) -> Any:
                return move(jax.tree.map(
                    lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), both),
                    here)

            # A layer is cut out a turn before it is written: XLA copies a stack, all of it and for
            # each layer, where one turn computes from it and writes to it.
            def step(carry: Any, x: tuple[jax.Array, ...]) -> tuple[Any, None]:
                (both, cut), (index, param, layer) = carry, x
                both = jax.tree.map(
                    lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0),
                    both, move(update_layer(cut, param, layer), there))
                return (both, at(both, index + 1)), None  # behind the last is the last again
            xs = jnp.arange(lead[0], dtype=jnp.uint32), params[path], layers
            return jax.lax.scan(step, (both, at(both, 0)), xs)[0][0]
        found = {path: one(path) for path in grads}
        return ({path: updates for path, (updates, _) in found.items()},
                {path: new for path, (_, new) in found.items()})

    return Skipping(init, update)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two bfloat16 beside it, the nearer the likelier: exact on average."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


# The paper's "dynamic tree" of 256 numbers from 0 to 1, or -1 to 1: seven decades up to 1, each cut
# into twice as many equal parts as the one below it, whose middles are the numbers, and 0 and 1.
# Code by code they rise. Computed, not looked up: a TPU is slow at tables.
_DECADES = 7


def encode(x: jax.Array, signed: bool) -> Blocks:
    """A matrix `[rows, columns]` float32 to the nearest numbers times each block's scale.

    Without a sign no number but 0 becomes 0: a second moment divides.
    """
    tile = [_tile(size) for size in x.shape]
    rows, columns = x.shape[0] // tile[0], x.shape[1] // tile[1]
    scale = jnp.max(jnp.abs(x).reshape(rows, tile[0], -1), axis=1)
    scale = jnp.max(scale.reshape(rows, columns, tile[1]), axis=2)
    y = x / _grown(jnp.where(scale > 0, scale, 1), tile)
    size, first = jnp.abs(y), 0 if signed else 1  # the lowest decade has 2 ** first parts
    decade = sum((size > 10.0 ** (i - _DECADES) * (1 + 1.8 / 2 ** (i + first))).astype(jnp.int32)
                 for i in range(1, _DECADES))  # half way between the numbers on both sides
    parts = _power_of_two(decade + first)
    part = jnp.floor((size / _decade(decade) - 0.1) / 0.9 * parts)
    code = (parts + jnp.clip(part, 0, parts - 1)).astype(jnp.int32) - first
    code = jnp.where(y > 1 - 0.225 / 2 ** (_DECADES - 1 + first), 128 if signed else 255, code)
    if signed:
        code = jnp.where(size < 0.275 * 10.0 ** (1 - _DECADES), 0, code)
        code = jnp.where(y < 0, -code, code) + 127
    else:
        code = jnp.where(size > 0, code, 0)
    return Blocks(code.astype(jnp.uint8), scale)


def decode(blocks: Blocks, signed: bool) -> jax.Array:
    """The opposite of `encode`: float32 `[rows, columns]`."""
    code, first = blocks.codes.astype(jnp.int32) - 127 * signed, 0 if signed else 1
    number = jnp.abs(code) + first
    exponent = (jax.lax.bitcast_convert_type(number.astype(jnp.float32), jnp.int32) >> 23) - 127
    middle = (number + 0.5) / _power_of_two(exponent) - 1
    y = (0.1 + 0.9 * middle) * _decade(exponent - first)
    y = jnp.where(code == (128 if signed else 255), 1, jnp.where(code == 0, 0, y))
    y = jnp.where(code < 0, -y, y)
    tile = [_tile(size) for size in y.shape]
    return y * _grown(blocks.scale, tile)


def _tile(size: int) -> int:
    # 16: a block of 256 numbers, and what a device holds of a matrix is hardly ever no multiple.
    return next(n for n in (16, 8, 4, 2, 1) if size % n == 0)


def _grown(scale: jax.Array, tile: list[int]) -> jax.Array:
    # Columns first, while there are few rows: on a TPU that moves numbers between lanes.
    return jnp.repeat(jnp.repeat(scale, tile[1], axis=1), tile[0], axis=0)


def _decade(number: jax.Array) -> jax.Array:
    return jnp.select([number == i for i in range(_DECADES)],
                      [jnp.float32(10.0 ** (i + 1 - _DECADES)) for i in range(_DECADES)])


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
