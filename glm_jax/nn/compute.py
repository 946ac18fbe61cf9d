"""How a model computes, as against what: its attention kernel, and what the derivative recomputes.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Compute:
    """Every model has one as its attribute `compute`; results don't depend on it, but for rounding.

    Attributes:
      kernel: of attention.
      remat: what of a layer is computed again for the derivative in place of being kept.
    """

    kernel: str = "reference"
    remat: str = "none"
