"""Shadow paging: a guest that changes its tables, and a host that takes its pages away, at the same time.

The guest's memory begins at GFN: a root, two last-level tables, and four pages of data, which each begin with what
:func:`word` says of them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.explore.paged import GuestPageFaultError, PagedVcpu, page_entry, table_entry
from xipvm.explore.scenarios.faults import GFN, RW
from xipvm.explore.scene import Scene, scenario
from xipvm.explore.scripted import GuestAccessError
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.shadow import AnyKvmShadow, kvm_shadow_of

_ROOT, _LEAF, _OTHER_LEAF, _SECOND_ROOT = GFN, GFN + 1, GFN + 2, GFN + 3
_TABLES: Final = 4
_DATA: Final = GFN + _TABLES
_PAGES: Final = 4
_HERE: Final = 0x5 << PAGE_SHIFT
"""A virtual page that the first entry of the root is for, by entry 5 of the table below."""
_ALSO: Final = 0x9 << PAGE_SHIFT
_INDEX, _ALSO_INDEX = 5, 9
_FRESH: Final = 0x7 << PAGE_SHIFT
"""The same page once more, not used yet."""


def word(number: int) -> bytes:
    """What data page ``number`` begins with."""
    return b"data of%d" % number


@dataclass
class Guest:
    """Of one scene."""

    scene: Scene
    mm: Mm
    hva: int
    kvm: AnyKvmShadow
    boot: PagedVcpu
    """Has written the tables: page 0 is at _HERE and at _ALSO."""

    def vcpu(self, root: int = _ROOT) -> PagedVcpu:
        """One more vCPU, in the process of ``root``."""
        index = len(self.kvm.vcpus)
        vcpu = PagedVcpu(self.kvm, self.scene.host, self.scene.trace, index, root)
        self.kvm.vcpus.append(vcpu)
        return vcpu

    def hva_of(self, gfn: int) -> int:
        """Where the host has a guest frame."""
        return self.hva + (gfn - GFN << PAGE_SHIFT)


def furnish(scene: Scene) -> Guest:
    """A guest whose data and tables are in place, and whose first vCPU has used both addresses of page 0."""
    mm = scene.mm()
    hva = mm.mmap((_TABLES + _PAGES) * PAGE_SIZE, RW)
    kvm = scene.watch(kvm_shadow_of(mm, scene.trace, scene.host))
    kvm.set_memslot(0, GFN, _TABLES, hva)
    kvm.set_memslot(1, _DATA, _PAGES, hva + _TABLES * PAGE_SIZE)
    boot = PagedVcpu(kvm, scene.host, scene.trace, 0, _ROOT)
    kvm.vcpus.append(boot)
    for page in range(_PAGES):
        boot.store(_DATA + page, word(page))
    for root in (_ROOT, _SECOND_ROOT):
        boot.set_entry(root, 0, table_entry(_LEAF))
    for index in (_INDEX, _ALSO_INDEX, _FRESH >> PAGE_SHIFT):
        boot.set_entry(_LEAF, index, page_entry(_DATA))
    boot.set_entry(_OTHER_LEAF, _INDEX, page_entry(_DATA + 1))
    boot.load_gva(_HERE)
    boot.load_gva(_ALSO)
    return Guest(scene, mm, hva, kvm, boot)


def _sees(vcpu: PagedVcpu, gva: int, *expected: bytes) -> None:
    seen = vcpu.load_gva(gva)
    if seen not in expected:
        raise AssertionError(f"vcpu{vcpu.index} reads {seen!r} at {gva:#x}, not {' or '.join(map(repr, expected))}")


def _reading(vcpu: PagedVcpu, *expected: bytes) -> None:
    for gva in (_HERE, _ALSO, _HERE):
        _sees(vcpu, gva, *expected)


@scenario
def a_page_at_two_addresses_against_munmap(scene: Scene) -> None:
    """A guest uses a page at two virtual addresses, which the host unmaps, and whose frame it uses otherwise."""
    guest = furnish(scene)
    other = guest.mm.mmap(PAGE_SIZE, RW)
    thread = scene.thread(guest.mm)
    second = guest.vcpu()

    def host() -> None:
        guest.mm.munmap(guest.hva_of(_DATA), PAGE_SIZE)
        thread.store(other, b"reused!!")

    scene.actor("vcpu0", _reading, guest.boot, word(0))
    scene.actor("vcpu1", _reading, second, word(0))
    scene.actor("host", host)


@scenario(protocols=("modern",))
def a_page_at_two_addresses_against_migrate(scene: Scene) -> None:
    """A guest reads and writes a page at two virtual addresses while it moves to another frame."""
    guest = furnish(scene)

    def writer() -> None:
        guest.boot.store_gva(_HERE, b"by here!")
        _sees(guest.boot, _ALSO, b"by here!")
        guest.boot.store_gva(_ALSO, b"by also!")
        _sees(guest.boot, _HERE, b"by also!")

    scene.actor("vcpu0", writer)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)


@scenario
def a_guest_changes_an_entry(scene: Scene) -> None:
    """A guest changes an entry and flushes: then it sees the new page, while another vCPU may still see the old one."""
    guest = furnish(scene)
    second = guest.vcpu()

    def changes() -> None:
        vcpu = guest.boot
        _sees(vcpu, _FRESH, word(0))
        for page in (1, 2):
            vcpu.set_entry(_LEAF, _INDEX, page_entry(_DATA + page))
            vcpu.fence()
            _sees(vcpu, _HERE, word(page))
            _sees(vcpu, _ALSO, word(0))

    scene.actor("vcpu0", changes)
    scene.actor("vcpu1", _reading, second, word(0), word(1), word(2))


@scenario
def two_vcpus_change_entries(scene: Scene) -> None:
    """Two vCPUs change entries of one table, each its own, and flush; a third one reads."""
    guest = furnish(scene)
    second = guest.vcpu()

    def changes(vcpu: PagedVcpu, index: int, gva: int) -> None:
        for page in (1, 2):
            vcpu.set_entry(_LEAF, index, page_entry(_DATA + page))
            vcpu.fence()
            _sees(vcpu, gva, word(page))

    scene.actor("vcpu0", changes, guest.boot, _INDEX, _HERE)
    scene.actor("vcpu1", changes, second, _ALSO_INDEX, _ALSO)


@scenario
def an_entry_changes_while_it_is_walked(scene: Scene) -> None:
    """One vCPU's fault has read an entry that another changes; when both are done, a flush shows the new page."""
    guest = furnish(scene)
    second = guest.vcpu()

    def changes() -> None:
        guest.boot.set_entry(_LEAF, _FRESH >> PAGE_SHIFT, page_entry(_DATA + 1))
        guest.boot.fence()

    def reads() -> None:
        _sees(second, _FRESH, word(0), word(1))

    def at_last() -> None:
        second.fence()
        _sees(second, _FRESH, word(1))

    scene.actor("vcpu0", changes)
    scene.actor("vcpu1", reads)
    scene.afterwards(at_last)


