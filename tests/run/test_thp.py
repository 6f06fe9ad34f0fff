"""A guest on transparent huge pages, which the host splits, collapses and moves under it: it notices nothing."""

from __future__ import annotations

import io

import pytest

from tests.run.command import ISAS, guest, xipvm
from xipvm.check import Oracle
from xipvm.console import Console
from xipvm.errors import BadInput, MmError
from xipvm.machine import Machine, run
from xipvm.mmu.huge_page import deferred_split_scan, split_if_compound
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_COLLAPSE, MADV_PAGEOUT
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.pte import HUGE, MAPPED, SPECIAL, pte_pfn
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.spte import SPTE_HUGE
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.storm.storm import parse_storm
from xipvm.trace import Trace

MEMORY = 32 << 20
RWX = PROT_READ | PROT_WRITE | PROT_EXEC
PAGE = 4096


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["pages", "faults", "selfmod"])
def test_a_guest_does_the_same_on_huge_pages(name: str, isa: str) -> None:
    small, printed = run(guest(name, isa), memory=MEMORY)
    huge, output = run(guest(name, isa), memory=MEMORY, thp="always")
    assert (huge.reason, huge.status, output) == (small.reason, small.status, printed)
    assert huge.summary is not None
    assert small.summary is not None
    assert huge.summary.guest_faults < small.summary.guest_faults


class Meddler:
    """What the host does to the guest's RAM, one thing after the other."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.mm = machine.mm
        self.deeds = 0
        self.splits = self.collapses = self.huge_sptes = 0
        self.mm.swapon(MEMORY // PAGE)

    def blocks(self) -> list[int]:
        """The 2 MiB of RAM that have pages."""
        ram, pgd = self.machine.ram, self.mm.pgd
        return [hva for hva in range(ram, ram + MEMORY, HPAGE_SIZE) if not pgd.pmd_none(hva >> 12)]

    def act(self) -> None:
        sptes = self.machine.secondary.sptes.entries(0, GFN_LIMIT)
        self.huge_sptes += any(spte & SPTE_HUGE for _, spte in sptes)
        for hva in self.blocks():
            self.deeds += 1
            (self.protect_a_part, self.split, self.page_out_a_part, self.share, self.move)[self.deeds % 5](hva)
            if self.deeds % 3:
                try:
                    self.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE)
                except MmError:
                    continue
                assert self.mm.pgd.huge(hva >> 12)
                self.collapses += 1
        verify(self.machine.host)

    def frame(self, hva: int) -> int | None:
        entry = self.mm.pgd.pte(hva >> 12)
        return pte_pfn(entry) if entry & MAPPED and not entry & SPECIAL else None

    def protect_a_part(self, hva: int) -> None:
        self.splits += bool(self.mm.pgd.huge(hva >> 12))
        self.mm.mprotect(hva + 5 * PAGE, 9 * PAGE, PROT_READ)
        assert not self.mm.pgd.huge(hva >> 12)
        self.mm.mprotect(hva + 5 * PAGE, 9 * PAGE, RWX)

    def split(self, hva: int) -> None:
        pfn = self.frame(hva + 77 * PAGE)
        if pfn is not None:
            assert split_if_compound(self.machine.host, pfn)

    def page_out_a_part(self, hva: int) -> None:
        self.mm.madvise(hva + 3 * PAGE, 40 * PAGE, MADV_PAGEOUT)

    def share(self, hva: int) -> None:
        child = self.mm.fork("child")
        child.munmap(hva, 99 * PAGE)
        deferred_split_scan(self.machine.host)
        child.exit()

    def move(self, hva: int) -> None:
        pfn = self.frame(hva)
        if pfn is not None:
            migrate_page(self.machine.host, self.machine.trace, pfn)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "step"), [pytest.param("pages", 50_000, marks=pytest.mark.slow), ("selfmod", 400)])
def test_huge_pages_come_and_go_under_a_guest(isa: str, name: str, step: int) -> None:
    _, expected = run(guest(name, isa), memory=MEMORY)
    output, trace, oracle = io.BytesIO(), Trace(), Oracle()
    trace.attach(oracle)
    machine = Machine(
        guest(name, isa), memory=MEMORY, thp="always", console=Console(output), trace=trace, host_memory=3 * MEMORY
    )
    with machine:
        meddler = Meddler(machine)
        while (result := machine.run(max_instructions=step)).reason == "limit":
            meddler.act()
        assert (result.reason, result.status) == ("exit", 0)
        trace.detach(oracle)  # the end takes everything away at once, in no order
    assert output.getvalue() == expected
    assert oracle.violations == []
    assert meddler.splits > 2
    assert meddler.collapses > 5
    assert meddler.huge_sptes


@pytest.mark.slow
@pytest.mark.parametrize("thp", ["always", "madvise"])
def test_a_storm_over_huge_pages(thp: str) -> None:
    path = guest("pages", "riscv64")
    calm, expected = run(path, memory=MEMORY, thp=thp)
    ops = "hugepage+collapse+split+khugepaged+pageout+migrate+protect+fork+child-write"
    stormy, output = run(path, memory=MEMORY, thp=thp, storm=parse_storm(f"7,ops={ops}"))
    assert (stormy.reason, stormy.status, output) == (calm.reason, calm.status, expected)


def test_never() -> None:
    with Machine(guest("hello", "arm64"), memory=MEMORY, thp="never") as machine:
        machine.run()
        assert not any(entry & HUGE for _, entry in machine.mm.pgd.entries(0, 1 << 36))


def test_bad_setting() -> None:
    with pytest.raises(BadInput, match="sometimes"):
        Machine(guest("hello", "arm64"), memory=MEMORY, thp="sometimes")
    outcome = xipvm("run", "--thp", "sometimes", guest("hello", "arm64"))
    assert outcome.status == 2


def test_on_the_command_line() -> None:
    outcome = xipvm("run", "--thp", "always", "--memory", "32M", guest("hello", "riscv64"))
    assert outcome.status == 0
