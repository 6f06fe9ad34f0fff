"""SVA: a device on the host's own page table; the IOTLB follows the host's TLBs, page requests bring pages in."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from xipvm.actors import on_point
from xipvm.errors import AtomicSleepError, MmError, ProtocolUnsupported
from xipvm.mmu.pte import ACCESSED, DIRTY
from xipvm.mmu.secondary.base import FAULT, READ
from xipvm.mmu.secondary.sva import Sva, SvaError
from xipvm.mmu.secondary.sva_dma import SvaSpace
from xipvm.notifier import ULONG_MAX, MmuNotifier
from xipvm.testing import MADV_DONTNEED, MADV_PAGEOUT, PAGE_SIZE, Event, Mm, Scene, might_sleep, plain_scene
from xipvm.testing import PROT_READ as R
from xipvm.testing import PROT_WRITE as W


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = plain_scene()
    try:
        yield scene
        scene.run()
    finally:
        scene.close()


def furnish(scene: Scene, pages: int = 4) -> tuple[Mm, int, Sva]:
    mm = scene.mm()
    return mm, mm.mmap(pages * PAGE_SIZE, R | W), scene.watch(Sva(mm))


def recorded(scene: Scene, *kinds: str) -> list[str]:
    said: list[str] = []

    def sink(event: Event) -> None:
        if event.kind in kinds:
            said.append(event.kind)

    scene.trace.attach(sink)
    return said


def test_a_device_reads_and_writes_what_the_process_has(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    mm.write(hva + PAGE_SIZE - 3, b"across a page")
    assert device.load(hva + PAGE_SIZE - 3, 13) == b"across a page"
    assert device.requests == 0, "the walk is the hardware's"
    device.store(hva + 2 * PAGE_SIZE - 4, b"and back")
    assert mm.read(hva + 2 * PAGE_SIZE - 4, 8) == b"and back"
    assert device.requests == 1
    assert sorted(page - hva // PAGE_SIZE for page in device.iotlb) == [0, 1, 2]


def test_a_walk_marks_entries_as_a_cpu_does(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    mm.write(hva, b"x")
    page = hva // PAGE_SIZE
    mm.pgd.clear_bits(page, page + 1, ACCESSED | DIRTY)
    device.load(hva, 1)
    assert mm.pgd.pte(page) & (ACCESSED | DIRTY) == ACCESSED


def test_it_is_told_of_the_host_s_flushes_only(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    said = recorded(scene, "mmu_notifier_arch_invalidate_secondary_tlbs", "iotlb_drop", "page_free")
    device.store(hva, b"x")
    mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
    assert said == ["mmu_notifier_arch_invalidate_secondary_tlbs", "iotlb_drop", "page_free"]
    assert device.load(hva, 1) == bytes(1)


def test_all_behind_an_address(scene: Scene) -> None:
    _, hva, device = furnish(scene)
    for page in range(4):
        device.store(hva + page * PAGE_SIZE, b"x")
    device.arch_invalidate_secondary_tlbs(hva + 2 * PAGE_SIZE, ULONG_MAX)
    assert sorted(page - hva // PAGE_SIZE for page in device.iotlb) == [0, 1]
    device.arch_invalidate_secondary_tlbs(hva, hva + 1)
    assert sorted(page - hva // PAGE_SIZE for page in device.iotlb) == [1]
    device.arch_invalidate_secondary_tlbs(0, ULONG_MAX)
    assert device.iotlb == {}


def test_a_right_that_is_raised_needs_no_word(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    assert device.load(hva, 1) == bytes(1)
    assert device.translate(hva // PAGE_SIZE) == (0, False), "the zero page"
    mm.write(hva, b"x")
    device.store(hva, b"y")
    assert mm.read(hva, 1) == b"y"


def test_a_copy_on_write_for_the_device(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    device.store(hva, b"before")
    child = mm.fork("child")
    device.store(hva, b"behind")
    assert child.read(hva, 6) == b"before"
    assert mm.read(hva, 6) == b"behind"
    child.exit()


def test_pages_come_back_from_swap(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    mm.swapon(8)
    device.store(hva, b"kept")
    mm.madvise(hva, PAGE_SIZE, MADV_PAGEOUT)
    assert device.iotlb == {}
    assert device.load(hva, 4) == b"kept"


@pytest.mark.parametrize("where", ["unmapped", "read-only", "beyond"])
def test_an_error_is_the_device_s(scene: Scene, where: str) -> None:
    mm, hva, device = furnish(scene)
    if where == "unmapped":
        mm.munmap(hva + PAGE_SIZE, PAGE_SIZE)
    elif where == "read-only":
        mm.mprotect(hva + PAGE_SIZE, PAGE_SIZE, R)
    base = (1 << 47) - 4 if where == "beyond" else hva + PAGE_SIZE - 4
    with pytest.raises(SvaError) as error:
        device.store(base, b"12345678")
    assert error.value.errno == errno.EFAULT
    if where != "beyond":
        assert error.value.hva == hva + PAGE_SIZE
        assert mm.read(hva + PAGE_SIZE - 4, 4) == b"1234", "what came before stays"


def test_the_end_of_the_process(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    said = recorded(scene, "mmu_notifier_release", "iotlb_drop", "page_free")
    device.store(hva, b"x")
    mm.exit()
    assert said == ["mmu_notifier_release", "iotlb_drop", "page_free"]
    with pytest.raises(SvaError) as error:
        device.load(hva, 1)
    assert error.value.errno == errno.ESRCH
    assert device.fault(hva // PAGE_SIZE, READ) == FAULT


def test_unbinding(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    device.store(hva, b"x")
    assert device.describe(hva // PAGE_SIZE).endswith("has frame 0x1 rw; bound to mm0")
    device.destroy()
    device.destroy()
    assert len(mm.notifiers) == 0
    assert device.iotlb == {}
    with pytest.raises(SvaError):
        device.load(hva, 1)
    other = scene.watch(Sva(mm, "sva1"))
    assert other.load(hva, 1) == b"x"


def test_what_follows_tlbs_has_no_ranges_and_is_of_today() -> None:
    class Both(Sva):
        def invalidate_range_start(self, range: object) -> int:
            return 0

    scene = plain_scene()
    mm = scene.mm()
    with pytest.raises(MmError) as refused:
        Both(mm)
    assert refused.value.errno == errno.EINVAL
    assert issubclass(Sva, MmuNotifier)
    scene.run()
    scene.close()
    scene = plain_scene(protocol="2008")
    with pytest.raises(ProtocolUnsupported):
        Sva(scene.mm())
    scene.run()
    scene.close()


def test_it_may_not_sleep_when_it_is_told() -> None:
    class Slow(Sva):
        def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
            might_sleep("the IOMMU's queue")

    scene = plain_scene()
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, R | W)
    device = Slow(mm)
    mm.write(hva, b"x")
    with pytest.raises(AtomicSleepError, match="the IOMMU's queue may sleep"):
        mm.munmap(hva, PAGE_SIZE)
    device.destroy()
    scene.close()


def test_a_page_that_goes_while_it_is_asked_for(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    gone: list[str] = []

    def drop(label: str) -> None:
        if label == "sva.page_response" and not gone:
            gone.append(label)
            mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)

    with on_point(drop):
        device.store(hva, b"x")
    assert gone
    assert device.requests == 2
    assert mm.read(hva, 1) == b"x"


def test_regions_are_bounds_and_rights(scene: Scene) -> None:
    mm, hva, device = furnish(scene)
    space = SvaSpace(device, lambda address, length: hva + address if address + length <= 4 * PAGE_SIZE else None)
    key = space.register(0x10, 2 * PAGE_SIZE, write=True)
    looked_at = space.register(0, PAGE_SIZE, write=False)
    assert device.iotlb == {}
    assert space.faults == 0
    space.write(key, PAGE_SIZE + 0x10, (5).to_bytes(8, "little"))
    assert space.fetch_add(key, PAGE_SIZE + 0x10, 7) == 5
    assert space.read(key, PAGE_SIZE + 0x10, 8) == (12).to_bytes(8, "little")
    assert space.faults == 1

    def error(function: object, *arguments: object, **named: object) -> int:
        with pytest.raises(MmError) as refused:
            function(*arguments, **named)  # type: ignore[operator]
        return refused.value.errno

    assert error(space.write, looked_at, 0, b"x") == errno.EPERM
    assert error(space.read, key, 0xC, 8) == errno.EFAULT
    assert error(space.read, key, 2 * PAGE_SIZE + 0xC, 8) == errno.EFAULT
    assert error(space.fetch_add, key, 0x14, 1) == errno.EINVAL
    assert error(space.register, 3 * PAGE_SIZE, 2 * PAGE_SIZE, write=True) == errno.EFAULT
    assert error(space.register, 0, 0, write=True) == errno.EINVAL
    space.deregister(key)
    assert error(space.read, key, 0x10, 8) == errno.EINVAL
    assert error(space.deregister, key) == errno.EINVAL
    space.close()
    assert error(space.read, looked_at, 0, 8) == errno.EINVAL
    assert mm.read(hva + PAGE_SIZE + 0x10, 1) == b"\x0c"
