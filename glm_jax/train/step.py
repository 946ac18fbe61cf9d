"""The training step: one jitted function over (trainable state, frozen parameters, batch)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.nn.batch import Batch, pairs
from glm_jax.train.moments import is_large, skipping

HOST = "pinned_host"  # the kind of memory that an optimizer's state is offloaded to

State = dict[str, Any]
Loss = Callable[[Any, Batch, jax.Array | None], jax.Array]


def by_path(state: nnx.State) -> dict[str, jax.Array]:
    """The arrays of a state by dotted path."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def bind(template: nnx.State, arrays: dict[str, jax.Array]) -> nnx.State:
    """The opposite of `by_path`: `template` with these arrays."""
    return nnx.from_flat_state([(path, leaf.replace(arrays[".".join(map(str, path))]))
                                for path, leaf in nnx.to_flat_state(template)])


def init_state(trainable: Mapping[str, Any], optimizer: optax.GradientTransformation,
               mesh: Mesh, ema: float = 0.0, offload: bool = False) -> State:
    """Trainable parameters (float32 or the config's), optimizer state and counters, on the mesh.

    With `ema`, also the parameters' running average, which begins where they do. With `offload`
    the large arrays of the optimizer's state lie in the host's memory. Of abstract parameters
    (`jax.ShapeDtypeStruct`s with shardings) it makes an abstract state.
    """
    def begin(trainable: Mapping[str, Any]) -> State:
        average = {"average": jax.tree.map(jnp.copy, trainable)} if ema else {}
        counters = ("step", "skipped", "skipped_in_a_row")
        return {"optimizer": optimizer.init(trainable), **average,
                **{name: jnp.int32(0) for name in counters}}

    shapes = jax.eval_shape(begin, trainable)
    where = jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _beside(path, leaf, trainable)), shapes)
    if offload:
        where["optimizer"] = jax.tree.map(
            lambda leaf, place: place.with_memory_kind(HOST) if is_large(leaf) else place,
            shapes["optimizer"], where["optimizer"])
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in trainable.values()):
        rest = jax.tree.map(lambda x, place: x.update(sharding=place), shapes, where)
    else:
        rest = jax.jit(begin, out_shardings=where)(trainable)
    return {"trainable": trainable, **rest}


def _beside(path: tuple[Any, ...], leaf: Any, trainable: Mapping[str, Any]) -> PartitionSpec:
    """How a leaf of the state is split: as the parameter that its path names, or not at all.

    A mean over one of a matrix's axes is split as the others; the scales of blocks as the axes
    along which they lie.
    """
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    of = next((trainable[name] for name in names if name in trainable), None)
    if of is None or not isinstance(of.sharding, NamedSharding):
        return PartitionSpec()
    split = (*of.sharding.spec, *(None,) * (of.ndim - len(of.sharding.spec)))
    if leaf.ndim == of.ndim:
        def fits(size: int, over: Any) -> bool:
            axes = (over,) if isinstance(over, str) else over or ()
            return size % math.prod(of.sharding.mesh.shape[axis] for axis in axes) == 0
        return PartitionSpec(*(over if fits(size, over) else None
                               for size, over in zip(leaf.shape, split, strict=True)))
    # Of a square matrix either axis may be gone: Optax's `v_row` lacks the last.
    for gone in (of.ndim - 1, of.ndim - 2) if "v_row" in names else (of.ndim - 2, of.ndim - 1):
        if gone >= 0 and leaf.shape == of.shape[:gone] + of.shape[gone + 1:]:
            return PartitionSpec(*split[:gone], *split[gone + 1:])
    return PartitionSpec()


def judged(state: State) -> dict[str, jax.Array]:
    """The parameters that are evaluated and exported: the average where one is kept."""
    arrays: Any = state.get("average", state["trainable"])
    return arrays


def batch_weight(batch: Batch) -> jax.Array:
    """What the loss of a batch is divided by: the sum of the weights of what is learned."""
    weights = batch.label_weights if batch.weights is None else batch.weights
    return jnp.sum(jnp.asarray(weights))


def make_step(graphdef: nnx.GraphDef, trainable: nnx.State, loss: Loss,
              optimizer: optax.GradientTransformation, state: State, *, seed: int,
              accumulate: int = 1, ema: float = 0.0
              ) -> Callable[[State, nnx.State, Batch], tuple[State, Any]]:
    """Builds `step(state, frozen, batch) -> (state, metrics)`; `state` is donated.

    Only the trainable parameters are differentiated. With `accumulate` the rows of a batch are
    taken in so many micro-batches; the loss is the mean over the weights of the whole batch, and
    each layer's gradient is added where the sum lies: there is one gradient, not two. A loss or
    gradient that is not finite leaves the parameters as they are and is counted.

    Args:
      graphdef, trainable: of the model's partition; of `trainable` only the structure.
      loss: (model, batch, dropout key) -> the sum of weighted losses.
      state: of `init_state`; its shardings are those of the result.
      seed: of the dropout keys; the key of a step follows from it and the step's number.
      ema: how much of the average a step leaves (Polyak and Juditsky 1992); less in the first
        steps, so that it soon forgets where it began. 0: no average.
    """
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
    del trainable

    def total(arrays: dict[str, jax.Array], frozen: nnx.State, batch: Batch, key: jax.Array,
              weight: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, bind(template, arrays), frozen)
        return loss(model, batch, key) / weight

    gradient = jax.value_and_grad(total)
    update = skipping(optimizer).update
    where = jax.tree.map(lambda x: x.sharding, state)

    def step(state: State, frozen: nnx.State, batch: Batch) -> tuple[State, Any]:
        arrays = state["trainable"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        weight = jnp.maximum(batch_weight(batch), 1e-6)
        if accumulate == 1:
            value, grads = gradient(arrays, frozen, batch, key, weight)
        else:
            def add(value: jax.Array, part: tuple[Batch, jax.Array]) -> tuple[jax.Array, None]:
                pull: Any
                one, pull = jax.vjp(lambda x: total(x, frozen, part[0], part[1], weight), arrays)
                pull.with_refs(sums)(jnp.ones_like(one))
                return value + one, None
            # Every n-th row, so that each micro-batch has rows of every device.
            micro = jax.tree.map(
                lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), arrays)
            value, _ = jax.lax.scan(add, jnp.float32(0), (micro, jax.random.split(key, accumulate)))
            grads = jax.tree.map(jax.freeze, sums)
        norm = optax.global_norm(grads)
        fine = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt = update(grads, state["optimizer"], arrays, fine=fine)
        new = {"trainable": optax.apply_updates(arrays, updates)}
        if ema:
            left = jnp.minimum(ema, (1 + state["step"]) / (10 + state["step"]))
            new["average"] = optax.incremental_update(new["trainable"], state["average"], 1 - left)
        new = optax.tree.where(fine, new, {name: state[name] for name in new})
        bad = (~fine).astype(jnp.int32)
        new |= {"optimizer": opt, "step": state["step"] + 1, "skipped": state["skipped"] + bad,
                "skipped_in_a_row": (state["skipped_in_a_row"] + 1) * bad}
        metrics = {"loss": value, "grad_norm": norm, "skipped": new["skipped"],
                   "skipped_in_a_row": new["skipped_in_a_row"],
                   "tokens": jnp.sum(jnp.asarray(batch.segments) > 0), "pairs": pairs(batch)}
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))
