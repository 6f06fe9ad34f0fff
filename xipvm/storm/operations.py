"""The operations of a storm: each may be done under a running guest, and leaves it with the memory that it had.

An operation works on a :class:`World` and takes what it needs from its choices. Where the state of the moment does not
let it (a lock is taken further up the stack, a page is held), it raises MmError and has done nothing, or a part that is
as harmless as the whole. What is taken from the guest for a moment (rights, a mapping, a memslot) is back before the
guest executes another instruction; ``point`` in between lets other operations come while it is away.

Operations are found by name in :data:`OPERATIONS`; ``weight`` is how often one comes beside the others. One whose cost
grows with all of memory has a small weight.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import InternalError, MmError
from xipvm.mmu.huge_page import deferred_split_scan, split_if_compound
from xipvm.mmu.ksm import ksm_of
from xipvm.mmu.madvise import (
    MADV_COLD,
    MADV_COLLAPSE,
    MADV_DOFORK,
    MADV_DONTFORK,
    MADV_DONTNEED,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
    MADV_POPULATE_READ,
    MADV_POPULATE_WRITE,
    MADV_UNMERGEABLE,
)
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mremap import MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.secondary.base import READ, WRITE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.memslot import GFN_LIMIT, MEM_LOG_DIRTY_PAGES, MEM_READONLY, MEM_ROMD, Memslot
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC
from xipvm.mmu.userfaultfd import UFFDIO_REGISTER_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP
from xipvm.mmu.vma import PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.mmu.zap import unmap_mapping_range
from xipvm.notifier import RangeEvent
from xipvm.storm.world import MAX_CHILDREN, MAX_HELD, Child, World

if TYPE_CHECKING:
    from xipvm.mmu.file import AddressSpace

_RAM_PROT: Final = PROT_READ | PROT_WRITE | PROT_EXEC


class Operation(NamedTuple):
    """One kind of operation. ``run`` raises MmError when it could not be done."""

    name: str
    weight: int
    run: Callable[[World], None]


OPERATIONS: Final[dict[str, Operation]] = {}


def _operation(name: str, weight: int) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    def define(run: Callable[[World], None]) -> Callable[[World], None]:
        OPERATIONS[name] = Operation(name, weight, run)
        return run

    return define


def _advise(world: World, advice: int) -> None:
    start, end = world.target()
    world.mm.madvise(start, end - start, advice)


def _everything(world: World) -> tuple[int, int]:
    return world.ram.hva, world.ram.end


@contextmanager
def _away(world: World) -> Iterator[None]:
    """A context in which the guest's memory is not what it should be, which others meet at the points inside."""
    world.lowered += 1
    try:
        yield
    finally:
        world.lowered -= 1


# ---- swap and reclaim


@_operation("pageout", 96)
def _pageout(world: World) -> None:
    _advise(world, MADV_PAGEOUT)


@_operation("cold", 16)
def _cold(world: World) -> None:
    _advise(world, MADV_COLD)


@_operation("populate", 32)
def _populate(world: World) -> None:
    _advise(world, (MADV_POPULATE_READ, MADV_POPULATE_WRITE)[world.choose(2, "populate")])


@_operation("reclaim", 1)
def _reclaim(world: World) -> None:
    world.mm.memcg_reclaim(1 + world.choose(2, "passes"))


@_operation("swapoff", 1)
def _swapoff(world: World) -> None:
    world.mm.swapoff()
    world.mm.swapon(world.swap_pages)


@_operation("mlock", 12)
def _mlock(world: World) -> None:
    start, end = world.target()
    world.mm.mlock(start, end - start)


@_operation("munlock", 16)
def _munlock(world: World) -> None:
    start, end = _everything(world) if world.choose(2, "all") else world.target()
    world.mm.munlock(start, end - start)


# ---- pages that move


@_operation("migrate", 80)
def _migrate(world: World) -> None:
    failed: MmError | None = None
    for pfn in world.frames(*world.target()):
        if not world.host.mapcount(pfn):
            continue  # it has gone while others moved
        try:
            migrate_page(world.host, world.mm.trace, pfn)
        except MmError as error:
            failed = error
    if failed is not None:
        raise failed


@_operation("compact", 1)
def _compact(world: World) -> None:
    compact_memory(world.host, world.mm.trace)


# ---- huge pages


