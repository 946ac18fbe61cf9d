"""Small models of each kind of mask, and the same examples packed into rows and one to a row."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from glm_jax.data.packing import Piece, assemble, shape_for

MASK, GMASK, SOP = 60, 61, 62
KINDS = {
    "glm": ("lm", {}),
    "chatglm6b": ("lm", {
        "model_type": "chatglm", "position_encoding_2d": True, "num_layers": 2,
        "inner_hidden_size": 48, "mask_token_id": MASK, "gmask_token_id": GMASK,
        "bos_token_id": SOP}),
    "glm2021": ("lm", {
        "model_type": "glm", "block_position_encoding": True, "num_layers": 2,
        "max_sequence_length": 40, "mask_token_id": MASK, "gmask_token_id": GMASK,
        "sop_token_id": SOP}),
    "bert": ("mlm", {
        "model_type": "bert", "num_hidden_layers": 2, "intermediate_size": 48,
        "max_position_embeddings": 40}),
}
LENGTHS = (9, 6, 12, 7, 11, 8)
ROWS = ((0, 1, 3), (2, 4), (5,))  # of 24 tokens: with padding in each but one


def model_of(tiny, kind, mesh=None, **fields):
    head, own = KINDS[kind]
    return tiny(head, mesh, **own, **fields)


def piece(draw, config, size):
    """An example of random tokens; one with a blank has context on both sides of it.

    Every token but the context's has a target of its own, and a weight.
    """
    tokens = draw.integers(1, 60, size)
    if hasattr(config, "start_token_id"):
        tokens[size // 3], tokens[size // 2] = MASK if size % 2 else GMASK, SOP
    weights = draw.uniform(0.5, 2, size).astype(np.float32) * (np.arange(size) >= size // 2)
    return Piece(tokens.astype(np.int32), draw.integers(1, 60, size), weights)


def batches(model, length=24):
    """Two batches: the examples packed, and apart."""
    draw = np.random.default_rng(0)
    pieces = [piece(draw, model.config, size) for size in LENGTHS]
    return (assemble([[pieces[i] for i in row] for row in ROWS],
                     shape_for(model.config, 4, length, 3), 0),  # the last row is empty
            assemble([[one] for one in pieces], shape_for(model.config, 6, 12, 1), 0))


def loss_and_gradient(model, batch):
    """The mean loss of what is learned, and its gradient for every parameter, of NumPy."""
    graphdef, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graphdef, state)
        scores = jax.nn.log_softmax(model.logits(model(batch)[0]))
        own = jnp.take_along_axis(scores, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
        return -jnp.sum(own * batch.weights) / jnp.sum(batch.weights)
    return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(state))


def assert_same(found, wanted, rtol=1e-5):
    """Losses within `rtol`, and gradients within ten times that of the largest of a parameter.

    And within a tenth of it of the largest of all: that of a key's bias is rounding only, as it
    changes no softmax.
    """
    np.testing.assert_allclose(found[0], wanted[0], rtol=rtol)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted[1]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted[1]):
        there = dict(jax.tree_util.tree_leaves_with_path(found[1]))[path]
        np.testing.assert_allclose(there, leaf, rtol=0, err_msg=jax.tree_util.keystr(path),
                                   atol=rtol * (10 * np.abs(leaf).max() + largest / 10))
