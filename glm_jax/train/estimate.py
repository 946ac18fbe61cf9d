"""What a training step keeps, sends and moves on each device, by arithmetic from its shapes.

No device and no compiler is asked: for GPUs it is the plan itself, for TPUs what a compiled step is
held to.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from glm_jax.convert.parameters import flat
from glm_jax.data.packing import Piece, Shape
from glm_jax.nn.batch import Batch, pairs
from glm_jax.nn.loss import ACCELERATED, LOGITS
from glm_jax.parallel.mesh import data_ways, partition
from glm_jax.tasks import Task
from glm_jax.train import setup
from glm_jax.train.flops import Flops, forward_flops
from glm_jax.train.hlo import Collective, crossing
from glm_jax.train.step import HOST


def computes_again(config: Any) -> bool:
    """Whether the layers' forward pass is computed a second time, for the derivative."""
    return config.model.remat in ("full", "offload")  # the kernels that keep no scores keep theirs


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A training step without arrays, ready to be traced and compiled."""

    mesh: Any  # or an abstract one
    across: Mapping[str, int]  # over how many slices, or hosts of GPUs, each of its axes reaches
    task: Task
    parts: setup.Parts
    state: dict[str, Any]
    batch: Any
    step: Any


def pairs_of_a_row(shape: Shape) -> float:
    """How many pairs there are of a token and one that it sees, in a row that is one example."""
    tokens, positions, order = shape.place(Piece(np.zeros(shape.length, np.int32)))
    row = Batch(tokens[None], positions[None], np.ones_like(tokens)[None], order[None])
    return float(pairs(row))


def layers_flops(model: Any) -> Flops:
    """What the forward pass takes, but for the language model's head."""
    forward, read = forward_flops(model), model.config
    head = 2 * read.hidden_size * read.vocab_size if model.head in ("lm", "mlm") else 0
    return forward._replace(token=forward.token - head)


