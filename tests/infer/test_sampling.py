"""Filters against numpy and against transformers' logits warpers; draws against their shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.infer.sampling import (
    Sampling,
    candidates,
    choose,
    keep_min_p,
    keep_top_p,
    penalise,
    sampling,
)


def logits(vocabulary=50, spread=3.0, rows=4):
    return (spread * np.random.default_rng(0).standard_normal((rows, vocabulary))).astype("f")


def shares(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_enough_set(p, spread):
    x = logits(1000, spread)
    kept = np.isfinite(keep_top_p(jnp.asarray(x), p))
    for row, share in zip(kept, shares(x), strict=True):
        order = np.argsort(-share)
        before = np.cumsum(share[order]) - share[order]
        np.testing.assert_array_equal(np.sort(order[before < p]), np.flatnonzero(row))


def test_top_p_keeps_the_logits_and_all_of_a_tie():
    x = jnp.array([[2.0, 2.0, 0.0, -jnp.inf], [1.0, 9.0, 1.0, 1.0]])
    np.testing.assert_array_equal(keep_top_p(x, 0.3)[0], [2, 2, -np.inf, -np.inf])
    np.testing.assert_array_equal(keep_top_p(x, 0.9)[1], [-np.inf, 9, -np.inf, -np.inf])


def test_min_p():
    kept = np.isfinite(keep_min_p(jnp.asarray(logits()), 0.2))
    share = shares(logits())
    np.testing.assert_array_equal(kept, share >= 0.2 * share.max(axis=-1, keepdims=True))


def test_repetition_penalty():
    x, seen = jnp.array([[2.0, 2.0, -2.0, -2.0]]), jnp.array([[True, False, True, False]])
    np.testing.assert_array_equal(penalise(x, seen, 4.0), [[0.5, 2, -8, -2]])


@pytest.mark.parametrize("how", [
    {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1}, {"temperature": 1.1, "top_k": 999},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.05}])
def test_equals_the_warpers_of_transformers_in_their_order(how):
    import torch
    from transformers.generation import logits_process as hf
    x = logits()
    wanted = torch.tensor(x)
    for name, warper in (("temperature", hf.TemperatureLogitsWarper),
                         ("top_k", hf.TopKLogitsWarper), ("top_p", hf.TopPLogitsWarper),
                         ("min_p", hf.MinPLogitsWarper)):
        if name in how:
            wanted = warper(how[name])(None, wanted)
    ours, ids = candidates(jnp.asarray(x), sampling(**how))
    if ids is not None:
        whole = np.full(x.shape, -np.inf, "f")
        np.put_along_axis(whole, np.asarray(ids), np.asarray(ours), axis=1)
        ours = whole
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-5)


def test_the_penalty_equals_transformers():
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
    x, row = logits(), np.array([[1, 5, 5], [0, 2, 3], [7, 8, 9], [49, 48, 0]])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(row), torch.tensor(x))
    seen = np.zeros(x.shape, bool)
    np.put_along_axis(seen, row, True, axis=1)
    np.testing.assert_allclose(penalise(jnp.asarray(x), seen, 1.7), wanted, rtol=1e-6)


@pytest.mark.parametrize("how", [Sampling(0.8), Sampling(0.8, top_k=3), Sampling(0.8, top_p=0.9)])
def test_draws_come_as_often_as_their_shares_say(how):
    x = jnp.asarray(logits(8, 1.5, rows=1))
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = jax.jit(jax.vmap(lambda key: choose(x, how, None, key)))(keys)
    kept, ids = candidates(x, how)
    wanted = np.zeros(8)
    wanted[np.arange(8) if ids is None else np.asarray(ids)[0]] = shares(kept)[0]
    np.testing.assert_allclose(np.bincount(drawn[:, 0], minlength=8) / 20000, wanted, atol=0.015)


def test_greedy_takes_the_largest_after_the_penalty():
    x, key = jnp.array([[3.0, 2.0, 1.0]]), jax.random.key(0)
    seen = jnp.array([[True, False, False]])
    assert choose(x, Sampling(), None, key) == 0
    assert choose(x, Sampling(repetition_penalty=2.0), seen, key) == 1


def test_settings_that_change_nothing_are_off():
    assert sampling(0.7, 0, 1.0, 0.0, 1.0) == Sampling(0.7)
    assert sampling(0, 5, 0.5, 0.5, 2.0) == Sampling(repetition_penalty=2.0)
    assert sampling(np.float32(0.5), np.int64(3)) == Sampling(0.5, 3)


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -1), ("temperature", float("nan")), ("temperature", "hot"), ("top_k", -1),
    ("top_k", 2.5), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2),
    ("repetition_penalty", 0)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(UserError, match=f"{name} must be"):
        sampling(**{"temperature": 1.0, name: value})
