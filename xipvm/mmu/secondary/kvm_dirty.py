"""KVM's dirty log: which pages the guest may have written, in a bitmap of each memslot or in a ring of each vCPU.

A page counts as dirty when an entry becomes writable, also for a read that finds a writable page, as in KVM; and when
KVM itself writes (:meth:`KvmDirtyLog.write_guest`). The order that keeps anything from being lost::

    writing   the entry gets W → the bit is set, or the page pushed → the guest writes
    reading   bits are cleared → their entries lose W → all TLBs are flushed → the bits are handed out

So a page that the log does not name was not written behind the caller's last look, unless the bit comes with the next
one. The flush is unconditional: somebody else may have protected, and not have flushed yet.

**Manual protect** (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): reading copies the bits, and clears and protects nothing;
:meth:`KvmDirtyLog.clear_dirty_log` does that for the pages that the caller names, before it copies them. With
*initially set* a new log names every page, and beginning to log protects nothing: the first clearing does.

**Rings** (KVM_CAP_DIRTY_LOG_RING): see dirty_ring.py. The vCPU that the current actor runs gets the page; a reset
protects what was harvested, then flushes. There is no bitmap then, unless the ring was asked for with one, for what
KVM writes outside of any vCPU.

While a slot is logged its entries are small: a huge one that is protected is taken apart by the next write.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from xipvm import actors
from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import InternalError, MmError
from xipvm.locks.check import sleep_until
from xipvm.locks.lock import RwLock
from xipvm.locks.order import SLOTS_LOCK
from xipvm.mmu.secondary.dirty_ring import DirtyRing, check_ring_size
from xipvm.mmu.secondary.kvm_state import KvmState
from xipvm.mmu.secondary.memslot import Memslot
from xipvm.mmu.secondary.spte import SPTE_PRESENT, SPTE_WRITE

if TYPE_CHECKING:
    from xipvm.mmu.frames import HostMemory
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.base import TlbOwner
    from xipvm.trace.funnel import Trace

MANUAL_PROTECT_ENABLE: Final = 1 << 0
"""KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE."""
INITIALLY_SET: Final = 1 << 1
"""KVM_DIRTY_LOG_INITIALLY_SET."""
_BYTES: Final = re.compile(rb"\xff+|[^\0\xff]")
_WORD: Final = 64
"""Pages that one long of a bitmap is for: where what is cleared has to begin and, but for the slot's end, to end."""


def dirty_runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """Runs (first page, count) of the bits of a dirty log that are set, ascending; runs that adjoin are one."""
    first = count = 0
    for part in _BYTES.finditer(bitmap):
        at = part.start() * 8
        if part[0][0] == 0xFF:
            pieces: Iterable[tuple[int, int]] = ((at, 8 * len(part[0])),)
        else:
            pieces = ((at + bit, 1) for bit in range(8) if part[0][0] >> bit & 1)
        for start, length in pieces:
            if count and start == first + count:
                count += length
                continue
            if count:
                yield first, count
            first, count = start, length
    if count:
        yield first, count


