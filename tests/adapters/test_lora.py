"""LoRA: its arithmetic, what it attaches to, and merging."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax.adapters import partition
from glm_jax.adapters.lora import (
    LoRA,
    LoRAConfig,
    appended,
    attach,
    detach,
    dropout_mask,
    folded,
    lora,
    merge,
    merged,
    thin,
)
from glm_jax.adapters.targets import linears
from glm_jax.errors import UserError
from glm_jax.nn.batch import causal_batch
from glm_jax.nn.layers import Linear, of_one_input
from glm_jax.parallel.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(2, 96, (4, 10))


def logits(model):
    return np.asarray(_logits(*nnx.split(model)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, state):
    model = nnx.merge(graphdef, state)
    return model.logits(model(causal_batch(TOKENS))[0])


def written_out(x, y, a, b, mask, scale):
    return lora(y, thin(x, a, mask), b, scale)


def plain(x, y, a, b, mask, scale):
    x = x if mask is None else x * mask
    return y + scale * jnp.einsum("...i,ir,ro->...o", x, a, b)


@pytest.mark.parametrize("dropped", [False, True])
def test_written_out_derivative_is_the_derivative(dropped):
    keys = jax.random.split(jax.random.key(0), 6)
    x, y = jax.random.normal(keys[0], (3, 5, 7)), jax.random.normal(keys[1], (3, 5, 11))
    a, b = jax.random.normal(keys[2], (7, 2)), jax.random.normal(keys[3], (2, 11))
    mask = jax.random.bernoulli(keys[4], 0.7, x.shape) if dropped else None
    weight = jax.random.normal(keys[5], y.shape)

    def loss(f):
        return lambda *arrays: jnp.sum(weight * jnp.sin(f(*arrays, mask, 1.5)))

    (ours, ours_grad), (theirs, theirs_grad) = (
        jax.value_and_grad(loss(f), argnums=(0, 1, 2, 3))(x, y, a, b)
        for f in (written_out, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


def test_folding_the_adapter_into_the_kernel_changes_neither_result_nor_gradients():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (3, 7, 16), (16, 12), (16, 2), (2, 12), (3, 7, 12)
    *inputs, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    ours, back = jax.vjp(lambda *args: folded(*args, 0.5), *inputs)
    theirs, plain_back = jax.vjp(lambda x, w, a, b: x @ w + 0.5 * (x @ a) @ b, *inputs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, other in zip(back(dy), plain_back(dy), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropped", [False, True])
def test_one_product_with_b_below_the_kernel_is_the_two_of_them(dropped):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = (3, 7, 16), (16, 24), (16, 2), (2, 24), (3, 7, 24)
    *inputs, dy = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    mask = jax.random.bernoulli(keys[5], 0.7, shapes[0]) if dropped else None
    ours, back = jax.vjp(lambda x, w, a, b: appended(x, thin(x, a, mask), w, b, 0.5), *inputs)
    theirs, plain_back = jax.vjp(lambda x, w, a, b: plain(x, x @ w, a, b, mask, 0.5), *inputs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for mine, other in zip(back(dy), plain_back(dy), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


def test_a_gpu_takes_one_product_where_a_layer_gives_more_than_it_takes(monkeypatch):
    monkeypatch.setattr("glm_jax.adapters.lora.platform", lambda: "gpu")
    keys = jax.random.split(jax.random.key(0), 4)
    for out, products in ((48, 2), (16, 3)):
        shapes = (64, 32), (32, out), (32, 2), (2, out)
        x, w, a, b = (jax.random.normal(k, s, jnp.bfloat16)
                      for k, s in zip(keys, shapes, strict=True))
        adapter = LoRA(a, b, ("embed", "mlp"), LoRAConfig(r=2, lora_alpha=1))
        assert str(jax.make_jaxpr(adapter)(x, w)).count("dot_general") == products
        wide = [v.astype(jnp.float32) for v in (x, w, a, b)]
        np.testing.assert_allclose(adapter(x, w).astype(jnp.float32),
                                   wide[0] @ wide[1] + 0.5 * wide[0] @ wide[2] @ wide[3],
                                   rtol=0.02, atol=0.2)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("dropout", "products"), [(0.0, 1), (0.5, 2)])
def test_layers_with_one_input_share_the_product_of_their_a(monkeypatch, platform, dropout,
                                                             products):
    """The first and the last have one A, the second has its own, the third is not adapted."""
    monkeypatch.setattr("glm_jax.adapters.lora.platform", lambda: platform)
    monkeypatch.setattr("glm_jax.adapters.lora.rounds", lambda x: True)  # else all is folded
    config = LoRAConfig(r=2, lora_alpha=3, lora_dropout=dropout)
    layers = [Linear(16, out, ("embed", "mlp"), std=0.5, rngs=nnx.Rngs(out))
              for out in (24, 8, 12, 20)]
    draw = np.random.default_rng(0)
    for n in (0, 1, 3):
        a, b = draw.normal(size=(16, 2)), draw.normal(size=(2, layers[n].kernel[...].shape[1]))
        layers[n].adapter = LoRA(jnp.float32(a), jnp.float32(b), ("embed", "mlp"), config)
    layers[3].adapter.lora_a = layers[0].adapter.lora_a
    graphdef, state = nnx.split(nnx.List(layers))
    x, key = jnp.float32(draw.normal(size=(3, 7, 16))), jax.random.key(0)
    keys = list(jax.random.split(key, 3)) if dropout else [None] * 3

    def outputs(state, x, together):
        layers = nnx.merge(graphdef, state)
        own = [keys[0], keys[1], keys[2], keys[0]]
        if together:  # the key of the last is not used
            return of_one_input(layers, x, [*own[:3], keys[2]])
        return [layer(x, key) for layer, key in zip(layers, own, strict=True)]

    def gradients(together):
        return jax.grad(lambda *args: sum(jnp.sum(jnp.sin(y)) for y in outputs(*args, together)),
                        argnums=(0, 1))(state, x)
    for ours, alone in ((outputs(state, x, True), outputs(state, x, False)),
                        (gradients(True), gradients(False))):
        for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)
    program = str(jax.make_jaxpr(functools.partial(outputs, together=True))(state, x))
    narrow = re.findall(r"f32\[21,(?:2|4)\] = dot_general", program)
    assert len(narrow) == products


@pytest.mark.parametrize(("axes", "products"), [(("embed", "mlp"), 2), (("mlp", "embed"), 3)])
def test_what_a_mesh_splits_is_not_appended_to(monkeypatch, axes, products):
    """A concatenation along a split axis would send the activations from device to device."""
    monkeypatch.setattr("glm_jax.adapters.lora.platform", lambda: "gpu")
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    adapter = LoRA(jnp.ones((32, 2)), jnp.ones((2, 48)), axes, LoRAConfig(r=2))
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(adapter)(jnp.ones((64, 32), jnp.bfloat16),
                                         jnp.ones((32, 48), jnp.bfloat16))
    assert str(traced).count("dot_general") == products


def test_in_bfloat16_the_gradients_of_float32_parameters_stay_float32():
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = (jax.random.normal(k, (256, 16), jnp.bfloat16) for k in keys[:2])
    a, b = jax.random.normal(keys[2], (16, 2)), jax.random.normal(keys[3], (2, 16))

    def loss(f, a, b):
        return jnp.sum(f(x, y, a, b, None, 0.5).astype(jnp.float32))

    assert written_out(x, y, a, b, None, 0.5).dtype == jnp.bfloat16
    ours = jax.grad(loss, argnums=(1, 2))(written_out, a, b)
    exact = jax.grad(loss, argnums=(1, 2))(
        lambda x, y, *rest: plain(x.astype(jnp.float32), y.astype(jnp.float32), *rest), a, b)
    for mine, other in zip(ours, exact, strict=True):
        assert mine.dtype == jnp.float32
        assert np.abs(mine - other).max() < 0.02 * np.abs(other).max()


def test_dropout_is_on_the_input_of_a_only():
    config = LoRAConfig(r=2, lora_alpha=6, lora_dropout=0.25)
    a, b = jnp.ones((9, 2)), jnp.ones((2, 5))
    adapter = LoRA(a, b, ("embed", "mlp"), config)
    x, w, key = jnp.arange(18.).reshape(2, 9), jnp.ones((9, 5)), jax.random.key(1)
    kept = dropout_mask(key, x.shape, 0.25)
    np.testing.assert_allclose(adapter(x, w, key), x @ w + 3 * ((x * kept / 0.75) @ a) @ b,
                               rtol=1e-6)
    np.testing.assert_allclose(adapter(x, w), x @ w + 3 * (x @ a) @ b, rtol=1e-6)
    many = dropout_mask(key, (400, 251), 0.25)
    assert many.shape == (400, 251)
    for part in (many, many[:, ::2], many[:, 1::2]):
        assert abs(float(part.mean()) - 0.75) < 0.01
    assert abs(np.corrcoef(many[:, 0:-1:2].ravel(), many[:, 1::2].ravel())[0, 1]) < 0.02


def test_a_new_adapter_changes_nothing_and_depends_on_seed_and_path_only(make):
    base, model, few, other = (make() for _ in range(4))
    attach(model, LoRAConfig(r=4), seed=1)
    attach(few, LoRAConfig(r=4, target_modules=("down_proj",)), seed=1)
    attach(other, LoRAConfig(r=4), seed=2)
    np.testing.assert_array_equal(logits(model), logits(base))
    a, same, different = (np.asarray(linears(m)["layers.mlp.down_proj"].adapter.lora_a[...])
                          for m in (model, few, other))
    np.testing.assert_array_equal(a, same)
    assert np.abs(a - different).max() > 0
    bound = 48 ** -0.5  # torch's kaiming_uniform_(a=sqrt(5)) for 48 inputs
    assert a.shape == (3, 48, 4) and 0.95 * bound < np.abs(a).max() <= bound
    assert np.abs(a[0] - a[1]).max() > 0
    # Every layer of its own: none of the six begins as another does.
    firsts = {float(layer.adapter.lora_a[...].ravel()[0]) for layer in linears(model).values()}
    assert len(firsts) == 6


@pytest.mark.parametrize("head", ["lm", "sequence", "token"])
def test_all_linear_leaves_the_head_out(make, head):
    model = make(head, tie_word_embeddings=False)
    attach(model, LoRAConfig())
    adapted = {path for path, layer in linears(model).items() if hasattr(layer, "adapter")}
    assert adapted == {path for path in linears(model) if path.startswith("layers.")}
    assert len(adapted) == len(linears(model)) - 1 == 7


@pytest.mark.parametrize("target_modules", [
    ("q_proj", "v_proj"), "q_proj|v_proj", r".*\.(q|v)_proj", ("self_attn.q_proj", "v_proj"),
    ("layers.self_attn.q_proj", "layers.self_attn.v_proj"), r"model\.layers\.\d+\..*(q|v)_proj",
    ("v_proj", *(f"model.layers.{n}.self_attn.q_proj" for n in range(3)))])
def test_targets_by_our_paths_and_by_pytorchs(make, target_modules):
    model = make("sequence")
    if target_modules == "q_proj|v_proj":  # an expression means the whole path
        with pytest.raises(UserError, match="matches no linear layer"):
            attach(model, LoRAConfig(target_modules=target_modules))
        return
    attach(model, LoRAConfig(target_modules=target_modules))
    adapted = [path for path, layer in linears(model).items() if hasattr(layer, "adapter")]
    assert adapted == ["layers.self_attn.q_proj", "layers.self_attn.v_proj"]


@pytest.mark.parametrize(("config", "message"), [
    ({"target_modules": ("q_proj", "qproj")}, "'qproj' matches no linear layer; did you mean "
     "'q_proj'.*down_proj, gate_up_proj, k_proj"),
    ({"target_modules": ("proj",)}, "'proj' matches no linear layer"),
    ({"target_modules": ("score",), "modules_to_save": ("score",)}, "'score' matches no linear"),
    ({"target_modules": ("model.layers.1.mlp.down_proj",)}, "down_proj is named in layer 1 but not "
     "in layer 0"),
    ({"target_modules": "("}, "not a regular expression"),
    ({"target_modules": ()}, "target_modules is empty"),
    ({"r": 0}, "r must be a positive"),
    ({"lora_alpha": "8"}, "lora_alpha must be a number"),
    ({"lora_dropout": 1.0}, "lora_dropout must be"),
])
def test_bad_configs_are_refused(make, config, message):
    model = make("sequence")
    with pytest.raises(UserError, match=message):
        attach(model, LoRAConfig(**config))
    assert not any(hasattr(layer, "adapter") for layer in linears(model).values())


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_computes_the_same_and_detaching_restores_the_base(make, shake, rslora):
    model = make()
    before = logits(model)
    attach(model, LoRAConfig(r=4, lora_alpha=6, use_rslora=rslora))
    with pytest.raises(UserError, match="an adapter already"):
        attach(model, LoRAConfig(r=4))
    shake(model)
    adapted = logits(model)
    assert np.abs(adapted - before).max() > 0.1
    folded = merged(model)
    np.testing.assert_allclose(logits(folded), adapted, rtol=1e-4, atol=1e-4)
    scale = 6 / (2 if rslora else 4)
    layer, whole = (linears(m)["layers.self_attn.k_proj"] for m in (model, folded))
    expected = layer.kernel[...] + scale * layer.adapter.lora_a[...] @ layer.adapter.lora_b[...]
    np.testing.assert_allclose(whole.kernel[...], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(logits(model), adapted)  # the copy was merged, not the model
    assert jax.tree.structure(nnx.state(folded)) == jax.tree.structure(nnx.state(make()))
    detach(model)
    np.testing.assert_array_equal(logits(model), before)
    attach(model, LoRAConfig(r=4))
    merge(model)
    np.testing.assert_array_equal(logits(model), before)


def training(model, patterns):
    graphdef, trainable, frozen = partition(model, patterns)

    def loss(trainable, frozen):
        whole = nnx.merge(graphdef, trainable, frozen, copy=True)
        hidden, _ = whole(causal_batch(TOKENS), key=jax.random.key(5))
        return jnp.mean(jax.nn.logsumexp(whole.logits(hidden), axis=-1))

    return jax.jit(jax.value_and_grad(loss)), trainable, frozen


def products(jaxpr):
    """The shapes of all matrix products of a program but a b itself, those of its parts too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            if [equation.invars[0].aval.shape[n] for n in summed] != [3]:  # the rank
                yield equation.outvars[0].aval.shape
        yield from (shape for part in jax.core.jaxprs_in_params(equation.params)
                    for shape in products(part))


