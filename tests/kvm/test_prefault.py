"""KVM_PRE_FAULT_MEMORY: what is mapped ahead of the guest, and where it ends."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from xipvm.errors import MmError
from xipvm.mmu.frames import HUGE_PAGES
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_COLLAPSE
from xipvm.notifier import RangeEvent

PAGE = 4096
GFN = 0x10


def test_the_guest_does_not_fault_behind_it(world: Any) -> None:
    hva = world.slot(8, GFN)
    for page in range(8):
        world.mm.write(hva + page * PAGE, b"page %d" % page)
    assert world.kvm.pre_fault_memory((GFN + 1) * PAGE, 4 * PAGE) == ((GFN + 5) * PAGE, 0)
    with world.watching("kvm_page_fault") as log:
        assert [world.read(GFN + page, 6) for page in range(1, 5)] == [b"page %d" % page for page in range(1, 5)]
    assert log == []
    assert world.kvm.translate(GFN) is None
    assert world.kvm.translate(GFN + 5) is None


def test_the_slot_ends_before(world: Any) -> None:
    """It says how far it came; the next call finds nothing."""
    world.slot(8, GFN)
    left = world.kvm.pre_fault_memory((GFN + 6) * PAGE, 5 * PAGE)
    assert left == ((GFN + 8) * PAGE, 3 * PAGE)
    with pytest.raises(MmError) as caught:
        world.kvm.pre_fault_memory(*left)
    assert caught.value.errno == errno.ENOENT


def test_huge_pages_are_one_step(world: Any) -> None:
    hva = -(-world.ram(2 * HUGE_PAGES) // HPAGE_SIZE) * HPAGE_SIZE
    world.mm.write(hva, b"x")
    world.mm.madvise(hva, HPAGE_SIZE, MADV_COLLAPSE)
    world.kvm.set_memslot(0, HUGE_PAGES, HUGE_PAGES, hva)
    with world.watching("kvm_page_fault") as log:
        assert world.kvm.pre_fault_memory((HUGE_PAGES + 7) * PAGE, HPAGE_SIZE - 7 * PAGE)[1] == 0
    assert log == ["kvm_page_fault"]


@pytest.mark.parametrize(
    ("gpa", "size", "error"),
    [
        (GFN * PAGE + 1, PAGE, errno.EINVAL),
        (GFN * PAGE, 100, errno.EINVAL),
        (GFN * PAGE, 0, errno.EINVAL),
        (GFN * PAGE, -PAGE, errno.EINVAL),
        (-PAGE, PAGE, errno.EINVAL),
        (0, PAGE, errno.ENOENT),
        (0x9000 * PAGE, PAGE, errno.ENOENT),
        ((GFN + 9) * PAGE, PAGE, errno.EFAULT),
    ],
)
def test_errors(world: Any, gpa: int, size: int, error: int) -> None:
    world.kvm.mmio_lookup = lambda at: at == 0x9000 * PAGE
    world.slot(8, GFN)
    world.kvm.set_memslot(1, GFN + 8, 8, world.ram(8, 0))
    with pytest.raises(MmError) as caught:
        world.kvm.pre_fault_memory(gpa, size)
    assert caught.value.errno == error


def test_an_open_range(world: Any) -> None:
    hva = world.slot(8, GFN)
    with (
        world.mm.notifiers.invalidate_range(hva, hva + PAGE, RangeEvent.CLEAR),
        pytest.raises(MmError) as caught,
    ):
        world.kvm.pre_fault_memory(GFN * PAGE, PAGE)
    assert caught.value.errno == errno.EDEADLK
