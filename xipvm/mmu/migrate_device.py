"""migrate_vma: pages of one area move to the memory of a device, or back, as its driver wants.

In three steps, between which the driver copies::

    migrate_vma_setup       range start (MIGRATE, the owner's) → entries that may move become migration entries → range
                            end → the same pages leave all other places (unmap.py, a range each). ``src`` says which
    ...                     the driver allocates pages, copies, and puts their words into ``dst``
    migrate_vma_pages       what the pages are goes over. A place where nothing was gets its page now, in a range
                            (MIGRATE, the owner's) of its own
    migrate_vma_finalize    migration entries become entries of the new pages, or of the old ones where one did not move
                            (no destination, somebody holds it); nobody is told

Every page in ``src`` is locked, and has a reference of the migration's, until the last step. The caller holds mmap_lock
for reading all the time, and calls the last step whatever happens. A word is 0 or a frame number shifted by
``MIGRATE_PFN_SHIFT`` with flags: MIGRATE (it will move, or has), VALID (there is a frame), WRITE (the entry was
writable). MIGRATE alone is a place where nothing is yet, which has no frame.

What moves: private anonymous pages that nobody else holds. A compound page is split first. From a device come back
those pages that belong to ``owner``, of the kinds that were asked for.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.device_private import (
    DEVICE_PRIVATE_PFN,
    device_memory,
    device_private_entry,
    device_private_page,
    is_device_entry,
    places,
    set_device_entry,
)
from xipvm.mmu.frames import (
    PG_ANON,
    PG_DIRTY,
    PG_KSM,
    PG_REFERENCED,
    PG_RESERVED,
    PG_SWAPBACKED,
    PG_SWAPCACHE,
    ZERO_PFN,
)
from xipvm.mmu.huge_page import split_if_compound
from xipvm.mmu.huge_pmd import split_huge_pmd
from xipvm.mmu.mapping import anon_vma_prepare
from xipvm.mmu.pte import (
    ACCESSED,
    ANON,
    DIRTY,
    EXCLUSIVE,
    FLAGS,
    HUGE,
    MAPPED,
    MIGRATION,
    PFN_SHIFT,
    PRESENT,
    SPECIAL,
    UFFD_WP,
    WRITE,
    pte_pfn,
)
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.unmap import migration_entry, set_nonpresent, try_to_migrate
from xipvm.mmu.vma import PROT_WRITE, VM_HUGETLB, VM_MIXEDMAP, VM_UFFD_MISSING, Vma
from xipvm.notifier import RangeEvent

if TYPE_CHECKING:
    from xipvm.locks.lock import Keyed
    from xipvm.mmu.mm import Mm

MIGRATE_PFN_VALID: Final = 1 << 0
MIGRATE_PFN_MIGRATE: Final = 1 << 1
MIGRATE_PFN_WRITE: Final = 1 << 3
MIGRATE_PFN_SHIFT: Final = 6

MIGRATE_VMA_SELECT_SYSTEM: Final = 1 << 0
"""Pages of the host."""
MIGRATE_VMA_SELECT_DEVICE_PRIVATE: Final = 1 << 1
MIGRATE_VMA_SELECT_DEVICE_COHERENT: Final = 1 << 2

_FOLLOW: Final = PG_ANON | PG_DIRTY | PG_REFERENCED | PG_SWAPBACKED
_MOVES: Final = VM_HUGETLB | VM_MIXEDMAP


def migrate_pfn(pfn: int) -> int:
    """The word of a page that the driver has allocated."""
    return pfn << MIGRATE_PFN_SHIFT | MIGRATE_PFN_VALID


def migrate_pfn_to_pfn(word: int) -> int | None:
    """The frame of a word, None where there is none."""
    return word >> MIGRATE_PFN_SHIFT if word & MIGRATE_PFN_VALID else None


class MigrateVma:
    """One migration of bytes ``[start, end)`` of ``area``, by the driver ``owner``; ``flags``: MIGRATE_VMA_SELECT_*.

    ``faulted``: the device page for which a CPU waits; its fault has locked it, and has a reference to it.
    """

    __slots__ = ("_locks", "area", "cpages", "dst", "end", "faulted", "flags", "npages", "owner", "src", "start")

    def __init__(
        self, area: Vma, start: int, end: int, *, owner: object, flags: int, faulted: int | None = None
    ) -> None:
        self.area = area
        self.start = start
        self.end = end
        self.owner = owner
        self.flags = flags
        self.faulted = faulted
        self.npages = (end - start) >> PAGE_SHIFT
        self.src = [0] * self.npages
        self.dst = [0] * self.npages
        self.cpages = 0
        """How many may move."""
        self._locks: list[Keyed | None] = [None] * self.npages

    @property
    def mm(self) -> Mm:
        """Whose pages they are."""
        return self.area.mm

    def moving(self) -> Iterator[tuple[int, int, int | None]]:
        """(index, address, frame) of what may move; None for a place where nothing is."""
        for index, word in enumerate(self.src):
            if word & MIGRATE_PFN_MIGRATE:
                yield index, self.start + (index << PAGE_SHIFT), migrate_pfn_to_pfn(word)


# ---- setup


def migrate_vma_setup(args: MigrateVma) -> None:
    """Takes what may move out of all entries. Raises MmError EINVAL for a range that is not inside one usual area."""
    mm, area = args.mm, args.area
    mm.notifiers.needs_modern("migrate_vma")
    if (
        args.npages <= 0
        or (args.start | args.end) & ~PAGE_MASK
        or area.flags & _MOVES
        or args.start < area.start
        or args.end > area.end
        or mm.find_vma(args.start) is not area
    ):
        raise MmError(errno.EINVAL, f"migrate_vma of {args.start:#x}..{args.end:#x} in {area!r}")
    _split_huge(args)
    try:
        with mm.notifiers.invalidate_range(args.start, args.end, RangeEvent.MIGRATE, owner=args.owner):
            _collect(args)
        point("mm.migrate_vma.collected")
        _unmap(args)
    except BaseException:
        migrate_vma_finalize(args)
        raise


def _split_huge(args: MigrateVma) -> None:
    mm = args.mm
    for page, entry in mm.pgd.entries(args.start >> PAGE_SHIFT, args.end >> PAGE_SHIFT):
        hva = page << PAGE_SHIFT
        if entry & HUGE and mm.pgd.huge(page):
            split_huge_pmd(mm, hva)
        small = mm.pgd.get(max(page, args.start >> PAGE_SHIFT))
        if small & MAPPED and not small & SPECIAL and mm.host.is_compound(pte_pfn(small)):
            split_if_compound(mm.host, pte_pfn(small))


def _collect(args: MigrateVma) -> None:
    """Passes no point behind the wait for others' page table locks."""
    mm = args.mm
    mm.lock_tables(args.start, args.end)
    for index in range(args.npages):
        hva = args.start + (index << PAGE_SHIFT)
        word = _collect_one(args, index, hva)
        args.src[index] = word
        args.cpages += bool(word)