def test_no_gradient_is_computed_for_frozen_kernels(make):
    model = make("sequence")
    config = LoRAConfig(r=3, modules_to_save=("score",))
    attach(model, config)
    step, *state = training(model, config.trainable)
    full, *whole = training(make("sequence"), (".*",))
    kernels = {layer.kernel[...].shape[1:] for path, layer in linears(model).items()
               if path.startswith("layers.")}
    with_gradient = set(products(full.trace(*whole).jaxpr.jaxpr))
    assert {shape for k in kernels for shape in (k, k[::-1]) if shape in with_gradient}
    without = set(products(step.trace(*state).jaxpr.jaxpr))
    assert not {shape for k in kernels for shape in (k, k[::-1]) if shape in without}


def test_on_a_mesh_it_begins_and_learns_alike(make, shake):
    config = LoRAConfig(r=4, lora_dropout=0.1, target_modules=("q_proj", "down_proj"),
                        modules_to_save=("score",))

    def run(mesh):
        model = make("sequence", mesh=mesh)
        attach(model, config, seed=7)
        begun = [layer.adapter.lora_a[...] for layer in linears(model).values()
                 if hasattr(layer, "adapter")]
        shake(model)
        step, *state = training(model, config.trainable)
        with jax.set_mesh(mesh):
            return begun, *step(*state)

    begun, loss, gradient = run(make_mesh({}))
    for sizes, split in (({"fsdp": 2, "tensor": 2}, {"fsdp", "tensor"}),
                         ({"fsdp": 2, "sequence": 2}, {("fsdp", "sequence"), None})):
        begun_there, loss_there, gradient_there = run(make_mesh(sizes))
        for here, there in zip(begun, begun_there, strict=True):
            np.testing.assert_array_equal(here, there)
        assert {a.sharding.spec[1] for a in begun_there} == split
        np.testing.assert_allclose(loss, loss_there, rtol=1e-6)
        for here, there in zip(*map(jax.tree.leaves, (gradient, gradient_there)), strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5 * np.abs(here).max())


def test_tokens_split_over_a_sequence_axis_are_not_gathered():
    mesh = make_mesh({"fsdp": 2, "sequence": 4})
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp", "sequence")), \
        NamedSharding(mesh, PartitionSpec())
    shapes = (jax.ShapeDtypeStruct((4, 16, n), jnp.float32, sharding=split) for n in (8, 12))
    small = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for s in ((8, 2), (2, 12)))

    def loss(*arrays):
        return jnp.sum(written_out(*arrays, None, 2.0) ** 2)

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), out_shardings=(
            split, split, whole, whole)).lower(*shapes, *small).compile().as_text()
    assert "all-reduce" in program and "all-gather" not in program
