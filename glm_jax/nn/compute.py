"""How a model computes, as against what: its attention kernel, and what the derivative recomputes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

UNROLLED = 8  # layers that are compiled one by one unless `model.unroll` says otherwise
LAYER_INPUT, LINEAR = "layer_input", "linear"
FLASH = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper", "pallas_call")
_policies = jax.checkpoint_policies

# What of each layer is kept for the derivative (Chen et al. 2016, arXiv:1604.06174); the rest is
# computed again. `attention` is not here: it keeps all that lies outside of attention.
KEPT: dict[str, Any] = {
    "full": _policies.nothing_saveable,  # beside the layer's input
    "dots": _policies.save_from_both_policies(
        _policies.save_only_these_names(LINEAR), lambda prim, *_, **__: prim.name in FLASH),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device", offload_dst="pinned_host"),
}
REMAT = ("none", "attention", *KEPT)


def _but_gathered(prim: Any, *avals: Any, **_: Any) -> bool:
    """Whether what a primitive gives is kept where all is but kernels as layers compute with them.

    These are cast and gathered from where they lie: kept, they would be the whole model on each
    device. A kernel has up to three axes, attention's scores have more.
    """
    if prim.name.startswith("custom_vjp"):  # the gather of a frozen kernel: it has no derivative
        return False
    if prim.name == "convert_element_type":
        return bool(avals[0].ndim > 3)
    return bool(prim.name != "sharding_constraint")


@dataclasses.dataclass(frozen=True)
class Compute:
    """Every model has one as its attribute `compute`; results don't depend on it, but for rounding.

    Attributes:
      kernel: of attention.
      remat: one of `REMAT`: what of a layer is computed again for the derivative in place of being
        kept. `none`, but for kernels that a mesh gathers; `attention`, its scores and weights
        besides; `dots`, all but what linear layers give and attention's kernel; `full`, all but the
        layer's input; `offload`, as `full`, and that input waits in the host's memory.
      unroll: so many layers, or fewer, are compiled one by one, not as a loop, on one device where
        remat is `none`, or the device a GPU and remat not `offload`.
    """

    kernel: str = "reference"
    remat: str = "none"
    unroll: int = dataclasses.field(default_factory=lambda: UNROLLED)

    def layer(self, body: Callable[..., Any], unrolled: bool) -> Callable[..., Any]:
        """The body `(x, inputs) -> (x, y)` of a loop over layers, with its checkpoint."""
        mesh = jax.sharding.get_abstract_mesh()
        if self.remat not in KEPT and (mesh.empty or mesh.size == 1):
            return body
        return jax.checkpoint(lambda x, inputs: body(checkpoint_name(x, LAYER_INPUT), inputs),
                              policy=KEPT.get(self.remat, _but_gathered),
                              prevent_cse=unrolled)  # a loop prevents it


PLAIN = Compute()
