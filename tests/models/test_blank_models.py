"""ChatGLM-6B and GLM (2021): positions, prefixes, caches and files, whatever the parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import glm_jax
from glm_jax.convert.hf import flat, load_model, save_model
from glm_jax.data import blanks
from glm_jax.data.packing import Shape, assemble
from glm_jax.errors import UserError
from glm_jax.infer.generate import generate
from glm_jax.models import architecture_of, as_batch
from glm_jax.models.chatglm6b import ChatGLM6BConfig
from glm_jax.models.glm2021 import Glm2021Config
from glm_jax.nn.batch import visible
from glm_jax.nn.loss import cross_entropy
from glm_jax.parallel.mesh import make_mesh
from tests.packed import GMASK, KINDS, MASK, SOP

MODELS = {name: KINDS[name][1] for name in ("chatglm6b", "glm2021")}
each = pytest.mark.parametrize("name", MODELS)
PROMPTS = [[5, 9, 33, 2, GMASK, SOP], [7, MASK, 21, SOP], [50, 3, 11, MASK, 4, 18, 44, SOP]]


@jax.jit
def logits(model, batch):
    return model.logits(model(batch)[0])


def padded(rows, side, width=10):
    tokens, mask = np.full((2, len(rows), width), 66)
    mask[:] = 0
    for i, row in enumerate(rows):
        here = slice(width - len(row), None) if side == "left" else slice(len(row))
        tokens[i, here], mask[i, here] = row, 1
    return tokens, mask


@each
def test_generating_with_the_cache_equals_recomputation(tiny, name):
    model, count = tiny(**MODELS[name]), 5
    tokens, mask = padded(PROMPTS, "left")
    left = generate(model, tokens, mask, max_new_tokens=count).tokens
    np.testing.assert_array_equal(
        left, generate(model, *padded(PROMPTS, "right"), max_new_tokens=count).tokens)
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(count):
        tokens, mask = padded(rows, "right", 16)
        found = np.asarray(logits(model, as_batch(model.config, tokens, mask)))
        for i, row in enumerate(rows):
            row.append(int(found[i, len(row) - 1].argmax()))
    assert left.tolist() == [row[-count:] for row in rows]
    assert len({tuple(row) for row in left}) == len(rows)


@each
def test_the_context_sees_all_of_itself_and_the_answer_only_what_came_before(tiny, name):
    config = tiny(**MODELS[name]).config
    batch = as_batch(config, np.array([[5, MASK, 9, SOP, 3, 4]]), np.array([[0, 1, 1, 1, 1, 1]]))
    assert batch.positions[0].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 2, 3]]
    seen = visible(*(batch.segments, batch.order) * 2)[0].astype(int)
    assert seen[1:, 1:].tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0],
                                     [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert not seen[:, 0].any()


def test_which_blank_and_what_without_a_start(tiny):
    tokens = np.array([[5, MASK, GMASK, SOP, SOP], [5, 6, 7, SOP, 4], [5, MASK, 7, 8, 9]])
    one, two = (as_batch(tiny(**MODELS[name]).config, tokens) for name in MODELS)
    # ChatGLM-6B looks for [gMASK] first; GLM for the first of any kind
    assert one.positions[:, 0].tolist() == [[0, 1, 2, 2, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert two.positions[:, 0].tolist() == [[0, 1, 2, 1, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert one.order[2].tolist() == [0] * 5 and two.order[2].tolist() == list(range(5))
    traced = jax.jit(functools.partial(as_batch, tiny(**MODELS["glm2021"]).config))(tokens)
    jax.tree.map(np.testing.assert_array_equal, traced, two)


@each
def test_a_prompt_without_a_start_is_refused(tiny, name):
    with pytest.raises(UserError, match=r"row 1 has no <sop> \(token 62\)"):
        generate(tiny(**MODELS[name]), np.array([[3, SOP], [3, 4]]), max_new_tokens=2)


def test_ids_that_the_config_lacks():
    def ids(cls, **raw):
        config = cls.from_dict({"num_layers": 1, **raw})
        return config.start_token_id, config.mask_token_id, config.gmask_token_id
    assert ids(ChatGLM6BConfig) == (130004, 130000, 130001)
    assert ids(ChatGLM6BConfig, vocab_size=150528) == (150004, 150000, 150001)
    assert ids(ChatGLM6BConfig, vocab_size=200, bos_token_id=9, mask_token_id=7,
               gmask_token_id=8) == (9, 7, 8)
    assert ids(Glm2021Config, vocab_size=30592) == (30522, 103, None)
    assert ids(Glm2021Config, vocab_size=50304, hidden_size=4096) == (50257, 50260, 50263)
    assert ids(Glm2021Config, vocab_size=50304, hidden_size=1024) == (None, None, None)
    assert ids(Glm2021Config, vocab_size=50048) == (50006, 50003, 50009)


def test_generation_asks_for_the_ids_that_nobody_knows(tiny):
    model = tiny(**{**MODELS["glm2021"], "sop_token_id": None})
    with pytest.raises(UserError, match="sop_token_id=…"):
        generate(model, np.array([[3, SOP]]), max_new_tokens=2)


def test_positions_beyond_the_tables_are_refused(tiny):
    model = tiny(**MODELS["glm2021"])
    row = [5] * 30 + [MASK, SOP]
    assert as_batch(model.config, np.array([row + [7] * 39])).positions.max() == 40
    with pytest.raises(UserError, match="answer of 42 tokens, but this model has only 41 posit"):
        as_batch(model.config, np.array([row + [7] * 40]))
    with pytest.raises(UserError, match="42 tokens"):
        generate(model, np.array([row]), max_new_tokens=40)
    with pytest.raises(UserError, match="context or an answer of 42 tokens"):
        glm_jax.forward(model, np.array([[5] * 42]))


@each
def test_in_and_out_again_is_the_same_on_a_mesh_too(tiny, name, tmp_path):
    model = tiny(**MODELS[name])
    save_model(model, tmp_path / "one")
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    again = load_model(tmp_path / "one", mesh=mesh)
    for path, param in flat(again).items():
        np.testing.assert_array_equal(param.get_value(), flat(model)[path].get_value())
    save_model(again, tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    tokens, mask = padded(PROMPTS, "left")
    np.testing.assert_allclose(glm_jax.forward(again, tokens, mask)[mask > 0],
                               glm_jax.forward(model, tokens, mask)[mask > 0], rtol=2e-4, atol=2e-4)


def test_a_prefix_of_glm_2021_names_and_a_stored_head_of_chatglm6b(tiny, tmp_path):
    model = tiny(**MODELS["glm2021"])
    save_model(model, tmp_path / "glm")
    arrays = load_file(tmp_path / "glm/model.safetensors")
    save_file({f"glm.{name}": array for name, array in arrays.items()},
              tmp_path / "glm/model.safetensors")
    for path, param in flat(load_model(tmp_path / "glm")).items():
        np.testing.assert_array_equal(param.get_value(), flat(model)[path].get_value())
    save_model(tiny(**MODELS["chatglm6b"]), tmp_path / "chatglm")
    arrays = load_file(tmp_path / "chatglm/model.safetensors")
    np.testing.assert_array_equal(arrays["lm_head.weight"],
                                  arrays["transformer.word_embeddings.weight"])
    frequencies = arrays["transformer.layers.1.attention.rotary_emb.inv_freq"]
    assert frequencies.dtype == np.float16 and frequencies.tolist() == [1, np.float16(0.01)]


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_a_classifier_on_chatglm6b(tiny, head, tmp_path):
    model = tiny(head, **MODELS["chatglm6b"])
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert again.head == head
    tokens, mask = padded(PROMPTS, "right")
    found = glm_jax.forward(again, np.where(mask, tokens, 0), mask)
    batch = dataclasses.replace(as_batch(model.config, tokens, mask),
                                pool_index=mask.sum(1, keepdims=True) - 1)
    if head == "sequence":
        np.testing.assert_allclose(found, model.classify(batch)[:, 0], rtol=1e-4, atol=1e-4)
    else:
        assert found.shape == (3, 10, 3)


def test_blank_infilling_trains_packed_as_alone(tiny):
    """The loss of pieces that share a row is the sum of their losses alone."""
    model, rng = tiny(**MODELS["glm2021"]), np.random.default_rng(0)
    special = blanks.Special(1, 2, MASK, GMASK, 63, SOP, 64, 65, frozenset((20, 21)))
    texts = [blanks.Text(np.r_[1, rng.integers(3, 60, n), 2], np.ones(n + 2, int)) for n in (9, 12)]
    mode, pieces = blanks.construct(texts, blanks.Mixture(bert_prob=1), special, 40,
                                    blanks.random.Random(3))
    assert mode == "bert" and len(pieces) == 2

    @jax.jit
    def loss(model, batch):
        return cross_entropy(model(batch)[0], model.vocabulary_kernel(), jnp.asarray(batch.targets),
                             jnp.asarray(batch.weights))

    together, alone = (loss(model, assemble(rows, Shape(2, 40, 2), 0))
                       for rows in ([pieces], [[piece] for piece in pieces]))
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    assert alone > 1


def test_tokens_of_short_spans_are_hidden_only_where_they_are_read():
    special = blanks.Special(1, 2, MASK, GMASK, 63, SOP, 64, 65)
    text = blanks.Text(np.r_[1, np.arange(3, 43), 2], np.ones(42, int))
    plain, hidden = (blanks.construct([text], blanks.Mixture(bert_prob=1, block_mask_prob=share),
                                      special, 42, blanks.random.Random(1))[1][0]
                     for share in (0, 0.7))
    np.testing.assert_array_equal(plain.targets, hidden.targets)
    changed = plain.tokens != hidden.tokens
    assert changed.any() and (hidden.tokens[changed] == 65).all()
    assert (plain.order[changed] > 0).all() and not (plain.tokens[changed] == SOP).any()


def test_the_residual_scale_is_of_the_layers_or_the_released_constant(tiny):
    own, literal = (tiny(**MODELS["chatglm6b"], **more).config.alpha
                    for more in ({}, {"alpha_layers": 28}))
    assert own**2 == pytest.approx(4) and literal**2 == pytest.approx(56)
    with pytest.raises(UserError, match="pre_seq_len=4 is not supported"):
        architecture_of(MODELS["chatglm6b"]).config.from_dict({"pre_seq_len": 4})
