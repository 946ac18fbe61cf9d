"""What a compiled program sends, read from its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from glm_jax.parallel.mesh import make_mesh
from glm_jax.train.hlo import _groups, collectives

# As a TPU's compiler writes it: an asynchronous gather in three fusions of a loop of 28, a loop
# that counts by two, a reduce-scatter in its own fusion, and a permutation that is started.
TEXT = """HloModule jit_step, is_scheduled=true

%begin.1 (p: bf16[1,512,64]) -> bf16[1,4096,64] {
  %all-gather.1 = bf16[1,4096,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, \
replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={1}, \
frontend_attributes={chain_id="0"}
}

%end.1 (p: bf16[1,512,64]) -> bf16[1,4096,64] {
  %all-gather.2 = bf16[1,4096,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, \
replica_groups=mesh['axis_0'=1,'axis_1'=8] {'axis_1'}, dimensions={1}, \
frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.2 (input: f32[8,4096]) -> f32[8,512] {
  %all-reduce.8 = f32[8,4096]{1,0:T(8,128)} all-reduce(%input), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%ring (q: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %at = u32[]{:T(128)} get-tuple-element(%q), index=1
  %next = u32[]{:T(128)} add(%at, %two)
  %collective-permute-start.1 = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=24, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done.1 = f32[4,8]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %out = (f32[4,8]{1,0}, u32[]) tuple(%collective-permute-done.1, %next)
}

%ring_cond (q: (f32[4,8], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %at.1 = u32[]{:T(128)} get-tuple-element(%q), index=1
  ROOT %lt = pred[]{:T(512)} compare(%at.1, %eight), direction=LT
}

%layers (r: (s32[], bf16[1,512,64])) -> (s32[], bf16[1,512,64]) {
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%r), index=0
  %i.1 = s32[]{:T(128)} add(%i, %one)
  %fusion.1 = bf16[1,4096,64]{2,1,0} fusion(%x), kind=kCustom, calls=%begin.1
  %fusion.2 = bf16[1,4096,64]{2,1,0} fusion(%x), kind=kCustom, calls=%end.1
  %fusion.3 = f32[8,512]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
  %while.2 = (f32[4,8]{1,0}, u32[]) while(%t), condition=%ring_cond, body=%ring
  ROOT %out.1 = (s32[], bf16[1,512,64]) tuple(%i.1, %fusion.2)
}

%layers_cond (r: (s32[], bf16[1,512,64])) -> pred[] {
  %end = s32[]{:T(128)} constant(28)
  %i.2 = s32[]{:T(128)} get-tuple-element(%r), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %end), direction=LT
}

ENTRY %main (a: bf16[28,512,64]) -> f32[] {
  %all-reduce.9 = f32[]{:T(128)} all-reduce(%x), channel_id=2, replica_groups=[1,8]<=[8], \
to_apply=%add, metadata={op_name="jit(step)/reduce_sum"}
  %while.1 = (s32[], bf16[1,512,64]) while(%t), condition=%layers_cond, body=%layers
}
"""


def test_loops_chains_and_fusions():
    found = {(one.kind, one.shapes): (one.sent, one.times) for one in collectives(TEXT, [0] * 8)}
    assert found == {
        ("all-reduce", ((),)): (2 * 4 * 7 / 8, 1),
        ("all-gather", ((1, 4096, 64),)): (4096 * 64 * 2 * 7 / 8, 28),
        ("reduce-scatter", ((8, 4096),)): (8 * 4096 * 4 * 7 / 8, 28),
        ("collective-permute", ((4, 8),)): (4 * 8 * 4, 28 * 4)}


@pytest.mark.parametrize(("text", "wanted"), [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=1,'b'=4] {'b':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=1,'b'=4] {'b':(2)2}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
    ("source_target_pairs={{0,1},{2,3}}", [[0, 1], [2, 3]])])
def test_groups(text, wanted):
    assert _groups(text, 4).tolist() == wanted


def test_what_crosses_slices():
    """With half of the devices in each: of what all get, a seventh of what each sends; a pair's."""
    found = {one.kind: one for one in collectives(TEXT, [0] * 4 + [1] * 4)}
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        assert found[kind].across == pytest.approx(found[kind].sent / 7)
    assert found["collective-permute"].across == 0
    apart = {one.kind: one for one in collectives(TEXT, [0, 1] * 4)}["collective-permute"]
    assert apart.across == apart.sent
    line = "ENTRY %m (a: f32[]) -> f32[] {\n  %x = f32[8,4] all-to-all(%a), replica_groups={}\n}"
    only, = collectives(line, [0] * 4 + [1] * 4)
    assert only.across == 8 * 4 * 4 / 2  # half of what each has is for devices of the other


@pytest.mark.parametrize("scanned", [False, True])
def test_a_program_of_this_jax(scanned):
    mesh = make_mesh({"data": 8})

    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(),
                   check_vma=False)
    def total(x):
        def body(x, _):
            return x + jax.lax.psum(x, "data") / 8, None
        return jax.lax.scan(body, x, None, length=5)[0] if scanned else body(x, None)[0]

    text = jax.jit(total).lower(jnp.zeros((8, 128))).compile().as_text()
    only, = collectives(text, [0] * 8)
    assert (only.kind, only.sent, only.times) == ("all-reduce", 2 * 512 * 7 / 8, 5 * scanned or 1)
