"""Plans for chips that are not there: what fits, what is sent, and how fast it can be."""

import dataclasses
import re

import jax
import pytest

from configs.pod import get_config
from glm_jax.data.packing import shape_for
from glm_jax.errors import UserError
from glm_jax.models import architecture_of
from glm_jax.nn.compute import Compute
from glm_jax.parallel.mesh import abstract_mesh, make_mesh
from glm_jax.train import estimate, setup
from glm_jax.train import plan as plans
from glm_jax.train.chips import CHIPS, GPU_SHARE, Topology, topology
from glm_jax.train.plan import make_plan, search, table, text
from glm_jax.train.step import by_path

GIB = 2**30
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
         "num_attention_heads": 4, "head_dim": 32, "vocab_size": 512}


def small(name="glm-4-9b-full", **fields):
    config = get_config(name)
    config.model.config.update(SMALL)
    config.update_from_flattened_dict({"batch.rows": 8, "batch.length": 128} | fields)
    return config


@pytest.fixture(scope="module")
def program():
    """The plan of the small model on four chips, and the text of its compiled step."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        own = plans._compile
        patch.setattr(plans, "_compile", lambda traced: kept.append(own(traced)) or kept[-1])
        return make_plan(small(), topology("v5e:2x2")), kept[0].text


@pytest.fixture(scope="module")
def compiled(program):
    return program[0]


def test_a_compiled_step(compiled):
    """What the program holds and sends is what the shapes say."""
    assert compiled.compiled and compiled.fits and compiled.mesh == {"fsdp": 4}
    assert not compiled.warnings
    layer = 64 * (4 * 32 + 2 * 2 * 32) + 4 * 32 * 64 + 64 * 256 + 128 * 64
    matrices = 3 * layer + 2 * 512 * 64
    trained = compiled.memory["trained"]
    assert 4 * matrices / 4 < trained < 4 * matrices / 4 * 1.1  # and norms and biases, whole
    assert compiled.memory["optimizer"] == pytest.approx(2 * trained, abs=64)
    assert compiled.memory["activations"] == 3 * (8 * 128 * 64 * 2) / 4 + 8 * 128 * 64 * 2 / 4
    gathered = 2 * 3 * layer * 2 * 3 / 4  # forward and for the derivative, in bfloat16
    assert compiled.sent["all-gather"][1] > gathered


def test_what_trains_in_float32_is_sent_as_what_is_computed_with(program):
    found = re.findall(r"= \(?(\w+)\[\S* .*?all-gather(?:-start)?\(", program[1])
    assert set(found) == {"bf16", "s32"} and found.count("s32") == 1  # the tokens' numbers


def test_the_state_is_donated(program):
    config = small()
    mesh = abstract_mesh({"fsdp": 4}, 4)
    state = plans.pieces(config, mesh).state
    header = program[1].partition("\n")[0]
    assert header.count("-alias)") == len(jax.tree.leaves(state))


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 4}], ids=lambda mesh: next(iter(mesh)))
def test_micro_batches_hold_one_gradient(mesh):
    """Their sum, 4 bytes a parameter, and what is computed with, 2: no second gradient."""
    config = small(**{"batch.rows": 16, "batch.length": 32, "batch.accumulate": 4,
                      "mesh.fsdp": mesh.get("fsdp", 1), "mesh.data": mesh.get("data", 1)})
    config.model.config.update(hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
                               num_attention_heads=8, head_dim=64, vocab_size=2048)
    plan, by_hand = (make_plan(config, topology("v5e:2x2"), compiled=c) for c in (True, False))
    parameters = plan.memory["trained"] / 4
    assert 4 < plan.memory["temporaries"] / parameters < 8
    assert plan.memory["temporaries"] < 1.05 * by_hand.memory["temporaries"]


def test_what_is_offloaded_is_the_hosts():
    here, there = (make_plan(small(**{"optimizer.offload": offload}), topology("h100:4"))
                   for offload in (False, True))
    moved = here.memory["optimizer"] - there.memory["optimizer"]
    assert here.host == 0 and there.host > 0.9 * here.memory["optimizer"]
    assert there.host == pytest.approx(moved, rel=0.001)  # a counter a layer stays
    assert there.needs < here.needs


def test_the_arithmetic_is_the_compiled_steps(compiled):
    by_hand = make_plan(small(), topology("v5e:2x2"), compiled=False)
    assert not by_hand.compiled
    for name in ("frozen", "trained", "optimizer", "batch", "activations"):
        assert by_hand.memory[name] == compiled.memory[name]
    assert by_hand.flops == compiled.flops
    assert by_hand.seconds["compute"] == compiled.seconds["compute"]


def test_times_are_at_the_chips_peaks(compiled):
    chip, tokens = CHIPS["v5e"], 8 * 128
    assert compiled.step_seconds == max(compiled.seconds.values())
    assert compiled.mfu == pytest.approx(
        compiled.flops * tokens / 4 / chip.flops / compiled.step_seconds)
    assert compiled.seconds["links"] == pytest.approx(
        sum(size for _, size in compiled.sent.values()) / chip.links)
    assert compiled.hours * 3600 == pytest.approx(1000 * compiled.step_seconds)
    assert compiled.to_dict()["chip_hours"] == pytest.approx(4 * compiled.hours)
    # The layers' forward pass is computed a second time.
    kept = make_plan(small(**{"model.remat": "dots"}), topology("v5e:2x2"), compiled=False)
    assert 1.2 < compiled.seconds["compute"] / kept.seconds["compute"] < 4 / 3


def test_gpus_by_arithmetic():
    """GLM-4-9B in parts on 8 of 80 GiB: 16 bytes a parameter do not fit on one."""
    config = get_config("glm-4-9b-full")
    eight = make_plan(config, topology("h100:8"))
    assert not eight.compiled and eight.memory["trained"] == pytest.approx(9.4e9 * 4 / 8, rel=0.01)
    sixteen = make_plan(config, topology("h100:16"))
    assert sixteen.memory["trained"] == pytest.approx(eight.memory["trained"] / 2, rel=0.01)


@pytest.mark.parametrize(("where", "sizes"), [
    ("h100:16", {"fsdp": 16}), ("h100:16", {"data": 2, "fsdp": 8}), ("h100:16", {"data": 16}),
    ("h100:8", {"data": 2, "fsdp": 4}), ("2xv6e:2x2", {"data": 2, "fsdp": 4})])
def test_what_goes_between_hosts_takes_the_network(where, sizes):
    """Each device of a host sends its part of what the other host needs, all else goes inside."""
    on, data = topology(where), sizes.get("data", 1)
    config = small(**{"batch.rows": 16, "model.config.attention_bias": False} | {
        f"mesh.{axis}": sizes.get(axis, 1) for axis in ("data", "fsdp")})
    plan = make_plan(config, on, compiled=False)
    inside = (sum(size for _, size in plan.sent.values()) - plan.across) / on.chip.links
    if on.parts == 1:
        assert plan.seconds["links"] == pytest.approx(inside)
        return
    summed = plan.sent["all-reduce"][1] if data > 1 else 0
    gathered = sum(size for _, size in plan.sent.values()) - summed
    across = summed / (data - 1) if data > 1 else gathered / 15
    assert plan.across == pytest.approx(across, rel=0.05)  # norms are summed over all devices
    assert plan.seconds["links"] == pytest.approx(max(inside, plan.across / on.chip.network))
    assert "by the slow network" in text(plan)
    with pytest.raises(UserError, match="no other axis may reach across"):
        make_plan(small(**{"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": on.chips}), on,
                  compiled=False)


def test_a_compiled_step_of_two_slices():
    """The gradients' sums over `data` alone go between them."""
    config = small(**{"mesh.data": 2, "mesh.fsdp": 4, "model.config.vocab_size": 64})
    compiled = make_plan(config, topology("2xv5e:2x2"))
    by_hand = make_plan(config, topology("2xv5e:2x2"), compiled=False)
    # Small arrays are padded to tiles; whole gradients would be four times as much.
    assert compiled.compiled and by_hand.across < compiled.across < 2 * by_hand.across


