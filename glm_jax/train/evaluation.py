"""One compiled function from a batch to predictions, on whatever values the parameters have now."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.nn.batch import Batch
from glm_jax.parallel.mesh import put
from glm_jax.train.step import bind, by_path


def predictor(graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State,
              function: Callable[[Any, Batch], Any], mesh: Mesh
              ) -> Callable[[dict[str, jax.Array], Batch], Any]:
    """`function(model, batch)` of the trainable parameters, by path, and a host's batch.

    Compiled once for each shape of batch; the result is whole on every device, so that every
    process can read it.
    """
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)

    def call(arrays: dict[str, jax.Array], frozen: nnx.State, batch: Batch) -> Any:
        return function(nnx.merge(graphdef, bind(template, arrays), frozen), batch)

    compiled = jax.jit(call, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda arrays, batch: compiled(arrays, frozen, put(batch, mesh))


def predictor_of(model: nnx.Module, function: Callable[[Any, Batch], Any], mesh: Mesh
                 ) -> Callable[[Batch], Any]:
    """The function of a batch for a model as it is."""
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return functools.partial(predictor(graphdef, parameters, rest, function, mesh),
                             by_path(parameters))