def held(tree: Any, on_host: bool = False) -> float:
    """Bytes of a tree of abstract arrays on each device, or of those in its host's memory."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
                     for x in jax.tree.leaves(tree)
                     if (x.sharding.memory_kind == HOST) == on_host))


def kept(jaxpr: Any, made: Pieces, model: Any, tokens: int) -> float:
    """Bytes on each device of what loops of the forward pass stack up for the derivative.

    All of it is split as tokens are, features other than the hidden state's on `tensor` too.
    """
    mesh, size = made.mesh, 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"] and (
                equation.params["num_carry"]):  # maps, as the ring's, keep nothing
            for out in equation.outvars[equation.params["num_carry"]:]:
                shape, ways = out.aval.shape[1:], 1
                if out.aval.size >= tokens:
                    ways = data_ways(mesh) * mesh.shape["sequence"]
                if shape and shape[-1] not in (1, getattr(model.config, "hidden_size", 1)):
                    ways *= mesh.shape["tensor"]
                size += out.aval.size * out.aval.dtype.itemsize / ways
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                size += kept(getattr(inner, "jaxpr", inner), made, model, tokens)
    return size


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


class Use(NamedTuple):
    """A parameter as layers compute with it, on each device.

    Attributes:
      size: bytes, all layers together; layers: how many these are.
      ways: of how many devices the parts are gathered for it; `reach`: in how many slices.
      sums: over how many devices that have other tokens its gradient is summed besides;
        `sums_reach`: in how many slices.
      times: how often it is gathered in a step.
    """

    size: float
    layers: int
    ways: int
    reach: int
    sums: int
    sums_reach: int
    times: int
    trained: bool


def uses(config: Any, made: Pieces, model: Any) -> list[Use]:
    mesh, trained, out = made.mesh, made.state["trainable"], []

    def ways(spec: PartitionSpec) -> int:
        return math.prod(mesh.shape[axis] for axis in jax.tree.leaves(tuple(spec)))

    for path, parameter in flat(model).items():
        value, axes = parameter.get_value(), parameter.get_metadata("axes")
        stored, whole = value.sharding.spec, partition(axes, value.shape, mesh.shape, gathered=True)
        tokens = data_ways(mesh) * mesh.shape["sequence"]
        if ".experts." in path:  # a device has its own experts whole, and no others
            whole = PartitionSpec(whole[0], stored[1], *whole[2:])
            tokens //= ways(PartitionSpec(stored[1]))
        stacked = len(axes) < value.ndim
        bits = 4 if path.endswith("gate.kernel") else np.dtype(model.dtype).itemsize
        parts = ways(stored) // ways(whole)
        reach = math.prod(made.across[axis] for axis in jax.tree.leaves(tuple(stored)))
        out.append(Use(value.size / ways(whole) * bits, value.shape[0] if stacked else 1, parts,
                       reach, max(tokens // parts, 1), math.prod(made.across.values()) // reach,
                       (2 if stacked else 1) * config.batch.accumulate, path in trained))
    return out


def traffic(config: Any, made: Pieces, model: Any, uses: Sequence[Use]) -> list[Collective]:
    """The collectives that the layout asks for: what a step should send, by arithmetic.

    Parameters are gathered where a layer computes, forward and for the derivative, and their
    gradients summed and scattered; over axes that parameters are not split over sums are whole.
    On `tensor` the outputs of attention and of the MLP are summed, and their inputs' gradients; on
    `expert` tokens are gathered and sums scattered; on `sequence` keys and values go round.
    """
    mesh, batch, out = made.mesh, config.batch, []
    for use in uses:
        if use.ways > 1:
            sent = use.size * (use.ways - 1) / use.ways / use.layers
            across = crossing("all-gather", sent, use.ways, use.reach)
            out.append(Collective("all-gather", (), sent, use.times * use.layers, "parameters",
                                  across))
            if use.trained:
                out.append(Collective("reduce-scatter", (), sent, use.layers * batch.accumulate,
                                      "gradients", across))
        if use.trained and use.sums > 1:
            sent = 2 * use.size / use.ways * (use.sums - 1) / use.sums / use.layers
            out.append(Collective("all-reduce", (), sent, use.layers * batch.accumulate,
                                  "gradients", crossing("all-reduce", sent, use.sums,
                                                        use.sums_reach)))
    layers = getattr(model.config, "num_hidden_layers", 0)
    again = computes_again(config)
    tokens = batch.rows * batch.length / data_ways(mesh) / mesh.shape["sequence"]
    size = tokens * getattr(model.config, "hidden_size", 0) * np.dtype(model.dtype).itemsize

    def activations(kind: str, axis: str, sent: float, times: int) -> None:
        n = mesh.shape[axis]
        if n > 1:
            out.append(Collective(kind, (), sent * (n - 1) / n, times, axis))
    activations("all-reduce", "tensor", 2 * size, layers * (4 + again))
    dense = getattr(model.config, "dense", None)
    if dense is not None:
        activations("all-gather", "expert", size * mesh.shape["expert"],
                    (layers - dense) * (2 + again))
        activations("reduce-scatter", "expert", size * mesh.shape["expert"], (layers - dense) * 2)
    if heads := getattr(model.config, "num_attention_heads", 0):
        pair = 2 * size * model.config.num_key_value_heads / heads
        activations("collective-permute", "sequence", pair * mesh.shape["sequence"],
                    layers * (4 + again))
    return out


def temporaries(config: Any, made: Pieces, model: Any, uses: Sequence[Use]) -> float:
    """Bytes by estimate: two layers' gathered parameters, one layer's gradients and activations,
    the gradients of all that trains in float32, a chunk of logits; with micro-batches what trains
    in the dtype of computing, which XLA makes once for all of them."""
    mesh, batch = made.mesh, config.batch
    tokens = batch.rows * batch.length / data_ways(mesh) / mesh.shape["sequence"] / batch.accumulate
    gathered = sum(2 * use.size / use.layers for use in uses if use.ways > 1)
    gradients = held(made.state["trainable"]) + sum(
        use.size / use.layers for use in uses if use.trained)
    if batch.accumulate > 1:
        gradients += sum(use.size / use.ways for use in uses if use.trained)
    read = model.config
    wide = (4 * read.hidden_size + 3 * getattr(read, "intermediate_size", 4 * read.hidden_size)
            / mesh.shape["tensor"])
    if getattr(read, "dense", None) is not None:
        # Room for every choice to be an expert of this device's: rows, outputs, their derivatives.
        wide += (mesh.shape["expert"] * read.num_experts_per_tok
                 * (4 * read.hidden_size + 3 * read.moe_intermediate_size))
    logits = min(ACCELERATED * LOGITS, tokens * getattr(read, "vocab_size", 0))
    return gathered + gradients + tokens * wide * np.dtype(model.dtype).itemsize + 2 * 4 * logits


def moved(memory: Mapping[str, float], uses: Sequence[Use], again: bool, accumulate: int) -> float:
    """Bytes that each device's HBM reads and writes at least.

    A layer's parameters are read for the forward pass, for the derivative, and where it is computed
    again, and written where they are gathered; what is kept is written and read; and the optimizer
    reads and writes what it holds, and the gradients.
    """
    layers = sum(use.size * (2 + again + use.times * (use.ways > 1)) for use in uses)
    return (layers * accumulate + 2 * memory["activations"]
            + 4 * memory["trained"] + 2 * memory["optimizer"])


