"""Generation with the cache equals computing everything again, whatever the padding and batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from glm_jax.errors import UserError
from glm_jax.infer import generate as module
from glm_jax.infer.cache import bucket
from glm_jax.infer.generate import Room, Stop, begin, decode, generate, prefill, step, stream
from glm_jax.infer.sampling import Sampling
from glm_jax.nn.batch import causal_batch
from glm_jax.nn.layers import apart
from glm_jax.parallel.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(1, 67, (3, 6))


@jax.jit
def all_logits(model, tokens):
    return model.logits(model(causal_batch(tokens))[0])


def recomputed(model, row, count):
    """Greedy tokens of one row, each from a whole forward pass (padded on the right, unseen)."""
    row = list(row)
    for _ in range(count):
        padded = np.zeros((1, 20), int)
        padded[0, :len(row)] = row
        row.append(int(np.argmax(all_logits(model, padded)[0, len(row) - 1])))
    return row[-count:]


def test_equals_recomputation(tiny):
    out = generate(tiny(), TOKENS, max_new_tokens=6)
    assert out.tokens.shape == (3, 6)
    for row, found in zip(TOKENS, out.tokens, strict=True):
        assert recomputed(tiny(), row, 6) == found.tolist()
    assert len(set(map(tuple, out.tokens))) == 3
    np.testing.assert_array_equal(out.lengths, 6)


def test_logits_of_every_step_equal_recomputation(tiny):
    model, count = tiny(), 4
    row = np.concatenate((TOKENS[:1], np.array([[3, 1, 4, 1]])), axis=1)
    whole = all_logits(model, row)[0]
    logits, cache = prefill(*nnx.split(model), TOKENS[:1], np.ones((1, 6), int), slots=12)
    np.testing.assert_allclose(logits[0], whole[5], rtol=1e-4, atol=1e-4)
    advance = jax.jit(step)
    for i in range(count):
        logits, cache = advance(model, jnp.asarray(row[:, 6 + i], jnp.int32), cache)
        np.testing.assert_allclose(logits[0], whole[6 + i], rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_padding_nor_on_its_neighbours(tiny):
    model = tiny()
    alone = [generate(model, row[None], max_new_tokens=5).tokens[0] for row in
             (TOKENS[0], TOKENS[1, :3])]
    left, right, holes = np.full((3, 2, 8), 66)
    left[0, 2:] = right[0, :6] = TOKENS[0]
    left[1, 5:] = right[1, :3] = TOKENS[1, :3]
    holes[0, :6], holes[1, [0, 3, 7]] = TOKENS[0], TOKENS[1, :3]
    for tokens in (left, right, holes):
        together = generate(model, tokens, tokens != 66, max_new_tokens=5)
        np.testing.assert_array_equal(together.tokens, alone)


def test_a_row_ends_at_a_stop_token_and_is_padded(tiny):
    model = tiny()
    free = generate(model, TOKENS, max_new_tokens=9).tokens
    stop = int(free[0, 2])
    out = generate(model, TOKENS, max_new_tokens=9, stop_ids=[stop, 1000], pad_id=55)
    for row, found, length in zip(free, out.tokens, out.lengths, strict=True):
        end = row.tolist().index(stop) + 1 if stop in row else 9
        assert length == end
        np.testing.assert_array_equal(found[:end], row[:end])
        np.testing.assert_array_equal(found[end:], 55)
    assert out.lengths[0] == 3 > 0


def test_the_loop_ends_when_all_rows_have(tiny):
    model = tiny()
    first = generate(model, TOKENS, max_new_tokens=1).tokens[:, 0]
    graphdef, state = nnx.split(model)
    logits, cache = prefill(graphdef, state, TOKENS, np.ones_like(TOKENS), slots=40)
    stop, key = Stop(jnp.asarray(first), jnp.int32(0), jnp.int32(30)), jax.random.key(0)
    loop = begin(cache, logits, None, Sampling(), stop, key, size=32)
    taken = []

    def count(*_):
        taken.append(1)
    original = type(model).logits  # only the loop's steps call it once the prompt has run
    try:
        type(model).logits = lambda self, hidden: (jax.debug.callback(count),
                                                   original(self, hidden))[1]
        decode.clear_cache()
        lengths = decode(graphdef, state, loop, Sampling(), stop, key, jnp.int32(30)).lengths
        jax.effects_barrier()
    finally:
        type(model).logits = original
        decode.clear_cache()
    np.testing.assert_array_equal(lengths, 1)
    assert not taken


def test_sampling_follows_its_seed_and_settings(tiny):
    model = tiny(initializer_range=0.1)

    def run(**settings):
        seed = settings.pop("seed", 0)
        return generate(model, TOKENS, max_new_tokens=8, how=Sampling(**settings), seed=seed).tokens
    warm = run(temperature=2.0)
    np.testing.assert_array_equal(warm, run(temperature=2.0))
    assert (warm != run(temperature=2.0, seed=1)).any()
    greedy = run()
    np.testing.assert_array_equal(run(temperature=1e-4), greedy)
    np.testing.assert_array_equal(run(temperature=2.0, top_k=1), greedy)


def test_a_large_repetition_penalty_never_repeats(tiny):
    out = generate(tiny(), TOKENS, max_new_tokens=20, how=Sampling(repetition_penalty=1e6)).tokens
    for prompt, row in zip(TOKENS, out, strict=True):
        positive = {*prompt.tolist(), *row.tolist()}
        assert len(positive) == len(set(prompt.tolist())) + 20


def test_lengths_and_settings_share_a_program(tiny):
    model = tiny(vocab_size=71)

    def run(length, count, **settings):
        prompt = np.ones((2, length), int)
        generate(model, prompt, max_new_tokens=count, stop_ids=[1], how=Sampling(**settings))
    run(5, 9, temperature=0.5, top_p=0.5)
    before = prefill._cache_size(), decode._cache_size()
    run(16, 16, temperature=0.9, top_p=0.1)
    run(1, 2, temperature=7.0, top_p=0.9)
    assert (prefill._cache_size(), decode._cache_size()) == before
    run(17, 16, temperature=0.9, top_p=0.1)
    assert prefill._cache_size() == before[0] + 1


def test_one_length_of_the_cache_compiles_decoding_once(tiny):
    model = tiny(vocab_size=73)

    def run(length, count=8):
        prompt = np.ones((2, length), int)
        return generate(model, prompt, max_new_tokens=count, room=Room(length=96)).tokens
    run(3)
    before = prefill._cache_size(), decode._cache_size()
    for length in (5, 17, 24, 30, 40, 50, 70, 80):
        run(length)
    assert decode._cache_size() == before[1]
    assert prefill._cache_size() == before[0] + 5  # 24, 32, 48, 64, and 88: all but the answer's
    np.testing.assert_array_equal(run(40), generate(model, np.ones((2, 40), int),
                                                    max_new_tokens=8).tokens)
    with pytest.raises(UserError, match="89 tokens and 8 new ones don't fit into a cache of le"):
        run(89)


def test_the_cache_has_its_dtype_and_the_answer_of_a_rounded_one(tiny):
    model = tiny()
    graphdef, state = nnx.split(model)
    ones = np.ones_like(TOKENS)
    exact, cache = prefill(graphdef, state, TOKENS, ones, slots=12)
    assert cache.keys.dtype == np.float32
    rounded, half = prefill(graphdef, state, TOKENS, ones, slots=12, cache_dtype=jnp.bfloat16)
    assert half.keys.dtype == half.values.dtype == jnp.bfloat16
    assert 1e-5 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    np.testing.assert_array_equal(
        generate(model, TOKENS, max_new_tokens=3, room=Room("float32")).tokens,
        generate(model, TOKENS, max_new_tokens=3).tokens)


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.5, repetition_penalty=1.3)])
def test_a_stream_gives_what_generate_gives(tiny, how):
    model = tiny()
    whole = generate(model, TOKENS, max_new_tokens=7, how=how, stop_ids=[3], pad_id=2, seed=5)
    *parts, last = stream(model, TOKENS, max_new_tokens=7, how=how, stop_ids=[3], pad_id=2, seed=5,
                          every=2)
    np.testing.assert_array_equal(last.tokens, whole.tokens)
    np.testing.assert_array_equal(last.lengths, whole.lengths)
    assert [int(part.lengths.max()) for part in parts] == [2, 4, 6]
    for part in parts:
        for row, length, end in zip(part.tokens, part.lengths, whole.tokens, strict=True):
            np.testing.assert_array_equal(row[:length], end[:length])


@pytest.mark.parametrize("fields", [
    {}, {"model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2,
         "first_k_dense_replace": 1, "num_hidden_layers": 3, "num_key_value_heads": 2,
         "head_dim": 8, "moe_intermediate_size": 24}])
def test_layers_apart_compute_the_same_in_the_same_memory(tiny, fields):
    model = tiny(**fields)
    parts = apart(model)
    stacked, one = (m.layers.self_attn.q_proj.kernel if m is model else
                    m.layers[1].self_attn.q_proj.kernel for m in (model, parts))
    assert isinstance(parts.layers, nnx.List) and not isinstance(model.layers, nnx.List)
    start = stacked[...].unsafe_buffer_pointer()
    assert one[...].unsafe_buffer_pointer() == start + one[...].nbytes
    first, second = (prefill(*nnx.split(m), TOKENS, np.ones_like(TOKENS), slots=12)[0]
                     for m in (model, parts))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_prompts_run_by_a_loop_over_layers_and_tokens_by_layers_apart(tiny, monkeypatch):
    """A program for each length of a prompt is compiled: layer by layer that took most of the time.
    """
    loops, kinds = [], []

    def watched(graphdef, state, *rest, **how):
        traced = prefill.trace(graphdef, state, *rest, **how)
        loops.append(sum(eqn.primitive.name == "scan" for eqn in traced.jaxpr.eqns))
        return prefill(graphdef, state, *rest, **how)

    def decoded(graphdef, state, loop, *rest):
        kinds.append((type(nnx.merge(graphdef, state).layers), type(loop.cache.keys)))
        return decode(graphdef, state, loop, *rest)
    monkeypatch.setattr(module, "prefill", watched)
    monkeypatch.setattr(module, "decode", decoded)
    generate(tiny(), TOKENS, max_new_tokens=2)
    assert loops == [1] and kinds == [(nnx.List, tuple)]


def test_experts_in_no_layer(tiny):
    """A glm4_moe may have as many dense layers as it has layers: there is no other stack then."""
    model = tiny(model_type="glm4_moe", first_k_dense_replace=2, num_hidden_layers=2,
                 num_key_value_heads=2, head_dim=8, intermediate_size=48)
    out = generate(model, TOKENS[:1], max_new_tokens=3)
    assert recomputed(model, TOKENS[0], 3) == out.tokens[0].tolist()


def test_on_a_mesh(tiny, monkeypatch):
    """The cache stays where it begins: rows on the data axes, heads on `tensor`."""
    spread, places, decode = tiny(mesh=make_mesh({"fsdp": 4, "tensor": 2})), [], module.decode

    def watched(graphdef, state, loop, *rest):
        places.append([part.sharding.spec for part in (loop.cache.keys, loop.cache.values)])
        out = decode(graphdef, state, loop, *rest)
        places.append([part.sharding.spec for part in (out.cache.keys, out.cache.values)])
        return out
    tokens = np.concatenate((TOKENS, TOKENS[:1]))
    wanted = generate(tiny(), tokens, max_new_tokens=6).tokens
    monkeypatch.setattr(module, "decode", watched)
    out = generate(spread, tokens, max_new_tokens=6).tokens
    np.testing.assert_array_equal(out, wanted)
    assert places == 2 * [2 * [PartitionSpec(None, "fsdp", None, "tensor")]]


def test_buckets_are_few_and_near():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n > 16)
    assert len(set(sizes)) < 20


@pytest.mark.parametrize(("arguments", "message"), [
    ({"tokens": [[1, 67]]}, "token id 67 is outside the vocabulary of 67"),
    ({"tokens": [[-1]]}, "token id -1 is outside"),
    ({"tokens": [[1], [2, 3]]}, r"must be whole numbers of shape \[batch, length\]"),
    ({"tokens": [1, 2]}, r"of shape \[2\]"),
    ({"tokens": [[1.5]]}, "float64"),
    ({"tokens": np.zeros((0, 3), int)}, "empty"),
    ({"tokens": [[1], [2]], "attention_mask": [[1], [0]]}, "row 1 of tokens is empty"),
    ({"tokens": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask has shape \[1, 1\]"),
    ({"tokens": [[1]], "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"tokens": [[1]], "max_new_tokens": "5"}, "max_new_tokens must be at least 1, a whole number"),
])
def test_bad_arguments_are_named(tiny, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(tiny(), **{"max_new_tokens": 1, **arguments})


def test_only_language_models_generate(tiny):
    with pytest.raises(UserError, match="this model's is 'sequence'"):
        generate(tiny("sequence"), TOKENS, max_new_tokens=1)
