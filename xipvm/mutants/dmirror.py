"""Faults of devices with memory of their own: what is ignored, not announced, or held too long."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.address import PAGE_MASK, PAGE_SHIFT
from xipvm.mmu import device_private, fault, migrate_device
from xipvm.mmu.device_private import DeviceFault
from xipvm.mmu.file import VmFault
from xipvm.mmu.migrate_device import MigrateVma
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.vma import Vma
from xipvm.mutants.mutant import mutant, replaced
from xipvm.mutants.notifier import announcing, silence
from xipvm.notifier import MmuNotifierRange, RangeEvent


@mutant("own-migration-ignored", "M23 (owner)", "I3", "AssertionError", protocol="modern")
def own_migration_ignored() -> Iterator[None]:
    """A device ignores the ranges of its own migrations: its entries lead to the old pages until these have moved."""
    invalidate = Dmirror._invalidate

    def ignore(self: Dmirror, range: MmuNotifierRange, seq: int) -> bool:
        if range.event is RangeEvent.MIGRATE and range.owner is self.owner:
            return True
        return invalidate(self, range, seq)

    with replaced(Dmirror, "_invalidate", ignore):
        yield


@mutant("migration-unannounced", "M1 (device)", "I1", protocol="modern")
def migration_unannounced() -> Iterator[None]:
    """Pages go to a device and come back, and nobody is told."""
    with announcing(silence, lambda event: event is RangeEvent.MIGRATE):
        yield


@mutant("exclusive-unannounced", "M1 (exclusive)", "I1", protocol="modern")
def exclusive_unannounced() -> Iterator[None]:
    """A device gets pages for itself, and a CPU gets them back, and nobody is told."""
    with announcing(silence, lambda event: event is RangeEvent.EXCLUSIVE):
        yield


@mutant("device-fault-holds-what-it-waits-for", "D1", "livelock", protocol="modern")
def device_fault_holds_what_it_waits_for() -> Iterator[None]:
    """CPUs that want a device's page refer to it without having locked it: each keeps all others from moving it."""
    do_device_entry = device_private.do_device_entry

    def unlocked(mm: Mm, area: Vma, hva: int, entry: int) -> tuple[VmFault, str]:
        page = device_private.device_private_page(mm, entry)
        if page is None:
            return do_device_entry(mm, area, hva, entry)
        assert mm.rmap.devices is not None
        page.refcount += 1
        try:
            with mm.mmap_lock.read:
                if mm.pgd.get(hva >> PAGE_SHIFT) != entry or mm.find_vma(hva) is not area:
                    return VmFault.OK, "retry"
                wanted = DeviceFault(mm, area, hva & PAGE_MASK, entry, page)
                return page.pagemap.migrate_to_ram(wanted), "device private"
        finally:
            mm.rmap.devices.put(page.pfn)

    with replaced(fault, "do_device_entry", unlocked):
        yield


@mutant("device-table-mended-too-late", "M4 (device)", "I1", "I3", "AssertionError", protocol="modern")
def device_table_mended_too_late() -> Iterator[None]:
    """A migration's range is over before the pages are taken out of their entries."""
    collect = migrate_device._collect
    unmap = migrate_device._unmap

    def now(args: MigrateVma) -> None:
        collect(args)
        unmap(args)

    with replaced(migrate_device, "_collect", lambda args: None), replaced(migrate_device, "_unmap", now):
        yield