@_operation("hugepage", 8)
def _hugepage(world: World) -> None:
    start, end = world.huge()
    world.mm.madvise(start, end - start, MADV_HUGEPAGE if world.choose(2, "huge") else MADV_NOHUGEPAGE)


@_operation("collapse", 12)
def _collapse(world: World) -> None:
    start, end = world.huge()
    world.mm.madvise(start, end - start, MADV_COLLAPSE)


@_operation("khugepaged", 2)
def _khugepaged(world: World) -> None:
    world.mm.khugepaged_scan()


@_operation("split", 12)
def _split(world: World) -> None:
    """Splits the huge page at a place, if it can be split, or what nobody maps whole any more."""
    if world.choose(4, "deferred") == 0:
        deferred_split_scan(world.host)
        return
    for pfn in world.frames(*world.huge()):
        if world.host.is_compound(pfn):
            world.host.get(pfn)
            try:
                split_if_compound(world.host, pfn)
            finally:
                world.mm.put_frame(pfn)
            return
    raise MmError(errno.ENOENT, "there is no huge page")


# ---- equal pages, and pages that somebody holds


@_operation("mergeable", 24)
def _mergeable(world: World) -> None:
    _advise(world, MADV_MERGEABLE)


@_operation("unmergeable", 12)
def _unmergeable(world: World) -> None:
    start, end = _everything(world) if world.choose(4, "all") == 0 else world.target()
    world.mm.madvise(start, end - start, MADV_UNMERGEABLE)


@_operation("ksm", 2)
def _ksm(world: World) -> None:
    ksm_of(world.host, world.mm.trace).scan()


@_operation("hold", 16)
def _hold(world: World) -> None:
    """Somebody has a reference to a frame for a while: it may not move, nor be written to disk and freed."""
    frames = world.frames(*world.target())
    if not frames:
        raise MmError(errno.ENOENT, "nothing is mapped there")
    pfn = frames[world.choose(len(frames), "frame")]
    world.host.pin(pfn)
    world.held.append(pfn)
    if len(world.held) > MAX_HELD:
        _unhold(world)


@_operation("unhold", 16)
def _unhold(world: World) -> None:
    if not world.held:
        raise MmError(errno.ENOENT, "no frame is held")
    world.mm.unpin_frame(world.held.pop(world.choose(len(world.held), "held")))


# ---- rights, and what was written


@_operation("protect", 48)
def _protect(world: World) -> None:
    """Rights go and come back; what the guest may do is what it could before."""
    start, end = world.target()
    lower = (PROT_READ, PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE, 0)[world.choose(4, "prot")]
    with _away(world):
        world.mm.mprotect(start, end - start, lower)
        point("storm.protected")
        world.mm.mprotect(start, end - start, _RAM_PROT)


@_operation("soft-dirty", 2)
def _soft_dirty(world: World) -> None:
    world.mm.clear_refs(4)


@_operation("clear-refs", 2)
def _clear_refs(world: World) -> None:
    world.mm.clear_refs(1 + world.choose(3, "mode"))


@_operation("uffd-wp", 12)
def _uffd_wp(world: World) -> None:
    """A monitor protects pages and lets the kernel lift the protection at the first write; now and then it goes."""
    if world.monitor is None:
        monitor = world.mm.userfaultfd(features=UFFD_FEATURE_WP_ASYNC)
        start, end = _everything(world)
        try:
            monitor.register(start, end - start, UFFDIO_REGISTER_MODE_WP)
        except MmError:
            monitor.close()
            raise
        world.monitor = monitor
    elif world.choose(8, "leave") == 0:
        world.monitor.close()
        world.monitor = None
        return
    start, end = world.target()
    mode = UFFDIO_WRITEPROTECT_MODE_WP if world.choose(4, "protect") else 0
    world.monitor.writeprotect(start, end - start, mode)


@_operation("young", 32)
def _young(world: World) -> None:
    """Asks the secondary MMUs what was used lately, as reclaim does."""
    start, end = world.target()
    notifiers = world.mm.notifiers
    how = world.choose(3, "how")
    if how == 0:
        notifiers.clear_flush_young(start, end)
    elif how == 1:
        notifiers.clear_young(start, end)
    else:
        notifiers.test_young(start)


# ---- the mapping itself


