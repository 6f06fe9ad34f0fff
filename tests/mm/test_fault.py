"""Faults as get_user_pages and copies see them: what gets mapped, how, and what is refused."""

from __future__ import annotations

import errno

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import ACCESSED, ANON, DIRTY, EXCLUSIVE, EXEC, PRESENT, SOFT_DIRTY, SPECIAL, WRITE
from xipvm.mmu.tables import GupPage
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_SHARED
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

R, RW, RX, RWX, NONE = 1, 3, 5, 7, 0
PAGE = 4096


def flags(mm: Mm, hva: int) -> int:
    return mm.pgd.get(hva >> 12) & 0xFFF


def test_write_maps_a_new_frame(mm: Mm) -> None:
    start = mm.mmap(PAGE, RW)
    assert mm.get_user_pages(start, write=True) == GupPage(1, True)
    assert mm.get_user_pages(start + 5, write=False) == GupPage(1, True)
    assert flags(mm, start) == PRESENT | WRITE | ACCESSED | DIRTY | SOFT_DIRTY | ANON | EXCLUSIVE


def test_read_maps_the_zero_page(mm: Mm) -> None:
    start = mm.mmap(PAGE, RW)
    assert mm.get_user_pages(start, write=False) == GupPage(0, False)
    assert flags(mm, start) == PRESENT | SPECIAL | ACCESSED
    assert mm.get_user_pages(start, write=True) == GupPage(1, True)
    assert mm.read(start, PAGE) == bytes(PAGE)


def test_frames_come_zeroed_after_reuse(mm: Mm) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"\xff" * PAGE)
    mm.munmap(start, PAGE)
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"x")
    assert mm.read(start, PAGE) == b"x" + bytes(PAGE - 1)


def test_exec_is_in_the_entry(mm: Mm) -> None:
    start = mm.mmap(PAGE, RWX)
    mm.write(start, b"x")
    assert flags(mm, start) & EXEC
    mm.mprotect(start, PAGE, RW)
    assert not flags(mm, start) & EXEC


@pytest.mark.parametrize(("prot", "read", "write"), [(NONE, False, False), (R, True, False), (RX, True, False)])
def test_protection(mm: Mm, prot: int, read: bool, write: bool) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"x")
    mm.mprotect(start, 2 * PAGE, prot)
    for hva in (start, start + PAGE):
        for access, allowed in ((False, read), (True, write)):
            if allowed:
                assert mm.get_user_pages(hva, write=access).writable is False
            else:
                with pytest.raises(MmError) as raised:
                    mm.get_user_pages(hva, write=access)
                assert raised.value.errno == errno.EFAULT
    mm.mprotect(start, 2 * PAGE, RW)
    assert mm.read(start, 1) == b"x"
    assert mm.get_user_pages(start, write=False) == GupPage(1, True)


def test_a_page_comes_back_writable_from_none_only_if_it_is_ours(mm: Mm) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"x" * 2 * PAGE)
    child = mm.fork()
    child.write(start, b"y")
    mm.write(start, b"z")
    for prot in (NONE, RW):
        mm.mprotect(start, 2 * PAGE, prot)
    assert mm.get_user_pages(start, write=False).writable
    assert not mm.get_user_pages(start + PAGE, write=False).writable


def test_copies_cross_pages(mm: Mm) -> None:
    start = mm.mmap(4 * PAGE, RW)
    data = bytes(range(256)) * 40
    mm.write(start + 100, data)
    assert mm.read(start + 100, len(data)) == data
    assert mm.read(start, 100) == bytes(100)
    assert mm.read(start, 0) == b""
    mm.write(start, b"")
    mm.write(start, memoryview(bytearray(b"view")))
    assert mm.read(start, 4) == b"view"


def test_a_write_that_fails_writes_nothing(mm: Mm, host: HostMemory) -> None:
    start = mm.mmap(3 * PAGE, RW)
    mm.mprotect(start + 2 * PAGE, PAGE, R)
    with pytest.raises(MmError):
        mm.write(start, b"x" * 3 * PAGE)
    assert mm.read(start, 2 * PAGE) == bytes(2 * PAGE)


