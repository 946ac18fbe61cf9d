"""What one accelerator can do, by kind: the roofs that a plan and a run's MFU are measured against.
"""

import itertools
import math
import re
from typing import NamedTuple

from glm_jax.errors import UserError

_GIB = 2**30


GPU_SHARE = 0.95  # of a GPU's memory: what launch/train.py has JAX take; the rest is CUDA's


class Chip(NamedTuple):
    """One chip.

    Attributes:
      kinds: what JAX's `device_kind` calls it.
      memory: bytes of HBM.
      flops: a second, in bfloat16 with sums in float32, without sparsity.
      memory_bandwidth: of HBM, bytes a second.
      links: bytes a second that it sends to the chips of its slice (TPU) or host (GPU), over all of
        its links together.
      network: bytes a second that it sends to other slices or hosts.
      host: how many GPUs a host has; 0 for TPUs, of which a slice is one network.
    """

    kinds: tuple[str, ...]
    memory: float
    flops: float
    memory_bandwidth: float
    links: float
    network: float
    host: int = 0


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e; of links (6 or 4, each so many bytes a
# second in one direction) and network: jax-ml.github.io/scaling-book/tpus. GPUs: NVIDIA's data
# sheets of A100 80GB, H100 SXM, H200 SXM and HGX B200; network: DGX, one adapter of 200 or 400 Gb/s
# a GPU.
CHIPS = {
    "v4": Chip(("TPU v4",), 32 * _GIB, 275e12, 1.2e12, 6 * 45e9, 6.25e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 16 * _GIB, 197e12, 0.819e12, 4 * 45e9, 3.125e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 95 * _GIB, 459e12, 2.765e12, 6 * 90e9, 6.25e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 32 * _GIB, 918e12, 1.638e12, 4 * 90e9, 12.5e9),
    "a100": Chip(("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
                 80 * _GIB, 312e12, 2.039e12, 300e9, 25e9, 8),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 80 * _GIB, 989e12, 3.35e12, 450e9, 50e9, 8),
    "h200": Chip(("NVIDIA H200",), 141e9, 989e12, 4.8e12, 450e9, 50e9, 8),
    "b200": Chip(("NVIDIA B200",), 180e9, 2250e12, 7.7e12, 900e9, 50e9, 8),
}

# https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: of v5e and v6e; of v4 and v5p
# those below a cube of 4x4x4, all others being made of such cubes
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
PARTS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def sides_of(kind: str) -> int:
    """How many sides a slice of this kind has; GPUs are only counted, which is one."""
    return 1 if CHIPS[kind].host else 3 if kind in ("v4", "v5p") else 2


def slices_of(kind: str) -> str:
    """The shapes of slices that can be had, for a message."""
    return ", ".join(FLAT) if sides_of(kind) == 2 else (
        f"{', '.join(PARTS)}, and those with sides that 4 divides, the smallest first")


def is_slice(kind: str, shape: str) -> bool:
    """Whether there is such a slice of TPUs."""
    if sides_of(kind) == 2:
        return shape in FLAT
    sides = [int(side) for side in shape.split("x")]
    return shape in PARTS or (sides == sorted(sides) and all(side % 4 == 0 for side in sides))


def slice_of(accelerator: str) -> str:
    """`v6e:4x4` for Cloud TPU's `v6e-16`, whose number counts cores of v4 and v5p, two a chip.

    "" for what is no such name, or no slice of the table above.
    """
    name, _, size = accelerator.partition("-")
    kind = name.replace("litepod", "e")
    if kind not in CHIPS or sides_of(kind) == 1 or not re.fullmatch(r"[1-9]\d{0,5}", size):
        return ""
    shapes = list(FLAT)
    if sides_of(kind) == 3:
        cubes = itertools.combinations_with_replacement(range(4, 49, 4), 3)
        shapes = [*PARTS, *("x".join(map(str, cube)) for cube in sorted(cubes, key=sum))]
    chips = int(size) / (2 if sides_of(kind) == 3 else 1)
    found = (shape for shape in shapes if math.prod(map(int, shape.split("x"))) == chips)
    return f"{kind}:{shape}" if (shape := next(found, "")) else ""


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls so; None for one that is not in the table, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


class Topology(NamedTuple):
    """Chips of one kind, as they are rented.

    Attributes:
      kind: a key of `CHIPS`.
      shape: of a slice (TPU), or how many there are (GPU).
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def memory(self) -> float:
        """Bytes of a chip that a program may take."""
        return self.chip.memory * (GPU_SHARE if self.chip.host else 1)

    @property
    def parts(self) -> int:
        """Between how many slices, or hosts of GPUs, the slow network lies."""
        return -(-self.chips // self.chip.host) if self.chip.host else self.slices

    def __str__(self) -> str:
        slices = f"{self.slices}x" if self.slices > 1 else ""
        return f"{slices}{self.kind}:{'x'.join(map(str, self.shape))}"


def topology(text: str) -> Topology:
    """`v5e:4x4`, `v5p:2x2x4`, two slices `2xv5e:4x4`, or GPUs `h100:16`.

    Raises:
      UserError: for a kind that is not in the table, and a shape that it can't have.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]+\d+[a-z]*):([1-9]\d*(?:x[1-9]\d*)*)", text)
    if not found or found[2] not in CHIPS:
        if same := slice_of(text):
            raise UserError(f"--topology={text}: its chips and their shape are wanted: {same}")
        raise UserError(f"--topology={text}: KIND:SHAPE is wanted, such as v5e:4x4, v5p:2x2x4, two "
                        f"slices 2xv5e:4x4, or h100:8; kinds: {', '.join(CHIPS)}")
    slices, kind, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    count = sides_of(kind)
    if len(shape) != count or (slices > 1 and count == 1):
        raise UserError(f"--topology={text}: " + (
            "GPUs are only counted, such as h100:16" if count == 1 else
            f"a slice of {kind} has {count} sides, such as {kind}:" + "x".join("4" * count)))
    if count > 1 and not is_slice(kind, found[3]):
        raise UserError(f"--topology={text}: the slices of {kind} are {slices_of(kind)}")
    return Topology(kind, shape, slices)