@_operation("mremap", 16)
def _mremap(world: World) -> None:
    """Pages go to another address of the host and come back."""
    start, end = world.area()
    away = world.mm.mmap(end - start, _RAM_PROT)
    with _away(world):
        try:
            world.mm.mremap(start, end - start, end - start, MREMAP_MAYMOVE | MREMAP_FIXED, away)
        except MmError:
            world.mm.munmap(away, end - start)
            raise
        point("storm.moved")
        world.mm.mremap(away, end - start, end - start, MREMAP_MAYMOVE | MREMAP_FIXED, start)


@_operation("range", 40)
def _range(world: World) -> None:
    """A range that announces a change, and no change: an operation that lost a race."""
    start, end = world.target()
    event = (RangeEvent.CLEAR, RangeEvent.PROTECTION_PAGE, RangeEvent.PROTECTION_VMA, RangeEvent.MIGRATE)[
        world.choose(4, "event")
    ]
    with world.mm.notifiers.invalidate_range(start, end, event):
        point("storm.range")


@_operation("range-all", 1)
def _range_all(world: World) -> None:
    start, end = _everything(world)
    with world.mm.notifiers.invalidate_range(start, end, RangeEvent.SOFT_DIRTY):
        point("storm.range")


class _InPlace(NamedTuple):
    """``pages`` pages of device memory from ``first`` of ``file`` on, which the guest has at ``gpa``."""

    file: AddressSpace
    first: int
    pages: int
    gpa: int


def _in_place(world: World) -> list[_InPlace]:
    """The flash banks, and what the guest has of an image's files."""
    machine, image = world.machine, world.machine.image_memory
    banks = [_InPlace(memory.file, 0, memory.file.pages, memory.bank.base) for memory in machine.flash]
    slots = [] if image is None else image.slots
    return banks + [_InPlace(slot.file, slot.pgoff, slot.pages, slot.start) for slot in slots if slot.file is not None]


@_operation("flash", 24)
def _flash(world: World) -> None:
    """Pages of a flash bank, or of a file in an image, are unmapped from everybody, and fault back in."""
    places = _in_place(world)
    if not places:
        raise MmError(errno.ENOENT, "nothing is used in place")
    file, first, pages, gpa = places[world.choose(len(places), "bank")]
    page, count = 0, pages
    if world.choose(4, "all"):
        vcpu = world.machine.vcpus[world.choose(len(world.machine.vcpus), "vcpu")]
        block = vcpu.engine.last_code
        missed = vcpu.missed << PAGE_SHIFT
        used = (missed, missed if block is None else block)[world.choose(2, "used")]
        inside = gpa <= used < gpa + (pages << PAGE_SHIFT)
        page = (used - gpa) >> PAGE_SHIFT if inside else world.choose(pages, "page")
        count = 1 + world.choose(min(pages - page, 16), "count")
    unmap_mapping_range(file, first + page, count, even_cows=False)


# ---- accesses of the host


@_operation("rewrite", 24)
def _rewrite(world: World) -> None:
    """The host process writes what is there already."""
    page = world.any_page()
    size = 1 + world.choose(PAGE_SIZE, "size")
    data = world.mm.read(page, size)
    how = world.choose(3, "how")
    if how == 0:
        world.mm.write(page, data)
    elif how == 1:
        world.mm.access_remote_vm(page, data)
    else:
        world.mm.process_vm_writev(page, data)