class KvmDirtyLog(KvmState):
    """The dirty log of a VM."""

    def __init__(self, mm: Mm, trace: Trace, host: HostMemory, *, name: str, pin_sptes: bool) -> None:
        super().__init__(mm, trace, host, name=name, pin_sptes=pin_sptes)
        self.slots_lock = RwLock(f"slots_lock of {name}", SLOTS_LOCK)
        self.manual_dirty_log_protect = 0
        """MANUAL_PROTECT_ENABLE and INITIALLY_SET, as they were enabled."""
        self.dirty_ring_size = 0
        """Entries of each vCPU's ring, 0 where there are none."""
        self.dirty_ring_with_bitmap = False
        self.dirty_rings: dict[TlbOwner, DirtyRing] = {}
        self.on_dirty_ring_full: Callable[[TlbOwner], object] | None = None
        """KVM_EXIT_DIRTY_RING_FULL: called instead of entering the guest, until the ring is soft full no longer.
        Without it the vCPU waits for somebody's reset."""
        self._running: dict[actors.Actor, TlbOwner] = {}
        """The vCPU that an actor runs, while there are rings."""

    # ---- what is enabled

    def enable_manual_dirty_log_protect(self, flags: int) -> None:
        """Reading a log clears nothing from now on. ``flags``: MANUAL_PROTECT_ENABLE, INITIALLY_SET, or 0 to end it.

        Raises MmError EINVAL for anything else, and for INITIALLY_SET alone.
        """
        if flags & ~(MANUAL_PROTECT_ENABLE | INITIALLY_SET) or flags == INITIALLY_SET:
            raise MmError(errno.EINVAL, f"manual dirty log protection with flags {flags:#x}")
        self.manual_dirty_log_protect = flags

    def enable_dirty_ring(self, entries: int, *, with_bitmap: bool = False) -> None:
        """What vCPUs write is kept in a ring of ``entries`` for each. Before there are vCPUs, and once.

        Raises MmError: EINVAL or E2BIG as :func:`check_ring_size` and where it is too late; EINVAL for
        ``with_bitmap`` when there are memslots.
        """
        check_ring_size(entries)
        if self.dirty_ring_size or self.vcpus:
            raise MmError(errno.EINVAL, f"{self.name} has {'dirty rings' if self.dirty_ring_size else 'vCPUs'} already")
        if with_bitmap and len(self.memslots):
            raise MmError(errno.EINVAL, f"{self.name} has memslots already: they would have no bitmap")
        self.dirty_ring_size = entries
        self.dirty_ring_with_bitmap = with_bitmap

    @property
    def uses_dirty_bitmap(self) -> bool:
        """Logged memslots have a bitmap."""
        return not self.dirty_ring_size or self.dirty_ring_with_bitmap

    # ---- vCPUs

    def vcpu_enter(self, vcpu: TlbOwner) -> None:
        """The current actor is about to enter the guest with ``vcpu``. Not before the vCPU's ring has room."""
        if not self.dirty_ring_size:
            return
        self._running[actors.current] = vcpu
        ring = self.dirty_ring(vcpu)
        while ring.soft_full:
            if self.on_dirty_ring_full is not None:
                self.on_dirty_ring_full(vcpu)
                if ring.soft_full:
                    raise InternalError(f"{self.name}: a dirty ring is as full behind its exit as before")
            else:
                because = "its dirty ring is full, and nobody resets it"
                sleep_until("entering the guest", lambda: not ring.soft_full, because=because, label="kvm.ring.full")

    def dirty_ring(self, vcpu: TlbOwner) -> DirtyRing:
        """The ring of ``vcpu``. Raises MmError EINVAL without rings."""
        if not self.dirty_ring_size:
            raise MmError(errno.EINVAL, f"{self.name} has no dirty rings")
        ring = self.dirty_rings.get(vcpu)
        if ring is None:
            ring = self.dirty_rings[vcpu] = DirtyRing(self.dirty_ring_size)
        return ring

    # ---- writing it

    def _mark_dirty(self, slot: Memslot, gfn: int) -> None:
        """``gfn``, which lies in ``slot``, may be written from now on. The slot is logged."""
        if self.dirty_ring_size:
            vcpu = self._running.get(actors.current)
            if vcpu is not None:
                ring = self.dirty_ring(vcpu)
                ring.push(slot.id, gfn - slot.gfn)
                if ring.soft_full:
                    vcpu.kick("dirty ring")
                return
            if not self.dirty_ring_with_bitmap:
                raise InternalError(f"{self.name}: guest frame {gfn:#x} is written, but by none of its vCPUs")
        slot.mark_dirty(gfn)

    def mark_page_dirty(self, gfn: int) -> None:
        """``gfn`` was written by KVM itself."""
        slot = self.memslots.find(gfn)
        if slot is not None and slot.logged:
            self._mark_dirty(slot, gfn)

    def write_guest(self, gpa: int, data: bytes) -> None:
        """KVM writes to the guest's memory: by way of the host's addresses, and into the dirty log behind that.

        Raises MmError EFAULT where there is no memory, or none that may be written.
        """
        for slot, gfn, offset, part in self._pieces(gpa, data):
            if slot.readonly:
                raise MmError(errno.EFAULT, f"guest frame {gfn:#x} ({slot!r}) is never written")
            self.mm.write(slot.hva + ((gfn - slot.gfn) << PAGE_SHIFT) + offset, part)
            if slot.logged:
                self._mark_dirty(slot, gfn)

    def _pieces(self, gpa: int, data: bytes) -> Iterator[tuple[Memslot, int, int, bytes]]:
        """Memslot, guest frame, offset and bytes for each page of ``data`` at ``gpa``."""
        at = 0
        while at < len(data):
            gfn, offset = divmod(gpa + at, PAGE_SIZE)
            slot = self.memslots.find(gfn)
            if slot is None or slot.invalid:
                raise MmError(errno.EFAULT, f"no memslot at guest frame {gfn:#x}")
            part = data[at : at + PAGE_SIZE - offset]
            yield slot, gfn, offset, part
            at += len(part)

    # ---- reading it

    def get_dirty_log(self, slot: int) -> bytes:
        """The pages of memslot ``slot`` that may have been written since the last call, which it forgets.

        With manual protection it forgets nothing: see :meth:`clear_dirty_log`. Bit n (of byte n // 8) is the slot's
        n-th page. Raises MmError: ENXIO when only rings know, EINVAL when there is no such slot, ENOENT when it is
        not logged.
        """
        with self.slots_lock.write:
            found, bitmap = self._logged(slot, "get_dirty_log")
            if self.manual_dirty_log_protect:
                dirty = bytes(bitmap)
            else:
                with self.mmu_lock.write:
                    dirty = bytes(bitmap)
                    bitmap[:] = bytes(len(bitmap))
                    self._protect_dirty(found.gfn, dirty)
                point("kvm.dirty_log.unflushed")
                # Also when nothing was protected here: somebody else may have, and not have flushed yet.
                self._flush_tlbs("dirty_log")
            if self.trace.on:
                self.trace.emit("dirty_log", vm=self.name, slot=slot)
            return dirty

    def _protect_dirty(self, gfn: int, dirty: bytes) -> None:
        """Take W from the pages of a log, from ``gfn`` on, whose bits were cleared, and from no others.

        A page may have W and its bit not yet: it keeps both for the next round.
        """
        if self.trace.on:
            for page, count in dirty_runs(dirty):
                self._write_protect(gfn + page, gfn + page + count)
        elif self.sptes.clear_bits_of(gfn, dirty, SPTE_WRITE, SPTE_PRESENT):
            self.tlbs_dirty = True

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """Forget, and write-protect, those of ``num_pages`` pages from ``first_page`` on that ``bitmap`` names.

        Its bit 0 is ``first_page``. What the guest writes from now on, the log names again. Raises MmError: ENXIO,
        EINVAL and ENOENT as :meth:`get_dirty_log`; EINVAL for pages that are not in the slot, a first page that is no
        multiple of 64, and a number that is none unless it reaches the slot's end.
        """
        with self.slots_lock.write:
            found, log = self._logged(slot, "clear_dirty_log")
            left = found.pages - first_page
            if (
                first_page % _WORD
                or not 0 <= first_page <= found.pages
                or not 0 <= num_pages <= left
                or (num_pages < left and num_pages % _WORD)
            ):
                what = f"{num_pages} pages from {first_page} on, of {found.pages}"
                raise MmError(errno.EINVAL, f"clear_dirty_log: {what}: not whole words of the log")
            wanted = int.from_bytes(bitmap, "little") & (1 << num_pages) - 1
            at, size = first_page // 8, num_pages + 7 >> 3
            with self.mmu_lock.write:
                there = int.from_bytes(log[at : at + size], "little")
                cleared = there & wanted
                log[at : at + size] = (there & ~wanted).to_bytes(size, "little")
                self._protect_dirty(found.gfn + first_page, cleared.to_bytes(size, "little"))
            point("kvm.dirty_log.unflushed")
            if cleared:
                self._flush_tlbs("dirty_log")

    def _logged(self, slot: int, what: str) -> tuple[Memslot, bytearray]:
        """Memslot ``slot`` and its bitmap."""
        if not self.uses_dirty_bitmap:
            raise MmError(errno.ENXIO, f"{what}: {self.name} has dirty rings and nothing else")
        found = self.memslots.get(slot)
        if found is None:
            raise MmError(errno.EINVAL, f"{what}: there is no memslot {slot}")
        if found.dirty_bitmap is None:
            raise MmError(errno.ENOENT, f"{what}: memslot {slot} is not logged")
        return found, found.dirty_bitmap

    def reset_dirty_rings(self) -> int:
        """Write-protect what was harvested from the rings, whose places are free again; how many there were.

        Raises MmError EINVAL without rings.
        """
        if not self.dirty_ring_size:
            raise MmError(errno.EINVAL, f"{self.name} has no dirty rings")
        with self.slots_lock.write:
            pages = [page for ring in self.dirty_rings.values() for page in ring.take_harvested()]
            if not pages:
                return 0
            point("kvm.ring.taken")
            with self.mmu_lock.write:
                for id, page in pages:
                    slot = self.memslots.get(id)
                    if slot is not None and page < slot.pages:  # it may be gone, or another one by now
                        self._write_protect(slot.gfn + page, slot.gfn + page + 1)
            point("kvm.dirty_log.unflushed")
            self._flush_tlbs("dirty_ring")
            return len(pages)

    def _write_protect(self, start: int, end: int) -> None:
        """Take W from the entries of guest frames ``[start, end)``; a write faults. The caller flushes."""
        if self.sptes.clear_bits(start, end, SPTE_WRITE, SPTE_PRESENT):
            self.tlbs_dirty = True
            if self.trace.on:
                self.trace.emit("spte_protect", vm=self.name, start=start, end=end)
