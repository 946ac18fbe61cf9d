"""What a compiled program sends between chips, read from its text."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Bytes that each of n devices sends, by the bytes of what comes out (of all-reduce: by ring).
_SENT = {
    "all-gather": lambda size, n: size * (n - 1) / n,
    "reduce-scatter": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: 2 * size * (n - 1) / n,
    "all-to-all": lambda size, n: size * (n - 1) / n,
    "collective-permute": lambda size, n: size,
}
_OP = re.compile(rf" ({'|'.join(_SENT)})(-start)?\(")
# A TPU's compiler has what goes between slices sent through the hosts.
_BETWEEN = re.compile(r' send\(.*_xla_megascale_transfer_type="(\w+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
      kind: as HLO names it.
      shapes: of the arrays that come out.
      sent: bytes that each device sends, each time.
      across: those of them that must at least go from slice to slice, where each device has an
        adapter of its own on the network between them.
      times: how often a run of the program does it.
      source: the JAX operation that it comes from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    sent: float
    times: int
    source: str
    across: float = 0.0


def crossing(kind: str, sent: float, devices: int, slices: int) -> float:
    """Bytes that each of a collective's devices, equally many in each slice, must send to others.

    What all get goes to each other slice once, a part by each of a slice's devices.
    """
    if kind == "all-to-all":  # each has something for each
        return sent * (devices - devices // slices) / max(devices - 1, 1)
    return sent * (slices - 1) / max(devices - 1, 1)


def collectives(text: str, slices: Sequence[int]) -> list[Collective]:
    """The collectives of a program for as many devices as there are numbers of slices.

    One that is started, waited for and computed beside stands several times in the text, as one
    chain, and counts once. What a loop does counts as often as the loop runs, which is the
    constant in its condition.
    """
    computations, entry = _computations(text)

    def visit(name: str, times: int, loop: str) -> Iterator[tuple[tuple[str, str], Collective]]:
        for line in computations.get(name, ()):
            if found := _OP.search(line):
                one = _collective(line, found, slices, times, "all-reduce-scatter" in name)
                chain = re.search(r'chain_id="(\d+)"', line)
                if one.sent:
                    yield (loop, chain[1] if chain else line), one
            if found := _BETWEEN.search(line):
                yield (loop, line), _between(line, found, len(set(slices)), times)
            if found := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                runs = times * _trips(computations, found[1], found[2], line)
                yield from visit(found[2], runs, found[2])
                continue
            for inner in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line):
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


def _collective(line: str, found: re.Match[str], slices: Sequence[int], times: int,
                scattered: bool) -> Collective:
    kind, start = found[1], found[2]
    arrays = _arrays(line, found)
    if start and kind in ("all-gather", "collective-permute"):  # what goes in, what comes out, …
        arrays = [array for array in arrays if array[0]]
        arrays = arrays[len(arrays) // 2:]
    shapes, size = tuple(shape for shape, _ in arrays), sum(size for _, size in arrays)
    groups = _groups(line, len(slices))
    n = groups.shape[1]
    if scattered:  # a TPU's reduce-scatter: each device goes on with its slice of the sum
        kind, size = "reduce-scatter", size / n
    sent = _SENT[kind](size, n)
    over = [len({slices[device] for device in group}) for group in groups]
    across = (sent * (sum(over) / len(over) - 1) if kind == "collective-permute"
              else crossing(kind, sent, n, max(over)))
    return Collective(kind, shapes, sent, times, _source(line), across)


def _between(line: str, found: re.Match[str], slices: int, times: int) -> Collective:
    """What each device sends to the devices in its place of the other slices."""
    kind = found[1].lower().replace("_", "-")
    (shape, size), *_ = _arrays(line, found)
    into = {"all-gather": slices, "reduce-scatter": 1 / slices}.get(kind, 1)  # of what comes out
    sent = _SENT.get(kind, _SENT["collective-permute"])(size * into, slices)
    return Collective(kind, (shape,), sent, times, _source(line), sent)


def _arrays(line: str, found: re.Match[str]) -> list[tuple[tuple[int, ...], float]]:
    """Shape and bytes of each array that the operation `found` gives."""
    out = []
    for dtype, dims in _ARRAY.findall(line[line.index(" = "):found.start()]):
        shape, digits = tuple(map(int, filter(None, dims.split(",")))), re.search(r"\d+", dtype)
        out.append((shape, math.prod(shape) * (int(digits[0]) if digits else 8) / 8))
    return out


def _source(line: str) -> str:
    name = re.search(r'op_name="([^"]*)"', line)
    return name[1] if name else ""


def _groups(line: str, devices: int) -> np.ndarray:
    """`[groups, devices]`: between which devices a collective is; of a permutation each pair."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] {([^}]*)}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        shape, order, own = [], [], []  # an axis may be cut: 'name':(major)size
        cuts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in
                re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[2])}
        for name, size in sizes.items():
            before, part = cuts.get(name, (1, 1))
            own += [False, name in cuts, False]
            shape += [before, part, size // before // part]
        order = [n for n, use in enumerate(own) if not use] + [n for n, u in enumerate(own) if u]
        grid = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return grid.reshape(-1, math.prod(shape[n] for n, use in enumerate(own) if use))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        dims = [int(n) for n in found[3].split(",")]
        grid = np.arange(math.prod(dims)).reshape(dims)
        if found[4]:
            grid = grid.transpose([int(n) for n in found[4].split(",")])
        return grid.reshape(int(found[1]), int(found[2]))
    if found := re.search(r"(?:replica_groups|source_target_pairs)={({[\d,{} ]+})}", line):
        return np.array([[int(n) for n in group.split(",")]
                         for group in re.findall(r"{([\d, ]+)}", found[1])])
    return np.arange(devices)[None]
