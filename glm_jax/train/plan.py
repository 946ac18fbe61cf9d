"""Whether a run fits on chips that nobody has rented yet, and how fast it can be there at best.

For TPUs the real training step is compiled for the topology, from abstract weights, by `libtpu`:
memory and collectives are the compiled program's own. For GPUs both follow by arithmetic from the
shapes and where they lie. The times are a roofline (Williams et al. 2009): the longest of what
computing, moving and sending take at the chip's peak, as if they hid each other altogether; a real
step is longer.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from glm_jax.errors import UserError
from glm_jax.parallel.mesh import AXES, abstract_mesh, across_slices, make_mesh, use_rules
from glm_jax.train import estimate, setup
from glm_jax.train.chips import Topology
from glm_jax.train.estimate import Pieces
from glm_jax.train.flops import training_flops
from glm_jax.train.hlo import Collective, collectives
from glm_jax.train.optimizer import make_schedule
from glm_jax.train.step import by_path

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes of each chip.

    Attributes:
      topology, mesh, remat, rows, length: what is planned; of the mesh only sizes above 1.
      capacity: bytes of HBM that a program may take.
      memory: bytes by use. `activations` are what the forward pass keeps for the derivative;
        `temporaries` the most that the program holds besides, gathered parameters and gradients
        among them.
      needs: bytes, in all. `host`: those of it that wait in the host's memory.
      compiled: whether memory and collectives are the compiled program's; else by arithmetic.
      compile_seconds: how long that took.
      sent: by kind of collective, how many run in a step and the bytes that a chip sends in them.
      across: those of these bytes that go to other slices, or hosts of GPUs.
      flops: of `training_flops`, for a token, the tokens it sees included.
      seconds: that a step takes at each of the chip's peaks: compute, memory, links.
      mfu: in the best case.
      steps: of the run; 0 where the config does not say.
      warnings: of the compiler, about how arrays had to be moved.
      advice: the nearest change that fits, where this does not.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    remat: str
    rows: int
    length: int
    capacity: float
    memory: dict[str, float]
    needs: float
    host: float
    compiled: bool
    compile_seconds: float
    sent: dict[str, tuple[int, float]]
    across: float
    flops: float
    seconds: dict[str, float]
    mfu: float
    steps: int
    warnings: tuple[str, ...] = ()
    advice: str = ""

    @property
    def fits(self) -> bool:
        return self.needs <= self.capacity

    @property
    def step_seconds(self) -> float:
        """The best possible."""
        return max(self.seconds.values())

    @property
    def hours(self) -> float:
        return self.steps * self.step_seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {
            "fits": self.fits, "step_seconds": self.step_seconds, "hours": self.hours,
            "chip_hours": self.hours * self.chips}


def mesh_for(config: Any, topology: Topology, abstract: bool) -> Mesh | AbstractMesh:
    """The mesh of the config on all chips of a topology.

    Raises:
      UserError: where the config's sizes leave chips over, or need more; where `libtpu` is missing.
    """
    sizes = setup.mesh_sizes(config)
    mesh: Any = (abstract_mesh(sizes, topology.chips, topology.parts) if abstract else
                 make_mesh(sizes, _tpus(topology)))
    if mesh.size != topology.chips:
        asked = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
        raise UserError(f"mesh: {asked or 'one device'} takes {mesh.size} of the {topology.chips} "
                        f"chips of {topology}; make one of its sizes -1")
    return mesh


def _tpus(topology: Topology) -> Any:
    """The devices of TPUs that are not there."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("a plan for TPUs needs their compiler, libtpu: pip install -r "
                        "requirements-tpu.txt (Linux on x86-64 has it)")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    special: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}
    if topology.shape == (1, 1):  # of a host that has no others; else it has four
        special["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        special["num_slices"] = topology.slices
    with _stderr():
        try:
            return topologies.get_topology_desc(name, "tpu", **special).devices
        except Exception as error:  # of several kinds, by what is wrong
            raise UserError(f"--topology={topology}: the compiler knows no such slice (its words: "
                            f"{str(error).splitlines()[0]})") from None


def pieces(config: Any, mesh: Any, slices: int = 1) -> Pieces:
    """What a run of `config` compiles on this mesh in so many slices; within `use_rules`."""
    setup.check_rows(config, mesh)
    task = setup.make_task(config, None)
    parts = setup.make_parts(config, task.head, task.labels, mesh, None, abstract=True)
    schedule = make_schedule(config.optimizer, config.steps or setup.MOST["steps"])
    state, step = setup.make_training(config, parts, task.loss, schedule, mesh)
    return Pieces(mesh, across_slices(mesh.shape, slices), task, parts, state,
                  setup.abstract_batch(task, mesh), step)


def make_plan(config: Any, topology: Topology, compiled: bool = True) -> Plan:
    """Plans one training step; without `compiled` by arithmetic for TPUs, too.

    Raises:
      UserError: for a config that can't run on the topology, whatever the memory.
    """
    setup.check_numbers(config)
    compiled = compiled and not topology.chip.host
    mesh = mesh_for(config, topology, not compiled)
    with use_rules(config.mesh.rules), setup.matmul_precision(config):
        with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh):
            made = pieces(config, mesh, topology.parts)
            traced = made.step.trace(made.state, made.parts.frozen, made.batch)
            program = _compile(traced) if compiled else None
        return _plan(config, topology, made, traced, program)


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled step, or why it could not be.

    Attributes:
      memory: bytes of the program besides its arguments.
      too_much: the compiler's words: what it needed, and what there is.
    """

    seconds: float
    warnings: tuple[str, ...]
    text: str = ""
    memory: float = 0
    host: float = 0
    arguments: float = 0
    too_much: tuple[float, float] | None = None


def _compile(traced: Any) -> _Program:
    begun, compiled, error = time.monotonic(), None, ""
    with _stderr() as said:
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as refused:
            error = str(refused)
            if "hbm" not in error.lower():
                raise
    seconds = time.monotonic() - begun
    warnings = tuple(line for line in said if "rematerialization" in line)
    if compiled is None:
        sizes = re.search(r"([\d.]+)([KMGT])\)? (?:of|exceeds available HBM \()"
                          r" ?([\d.]+)([KMGT])", error)
        if sizes is None:
            raise UserError(f"the compiler finds too little memory: {error.splitlines()[0]}")
        used, available = (float(sizes[n]) * _UNIT[sizes[n + 1]] for n in (1, 3))
        return _Program(seconds, warnings, too_much=(used, available))
    memory = compiled.memory_analysis()
    beside = (memory.output_size_in_bytes - memory.alias_size_in_bytes
              + memory.generated_code_size_in_bytes)
    return _Program(seconds, warnings, compiled.as_text(), memory.temp_size_in_bytes + beside,
                    memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
                    memory.argument_size_in_bytes)


_UNIT = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """Within nothing is written to standard error; after it the list holds the lines, those of the
    compiler's own code too."""
    said: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += file.read().decode(errors="replace").splitlines()


