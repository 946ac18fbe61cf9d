"""What a weight table is made of: the released names of an architecture's parameters.

One table serves import, export and the check of what is missing; nothing else in the library
knows a foreign name.
"""

from typing import NamedTuple


class Weight(NamedTuple):
    """One tensor of a released checkpoint, or one of each layer.

    Attributes:
      name: the released name; `{}` stands for the layer's number.
      path: our dotted parameter path; several when the released tensor joins them along its
        output rows, in this order.
      transpose: the released matrix is `[out, in]`, ours `[in, out]`.
    """

    name: str
    path: str | tuple[str, ...]
    transpose: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def per_layer(self) -> bool:
        return "{}" in self.name


def linear(name: str, path: str, bias: bool = False) -> list[Weight]:
    """The table rows of one torch `Linear`."""
    rows = [Weight(f"{name}.weight", f"{path}.kernel", transpose=True)]
    return rows + [Weight(f"{name}.bias", f"{path}.bias")] if bias else rows
