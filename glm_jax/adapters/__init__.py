"""Adapters: small trained parts beside a frozen base. What each is, and which parameters train.

One file a method. A method attaches `Adapter` modules to the linear layers it targets, as their
attribute `adapter`; full fine-tuning and head-only training are the same code with other patterns.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from glm_jax.errors import UserError
from glm_jax.nn.layers import Product

Filter = Callable[[tuple[Any, ...], Any], bool]


class Adapter(Protocol):
    """What a linear layer calls when it has an attribute `adapter`."""

    def __call__(self, x: jax.Array, kernel: jax.Array, key: jax.Array | None = None,
                 product: Product | None = None, low: Any = None) -> jax.Array:
        """`[..., in]` to `[..., out]`: what the layer computes in place of `x kernel`.

        `key` draws the dropout; none without. `product` multiplies rows with matrices that have a
        leading axis of experts; then `kernel` and the adapter's own parameters have it, and `key`
        is one for each row. `low` is one of `lows`.
        """

    @staticmethod
    def lows(adapters: Sequence[Any], x: jax.Array, keys: Sequence[jax.Array | None]) -> list[Any]:
        """What each of the adapters of layers with one input `[..., in]` takes from the others."""

    def merged(self, kernel: jax.Array) -> jax.Array:
        """The kernel that computes the same alone, for `kernel [..., in, out]`."""


def trainable_filter(patterns: Sequence[str]) -> Filter:
    """An NNX filter for the parameters that one of the patterns names.

    A pattern is a regular expression for one or more whole parts of the dotted path: `score` is
    `score.kernel`, `adapter` every adapter's parameter, `layers.mlp` both matrices of the MLPs,
    `.*` everything; `norm` is the last norm, not `input_layernorm`.
    """
    try:
        expressions = [re.compile(rf"(?:^|\.)(?:{pattern})(?:\.|$)") for pattern in patterns]
    except re.error as error:
        raise UserError(f"trainable: {list(patterns)}: not a regular expression: {error}") from None

    def matches(path: tuple[Any, ...], value: Any) -> bool:
        dotted = ".".join(map(str, path))
        return isinstance(value, nnx.Param) and any(e.search(dotted) for e in expressions)

    return matches


def partition(model: nnx.Module, patterns: Sequence[str]
              ) -> tuple[nnx.GraphDef[Any], nnx.State, nnx.State]:
    """Splits a model into graph, trainable and frozen state; `nnx.merge` puts them together.

    Only the trainable state is to be differentiated, clipped, and given to the optimizer.

    Raises:
      UserError: for a pattern that matches no parameter, or no patterns.
    """
    if not patterns:
        raise UserError("trainable: no pattern, so nothing would train; '.*' trains everything")
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for pattern in patterns:
        one = trainable_filter((pattern,))
        if not any(one(path, value) for path, value in parameters):
            parts = {str(part) for path, _ in parameters for part in path}
            raise UserError(f"trainable: {pattern!r} matches no parameter; "
                            + nearest(pattern, parts))
    graphdef, *states = nnx.split(model, trainable_filter(patterns), ...)
    return graphdef, states[0], states[1]


def nearest(name: str, names: Iterable[str]) -> str:
    """For a message: the name that was probably meant, and all there are."""
    names = sorted(set(names))
    close = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"There are: {', '.join(names)}"