def _plan(config: Any, topology: Topology, made: Pieces, traced: Any, program: _Program | None
          ) -> Plan:
    chip, count, model = topology.chip, topology.chips, made.parts.model(
        by_path(made.parts.trainable))
    held = {"frozen": estimate.held(made.parts.frozen),
            "trained": estimate.held(made.state["trainable"]),
            "optimizer": estimate.held({k: v for k, v in made.state.items() if k != "trainable"}),
            "batch": estimate.held(made.batch)}
    tokens = config.batch.rows * config.batch.length
    kept = estimate.kept(traced.jaxpr.jaxpr, made, model, tokens // config.batch.accumulate)
    offloaded = kept if config.model.remat == "offload" else 0.0
    host = offloaded + estimate.held(made.state, on_host=True)
    uses = estimate.uses(config, made, model)
    sent = estimate.traffic(config, made, model, uses)
    if program is None:
        capacity = topology.memory
        temporaries = estimate.temporaries(config, made, model, uses)
    elif program.too_much:
        used, capacity = program.too_much
        temporaries = max(used - sum(held.values()) - kept + offloaded, 0)
    else:
        host, capacity = program.host, topology.memory
        temporaries = (program.memory + program.arguments - sum(held.values())
                       - max(kept - offloaded, 0))
        sent = collectives(program.text, [getattr(device, "slice_index", 0)
                                          for device in made.mesh.devices.flat])
    memory = held | {"activations": kept - offloaded, "temporaries": temporaries}
    pairs = config.batch.rows * estimate.pairs_of_a_row(made.task.shape)
    flops = training_flops(model, by_path(made.parts.trainable))
    total = flops.of(tokens, pairs)
    again = estimate.computes_again(config)
    computed = total + again * estimate.layers_flops(model).of(tokens, pairs)
    across = sum(one.times * one.across for one in sent)
    seconds = {"compute": computed / count / chip.flops,
               "memory": (estimate.moved(memory, uses, again, config.batch.accumulate)
                          / chip.memory_bandwidth),
               "links": max((sum(one.times * one.sent for one in sent) - across) / chip.links,
                            across / chip.network)}
    return Plan(
        str(topology), count, {k: v for k, v in made.mesh.shape.items() if v > 1},
        config.model.remat, config.batch.rows, config.batch.length, capacity, memory,
        sum(memory.values()), host, program is not None, program.seconds if program else 0.0,
        _by_kind(sent), across, total / tokens, seconds,
        total / count / chip.flops / max(seconds.values()), config.steps,
        program.warnings if program else ())


def _by_kind(found: Sequence[Collective]) -> dict[str, tuple[int, float]]:
    kinds = sorted({one.kind for one in found})
    return {kind: (sum(one.times for one in found if one.kind == kind),
                   sum(one.times * one.sent for one in found if one.kind == kind))
            for kind in kinds}


def advised(config: Any, topology: Topology, plan: Plan) -> Plan:
    """`plan`, and where it does not fit the nearest change that does, found by trying."""
    if plan.fits:
        return plan
    for change in _nearer(config, topology):
        with contextlib.suppress(UserError):  # a mesh that slices or heads don't divide
            other = make_plan(_changed(config, change), topology)
            if other.fits:
                return dataclasses.replace(plan, advice=" ".join(
                    f"--config.{name}={value}" for name, value in change.items())
                    + f" ({other.needs / GIB:.1f} GiB)")
    return dataclasses.replace(plan, advice="no mesh, model.remat or batch.rows tried here fits; "
                               "take more chips, or chips with more memory")


def _nearer(config: Any, topology: Topology) -> Iterator[dict[str, Any]]:
    """Changes of a config that take less memory, those that change least first."""
    steps: dict[str, Any] = {}
    if config.model.remat not in ("full", "offload"):
        yield (steps := {"model.remat": "full"})
    sizes = abstract_mesh(setup.mesh_sizes(config), topology.chips).shape
    if sizes["data"] > 1:  # parameters in as many parts as there are
        yield (steps := steps | {"mesh.data": 1, "mesh.fsdp": sizes["data"] * sizes["fsdp"]})
    ways = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    rows = config.batch.rows
    for accumulate in (2, 4, 8, 16):  # the same batch in parts
        if rows % (ways * config.batch.accumulate * accumulate) == 0:
            yield (steps := steps | {"batch.accumulate": config.batch.accumulate * accumulate})
    if rows > ways:
        yield (steps := steps | {"batch.accumulate": 1, "batch.rows": ways})
    for tensor in (2, 4, 8):  # fewer rows than chips
        if sizes["fsdp"] * sizes["data"] % tensor == 0:
            yield steps | {"mesh.data": 1, "batch.accumulate": 1,
                           "mesh.fsdp": sizes["fsdp"] * sizes["data"] // tensor,
                           "mesh.tensor": sizes["tensor"] * tensor, "batch.rows": ways // tensor}


def _changed(config: Any, change: Mapping[str, Any]) -> Any:
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(change))
    return config


def search(config: Any, topology: Topology, tries: int) -> list[Plan]:
    """Plans of other meshes and remat policies, best first; those that don't fit last.

    All are judged by arithmetic; of TPUs the `tries` best are compiled.
    """
    found = []
    for change in _others(config, topology):
        other = _changed(config, change)
        with contextlib.suppress(UserError):  # a batch that the mesh doesn't divide, and the like
            if _least(other, topology) <= topology.memory:
                found.append((make_plan(other, topology, compiled=False), change))
    if not found:
        raise UserError(f"--search: no mesh on {topology} divides batch.rows={config.batch.rows} "
                        "and holds the parameters")
    found.sort(key=lambda one: _rank(one[0]))
    if topology.chip.host:
        return [plan for plan, _ in found]
    plans: list[Plan] = []
    refused = None
    for _, change in found:
        if len(plans) == tries:
            break
        try:
            plans.append(make_plan(_changed(config, change), topology))
        except UserError as error:  # a mesh that the slices don't divide
            refused = refused or error
    if not plans:  # no compiler, no such slice
        assert refused is not None
        raise refused
    return sorted(plans, key=_rank)


def _least(config: Any, topology: Topology) -> float:
    """Bytes that parameters and optimizer take of a chip."""
    with use_rules(config.mesh.rules):
        mesh = abstract_mesh(setup.mesh_sizes(config), topology.chips, topology.parts)
        made = pieces(config, mesh, topology.parts)
        return estimate.held(made.state) + estimate.held(made.parts.frozen)


def _rank(plan: Plan) -> tuple[bool, float, float]:
    return not plan.fits, plan.step_seconds, plan.needs


def _others(config: Any, topology: Topology) -> Iterator[dict[str, Any]]:
    count, experts = topology.chips, setup.routed_experts(config) or 1
    for expert in _parts(math.gcd(count, experts)):
        for tensor in _parts(min(8, count // expert)):
            for fsdp in _parts(count // expert // tensor):
                for remat in ("none", "dots", "full"):
                    yield {"mesh.expert": expert, "mesh.tensor": tensor, "mesh.fsdp": fsdp,
                           "mesh.sequence": 1, "mesh.data": count // expert // tensor // fsdp,
                           "model.remat": remat}


def _parts(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def text(plan: Plan) -> str:
    """The plan for people."""
    def gib(size: float) -> str:
        units = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
        unit, name = next((one for one in units if size >= one[0] / 100), units[0])
        return f"{size / unit:8.2f} {name}"

    def duration(seconds: float) -> str:
        return f"{seconds * 1e3:8.3f} ms" if 0 < seconds < 0.01 else f"{seconds:8.3f} s"

    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one chip"
    chips = "chip" if plan.chips == 1 else "chips"
    how = f"compiled in {plan.compile_seconds:.0f} s" if plan.compiled else "by arithmetic"
    lines = [f"{plan.topology}, {plan.chips} {chips}: {mesh}; {plan.rows} rows of {plan.length} "
             f"tokens; remat {plan.remat}; {how}", "", "Memory of a chip"]
    names = {"frozen": "parameters, frozen", "trained": "parameters, trained",
             "activations": "activations kept"}
    lines += [f"  {names.get(name, name):22}{gib(size)}" for name, size in plan.memory.items()]
    verdict = "fits" if plan.fits else "does not fit"
    lines += [f"  {'in all':22}{gib(plan.needs)} of {plan.capacity / GIB:.2f} GiB: {verdict}"]
    if plan.host:
        lines += [f"  {'on the host':22}{gib(plan.host)}"]
    if plan.advice:
        lines += [f"  the nearest change that fits: {plan.advice}"]
    sent = [f"  {kind:22}{size / 1e9:8.2f} GB in {times}" for kind, (times, size) in
            plan.sent.items() if size >= 5e6]
    lines += ["", "Sent by a chip in a step", *(sent or ["  less than 0.01 GB of each kind"])]
    if plan.across:
        lines += [f"  {'by the slow network':22}{plan.across / 1e9:8.2f} GB of it at least"]
    seconds = plan.seconds
    lines += ["", "At best", f"  {'operations a token':22}{plan.flops / 1e9:8.2f} G",
              f"  {'compute':22}{duration(seconds['compute'])} a step",
              f"  {'memory':22}{duration(seconds['memory'])}",
              f"  {'interconnect':22}{duration(seconds['links'])}",
              f"  {'a step':22}{duration(plan.step_seconds)}, "
              f"{plan.rows * plan.length / plan.step_seconds:,.0f} tokens a second, "
              f"MFU {plan.mfu:.0%}"]
    if plan.steps:
        hours = f"{plan.hours:8.2f} h, {plan.hours * plan.chips:,.1f} chip-hours"
        took = hours if plan.hours >= 0.05 else duration(plan.hours * 3600)
        lines += [f"  {f'{plan.steps} steps':22}{took}"]
    return "\n".join(lines + [f"the compiler warns: {line}" for line in plan.warnings])


def table(plans: Sequence[Plan]) -> str:
    """Several plans, a line each."""
    lines = [f"{'mesh':34}{'remat':8}{'GiB a chip':>11}{'s a step':>10}{'MFU':>6}"]
    for plan in plans:
        mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one chip"
        lines += [f"{mesh:34}{plan.remat:8}{plan.needs / GIB:11.2f}{plan.step_seconds:10.3g}"
                  f"{plan.mfu:6.0%}{'' if plan.fits else '  does not fit'}"]
    best, how = plans[0], "compiled" if plans[0].compiled else "by arithmetic"
    lines += ["", f"{best.topology}; {how}"]
    if best.fits:
        lines += ["the best: " + " ".join([
            f"--config.model.remat={best.remat}",
            *(f"--config.mesh.{axis}={best.mesh.get(axis, 1)}" for axis in AXES)])]
    return "\n".join(lines)
