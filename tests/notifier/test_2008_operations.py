"""The order of notification, change, flush and free in every operation of 2008, as Linux 2.6.27 had it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xipvm.errors import MmError, ProtocolUnsupported
from xipvm.mmu import madvise as advice
from xipvm.mmu.device_file import DeviceFile
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.migrate import compact_memory, migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.mremap import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.pte import ACCESSED, MAPPED, pte_pfn
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_FIXED, MAP_HUGETLB, MAP_PRIVATE, MAP_SHARED
from xipvm.notifier import MmuNotifier, MmuNotifier2008, NotifiedMm
from xipvm.trace.events import KINDS, Event
from xipvm.trace.funnel import Trace

R, RW, NONE = 1, 3, 0
PAGE = 4096
Steps = Callable[[], list[str]]

WORDS = {
    "mmu_notifier_invalidate_range_start": "S",
    "mmu_notifier_invalidate_range_end": "E",
    "mmu_notifier_invalidate_page": "page",
    "mmu_notifier_clear_flush_young": "young",
    "mmu_notifier_release": "release",
    "primary_tlb_flush": "tlb",
    "page_free": "free",
    "page_alloc": "alloc",
    "pte_clear": "clear",
    "pte_set": "set",
    "pte_protect": "protect",
    "pte_copy": "copy",
    "pte_move": "move",
    "pte_nonpresent": "nonpresent",
    "swap_out": "write",
}


class Listener(MmuNotifier2008):
    """Has all the callbacks. ``young``: it says that pages were used, once each. ``failing``: how it fails next."""

    def __init__(self) -> None:
        self.young: set[int] = set()
        self.failing: BaseException | None = None

    def clear_flush_young(self, mm: NotifiedMm, address: int) -> bool:
        used = address in self.young
        self.young.discard(address)
        return used

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        if self.failing is not None:
            error, self.failing = self.failing, None
            raise error


@pytest.fixture
def host() -> Iterator[HostMemory]:
    host = HostMemory(8 << 20, poison="head")
    yield host
    verify(host)


@pytest.fixture
def trace() -> Trace:
    return Trace()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def mm(host: HostMemory, trace: Trace, listener: Listener) -> Mm:
    mm = Mm(host, trace, protocol="2008")
    mm.notifiers.register(listener)
    return mm


@pytest.fixture
def events(trace: Trace) -> list[Event]:
    seen: list[Event] = []

    def sink(event: Event) -> None:
        assert list(event.fields) == [field.name for field in KINDS[event.kind].fields], event
        seen.append(event)

    trace.attach(sink)
    return seen


@pytest.fixture
def steps(events: list[Event]) -> Steps:
    """What happened since the last call: changes of ``mm0`` and frees, in order, pages counted from the first area."""
    base: list[int] = []

    def word(event: Event) -> str:
        fields = event.fields
        if event.kind == "vma_map" and not base:
            base.append(fields["start"])
        if event.kind not in WORDS or fields.get("mm", "mm0") != "mm0":
            return ""
        word = WORDS[event.kind]
        if word in ("S", "E", "tlb"):
            first, end = ((fields[name] - base[0]) // PAGE for name in ("start", "end"))
            return f"{word} {first}-{end}" if end - first < 1 << 20 else f"{word} all"
        if word == "page":
            return f"page {(fields['address'] - base[0]) // PAGE}"
        if word == "young":
            return "young" if fields["young"] else "old"
        if word in ("clear", "free"):
            return f"{word} {sum(count for _, count in fields['pages'])}"
        return word

    def take() -> list[str]:
        words = [word(event) for event in events]
        del events[:]
        return [word for word in words if word]

    return take


@pytest.fixture
def area(mm: Mm, steps: Steps) -> int:
    """16 pages of private anonymous memory, all written."""
    start = mm.mmap(16 * PAGE, RW)
    for page in range(16):
        mm.write(start + page * PAGE, bytes([page]) * 8)
    steps()
    return start


def entry(mm: Mm, hva: int) -> int:
    return mm.pgd.get(hva // PAGE)


def forget_use(mm: Mm, hva: int) -> None:
    """The host has not used the page lately."""
    mm.pgd.set(hva // PAGE, entry(mm, hva) & ~ACCESSED)


# ---- batches: a start and an end around them, which tell addresses


def test_munmap(mm: Mm, area: int, steps: Steps) -> None:
    mm.munmap(area + 4 * PAGE, 4 * PAGE)
    assert steps() == ["S 4-8", "clear 4", "E 4-8", "tlb 4-8", "free 4"]


def test_mmap_over(mm: Mm, area: int, steps: Steps) -> None:
    mm.mmap(4 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=area + 4 * PAGE)
    assert steps() == ["S 4-8", "clear 4", "E 4-8", "tlb 4-8", "free 4"]


def test_brk(mm: Mm, area: int, steps: Steps) -> None:
    end = mm.brk(mm.brk() + 2 * PAGE)
    mm.write(end - PAGE, b"heap")
    steps()
    mm.brk(end - PAGE)
    words = steps()
    assert [word.split()[0] for word in words] == ["S", "clear", "E", "tlb", "free"]


def test_dontneed_frees_area_by_area(mm: Mm, area: int, steps: Steps) -> None:
    mm.mprotect(area + 8 * PAGE, 8 * PAGE, R)
    steps()
    mm.madvise(area + 4 * PAGE, 8 * PAGE, advice.MADV_DONTNEED)
    first = ["S 4-8", "clear 4", "E 4-8", "tlb 4-8", "free 4"]
    assert steps() == [*first, "S 8-12", "clear 4", "E 8-12", "tlb 8-12", "free 4"]


@pytest.mark.parametrize("prot", [R, NONE])
def test_mprotect_flushes_inside(mm: Mm, area: int, steps: Steps, prot: int) -> None:
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, prot)
    assert steps() == ["S 4-8", "protect", "tlb 4-8", "E 4-8"]
    mm.mprotect(area + 4 * PAGE, 4 * PAGE, prot)
    assert steps() == []
    mm.mprotect(area, 6 * PAGE, RW if prot == NONE else NONE)
    changed = ["S 4-6", "protect", "tlb 4-6", "E 4-6"]
    assert steps() == (changed if prot == NONE else ["S 0-4", "protect", "tlb 0-4", "E 0-4", *changed])


def test_mprotect_of_nothing_populated_is_announced(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(16 * PAGE, RW)
    mm.mprotect(start + 4 * PAGE, 4 * PAGE, R)
    assert steps() == ["S 4-8", "tlb 4-8", "E 4-8"]


def test_fork(mm: Mm, area: int, host: HostMemory, trace: Trace, steps: Steps) -> None:
    """One range for each area with something to copy, none for shared ones; one flush behind the last."""
    file = ShmemFile(host, trace, "memfd", 4 * PAGE)
    shared = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(shared, b"x")
    mm.mprotect(area + 8 * PAGE, 8 * PAGE, R)
    steps()
    child = mm.fork()
    assert steps() == ["S 0-8", "protect", "copy", "E 0-8", "S 8-16", "protect", "copy", "E 8-16", "tlb all"]
    assert child.protocol == "2008"
    child.exit()
    file.close()


def test_truncate_unmaps_twice(mm: Mm, host: HostMemory, trace: Trace, steps: Steps) -> None:
    file = ShmemFile(host, trace, "memfd", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start + 2 * PAGE, b"x")
    steps()
    file.truncate(PAGE)
    assert steps() == ["S 1-4", "clear 1", "E 1-4", "tlb 1-4", "free 1", "S 1-4", "E 1-4"]
    file.close()


def test_a_hole_by_madvise(mm: Mm, host: HostMemory, trace: Trace, steps: Steps) -> None:
    file = ShmemFile(host, trace, "memfd", 4 * PAGE)
    start = mm.mmap(4 * PAGE, RW, MAP_SHARED, file=file)
    mm.write(start + PAGE, b"x")
    steps()
    mm.madvise(start + PAGE, PAGE, advice.MADV_REMOVE)
    assert steps() == ["S 1-2", "clear 1", "E 1-2", "tlb 1-2", "free 1"]
    file.close()


def test_device_memory_that_cannot_be_mapped_any_more(mm: Mm, host: HostMemory, trace: Trace, steps: Steps) -> None:
    """Pages of flash have no reference that could be put."""
    array = HostMemory(4 * PAGE)
    first = host.add_device(array.arena_address, 4 * PAGE, array)
    file = DeviceFile(host, trace, "flash0", first, 4)
    start = mm.mmap(4 * PAGE, R, MAP_SHARED, file=file)
    mm.read(start, 8)
    steps()
    file.unmap()
    assert steps() == ["S 0-4", "clear 1", "E 0-4", "tlb 0-4"]
    mm.exit()
    host.remove_device(first)


def test_the_end_of_the_mm(mm: Mm, area: int, steps: Steps) -> None:
    """It unmaps when nobody is left who could be told."""
    mm.exit()
    assert steps() == ["release", "clear 16", "tlb 0-16", "free 16"]


# ---- huge pages of the pool: a range of their own, a flush in it; then they go


@pytest.fixture
def huge(host: HostMemory, mm: Mm, steps: Steps) -> int:
    """Two huge pages, both written."""
    host.reserve_huge_pages(2)
    start = mm.mmap(2 * HPAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    for page in range(2):
        mm.write(start + page * HPAGE_SIZE, b"%d" % page)
    steps()
    return start


@pytest.mark.parametrize("how", ["munmap", "exit"])
def test_unmapping_huge_pages(mm: Mm, huge: int, steps: Steps, how: str) -> None:
    if how == "munmap":
        mm.munmap(huge, 2 * HPAGE_SIZE)
        inner = ["S 0-1024", "clear 1024", "tlb 0-1024", "E 0-1024", "free 1024"]
        assert steps() == ["S 0-1024", *inner, "E 0-1024"]
    else:
        mm.exit()
        assert steps() == ["release", "clear 1024", "tlb 0-1024", "free 1024"]


def test_truncating_a_file_of_huge_pages(mm: Mm, host: HostMemory, trace: Trace, steps: Steps) -> None:
    host.reserve_huge_pages(2)
    file = HugetlbFile(host, trace, "hugetlbfs", 2 * HPAGE_SIZE)
    start = mm.mmap(2 * HPAGE_SIZE, RW, MAP_SHARED, file=file)
    mm.write(start + HPAGE_SIZE, b"x")
    steps()
    file.truncate(HPAGE_SIZE)
    assert steps()[:5] == ["S 512-1024", "clear 512", "tlb 512-1024", "E 512-1024", "free 512"]
    file.close()
    mm.exit()


@pytest.mark.parametrize(
    "operation",
    [
        lambda mm, start: mm.madvise(start, HPAGE_SIZE, advice.MADV_DONTNEED),
        lambda mm, start: mm.mremap(start, HPAGE_SIZE, HPAGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, start - (1 << 32)),
    ],
)
def test_what_huge_pages_could_not_do_yet(
    mm: Mm, huge: int, steps: Steps, operation: Callable[[Mm, int], object]
) -> None:
    with pytest.raises(ProtocolUnsupported):
        operation(mm, huge)
    assert steps() == []
    assert mm.read(huge, 1) == b"0"


def test_there_are_no_transparent_ones(mm: Mm, steps: Steps) -> None:
    """Whatever the host is set to: a child or a neighbour that speaks the modern protocol may have them."""
    mm.thp.enabled = "always"
    start = mm.mmap(4 * HPAGE_SIZE, RW)
    mm.write(start + HPAGE_SIZE, b"x")
    assert steps() == ["alloc", "set"]


# ---- mremap: a range for each step, every entry flushed before it appears again


def test_mremap_goes_in_steps_of_64_pages(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(100 * PAGE, RW, addr=1 << 32)
    for page in (0, 63, 64, 99):
        mm.write(start + page * PAGE, b"%d" % page)
    steps()
    new = mm.mremap(start, 100 * PAGE, 100 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (1 << 32) + (1 << 30))
    moved = [
        ["S 0-64", "clear 1", "tlb 0-1", "set", "clear 1", "tlb 63-64", "set", "E 0-64"],
        ["S 64-100", "clear 1", "tlb 64-65", "set", "clear 1", "tlb 99-100", "set", "E 64-100"],
    ]
    assert steps() == [*moved[0], *moved[1], "S 0-100", "E 0-100"]
    assert [mm.read(new + page * PAGE, 2) for page in (0, 63, 64, 99)] == [b"0\0", b"63", b"64", b"99"]
    assert mm.find_vma(start) is None


def test_a_step_of_mremap_stays_in_its_page_tables(mm: Mm, steps: Steps) -> None:
    """Here the source's ends behind 8 pages, the destination's behind 40; where there is none nothing is said."""
    table = 512 * PAGE
    start = mm.mmap(600 * PAGE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=(1 << 32) + table - 8 * PAGE)
    for page in (7, 8, 599):
        mm.write(start + page * PAGE, b"x")
    steps()
    mm.mremap(start, 600 * PAGE, 600 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (1 << 33) + table - 40 * PAGE)
    ranges = [word for word in steps() if word.startswith("S")]
    first = ["S 0-8", "S 8-40", "S 40-104", "S 104-168", "S 168-232", "S 232-296", "S 296-360", "S 360-424"]
    assert ranges == [*first, "S 424-488", "S 488-520", "S 520-552", "S 552-600", "S 0-600"]


def test_mremap_says_nothing_where_nothing_is(mm: Mm, steps: Steps) -> None:
    table = 512 * PAGE
    start = mm.mmap(3 * table, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, addr=1 << 32)
    mm.write(start + 2 * table, b"x")
    steps()
    mm.mremap(start, 3 * table, 3 * table, MREMAP_MAYMOVE | MREMAP_FIXED, 1 << 33)
    words = steps()
    assert words[:2] == ["S 1024-1088", "clear 1"]
    assert words[-2:] == ["S 0-1536", "E 0-1536"]


def test_mremap_takes_swap_entries_along(mm: Mm, area: int, steps: Steps) -> None:
    mm.swapon(16)
    forget_use(mm, area)
    assert mm.memcg_reclaim(1) == 1
    steps()
    new = mm.mremap(area, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, area - (1 << 30))
    assert steps() == ["S 0-1", "E 0-1", "S 0-1", "E 0-1"]
    assert mm.read(new, 8) == bytes(8)


# ---- single entries: cleared and flushed, then told, then filled again or put


def test_copy_on_write(mm: Mm, area: int, steps: Steps) -> None:
    child = mm.fork()
    steps()
    mm.write(area + 3 * PAGE, b"new")
    assert steps() == ["alloc", "clear 1", "tlb 3-4", "page 3", "set"]
    assert child.read(area + 3 * PAGE, 3) == b"\3\3\3"
    child.exit()


def test_the_zero_page_is_copied_like_any_other(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(PAGE, RW)
    mm.read(start, 8)
    steps()
    mm.write(start, b"x")
    assert steps() == ["alloc", "clear 1", "tlb 0-1", "page 0", "set"]


def test_a_page_that_nobody_shares_is_used_again(mm: Mm, area: int, steps: Steps) -> None:
    mm.fork().exit()
    steps()
    mm.write(area, b"x")
    assert steps() == ["set"]


def test_faults_that_fill_empty_entries_tell_nobody(mm: Mm, area: int, steps: Steps) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"x")
    mm.read(start + PAGE, 8)
    assert steps() == ["alloc", "set", "set"]


def test_swap_out(mm: Mm, area: int, steps: Steps) -> None:
    """Asked whether it was used when reclaim looks at it, and again when it takes the entry; told when that is gone."""
    mm.swapon(16)
    for page in range(16):
        forget_use(mm, area + page * PAGE)
    pfn = pte_pfn(entry(mm, area))
    steps()
    assert mm.memcg_reclaim(1) == 16
    words = steps()
    one = ["old", "old", "clear 1", "tlb 0-1", "page 0", "nonpresent", "write", "free 1"]
    assert words[: len(one)] == one
    assert words == [word.replace("0-1", f"{n}-{n + 1}").replace(" 0", f" {n}") for n in range(16) for word in one]
    assert mm.host.refcount(pfn) == 0
    mm.read(area, 8)
    assert steps() == ["alloc", "set"]  # swapping in tells nobody


def test_a_page_that_a_secondary_mmu_uses_is_not_swapped(mm: Mm, area: int, steps: Steps, listener: Listener) -> None:
    mm.swapon(16)
    forget_use(mm, area)
    listener.young = {area}
    steps()
    assert mm.memcg_reclaim(1) == 0
    assert [word for word in steps() if word in ("young", "page 0")] == ["young"]
    assert mm.memcg_reclaim(1) == 16


def test_a_page_that_is_used_before_it_is_unmapped_stays(
    mm: Mm, area: int, steps: Steps, listener: Listener, trace: Trace
) -> None:
    """The second question, which modern kernels do not ask."""
    mm.swapon(16)
    mm.munmap(area + PAGE, 15 * PAGE)
    forget_use(mm, area)
    steps()

    def sink(event: Event) -> None:
        if event.kind == "mmu_notifier_clear_flush_young" and not event.fields["young"]:
            listener.young = {area}
            trace.detach(sink)

    trace.attach(sink)
    assert mm.memcg_reclaim(1) == 0
    assert steps() == ["old", "young"]
    assert entry(mm, area) & MAPPED
    assert mm.memcg_reclaim(2) == 1


def test_migration(mm: Mm, area: int, host: HostMemory, trace: Trace, steps: Steps) -> None:
    child = mm.fork()
    steps()
    migrate_page(host, trace, pte_pfn(entry(mm, area)))
    assert steps() == ["alloc", "clear 1", "tlb 0-1", "page 0", "nonpresent", "set", "free 1"]
    child.exit()


def test_a_page_that_somebody_holds_is_told_and_stays(
    mm: Mm, area: int, host: HostMemory, trace: Trace, steps: Steps
) -> None:
    pfn = pte_pfn(entry(mm, area))
    host.get(pfn)
    with pytest.raises(MmError):
        migrate_page(host, trace, pfn)
    words = steps()
    assert words[:-1] == ["alloc", "clear 1", "tlb 0-1", "page 0", "nonpresent", "set"]
    assert pte_pfn(entry(mm, area)) == pfn
    host.put(pfn)


def test_write_back(mm: Mm, host: HostMemory, trace: Trace, steps: Steps, tmp_path: Path) -> None:
    """mkclean: cleared, flushed, told, and the same page put back, clean and read-only; for each shared mapping."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    file = HostFile(host, trace, os.fspath(path), writable=True)
    start = mm.mmap(2 * PAGE, RW, MAP_SHARED, file=file)
    mm.mmap(2 * PAGE, R, MAP_SHARED, file=file, addr=start + 16 * PAGE)
    mm.read(start + 16 * PAGE, 1)
    mm.write(start, b"x")
    steps()
    mm.msync(start, 2 * PAGE)
    assert steps() == ["clear 1", "tlb 0-1", "page 0", "set"]
    assert path.read_bytes()[:1] == b"x"
    mm.msync(start, 2 * PAGE)
    assert steps() == []
    file.close()
    mm.exit()


