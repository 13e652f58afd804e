"""The implementations of operations that tests compare, with pieces so small that tiny arrays are cut too."""

from jsae.ops import PLAIN, Cpu, Ops, Reference, Xla

PIECES = Cpu(chunk=20 * 96, least=2, tokens=20, block=24 * 16, sorts=4)
"""Cuts whatever is as small as (60, 96) and (96, 16)."""

FAST: dict[str, Ops] = {
    "cpu": Cpu(),
    "in pieces": PIECES,
    "xla": Xla(),
    "xla, dense": Xla(decoding="dense"),
    "plain": PLAIN,
}
"""Every way of computing that is not the reference."""

ALL: dict[str, Ops] = {"reference": Reference()} | FAST
