"""One compiled function from a batch to predictions, on whatever values the parameters have now."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm_jax.nn.batch import Batch
from glm_jax.parallel.mesh import put
from glm_jax.train.step import bind, by_path


class Predictor:
    """`function(model, batch)`, compiled once for each shape of batch."""

    def __init__(self, graphdef: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State,
                 function: Callable[[Any, Batch], Any], mesh: Mesh):
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable)
        self.frozen, self.mesh = frozen, mesh

        def run(arrays: dict[str, jax.Array], frozen: nnx.State, batch: Batch) -> Any:
            return function(nnx.merge(graphdef, bind(template, arrays), frozen), batch)

        # Whole on every device, so that every process can read it.
        self._run = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def on(self, arrays: dict[str, jax.Array]) -> Callable[[Batch], Any]:
        """The function of a batch for these trainable parameters (by path)."""
        return lambda batch: self._run(arrays, self.frozen, put(batch, self.mesh))


def predictor(model: nnx.Module, function: Callable[[Any, Batch], Any], mesh: Mesh
              ) -> Callable[[Batch], Any]:
    """The function of a batch for a model as it is."""
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return Predictor(graphdef, parameters, rest, function, mesh).on(by_path(parameters))
