"""A driver's own secondary MMU in a scene: windows, what it says, and what is checked at the end."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.run.command import inside
from xipvm.explore.choices import Recording
from xipvm.testing import (
    FAULT,
    MADV_DONTNEED,
    PAGE_SIZE,
    READ,
    RETRY_WALK,
    WRITE,
    BrokenError,
    DeviceMmu,
    GuestAccessError,
    Mm,
    MmError,
    MmuNotifierRange,
    Scene,
    TraceLog,
    open_scene,
)

PAGES = 4


class Mirror(DeviceMmu):
    """Enters what is faulted in, removes what is invalidated; says so, as far as a test wants it to."""

    def __init__(self, mm: Mm, hva: int, *, removes: bool = True, says: bool = True) -> None:
        super().__init__(mm, name="mirror")
        self.table: dict[int, tuple[int, bool]] = {}
        self.removes = removes
        self.says = says
        self.map_window(hva, PAGES, page=0x10)
        mm.notifiers.register(self)

    def fault(self, page: int, access: int) -> int:
        hva = self.hva_of(page)
        if hva is None:
            self.last_error = "outside"
            return FAULT
        found = self.mm.get_user_pages(hva, write=access == WRITE)
        self.table[page] = found.pfn, access == WRITE
        if self.says:
            self.installed(page, found.pfn, write=access == WRITE)
        return RETRY_WALK

    def translate(self, page: int) -> tuple[int, bool] | None:
        return self.table.get(page)

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        if self.removes:
            for first, last in self.pages_in(range.start, range.end):
                self.table = {page: entry for page, entry in self.table.items() if not first <= page < last}
                self.zapped(first, last)
            self.flush_remote_tlbs("invalidate")
        return 0

    def release(self, mm: object) -> None:
        self.table.clear()
        self.zapped(0, 1 << 20)


def test_its_words_are_events_that_the_oracle_judges() -> None:
    with open_scene() as scene:
        log = TraceLog()
        scene.trace.attach(log)
        mm = scene.mm()
        hva = mm.mmap(PAGES * PAGE_SIZE, 3)
        mirror = scene.watch(Mirror(mm, hva))
        device = scene.vcpu(mirror)
        device.store(0x11, b"x")
        assert mm.read(hva + PAGE_SIZE, 1) == b"x"
        mm.madvise(hva, PAGES * PAGE_SIZE, MADV_DONTNEED)
        assert log.count("spte_set", vm="mirror", gfn=0x11, rights="rw", hva=hva + PAGE_SIZE) == 1
        assert log.count("spte_zap") == 1  # three of the pages were never there
        log.order("spte_set", "tlb_insert", "spte_zap", "tlb_flush", "pte_clear", "page_free")
    assert scene.oracle.checks["I3"] > 0
    assert scene.oracle.checks["I4"] == 1
    log.order("page_free", "mmu_notifier_unregister", "mm_exit")


def give_back(*, removes: bool, says: bool) -> None:
    """The process gives a page back that a mirror has an entry of."""
    with open_scene() as scene:
        mm = scene.mm()
        hva = mm.mmap(PAGES * PAGE_SIZE, 3)
        scene.watch(Mirror(mm, hva, removes=removes, says=says)).fault(0x10, WRITE)
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)


def overreach() -> None:
    """A mirror grants a right that the process has not."""
    with open_scene() as scene:
        mm = scene.mm()
        mirror = scene.watch(Mirror(mm, mm.mmap(PAGES * PAGE_SIZE, 3), says=False))
        mirror.fault(0x10, READ)
        mirror.table[0x10] = mirror.table[0x10][0], True


def test_what_it_says_it_still_has_breaks_an_invariant() -> None:
    give_back(removes=True, says=True)
    with pytest.raises(BrokenError, match=r"^I3: .* mirror's entry of guest frame 0x10 "):
        give_back(removes=False, says=True)


def test_what_it_does_not_say_is_found_at_the_end() -> None:
    give_back(removes=True, says=False)
    with pytest.raises(AssertionError, match="mirror maps guest frame 0x10 to "):
        give_back(removes=False, says=False)


def test_more_rights_than_the_host_has_are_found_at_the_end() -> None:
    with pytest.raises(AssertionError, match=r"mirror maps guest frame 0x10 to \(0, True\)"):
        overreach()


def test_windows() -> None:
    with open_scene() as scene:
        mm = scene.mm()
        hva = mm.mmap(PAGES * PAGE_SIZE, 3)
        mirror = scene.watch(Mirror(mm, hva))
        mirror.map_window(hva + PAGE_SIZE, 1, page=0)
        assert [mirror.hva_of(page) for page in (0, 1, 0x10, 0x13, 0x14)] == [
            hva + PAGE_SIZE, None, hva, hva + 3 * PAGE_SIZE, None,
        ]  # fmt: skip
        assert mirror.pages_in(hva + PAGE_SIZE, hva + PAGE_SIZE + 1) == [(0, 1), (0x11, 0x12)]
        assert [page for page, _ in mirror.backing()] == [0, 0x10, 0x11, 0x12, 0x13]
        for page, pages, at, error in (
            (0x13, 1, hva, errno.EEXIST),
            (0x20, 0, hva, errno.EINVAL),
            (0x20, 1, 5, errno.EINVAL),
        ):
            with pytest.raises(MmError) as refused:
                mirror.map_window(at, pages, page=page)
            assert refused.value.errno == error
        with pytest.raises(GuestAccessError, match="outside"):
            scene.vcpu(mirror).load(0x40)
        assert mirror.describe(0x40) == "page 0x40 of mirror: nothing; no window"
        mirror.fault(0x10, WRITE)
        assert mirror.describe(0x10) == f"page 0x10 of mirror: frame {mirror.table[0x10][0]:#x} rw; hva {hva:#x}"


def test_a_window_goes_when_nothing_is_in_it() -> None:
    with open_scene() as scene:
        mm = scene.mm()
        hva = mm.mmap(PAGES * PAGE_SIZE, 3)
        mirror = scene.watch(Mirror(mm, hva))
        window = mirror.map_window(hva, 1, page=0)
        mirror.fault(0, WRITE)
        with pytest.raises(MmError) as refused:
            mirror.unmap_window(window)
        assert refused.value.errno == errno.EBUSY
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
        mirror.unmap_window(window)
        assert mirror.hva_of(0) is None
        with pytest.raises(MmError) as refused:
            mirror.unmap_window(window)
        assert refused.value.errno == errno.EINVAL
        assert mirror.map_window(hva, 1, page=0).id == window.id  # another one
        assert mirror.hva_of(0) == hva


def test_a_device_reaches_whatever_the_frame_holds_by_now() -> None:
    with open_scene() as scene:
        mm = scene.mm()
        hva = mm.mmap(PAGE_SIZE, 3)
        mm.write(hva, b"before")
        mirror = scene.watch(Mirror(mm, hva))
        pfn = mm.get_user_pages(hva, write=True).pfn
        mirror.dma_write(pfn, b"BE", offset=0)
        assert mirror.dma_read(pfn, 6) == b"BEfore"
        mm.munmap(hva, PAGE_SIZE)
        assert mirror.dma_read(pfn, 6) == b"kkkkkk"  # poison


def test_a_broken_scene_is_not_judged_again() -> None:
    scene = Scene(Recording(lambda question: 0))
    try:
        scene.mm()
        scene.trace.emit("page_free", pages=[(1, 1)])
        with pytest.raises(BrokenError, match="I5"):
            scene.trace.emit("page_free", pages=[(1, 1)])
        scene.run()
    finally:
        scene.close()


def test_destroying_twice_is_once() -> None:
    with open_scene() as scene:
        mm = scene.mm()
        mirror = scene.watch(Mirror(mm, mm.mmap(PAGES * PAGE_SIZE, 3)))
        mirror.fault(0x10, READ)
        mirror.destroy()
        mirror.destroy()
        assert mirror.translate(0x10) is None


READER = """
from xipvm.testing import MADV_DONTNEED, PAGE_SIZE, Scene, scenario


