"""Schedules at their key points, AdamW and Adafactor against PyTorch's, what decays, the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from glm_jax.errors import UserError
from glm_jax.train.optimizer import make_optimizer, make_schedule


def settings(**fields):
    return ConfigDict({
        "learning_rate": 1.0, "schedule": "constant", "warmup": 0, "final": 0.1,
        "weight_decay": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "clip_norm": 0.0, **fields})


@pytest.mark.parametrize(("schedule", "middle", "end"), [
    ("constant", 1.0, 1.0),
    ("linear", 0.55, 0.1),
    ("cosine", 0.55, 0.1),
    ("exponential", 0.1**0.5, 0.1),
])
def test_schedules(schedule, middle, end):
    rate = make_schedule(settings(schedule=schedule, warmup=10), 110)
    assert [float(rate(step)) for step in range(10)] == pytest.approx(
        [(step + 1) / 10 for step in range(10)])  # the first step trains, the tenth is at the peak
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(middle, rel=1e-3)
    assert float(rate(110)) == pytest.approx(end, rel=1e-3)


def test_warmup_as_a_share_and_in_steps():
    share, steps = (make_schedule(settings(warmup=w, schedule="linear"), 200) for w in (0.1, 20))
    np.testing.assert_allclose([share(i) for i in (0, 10, 20, 150)],
                               [steps(i) for i in (0, 10, 20, 150)])
    assert float(make_schedule(settings(), 5)(0)) == 1.0
    assert float(make_schedule(settings(warmup=1), 5)(0)) == 1.0


def test_bad_schedules():
    with pytest.raises(UserError, match="choose one of constant, linear, cosine, exponential"):
        make_schedule(settings(schedule="cosin"), 10)
    with pytest.raises(UserError, match="leave none of the 10 steps"):
        make_schedule(settings(warmup=10), 10)


PARAMETERS = {"layers.q_proj.kernel": (2, 3, 4), "layers.q_proj.bias": (2, 4), "norm.scale": (4,),
              "embed_tokens.embedding": (5, 4), "layers.q_proj.adapter.lora_a": (2, 3, 2),
              "layers.q_proj.adapter.lora_b": (2, 2, 4)}
UNDECAYED = {"layers.q_proj.bias", "norm.scale"}


def ones():
    return {name: np.ones(shape, np.float32) for name, shape in PARAMETERS.items()}


def test_matrices_decay_and_biases_and_norms_do_not():
    optimizer = make_optimizer(settings(weight_decay=0.5), lambda step: 0.1)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in PARAMETERS.items()}
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(zeros, ones())
    for name, update in updates.items():
        np.testing.assert_allclose(update, 0 if name in UNDECAYED else -0.05, err_msg=name)


def test_the_same_as_pytorch():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    start = {n: draw.normal(size=s).astype(np.float32) for n, s in PARAMETERS.items()}
    steps = [{n: 3 * draw.normal(size=s).astype(np.float32) for n, s in PARAMETERS.items()}
             for _ in range(5)]
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    adam = torch.optim.AdamW([
        {"params": [p for n, p in theirs.items() if n not in UNDECAYED], "weight_decay": 0.3},
        {"params": [p for n, p in theirs.items() if n in UNDECAYED], "weight_decay": 0.0},
    ], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    optimizer = make_optimizer(settings(weight_decay=0.3, b1=0.8, b2=0.95, eps=1e-6, clip_norm=1.5),
                               lambda step: 0.01)
    ours, state = start, optimizer.init(start)

    @jax.jit
    def step(gradients, state, ours):
        updates, state = optimizer.update(gradients, state, ours)
        return optax.apply_updates(ours, updates), state

    for gradients in steps:
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.5)
        adam.step()
        ours, state = step(gradients, state, ours)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach(), rtol=1e-5, atol=1e-6)


WIDE = {"layers.o_proj.kernel": (2, 128, 160), "layers.down_proj.kernel": (2, 192, 128),
        "layers.norm.scale": (2, 128), "embed_tokens.embedding": (130, 128),
        "layers.q_proj.adapter.lora_a": (2, 128, 8)}


def follow(optimizer, start, steps):
    """The parameters after some gradients."""
    step = jax.jit(lambda g, state, params: optimizer.update(g, state, params))
    state = optimizer.init(start)
    for gradients in steps:
        updates, state = step(gradients, state, start)
        start = optax.apply_updates(start, updates)
    return start


def test_adafactor_the_same_as_transformers():
    """Theirs knows no stacks: each layer is a parameter of its own there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    draw = np.random.default_rng(0)
    start = {n: draw.normal(size=s).astype(np.float32) for n, s in WIDE.items() if "lora" not in n}
    steps = [{n: scale * draw.normal(size=s.shape).astype(np.float32) for n, s in start.items()}
             for scale in (1, 3, 0.1, 5)]  # growing ones are clipped

    def layers(name, array):
        return list(array) if name.startswith("layers") else [array]
    theirs = {n: [torch.nn.Parameter(torch.tensor(x)) for x in layers(n, value)]
              for n, value in start.items()}
    how = {"lr": 0.01, "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8,
           "scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizers = [transformers.Adafactor(
        [x for n, xs in theirs.items() for x in xs if (n in {"layers.norm.scale"})
         == (not decay)], weight_decay=decay, **how) for decay in (0.3, 0.0)]
    for gradients in steps:
        for name, parameters in theirs.items():
            for parameter, gradient in zip(parameters, layers(name, gradients[name]), strict=True):
                parameter.grad = torch.tensor(gradient)
        for optimizer in optimizers:
            optimizer.step()
    ours = follow(make_optimizer(settings(name="adafactor", weight_decay=0.3, b1=0.0,
                                                 eps=1e-15), lambda step: 0.01), start, steps)
    for name, value in ours.items():
        wanted = np.stack([x.detach().numpy() for x in theirs[name]])
        np.testing.assert_allclose(value.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


def test_adafactors_rate_of_forgetting_and_first_moment():
    """b2 bounds the rate, b1 is the mean of the scaled gradients as it is of AdamW's gradients."""
    draw = np.random.default_rng(0)
    start = {n: np.zeros(s, np.float32) for n, s in WIDE.items()}
    steps = [{n: draw.normal(size=s).astype(np.float32) for n, s in WIDE.items()} for _ in range(4)]
    results = {b1: follow(make_optimizer(settings(name="adafactor", b1=b1, b2=0.5), lambda _: 1.0),
                          start, steps) for b1 in (0.0, 0.6)}
    name = "layers.norm.scale"
    square, mean, at, means = 0.0, 0.0, 0.0, 0.0
    for number, gradients in enumerate(steps, 1):
        gradient = gradients[name].astype(np.float64)
        rate = min(0.5, 1 - number**-0.8)
        square = rate * square + (1 - rate) * gradient**2
        scaled = gradient / np.sqrt(square)
        scaled /= np.maximum(1, np.sqrt(np.mean(scaled**2, axis=-1, keepdims=True)))
        mean = 0.6 * mean + 0.4 * scaled
        at, means = at - scaled, means - mean / (1 - 0.6**number)
    np.testing.assert_allclose(results[0.0][name], at, rtol=1e-4)
    np.testing.assert_allclose(results[0.6][name], means, rtol=1e-4)


@pytest.mark.parametrize(("fields", "bytes_each"), [
    ({}, 8), ({"state_dtype": "bfloat16"}, 4), ({"state_dtype": "int8"}, 2 + 2 * 4 / 256),
    ({"name": "adafactor", "b1": 0.0}, 4 * (1 / 512 + 1 / 256)),
    ({"name": "adafactor"}, 4 + 4 * (1 / 512 + 1 / 256)),
    ({"name": "adafactor", "state_dtype": "int8"}, 1 + 4 / 256 + 4 * (1 / 512 + 1 / 256)),
])
def test_bytes_of_the_state(fields, bytes_each):
    params = {"layers.q_proj.kernel": jax.ShapeDtypeStruct((4, 512, 256), np.float32)}
    small = {"layers.norm.scale": jax.ShapeDtypeStruct((4, 8192), np.float32),
             "layers.q_proj.adapter.lora_a": jax.ShapeDtypeStruct((4, 64, 8), np.float32)}

    def size(params):
        state = jax.eval_shape(make_optimizer(settings(**fields), lambda step: 1.0).init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size(params) / (4 * 512 * 256) == pytest.approx(bytes_each, abs=1e-4)
    moments = 1 if fields.get("name") else 2
    moments += 1 if fields.get("name") and fields.get("b1") != 0.0 else 0
    assert size(small) / (4 * 8192 + 4 * 64 * 8) == pytest.approx(4 * moments, rel=0.01)
    embedding = {"embed_tokens.embedding": jax.ShapeDtypeStruct((512, 256), np.float32)}
    if fields.get("state_dtype") == "int8":
        assert size(embedding) > 4 * 512 * 256


def test_bad_optimizers():
    for fields, message in [({"name": "adam"}, "optimizer.name='adam': choose one of adamw, adaf"),
                            ({"state_dtype": "int4"}, "choose one of float32, bfloat16, int8"),
                            ({"name": "adafactor", "b1": 0.0, "state_dtype": "int8"},
                             "no moment that it would be used for"),
                            ({"offload": True, "state_dtype": "int8"}, "XLA can't bring int8")]:
        with pytest.raises(UserError, match=message):
            make_optimizer(settings(**fields), lambda step: 1.0)


@pytest.mark.slow
def test_curves_beside_adamws_in_float32():
    """A small network that copies another: the others go down as AdamW does, or faster."""
    keys = jax.random.split(jax.random.key(0), 4)
    def matrices(key, scale):
        return {"layers.mlp.kernel": scale * jax.random.normal(key, (2, 64, 128)) / 8,
                "layers.out.kernel": scale * jax.random.normal(key, (2, 128, 64)) / 11}
    x, teacher = jax.random.normal(keys[0], (256, 64)), matrices(keys[1], 2.0)

    def loss(params, at=x):
        y = [at, at]
        for i, tree in enumerate((params, teacher)):
            for layer in range(2):
                inner = jnp.tanh(y[i] @ tree["layers.mlp.kernel"][layer])
                y[i] = y[i] + inner @ tree["layers.out.kernel"][layer]
        return jnp.mean((y[0] - y[1])**2)

    def curve(fields):
        optimizer = make_optimizer(settings(b2=0.99, clip_norm=1.0, **fields), lambda step: 3e-3)

        def step(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value
        start = matrices(keys[2], 0.5)
        return jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), None, 150)[1])()
    exact = curve({})
    assert exact[-1] < 0.05 * exact[0]
    for fields, closest, worst in [
            ({"state_dtype": "bfloat16"}, 0.998, 1.002), ({"state_dtype": "int8"}, 0.8, 1.02),
            ({"name": "adafactor"}, 0.4, 1.02), ({"name": "adafactor", "b1": 0.0}, 0.7, 1.3),
            ({"name": "adafactor", "state_dtype": "int8"}, 0.4, 1.02)]:
        ratio = np.asarray(curve(fields) / exact)
        assert closest < ratio.min() and ratio.max() < worst, fields
