"""Guests whose memory somebody else provides, or watches: they compute what they always do."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from tests.run.command import ISAS, guest
from xipvm import Console, Machine
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.pagemap import PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, Memslot
from xipvm.mmu.uffd_message import UFFD_PAGEFAULT_FLAG_WP, UffdMsg
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_UNPOPULATED
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP, Userfaultfd
from xipvm.mmu.verify import verify

PAGE = 4096
MEMORY = 32 << 20
SLICE = 150_000


def machine(name: str, isa: str) -> tuple[Machine, io.BytesIO]:
    output = io.BytesIO()
    return Machine(guest=guest(name, isa), memory=MEMORY, console=Console(output)), output


def calm(name: str, isa: str) -> tuple[int, bytes]:
    """Status and output of a run that nobody disturbs."""
    plain, output = machine(name, isa)
    with plain:
        return plain.run().status, output.getvalue()


class Source:
    """The memory of a machine in a file, from which each page is served once."""

    def __init__(self, mm: Mm, ram: int, path: Path) -> None:
        self.ram = ram
        self.served: list[int] = []
        self.present: set[int] = set()
        with path.open("wb") as file:
            file.truncate(MEMORY)
            for page, _ in mm.pgd.entries(ram >> 12, (ram + MEMORY) >> 12):
                file.seek((page << 12) - ram)
                file.write(mm.read(page << 12, PAGE))
                self.present.add((page << 12) - ram)
        self.fd = os.open(path, os.O_RDONLY)

    def __call__(self, uffd: Userfaultfd, message: UffdMsg) -> None:
        offset = message.address - self.ram
        self.served.append(offset)
        if offset in self.present:
            uffd.copy(message.address, os.pread(self.fd, PAGE, offset))
        else:
            uffd.zeropage(message.address, PAGE)


@pytest.mark.parametrize("isa", ISAS)
def test_memory_that_comes_when_it_is_needed(isa: str, tmp_path: Path) -> None:
    """As in a post-copy migration: the guest goes on before its memory is there."""
    expected = calm("pages", isa)
    moved, output = machine("pages", isa)
    with moved:
        moved.run(max_instructions=SLICE)
        mm, ram = moved.mm, int(moved.ram)
        source = Source(mm, ram, tmp_path / "memory")
        mm.madvise(ram, MEMORY, MADV_DONTNEED)
        mm.userfaultfd(source).register(ram, MEMORY, UFFDIO_REGISTER_MODE_MISSING)
        result = moved.run()
        os.close(source.fd)
        assert (result.status, output.getvalue()) == expected
        assert len(source.served) == len(set(source.served))
        assert len(source.served) > 1000
        assert source.present & set(source.served)
        verify(moved.host)


def test_a_guest_whose_page_never_comes(tmp_path: Path) -> None:
    alone, _ = machine("pages", "arm64")
    with alone:
        alone.run(max_instructions=SLICE)
        alone.mm.madvise(alone.ram, MEMORY, MADV_DONTNEED)
        alone.mm.userfaultfd().register(alone.ram, MEMORY, UFFDIO_REGISTER_MODE_MISSING)
        result = alone.run(max_instructions=10 * SLICE)
        assert result.reason == "crash"
        assert "does not resolve the fault" in str(result.report)


def log_writes(watched: Machine) -> Memslot:
    """Turns dirty logging of the memslot of RAM on."""
    kvm = watched.secondary
    slot = next(slot for slot in kvm.memslots if slot.hva == watched.ram)
    kvm.set_memslot(slot.id, slot.gfn, slot.pages, slot.hva, slot.flags | MEM_LOG_DIRTY_PAGES)
    return slot


def dirty_log(watched: Machine, slot: Memslot) -> set[int]:
    log = watched.secondary.get_dirty_log(slot.id)
    return {page for page in range(len(log) * 8) if log[page >> 3] >> (page & 7) & 1}


@pytest.mark.parametrize("isa", ISAS)
def test_two_ways_to_know_what_a_guest_wrote(isa: str) -> None:
    """PAGEMAP_SCAN finds the pages that KVM's dirty log has, slice by slice."""
    expected = calm("pages", isa)
    watched, output = machine("pages", isa)
    with watched:
        mm, ram = watched.mm, int(watched.ram)
        uffd = mm.userfaultfd(None, UFFD_FEATURE_WP_ASYNC)
        uffd.register(ram, MEMORY, UFFDIO_REGISTER_MODE_WP)
        uffd.writeprotect(ram, MEMORY)
        slot = log_writes(watched)
        found = 0
        reason = "limit"
        while reason != "exit":
            result = watched.run(max_instructions=SLICE)
            reason = result.reason
            scan = mm.pagemap_scan(
                ram,
                ram + MEMORY,
                flags=PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                category_mask=PAGE_IS_WRITTEN,
                return_mask=PAGE_IS_WRITTEN,
            )
            written = {page - (ram >> 12) for lo, hi, _ in scan.regions for page in range(lo >> 12, hi >> 12)}
            assert written == dirty_log(watched, slot)
            found += len(written)
        assert found > 1000
        assert (result.status, output.getvalue()) == expected
        verify(watched.host)


@pytest.mark.parametrize("isa", ISAS)
def test_a_monitor_that_is_told_of_every_first_write(isa: str) -> None:
    expected = calm("pages", isa)
    watched, output = machine("pages", isa)
    with watched:
        mm, ram = watched.mm, int(watched.ram)
        told: list[int] = []

        def answer(uffd: Userfaultfd, message: UffdMsg) -> None:
            assert message.flags & UFFD_PAGEFAULT_FLAG_WP
            told.append((message.address - ram) >> 12)
            uffd.writeprotect(message.address, PAGE, 0)

        uffd = mm.userfaultfd(answer, UFFD_FEATURE_WP_UNPOPULATED)
        uffd.register(ram, MEMORY, UFFDIO_REGISTER_MODE_WP)
        uffd.writeprotect(ram, MEMORY)
        slot = log_writes(watched)
        result = watched.run()
        assert (result.status, output.getvalue()) == expected
        assert len(told) == len(set(told))
        assert set(told) == dirty_log(watched, slot)
        verify(watched.host)
