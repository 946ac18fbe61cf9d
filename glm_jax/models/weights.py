"""What a weight table is made of: the released names of an architecture's parameters.

One table serves import, export and the check of what is missing; nothing else in the library
knows a foreign name.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """One tensor of a released checkpoint, or one of each layer, or of each expert of each layer.

    Attributes:
      name: the released name; `{}` stands for the layer's number, a second one for the expert's.
        Our parameter has a leading axis for each.
      path: our dotted parameter path; several when the released tensor joins them along its
        output rows, in this order.
      transpose: the released matrix is `[out, in]`, ours `[in, out]`.
      heads: when not 0, joined head by head: the rows of a head from each path in turn.
      first: the number of the first layer of this stack.
      copy: holds what another row reads already (a tied head): written, but never read.
      constant: makes what the tensor always is (a buffer), for the dtype that the model is written
        in: written, but never read; then no path.
      exact: our parameter stays float32 whatever the model is kept in.
      optional: a checkpoint may lack it; it then begins random, with a warning.
    """

    name: str
    path: str | tuple[str, ...]
    transpose: bool = False
    heads: int = 0
    first: int = 0
    copy: bool = False
    constant: Callable[[np.dtype], np.ndarray] | None = None
    exact: bool = False
    optional: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def stacked(self) -> int:
        """How many leading axes of our parameter are layers and experts."""
        return self.name.count("{}")

    @property
    def read(self) -> bool:
        """Whether an import takes anything from it."""
        return not self.copy and self.constant is None

    def names(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """The place in the stack and the released name of each tensor, for our whole shape."""
        for place in itertools.product(*map(range, shape[:self.stacked])):
            numbers = (place[0] + self.first, *place[1:]) if place else ()
            yield place, self.name.format(*numbers)

    def tensor(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The shape of one released tensor, when those of our paths are `shapes`."""
        parts = [self.released(shape) for shape in shapes]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def released(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one released tensor, were it made of this path alone (ours is `shape`)."""
        one = tuple(shape[self.stacked:])
        return one[::-1] if self.transpose else one

    def join(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        """The released tensor from our parameters, each without its leading axes."""
        parts = [p.T if self.transpose else p for p in parameters]
        if not self.heads:
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        by_head = [p.reshape(self.heads, -1, *p.shape[1:]) for p in parts]
        return np.concatenate(by_head, axis=1).reshape(-1, *parts[0].shape[1:])

    def rows(self, which: int, sizes: Sequence[int], start: int, stop: int) -> slice | np.ndarray:
        """Which rows of the tensor are the outputs `start` to `stop` of the path number `which`.

        Args:
          sizes: the output rows that each path has in the tensor.
        """
        before = sum(sizes[:which])
        if not self.heads:
            return slice(before + start, before + stop)
        own, all_rows = sizes[which] // self.heads, sum(sizes) // self.heads
        outputs = np.arange(start, stop)
        return outputs // own * all_rows + before // self.heads + outputs % own


def linear(name: str, path: str, bias: bool = False) -> list[Weight]:
    """The table rows of one torch `Linear`."""
    rows = [Weight(f"{name}.weight", f"{path}.kernel", transpose=True)]
    return rows + [Weight(f"{name}.bias", f"{path}.bias")] if bias else rows


def gated(name: str) -> Weight:
    """The row of one torch `Linear` that is gate and up of an MLP, the gate first."""
    return Weight(f"{name}.weight", ("layers.mlp.gate_proj.kernel", "layers.mlp.up_proj.kernel"),
                  transpose=True)


def norm(name: str, path: str, bias: bool = False) -> list[Weight]:
    """The table rows of one torch norm layer."""
    rows = [Weight(f"{name}.weight", f"{path}.scale")]
    return rows + [Weight(f"{name}.bias", f"{path}.bias")] if bias else rows


def transformer(heads: int = 0) -> list[Weight]:
    """The layers and the last norm of GLM (2021), and of ChatGLM-6B with `heads`."""
    layer = "transformer.layers.{}"
    joined = [f"layers.self_attn.{name}" for name in ("query", "key", "value")]
    rows = [Weight(f"{layer}.attention.query_key_value.weight",
                   tuple(f"{path}.kernel" for path in joined), transpose=True, heads=heads),
            Weight(f"{layer}.attention.query_key_value.bias",
                   tuple(f"{path}.bias" for path in joined), heads=heads)]
    for name, path in (("attention.dense", "self_attn.dense"), ("mlp.dense_h_to_4h", "mlp.up"),
                       ("mlp.dense_4h_to_h", "mlp.down")):
        rows += linear(f"{layer}.{name}", f"layers.{path}", bias=True)
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows += norm(f"{layer}.{name}", f"layers.{name}", bias=True)
    return rows + norm("transformer.final_layernorm", "norm", bias=True)
