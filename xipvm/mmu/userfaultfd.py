"""userfaultfd: somebody else resolves the page faults of an area, or is told of writes to it.

Areas are registered with modes: MISSING (nothing is there), MINOR (a page is in the file's cache, but not mapped), WP
(a write to an entry that the monitor has protected). What a fault is told as, and how it waits, is in
uffd_message.py; here is the object that the monitor has, with the calls of Linux's ioctls under their names:

=========================================  ==================================================================
:meth:`~Userfaultfd.copy` and its kin      fill empty entries, so nobody is told (uffd_fill.py)
:meth:`~Userfaultfd.writeprotect`          one PROTECTION_VMA range for each area, either way (uffd_wp.py)
:meth:`~Userfaultfd.unregister`            the same, for the whole of what was registered for WP
:meth:`~Userfaultfd.move`                  a CLEAR range over the source for each run of pages (uffd_move.py)
=========================================  ==================================================================

Registering tells nobody. An area belongs to one userfaultfd at a time; splitting, merging and moving take that along
where Linux does. A child of fork has it only with EVENT_FORK, a moved mapping only with EVENT_REMAP.

Pages of hugetlbfs are filled and protected as a whole (hugetlb_uffd.py). Where Linux does a part of the work before it
finds an area that does not fit, nothing is done here.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import MmError
from xipvm.mmu import hugetlb_uffd, uffd_fill, uffd_move, uffd_wp
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.mapping import merge, split
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.uffd_message import (
    UFFD_EVENT_PAGEFAULT,
    UFFD_FEATURE_EXACT_ADDRESS,
    UFFD_FEATURE_SIGBUS,
    UffdMsg,
    Waiter,
)
from xipvm.mmu.uffd_reach import (
    UFFD_FEATURE_EVENT_FORK,
    UFFD_FEATURE_EVENT_REMAP,
    UFFD_FEATURE_EVENT_REMOVE,
    UFFD_FEATURE_EVENT_UNMAP,
)
from xipvm.mmu.uffd_wp import UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_UNPOPULATED
from xipvm.mmu.vma import TASK_SIZE, VM_HUGETLB, VM_UFFD, VM_UFFD_MINOR, VM_UFFD_MISSING, VM_UFFD_WP, Vma

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_THREAD_ID: Final = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS: Final = 1 << 9
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_POISON: Final = 1 << 14
UFFD_FEATURE_MOVE: Final = 1 << 16

UFFD_API_FEATURES: Final = (
    UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_EVENT_FORK
    | UFFD_FEATURE_EVENT_REMAP
    | UFFD_FEATURE_EVENT_REMOVE
    | UFFD_FEATURE_MISSING_HUGETLBFS
    | UFFD_FEATURE_MISSING_SHMEM
    | UFFD_FEATURE_EVENT_UNMAP
    | UFFD_FEATURE_SIGBUS
    | UFFD_FEATURE_THREAD_ID
    | UFFD_FEATURE_MINOR_HUGETLBFS
    | UFFD_FEATURE_MINOR_SHMEM
    | UFFD_FEATURE_EXACT_ADDRESS
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_POISON
    | UFFD_FEATURE_WP_ASYNC
    | UFFD_FEATURE_MOVE
)
"""What there is."""

UFFDIO_REGISTER_MODE_MISSING: Final = 1
UFFDIO_REGISTER_MODE_WP: Final = 2
UFFDIO_REGISTER_MODE_MINOR: Final = 4
UFFDIO_COPY_MODE_DONTWAKE: Final = 1
UFFDIO_COPY_MODE_WP: Final = 2
UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1
UFFDIO_CONTINUE_MODE_DONTWAKE: Final = 1
UFFDIO_CONTINUE_MODE_WP: Final = 2
UFFDIO_POISON_MODE_DONTWAKE: Final = 1
UFFDIO_WRITEPROTECT_MODE_WP: Final = 1
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 2
UFFDIO_MOVE_MODE_DONTWAKE: Final = 1
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: Final = 2

_MODES: Final = {
    UFFDIO_REGISTER_MODE_MISSING: VM_UFFD_MISSING,
    UFFDIO_REGISTER_MODE_WP: VM_UFFD_WP,
    UFFDIO_REGISTER_MODE_MINOR: VM_UFFD_MINOR,
}
_MODE_NAMES: Final = {VM_UFFD_MISSING: "missing", VM_UFFD_WP: "wp", VM_UFFD_MINOR: "minor"}

Handler = Callable[["Userfaultfd", UffdMsg], None]
"""A monitor: is called with every message, where it comes up. It may use any call of the userfaultfd and the mm."""


class Userfaultfd:
    """A userfaultfd of ``mm``; :meth:`Mm.userfaultfd` makes one.

    Every call raises MmError EBADF after :meth:`close` and ESRCH when the mm has exited, EINVAL for a mode that there
    is not, and for a range that is empty, not aligned to pages or not inside the address space; and has then changed
    nothing. Calls that change entries raise EAGAIN while the layout changes, that is until the event that tells of it
    has been read. Those that fill or move return the bytes that they did, which are fewer than asked for when a later
    page could not be done: doing the rest tells why. Unless DONTWAKE is in the mode they wake who waits for what they
    did.
    """

    __slots__ = ("changing", "closed", "features", "handler", "idle_wakes", "mm", "queue", "waiters")

    def __init__(self, mm: Mm, handler: Handler | None, features: int) -> None:
        mm.check_alive("userfaultfd")
        if features & ~UFFD_API_FEATURES:
            raise MmError(errno.EINVAL, f"userfaultfd: features {features & ~UFFD_API_FEATURES:#x}")
        if features & UFFD_FEATURE_WP_ASYNC:
            features |= UFFD_FEATURE_WP_UNPOPULATED
        self.mm = mm
        self.handler = handler
        """Who is called with messages. None: they queue, for :meth:`read`."""
        self.features = features
        self.closed = False
        self.queue: deque[UffdMsg] = deque()
        self.waiters: list[Waiter] = []
        self.changing = 0
        """Events that have not been read yet."""
        self.idle_wakes = (0, 0)
        """The last address whose wake changed nothing, and how many wakes in a row did not."""
        mm.uffd_used = True

    # ---- registration

    def register(self, addr: int, length: int, mode: int) -> None:
        """Faults of the areas in the range are told from now on; ``mode`` is UFFDIO_REGISTER_MODE_*.

        Holes are left out. Areas that were registered here get this mode in place of theirs, unless theirs includes it.
        Errors: EINVAL (nothing is mapped, or an area of a kind that does not fit the mode), EBUSY (an area of another
        userfaultfd), EPERM (shared memory that must not be written).
        """
        self._check()
        flags = 0
        for bit, flag in _MODES.items():
            flags |= flag if mode & bit else 0
        if not flags or mode & ~(UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MINOR):
            raise MmError(errno.EINVAL, f"UFFDIO_REGISTER: mode {mode:#x}")
        start, end = self.check_range("UFFDIO_REGISTER", addr, length)
        mm = self.mm
        with mm.mmap_lock.write:
            self._check()
            areas = mm.areas_in(start, end)
            if not areas:
                raise MmError(errno.EINVAL, f"UFFDIO_REGISTER: nothing is mapped at {start:#x}")
            hugetlb_uffd.check_pieces("UFFDIO_REGISTER", areas, start, end)
            for area in areas:
                if not self._fits(area, flags):
                    raise MmError(errno.EINVAL, f"UFFDIO_REGISTER: {area!r}")
                if area.shared and area.file is not None and not area.file.writable:
                    raise MmError(errno.EPERM, f"UFFDIO_REGISTER: {area!r}")
                if area.uffd is not None and area.uffd is not self:
                    raise MmError(errno.EBUSY, f"UFFDIO_REGISTER: {area!r} has a userfaultfd")
            if mm.trace.on:
                mm.trace.emit("uffd_register", mm=mm.name, start=start, end=end, mode=_names(flags))
            for area in areas:
                lo, hi = max(area.start, start), min(area.end, end)
                if area.uffd is self and area.flags & flags == flags:
                    continue
                if area.flags & VM_UFFD_WP and not flags & VM_UFFD_WP:
                    uffd_wp.forget(mm, lo >> PAGE_SHIFT, hi >> PAGE_SHIFT)
                self._set(lo, hi, self, flags)

    def _fits(self, area: Vma, flags: int) -> bool:
        if area.flags & VM_HUGETLB:
            return not (flags & VM_UFFD_WP and self.features & UFFD_FEATURE_WP_ASYNC)
        shmem = isinstance(area.file, ShmemFile)
        if flags & VM_UFFD_MINOR and not shmem:
            return False
        if self.features & UFFD_FEATURE_WP_ASYNC and flags == VM_UFFD_WP:
            return True
        return area.file is None or shmem

    def unregister(self, addr: int, length: int) -> None:
        """The range is as any other from now on; protection is lifted, waiting faults start over.

        Errors: EINVAL (also: nothing is mapped, an area of another userfaultfd, or of a kind that is never registered).
        """
        self._check()
        start, end = self.check_range("UFFDIO_UNREGISTER", addr, length)
        mm = self.mm
        with mm.mmap_lock.write:
            self._check()
            areas = mm.areas_in(start, end)
            if not areas:
                raise MmError(errno.EINVAL, f"UFFDIO_UNREGISTER: nothing is mapped at {start:#x}")
            hugetlb_uffd.check_pieces("UFFDIO_UNREGISTER", areas, start, end)
            for area in areas:
                if area.uffd not in (None, self) or not self._fits(area, area.flags & VM_UFFD):
                    raise MmError(errno.EINVAL, f"UFFDIO_UNREGISTER: {area!r}")
            self._release([area for area in areas if area.uffd is self], start, end)

    def close(self) -> None:
        """Unregisters everything. Faults that wait start over. A second call does nothing."""
        if self.closed:
            return
        self.closed = True
        self.queue.clear()
        mm = self.mm
        if not mm.dead:
            with mm.mmap_lock.write:
                areas = [area for area in mm.vmas if area.uffd is self]
                if areas:
                    self._release(areas, areas[0].start, areas[-1].end)

    def _release(self, areas: list[Vma], start: int, end: int) -> None:
        """Gives up those parts of ``areas`` that are in the range. mmap_lock is held for writing."""
        mm = self.mm
        for area in areas:
            lo, hi = max(area.start, start), min(area.end, end)
            with mm.because("uffd_unregister", start=lo, end=hi):
                if area.flags & VM_UFFD_WP:
                    _protect(mm, area, lo, hi, False)
                self._set(lo, hi, None, 0)
            self._wake(lo, hi)

    def _set(self, start: int, end: int, uffd: Userfaultfd | None, flags: int) -> None:
        mm = self.mm
        split(mm, start)
        split(mm, end)
        for area in mm.areas_in(start, end):
            area.uffd = uffd
            area.flags = area.flags & ~VM_UFFD | flags
            area.set_prot(area.prot)
        merge(mm, start, end)

    # ---- filling

    def copy(self, dst: int, data: bytes | bytearray | memoryview, mode: int = 0) -> int:
        """UFFDIO_COPY: new pages with ``data``, whole pages of it, at ``dst``; write-protected with MODE_WP.

        Pages of a shared file mapping go into the file. Errors: ENOENT (not one registered area), EINVAL (WP, and the
        area is not registered for it), EEXIST (a page is there), EFAULT (behind the end of the file), ENOMEM.
        """
        start, end = self._begin("UFFDIO_COPY", dst, len(data), mode, UFFDIO_COPY_MODE_DONTWAKE | UFFDIO_COPY_MODE_WP)
        page = memoryview(data).cast("B")
        wp = bool(mode & UFFDIO_COPY_MODE_WP)

        def fill(area: Vma, hva: int) -> None:
            if area.flags & VM_HUGETLB:
                hugetlb_uffd.copy(self.mm, area, hva, bytes(page[hva - start : hva - start + HPAGE_SIZE]), wp)
            else:
                uffd_fill.copy(self.mm, area, hva, bytes(page[hva - start : hva - start + PAGE_SIZE]), wp)

        return self._fill("copy", start, end, wp, bool(mode & UFFDIO_COPY_MODE_DONTWAKE), fill)

    def zeropage(self, start: int, length: int, mode: int = 0) -> int:
        """UFFDIO_ZEROPAGE: the zero page; in a shared file mapping new pages of zeros. Errors: see :meth:`copy`."""
        start, end = self._begin("UFFDIO_ZEROPAGE", start, length, mode, UFFDIO_ZEROPAGE_MODE_DONTWAKE)

        def fill(area: Vma, hva: int) -> None:
            uffd_fill.zeropage(self.mm, area, hva)

        return self._fill("zeropage", start, end, False, bool(mode & UFFDIO_ZEROPAGE_MODE_DONTWAKE), fill)

    def continue_(self, start: int, length: int, mode: int = 0) -> int:
        """UFFDIO_CONTINUE: maps the pages that the memory file has. Errors: see :meth:`copy`; EFAULT: it has none."""
        known = UFFDIO_CONTINUE_MODE_DONTWAKE | UFFDIO_CONTINUE_MODE_WP
        start, end = self._begin("UFFDIO_CONTINUE", start, length, mode, known)
        wp = bool(mode & UFFDIO_CONTINUE_MODE_WP)

        def fill(area: Vma, hva: int) -> None:
            if area.flags & VM_HUGETLB:
                hugetlb_uffd.continue_(self.mm, area, hva, wp)
            else:
                uffd_fill.continue_(self.mm, area, hva, wp)

        return self._fill("continue", start, end, wp, bool(mode & UFFDIO_CONTINUE_MODE_DONTWAKE), fill)

    def poison(self, start: int, length: int, mode: int = 0) -> int:
        """UFFDIO_POISON: every access is a SIGBUS from now on. Errors: see :meth:`copy`."""
        start, end = self._begin("UFFDIO_POISON", start, length, mode, UFFDIO_POISON_MODE_DONTWAKE)

        def fill(area: Vma, hva: int) -> None:
            uffd_fill.poison(self.mm, area, hva)

        return self._fill("poison", start, end, False, bool(mode & UFFDIO_POISON_MODE_DONTWAKE), fill)

    def _begin(self, what: str, addr: int, length: int, mode: int, known: int) -> tuple[int, int]:
        self._check()
        if mode & ~known:
            raise MmError(errno.EINVAL, f"{what}: mode {mode:#x}")
        bounds = self.check_range(what, addr, length)
        if self.changing:
            raise MmError(errno.EAGAIN, f"{what}: an event of {self!r} has not been read yet")
        return bounds

    def _fill(self, how: str, start: int, end: int, wp: bool, quiet: bool, fill: Callable[[Vma, int], None]) -> int:
        mm = self.mm
        with mm.mmap_lock.read:
            area = mm.find_vma(start)
            if area is None or end > area.end or area.uffd is None:
                raise MmError(errno.ENOENT, f"userfaultfd {how}: [{start:#x}, {end:#x}) is not one registered area")
            if wp and not area.flags & VM_UFFD_WP:
                raise MmError(errno.EINVAL, f"userfaultfd {how}: {area!r} is not registered for write protection")
            step = PAGE_SIZE
            if area.flags & VM_HUGETLB:
                step = HPAGE_SIZE
                hugetlb_uffd.check_pieces(f"userfaultfd {how}", [area], start, end)
                if how not in ("copy", "continue"):
                    raise MmError(errno.EINVAL, f"userfaultfd {how}: {area!r}")
            elif how == "continue" and not isinstance(area.file, ShmemFile):
                raise MmError(errno.EINVAL, f"userfaultfd {how}: {area!r} is no memory file")
            with mm.because("uffd_fill", start=start, end=end, how=how):
                done = start
                try:
                    while done < end:
                        fill(area, done)
                        done += step
                except MmError:
                    if done == start:
                        raise
        if not quiet:
            self._wake(start, done)
        return done - start

    # ---- write protection, moving

    def writeprotect(self, start: int, length: int, mode: int = UFFDIO_WRITEPROTECT_MODE_WP) -> None:
        """UFFDIO_WRITEPROTECT: with MODE_WP the next write to each page of the range is told; without, none is.

        Errors: EINVAL (also MODE_WP and DONTWAKE together), ENOENT (nothing is mapped, or an area that is not
        registered for WP), EAGAIN.
        """
        on = bool(mode & UFFDIO_WRITEPROTECT_MODE_WP)
        known = UFFDIO_WRITEPROTECT_MODE_WP | UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        start, end = self._begin("UFFDIO_WRITEPROTECT", start, length, mode, known)
        if mode == known:
            raise MmError(errno.EINVAL, f"UFFDIO_WRITEPROTECT: mode {mode:#x}")
        mm = self.mm
        with mm.mmap_lock.read:
            areas = mm.areas_in(start, end)
            if not areas or not all(area.flags & VM_UFFD_WP for area in areas):
                raise MmError(errno.ENOENT, f"UFFDIO_WRITEPROTECT: [{start:#x}, {end:#x}) is not registered for it")
            hugetlb_uffd.check_pieces("UFFDIO_WRITEPROTECT", areas, start, end)
            with mm.because("uffd_writeprotect", start=start, end=end, on=on):
                for area in areas:
                    _protect(mm, area, max(area.start, start), min(area.end, end), on)
        if not mode:
            self._wake(start, end)

    def move(self, dst: int, src: int, length: int, mode: int = 0) -> int:
        """UFFDIO_MOVE: private anonymous pages go from ``src`` to ``dst``, frames and all.

        ALLOW_SRC_HOLES: what is not there is skipped. Errors: ENOENT (nothing is mapped; a hole), EEXIST (a page at the
        destination), EBUSY (a page that is shared, or held by somebody), EINVAL (areas that differ, are shared, not
        writable, not anonymous; a destination that is not registered here).
        """
        known = UFFDIO_MOVE_MODE_DONTWAKE | UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES
        start, end = self._begin("UFFDIO_MOVE", dst, length, mode, known)
        src, _ = self.check_range("UFFDIO_MOVE", src, length)
        done = uffd_move.move(self, start, src, end - start, bool(mode & UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES))
        if not mode & UFFDIO_MOVE_MODE_DONTWAKE:
            self._wake(start, start + done)
        return done

    # ---- messages

    def read(self) -> UffdMsg:
        """The next message, of those that no handler was called with. Errors: EAGAIN (there is none)."""
        self._check()
        if not self.queue:
            raise MmError(errno.EAGAIN, f"{self!r} has no message")
        message = self.queue.popleft()
        if message.event != UFFD_EVENT_PAGEFAULT:
            self.changing -= 1
        return message

    def wake(self, start: int, length: int) -> None:
        """UFFDIO_WAKE: the faults that wait in the range start over."""
        self._check()
        self._wake(*self.check_range("UFFDIO_WAKE", start, length))

    def _wake(self, start: int, end: int) -> None:
        for waiter in self.waiters:
            if start <= waiter.hva < end:
                waiter.woken = True

    # ---- what others need

    def child_of(self, child: Mm) -> Userfaultfd:
        """The one of a forked mm, with the same monitor."""
        return Userfaultfd(child, self.handler, self.features)

    def check_range(self, what: str, addr: int, length: int) -> tuple[int, int]:
        """``[addr, addr + length)`` of whole pages. Raises MmError EINVAL."""
        if (addr | length) & ~PAGE_MASK or length <= 0 or addr < PAGE_SIZE or addr + length > TASK_SIZE:
            raise MmError(errno.EINVAL, f"{what}({addr:#x}, {length:#x})")
        return addr, addr + length

    def _check(self) -> None:
        if self.closed:
            raise MmError(errno.EBADF, f"{self!r} is closed")
        self.mm.check_alive("userfaultfd")

    def __repr__(self) -> str:
        pages = sum(area.end - area.start for area in self.mm.vmas if area.uffd is self) >> PAGE_SHIFT
        return f"<userfaultfd of {self.mm.name}: {pages} pages>"


def _protect(mm: Mm, area: Vma, start: int, end: int, on: bool) -> None:
    change = hugetlb_uffd.writeprotect if area.flags & VM_HUGETLB else uffd_wp.change
    change(mm, area, start, end, on)


def _names(flags: int) -> str:
    return "+".join(name for flag, name in _MODE_NAMES.items() if flags & flag)