@scenario(protocols=("modern",))
def a_guest_changes_an_upper_table(scene: Scene) -> None:
    """A guest puts another table below its root and flushes, while the host moves its pages."""
    guest = furnish(scene)

    def changes() -> None:
        vcpu = guest.boot
        vcpu.set_entry(_ROOT, 0, table_entry(_OTHER_LEAF))
        vcpu.fence()
        _sees(vcpu, _HERE, word(1))
        with suppress(GuestPageFaultError):
            vcpu.load_gva(_ALSO)
            raise AssertionError("a page that the guest has unmapped can be read")
        vcpu.set_entry(_ROOT, 0, table_entry(_LEAF))
        vcpu.fence()
        _sees(vcpu, _ALSO, word(0))

    scene.actor("vcpu0", changes)
    scene.actor("kcompactd", compact_memory, scene.host, scene.trace)


@scenario
def two_processes_share_a_table(scene: Scene) -> None:
    """Two roots lead to one last-level table, which one process changes: both see it, each behind a flush."""
    guest = furnish(scene)
    second = guest.vcpu(_SECOND_ROOT)
    second.load_gva(_HERE)

    def changes() -> None:
        guest.boot.set_entry(_LEAF, _INDEX, page_entry(_DATA + 3))
        guest.boot.fence()
        _sees(guest.boot, _HERE, word(3))

    def at_last() -> None:
        second.fence()
        _sees(second, _HERE, word(3))
        second.switch(_ROOT)
        _sees(second, _HERE, word(3))

    scene.actor("vcpu0", changes)
    scene.actor("vcpu1", _reading, second, word(0), word(3))
    scene.actor("host", guest.mm.madvise, guest.hva_of(_DATA + 2), PAGE_SIZE, MADV_DONTNEED)
    scene.afterwards(at_last)


@scenario
def a_slot_goes_under_shadow_entries(scene: Scene) -> None:
    """The memslot of the data goes while a guest uses it by its tables; behind that there is no memory."""
    guest = furnish(scene)
    second = guest.vcpu()
    gone: list[bool] = []

    def vmm() -> None:
        with suppress(MmError):
            guest.kvm.delete_memslot(1)
            gone.append(True)
            guest.mm.munmap(guest.hva_of(_DATA), _PAGES * PAGE_SIZE)

    def at_last() -> None:
        if gone:
            with suppress(GuestAccessError):
                second.load_gva(_ALSO)
                raise AssertionError("a guest reads memory whose memslot is gone")

    scene.actor("vcpu0", _reading, guest.boot, word(0))
    scene.actor("vcpu1", _reading, second, word(0))
    scene.actor("vmm", vmm)
    scene.afterwards(at_last)
