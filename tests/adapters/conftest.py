"""A tiny GLM, and adapters whose B is not zero."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax.adapters.targets import linears
from glm_jax.convert.hf import flat
from glm_jax.models import architecture_of
from glm_jax.parallel.mesh import make_mesh, sharding

CONFIG = {
    "model_type": "glm", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": True,
}


@pytest.fixture
def make() -> Callable[..., Any]:
    """`make(head, mesh=…, **config fields)`: a model with large random weights."""
    def make_model(head: str = "lm", mesh: Any = None, **fields: Any) -> Any:
        raw = {**CONFIG, **fields}
        architecture, random = architecture_of(raw), np.random.default_rng(3)
        config = architecture.config.from_dict(raw)
        model = nnx.eval_shape(lambda: architecture.model(config, head, rngs=nnx.Rngs(0)))
        parameters = flat(model)
        for path, param in parameters.items():
            shape, axes = param.get_value().shape, param.get_metadata("axes")
            value = 0.2 * random.normal(size=shape) + path.endswith("scale")
            param.set_value(jax.device_put(value.astype(np.float32),
                                           sharding(axes, shape, mesh or make_mesh({}))))
        nnx.update(model, nnx.from_flat_state(
            [(tuple(path.split(".")), param) for path, param in parameters.items()]))
        return model
    return make_model


@pytest.fixture
def shake() -> Callable[..., None]:
    """`shake(model)`: gives every B random values, so that the adapters do something."""
    def fill(model: Any, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        for layer in linears(model).values():
            if hasattr(layer, "adapter"):
                b = layer.adapter.lora_b
                value = 0.3 * random.normal(size=b.get_value().shape)
                b.set_value(jax.device_put(value.astype(np.float32), b.get_value().sharding))
    return fill
