"""A guest whose RAM is huge pages of the hugetlb pool: it notices nothing, and the host can still do things to them."""

from __future__ import annotations

import io

import pytest

from tests.run.command import ISAS, guest, xipvm
from xipvm.console import Console
from xipvm.errors import BadInput, HostMemoryError
from xipvm.machine import Machine, run
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.pte import HUGE, pte_pfn
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.spte import SPTE_HUGE
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.storm import Storm

MEMORY = 64 << 20


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["pages", "faults", "selfmod"])
def test_a_guest_does_the_same_on_huge_pages(name: str, isa: str) -> None:
    small, printed = run(guest(name, isa), memory=MEMORY)
    huge, output = run(guest(name, isa), memory=MEMORY, hugetlb=True)
    assert (huge.reason, huge.status, output) == (small.reason, small.status, printed)
    assert huge.summary is not None
    assert small.summary is not None
    assert huge.summary.guest_faults <= small.summary.guest_faults


@pytest.mark.parametrize("isa", ISAS)
def test_the_guests_pages_are_copied_and_moved_under_it(isa: str) -> None:
    _, expected = run(guest("pages", isa), memory=MEMORY)
    output = io.BytesIO()
    with Machine(guest("pages", isa), memory=MEMORY, hugetlb=True, console=Console(output)) as machine:
        mm, host = machine.mm, machine.host
        assert (host.huge_pages, host.free_huge_pages - host.reserved_huge_pages) == (MEMORY // HPAGE_SIZE, 0)
        host.reserve_huge_pages(4)
        done = 0
        while True:
            result = machine.run(max_instructions=20_000)
            if result.reason != "limit":
                break
            entries = [entry for _, entry in mm.pgd.entries(machine.ram >> 12, machine.ram + MEMORY >> 12)]
            assert all(entry & HUGE for entry in entries)
            if done % 3 == 0:
                migrate_page(host, machine.trace, pte_pfn(entries[done % len(entries)]))
            elif done % 3 == 1:
                mm.fork("child").exit()
            else:
                mm.mprotect(machine.ram, MEMORY, PROT_READ)
                mm.mprotect(machine.ram, MEMORY, PROT_READ | PROT_WRITE | PROT_EXEC)
            done += 1
        assert done > 9
        assert (result.reason, result.status) == ("exit", 0)
        assert any(entry & SPTE_HUGE for _, entry in machine.secondary.sptes.entries(0, GFN_LIMIT))
        verify(host)
    assert output.getvalue() == expected


def test_the_pool_is_whole_again_without_the_guests_ram() -> None:
    with Machine(guest("hello", "arm64"), memory=MEMORY, hugetlb=True) as machine:
        assert machine.run().reason == "exit"
        host = machine.host
        assert host.free_huge_pages < host.huge_pages
        machine.mm.munmap(machine.ram, MEMORY)
        assert (host.free_huge_pages, host.reserved_huge_pages) == (MEMORY // HPAGE_SIZE, 0)
        verify(host)


def test_ram_that_is_not_made_of_huge_pages_is_refused() -> None:
    with pytest.raises(BadInput, match="multiple of 2 MiB"):
        Machine(guest("hello", "arm64"), memory=MEMORY + 4096, hugetlb=True)
    with pytest.raises(HostMemoryError, match="cannot hold"):
        Machine(guest("hello", "arm64"), memory=MEMORY, hugetlb=True, host_memory=MEMORY)
    with pytest.raises(BadInput, match="storm"):
        Machine(guest("hello", "arm64"), memory=MEMORY, hugetlb=True, storm=Storm(1))
    outcome = xipvm("run", "--hugetlb", "--memory", "65540K", guest("hello", "arm64"))
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)


def test_the_command_line_runs_on_huge_pages() -> None:
    outcome = xipvm("run", "--hugetlb", "--memory", "64M", guest("hello", "riscv64"))
    assert outcome.status == 0
