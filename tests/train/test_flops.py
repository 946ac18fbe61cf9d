"""The formula of training's operations: against XLA's own count, and against released figures."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from glm_jax.adapters import lora, partition
from glm_jax.models import architecture_of
from glm_jax.nn.batch import Batch, causal_batch, pairs, visible
from glm_jax.nn.loss import cross_entropy
from glm_jax.parallel.mesh import make_mesh
from glm_jax.train.flops import training_flops
from glm_jax.train.step import by_path, init_state, make_step

WIDE = {"vocab_size": 512, "hidden_size": 256, "num_attention_heads": 4}  # so that matrices are all
GLM = WIDE | {"model_type": "glm", "intermediate_size": 512, "num_hidden_layers": 2,
              "num_key_value_heads": 2, "head_dim": 64}
MODELS = {
    "glm": GLM,
    "tied": GLM | {"tie_word_embeddings": True},
    "chatglm": {"model_type": "chatglm", "padded_vocab_size": 512, "hidden_size": 256,
                "ffn_hidden_size": 512, "num_layers": 2, "num_attention_heads": 4,
                "kv_channels": 64, "multi_query_group_num": 2},
    "chatglm6b": WIDE | {"model_type": "chatglm", "position_encoding_2d": True, "num_layers": 2,
                         "inner_hidden_size": 512, "max_sequence_length": 64},
    "glm2021": WIDE | {"model_type": "glm", "num_layers": 2, "max_sequence_length": 64,
                       "block_position_encoding": True},
}


def build(raw, adapted):
    """The parts of an abstract-free small model, and the paths of what trains."""
    architecture = architecture_of(raw)
    model = architecture.model(architecture.config.from_dict(raw), "lm", rngs=nnx.Rngs(0))
    if adapted:
        lora.attach(model, lora.LoRAConfig(r=8, lora_dropout=0.1))
    return model, partition(model, ("adapter",) if adapted else (".*",))


@pytest.mark.parametrize(("name", "adapted"), [
    ("glm", False), ("glm", True), ("tied", False), ("chatglm", True), ("chatglm6b", False),
    ("glm2021", False)])
def test_xla_counts_the_same(name, adapted):
    """A step of two layers, which one device unrolls, on XLA's count before it optimises.

    XLA counts a loop's body once, here of one chunk of the loss, and the reference attention
    computes all of length²; the rest of its count, norms and such, is a few in a hundred.
    """
    model, (graphdef, trainable, frozen) = build(MODELS[name], adapted)
    rows, length = 2, 64
    tokens = jnp.zeros((rows, length), jnp.int32)
    batch = Batch(**{**vars(causal_batch(tokens)), "targets": tokens,
                     "weights": jnp.ones((rows, length))})
    if model.config.streams == 2:
        batch = Batch(**{**vars(batch), "positions": jnp.zeros((rows, 2, length), jnp.int32)})

    def loss(model, batch, key):
        hidden, _ = model(batch, key=key)
        return cross_entropy(hidden, model.vocabulary_kernel(), batch.targets, batch.weights)

    arrays, optimizer = by_path(trainable), optax.sgd(0.1)
    state = init_state(arrays, optimizer, make_mesh({"data": 1}))
    step = make_step(graphdef, trainable, loss, optimizer, state, seed=0)
    counted = step.lower(state, frozen, batch).cost_analysis()["flops"]
    formula = training_flops(model, arrays).of(rows * length, rows * length**2)
    assert formula < counted < 1.05 * formula


RELEASED = {  # parameters by ../shared/spec/glm_spec.md, section 15; what is left: norms and biases
    "glm": ({"model_type": "glm", "num_hidden_layers": 40}, 9_399_951_360 - 151552 * 4096),
    "glm4-32b": ({"model_type": "glm4", "hidden_size": 6144, "num_hidden_layers": 61,
                  "num_attention_heads": 48, "intermediate_size": 23040, "attention_bias": False},
                 32_566_081_536 - 151552 * 6144),
    # "12 B active": the release, which counts the embedding.
    "4.5-air": ({"model_type": "glm4_moe", "head_dim": 128, "attention_bias": True}, 12e9),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models(name):
    raw, active = RELEASED[name]
    model = nnx.eval_shape(lambda: build(raw, False)[0])
    full = training_flops(model, by_path(nnx.state(model, nnx.Param)))
    near = 0.1 if name == "4.5-air" else 1e-3
    assert full.token == pytest.approx(6 * active, rel=near)
    config = model.config
    assert full.pair == 12 * config.num_hidden_layers * config.num_attention_heads * 128
    head = training_flops(model, {"score.kernel"})
    assert head.token == pytest.approx(full.token / 3) and head.pair == full.pair / 3


def test_a_token_takes_its_own_experts_only():
    """XLA counts a loop over blocks of rows once, and `ragged_dot` for every expert: by hand."""
    hidden, inner, own = 64, 48, 3
    raw = {"model_type": "glm4_moe", "hidden_size": hidden, "num_hidden_layers": 5,
           "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 99,
           "intermediate_size": 80, "first_k_dense_replace": 1, "n_routed_experts": 8,
           "num_experts_per_tok": own, "n_shared_experts": 2, "moe_intermediate_size": inner}
    attention = hidden * 32 * (4 + 2 + 2 + 4)
    mixture = 3 * hidden * inner * (own + 2) + hidden * 8
    active = 5 * attention + 4 * mixture + 3 * hidden * 80 + 99 * hidden
    model = nnx.eval_shape(lambda: build(raw, False)[0])
    assert training_flops(model, by_path(nnx.state(model, nnx.Param))).token == 6 * active


def test_the_head_of_an_encoder_counts_once_a_text():
    raw = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 99,
           "num_attention_heads": 2, "intermediate_size": 128}
    config = architecture_of(raw).config.from_dict(raw)
    model = nnx.eval_shape(lambda: architecture_of(raw).model(config, "sequence",
                                                              rngs=nnx.Rngs(0)))
    paths = by_path(nnx.state(model, nnx.Param))
    layers = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    assert training_flops(model, paths).token == 6 * layers
    model = nnx.eval_shape(lambda: architecture_of(raw).model(config, "mlm", rngs=nnx.Rngs(0)))
    paths = by_path(nnx.state(model, nnx.Param))  # that of a language model once a token
    assert training_flops(model, paths).token == 6 * (layers + 64 * 64 + 99 * 64)


def test_pairs_are_what_the_mask_shows():
    draw = np.random.default_rng(0)
    segments, order = np.zeros((2, 6, 40), np.int32)
    for row in range(6):
        at = 0
        for number in range(1, 5):  # a prefix that sees itself both ways, then causal tokens
            prefix, causal = draw.integers(0, 6), draw.integers(1, 5)
            size = prefix + causal
            segments[row, at:at + size] = number
            order[row, at:at + size] = [0] * prefix + list(range(1, causal + 1))
            at += size
    batch = Batch(segments, segments[:, None], segments, order)
    shown = visible(segments, order, segments, order) & (segments > 0)[:, :, None]
    assert segments.min() == 0 and float(pairs(batch)) == shown.sum()
