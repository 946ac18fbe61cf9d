"""Schedules at their key points, AdamW against PyTorch's, and what decays."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from glm_jax.errors import UserError
from glm_jax.train.optimizer import make_optimizer, make_schedule


def settings(**fields):
    return SimpleNamespace(**{
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