@_operation("thread", 32)
def _thread(world: World) -> None:
    """A thread of the host process reads by its own TLB, and writes what it has read."""
    at = world.any_page() + 8 * world.choose(PAGE_SIZE // 8, "offset")
    data = world.thread.load(at, 8)
    if data != world.mm.read(at, 8):
        raise InternalError(f"a host thread reads {data.hex()} at {at:#x}: its translation is stale")
    if world.choose(2, "store"):
        world.thread.store(at, data)


# ---- children


@_operation("fork", 12)
def _fork(world: World) -> None:
    if len(world.children) >= MAX_CHILDREN:
        with world.child() as oldest:
            world.retire(oldest)
    child = Child(world.mm.fork())
    with world.adopted(child):
        for _ in range(3):
            page = world.page()
            if child.may(page, PROT_READ):
                child.known[page] = child.mm.read(page, PAGE_SIZE)


@_operation("fork-child", 1)
def _fork_child(world: World) -> None:
    if len(world.children) >= MAX_CHILDREN:
        raise MmError(errno.EAGAIN, "there are enough children")
    with world.child() as parent:
        child = Child(parent.mm.fork())
        with world.adopted(child):
            child.known.update(parent.known)


@_operation("child-write", 48)
def _child_write(world: World) -> None:
    """A child changes its own copy."""
    with world.child() as child:
        known = list(child.known)
        page = known[world.choose(len(known), "known")] if known and world.choose(3, "new") else world.page()
        data = bytes([world.choose(256, "byte")]) * PAGE_SIZE
        if not child.may(page, PROT_WRITE):
            raise MmError(errno.ENOENT, f"{child.mm.name} may not write at {page:#x}")
        child.mm.write(page, data)
        child.known[page] = data


@_operation("child-drop", 12)
def _child_drop(world: World) -> None:
    """A child gives pages away."""
    start, end = world.target()
    with world.child() as child:
        for page in range(start, end, PAGE_SIZE):
            child.known.pop(page, None)
        if world.choose(2, "unmap"):
            child.mm.munmap(start, end - start)
        else:
            child.mm.madvise(start, end - start, MADV_DONTNEED)


@_operation("child-exit", 12)
def _child_exit(world: World) -> None:
    with world.child() as child:
        world.retire(child)


@_operation("dontfork", 1)
def _dontfork(world: World) -> None:
    _advise(world, MADV_DONTFORK)


@_operation("dofork", 2)
def _dofork(world: World) -> None:
    start, end = _everything(world)
    world.mm.madvise(start, end - start, MADV_DOFORK)


# ---- the secondary MMU


def _slot(world: World) -> Memslot:
    slots = list(world.kvm.memslots)
    return slots[world.choose(len(slots), "slot")]


@_operation("dirty-log", 3)
def _dirty_log(world: World) -> None:
    """Dirty logging of a slot is turned on or off."""
    slot = _slot(world)
    if slot.flags & MEM_ROMD:
        raise MmError(errno.EINVAL, f"{slot!r} is never written")
    world.kvm.set_memslot(slot.id, slot.gfn, slot.pages, slot.hva, slot.flags ^ MEM_LOG_DIRTY_PAGES)


@_operation("get-dirty-log", 12)
def _get_dirty_log(world: World) -> None:
    world.kvm.get_dirty_log(_slot(world).id)


@_operation("memslot", 3)
def _memslot(world: World) -> None:
    """A slot is deleted and made again, with other rights or at another place in between, or at once."""
    kvm, slot = world.kvm, _slot(world)
    how = world.choose(3, "how")
    if how == 2:
        away = GFN_LIMIT - slot.pages
        if any(other.gfn + other.pages > away for other in kvm.memslots if other.id != slot.id):
            raise MmError(errno.EBUSY, "another slot is there just now")
        kvm.set_memslot(slot.id, away, slot.pages, slot.hva, slot.flags)
        with _away(world):
            point("storm.slot_moved")
    else:
        kvm.delete_memslot(slot.id)
        if how == 1:
            kvm.set_memslot(slot.id, slot.gfn, slot.pages, slot.hva, slot.flags ^ MEM_READONLY)
        with _away(world):
            point("storm.slot_deleted")
        if how == 1:
            kvm.delete_memslot(slot.id)
    kvm.set_memslot(slot.id, slot.gfn, slot.pages, slot.hva, slot.flags)


@_operation("flush", 16)
def _flush(world: World) -> None:
    how = world.choose(3, "how")
    if how == 0:
        world.kvm.flush_remote_tlbs("storm")
    elif how == 1:
        world.kvm.kick("storm")
    else:
        world.mm.flush_tlb_range(*world.target())


@_operation("second-vm", 16)
def _second_vm(world: World) -> None:
    """Another VM shows the same memory, uses some of it, and goes away again."""
    start, end = _everything(world)
    kvm = world.guest
    if kvm is None:
        kvm = Kvm(world.mm, world.mm.trace, world.host, name="storm")
        try:
            kvm.set_memslot(0, 0, (end - start) >> PAGE_SHIFT, start)
        except MmError:
            kvm.destroy()
            raise
        world.guest = kvm
    elif world.choose(4, "leave") == 0:
        kvm.destroy()
        world.guest = None
        return
    for _ in range(4):
        kvm.fault((world.page() - start) >> PAGE_SHIFT, (READ, WRITE)[world.choose(2, "access")])
