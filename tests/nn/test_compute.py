"""What is computed again changes no gradient, and takes less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.nn.batch import causal_batch
from glm_jax.nn.compute import Compute
from glm_jax.parallel.mesh import AXES

MODELS = {
    "glm": {"num_hidden_layers": 6},
    "bert": {"model_type": "bert", "num_hidden_layers": 3, "intermediate_size": 48},
}


def loss_of(model, remat):
    """The loss of a model with that policy, as a function of its arrays and tokens."""
    graphdef, state = nnx.split(model)

    def loss(state, tokens):
        copy = nnx.merge(graphdef, state)
        copy.compute = Compute(remat=remat)
        return jnp.sum(jnp.square(copy(causal_batch(tokens))[0]))
    return loss, state


@pytest.mark.parametrize("name", MODELS)
def test_every_policy_gives_the_same_gradient_in_less_memory(tiny, name):
    model = tiny("base" if name == "bert" else "lm", **MODELS[name])
    tokens = np.random.default_rng(0).integers(1, 67, (2, 48))
    memory, gradients = {}, {}
    for remat in ("none", "attention", "dots", "full"):
        loss, state = loss_of(model, remat)
        compiled = jax.jit(jax.grad(loss)).lower(state, tokens).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        gradients[remat] = jax.tree.leaves(compiled(state, tokens))
    largest = max(np.abs(wanted).max() for wanted in gradients["none"])
    for remat, found in gradients.items():
        for one, wanted in zip(found, gradients["none"], strict=True):
            np.testing.assert_allclose(one, wanted, atol=2e-6 * largest, err_msg=remat)
    assert memory["full"] < memory["dots"] < memory["none"], memory
    assert memory["attention"] < memory["none"], memory



def test_offloaded_layer_inputs_wait_in_the_memory_of_a_tpus_host(tiny):
    device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    mesh = Mesh(np.array([device]).reshape((1,) * len(AXES)), AXES,
                axis_types=(AxisType.Auto,) * len(AXES))
    where, found = NamedSharding(mesh, PartitionSpec()), {}
    for remat in ("full", "offload"):
        loss, state = loss_of(tiny(num_hidden_layers=6), remat)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)
        tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32, sharding=where)
        compiled = jax.jit(jax.grad(loss)).lower(abstract, tokens).compile()
        found[remat] = compiled.memory_analysis().host_temp_size_in_bytes
    assert found["full"] == 0
    assert found["offload"] >= 6 * 2 * 128 * 32 * 4  # six layers' inputs, float32
