"""Read from the text of a compiled program what it sends between devices: its collectives."""

import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(-start)?\(")
_BITS = {"pred": 8, "bf16": 16}  # other types end in their number of bits
_CALLED = ("body", "condition", "calls", "to_apply", "false_computation", "true_computation")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    """Its name in XLA, such as all-reduce."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Type and shape of every result on a device."""
    times: int
    """Number of times that one run executes it; in a branch that may not be taken, the most."""
    where: str
    """The operation of the source that it comes from."""

    @property
    def bytes(self) -> int:
        """Bytes of all results on a device in one run."""
        total = 0
        for kind, shape in self.shapes:
            count = 1
            for size in shape:
                count *= size
            total += count * _bits(kind) // 8
        return total * self.times


def collectives(text: str, *, branches: bool = True) -> list[Collective]:
    """Return the collectives of a program between more than one device.

    Args:
      text: `compiled.as_text()`.
      branches: whether to count those in all branches; otherwise only in the first branch of every conditional, which
        runs where its condition is false.
    """
    computations, entry = _computations(text)
    times = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations[name]:
            for called, often in _called(line, branches):
                if called in computations:
                    visit(called, count * often)

    visit(entry, 1)
    return [found for name, lines in computations.items() for found in _in(lines, times[name])]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation, and the name of the one that runs first."""
    computations: dict[str, list[str]] = {}
    entry, name = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head and not line.startswith(" "):
            name = head.group(2)
            computations[name] = []
            entry = name if head.group(1) else entry
        elif line.strip() == "}":
            name = None
        elif name is not None:
            computations[name].append(line)
    return computations, entry


def _called(line: str, branches: bool) -> Iterator[tuple[str, int]]:
    """Yield the computations that an instruction runs, and how often."""
    trips = re.search(r"known_trip_count[^0-9]*(\d+)", line)
    for key in _CALLED:
        if key == "true_computation" and not branches:
            continue
        for name in re.findall(rf"{key}=%?([\w.\-]+)", line):
            yield name, int(trips.group(1)) if trips and key == "body" else 1
    listed = re.search(r"branch_computations=\{([^}]*)\}", line)
    if listed:
        names = listed.group(1).split(",")
        yield from ((name.strip().lstrip("%"), 1) for name in (names if branches else names[:1]))


def _in(lines: list[str], times: int) -> Iterator[Collective]:
    """Yield the collectives of a computation that runs so often."""
    for line in lines:
        match = _COLLECTIVE.search(line)
        if match is None or not times or _is_alone(line):
            continue
        shapes = tuple(
            (kind, tuple(int(size) for size in sizes.split(",") if size))
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
        )
        where = re.search(r'op_name="([^"]*)"', line)
        yield Collective(match.group(2), shapes, times, where.group(1) if where else "")


def _is_alone(line: str) -> bool:
    """Return whether every group of a collective is a single device, which sends nothing."""
    groups = re.search(r"replica_groups=(\{\{.*?\}\}|\[(\d+),(\d+)\])", line)
    if groups is None:
        return False
    if groups.group(3) is not None:
        return groups.group(3) == "1"
    return "," not in groups.group(1).replace("},{", " ")


def _bits(kind: str) -> int:
    """Return the bits of a number of XLA's type."""
    if kind in _BITS:
        return _BITS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits.group()) if digits else 0
