"""The arithmetic of weight tables: what is joined comes apart again, whole or in slices."""

import numpy as np
import pytest

from glm_jax.models.weights import Weight

ROWS = {
    "joined": Weight("qkv.weight", ("q", "k", "v"), transpose=True),
    "by head": Weight("qkv.weight", ("q", "k", "v"), transpose=True, heads=4),
    "by head, a bias": Weight("qkv.bias", ("q", "k", "v"), heads=4),
}


def parameters(row, rng):
    sizes = (8, 4, 4)
    return [rng.normal(size=(5, n) if row.transpose else (n,)) for n in sizes]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_slices_of_a_joined_tensor_are_those_of_its_parts(row):
    parts = parameters(row, np.random.default_rng(0))
    tensor = row.join(parts)
    sizes = [row.released(part.shape)[0] for part in parts]
    assert tensor.shape == row.tensor([part.shape for part in parts])
    assert tensor.shape[0] == sum(sizes)
    for which, part in enumerate(parts):
        outputs = part.T if row.transpose else part
        for start in range(sizes[which] + 1):
            for stop in range(start, sizes[which] + 1):
                rows = row.rows(which, sizes, start, stop)
                np.testing.assert_array_equal(tensor[rows], outputs[start:stop])


def test_by_head_means_the_rows_of_a_head_from_each_in_turn():
    q, k, v = (np.arange(4.0) + 10 * n for n in range(3))
    joined = ROWS["by head, a bias"]._replace(heads=2).join([q, k, v])
    assert joined.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_names_count_layers_from_the_first_of_the_stack_and_experts_from_zero():
    row = Weight("layers.{}.experts.{}.down.weight", "experts.down", first=3)
    assert dict(row.names((2, 2, 7, 7))) == {
        (0, 0): "layers.3.experts.0.down.weight", (0, 1): "layers.3.experts.1.down.weight",
        (1, 0): "layers.4.experts.0.down.weight", (1, 1): "layers.4.experts.1.down.weight"}
    assert row.released((2, 2, 7, 5)) == (7, 5)