@pytest.mark.parametrize("how", ["cow", "swap", "migrate", "mkclean"])
def test_a_callback_that_raises_leaves_the_entry(
    mm: Mm, area: int, host: HostMemory, trace: Trace, listener: Listener, tmp_path: Path, how: str
) -> None:
    child = mm.fork() if how == "cow" else None
    hva, file = area, None
    if how == "mkclean":
        path = tmp_path / "file"
        path.write_bytes(bytes(PAGE))
        file = HostFile(host, trace, os.fspath(path), writable=True)
        hva = mm.mmap(PAGE, RW, MAP_SHARED, file=file)
        mm.write(hva, bytes(8))
    mm.swapon(16)
    forget_use(mm, hva)
    before = entry(mm, hva)
    listener.failing = RuntimeError("told")
    operations: dict[str, Callable[[], object]] = {
        "cow": lambda: mm.write(hva, b"new"),
        "swap": lambda: mm.memcg_reclaim(1),
        "migrate": lambda: migrate_page(host, trace, pte_pfn(before)),
        "mkclean": lambda: mm.msync(hva, PAGE),
    }
    with pytest.raises(RuntimeError, match="told"):
        operations[how]()
    assert entry(mm, hva) & ~ACCESSED == before & ~ACCESSED
    assert mm.read(hva, 8) == bytes(8)
    mm.write(hva, b"new")
    if child is not None:
        assert child.read(hva, 8) == bytes(8)
        child.exit()
    if file is not None:
        file.close()
        mm.exit()


