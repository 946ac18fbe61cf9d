"""Twenty steps give the same losses on one device and on every mesh of eight, for each family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from glm_jax.adapters import lora, partition
from glm_jax.data.packing import assemble, shape_for
from glm_jax.models.decoder import Router
from glm_jax.nn.loss import cross_entropy
from glm_jax.parallel.mesh import AXES, make_mesh, put
from glm_jax.train.step import bind, by_path, init_state, make_step
from tests.packed import KINDS, piece

STEPS, ROWS, LENGTH = 20, 8, 16
MESHES = {
    "data": {"data": 8}, "fsdp": {"fsdp": 8}, "tensor": {"tensor": 8},
    "sequence": {"sequence": 8}, "expert": {"expert": 8},
    "mixed": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "mixed experts": {"data": 2, "expert": 2, "tensor": 2},
}
# Eight divides heads, MLPs and experts, but neither two key heads nor a vocabulary of 67.
FAMILIES = {name: KINDS[name] for name in ("glm", "chatglm6b", "bert")} | {"glm4_moe": ("lm", {
    "model_type": "glm4_moe", "vocab_size": 72, "head_dim": 8, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "intermediate_size": 48, "first_k_dense_replace": 1,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16})}
SEED = 2  # of batches whose tokens choose their experts by more than a rounding
TOLERANCE, RATE = {"lora": 1e-5, "full": 1e-4}, {"lora": 1e-2, "full": 1e-3}
# Every axis, family and method once; the others are slow.
DEFAULT = {("glm", "lora", "data"), ("glm", "lora", "mixed"), ("bert", "full", "fsdp"),
           ("bert", "full", "tensor"), ("chatglm6b", "lora", "sequence"),
           ("glm4_moe", "lora", "expert")}


def batches(config, count=4):
    """Full and short rows, of one to three examples."""
    draw = np.random.default_rng(SEED)
    sizes = [(LENGTH,), (7, 9), (5, 4, 6), (10,)]
    return [assemble([[piece(draw, config, size) for size in sizes[row % 4]]
                      for row in range(ROWS)], shape_for(config, ROWS, LENGTH, 3), 0)
            for _ in range(count)]


def loss(model, batch, key):
    hidden = model(batch, key=key)[0]
    if hasattr(model, "vocabulary_kernel"):
        return cross_entropy(hidden, model.vocabulary_kernel(), batch.targets, batch.weights)
    scores = jax.nn.log_softmax(model.logits(hidden))
    own = jnp.take_along_axis(scores, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return -jnp.sum(own * batch.weights)


def margins(gate, x, segments):
    """By how much the last chosen expert's score exceeds the next: `[batch, length]`."""
    scores = jax.nn.sigmoid(gate.logits(x)) + gate.e_score_correction_bias[...]
    best = jax.lax.top_k(scores, dict(gate.how)["top_k"] + 1)[0]
    return jnp.where(jnp.asarray(segments) > 0, best[..., -2] - best[..., -1], jnp.inf)


@pytest.fixture(scope="module")
def twenty(tiny):
    """`twenty(family, method, **sizes)`: the losses, and each step's margins where there are any.
    """
    @functools.cache
    def run(family, method, **sizes):
        mesh, (head, fields) = make_mesh(sizes), FAMILIES[family]
        graphdef, arrays = nnx.split(tiny(head, mesh, **fields, num_attention_heads=8))
        model = nnx.merge(graphdef, jax.tree.map(jnp.copy, arrays))  # a step donates its state
        if method == "lora":
            layers = r"(dense_)?layers\..*" if family == "glm4_moe" else "all-linear"  # experts too
            lora.attach(model, lora.LoRAConfig(r=4, lora_dropout=0.1, target_modules=layers))
        parts = partition(model, ("adapter",) if method == "lora" else (".*",))
        optimizer = optax.adamw(RATE[method])
        state = init_state(by_path(parts[1]), optimizer, mesh)
        step = make_step(parts[0], parts[1], loss, optimizer, state, seed=5)

        @jax.jit
        def routed(trainable, frozen, batch, number):  # with the dropout of that step
            key = jax.random.fold_in(jax.random.key(5), number)
            model = nnx.merge(parts[0], bind(parts[1], trainable), frozen)
            return model._run(batch, None, key, loads=True)[2]
        items, losses, seen = batches(model.config), [], []
        with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Router, "load", margins)
            for number in range(STEPS):
                batch = put(items[number % len(items)], mesh)
                if family == "glm4_moe":
                    seen.append(np.asarray(routed(state["trainable"], parts[2], batch,
                                                  state["step"])))
                state, metrics = step(state, parts[2], batch)
                losses.append(float(metrics["loss"]))
        return np.array(losses), np.array(seen)
    return run


@pytest.mark.parametrize(("family", "method", "mesh"), [
    pytest.param(*case, id="-".join(case), marks=() if case in DEFAULT else pytest.mark.slow)
    for case in ((family, method, mesh) for family in FAMILIES for method in TOLERANCE
                 for mesh in MESHES if family == "glm4_moe" or "expert" not in mesh)])
def test_twenty_losses_are_those_of_one_device(twenty, family, method, mesh):
    wanted, one = twenty(family, method, data=1)
    losses, many = twenty(family, method, **MESHES[mesh])
    np.testing.assert_allclose(losses, wanted, rtol=TOLERANCE[method])
    assert wanted[-4:].mean() < wanted[:4].mean()  # it learns: later steps hang on earlier ones
    if family == "glm4_moe":
        real = np.isfinite(one)
        assert real.sum() > STEPS * 3 * ROWS * LENGTH // 4
        rounding = np.abs(many[real] - one[real]).max()
        assert one.min() > 2 * rounding, (one.min(), rounding)


def test_the_default_cases_have_every_family_axis_and_method():
    assert [{case[n] for case in DEFAULT} for n in range(2)] == [set(FAMILIES), set(TOLERANCE)]
    assert {case[2] for case in DEFAULT} == {*AXES, "mixed"}
