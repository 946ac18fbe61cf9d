"""GLM-4-0414, 9B and 32B, and GLM-Z1 (`model_type: glm4`): a GLM with four norms in a layer.

The module is `decoder.Decoder`, the released names are those of `glm` with the two norms more.
"""

import dataclasses
from typing import ClassVar

from glm_jax.models.glm import GlmConfig


@dataclasses.dataclass(frozen=True)
class Glm4Config(GlmConfig):
    """Fields and defaults of the released `config.json`."""

    model_type: str = "glm4"

    sandwich: ClassVar = True
