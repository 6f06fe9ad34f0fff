"""Faults of who announces, and of who passes it on: ranges that are left out, too short or at the wrong time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from xipvm.actors import point
from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.locks.check import might_sleep
from xipvm.mmu import collapse, cow, fork, hugetlb, migrate, unmap
from xipvm.mmu.all_locks import AllLocks
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.secondary.kvm_2008 import Kvm2008
from xipvm.mmu.vma import VM_HUGETLB, Vma
from xipvm.mutants.mutant import inside, mutant, replaced
from xipvm.notifier import MmuNotifierRange, MmuNotifiers, RangeEvent, Subscriber
from xipvm.notifier.invalidation import Invalidation, Unobserved

Announced = Callable[[MmuNotifiers, int, int, RangeEvent], AbstractContextManager[object]]
Which = Callable[[RangeEvent], bool]


@contextmanager
def announcing(instead: Announced, which: Which) -> Iterator[None]:
    """Ranges that ``which`` selects by their event are announced as ``instead`` does."""
    original = MmuNotifiers.invalidate_range

    def announce(self: MmuNotifiers, start: int, end: int, event: RangeEvent, **how: Any) -> Any:
        if which(event):
            return instead(self, start, end, event)
        return original(self, start, end, event, **how)

    with replaced(MmuNotifiers, "invalidate_range", announce):
        yield


def silence(notifiers: MmuNotifiers, start: int, end: int, event: RangeEvent) -> AbstractContextManager[object]:
    """Nobody is told."""
    return nullcontext()


@contextmanager
def late(notifiers: MmuNotifiers, start: int, end: int, event: RangeEvent) -> Iterator[None]:
    """Everybody is told when it has happened."""
    yield
    notifiers.invalidate_range_end(notifiers.invalidate_range_start(start, end, event))


@contextmanager
def early(notifiers: MmuNotifiers, start: int, end: int, event: RangeEvent) -> Iterator[None]:
    """The range has ended before it happens."""
    notifiers.invalidate_range_end(notifiers.invalidate_range_start(start, end, event))
    yield


_announce = MmuNotifiers.invalidate_range


def short(notifiers: MmuNotifiers, start: int, end: int, event: RangeEvent) -> Invalidation | Unobserved:
    """The last page is left out."""
    return _announce(notifiers, start, max(end - PAGE_SIZE, start + PAGE_SIZE), event)


# ---- by operation


@mutant("mprotect-says-nothing", "M1", "I1")
def mprotect_says_nothing() -> Iterator[None]:
    """Rights are taken away, and nobody is told."""
    with announcing(silence, lambda event: event is RangeEvent.PROTECTION_VMA):
        yield


@mutant("announced-one-page-short", "M2", "I1")
def announced_one_page_short() -> Iterator[None]:
    """What is announced ends one page before what changes."""
    with announcing(short, lambda event: True):
        yield


@mutant("announced-when-it-has-happened", "M3", "I1")
def announced_when_it_has_happened() -> Iterator[None]:
    """munmap announces its range when the entries are gone."""
    with announcing(late, lambda event: event is RangeEvent.UNMAP):
        yield


@mutant("ended-before-it-happens", "M4", "I1")
def ended_before_it_happens() -> Iterator[None]:
    """Ranges end before the entries change."""
    with announcing(early, lambda event: event in (RangeEvent.CLEAR, RangeEvent.PROTECTION_VMA)):
        yield


@mutant("announced-where-somebody-looks", "M1 (windows)", "I1")
def announced_where_somebody_looks() -> Iterator[None]:
    """What no memslot and no window shows is changed unannounced: notifiers are asked for what they will not tell."""
    original = MmuNotifiers.invalidate_range

    def announce(self: MmuNotifiers, start: int, end: int, event: RangeEvent, **how: Any) -> Any:
        if all(_shows_nothing_of(each, start, end) for each in self) and len(self):
            return silence(self, start, end, event)
        return original(self, start, end, event, **how)

    with replaced(MmuNotifiers, "invalidate_range", announce):
        yield


def _shows_nothing_of(notifier: Subscriber, start: int, end: int) -> bool:
    """``notifier`` has windows, and nothing beside them, and none of them is onto ``[start, end)``."""
    windows = getattr(notifier, "memslots", getattr(notifier, "windows", None))
    return windows is not None and not getattr(notifier, "pfn_caches", ()) and not windows.in_hva_range(start, end)


@mutant("told-when-the-page-is-put", "1", "I1", protocol="modern")
def told_when_the_page_is_put() -> Iterator[None]:
    """try_to_unmap tells of a page when its entry is gone and its reference dropped."""
    with inside(unmap, "_unmap_one") as unmapping, announcing(late, lambda event: unmapping()):
        yield


@mutant("copy-mapped-before-the-range", "M30", "I1", "I11", protocol="modern")
def copy_mapped_before_the_range() -> Iterator[None]:
    """Copy on write puts the new page in place before anybody drops the old one."""
    with inside(cow, "wp_page_copy") as copying, announcing(late, lambda event: copying()):
        yield


@mutant("huge-page-moves-unannounced", "7", "I1", protocol="modern")
def huge_page_moves_unannounced() -> Iterator[None]:
    """Migration of a page that a huge entry maps tells nobody."""
    with inside(migrate, "migrate_huge_page") as moving, announcing(silence, lambda event: moving()):
        yield


@mutant("hugetlb-fork-unannounced", "8", "I1", protocol="modern")
def hugetlb_fork_unannounced() -> Iterator[None]:
    """fork write-protects the parent's huge pages of the pool and tells nobody."""

    def huge(mm: object, child: object, area: Vma, *_: object) -> bool:
        return bool(area.flags & VM_HUGETLB)

    with inside(fork, "_dup_area", huge) as copying, announcing(silence, lambda event: copying()):
        yield