def test_an_abstract_mesh_traces_a_kernel_that_keeps_what_cudnns_does():
    config = small(**{"model.remat": "none", "model.attention": "auto"})
    mesh = abstract_mesh({"fsdp": 4}, 4)
    parts = setup.make_parts(config, "lm", (), mesh, None, abstract=True)
    assert parts.model(by_path(parts.trainable)).compute == \
        Compute("splash", "none")


@pytest.mark.parametrize(("raw", "seen"), [
    ({"model_type": "glm", "num_hidden_layers": 1}, 128 * 129 / 2),
    ({"model_type": "bert"}, 128 * 128)])
def test_what_a_row_sees_is_the_models(raw, seen):
    config = architecture_of(raw).config.from_dict(raw)
    assert estimate.pairs_of_a_row(shape_for(config, 4, 128, 8)) == seen


def test_a_mesh_that_can_not_be_is_passed_over(monkeypatch, compiled):
    def make(config, topology, compiled=True):
        if compiled and config.mesh.fsdp != 1:
            raise UserError("no such mesh")
        return found
    found = compiled
    monkeypatch.setattr(plans, "make_plan", make)
    full = dataclasses.replace(compiled, capacity=0)
    assert "--config.mesh.fsdp=1 --config.mesh.tensor=4" in plans.advised(
        small(), topology("v5e:2x2"), full).advice
    assert len(search(small(), topology("v5e:2x2"), 2)) == 2


