"""One training step: the same on every mesh, only what trains is touched, bad steps are skipped."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from glm_jax.adapters import lora, partition
from glm_jax.data.packing import Piece, Shape, assemble
from glm_jax.nn.loss import classification_loss
from glm_jax.parallel.mesh import make_mesh, put, sharding
from glm_jax.train.chips import topology
from glm_jax.train.optimizer import make_optimizer
from glm_jax.train.plan import _tpus
from glm_jax.train.step import batch_weight, bind, by_path, init_state, judged, make_step
from tests.packed import KINDS, assert_same, loss_and_gradient, model_of
from tests.packed import batches as packings

ONE = {"data": 1}
SHAPE = Shape(rows=8, length=16, examples=3)


def loss(model, batch, key):
    return classification_loss(model.classify(batch, key), batch.labels, batch.label_weights)


def batches(count, shape=SHAPE, seed=0):
    """Rows of one to three examples, with weights of classes."""
    draw = np.random.default_rng(seed)

    def piece():
        label = int(draw.integers(3))
        return Piece(draw.integers(1, 67, draw.integers(2, 6)), label=label,
                     label_weight=(0.5, 1.0, 2.0)[label])
    return [assemble([[piece() for _ in range(draw.integers(1, 4))] for _ in range(shape.rows)],
                     shape, 0) for _ in range(count)]


class Trainer(NamedTuple):
    mesh: jax.sharding.Mesh
    state: dict
    frozen: nnx.State
    step: object
    parts: tuple

    def run(self, items):
        """The losses and the last state."""
        state, losses = self.state, []
        with jax.set_mesh(self.mesh):
            for batch in items:
                state, metrics = self.step(state, self.frozen, put(batch, self.mesh))
                losses.append(float(metrics["loss"]))
        return losses, state, metrics


@pytest.fixture(scope="module")
def trainer(tiny):
    def make(sizes=ONE, patterns=("adapter", "score"), dropout=0.0, accumulate=1,
             optimizer=None, ema=0.0, offload=False, **fields):
        mesh = make_mesh(sizes)
        graphdef, arrays = nnx.split(tiny("sequence", mesh, **fields))
        model = nnx.merge(graphdef, jax.tree.map(jnp.copy, arrays))  # a step donates its state
        if "adapter" in patterns:
            config = lora.LoRAConfig(r=4, lora_alpha=8, lora_dropout=dropout,
                                     target_modules=("q_proj", "o_proj", "down_proj"))
            lora.attach(model, config)
        parts = partition(model, patterns)
        optimizer = optimizer or optax.adamw(1e-2)
        state = init_state(by_path(parts[1]), optimizer, mesh, ema, offload)
        step = make_step(parts[0], parts[1], loss, optimizer, state, seed=5, accumulate=accumulate,
                         ema=ema)
        return Trainer(mesh, state, parts[2], step, parts)
    return make


def host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_close(tree, other, **how):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        there = dict(jax.tree_util.tree_leaves_with_path(other))[path]
        np.testing.assert_allclose(leaf, there, err_msg=str(path), **how)


def test_what_twenty_steps_train_is_the_same_on_a_mesh(trainer):
    """Of a classifier; test_meshes.py has the losses of every family on every axis."""
    wanted, one, _ = trainer(dropout=0.1).run(batches(20))
    losses, state, _ = trainer({"fsdp": 4, "tensor": 2}, dropout=0.1).run(batches(20))
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert len(set(losses)) == 20
    assert_close(host(state["trainable"]), host(one["trainable"]), atol=1e-4)


def test_everything_lies_where_the_rules_say(trainer):
    ours = trainer({"fsdp": 4, "tensor": 2})
    frozen = dict(nnx.to_flat_state(ours.frozen))
    embedding = frozen["embed_tokens", "embedding"].get_value()
    kernel = frozen["layers", "self_attn", "q_proj", "kernel"].get_value()
    assert tuple(kernel.sharding.spec) == (None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)
    assert embedding.addressable_shards[0].data.shape == (67, 8)  # 67 is odd: not split
    wanted = {path: sharding(p.get_metadata("axes"), p.get_value().shape, ours.mesh)
              for path, p in ((".".join(map(str, path)), p)
                              for path, p in nnx.to_flat_state(ours.parts[1]))}
    _, state, _ = ours.run(batches(2))
    parts = jax.tree.leaves(state["optimizer"], is_leaf=lambda x: hasattr(x, "mu"))
    moments = next(part for part in parts if hasattr(part, "mu"))
    for path, where in wanted.items():
        for tree in (state["trainable"], moments.mu, moments.nu):
            assert tree[path].sharding.is_equivalent_to(where, tree[path].ndim), path
    a = state["trainable"]["layers.self_attn.q_proj.adapter.lora_a"]
    assert a.addressable_shards[0].data.shape == (2, 8, 4)
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(state))


def optimizer_of(**fields):
    return make_optimizer(ConfigDict({
        "weight_decay": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 1.0, **fields}),
        lambda step: 1e-2)


WIDE = {
    "layers.q_proj.kernel": ((3, 128, 128), (None, "fsdp", "tensor")),
    "layers.down_proj.kernel": ((3, 256, 128), (None, "tensor", "fsdp")),
    "layers.mlp.experts.up_proj.kernel": ((2, 2, 128, 384), (None, None, "fsdp", "tensor")),
    "layers.norm.scale": ((3, 128), (None, None)),
    "layers.q_proj.bias": ((3, 128), (None, "tensor")),
    "embed_tokens.embedding": ((134, 128), ("tensor", "fsdp")),
    "score.kernel": ((128, 3), ("fsdp", None)),
}
# Optax's v_row is the mean over the longer axis, of a square over the last; v_col the other.
MEANS = {
    ("v_row", "layers.q_proj.kernel"): ((3, 128), (None, "fsdp")),
    ("v_col", "layers.q_proj.kernel"): ((3, 128), (None, "tensor")),
    ("v_row", "layers.down_proj.kernel"): ((3, 128), (None, "fsdp")),
    ("v_col", "layers.down_proj.kernel"): ((3, 256), (None, "tensor")),
    ("v_row", "layers.mlp.experts.up_proj.kernel"): ((2, 2, 128), (None, None, "fsdp")),
    ("v_col", "layers.mlp.experts.up_proj.kernel"): ((2, 2, 384), (None, None, "tensor")),
    ("v_row", "embed_tokens.embedding"): ((128,), ("fsdp",)),
    ("v_col", "embed_tokens.embedding"): ((134,), ("tensor",)),
}


@pytest.mark.parametrize("abstract", [False, True])
def test_statistics_and_scales_lie_as_their_parameter(abstract):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    trainable = {name: jax.ShapeDtypeStruct(shape, jnp.float32,
                                            sharding=NamedSharding(mesh, P(*spec)))
                 for name, (shape, spec) in WIDE.items()}
    if not abstract:
        trainable = {name: jax.device_put(jnp.ones(x.shape), x.sharding)
                     for name, x in trainable.items()}
    seen = set()
    for fields in ({"name": "adafactor"}, {"state_dtype": "int8"}, {"state_dtype": "bfloat16"}):
        state = init_state(trainable, optimizer_of(**fields), mesh)["optimizer"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = next((key.key for key in path if getattr(key, "key", None) in WIDE), None)
            field = ".".join(key.name for key in path if hasattr(key, "name"))
            shape, spec = MEANS.get((field, name)) or WIDE.get(name, ((), ()))
            if field.endswith("scale"):
                shape = (*shape[:-2], shape[-2] // 16, shape[-1] // 16)
            elif leaf.size <= 4:  # counts, and what Optax puts where nothing is kept
                shape, spec = leaf.shape, ()
            assert leaf.shape == shape, path
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), leaf.ndim), path
            seen.add((field, name, leaf.dtype.name))
        away = init_state(trainable, optimizer_of(**fields), mesh, offload=True)
        for leaf, here in zip(*map(jax.tree.leaves, (away["optimizer"], state)), strict=True):
            large = leaf.ndim > 1 and leaf.size >= 4096
            kind = "pinned_host" if large else leaf.sharding.mesh.devices.flat[0].default_memory(
                ).kind
            assert leaf.sharding == here.sharding.with_memory_kind(kind)
        assert all(x.sharding.memory_kind != "pinned_host" for x in away["trainable"].values())
    assert {(*which, "float32") for which in MEANS} | {
        ("ema", "layers.q_proj.kernel", "float32"), ("v", "layers.q_proj.bias", "float32"),
        ("nu.codes", "layers.mlp.experts.up_proj.kernel", "uint8"),
        ("mu.scale", "layers.down_proj.kernel", "float32"),
        ("nu", "embed_tokens.embedding", "float32"), ("nu", "embed_tokens.embedding", "bfloat16"),
        ("mu", "score.kernel", "float32")} <= seen


@pytest.mark.slow
def test_a_state_in_the_hosts_memory_is_the_same_and_stays_there(trainer):
    """As a TPU's and a GPU's; simulated devices have such memory too."""
    items = batches(4)
    items[2] = dataclasses.replace(items[2], label_weights=items[2].label_weights * np.nan)
    sizes = {"fsdp": 4, "tensor": 2}
    results = {}
    for offload in (False, True):
        # Of half of a key's bias the gradient is rounding alone: a small eps makes steps of it.
        ours = trainer(sizes, (".*",), optimizer=optimizer_of(offload=offload, eps=1e-3),
                       offload=offload, intermediate_size=64)  # large enough to be sent away
        _, results[offload], _ = ours.run(items)
        kinds = {path[-1]: leaf.sharding.memory_kind for path, leaf in
                 jax.tree_util.tree_leaves_with_path(results[offload]["optimizer"])
                 if leaf.size >= 4096 and leaf.ndim > 1}
        assert set(kinds.values()) == {"pinned_host" if offload else "device"}
    there, here = host(results[True]), host(results[False])
    assert_close(there["trainable"], here["trainable"], atol=1e-6)
    name = "layers.mlp.gate_proj.kernel"
    adam, (state, *_) = here["optimizer"][1][0], there["optimizer"][1]
    assert (state[name].count == 3).all() and np.abs(adam.nu[name]).max() > 0
    for field in ("mu", "nu"):
        wanted = getattr(adam, field)[name]
        np.testing.assert_allclose(getattr(state[name], field), wanted, rtol=0,
                                   atol=1e-5 * np.abs(wanted).max())


def memory_of_a_stacks_step(mesh, **fields):
    """What a step of one stack takes, and the bytes of the stack."""
    class Model(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jax.ShapeDtypeStruct((16, 1024, 4096), jnp.float32,
                                                         sharding=NamedSharding(mesh, P())))

    def loss(model, batch, key):
        return jnp.sum(jnp.tanh(model.kernel[...]))
    graphdef, trainable = nnx.split(Model())
    arrays, optimizer = by_path(trainable), optimizer_of(**fields)
    state = init_state(arrays, optimizer, mesh, offload=fields.get("offload", False))
    step = make_step(graphdef, trainable, loss, optimizer, state, seed=0)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, nnx.State({}), batches(1)[0]).compile()
    return compiled.memory_analysis(), arrays["kernel"].size * 4


@pytest.mark.parametrize("fields", [{"state_dtype": "bfloat16"}, {"name": "adafactor"}],
                         ids=lambda fields: next(iter(fields.values())))
def test_a_stack_is_updated_in_place(fields):
    """A CPU holds two stacks for the gradient, and none for a new state or the updates."""
    memory, stack = memory_of_a_stacks_step(make_mesh(ONE), **fields)
    assert memory.temp_size_in_bytes < 2.3 * stack


def test_a_state_in_the_hosts_memory_is_updated_in_place():
    """A TPU holds one gradient, its host one state."""
    memory, stack = memory_of_a_stacks_step(
        make_mesh(ONE, _tpus(topology("v5e:2x2"))[:1]), state_dtype="bfloat16", offload=True)
    assert memory.temp_size_in_bytes < 1.3 * stack
    assert memory.host_temp_size_in_bytes == 0


def test_the_average_follows_the_parameters_and_is_what_is_judged(trainer):
    ours = trainer(ema=0.2)
    assert judged(ours.state) is ours.state["average"]
    wanted, state = host(ours.state["trainable"]), ours.state
    for number, batch in enumerate(batches(3)):
        bad = number == 2  # a loss that is not finite moves nothing
        if bad:
            batch = dataclasses.replace(batch, label_weights=batch.label_weights * np.nan)
        with jax.set_mesh(ours.mesh):
            state, _ = ours.step(state, ours.frozen, put(batch, ours.mesh))
        left = min(0.2, (1 + number) / (10 + number))
        new = host(state["trainable"])
        if not bad:
            wanted = {path: left * old + (1 - left) * new[path] for path, old in wanted.items()}
    assert_close(host(state["average"]), wanted, atol=1e-6)
    assert any(np.abs(host(state["trainable"])[path] - old).max() > 1e-4
               for path, old in wanted.items())


def test_without_an_average_the_parameters_are_judged(trainer):
    ours = trainer()
    assert "average" not in ours.state and judged(ours.state) is ours.state["trainable"]


def test_frozen_parameters_have_no_state_and_do_not_change(trainer):
    ours = trainer()
    before = host(nnx.to_pure_dict(ours.frozen))
    trained = host(ours.state["trainable"])
    assert set(trained) == {"score.kernel"} | {
        f"layers.{layer}.adapter.lora_{x}" for x in "ab"
        for layer in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    size = sum(x.size for x in jax.tree.leaves(ours.state["optimizer"]))
    assert size == 2 * sum(x.size for x in trained.values()) + 1  # two moments, and Adam's count
    _, state, _ = ours.run(batches(2))
    assert_close(host(nnx.to_pure_dict(ours.frozen)), before, atol=0)
    assert all((np.asarray(state["trainable"][name]) != value).any()
               for name, value in trained.items())


def test_a_lora_step_costs_less_than_a_full_one(trainer):
    def flops(ours):
        with jax.set_mesh(ours.mesh):
            lowered = ours.step.lower(ours.state, ours.frozen, put(batches(1)[0], ours.mesh))
        return lowered.compile().cost_analysis()["flops"]
    adapter, full, head = (flops(trainer(patterns=patterns)) for patterns in (
        ("adapter", "score"), (".*",), ("score",)))
    # Forward and backward to the inputs are 4 of the 6 parts of full training.
    assert adapter < 0.85 * full
    assert head < 0.6 * full


@pytest.mark.parametrize("sizes", [ONE, {"data": 2}])
def test_micro_batches_add_up_to_one_batch(trainer, sizes):
    items = batches(3)
    whole, parts = trainer(), trainer(sizes, accumulate=4)
    losses, state, metrics = whole.run(items)
    others, other, there = parts.run(items)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    np.testing.assert_allclose(there["grad_norm"], metrics["grad_norm"], rtol=1e-4)
    assert_close(host(other["trainable"]), host(state["trainable"]), atol=1e-5)


def test_packed_rows_are_the_same_as_one_example_a_row(trainer):
    draw = np.random.default_rng(0)
    pieces = [Piece(draw.integers(1, 67, 3 + i % 4), label=i % 3, label_weight=1 + i % 3)
              for i in range(8)]
    packed = assemble([pieces[:3], pieces[3:5], pieces[5:], []], Shape(4, 18, 3), 0)
    apart = assemble([[piece] for piece in pieces], Shape(8, 6, 1), 0)
    results = [trainer(optimizer=optax.sgd(1.0)).run([batch]) for batch in (packed, apart)]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    assert_close(host(results[0][1]["trainable"]), host(results[1][1]["trainable"]), atol=1e-5)
    assert int(results[0][2]["tokens"]) == sum(len(piece.tokens) for piece in pieces)


def test_the_gradient_is_that_of_the_weighted_mean_and_the_norm_that_of_what_trains(trainer):
    ours, batch = trainer(optimizer=optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))), \
        batches(1)[0]
    graphdef, template, frozen = ours.parts
    before = host(ours.state["trainable"])

    def mean(arrays):
        model = nnx.merge(graphdef, bind(template, arrays), frozen)
        return loss(model, batch, None) / batch.label_weights.sum()
    value, gradient = jax.value_and_grad(mean)(jax.tree.map(jnp.asarray, before))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradient.values()))
    losses, state, metrics = ours.run([batch])
    assert losses[0] == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert norm > 0.1
    wanted = {name: before[name] - 0.1 / norm * np.asarray(gradient[name]) for name in before}
    assert_close(host(state["trainable"]), wanted, atol=1e-5)


def test_what_a_batch_is_divided_by():
    batch = batches(1)[0]
    assert float(batch_weight(batch)) == batch.label_weights.sum()
    tokens = assemble([[Piece(np.arange(3), np.arange(3), np.array([0, 1, 0.5], np.float32))]],
                      Shape(2, 4, 1), 0)
    assert float(batch_weight(tokens)) == 1.5


@pytest.mark.parametrize(("accumulate", "fields"), [
    (1, {}), (2, {"state_dtype": "bfloat16"})])  # the latter skips layer by layer
def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(trainer, accumulate, fields):
    good = batches(3)
    weights = good[1].label_weights.copy()
    weights[0, 0] = np.nan
    bad = jax.tree.map(lambda x: weights if x is good[1].label_weights else x, good[1])
    ours, reference = (trainer(accumulate=accumulate, optimizer=optimizer_of(**fields))
                       for _ in range(2))
    _, state, _ = ours.run(good[:1])
    before = host(state)
    losses, state, metrics = ours._replace(state=state).run([bad, bad])
    assert np.isnan(losses).all()
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 2)
    assert int(state["step"]) == 3
    for part in ("trainable", "optimizer"):
        assert_close(host(state)[part], before[part], atol=0)
    _, state, metrics = ours._replace(state=state).run(good[2:])
    assert (int(state["skipped"]), int(state["skipped_in_a_row"])) == (2, 0)
    _, wanted, _ = reference.run([good[0], good[2]])
    assert_close(host(state)["trainable"], host(wanted)["trainable"], atol=1e-6)


def test_dropout_follows_from_the_seed_and_the_step(trainer):
    batch = batches(1)[0]

    def losses(dropout):
        ours = trainer(dropout=dropout, optimizer=optax.sgd(0.5))
        _, state, _ = ours.run([batch])  # B begins at zero: dropout shows from the second loss on
        after = host(state["trainable"])
        return ours._replace(state=state).run([batch])[0][0], after
    dropped, again, plain = losses(0.5), losses(0.5), losses(0.0)
    assert dropped[0] == again[0]
    assert_close(dropped[1], again[1], atol=0)
    assert any((dropped[1][name] != plain[1][name]).any() for name in plain[1])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_teach_what_one_example_a_row_does(tiny, kind):
    """Under each family's mask and positions: the loss of tokens, and all gradients."""
    model = model_of(tiny, kind)
    packed, apart = (loss_and_gradient(model, batch) for batch in packings(model))
    assert_same(packed, apart)
