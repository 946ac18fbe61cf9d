"""What is computed again changes no gradient, and takes less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax.adapters import partition
from glm_jax.adapters.lora import LoRAConfig, attach
from glm_jax.nn.batch import causal_batch
from glm_jax.nn.compute import Compute
from glm_jax.parallel.mesh import AXES, make_mesh, put

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


WIDE = {
    "glm": {"intermediate_size": 1024, "head_dim": 64},
    "glm4_moe": {"model_type": "glm4_moe", "intermediate_size": 64, "head_dim": 64,
                 "num_key_value_heads": 2, "first_k_dense_replace": 0, "n_routed_experts": 8,
                 "num_experts_per_tok": 2, "moe_intermediate_size": 128}}


@pytest.mark.parametrize(("name", "remat", "trained"), [
    ("glm", "none", ".*"), ("glm", "attention", "adapter"), ("glm4_moe", "attention", ".*"),
    ("glm4_moe", "none", "adapter")])
def test_gathered_kernels_are_not_kept(tiny, name, remat, trained):
    """Of ten layers, each split over eight devices, none of which ever holds half of them.

    Neither of those that train nor of frozen ones, whose gather has no derivative.
    """
    mesh = make_mesh({"fsdp": 8})
    model = tiny("lm", mesh, hidden_size=256, num_hidden_layers=10, **WIDE[name])
    model = nnx.merge(*nnx.split(model), copy=True)
    if trained == "adapter":
        attach(model, LoRAConfig(r=2, target_modules=("q_proj", "o_proj")))
    graphdef, trainable, frozen = partition(model, (trained,))

    def loss(trainable, frozen, tokens):
        copy = nnx.merge(graphdef, trainable, frozen, copy=True)
        copy.compute = Compute(remat=remat)
        return jnp.sum(jnp.square(copy(causal_batch(tokens))[0]))
    tokens = put(np.random.default_rng(0).integers(1, 67, (8, 8)), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(
            lambda x: x.sharding, trainable)).lower(trainable, frozen, tokens).compile()
    whole = sum(x.nbytes for x in jax.tree.leaves((trainable, frozen)))
    assert compiled.memory_analysis().temp_size_in_bytes < whole / 2



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