def test_out_of_frames(trace: Trace) -> None:
    host = HostMemory(4 * PAGE)
    mm = Mm(host, trace)
    start = mm.mmap(8 * PAGE, RW)
    mm.write(start, b"x" * 3 * PAGE)
    with pytest.raises(MmError) as raised:
        mm.write(start + 3 * PAGE, b"x")
    assert raised.value.errno == errno.ENOMEM
    mm.read(start + 3 * PAGE, 1)
    child = mm.fork()
    with pytest.raises(MmError) as raised:
        child.write(start, b"x")
    assert raised.value.errno == errno.ENOMEM
    assert child.read(start, 1) == b"x"
    mm.munmap(start + PAGE, PAGE)
    child.munmap(start + PAGE, PAGE)
    child.write(start, b"y")
    assert mm.read(start, 1) == b"x"


@pytest.mark.parametrize("meanwhile", ["dontneed", "copied"])
def test_a_copy_that_lost_its_race_changes_nothing(mm: Mm, host: HostMemory, meanwhile: str) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"old" + bytes(2 * PAGE - 3))
    child = mm.fork()
    done: list[str] = []

    def at(label: str) -> None:
        if label != "mm.cow.copied" or done:
            return
        done.append(label)
        if meanwhile == "dontneed":
            mm.madvise(start, PAGE, MADV_DONTNEED)
        else:
            mm.write(start + 8, b"other")

    with on_point(at):
        mm.write(start, b"new")
    assert mm.read(start + 8, 5) == (b"other" if meanwhile == "copied" else bytes(5))
    assert child.read(start, 3) == b"old"
    child.exit()
    verify(host)


def test_reuse_keeps_the_frame(mm: Mm, host: HostMemory) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"x")
    child = mm.fork()
    assert (host.refcount(1), host.mapcount(1)) == (2, 2)
    assert mm.get_user_pages(start, write=False) == GupPage(1, False)
    child.exit()
    assert mm.get_user_pages(start, write=True) == GupPage(1, True)
    assert flags(mm, start) & EXCLUSIVE


def test_a_page_that_somebody_holds_is_copied(mm: Mm, host: HostMemory) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"x")
    mm.fork().exit()
    host.get(1)
    assert mm.get_user_pages(start, write=True) == GupPage(2, True)
    host.put(1)


def test_the_child_can_end_up_as_the_owner(mm: Mm, host: HostMemory) -> None:
    start = mm.mmap(PAGE, RW)
    mm.write(start, b"from the parent")
    child = mm.fork()
    mm.exit()
    child.write(start, b"F")
    assert child.get_user_pages(start, write=True) == GupPage(1, True)
    assert child.read(start, 15) == b"From the parent"
    assert host.mapping(1) == child.vmas[0].anon_vma.id  # type: ignore[union-attr]
    grandchild = child.fork()
    child.exit()
    assert grandchild.read(start, 15) == b"From the parent"


def test_shared_anonymous_memory(mm: Mm, host: HostMemory) -> None:
    start = mm.mmap(2 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS)
    mm.write(start, b"x")
    child = mm.fork()
    assert child.read(start, 1) == b"x"
    child.write(start, b"child")
    child.write(start + PAGE, b"more")
    assert mm.read(start, 5) == b"child"
    mm.exit()
    assert child.read(start + PAGE, 4) == b"more"
    child.exit()
    assert host.free_frames == host.nr_frames - 1


def test_the_fault_event(mm: Mm, events: list[Event]) -> None:
    start = mm.mmap(PAGE, RW)
    mm.get_user_pages(start + 7, write=False)
    mm.get_user_pages(start, write=True)
    mm.mprotect(start, PAGE, R)
    with pytest.raises(MmError):
        mm.get_user_pages(start, write=True)
    faults = [event.fields for event in events if event.kind == "mm_fault"]
    assert faults == [
        {"mm": "mm0", "hva": start, "access": "read", "result": "zero"},
        {"mm": "mm0", "hva": start, "access": "write", "result": "cow"},
        {"mm": "mm0", "hva": start, "access": "write", "result": "sigsegv"},
    ]
    copies = [event.fields for event in events if event.kind == "mm_cow"]
    assert copies == [{"mm": "mm0", "hva": start, "old": 0, "new": 1}]