def _collect_one(args: MigrateVma, index: int, hva: int) -> int:
    mm, area, page = args.mm, args.area, hva >> PAGE_SHIFT
    entry = mm.pgd.get(page)
    if not entry or (entry & PRESENT and entry & SPECIAL and pte_pfn(entry) == ZERO_PFN):
        vacant = area.file is None and args.flags & MIGRATE_VMA_SELECT_SYSTEM
        return MIGRATE_PFN_MIGRATE if vacant and not area.flags & VM_UFFD_MISSING else 0
    if not entry & MAPPED:
        device_page = device_private_page(mm, entry)
        if (
            device_page is None
            or not args.flags & MIGRATE_VMA_SELECT_DEVICE_PRIVATE
            or device_page.pagemap.owner is not args.owner
        ):
            return 0
        if device_page.pfn != args.faulted:
            args._locks[index] = lock = mm.rmap.page_lock.attempt(device_page.pfn)
            if lock is None:
                return 0
        device_page.refcount += 1
        mm.pgd.set(page, 0)
        _emit_gone(mm, hva, device_page.pfn)
        set_nonpresent(mm, hva, _migration(device_page.pfn, entry))
        device_page.mapcount -= 1
        assert mm.rmap.devices is not None
        mm.rmap.devices.put(device_page.pfn)
        return _word(device_page.pfn, entry)
    if not _movable(args, entry):
        return 0
    pfn = pte_pfn(entry)
    lock = mm.rmap.page_lock.attempt(pfn)
    if lock is None:
        return 0
    mm.host.get(pfn)
    args._locks[index] = lock
    mm.clear_flush(hva)
    if entry & DIRTY:
        mm.host.set_flags(pfn, PG_DIRTY)
    set_nonpresent(mm, hva, migration_entry(area, entry))
    mm.host.add_mapcount(pfn, -1)
    mm.host.put(pfn)
    return _word(pfn, entry)


