"""What a compiled program sends between chips, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes that each of n devices sends, by the bytes of what comes out (of all-reduce: by ring).
_SENT = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
_OP = re.compile(rf" ({'|'.join(_SENT)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: as HLO names it.
      shapes: of the arrays that come out.
      sent: bytes that each device sends, each time.
      times: how often a run of the program does it.
      source: the JAX operation that it comes from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sent: float
    times: int
    source: str


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a program for so many devices.

    One that is started, waited for and computed beside stands several times in the text, as one
    chain, and counts once. What a loop does counts as often as the loop runs, which is the
    constant in its condition.
    """
    computations, entry = _computations(text)

    def visit(name: str, times: int, loop: str) -> Iterator[tuple[tuple[str, str], Collective]]:
        for line in computations.get(name, ()):
            if found := _OP.search(line):
                one = _collective(line, found, devices, times, "all-reduce-scatter" in name)
                chain = re.search(r'chain_id="(\d+)"', line)
                if one.sent:
                    yield (loop, chain[1] if chain else line), one
            if found := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                runs = times * _trips(computations, found[1], found[2], line)
                yield from visit(found[2], runs, found[2])
                continue
            for called in re.findall(r" call\(.*to_apply=%?([\w.\-]+)|branch_computations={([^}]*)}"
                                     r"|(?:true|false)_computation=%?([\w.\-]+)", line):
                for inner in ",".join(filter(None, called)).split(","):
                    yield from visit(inner.strip(" %"), times, inner)
            for inner in re.findall(r"calls=%?([\w.\-]+)", line):
                yield from visit(inner, times, loop)
    return list(dict(visit(entry, 1, entry)).values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and which is the program's entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*{$", line):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _trips(computations: dict[str, list[str]], condition: str, body: str, line: str) -> int:
    """How often a loop runs whose counter goes from 0 to the constant in its condition."""
    if known := re.search(r'"known_trip_count":{"n":"(\d+)"', line):
        return int(known[1])
    lines = "\n".join(computations.get(condition, ()))
    for inner in re.findall(r"calls=%?([\w.\-]+)", lines):
        lines += "\n".join(computations.get(inner, ()))
    end = max(map(int, re.findall(r" [su]32\[\]\S* constant\((\d+)\)", lines)), default=1)
    counter = re.search(r" get-tuple-element\([^)]*\), index=(\d+)", lines)
    return -(-end // (_step(computations[body], int(counter[1])) if counter else 1))


def _step(body: list[str], index: int) -> int:
    """What a loop adds to the counter at this place of what it carries."""
    carried = re.search(r" tuple\((.*?)\)", next(x for x in body if x.startswith("  ROOT")))
    names = re.findall(r"%([\w.\-]+)", carried[1] if carried else "")
    text = "\n".join(body)
    name = re.escape(names[index]) if index < len(names) else "none"
    added = re.search(rf"%{name} = \S+ add\(%[\w.\-]+, %([\w.\-]+)\)", text)
    by = added and re.search(rf"%{re.escape(added[1])} = \S+ constant\((\d+)\)", text)
    return int(by[1]) if by else 1


def _collective(line: str, found: re.Match[str], devices: int, times: int, scattered: bool
                ) -> Collective:
    kind, start = found[1], found[2]
    arrays = _ARRAY.findall(line[line.index(" = "):found.start()])
    if start and kind in ("all-gather", "collective-permute"):  # what goes in, what comes out, …
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2:]
    shapes = tuple(tuple(map(int, filter(None, dims.split(",")))) for _, dims in arrays)
    size = sum(math.prod(shape) * _bits(dtype) / 8
               for (dtype, _), shape in zip(arrays, shapes, strict=True))
    n = _group(line, devices)
    if scattered:  # a TPU's reduce-scatter: each device goes on with its slice of the sum
        kind, size = "reduce-scatter", size / n
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, shapes, _SENT[kind](size, n), times, name[1] if name else "")


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _group(line: str, devices: int) -> int:
    """How many devices a collective is between; 2 of a permutation."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] {([^}]*)}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups={{([\d,]+)}", line):
        return found[1].count(",") + 1
    return 2 if "source_target_pairs" in line else devices
