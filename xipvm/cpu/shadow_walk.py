"""A vCPU's walks of its guest's tables for shadow paging: the engine walks, this says what to make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.cpu import core
from xipvm.mmu.secondary.guest_walk import NO_FAULT, GuestWalk, ReadEntry

if TYPE_CHECKING:
    from xipvm.cpu.core import Engine

_RISCV_A: Final = 1 << 6
_RISCV_D: Final = 1 << 7
_READ: Final = 1 << core.READ
_WRITE: Final = 1 << core.WRITE


def walk_guest(engine: Engine, gva: int, access: int, read: ReadEntry) -> GuestWalk:
    """Walk the tables of ``engine``'s guest for an access that it has just missed."""
    entries: list[tuple[int, int]] = []

    def seen(gpa: int, size: int) -> bytes | None:
        data = read(gpa, size)
        if data is not None:
            entries.append((gpa, int.from_bytes(data, "little")))
        return data

    gpa, fault, level, leaf, rights, mxr = engine.walk(gva, access, seen)
    walk = GuestWalk(gpa=gpa, rights=rights, entries=entries, fault=fault, level=level)
    if mxr:  # whether what can be executed can be read changes with a bit that no role has
        walk.rights &= ~_READ
        walk.cacheable = access == core.FETCH
    if engine.isa == core.ARM64:
        walk.shift = 39 - 9 * level
        return walk
    walk.shift = 12 + 9 * level
    if fault == NO_FAULT:
        wanted = _RISCV_A | _RISCV_D if access == core.WRITE else _RISCV_A
        walk.set_bits = wanted & ~leaf
        if not (leaf | walk.set_bits) & _RISCV_D:
            walk.rights &= ~_WRITE  # so that the first write is a fault
    return walk