def test_search_ranks_what_fits_by_time():
    found = search(small(), topology("h100:2"), 1)
    assert {(*plan.mesh, plan.remat) for plan in found} == {
        (axis, remat) for axis in ("data", "fsdp", "tensor")
        for remat in ("none", "dots", "full")}
    assert [plan.step_seconds for plan in found] == sorted(plan.step_seconds for plan in found)
    assert table(found).count("\n") == len(found) + 3
    assert "\nthe best: --config.model.remat=" in table(found)
    first = re.findall(r"--config\.([\w.]+)=(\w+)", table(found))
    again = small(**{name: value if "remat" in name else int(value) for name, value in first})
    assert make_plan(again, topology("h100:2")).step_seconds == found[0].step_seconds
    with pytest.raises(UserError, match=r"no mesh on h100:2 divides batch\.rows=1 and holds"):
        search(small(**{"batch.rows": 1, "batch.accumulate": 2}), topology("h100:2"), 1)


def test_what_does_not_fit_gets_advice(monkeypatch):
    config = small(**{"mesh.fsdp": 1, "mesh.data": -1, "model.remat": "none"})
    where = topology("h100:8")
    plan = make_plan(config, where)
    assert plans.advised(config, where, plan) is plan
    full = make_plan(small(**{"mesh.fsdp": 8}), where)
    monkeypatch.setitem(CHIPS, "h100", CHIPS["h100"]._replace(
        memory=full.needs * 1.01 / GPU_SHARE))
    plan = make_plan(config, where)
    assert not plan.fits and "does not fit" in text(plan)
    told = plans.advised(config, where, plan)
    assert "--config.model.remat=full --config.mesh.data=1 --config.mesh.fsdp=8" in told.advice
    assert told.advice in text(told)
    monkeypatch.setattr(plans, "_nearer", lambda config, where: iter(()))
    assert "take more chips" in plans.advised(config, where, plan).advice


@pytest.mark.parametrize(("said", "sizes"), [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
     "Used 17.98G of 15.75G hbm. Exceeded hbm capacity by 2.23G.", (17.98, 15.75)),
    ("RESOURCE_EXHAUSTED: Allocation of 17.98G exceeds available HBM (15.75G)", (17.98, 15.75)),
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
     "(17.98G) exceeds available HBM (15.75G).", (17.98, 15.75))])
def test_the_compilers_own_figures_when_it_does_not_fit(said, sizes):
    class Refuses:
        def lower(self):
            raise jax.errors.JaxRuntimeError(said)
    program = plans._compile(Refuses())
    assert program.too_much == tuple(size * GIB for size in sizes)