def _emit_gone(mm: Mm, hva: int, pfn: int) -> None:
    if mm.trace.on:
        mm.trace.emit("pte_clear", mm=mm.name, start=hva, end=hva + PAGE_SIZE, pages=[(pfn, 1)])


def _word(pfn: int, entry: int) -> int:
    return migrate_pfn(pfn) | MIGRATE_PFN_MIGRATE | (MIGRATE_PFN_WRITE if entry & WRITE else 0)


def _migration(pfn: int, entry: int) -> int:
    """The migration entry of a device-private one."""
    return MIGRATION | pfn << PFN_SHIFT | ANON | entry & (WRITE | EXCLUSIVE | FLAGS & ~MAPPED | UFFD_WP)


def _movable(args: MigrateVma, entry: int) -> bool:
    """Whether the page of an entry is of a kind that was asked for, and one that can move."""
    mm, pfn = args.mm, pte_pfn(entry)
    if entry & (SPECIAL | HUGE) or not entry & ANON:
        return False
    if mm.host.is_compound(pfn) or mm.host.flags(pfn) & (PG_KSM | PG_RESERVED) or not mm.host.mapping(pfn):
        return False
    owner = None if mm.rmap.devices is None else mm.rmap.devices.pagemap_of(pfn)
    if owner is None:
        return bool(args.flags & MIGRATE_VMA_SELECT_SYSTEM)
    return bool(args.flags & MIGRATE_VMA_SELECT_DEVICE_COHERENT) and owner.owner is args.owner


def _unmap(args: MigrateVma) -> None:
    """The pages leave all other places; those that somebody holds will not move."""
    for index, _, pfn in args.moving():
        if pfn is not None and not (_unmap_everywhere(args, pfn) and _alone(args, pfn)):
            args.src[index] &= ~MIGRATE_PFN_MIGRATE
            args.cpages -= 1


def _unmap_everywhere(args: MigrateVma, pfn: int) -> bool:
    mm = args.mm
    if pfn < DEVICE_PRIVATE_PFN:
        return not mm.host.mapcount(pfn) or try_to_migrate(mm.host, pfn)
    devices = device_memory(mm.host, mm.trace, mm.rmap)
    page = devices.pages[pfn]
    while True:
        found = [(area, hva) for area, hva in places(mm.rmap, page) if _maps(area.mm, hva, pfn)]
        if not found:
            return not page.mapcount
        for area, hva in found:
            other = area.mm
            notifiers = other.notifiers
            with notifiers.invalidate_range(hva, hva + PAGE_SIZE, RangeEvent.CLEAR), other.ptl(hva >> PMD_SHIFT):
                if _maps(other, hva, pfn):
                    entry = other.pgd.get(hva >> PAGE_SHIFT)
                    other.pgd.set(hva >> PAGE_SHIFT, 0)
                    _emit_gone(other, hva, pfn)
                    set_nonpresent(other, hva, _migration(pfn, entry))
                    page.mapcount -= 1
                    devices.put(pfn)


def _maps(mm: Mm, hva: int, pfn: int) -> bool:
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    return is_device_entry(entry) and pte_pfn(entry) == pfn