# ---- what did not exist


@pytest.mark.parametrize(
    "operation",
    [
        *[
            pytest.param(lambda mm, area, which=which: mm.madvise(area, PAGE, which), id=f"madvise {which}")
            for which in (8, 12, 13, 14, 15, 20, 21, 22, 23, 25, 102, 103)
        ],
        pytest.param(lambda mm, area: mm.clear_refs(4), id="clear_refs 4"),
        pytest.param(lambda mm, area: mm.soft_dirty(area, area + PAGE), id="soft_dirty"),
        pytest.param(lambda mm, area: mm.ksm_scan(), id="ksm_scan"),
        pytest.param(lambda mm, area: mm.userfaultfd(), id="userfaultfd"),
        pytest.param(lambda mm, area: mm.pagemap_scan(area, area + PAGE), id="pagemap_scan"),
        pytest.param(lambda mm, area: mm.khugepaged_scan(), id="khugepaged_scan"),
        pytest.param(lambda mm, area: mm.process_vm_writev(area, b"new"), id="process_vm_writev"),
        pytest.param(lambda mm, area: compact_memory(mm.host, mm.trace), id="compaction"),
        pytest.param(
            lambda mm, area: mm.mremap(area, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP), id="mremap DONTUNMAP"
        ),
        pytest.param(lambda mm, area: mm.notifiers.get(MmuNotifier), id="get"),
    ],
)
def test_what_came_later(mm: Mm, area: int, steps: Steps, operation: Callable[[Mm, int], object]) -> None:
    before = mm.pgd.entries(0, 1 << 36)
    areas = [(each.start, each.end, each.flags, each.prot) for each in mm.vmas]
    with pytest.raises(ProtocolUnsupported):
        operation(mm, area)
    assert mm.pgd.entries(0, 1 << 36) == before
    assert [(each.start, each.end, each.flags, each.prot) for each in mm.vmas] == areas
    assert steps() == []


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_forgetting_which_pages_were_used_tells_nobody(mm: Mm, area: int, steps: Steps, mode: int) -> None:
    mm.clear_refs(mode)
    assert steps() == []


def test_bad_use_is_the_same_in_both(mm: Mm, area: int, steps: Steps) -> None:
    for operation in (lambda: mm.munmap(area + 1, PAGE), lambda: mm.madvise(area, PAGE, 9999)):
        with pytest.raises(MmError):
            operation()
    assert steps() == []
