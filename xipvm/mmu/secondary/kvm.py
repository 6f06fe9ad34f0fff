"""KVM's secondary MMU: shadow entries by guest frame, installed by faults, removed by the notifier.

:class:`KvmBase` is what every age of KVM has: memslots, faults, entries, the dirty log. :class:`Kvm` is how it hears of
the mm's changes today; kvm_2008.py is how it did in the beginning.

``mmu_lock`` protects the entries and the invalidation state; a fault takes it for reading, everybody else for writing.
It spins: nothing under it sleeps. ``slots_lock`` keeps those apart who change memslots or read dirty logs. The state:

* ``mmu_invalidate_seq``: how many invalidations have ended;
* ``mmu_invalidate_in_progress``: how many are open, and ``mmu_invalidate_range_start``/``_end``: the hull of their
  guest frames. It grows, and is only forgotten when the count comes back to 0;
* ``mn_active_invalidate_count``: open ranges of the mm, also those that hit no memslot. Memslots do not change while
  there are any, so that a start and its end hit the same slots.

Fault: read seq → memslot → get_user_pages (may sleep, and may itself announce invalidations) → lock → give up when an
open invalidation covers the gfn or seq has changed → install → unlock. Giving up means that the guest faults again.

Start: count → lock → for each slot that is hit: extend the hull, remove the entries → *if any was removed, flush all
TLBs and kick all vCPUs* → unlock.

End: lock → seq + 1, then in_progress - 1 → unlock. Seq first: whoever sees the count at 0 sees the new seq.

Dirty log of a memslot: a bit is set, under mmu_lock, whenever a writable entry is installed, also for a read, as KVM
does. Reading the log: bits cleared → their entries lose W → *all TLBs flushed* → the bits are handed out; a page that
it does not name was not written behind the caller's last look.

The entries hold no reference to their frames. What keeps a frame from being reused under an entry is this protocol.

``pin_sptes`` is what KVM did before there were notifiers: the reference that get_user_pages took is kept for as long as
the entry exists, and nobody is told of anything. So a page that the guest has used cannot be swapped or moved; one that
the host unmaps or copies stays what the guest sees. Entries go, and their references behind the flush, only when the
VM says so itself: a memslot goes, :meth:`KvmBase.zap_gfn_range`, the end of the VM. As KVM did then, every fault asks
for a page that may be written, so that no guest keeps a page that the host's next write would replace.

The file is long because faults, invalidations, memslots and the dirty log change the same entries under the same lock:
the protocol above can be checked only where all of them are seen.
"""

from __future__ import annotations

import errno
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, Gfn, Hva, Pfn
from xipvm.errors import InternalError, MmError
from xipvm.locks import check
from xipvm.locks.check import sleep_until
from xipvm.locks.lock import RwLock
from xipvm.locks.order import MMU_LOCK, SLOTS_ARCH_LOCK, SLOTS_LOCK
from xipvm.mmu.frames import HUGE_PAGES, PG_DEVICE, PG_DIRTY, PG_RESERVED, HostMemory
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.secondary.base import ACCESS_NAMES, FAULT, FETCH, MMIO, RETRY_WALK, WRITE
from xipvm.mmu.secondary.guest import GuestMmu
from xipvm.mmu.secondary.memslot import GFN_LIMIT, Memslot
from xipvm.mmu.secondary.spte import (
    PFN_MASK,
    PFN_SHIFT,
    SPTE_ACCESSED,
    SPTE_AGED,
    SPTE_HUGE,
    SPTE_PRESENT,
    SPTE_READ,
    SPTE_READ_ONLY,
    SPTE_WRITABLE,
    SPTE_WRITE,
    describe_spte,
    make_mmio_spte,
    spte_pfn,
    spte_rights,
)
from xipvm.notifier import MmuNotifier, MmuNotifierRange, NotifiedMm

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.tables import GupPage
    from xipvm.trace.funnel import Trace


@dataclass(frozen=True, slots=True)
class GfnInfo:
    """What the secondary MMU knows of one guest frame."""

    gfn: Gfn
    spte: int
    """The raw entry, 0 when there is none."""
    slot: int | None
    flags: int
    hva: Hva | None
    """Where the memslot puts it in the host's address space."""
    invalidating: bool
    """An open invalidation covers it."""

    def __str__(self) -> str:
        where = "no memslot" if self.slot is None else f"memslot {self.slot}, hva {self.hva:#x}"
        open = ", being invalidated" if self.invalidating else ""
        return f"gfn {self.gfn:#x}: spte {describe_spte(self.spte)}; {where}{open}"


