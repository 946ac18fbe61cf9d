"""The mesh over slices, and the rules: what splits, what stays whole, and overrides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm_jax.errors import UserError
from glm_jax.parallel.mesh import RULES, constrain, data_ways, make_mesh, partition, use_rules


@dataclasses.dataclass(frozen=True)
class Device:
    """What the layout reads of a device."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def slices(count, of):
    """The devices of some slices, not in order."""
    return [Device(n * count + s, s) for n in range(of) for s in range(count)]


def slice_numbers(mesh):
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.parametrize(("sizes", "count", "across"), [
    ({"data": 4, "tensor": 2}, 2, {"data": 2}),
    ({"data": 4, "tensor": 2}, 4, {"data": 4}),
    ({"fsdp": -1}, 2, {"fsdp": 2}),  # asked for: there is no data axis
    ({"data": 2, "fsdp": 2, "sequence": 2}, 4, {"data": 2, "fsdp": 2}),
])
def test_only_data_and_then_fsdp_reach_across_slices(sizes, count, across):
    mesh = make_mesh(sizes, slices(count, 8 // count))
    numbers = slice_numbers(mesh)
    for axis, name in enumerate(mesh.axis_names):
        lines = np.moveaxis(numbers, axis, -1).reshape(-1, numbers.shape[axis])
        assert {len(set(line)) for line in lines.tolist()} == {across.get(name, 1)}, name


@pytest.mark.parametrize(("sizes", "devices", "message"), [
    ({"data": 2, "tensor": 4}, slices(4, 2), "data × fsdp must be a multiple of 4"),
    ({"tensor": 8}, slices(2, 4), "tensor=8 on 2 slices"),
    ({"data": 6}, slices(2, 4)[:5] + [Device(9, 0)], "does not fit the devices' topology"),
    ({"data": 9}, slices(2, 4), "needs 9 devices, but there are 8"),
])
def test_slices_that_the_sizes_do_not_fit(sizes, devices, message):
    with pytest.raises(UserError, match=message):
        make_mesh(sizes, devices)


def test_axes_of_a_tpu_are_lines_of_its_torus():
    """Also over two slices, and where an axis takes parts of two sides (v6e: jax.make_mesh fails).
    """
    topologies = pytest.importorskip("jax.experimental.topologies")
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc("v6e:4x4", "tpu", num_slices=2).devices
    mesh = make_mesh({"data": 4, "fsdp": 8}, devices)
    assert [set(row.ravel().tolist()) for row in slice_numbers(mesh)] == [{0}, {0}, {1}, {1}]
    for group in mesh.devices.reshape(4, 8):
        assert len({device.coords[0] for device in group}) * len(
            {device.coords[1] for device in group}) == 8  # a box of neighbours


SHAPE = {"data": 2, "fsdp": 2, "tensor": 4, "sequence": 1, "expert": 2}


@pytest.mark.parametrize(("axes", "shape", "wanted"), [
    (("batch", "length", None), (8, 5, 3), P(("data", "fsdp", "expert"), None, None)),
    (("batch", None), (6, 5), P("data", None)),  # as far as the axes divide
    (("batch", None), (1, 5), P(None, None)),
    (("embed", "heads:8"), (10, 32), P("fsdp", "tensor")),
    (("embed", "heads:8"), (8, 16), P(("fsdp", "expert"), None)),  # two heads, four devices
    (("heads:8",), (32,), P("tensor")),
    (("heads:8",), (36,), P(None)),  # no whole heads
    (("vocab", "embed"), (30522, 4), P(None, ("fsdp", "expert"))),
    (("embed", "mlp"), (3, 4, 8), P(None, ("fsdp", "expert"), "tensor")),  # a stack
    (("experts", "experts_embed", "mlp"), (3, 4, 4, 8), P(None, "expert", "fsdp", "tensor")),
])
def test_what_is_split_over_what(axes, shape, wanted):
    assert partition(axes, shape, SHAPE) == wanted


def test_what_is_not_split_is_logged_once(caplog):
    with caplog.at_level("INFO"):
        for _ in range(2):
            partition(("vocab", "embed"), (30523, 6), SHAPE)
    assert [record.getMessage() for record in caplog.records] == [
        "axis 'vocab' of size 30523 is replicated: mesh axes tensor do not divide it",
        "axis 'embed' of size 6 is split over fsdp only: mesh axes fsdp, expert do not divide it"]


def test_a_layer_computes_with_whole_parameters_but_for_tensor():
    for axes in (("embed", "mlp"), ("vocab", "embed")):
        spec = partition(axes, (8, 8), dict.fromkeys(SHAPE, 2), gathered=True)
        assert set(spec) == {None, "tensor"}


def test_rows_of_the_table_are_overridden_where_tracing_happens():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    traced = []

    @jax.jit
    def double(x):
        traced.append(partition(("embed", "mlp"), x.shape, mesh.shape))
        return 2 * constrain(x, "embed", "mlp")
    x = jnp.ones((8, 8))
    with jax.set_mesh(mesh):
        plain = double(x)
        with use_rules({"mlp": None, "embed": ["tensor", "fsdp"]}):
            other, again = double(x), double(x)
        assert double(x).sharding == plain.sharding
    assert traced == [P("fsdp", "tensor"), P(("tensor", "fsdp"), None)]
    assert plain.sharding.spec == traced[0] and other.sharding == again.sharding
    assert other.addressable_shards[0].data.shape == (1, 8)
    with use_rules({"batch": "data"}):
        assert data_ways(mesh) == 1
    assert data_ways(mesh) == 2


def test_overrides_that_make_no_sense():
    with pytest.raises(UserError, match=r"mesh.rules: 'heads:8' is no axis.*layers, vocab"):
        use_rules({"heads:8": "tensor"})
    for over in (("tensor", "model"), 3, "tensors"):
        with pytest.raises(UserError, match=r"mesh.rules.mlp=.*axes of the mesh.*data, fsdp"):
            use_rules({"mlp": over})
    with use_rules({"mlp": "fsdp"}), pytest.raises(
            UserError, match=r"'embed' and 'mlp' both lie on mesh axis 'fsdp'"):
        partition(("embed", "mlp"), (8, 8), SHAPE)


def test_every_row_names_axes_of_the_mesh():
    assert use_rules(RULES)