@mutant("file-collapse-unannounced", "9", "I1", protocol="modern")
def file_collapse_unannounced() -> Iterator[None]:
    """Small pages of a file are taken out of the page tables for a huge one, and nobody is told."""
    with inside(collapse, "_collapse_file") as collapsing, announcing(silence, lambda event: collapsing()):
        yield


@mutant("hugetlb-range-not-widened", "10", "I1")
def hugetlb_range_not_widened() -> Iterator[None]:
    """What is announced for huge pages of the pool was computed for one page, whatever goes with it."""

    def one(area: Vma, start: int, end: int) -> tuple[int, int]:
        return start, min(end, start + HPAGE_SIZE)

    with replaced(hugetlb, "adjust_range_if_pmd_sharing_possible", one):
        yield


@mutant("tlb-followers-not-told", "13", "I5", protocol="modern")
def tlb_followers_not_told() -> Iterator[None]:
    """The host's CPUs flush, and devices with a TLB of their own do not hear of it."""
    with replaced(MmuNotifiers, "arch_invalidate_secondary_tlbs", lambda self, start, end: None):
        yield


# ---- declining


@mutant("declined-and-others-not-ended", "4", "AssertionError", "livelock", "deadlock", protocol="modern")
def declined_and_others_not_ended() -> Iterator[None]:
    """When one notifier declines a range, those that had begun get no end."""
    finish = MmuNotifiers._finish
    with inside(MmuNotifiers, "_start") as starting:

        def unfinished(self: MmuNotifiers, range: MmuNotifierRange, notifiers: Any, intervals: Any) -> Any:
            return finish(self, range, () if starting() else notifiers, intervals)

        with replaced(MmuNotifiers, "_finish", unfinished):
            yield


@mutant("declined-and-left-open", "M13", "I6", "livelock", "deadlock", protocol="modern")
def declined_and_left_open() -> Iterator[None]:
    """When one notifier declines a range, it is not ended at all."""
    finish = MmuNotifiers._finish
    with inside(MmuNotifiers, "_start") as starting:

        def unfinished(self: MmuNotifiers, range: MmuNotifierRange, notifiers: Any, intervals: Any) -> Any:
            return [] if starting() else finish(self, range, notifiers, intervals)

        with replaced(MmuNotifiers, "_finish", unfinished):
            yield


