"""Writes from elsewhere: through /proc/pid/mem, and by another process."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import WRITE
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED
from xipvm.trace.funnel import Trace

PAGE = 4096
NONE, R, RW = 0, 1, 3
COPIED = ["clear 1", "tlb", "set", "E"]
Steps = Callable[[], list[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(16)))
    return path


@pytest.fixture
def disk(host: HostMemory, trace: Trace, path: Path) -> Iterator[HostFile]:
    """Page n holds the byte n; all of it is cached."""
    disk = HostFile(host, trace, str(path), writable=True)
    disk.readahead(0, 16)
    yield disk
    verify(host)


# ---- forced writes


@pytest.mark.parametrize("prot", [NONE, R])
def test_a_forced_write_into_an_exclusive_page_tells_nobody(mm: Mm, steps: Steps, prot: int) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.write(start, b"old" + bytes(2 * PAGE - 3))
    mm.mprotect(start, 2 * PAGE, prot)
    steps()
    assert mm.access_remote_vm(start + PAGE - 2, b"four") == 4
    assert steps() == []
    mm.mprotect(start, 2 * PAGE, R)
    assert mm.read(start + PAGE - 2, 4) == b"four"
    with pytest.raises(MmError):
        mm.write(start, b"x")


def test_a_forced_write_copies_what_is_shared(mm: Mm, host: HostMemory, disk: HostFile, steps: Steps) -> None:
    start = mm.mmap(4 * PAGE, R, MAP_PRIVATE, file=disk)
    mm.read(start, 1)
    steps()
    mm.access_remote_vm(start + PAGE, b"forced")
    assert steps() == ["alloc", "S CLEAR 1-2", *COPIED]
    assert not mm.pgd.get((start >> 12) + 1) & WRITE
    assert (mm.read(start + PAGE, 6), disk.pread(PAGE, 6)) == (b"forced", b"\1" * 6)
    child = mm.fork()
    mm.access_remote_vm(start + PAGE, b"parent")
    assert child.read(start + PAGE, 6) == b"forced"
    verify(host)


@pytest.mark.parametrize("prot", [NONE, R])
def test_a_forced_write_to_what_is_not_there(mm: Mm, host: HostMemory, disk: HostFile, steps: Steps, prot: int) -> None:
    for start in (mm.mmap(PAGE, prot), mm.mmap(PAGE, prot, MAP_PRIVATE, file=disk)):
        steps()
        mm.access_remote_vm(start, b"forced")
        assert steps() == ["alloc", "set"]
        assert not mm.pgd.get(start >> 12) & WRITE
        verify(host)
        mm.mprotect(start, PAGE, RW)
        assert mm.read(start, 6) == b"forced"
        assert mm.get_user_pages(start, write=False).writable


def test_what_cannot_be_forced(mm: Mm, disk: HostFile) -> None:
    shared = mm.mmap(PAGE, R, MAP_SHARED, file=disk)
    for start in (shared, shared - 64 * PAGE):
        with pytest.raises(MmError) as raised:
            mm.access_remote_vm(start, b"x")
        assert raised.value.errno == errno.EIO
    private = mm.mmap(PAGE, R, addr=shared - 64 * PAGE)
    assert mm.access_remote_vm(private + PAGE - 2, b"four") == 2
    mm.mprotect(shared, PAGE, RW)
    assert mm.access_remote_vm(shared, b"shared") == 6
    assert disk.fsync() == 1


def test_another_process_writes(mm: Mm, steps: Steps) -> None:
    start = mm.mmap(2 * PAGE, RW)
    mm.read(start, 1)
    steps()
    assert mm.process_vm_writev(start, b"remote") == 6
    assert steps() == ["alloc", "S CLEAR 0-1", *COPIED]
    assert mm.process_vm_writev(start + 2 * PAGE - 2, b"four") == 2
    mm.mprotect(start, 2 * PAGE, R)
    with pytest.raises(MmError) as raised:
        mm.process_vm_writev(start, b"x")
    assert raised.value.errno == errno.EFAULT
