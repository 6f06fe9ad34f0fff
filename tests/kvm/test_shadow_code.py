"""A guest of a few instructions that changes its tables: what its TLB misses show before its TLBI, and behind it."""

from __future__ import annotations

from typing import Final

import pytest

from tests.asm import a64
from tests.kvm.running import CTRL, PAGE, RAM, Code, Running, running
from xipvm.mmu.secondary.shadow import ShadowPaging

TTBR0, TCR, SCTLR = (3, 0, 2, 0, 0), (3, 0, 2, 0, 2), (3, 0, 1, 0, 0)
TLBI_VMALLE1, DSB_ISH = 0xD508871F, 0xD5033B9F
TABLES: Final = RAM + (2 << 20)
ROOT, MIDDLE, LEAF = TABLES, TABLES + PAGE, TABLES + 2 * PAGE
OLD, NEW = TABLES + 4 * PAGE, TABLES + 5 * PAGE
WINDOW: Final = 0x8000_0000
SPREAD: Final = 1 << 20
"""Addresses so far apart share a place in an engine's TLB of 256 entries."""
PAGE_ENTRY, TABLE_ENTRY, BLOCK_ENTRY = 1 << 10 | 3, 3, 1 << 10 | 1
FIRST, BEFORE, BEHIND = CTRL, CTRL + 8, CTRL + 16


def translated() -> Code:
    """Turns the MMU on: 39 bits of addresses, from ROOT."""
    code = Code()
    for register, value in ((TTBR0, ROOT), (TCR, 25 | 1 << 23 | 2 << 32)):
        code.add(a64.mov(0, value), a64.msr(register, 0))
    code.add(a64.mrs(0, SCTLR), a64.mov(1, 1), 0xAA010000, a64.msr(SCTLR, 0), a64.ISB)  # orr x0, x0, x1
    return code


def note(code: Code, gpa: int) -> None:
    """Loads from WINDOW, and puts what it finds at ``gpa``."""
    code.add(a64.mov(2, WINDOW), a64.ldr(3, 2), a64.mov(4, gpa), a64.str(3, 4))


def evict(code: Code) -> None:
    """Has the engine's TLB lose WINDOW."""
    for n in range(3, 60):
        code.add(a64.mov(2, RAM + n * SPREAD), a64.ldr(3, 2))


def furnish(guest: Running) -> None:
    guest.put(ROOT, BLOCK_ENTRY | 2 << 6)  # flash, read-only: it is executed from
    guest.put(ROOT + 8, RAM | BLOCK_ENTRY)
    guest.put(ROOT + 16, MIDDLE | TABLE_ENTRY)
    guest.put(MIDDLE, LEAF | TABLE_ENTRY)
    guest.put(LEAF, OLD | PAGE_ENTRY)
    guest.put(OLD, 1)
    guest.put(NEW, 2)


@pytest.mark.parametrize(("secondary", "before"), [("kvm-shadow", 1), ("kvm", 2)])
def test_an_entry_that_the_guest_changes(secondary: str, before: int) -> None:
    """Without a flush, a miss of the TLB may find either; behind it, only the new one. Shadow entries keep the old."""
    code = translated()
    note(code, FIRST)
    code.add(a64.mov(2, LEAF), a64.mov(3, NEW | PAGE_ENTRY), a64.str(3, 2))
    evict(code)
    note(code, BEFORE)
    code.add(DSB_ISH, TLBI_VMALLE1, DSB_ISH, a64.ISB)
    note(code, BEHIND)
    with running(code.off(), secondary=secondary, memory=64 << 20) as guest:
        furnish(guest)
        guest.finish()
        assert [guest.get(at) for at in (FIRST, BEFORE, BEHIND)] == [1, before, 2]


def test_an_upper_entry_that_the_guest_changes() -> None:
    """The store is emulated: half a word at a time, and the walk behind it sees all of it."""
    code = translated()
    note(code, FIRST)
    code.add(a64.mov(2, MIDDLE), a64.mov(3, TABLES + 3 * PAGE | TABLE_ENTRY), a64.str(3, 2))
    evict(code)
    note(code, BEFORE)
    code.add(DSB_ISH, TLBI_VMALLE1, DSB_ISH, a64.ISB)
    note(code, BEHIND)
    with running(code.off(), secondary="kvm-shadow", memory=64 << 20) as guest:
        furnish(guest)
        guest.put(TABLES + 3 * PAGE, NEW | PAGE_ENTRY)
        guest.finish()
        assert [guest.get(at) for at in (FIRST, BEFORE, BEHIND)] == [1, 2, 2]
        kvm = guest.kvm
        assert isinstance(kvm, ShadowPaging)
        assert MIDDLE // PAGE in kvm.watched
        assert LEAF // PAGE not in kvm.watched