def _alone(args: MigrateVma, pfn: int) -> bool:
    """Nobody refers to the page but the migration, and the fault that it is for. It gives up its swap slot."""
    mm = args.mm
    expected = 1 + (pfn == args.faulted)
    if pfn >= DEVICE_PRIVATE_PFN:
        return device_memory(mm.host, mm.trace, mm.rmap).pages[pfn].refcount == expected
    if mm.host.flags(pfn) & PG_SWAPCACHE and (mm.rmap.swap is None or not mm.rmap.swap.give_up_slot(pfn)):
        return False
    return not mm.host.mapcount(pfn) and mm.host.refcount(pfn) == expected


# ---- pages


def migrate_vma_pages(args: MigrateVma) -> None:
    """The bookkeeping of every page that has a destination goes over to it. ``src`` says what has moved afterwards."""
    mm = args.mm
    vacant: list[tuple[int, int, int]] = []
    for index, hva, pfn in args.moving():
        new = migrate_pfn_to_pfn(args.dst[index])
        if new is None:
            args.src[index] &= ~MIGRATE_PFN_MIGRATE
        elif pfn is None:
            args._locks[index] = mm.rmap.page_lock.attempt(new)  # whoever comes upon it waits for the last step
            vacant.append((index, hva, new))
        elif _alone(args, pfn):
            _follow(mm, pfn, new)
        else:
            args.src[index] &= ~MIGRATE_PFN_MIGRATE
    if not vacant:
        return
    start = vacant[0][1]
    anon_vma_prepare(args.area)  # which may wait
    with mm.notifiers.invalidate_range(start, args.end, RangeEvent.MIGRATE, owner=args.owner):
        mm.lock_tables(start, args.end)
        for index, hva, new in vacant:
            if not _insert(args.area, hva, new):
                args.src[index] &= ~MIGRATE_PFN_MIGRATE


def _follow(mm: Mm, old: int, new: int) -> None:
    """What is known of a page, but its content."""
    host = mm.host
    devices = device_memory(host, mm.trace, mm.rmap)
    if old >= DEVICE_PRIVATE_PFN:
        mapping, index = devices.pages[old].mapping, devices.pages[old].index
        flags = PG_ANON | PG_SWAPBACKED | PG_DIRTY
    else:
        mapping, index, flags = host.mapping(old), host.index(old), host.flags(old) & _FOLLOW
    if new >= DEVICE_PRIVATE_PFN:
        page = devices.pages[new]
        page.mapping, page.index = mapping, index
    else:
        host.set_flags(new, flags)
        host.set_rmap(new, mapping, index)


def _insert(area: Vma, hva: int, pfn: int) -> bool:
    """Maps ``pfn`` where nothing was, or the zero page; False when there is something now. Passes no point."""
    mm = area.mm
    entry = mm.pgd.get(hva >> PAGE_SHIFT)
    if mm.find_vma(hva) is not area or area.flags & VM_UFFD_MISSING:
        return False
    if entry and not (entry & PRESENT and entry & SPECIAL and pte_pfn(entry) == ZERO_PFN):
        return False
    if entry:
        mm.clear_flush(hva)
    root, index = anon_vma_prepare(area).id, area.page_offset(hva)
    if pfn < DEVICE_PRIVATE_PFN:
        mm.host.set_flags(pfn, PG_ANON | PG_SWAPBACKED)
        mm.host.set_rmap(pfn, root, index)
    _map(area, hva, pfn, root, index, ANON | EXCLUSIVE | area.new_anon)
    return True


def _map(area: Vma, hva: int, pfn: int, root: int, index: int, kept: int) -> None:
    """An entry of ``pfn``, in an empty place, with a reference and a mapping of its own."""
    mm = area.mm
    if pfn >= DEVICE_PRIVATE_PFN:
        page = device_memory(mm.host, mm.trace, mm.rmap).pages[pfn]
        page.mapping, page.index = root, index
        page.refcount += 1
        page.mapcount += 1
        set_device_entry(mm, hva, device_private_entry(pfn, kept))
    else:
        mm.host.get(pfn)
        mm.host.add_mapcount(pfn, 1)
        mm.set_pte(hva, pfn << PFN_SHIFT | area.rights | kept & ~MAPPED)


# ---- finalize