@scenario(protocols=("modern",))
def reader(scene: Scene) -> None:
    '''A vCPU that reads a page which the host gives away.'''
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, 3)
    kvm = scene.kvm(mm, hva)
    kvm._zap = lambda start, end: None
    vcpu = scene.vcpu(kvm)
    vcpu.store(0, b"mine")

    def work() -> None:
        vcpu.load(0)
        vcpu.load(0, 4)

    def give_away() -> None:
        mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)
        other = scene.mm()
        other.write(other.mmap(PAGE_SIZE, 3), b"another's")

    scene.actor("host", give_away)
    scene.actor("vcpu0", work)
"""


def test_a_report_tells_what_the_guest_reads_from_a_page_that_is_another_s(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(READER)
    outcome = inside("explore", "mine.py:reader", "--runs", 50, cwd=tmp_path)
    assert outcome.status == 1, outcome
    assert "I3 broken at event #" in outcome.out
    assert "     missing  spte_zap of guest frame 0x0 by vm0\n" in outcome.out
    assert "    it holds 6d 69 6e 65 00" in outcome.out
    assert "what comes of it, if the run goes on in the plain order:\n" in outcome.out
    assert f"  vcpu0 reads {b'another'.hex(' ')} 27 at guest frame 0x0, in frame 0x1, which is mapped at" in outcome.out
    again = inside("replay", "reader.xipvm.json", cwd=tmp_path)
    assert f"  vcpu0 reads {b'another'.hex(' ')} 27 at guest frame 0x0" in again.out