class KvmBase(GuestMmu):
    """The secondary MMU of one VM, whatever tells it of changes. ``pin_sptes``: nothing does."""

    asks_for_write: ClassVar[bool] = False
    """Faults for reading ask for a writable page, too, where the slot and the host allow one."""
    holds_lookups: ClassVar[bool] = False
    """A fault holds the page that it looked up until it has installed it or given up."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str, pin_sptes: bool) -> None:
        GuestMmu.__init__(self, mm, trace, name)
        self.host = host
        self.pin_sptes = pin_sptes
        self._unpinned: list[tuple[int, int]] = []
        """Runs of frames whose entries are gone; the references go behind the next flush."""
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self.mmu_invalidate_range_start = 0
        self.mmu_invalidate_range_end = 0
        self.mn_active_invalidate_count = 0
        self.tlbs_dirty = False
        """Entries were removed that a TLB may still have: flush before mmu_lock is dropped."""
        self.max_level = 1
        """2: where the host maps 2 MiB by one entry, so does the guest."""
        self.released = False
        """The mm is gone or the VM destroyed: every fault fails."""
        self.mmu_lock = RwLock(f"mmu_lock of {name}", MMU_LOCK)
        self.slots_lock = RwLock(f"slots_lock of {name}", SLOTS_LOCK)
        self.slots_arch_lock = RwLock(f"slots_arch_lock of {name}", SLOTS_ARCH_LOCK)

    # ---- faults

    def fault(self, gfn: int, access: int) -> int:
        """Install an entry for ``gfn`` that allows ``access``. See :meth:`SecondaryMmu.fault`."""
        trace = self.trace
        if not trace.on:
            return self._fault(gfn, access)
        with trace.because(trace.emit("kvm_page_fault", vm=self.name, gfn=gfn, access=ACCESS_NAMES[access])):
            return self._fault(gfn, access)

    def _fault(self, gfn: int, access: int) -> int:
        seq = self.mmu_invalidate_seq
        point("kvm.fault.seq_read")
        slot = self.memslots.find(gfn)
        if slot is None:
            return self._fault_without_slot(gfn, access)
        if slot.invalid:
            return self._give_up(gfn, "memslot")
        write = access == WRITE
        if write and slot.readonly:
            return MMIO
        if self.released:
            self.last_error = f"{self.name} has lost its address space"
            self.host_failed = True
            return FAULT
        if self.mmu_invalidate_in_progress:  # only saves the lookup; what counts is the check below
            reason = self.mmu_invalidate_retry(seq, gfn)
            if reason:
                return self._give_up(gfn, reason)
        hva = slot.hva + ((gfn - slot.gfn) << PAGE_SHIFT)
        try:
            if self.pin_sptes or self.holds_lookups:
                return self._fault_holding(slot, gfn, hva, seq, write)
            page = self.mm.get_user_pages(hva, write=write)
        except MmError as error:
            return self._lookup_failed(slot, gfn, access, error)
        point("kvm.fault.gup_done")
        if self.mmu_lock.writer or check.checker is not None:
            self._install(slot, gfn, page, seq)
        else:  # nobody can come between, and most faults come this way
            self._install_locked(slot, gfn, page, seq)
        return RETRY_WALK

    def _fault_holding(self, slot: Memslot, gfn: int, hva: int, seq: int, write: bool) -> int:
        """The rest of a fault whose lookup takes a reference. Raises MmError when there is no page."""
        page = self._look_up(slot, hva, write)
        self.host.get(page.pfn)
        try:
            point("kvm.fault.gup_done")
            self._install(slot, gfn, page, seq)
        finally:
            self.mm.put_frame(page.pfn)
        return RETRY_WALK

    def _look_up(self, slot: Memslot, hva: int, write: bool) -> GupPage:
        if (self.pin_sptes or self.asks_for_write) and not write and not slot.readonly:
            with suppress(MmError):  # EFAULT, where the host may only read
                return self.mm.get_user_pages(hva, write=True)
        return self.mm.get_user_pages(hva, write=write)

    def _install(self, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        """Puts an entry of ``page``, looked up since ``seq``, unless that must not be."""
        with self.mmu_lock.read:
            self._install_locked(slot, gfn, page, seq)

    def _install_locked(self, slot: Memslot, gfn: int, page: GupPage, seq: int) -> None:
        reason = self.mmu_invalidate_retry(seq, gfn)
        if reason:
            self._give_up(gfn, reason)
            return
        pfn = page.pfn
        writable = page.writable and not slot.readonly
        spte = pfn << PFN_SHIFT | (SPTE_WRITABLE if writable else SPTE_READ_ONLY)
        huge = self.max_level > 1 and self._maps_huge(slot, gfn, pfn)
        if huge:
            pfn, gfn = Pfn(pfn - (gfn & HUGE_PAGES - 1)), gfn & -HUGE_PAGES
            spte = pfn << PFN_SHIFT | spte & ~PFN_MASK | SPTE_HUGE
        if self.max_level > 1:
            self._make_way(gfn, huge)
        new = True
        if not self.sptes.cmpxchg(gfn, 0, spte):
            old = self.sptes.get(gfn)
            if old == spte:  # another vCPU was faster
                return
            new = self._replace(gfn, old, spte)
        if new and self.pin_sptes:
            self.host.get(pfn)
        if writable:
            # The guest writes without telling anybody: to the mm the frame is dirty from now on.
            self.host.set_flags(pfn, PG_DIRTY)
            if slot.dirty_bitmap is not None:
                slot.mark_dirty(gfn)
        trace = self.trace
        if trace.on and huge:
            rights = spte_rights(spte)
            trace.emit("spte_set_huge", vm=self.name, gfn=gfn, pages=HUGE_PAGES, pfn=pfn, rights=rights)
        elif trace.on:
            trace.emit("spte_set", vm=self.name, gfn=gfn, pfn=pfn, rights=spte_rights(spte))

    def _maps_huge(self, slot: Memslot, gfn: int, pfn: int) -> bool:
        """Whether one entry may map the 2 MiB around ``gfn``: the host does, and all of it lies in the slot.

        Where a dirty log is kept, or an invalidation covers a part, entries stay small. Under mmu_lock, behind the
        check: who splits or takes away the host's huge entry announces all of the 2 MiB.
        """
        first = gfn & -HUGE_PAGES
        page = (slot.hva >> PAGE_SHIFT) + gfn - slot.gfn
        if (page ^ gfn) & (HUGE_PAGES - 1) or first < slot.gfn or first + HUGE_PAGES > slot.gfn_end:
            return False
        entry = self.mm.pgd.huge(page)
        if not entry or pte_pfn(entry) + (gfn - first) != pfn or slot.dirty_bitmap is not None:
            return False
        return not (
            self.mmu_invalidate_in_progress
            and self.mmu_invalidate_range_start < first + HUGE_PAGES
            and first < self.mmu_invalidate_range_end
        )

    def _make_way(self, gfn: int, huge: bool) -> None:
        """Removes what is of the other size where an entry for ``gfn`` is to be put."""
        if not self.sptes.pmd_none(gfn) and bool(self.sptes.huge(gfn)) != huge:
            if huge:
                self._zap(gfn, gfn + HUGE_PAGES)
            elif self.sptes.huge(gfn):
                self._zap(gfn, gfn + 1)
            if self.tlbs_dirty:
                self._flush_and_kick("level")

    def mmu_invalidate_retry(self, seq: int, gfn: int) -> str:
        """Why a fault that read ``seq`` must not install an entry for ``gfn``; empty when it may. Under mmu_lock."""
        if self.mmu_invalidate_in_progress and self._covered(gfn):
            return "in progress"
        return "seq" if self.mmu_invalidate_seq != seq else ""

    def _covered(self, gfn: int) -> bool:
        """Whether an open invalidation covers ``gfn``."""
        return (
            self.mmu_invalidate_in_progress > 0
            and self.mmu_invalidate_range_start <= gfn < self.mmu_invalidate_range_end
        )

    def _give_up(self, gfn: int, reason: str) -> int:
        if self.trace.on:
            self.trace.emit("kvm_retry", vm=self.name, gfn=gfn, reason=reason)
        return RETRY_WALK

    def _replace(self, gfn: int, old: int, spte: int) -> bool:
        """Put ``spte`` where ``old`` is, another entry; False when that was present and only gets other rights."""
        stale = bool(old & SPTE_PRESENT) and bool((old ^ spte) & PFN_MASK or old & ~spte & SPTE_WRITE)
        if stale:
            # The notifier should have removed it. A TLB may hold it, so it is never changed in place.
            self._zap(gfn, gfn + 1)
            self._flush_and_kick("stale spte")
        self.sptes.set(gfn, spte)
        return stale or not old & SPTE_PRESENT

    def _fault_without_slot(self, gfn: int, access: int) -> int:
        if access != FETCH and self.mmio_lookup(gfn << PAGE_SHIFT):
            if gfn < GFN_LIMIT:
                with self.mmu_lock.read:
                    self.sptes.set(gfn, make_mmio_spte(Gfn(gfn)))
            return MMIO
        self.last_error = f"no memory at guest physical page {gfn << PAGE_SHIFT:#x}"
        self.host_failed = False
        return FAULT

    def _lookup_failed(self, slot: Memslot, gfn: int, access: int, error: MmError) -> int:
        if slot.romd and access != FETCH and error.errno == errno.EFAULT:
            return MMIO  # the ROM does not show its array: the device answers
        self.last_error = f"no page behind guest frame {gfn:#x} ({slot!r}): {error}"
        self.host_failed = not slot.romd
        return FAULT

    # ---- invalidation

    def _age(self, start: int, end: int, reason: str) -> bool:
        """Whether the guest used bytes ``[start, end)`` of the host since it was last asked; its next use misses.

        As KVM does it without accessed bits that hardware sets: the entries lose all rights. Writes need no harvest:
        the frame was marked dirty when the entry became writable.
        """
        young = False
        with self.mmu_lock.write:
            for first, last in self.memslots.in_hva_range(start, end):
                if self.sptes.clear_bits(first, last, SPTE_AGED, SPTE_PRESENT):
                    young = True
                    if self.trace.on:
                        self.trace.emit("spte_age", vm=self.name, start=first, end=last)
            if young:
                self._flush_and_kick(reason)
        return young

    def _invalidate_end(self) -> None:
        self.mmu_invalidate_seq += 1
        self.mmu_invalidate_in_progress -= 1
        if self.mmu_invalidate_in_progress < 0:
            raise InternalError(f"{self.name}: more invalidations ended than began")

    def _zap(self, start: int, end: int) -> None:
        """Remove the entries of guest frames ``[start, end)``. The caller flushes if that made ``tlbs_dirty``."""
        sptes = self.sptes
        before = sptes.present
        trace = self.trace
        runs = sptes.zap(start, end, trace.on or self.pin_sptes)
        if sptes.present != before:
            self.tlbs_dirty = True
            if self.pin_sptes:
                self._unpinned += runs
            if runs and trace.on:  # MMIO entries have no frames
                trace.emit("spte_zap", vm=self.name, start=start, end=end, pages=runs)

    def _flush_and_kick(self, reason: str) -> None:
        self.flush_remote_tlbs(reason)
        self.kick(reason)
        self.tlbs_dirty = False
        if self._unpinned:
            self._unpin()

    def _unpin(self) -> None:
        """Drop the references of entries that are gone, which no TLB has any more."""
        runs, self._unpinned = self._unpinned, []
        for first, count in runs:
            for pfn in range(first, first + count):
                self.mm.put_frame(pfn)

    def zap_gfn_range(self, start: int, end: int, reason: str) -> None:
        """Remove the entries of guest frames ``[start, end)``, MMIO ones included; the guest faults them in again.

        With ``pin_sptes`` this is what lets go of their pages.
        """
        with self.mmu_lock.write:
            self.mmu_invalidate_seq += 1  # faults that are under way start over
            self._zap(start, end)
            if self.tlbs_dirty:
                self._flush_and_kick(reason)

    def pins(self) -> dict[int, int]:
        """The references that entries hold, by frame; none without ``pin_sptes``."""
        held: Counter[int] = Counter()
        if self.pin_sptes:
            for _, spte in self.sptes.entries(0, GFN_LIMIT):
                if spte & SPTE_PRESENT and not self.host.flags(spte_pfn(spte)) & (PG_RESERVED | PG_DEVICE):
                    held[spte_pfn(spte)] += 1
        return dict(held)

    def _zap_all(self) -> None:
        """Remove every entry, MMIO ones included, and make faults that are under way start over. Under mmu_lock."""
        self.mmu_invalidate_seq += 1
        self._zap(0, GFN_LIMIT)

    def _release(self) -> None:
        """Drop every entry and let no fault succeed any more."""
        with self.mmu_lock.write:
            self.released = True
            self._zap_all()
            if self.tlbs_dirty:
                self._flush_and_kick("release")

    # ---- memslots

    def set_memslot(self, slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
        """Create memslot ``slot``, move it to another guest frame, or turn its dirty logging on or off.

        Logging begins with every entry write-protected and a clean log. Raises MmError, and nothing is changed: EINVAL
        and EEXIST as :meth:`Memslots.check` says, EDEADLK when an invalidation is in progress that cannot end
        meanwhile.
        """
        with self.slots_lock.write:
            self._set_memslot(slot, gfn, pages, hva, flags)

    def _set_memslot(self, slot: int, gfn: int, pages: int, hva: int, flags: int) -> None:
        self._wait_for_invalidations("set_memslot")
        new = Memslot(slot, Gfn(gfn), pages, Hva(hva), flags)
        old = self.memslots.check(new)
        if old is not None:
            if (old.gfn, old.flags) == (gfn, flags):
                return
            if old.gfn != gfn:
                self._retire(old)
        new.start_log(old)
        self.memslots.insert(new)
        with self.mmu_lock.write:
            if old is None or old.gfn != gfn:
                self._zap(gfn, new.gfn_end)  # MMIO entries: there is memory now
                if self.tlbs_dirty:
                    self._flush_and_kick("memslot")
            elif new.dirty_bitmap is not None:
                self._write_protect(gfn, new.gfn_end)
                self._flush_tlbs("dirty_log")
        if self.trace.on:
            self.trace.emit("memslot_set", vm=self.name, slot=slot, gfn=gfn, pages=pages, hva=hva, flags=flags)

    def delete_memslot(self, slot: int) -> None:
        """Take memslot ``slot`` away; its guest frames have no memory any more.

        Raises MmError, and nothing is changed: EINVAL when there is none, EDEADLK as :meth:`set_memslot`.
        """
        with self.slots_lock.write:
            self._wait_for_invalidations("delete_memslot")
            old = self.memslots.get(slot)
            if old is None:
                raise MmError(errno.EINVAL, f"memslot {slot}: there is none to delete")
            self._retire(old)
            self.memslots.remove(slot)
            if self.trace.on:
                self.trace.emit("memslot_delete", vm=self.name, slot=slot)

    def get_dirty_log(self, slot: int) -> bytes:
        """The pages of memslot ``slot`` that may have been written since the last call, which it forgets.

        Bit n (of byte n // 8) is the slot's n-th page. Raises MmError: EINVAL when there is no such slot, ENOENT when
        it is not logged.
        """
        with self.slots_lock.write:
            found = self.memslots.get(slot)
            if found is None:
                raise MmError(errno.EINVAL, f"get_dirty_log: there is no memslot {slot}")
            bitmap = found.dirty_bitmap
            if bitmap is None:
                raise MmError(errno.ENOENT, f"get_dirty_log: memslot {slot} is not logged")
            with self.mmu_lock.write:
                dirty = bytes(bitmap)
                bitmap[:] = bytes(len(bitmap))
                for page in range(found.pages):
                    if dirty[page >> 3] >> (page & 7) & 1:
                        self._write_protect(found.gfn + page, found.gfn + page + 1)
            point("kvm.dirty_log.unflushed")
            # Also when nothing was protected here: somebody else may have, and not have flushed yet.
            self._flush_tlbs("dirty_log")
            if self.trace.on:
                self.trace.emit("dirty_log", vm=self.name, slot=slot)
            return dirty

    def _write_protect(self, start: int, end: int) -> None:
        """Take W from the entries of guest frames ``[start, end)``; a write faults. The caller flushes."""
        if self.sptes.clear_bits(start, end, SPTE_WRITE, SPTE_PRESENT):
            self.tlbs_dirty = True
            if self.trace.on:
                self.trace.emit("spte_protect", vm=self.name, start=start, end=end)

    def _flush_tlbs(self, reason: str) -> None:
        """Make every vCPU look up its rights again. No kick: only code that is chained does without the TLB."""
        self.flush_remote_tlbs(reason)
        self.tlbs_dirty = False

    def _retire(self, slot: Memslot) -> None:
        """Let nobody use ``slot`` any more. As in KVM, the entries of all slots go."""
        with self.slots_arch_lock.write:
            slot.invalid = True
            try:
                point("kvm.memslot.invalid")
                self._wait_for_invalidations("memslot update")
            except BaseException:
                slot.invalid = False
                raise
        with self.mmu_lock.write:
            self._zap_all()
            self._flush_and_kick("memslot")  # also what TLBs know of the slot's MMIO accesses

    def _wait_for_invalidations(self, what: str) -> None:
        because = f"an invalidation of {self.mm.name} is in progress"
        sleep_until(what, self._no_invalidation, because=because, label="kvm.memslot.wait")

    def _no_invalidation(self) -> bool:
        return not self.mn_active_invalidate_count

    # ---- questions

    def translate(self, gfn: int) -> tuple[Pfn, bool] | None:
        """Frame and writability of the entry of ``gfn``, None without one that a guest can use."""
        spte = self.sptes.get(gfn)
        if not spte & SPTE_PRESENT or not spte & SPTE_READ:
            return None
        pfn = spte_pfn(spte) + (gfn & HUGE_PAGES - 1 if spte & SPTE_HUGE else 0)
        return Pfn(pfn), bool(spte & SPTE_WRITE)

    def describe(self, gfn: int) -> GfnInfo:
        """What is known of ``gfn``, for a report."""
        slot = self.memslots.find(gfn)
        return GfnInfo(
            gfn=Gfn(gfn),
            spte=self.sptes.get(gfn) if gfn < GFN_LIMIT else 0,
            slot=None if slot is None else slot.id,
            flags=0 if slot is None else slot.flags,
            hva=None if slot is None else slot.hva_of(Gfn(gfn)),
            invalidating=self._covered(gfn),
        )


class Kvm(KvmBase, MmuNotifier):
    """KVM as it is today. Registers with ``mm`` at once, and raises what that raises; not with ``pin_sptes``."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str = "vm0", pin_sptes: bool = False) -> None:
        super().__init__(mm, trace, host, name=name, pin_sptes=pin_sptes)
        if not pin_sptes:
            self.max_level = 2
            mm.notifiers.register(self)

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        """Remove the entries of the range and keep faults from installing new ones. Never declines."""
        self.mn_active_invalidate_count += 1
        self.invalidations += 1
        begun = False
        try:
            point("kvm.invalidate.counted")
            hit = self.memslots.in_hva_range(range.start, range.end)
            if hit:  # otherwise faults cannot reach these addresses
                with self.mmu_lock.write:
                    self._invalidate_begin()
                    begun = True
                    for start, end in hit:
                        self._invalidate_range_add(start, end)
                        self._zap(start, end)
                    if self.tlbs_dirty:
                        self._flush_and_kick("mmu_notifier")
        except BaseException:  # an aborted run, a sink that failed: no end comes, and the next range flushes
            if begun:
                self._invalidate_end()
            self.mn_active_invalidate_count -= 1
            raise
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """Faults may install entries of the range again."""
        if self.memslots.in_hva_range(range.start, range.end):
            with self.mmu_lock.write:
                self._invalidate_end()
        self.mn_active_invalidate_count -= 1
        if self.mn_active_invalidate_count < 0:
            raise InternalError(f"{self.name}: {range!r} ended, but did not begin")

    def _invalidate_begin(self) -> None:
        self.mmu_invalidate_in_progress += 1
        if self.mmu_invalidate_in_progress == 1:
            self.mmu_invalidate_range_start = GFN_LIMIT
            self.mmu_invalidate_range_end = 0

    def _invalidate_range_add(self, start: int, end: int) -> None:
        if start < self.mmu_invalidate_range_start:
            self.mmu_invalidate_range_start = start
        if end > self.mmu_invalidate_range_end:
            self.mmu_invalidate_range_end = end

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether the guest used bytes ``[start, end)`` of the host; its next use of them misses."""
        return self._age(start, end, "clear_flush_young")

    def clear_young(self, start: int, end: int) -> bool:
        """As :meth:`clear_flush_young`. It could do without a flush, and KVM does.

        Here a vCPU that executes a page by what its TLB still has needs the entry, to count the instructions there.
        """
        return self._age(start, end, "clear_young")

    def test_young(self, address: int) -> bool:
        """Whether the guest used the host's page at ``address``."""
        young = SPTE_PRESENT | SPTE_ACCESSED
        return any(
            self.sptes.get(first) & young == young for first, _ in self.memslots.in_hva_range(address, address + 1)
        )

    def release(self, mm: NotifiedMm) -> None:
        """Drop every entry and let no fault succeed any more. May run twice."""
        self._release()

    def destroy(self) -> None:
        """Unregister from the mm, which drops every entry. A second call does nothing."""
        if self.subscribed_to is not None:
            self.mm.notifiers.unregister(self)
        elif self.pin_sptes:
            self._release()
        # Unregistering can cut a start from its end.
        self.mmu_invalidate_in_progress = 0
        self.mn_active_invalidate_count = 0
