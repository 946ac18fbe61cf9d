"""The baseline: its LSTM against PyTorch's, and that padding does not change what it says."""

import jax
import numpy as np
import pytest
from flax import nnx

from glm_jax.data.packing import Piece, Shape, assemble
from glm_jax.models.conv_rnn import ConvRNN, ConvRNNConfig

CONFIG = ConvRNNConfig(vocab_size=50, hidden_size=6, rnn_size=5, num_labels=3, dropout=0.5)


@pytest.fixture(scope="module")
def model():
    return ConvRNN(CONFIG, rngs=nnx.Rngs(0))


def rows(lengths, width):
    pieces = [[Piece(np.arange(1, 1 + n, dtype=np.int32))] for n in lengths]
    return assemble(pieces, Shape(len(lengths), width, 1), 0)


def test_padding_changes_nothing(model):
    narrow, wide = model.classify(rows((4, 7), 7)), model.classify(rows((4, 7), 12))
    assert narrow.shape == (2, 1, 3)
    np.testing.assert_allclose(narrow, wide, atol=1e-6)
    assert np.abs(narrow[0] - narrow[1]).max() > 1e-4


def test_dropout_only_with_a_key(model):
    batch = rows((5,), 5)
    plain, again = model.classify(batch), model.classify(batch)
    np.testing.assert_array_equal(plain, again)
    assert (model.classify(batch, jax.random.key(0)) != plain).any()
    assert (model.classify(batch, jax.random.key(0)) !=
            model.classify(batch, jax.random.key(1))).any()


def test_the_same_as_pytorch(model):
    torch = pytest.importorskip("torch")
    batch = rows((6,), 6)
    size = CONFIG.rnn_size

    def of(param):
        return torch.tensor(np.asarray(param[...]).T.copy())
    x = torch.tensor(np.asarray(model.embed_tokens.embedding[...])[batch.tokens])
    kernel = of(model.convolution.kernel).reshape(6, 3, 6).permute(0, 2, 1)  # [out, in, width]
    x = torch.relu(torch.nn.functional.conv1d(x.transpose(1, 2), kernel,
                                              torch.tensor(np.asarray(model.convolution.bias[...])),
                                              padding=1)).transpose(1, 2)
    lstm = torch.nn.LSTM(6, size, batch_first=True)
    gates = of(model.lstm.kernel)  # ours: input, forget, output, candidate; theirs: i, f, g, o
    order = [*range(2 * size), *range(3 * size, 4 * size), *range(2 * size, 3 * size)]
    forget = torch.zeros(4 * size)
    forget[size:2 * size] = 1  # our forget gate begins open
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(gates[order, :6])
        lstm.weight_hh_l0.copy_(gates[order, 6:])
        lstm.bias_ih_l0.copy_(torch.tensor(np.asarray(model.lstm.bias[...]))[order] + forget)
        lstm.bias_hh_l0.zero_()
        states = lstm(x)[0]
        weights = torch.softmax(torch.tanh(states) @ of(model.attention.kernel).T, dim=1)
        logits = (weights * states).sum(1) @ of(model.score.kernel).T
        logits += torch.tensor(np.asarray(model.score.bias[...]))
    np.testing.assert_allclose(model.classify(batch)[:, 0], logits, atol=1e-5)