@pytest.mark.parametrize(("fields", "where", "message"), [
    ({"batch.rows": 6}, "h100:4", "batch.rows=6 must be a multiple"),
    ({"mesh.fsdp": 2}, "h100:4", "mesh: fsdp=2 takes 2 of the 4 chips of h100:4"),
    ({"mesh.fsdp": 16}, "h100:4", "mesh: fsdp=16 takes 16 of the 4 chips of h100:4"),
    ({"mesh.data": -1, "mesh.fsdp": 3}, "h100:4", "a multiple of 3 devices, there are 4; lower "
     "the sizes$"),
    ({"steps": -1}, "h100:4", "steps=-1"),
    ({"model.remat": "some"}, "h100:4", "choose one of none, attention"),
])
def test_bad_plans(fields, where, message):
    with pytest.raises(UserError, match=message):
        make_plan(small(**fields), topology(where))


def test_a_single_chip():
    assert len(plans._tpus(topology("v6e:1x1"))) == 1
    with pytest.raises(UserError, match="--topology=v5e:3x5: the compiler knows no such slice"):
        plans._tpus(Topology("v5e", (3, 5)))


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(plans.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu: pip install -r requirements-tpu\.txt"):
        make_plan(small(), topology("v5e:2x2"))


def test_the_text(compiled):
    shown = text(dataclasses.replace(compiled, warnings=("Involuntary full rematerialization",)))
    assert "v5e:2x2, 4 chips: fsdp=4; 8 rows of 128 tokens; remat full; compiled in" in shown
    assert "of 16.00 GiB: fits" in shown and "the compiler warns: Involuntary" in shown


def test_the_text_of_a_tiny_plan_has_small_units(compiled):
    tiny = dataclasses.replace(compiled, chips=1, mesh={}, sent={},
                               memory={"frozen": 3 * 2**20, "batch": 2048},
                               seconds=dict.fromkeys(("compute", "memory", "links"), 2e-4))
    shown = text(tiny)
    assert "v5e:2x2, 1 chip: one chip;" in shown and "less than 0.01 GB" in shown
    assert re.search(r"parameters, frozen +3\.00 MiB", shown)
    assert re.search(r"batch +2\.00 KiB", shown)
    assert re.search(r"a step +0\.200 ms, ", shown) and re.search(r"1000 steps +0\.200 s$", shown)
    big = text(dataclasses.replace(tiny, memory={"frozen": 3 * GIB}, seconds={"compute": 2.0}
                                   | dict.fromkeys(("memory", "links"), 0.0)))
    assert re.search(r"parameters, frozen +3\.00 GiB", big)
    assert re.search(r"a step +2\.000 s, ", big)
    assert re.search(r"1000 steps +0\.56 h, 0\.6 chip-hours", big)


def test_meshes_that_slices_do_not_divide_are_passed_over(monkeypatch):
    """Only data and fsdp reach across slices: a mesh of neither is no advice."""
    where = topology("2xv5e:2x2")
    refused = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8}
    works = {"mesh.data": 2, "mesh.fsdp": 4, "mesh.tensor": 1}
    monkeypatch.setattr(plans, "_others", lambda config, where: iter([refused, works]))
    monkeypatch.setattr(plans, "_nearer", lambda config, where: iter([refused, works]))
    with pytest.raises(UserError, match=r"on 2 slices .*: data × fsdp must be"):
        make_plan(small(**refused), where)
    (found,) = search(small(), where, 1)
    assert found.mesh == {"data": 2, "fsdp": 4}
    told = plans.advised(small(), where, dataclasses.replace(found, capacity=0))
    assert "--config.mesh.data=2 --config.mesh.fsdp=4" in told.advice
    monkeypatch.setattr(plans, "_others", lambda config, where: iter([refused]))
    with pytest.raises(UserError, match="no mesh on 2xv5e:2x2 divides"):
        search(small(), where, 1)


def test_an_adapter_lies_on_an_abstract_mesh_as_on_a_real_one():
    config = small("glm-4-32b-lora")

    def specs(mesh):
        parts = setup.make_parts(config, "lm", (), mesh, None, abstract=True)
        return {path: x.sharding.spec for path, x in by_path(parts.trainable).items()}
    found = specs(abstract_mesh({"fsdp": 4}, 4))
    assert found == specs(make_mesh({"fsdp": 4}))
    assert "fsdp" in found["layers.self_attn.q_proj.adapter.lora_a"]