@mutant("declined-and-not-closed", "M13 (range)", "I6", "deadlock", protocol="modern")
def declined_and_not_closed() -> Iterator[None]:
    """When one notifier declines a range, the others are told of its end, but it counts as open for ever."""
    finish = MmuNotifiers._finish
    with inside(MmuNotifiers, "_start") as starting:

        def unclosed(self: MmuNotifiers, range: MmuNotifierRange, notifiers: Any, intervals: Any) -> Any:
            if not starting():
                return finish(self, range, notifiers, intervals)
            for notifier in notifiers:
                self._end(notifier, range)
            return []

        with replaced(MmuNotifiers, "_finish", unclosed):
            yield


@mutant("declined-and-ended-for-all", "M27", "AssertionError", "InternalError", protocol="modern")
def declined_and_ended_for_all() -> Iterator[None]:
    """When one notifier declines a range, those behind it are not told of its start, but of its end."""

    def start(self: MmuNotifiers, range: MmuNotifierRange, notifiers: tuple[Any, ...]) -> None:
        section = self._srcu.read_lock()
        try:
            for notifier in notifiers:
                if notifier.invalidate_range_start(range):
                    self._finish(range, notifiers, None)
                    raise MmError(errno.EAGAIN, f"{notifier.name} cannot take {range!r} without blocking")
        finally:
            self._srcu.read_unlock(section)

    with replaced(MmuNotifiers, "_start", start):
        yield


# ---- joining and leaving


@mutant("exit-unlinks-first", "6", "I1", protocol="modern")
def exit_unlinks_first() -> Iterator[None]:
    """At the end of the mm notifiers are unlinked, and released later: meanwhile nobody tells them anything."""

    def release(self: MmuNotifiers) -> None:
        if self._dead:
            return
        self._dead = True
        notifiers = self._list
        self._relink(())
        for notifier in notifiers:
            point("mutant.unlinked")
            self._call_release(notifier)

    with replaced(MmuNotifiers, "release", release):
        yield


@mutant("unregister-unlinks-first", "M25", "I1", protocol="modern")
def unregister_unlinks_first() -> Iterator[None]:
    """unregister unlinks a notifier before it is released: what changes meanwhile it does not hear of."""
    unregister = MmuNotifiers.unregister

    def unlinked(self: MmuNotifiers, notifier: Any) -> None:
        if notifier in self._list:
            self._unlink(notifier)
            point("mutant.unlinked")
            self._call_release(notifier)
        unregister(self, notifier)

    with replaced(MmuNotifiers, "unregister", unlinked):
        yield


@mutant("locks-interleaved", "30", "lock", "deadlock")
def locks_interleaved() -> Iterator[None]:
    """mm_take_all_locks goes by area: it takes a file's lock when it has an anon_vma's already."""

    def enter(self: AllLocks) -> AllLocks:
        areas = self._mm.vmas
        try:
            for area in reversed(areas):
                for root in area.anon_chain:
                    if root.rwsem not in self._locks:
                        root.rwsem.nested.__enter__()
                        self._locks[root.rwsem] = None
                if area.file is not None and area.file.i_mmap not in self._locks:
                    area.file.i_mmap.nested.__enter__()
                    self._locks[area.file.i_mmap] = None
        except BaseException:
            self._drop()
            raise
        return self

    with replaced(AllLocks, "__enter__", enter):
        yield


@mutant("start-sleeps", "42", "lock")
def start_sleeps() -> Iterator[None]:
    """A callback sleeps where nobody may: inside RCU in 2008, in a range that may not block today."""
    start, start_2008 = Kvm.invalidate_range_start, Kvm2008.invalidate_range_start

    def sleeps(self: Kvm, range: MmuNotifierRange) -> int:
        might_sleep("waiting for a device")
        return start(self, range)

    def sleeps_2008(self: Kvm2008, mm: Any, first: int, end: int) -> None:
        might_sleep("waiting for a device")
        start_2008(self, mm, first, end)

    with (
        replaced(Kvm, "invalidate_range_start", sleeps),
        replaced(Kvm2008, "invalidate_range_start", sleeps_2008),
    ):
        yield
