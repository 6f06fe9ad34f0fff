"""KVM with shadow paging: entries by guest virtual address, for hardware that walks no second table.

The engine looks up nothing but shadow entries, by role (:data:`Role`) and address. One that is missing is a fault: the
guest's tables are walked in software, guest frame and rights of the host's side come from the faults of KVM by guest
frame, as ever, and an entry with the rights that both give is put into the root of the role. Without translation the
entries by guest frame are themselves the root.

**The order of a fault.** Root of the role → tables walked → accessed and dirty bits set in the guest's entry → entry of
the guest frame (retry protocol) → lock → shadow pages made available (which may take roots away) → *give up when the
root is obsolete, or the guest frame has no such entry any more* → every table that was walked is watched → *give up
when one of its entries is another by now* → shadow entry → unlock. Watched first, read again then: whoever writes to it
later faults.

**Watched tables.** The guest may not write to a page of its tables without our knowing, through whatever address: the
entry of that guest frame has neither W nor MMU-writable, and so have those below it. A store to one is a fault:

* all that is known of the page is last-level tables: it becomes *unsync*. It can be written from now on; what was made
  of it stays, as in a TLB, until the guest's next flush instruction (any vCPU's, of any address). Then it is watched
  again → all TLBs are flushed → each shadow entry whose guest entry has changed is removed;
* else the store is emulated, as one to a device: written → what was made of the entries that it hit is removed, with
  the tables below. The fourth in a row that hits a page which no fault has walked meanwhile (a page that is a table no
  more, mostly) gives up all that was made of it, and the page can be written.

A page that nothing is known of any more is watched no longer. Roots go when their topmost table does.

**Reverse map.** An entry of a guest frame knows the shadow entries below it (shadow_table.py); an invalidation, ageing,
dirty logging and write protection take from all of them at once. So to the outside there is one entry a guest frame,
with the rights of the host's side: what is said of it (``spte_set``, ``spte_zap``) holds for all that was made of it.

**Obsolete roots.** When all entries go because a memslot does, the roots are not emptied: they are obsolete, and no
vCPU finds them any more. A fault that set out with one starts over.

Who changes the guest's tables behind its back (a device that does DMA, a debugger on the host) is not noticed before
the guest writes there itself, as with KVM; :meth:`KvmDirtyLog.write_guest` is.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu.secondary.base import FAULT, MMIO, RETRY_WALK, WRITE
from xipvm.mmu.secondary.guest_walk import (
    GUEST_FAULT,
    NO_FAULT,
    NOT_SHADOWED,
    TABLE_FAULT,
    GuestWalk,
    GuestWalker,
    Role,
)
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.kvm_2008 import Kvm2008
from xipvm.mmu.secondary.kvm_fault import KvmFaults
from xipvm.mmu.secondary.memslot import GFN_LIMIT, Memslot
from xipvm.mmu.secondary.shadow_table import (
    ENTRIES,
    INDEX_BITS,
    INDEX_LIMIT,
    LEAF_SHIFT,
    GfnTable,
    Root,
    ShadowEntry,
    ShadowPage,
)
from xipvm.mmu.secondary.spte import (
    PFN_MASK,
    SPTE_HOST_WRITABLE,
    SPTE_MMIO,
    SPTE_MMU_WRITABLE,
    SPTE_PRESENT,
    SPTE_WRITE,
    describe_spte,
    spte_rights,
)
from xipvm.notifier import MmuNotifiers2008

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.tables import GupPage, PageTable
    from xipvm.trace.funnel import Trace

_RIGHTS = 7


class ShadowPaging(KvmFaults):
    """What shadow paging adds to a KVM, whatever tells that of changes."""

    max_shadow_pages: ClassVar[int] = 1024
    """n_max_mmu_pages: pages of guest tables that entries may be made of at a time."""
    flooding: ClassVar[int] = 3
    """Emulated stores to a table, with no walk between, that are still taken for changes of a table."""

    def _begin_shadowing(self) -> None:
        """The rest of the construction."""
        self.max_level = 1
        self.shadow = self
        self.sptes: PageTable = GfnTable(3)
        self.roots: dict[Role, tuple[PageTable, PageTable]] | None = {}
        self.watched: set[int] = set()
        """Guest frames of tables that are not written unseen."""
        self._roots: dict[Role, Root] = {}
        self._shadowed: dict[int, list[ShadowPage]] = {}
        """By guest frame."""
        self._unsync: dict[int, None] = {}
        """Guest frames of tables that the guest may write to, in the order in which they became so."""
        self._nr_shadow_pages = 0
        self._nr_roots = 0

    @property
    def _gfns(self) -> GfnTable:
        assert isinstance(self.sptes, GfnTable)
        return self.sptes

    # ---- faults

    def fault_gva(self, walker: GuestWalker, role: Role, gva: int, access: int) -> int:
        """Install an entry for ``gva`` in the root of ``role``. What it answers: see guest_walk.py."""
        if not actors.hooked():
            return self._fault_gva(walker, role, gva, access)
        reading = self.srcu.read_lock()
        try:
            return self._fault_gva(walker, role, gva, access)
        finally:
            self.srcu.read_unlock(reading)

    def _fault_gva(self, walker: GuestWalker, role: Role, gva: int, access: int) -> int:
        root = self._root_of(role)
        self.host_failed = False
        walk = walker.walk_guest(gva, access, self._read_entry)
        if walk.fault != NO_FAULT:
            return FAULT if self.host_failed else GUEST_FAULT | walk.fault << 4 | walk.level << 8
        point("kvm.shadow.walked")
        if walk.set_bits:
            try:
                if not self._set_bits(walk):
                    return RETRY_WALK
            except MmError:
                return TABLE_FAULT | walk.level << 8
        if not walk.cacheable:
            return NOT_SHADOWED
        gfn = walk.gpa >> PAGE_SHIFT
        if not self._allows(gfn, access):
            answer = MMIO if walker.sends_to_device(gfn, access) else self.fault(gfn, access)
            if answer != RETRY_WALK and not (answer == MMIO and self._is_device(gfn)):
                return answer | walk.gpa
        point("kvm.shadow.mapping")
        with self.mmu_lock.write:
            self._make_pages_available()
            if root.obsolete:
                return RETRY_WALK
            return self._map(root, walk, gva, access)

    def _allows(self, gfn: int, access: int) -> bool:
        """Whether the entry of ``gfn`` is there and allows ``access``."""
        spte = self.sptes.get(gfn) if gfn < GFN_LIMIT else 0
        return bool(spte & SPTE_PRESENT and spte >> access & 1)

    def _is_device(self, gfn: int) -> bool:
        """Whether the entry of ``gfn`` says that it is a device's, for all accesses."""
        spte = self.sptes.get(gfn) if gfn < GFN_LIMIT else 0
        return bool(spte & SPTE_MMIO) and self._mmio_cached(spte)

    def _map(self, root: Root, walk: GuestWalk, gva: int, access: int) -> int:
        """Puts what ``walk`` found into ``root``, where all is as it was. Under mmu_lock."""
        gfn = walk.gpa >> PAGE_SHIFT
        index = gva >> PAGE_SHIFT & INDEX_LIMIT - 1
        self._watch_tables(root, walk, index)
        if self.tlbs_dirty:
            self._flush_and_kick("shadow")
        if root.obsolete or not self._unchanged(walk):
            return RETRY_WALK
        spte = self.sptes.get(gfn)  # W may have just gone, from a table that maps itself
        if spte & SPTE_MMIO:
            if not self._mmio_cached(spte):
                return RETRY_WALK
            rights = walk.rights & 3
        else:
            rights = walk.rights & spte & _RIGHTS if spte & SPTE_PRESENT else 0
        if not rights >> access & 1:
            return RETRY_WALK
        spte = spte & ~_RIGHTS | rights
        gfns = self._gfns
        old = root.made_of.get(index)
        if old is not None and (old.gfn != gfn or (root.sptes.get(index) ^ spte) & PFN_MASK):
            gfns.drop(root, index)  # another frame: never in place
            self._flush_and_kick("shadow")
        at, value = walk.entries[-1]
        gfns.put(root, index, ShadowEntry(gfn, at, value), spte)
        if self.trace.on:
            rights_given = spte_rights(spte) or describe_spte(spte)
            address = root.role[4] << PAGE_SHIFT + INDEX_BITS | index << PAGE_SHIFT
            self.trace.emit("shadow_set", vm=self.name, root=root.number, gva=address, gfn=gfn, rights=rights_given)
        return RETRY_WALK

    def _handle(self, gfn: int, access: int) -> int:
        """See KvmFaults: a store to a watched table comes first."""
        if access == WRITE and gfn in self.watched:
            slot = self.memslots.find(gfn)
            if slot is not None and not slot.invalid and not slot.readonly:
                with self.mmu_lock.write:
                    if not self._try_to_unsync(gfn):
                        return MMIO
        return super()._handle(gfn, access)

    # ---- the guest's tables

    def _slot_of(self, gpa: int) -> Memslot | None:
        slot = self.memslots.find(gpa >> PAGE_SHIFT)
        return None if slot is None or slot.invalid else slot

    def _read_entry(self, gpa: int, size: int) -> bytes | None:
        """Part of the guest's memory, by way of the host's addresses; None where there is none."""
        slot = self._slot_of(gpa)
        if slot is None:
            return None
        hva = slot.hva + gpa - (slot.gfn << PAGE_SHIFT)
        page = self._page_at(hva, write=False)
        if page is not None:
            return self.host.read(page.pfn, gpa & ~PAGE_MASK, size)
        try:
            return self.mm.read(hva, size)
        except MmError as error:
            if not (slot.romd and error.errno == errno.EFAULT):
                self.last_error = f"no page behind the guest's table at {gpa:#x} ({slot!r}): {error}"
                self.host_failed = True
            return None

    def _page_at(self, hva: int, *, write: bool) -> GupPage | None:
        """The host's page, without faulting."""
        return self.mm.pgd.gup(hva >> PAGE_SHIFT, write)

    def _set_bits(self, walk: GuestWalk) -> bool:
        """Sets bits in the guest's entry as it was read; False when it is another by now. Raises MmError."""
        gpa, value = walk.entries[-1]
        slot = self._slot_of(gpa)
        if slot is None or slot.readonly:
            raise MmError(errno.EFAULT, f"guest table at {gpa:#x}: not to be written")
        hva = slot.hva + gpa - (slot.gfn << PAGE_SHIFT)
        while (page := self._page_at(hva, write=True)) is None:
            self.mm.get_user_pages(hva, write=True)
        offset = gpa & ~PAGE_MASK
        if int.from_bytes(self.host.read(page.pfn, offset, 8), "little") != value:
            return False
        value |= walk.set_bits
        self.host.write(page.pfn, offset, value.to_bytes(8, "little"))
        if slot.logged:
            self._mark_dirty(slot, gpa >> PAGE_SHIFT)
        walk.entries[-1] = gpa, value
        return True

    def _table(self, gfn: int) -> bytes | None:
        """A page of tables as it is now; None when the host would have to fault it in."""
        slot = self._slot_of(gfn << PAGE_SHIFT)
        if slot is None:
            return None
        page = self._page_at(slot.hva + (gfn - slot.gfn << PAGE_SHIFT), write=False)
        return None if page is None else self.host.read(page.pfn, 0, PAGE_SIZE)

    def _unchanged(self, walk: GuestWalk) -> bool:
        """Whether all that was read is still there."""
        for gpa, value in walk.entries:
            slot = self._slot_of(gpa)
            page = None if slot is None else self._page_at(slot.hva + gpa - (slot.gfn << PAGE_SHIFT), write=False)
            if page is None or int.from_bytes(self.host.read(page.pfn, gpa & ~PAGE_MASK, 8), "little") != value:
                return False
        return True

    def _watch_tables(self, root: Root, walk: GuestWalk, index: int) -> None:
        """The tables of ``walk`` are shadowed by ``root``: none may be written unseen. Under mmu_lock."""
        level = len(walk.entries)
        for gpa, _ in walk.entries:
            level -= 1
            shift = walk.shift + 9 * level
            pages = shift - LEAF_SHIFT
            base = (index >> pages) - (gpa & ~PAGE_MASK) // 8 << pages
            gfn = gpa >> PAGE_SHIFT
            page = root.pages.get((shift, base))
            if page is not None and page.gfn != gfn:
                self._drop_page(page)
                page = None
            if page is None:
                self._shadow_page(ShadowPage(root, gfn, shift, base, top=level == len(walk.entries) - 1))
            else:
                page.writes = 0

    def _shadow_page(self, page: ShadowPage) -> None:
        gfn = page.gfn
        page.root.pages[page.shift, page.base] = page
        self._shadowed.setdefault(gfn, []).append(page)
        self._nr_shadow_pages += 1
        if gfn in self._unsync:
            if page.shift == LEAF_SHIFT:
                return
            self._sync([gfn])
            if page not in self._shadowed.get(gfn, ()):  # it had nothing yet, and went with the others
                self._shadow_page(page)
            return
        self._watch(gfn)

    def _watch(self, gfn: int) -> None:
        """From now on a store to ``gfn`` faults. The caller flushes."""
        self.watched.add(gfn)
        if self.sptes.clear_bits(gfn, gfn + 1, SPTE_WRITE | SPTE_MMU_WRITABLE, SPTE_PRESENT | SPTE_MMU_WRITABLE):
            self.tlbs_dirty = True
            if self.trace.on:
                self.trace.emit("spte_protect", vm=self.name, start=gfn, end=gfn + 1)

    def _unwatch(self, gfn: int) -> None:
        """It may be written."""
        self.watched.discard(gfn)
        self.sptes.set_bits(gfn, gfn + 1, SPTE_MMU_WRITABLE, SPTE_PRESENT | SPTE_HOST_WRITABLE)

    # ---- the guest writes to a table

    def _try_to_unsync(self, gfn: int) -> bool:
        """Lets the guest write to ``gfn``, where that is last-level tables only. Under mmu_lock."""
        if any(page.shift != LEAF_SHIFT for page in self._shadowed.get(gfn, ())):
            return False
        if gfn in self.watched:
            self._unsync[gfn] = None
            self._unwatch(gfn)
            if self.trace.on:
                self.trace.emit("shadow_unsync", vm=self.name, gfn=gfn)
        return True

    def emulates(self, gpa: int) -> bool:
        """Whether a store to ``gpa`` that was sent to a device is one to memory."""
        slot = self._slot_of(gpa)
        return slot is not None and not slot.readonly

    def emulate_write(self, gpa: int, data: bytes) -> None:
        """The guest's store to a watched table. Raises MmError as :meth:`write_guest`."""
        self.write_guest(gpa, data)

    def write_guest(self, gpa: int, data: bytes) -> None:
        """See KvmDirtyLog; what was made of tables there is made anew."""
        super().write_guest(gpa, data)
        point("kvm.shadow.written")
        at, end = gpa, gpa + len(data)
        while at < end:
            gfn, offset = divmod(at, PAGE_SIZE)
            size = min(end - at, PAGE_SIZE - offset)
            if gfn in self._shadowed:
                with self.mmu_lock.write:
                    self._track_write(gfn, offset, size)
            at += size

    def _track_write(self, gfn: int, offset: int, size: int) -> None:
        """Bytes of a table have changed. Under mmu_lock."""
        for page in list(self._shadowed.get(gfn, ())):
            if page.root.pages.get((page.shift, page.base)) is not page:
                continue  # it went with one above it
            page.writes += 1
            if page.writes > self.flooding:
                self._drop_page(page)
            else:
                self._drop_gvas(page.root, *page.pages_of(offset, size), page.shift)
        if self.tlbs_dirty:
            self._flush_and_kick("shadow")

    # ---- the guest flushes its TLB

    def guest_flush(self) -> None:
        """A vCPU runs its flush instruction, or changes the root of its tables: what it changed before counts."""
        if self._unsync:
            with self.mmu_lock.write:
                self._sync(list(self._unsync))

    def _sync(self, gfns: list[int]) -> None:
        """Have shadow entries agree again with last-level tables that were written. Under mmu_lock."""
        for gfn in gfns:
            self._watch(gfn)
        if self.tlbs_dirty:
            self._flush_and_kick("shadow sync")
        for gfn in gfns:
            self._unsync.pop(gfn, None)
            self._sync_page(gfn)
        if self.tlbs_dirty:
            self._flush_and_kick("shadow sync")

    def _sync_page(self, gfn: int) -> None:
        if self.trace.on:
            self.trace.emit("shadow_sync", vm=self.name, gfn=gfn)
        table = self._table(gfn)
        for page in list(self._shadowed.get(gfn, ())):
            root, left = page.root, False
            for index, _ in root.sptes.entries(*self._reach(page)):
                made_of = root.made_of[index]
                at = made_of.at & ~PAGE_MASK
                same = table is not None and int.from_bytes(table[at : at + 8], "little") == made_of.value
                if same and made_of.at >> PAGE_SHIFT == gfn:
                    left = True
                else:
                    self._drop(root, index)
            if not left:
                self._forget_page(page)

    # ---- removing

    @staticmethod
    def _reach(page: ShadowPage) -> tuple[int, int]:
        return page.pages_of(0, ENTRIES * 8)

    def _drop(self, root: Root, index: int) -> None:
        gfn = root.made_of[index].gfn
        self._gfns.drop(root, index)
        self.tlbs_dirty = True
        if self.trace.on:
            address = root.role[4] << PAGE_SHIFT + INDEX_BITS | index << PAGE_SHIFT
            self.trace.emit("shadow_zap", vm=self.name, root=root.number, gva=address, gfn=gfn)

    def _drop_gvas(self, root: Root, start: int, end: int, shift: int) -> None:
        """Remove what ``root`` has for pages ``[start, end)``, and the tables below level ``shift``."""
        for index, _ in root.sptes.entries(start, end):
            self._drop(root, index)
        for page in list(root.pages.values()):
            if page.shift < shift and start <= max(page.base, 0) < end:
                self._forget_page(page)

    def _drop_page(self, page: ShadowPage) -> None:
        """Remove all that was made of a page of tables; a root goes with its topmost one."""
        if page.top:
            self._drop_root(page.root)
            return
        self._drop_gvas(page.root, *self._reach(page), page.shift)
        self._forget_page(page)

    def _forget_page(self, page: ShadowPage) -> None:
        """Nothing was made of it any more."""
        del page.root.pages[page.shift, page.base]
        self._nr_shadow_pages -= 1
        pages = self._shadowed[page.gfn]
        pages.remove(page)
        if not pages:
            del self._shadowed[page.gfn]
            self._unsync.pop(page.gfn, None)
            self._unwatch(page.gfn)

    # ---- roots

    def _root_of(self, role: Role) -> Root:
        root = self._roots.get(role)
        if root is None:
            self._nr_roots += 1
            root = self._roots[role] = Root(self._nr_roots, role)
            assert self.roots is not None
            self.roots[role] = root.sptes, root.gfns
        return root

    def _drop_root(self, root: Root) -> None:
        """Nobody uses it any more. Under mmu_lock."""
        self._drop_gvas(root, 0, INDEX_LIMIT, 64)
        self._retire_root(root)

    def _retire_root(self, root: Root) -> None:
        root.obsolete = True
        del self._roots[root.role]
        assert self.roots is not None
        del self.roots[root.role]
        if self.trace.on:
            self.trace.emit("shadow_root_gone", vm=self.name, root=root.number)

    def _make_pages_available(self) -> None:
        """Before anything is decided: the oldest roots go, where there is no room for the tables of one walk."""
        while self._nr_shadow_pages > self.max_shadow_pages and self._roots:
            self._drop_root(next(iter(self._roots.values())))
        if self.tlbs_dirty:
            self._flush_and_kick("shadow")

    def _obsolete_roots(self) -> None:
        """No root is looked at again. The caller flushes."""
        for root in list(self._roots.values()):
            self._retire_root(root)

    def _zap_all(self) -> None:
        """See KvmState: roots are not emptied."""
        if self._shadowed or self._roots:
            self.tlbs_dirty = True
        self._obsolete_roots()
        self._gfns.rmap.clear()
        self._shadowed.clear()
        self._unsync.clear()
        self.watched.clear()
        self._nr_shadow_pages = 0
        super()._zap_all()

    def vcpu_reset(self) -> None:
        """The guest starts over, with memory that it did not write itself."""
        with self.mmu_lock.write:
            for root in list(self._roots.values()):
                self._drop_root(root)
            if self.tlbs_dirty:
                self._flush_and_kick("reset")

    # ---- checks

    def inconsistency(self) -> str:
        """See the base: shadow entries say no more than the entries of their guest frames, and are found by those."""
        for root in self._roots.values():
            for index, spte in root.sptes.entries(0, INDEX_LIMIT):
                gfn = root.made_of[index].gfn
                entry = self.sptes.get(gfn)
                what = f"root {root.number} maps page {index:#x} to guest frame {gfn:#x} by {describe_spte(spte)}"
                if (root, index) not in self._gfns.rmap.get(gfn, ()):
                    return f"{what}, which the reverse map does not know"
                if spte & SPTE_PRESENT and (
                    not entry & SPTE_PRESENT or (entry ^ spte) & PFN_MASK or spte & ~entry & _RIGHTS
                ):
                    return f"{what}, but that has {describe_spte(entry)}"
                if spte & SPTE_WRITE and gfn in self.watched:
                    return f"{what}, which is a table that must not be written"
        return ""


class KvmShadow(ShadowPaging, Kvm):
    """KVM with shadow paging, as it is today. Registers with ``mm`` at once, and raises what that raises."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0") -> None:
        Kvm.__init__(self, mm, trace, host, name=name)
        self._begin_shadowing()


class KvmShadow2008(ShadowPaging, Kvm2008):
    """The same for an mm of the 2008 protocol."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0") -> None:
        Kvm2008.__init__(self, mm, trace, host, name=name)
        self._begin_shadowing()


AnyKvmShadow = KvmShadow | KvmShadow2008


def kvm_shadow_of(mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0") -> AnyKvmShadow:
    """The one that speaks the protocol of ``mm``."""
    made = KvmShadow2008 if mm.protocol == MmuNotifiers2008.protocol else KvmShadow
    return made(mm, trace, host, name=name)
