"""Beam search against transformers: the same sequences and scores, also in left-padded batches."""

import functools

import numpy as np
import pytest

from glm_jax.convert.hf import save_model
from glm_jax.errors import UserError
from glm_jax.infer.beam import Beams, beam_search, search
from glm_jax.infer.generate import generate

TOKENS = np.random.default_rng(3).integers(6, 67, (3, 7))
MASK = np.ones_like(TOKENS)
MASK[1, :4], MASK[2, :1] = 0, 0
TOKENS = np.where(MASK == 1, TOKENS, 0)
STOPS = [5, 9, 31, 44]


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    import torch
    import transformers

    @functools.cache
    def load(**fields):
        folder = tmp_path_factory.mktemp("beam") / "model"
        save_model(tiny(**fields), folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def run(tokens, mask, fields, **how):
        x, seen = torch.tensor(tokens), torch.tensor(mask)
        out = load(**fields).generate(
            x, attention_mask=seen, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
            output_scores=True, **how)
        return out.sequences[:, tokens.shape[1]:].numpy(), out.sequences_scores.numpy()
    return run


@pytest.mark.parametrize("beams", [
    Beams(2), Beams(4), Beams(4, 0.0), Beams(3, 2.5), Beams(3, -1.0), Beams(3, 1.0, True),
    Beams(4, 1.5, "never"), Beams(3, 0.5, True)])
def test_sequences_and_scores_are_those_of_transformers(tiny, reference, beams):
    wanted, scores = reference(
        TOKENS, MASK, {}, num_beams=beams.width, length_penalty=beams.length_penalty,
        max_new_tokens=9, early_stopping=beams.early_stopping, eos_token_id=STOPS)
    out, found = beam_search(tiny(), TOKENS, MASK, max_new_tokens=9, beams=beams, stop_ids=STOPS)
    np.testing.assert_allclose(found, scores, rtol=1e-4)
    for row, length, want in zip(out.tokens, out.lengths, wanted, strict=True):
        np.testing.assert_array_equal(row[:length], want[:length])
        assert not row[length:].any() and (want[length:] == STOPS[0]).all()  # its filling for pad 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fields", [
    {"model_type": "glm4", "intermediate_size": 48, "num_hidden_layers": 2,
     "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 23},
    {"model_type": "glm4_moe", "num_hidden_layers": 2, "n_routed_experts": 4, "vocab_size": 41,
     "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_key_value_heads": 2,
     "head_dim": 8}], ids=lambda fields: fields["model_type"])
def test_any_batch_and_settings(tiny, reference, fields, seed):
    """Left-padded rows of random lengths, none to three stop tokens more, every kind of setting."""
    draw, model = np.random.default_rng(seed), tiny(**fields)
    shape = rows, width = int(draw.integers(1, 5)), int(draw.integers(2, 9))
    mask = (np.arange(width) >= draw.integers(0, width, (rows, 1))).astype(int)
    tokens = draw.integers(6, fields["vocab_size"], shape) * mask
    stops = [5, *draw.choice(np.arange(6, 20), seed, replace=False).tolist()]
    beams = Beams(int(draw.choice([2, 3, 5])), float(draw.choice([-1.5, 0, 0.3, 1, 3])),
                  (True, False, "never")[seed % 3], (None, 1.5)[seed % 2])
    how = {} if beams.repetition_penalty is None else {"repetition_penalty": 1.5}
    count = int(draw.choice([1, 5, 12]))
    wanted, scores = reference(
        tokens, mask, fields, num_beams=beams.width, length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping, max_new_tokens=count, eos_token_id=stops, **how)
    out, found = beam_search(model, tokens, mask, max_new_tokens=count, beams=beams,
                             stop_ids=stops)
    np.testing.assert_allclose(found, scores, rtol=1e-4)
    for row, length, want in zip(out.tokens, out.lengths, wanted, strict=True):
        np.testing.assert_array_equal(row[:length], want[:length])


def test_the_cases_above_end_early_and_late(tiny):
    """Else they would show less than they seem to."""
    lengths = [beam_search(tiny(), TOKENS, MASK, max_new_tokens=9, beams=beams,
                           stop_ids=STOPS)[0].lengths for beams in (Beams(4, 0.0), Beams(3, 2.5))]
    assert np.min(lengths) < 5 and np.max(lengths) == 9


def test_the_repetition_penalty_is_transformers(tiny, reference):
    tokens = np.where(MASK == 1, TOKENS, 6)[:1]
    wanted, scores = reference(tokens, MASK[:1], {}, num_beams=3, repetition_penalty=1.8,
                               max_new_tokens=8, eos_token_id=STOPS)
    out, found = beam_search(tiny(), tokens, max_new_tokens=8, beams=Beams(
        3, repetition_penalty=1.8), stop_ids=STOPS)
    np.testing.assert_allclose(found, scores, rtol=1e-4)
    np.testing.assert_array_equal(out.tokens[0, :out.lengths[0]], wanted[0, :out.lengths[0]])


def test_one_beam_is_greedy_and_more_are_likelier(tiny):
    model = tiny()
    one, score = beam_search(model, TOKENS, MASK, max_new_tokens=6, beams=Beams(1))
    greedy = generate(model, TOKENS, MASK, max_new_tokens=6)
    np.testing.assert_array_equal(one.tokens, greedy.tokens)
    _, better = beam_search(model, TOKENS, MASK, max_new_tokens=6, beams=Beams(8))
    assert (better >= score - 1e-5).all() and (better > score + 1e-3).any()


def test_a_penalty_and_a_limit_need_no_compilation(tiny):
    beam_search(tiny(), TOKENS, max_new_tokens=9, beams=Beams(2, 0.5))
    before = search._cache_size()
    beam_search(tiny(), TOKENS, max_new_tokens=4, beams=Beams(2, 2.0))
    assert search._cache_size() == before


@pytest.mark.parametrize(("beams", "message"), [
    (Beams(0), "num_beams must be at least 1"), (Beams("4"), "a whole number, .*, not '4'"),
    (Beams(2**30), "at most 32051994, not"),
    (Beams(2, "long"), "length_penalty must be a number"),
    (Beams(2, 1.0, "soon"), "early_stopping must be")])
def test_impossible_settings_are_named(tiny, beams, message):
    with pytest.raises(UserError, match=message):
        beam_search(tiny(), TOKENS, max_new_tokens=2, beams=beams)


def test_on_a_mesh(tiny):
    from glm_jax.parallel.mesh import make_mesh
    spread = tiny(mesh=make_mesh({"fsdp": 2, "tensor": 2}))
    tokens = np.concatenate((TOKENS, TOKENS[:1]))
    out, scores = beam_search(spread, tokens, max_new_tokens=5, beams=Beams(2))
    wanted, exact = beam_search(tiny(), tokens, max_new_tokens=5, beams=Beams(2))
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_allclose(scores, exact, rtol=1e-4)
