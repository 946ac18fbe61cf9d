"""Chips by name, and the topologies that they are rented as."""

import pytest

from glm_jax.errors import UserError
from glm_jax.train.chips import CHIPS, chip_of, topology


@pytest.mark.parametrize(("text", "chips", "slices"), [
    ("v5e:4x4", 16, 1), ("v5p:2x2x4", 16, 1), ("v4:4x8x12", 384, 1),
    ("2xv6e:4x4", 32, 2), ("h100:12", 12, 1)])
def test_topologies(text, chips, slices):
    found = topology(text)
    assert (found.chips, found.slices, str(found)) == (chips, slices, text)


@pytest.mark.parametrize(("text", "message"), [
    ("v5e", "KIND:SHAPE is wanted"), ("v7:2x2", "kinds: v4, v5e"), ("v5e:0x4", "KIND:SHAPE"),
    ("v5e:4x4x4", "a slice of v5e has 2 sides"), ("v5p:4x4", "a slice of v5p has 3 sides"),
    ("v5e:3x5", "slices of v5e are 1x1, 2x2, 2x4, .*, 16x16$"), ("v6e:4x2", "slices of v6e are"),
    ("v5p:2x2x3", "slices of v5p are 2x2x1, .* that 4 divides, the smallest first$"),
    ("v5p:8x4x4", "slices of v5p are"),
    ("v6e-16", ": v6e:4x4$"), ("v5litepod-16", ": v5e:4x4$"), ("v5e-256", ": v5e:16x16$"),
    ("v5p-32", ": v5p:2x2x4$"), ("v4-8", ": v4:2x2x1$"), ("v4-2048", ": v4:8x8x16$"),
    ("v6e-17", "KIND:SHAPE"), ("v4-9", "KIND:SHAPE"), ("h100-8", "KIND:SHAPE"),
    ("h100:4x2", "GPUs are only counted"), ("2xh100:8", "GPUs are only counted")])
def test_topologies_that_are_none(text, message):
    with pytest.raises(UserError, match=message):
        topology(text)


def test_chips_by_what_jax_calls_them():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"] and chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("cpu") is None