def migrate_vma_finalize(args: MigrateVma) -> None:
    """Entries instead of the migration entries; locks and references of the migration are dropped. Passes no point."""
    mm = args.mm
    for index, word in enumerate(args.src):
        pfn, new = migrate_pfn_to_pfn(word), migrate_pfn_to_pfn(args.dst[index])
        if pfn is not None:
            _remove_migration_entries(mm, pfn, new if word & MIGRATE_PFN_MIGRATE and new is not None else pfn)
        lock, args._locks[index] = args._locks[index], None
        if lock is not None:
            lock.drop()
        for frame in (pfn, new):
            if frame is not None:
                put_any(mm, frame)
        args.src[index] = word & MIGRATE_PFN_MIGRATE
        args.dst[index] = 0


def put_any(mm: Mm, pfn: int) -> None:
    """Drops a reference to a frame of the host or a device's page."""
    if pfn >= DEVICE_PRIVATE_PFN:
        device_memory(mm.host, mm.trace, mm.rmap).put(pfn)
    else:
        mm.put_frame(pfn)


def _remove_migration_entries(mm: Mm, old: int, new: int) -> None:
    """Entries of ``new`` in place of the migration entries of ``old``."""
    rmap, host = mm.rmap, mm.host
    if old >= DEVICE_PRIVATE_PFN:
        page = device_memory(host, mm.trace, rmap).pages[old]
        root, index, found = page.mapping, page.index, list(places(rmap, page))
    else:
        root, index, found = host.mapping(old), host.index(old), list(rmap.places(host, old))
    for area, hva in found:
        other = area.mm
        entry = other.pgd.get(hva >> PAGE_SHIFT)
        if entry & MAPPED or not entry & MIGRATION or pte_pfn(entry) != old:
            continue
        kept = entry & (FLAGS | UFFD_WP)
        if not area.prot & PROT_WRITE or kept & UFFD_WP:
            kept &= ~WRITE
        if kept & WRITE and new < DEVICE_PRIVATE_PFN:
            kept |= DIRTY | ACCESSED
        other.pgd.set(hva >> PAGE_SHIFT, 0)
        _map(area, hva, new, root, index, kept)


# ---- pins for long


def pin_longterm(mm: Mm, hva: int) -> int:
    """The frame of ``hva``, to write to, with a reference that may be kept for long (FOLL_LONGTERM).

    No page of a device may be held for long, so one that the CPU reaches there moves to system memory first; the block
    of a file that is used in place cannot. Raises MmError EFAULT, ENOMEM, EBUSY for a page that cannot move now,
    EOPNOTSUPP for such a file's; OutOfFrames.
    """
    while True:
        area = mm.find_vma(hva)
        if area is not None and area.file is not None and area.file.devmap:
            raise MmError(errno.EOPNOTSUPP, f"a pin for long of {area.file.name}, whose blocks are used in place")
        pfn: int = mm.get_user_pages(hva, write=True).pfn
        of_device = None if mm.rmap.devices is None else mm.rmap.devices.pagemap_of(pfn)
        if of_device is None:
            mm.host.get(pfn)
            return pfn
        if not _to_system(mm, hva & PAGE_MASK, of_device.owner):
            raise MmError(errno.EBUSY, f"the page at {hva:#x} in {mm.name} cannot leave its device")


def _to_system(mm: Mm, hva: int, owner: object) -> bool:
    """Moves a device-coherent page; False when somebody holds it."""
    with mm.mmap_lock.read:
        area = mm.find_vma(hva)
        if area is None:
            return True  # to be found out by the next look
        args = MigrateVma(area, hva, hva + PAGE_SIZE, owner=owner, flags=MIGRATE_VMA_SELECT_DEVICE_COHERENT)
        migrate_vma_setup(args)
        try:
            gone = not args.cpages and args.src[0] == 0
            for index, _, pfn in args.moving():
                assert pfn is not None
                new = mm.alloc_frame(False)
                args.dst[index] = migrate_pfn(new)
                mm.host.copy(pfn, new)
            migrate_vma_pages(args)
            return gone or bool(args.src[0] & MIGRATE_PFN_MIGRATE)
        finally:
            migrate_vma_finalize(args)
