"""The GRU: drop-ins, ranges, chiplets and ASIDs, in both notifier protocols."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from xipvm.actors import on_point
from xipvm.errors import MmError
from xipvm.mmu.pageout import pageout
from xipvm.mmu.pte import DIRTY, PRESENT
from xipvm.mmu.secondary.base import FAULT, MMIO, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.gru import FLUSH_ALL, Gru, GruBase
from xipvm.mmu.secondary.gru_2008 import Gru2008, gru_of
from xipvm.mmu.secondary.gru_hardware import CHIPLETS, CONTEXTS, GRUMAXINVAL, Chiplet, Tfh, TfhState
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY
from xipvm.testing import MADV_DONTNEED, PAGE_SIZE, Event, GuestAccessError, Mm, RangeEvent, Scene, plain_scene
from xipvm.testing import PROT_READ as R
from xipvm.testing import PROT_WRITE as W

GFN = 0x10
RW = R | W


@pytest.fixture(params=["modern", "2008"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    scene = plain_scene(protocol=request.param)
    try:
        yield scene
        scene.run()
    finally:
        scene.close()


def furnish(scene: Scene, pages: int = 2) -> tuple[Mm, int, GruBase]:
    mm = scene.mm()
    hva = mm.mmap(pages * PAGE_SIZE, RW)
    return mm, hva, scene.gru(mm, hva, pages=pages, gfn=GFN)


def watched(scene: Scene, prefix: str = "tlb_") -> list[Event]:
    events: list[Event] = []

    def sink(event: Event) -> None:
        if event.kind.startswith(prefix):
            events.append(event)

    scene.trace.attach(sink)
    return events


def kinds(events: list[Event]) -> list[str]:
    said = [event.kind.removeprefix("tlb_") for event in events]
    events.clear()
    return said


# ---- drop-ins


def test_a_miss_is_a_fault_and_a_hit_is_none(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu, events = scene.vcpu(gru), watched(scene)
    mm.write(hva, b"from the host")
    assert vcpu.load(GFN, 13) == b"from the host"
    assert kinds(events) == ["miss", "dropin", "insert"]
    assert vcpu.load(GFN, 4) == b"from"
    assert kinds(events) == []
    vcpu.store(GFN, b"FROM")
    assert kinds(events)[-3:] == ["miss", "dropin", "insert"], "what was read may not be written"
    vcpu.flush_tlb("test")
    assert vcpu.load(GFN, 4) == b"FROM"
    assert kinds(events) == ["flush", "insert"], "the chiplet has it still"
    assert gru.sptes.present == 0


def test_the_interrupt_serves_what_is_there_and_leaves_the_rest_to_be_polled(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu = scene.vcpu(gru)
    labels: list[str] = []
    with on_point(labels.append):
        mm.write(hva, b"x")
        labels.clear()
        vcpu.load(GFN)
        assert "gru.polling" not in labels
        vcpu.load(GFN + 1)
        assert "gru.polling" in labels


def test_a_write_has_the_page_looked_up_for_writing(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu = scene.vcpu(gru)
    mm.write(hva, b"x")
    page = hva // PAGE_SIZE
    mm.pgd.clear_bits(page, page + 1, DIRTY)
    vcpu.load(GFN)
    assert not mm.pgd.pte(page) & DIRTY
    vcpu.store(GFN, b"y")
    assert mm.pgd.pte(page) & DIRTY
    mm.swapon(8)
    while mm.pgd.pte(page) & PRESENT:  # in 2008 a page that was used gets a second chance
        pageout(mm, hva, hva + PAGE_SIZE)
    assert gru.translate(GFN) is None
    assert vcpu.load(GFN, 1) == b"y"


def test_an_invalidation_between_handle_and_dropin_discards_it(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu, events = scene.vcpu(gru), watched(scene)
    mm.write(hva, b"old")
    done: list[str] = []

    def drop(label: str) -> None:
        if label == "gru.dropin.looked_up" and not done:
            done.append(label)
            mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)

    with on_point(drop):
        assert vcpu.load(GFN, 3) == bytes(3)
    assert done
    retries = [event.fields["reason"] for event in events if event.kind == "tlb_retry"]
    assert retries == ["discarded"]


def test_who_finds_a_range_open_sleeps_until_it_ends(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu, events = scene.vcpu(gru), watched(scene)
    mm.write(hva, b"there")
    far = mm.mmap(PAGE_SIZE, RW)
    opened = mm.notifiers.invalidate_range_start(far, far + PAGE_SIZE, RangeEvent.UNMAP)
    slept: list[int] = []

    def end(label: str) -> None:
        if label == "gru.wait":
            slept.append(gru.range_active)
            mm.notifiers.invalidate_range_end(opened)

    with on_point(end):
        assert vcpu.load(GFN, 5) == b"there"
    assert slept == [1]
    assert kinds(events) == ["miss", "retry", "dropin", "insert"]
    assert gru.range_active == 0


def test_nobody_sleeps_who_could_never_be_woken(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu = scene.vcpu(gru)
    opened = mm.notifiers.invalidate_range_start(hva, hva + PAGE_SIZE, RangeEvent.UNMAP)
    with pytest.raises(GuestAccessError, match="a range of mm0 is open"):
        vcpu.load(GFN)
    mm.notifiers.invalidate_range_end(opened)
    assert vcpu.load(GFN) == bytes(8)


# ---- ranges


@pytest.mark.parametrize("pages", [GRUMAXINVAL, GRUMAXINVAL + 1, 3 * GRUMAXINVAL + 7])
def test_ranges_longer_than_a_command(scene: Scene, pages: int) -> None:
    mm, hva, gru = furnish(scene, pages)
    vcpu, events = scene.vcpu(gru), watched(scene)
    places = [0, GRUMAXINVAL - 1, pages - 1]
    for at in places:
        vcpu.store(GFN + at, b"x")
    kinds(events)
    labels: list[str] = []
    with on_point(labels.append):
        mm.munmap(hva, pages * PAGE_SIZE)
    assert labels.count("gru.flush.command") == -(-pages // GRUMAXINVAL)
    assert [gru.translate(GFN + at) for at in places] == [None] * 3
    assert vcpu.tlb == {}


def test_the_hardware_leaves_what_is_beyond_a_command() -> None:
    space = Chiplet(0).join()
    space.asid = 8
    for page in (5, 5 + GRUMAXINVAL):
        tfh = Tfh()
        tfh.miss(page, 8, True)
        assert tfh.read()
        assert space.drop_in(tfh, 8, 7, True)
    assert space.invalidate(5, 2 * GRUMAXINVAL) == [(7, 1)]
    assert space.entry(5) is None
    assert space.entry(5 + GRUMAXINVAL) == (7, True)


def test_a_range_beyond_all_measure_gives_the_asid_up(scene: Scene) -> None:
    mm, hva, gru = furnish(scene, FLUSH_ALL)
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN + FLUSH_ALL - 1, b"x")
    before = gru.spaces[0].asid
    labels: list[str] = []
    with on_point(labels.append):
        mm.munmap(hva, FLUSH_ALL * PAGE_SIZE)
    assert "gru.flush.command" not in labels
    assert gru.spaces[0].asid not in (0, before)
    assert gru.translate(GFN + FLUSH_ALL - 1) is None


def test_a_chiplet_without_contexts_forgets_the_mm(scene: Scene) -> None:
    mm, hva, gru = furnish(scene)
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN, b"x")
    space, context = gru.spaces[0], gru.port(0)
    before = space.asid
    context.unload()
    assert vcpu.tlb == {}
    assert (space.asid, gru.translate(GFN)) == (before, (mm.pgd.gup(hva // PAGE_SIZE, False).pfn, True))  # type: ignore[union-attr]
    assert vcpu.load(GFN, 1) == b"x"
    assert space.asid == before, "it comes back to what it had"
    context.unload()
    mm.madvise(hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    mm.write(hva + PAGE_SIZE, b"y")
    mm.madvise(hva + PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
    assert (space.asid, gru.translate(GFN)) == (0, None)
    assert vcpu.load(GFN, 1) == b"x"
    assert space.asid not in (0, before)


def test_two_processes_on_one_chiplet(scene: Scene) -> None:
    worlds = [furnish(scene), furnish(scene)]
    vcpus = [scene.vcpu(gru) for _, _, gru in worlds]
    for vcpu in vcpus:
        vcpu.store(GFN, b"x")
    (one, hva, first), (_, _, second) = worlds
    assert first.spaces[0].chiplet is second.spaces[0].chiplet
    assert first.spaces[0].asid != second.spaces[0].asid
    one.munmap(hva, 2 * PAGE_SIZE)
    assert first.translate(GFN) is None
    assert second.translate(GFN) is not None
    assert GFN in vcpus[1].tlb


def test_contexts_of_one_chiplet_share_its_tlb(scene: Scene) -> None:
    _, _, gru = furnish(scene)
    vcpus = [scene.vcpu(gru) for _ in range(CHIPLETS + 1)]
    vcpus[0].store(GFN, b"x")
    events = watched(scene)
    vcpus[1].load(GFN)
    assert kinds(events) == ["miss", "dropin", "insert"]
    vcpus[CHIPLETS].load(GFN)
    assert kinds(events) == ["miss", "insert"], "it had to be loaded, and its chiplet knew the page"


def test_the_hardware_has_so_many_contexts(scene: Scene) -> None:
    _, _, gru = furnish(scene)
    for number in range(CHIPLETS * CONTEXTS):
        gru.port(number).load()
    with pytest.raises(MmError) as refused:
        gru.port(CHIPLETS * CONTEXTS)
    assert refused.value.errno == errno.EAGAIN
    mm = scene.mm()
    other = scene.gru(mm, mm.mmap(PAGE_SIZE, RW), gfn=GFN)
    assert other.port(0).fault(GFN, READ) == FAULT
    assert "EAGAIN" in other.port(0).last_error


# ---- coming and going


def test_an_mm_has_one(scene: Scene) -> None:
    mm, _, gru = furnish(scene)
    again = gru_of(mm, scene.trace, scene.host)
    assert again is gru
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN, b"x")
    again.destroy()
    assert gru.translate(GFN) is not None
    assert len(mm.notifiers) == 1
    gru.destroy()
    assert gru.translate(GFN) is None
    assert len(mm.notifiers) == 0
    gru.destroy()
    another = scene.gru(mm, mm.mmap(PAGE_SIZE, RW), gfn=GFN)
    assert another is not gru


def test_the_end_of_the_process(scene: Scene) -> None:
    mm, _, gru = furnish(scene)
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN, b"x")
    mm.exit()
    assert vcpu.tlb == {}
    with pytest.raises(GuestAccessError, match="has lost its address space"):
        vcpu.load(GFN)
    with pytest.raises(MmError):
        gru_of(mm, scene.trace, scene.host)


def test_today_it_is_given_back_and_not_released() -> None:
    scene = plain_scene()
    _, _, gru = furnish(scene)
    assert isinstance(gru, Gru)
    events = watched(scene, "mmu_notifier_")
    gru.destroy()
    assert [event.kind for event in events] == ["mmu_notifier_put"]
    scene.run()
    scene.close()


def test_2008_a_page_is_flushed_without_counting() -> None:
    scene = plain_scene(protocol="2008")
    mm, hva, gru = furnish(scene)
    assert isinstance(gru, Gru2008)
    vcpu, events = scene.vcpu(gru), watched(scene)
    vcpu.store(GFN, b"x")
    kinds(events)
    mm.swapon(8)
    counts: list[int] = []
    with on_point(lambda label: counts.append(gru.range_active)):
        pageout(mm, hva, hva + PAGE_SIZE)
        pageout(mm, hva, hva + PAGE_SIZE)  # the first finds that it was used
    assert kinds(events) == ["invalidate", "flush"]
    assert set(counts) == {0}
    mm.exit()
    assert gru.ms_released
    scene.run()
    scene.close()


def test_2008_who_was_released_is_not_found_again() -> None:
    scene = plain_scene(protocol="2008")
    mm, _, gru = furnish(scene)
    gru._release()
    with pytest.raises(MmError) as refused:
        Gru2008.of(mm)
    assert refused.value.errno == errno.EINVAL
    scene.close()


# ---- memslots


def test_what_slots_say(scene: Scene) -> None:
    _, hva, gru = furnish(scene)
    gru.mmio_lookup = lambda gpa: gpa == 0x9000
    gru.set_memslot(1, 0x100, 1, hva, MEM_READONLY)
    assert gru.fault(0x100, READ) == RETRY_WALK
    assert gru.fault(0x100, WRITE) == MMIO
    assert gru.fault(9, READ) == MMIO
    assert gru.fault(8, READ) == FAULT
    assert gru.last_error == "no memory at guest physical page 0x8000"
    assert not gru.host_failed
    gru.delete_memslot(1)
    assert gru.translate(0x100) is None
    assert gru.fault(0x100, READ) == FAULT
    with pytest.raises(MmError):
        gru.delete_memslot(1)


@pytest.mark.parametrize("gfn", [-1, 200, 1 << 27, 1 << 70])
def test_a_guest_frame_that_is_none(scene: Scene, gfn: int) -> None:
    _, _, gru = furnish(scene)
    assert gru.fault(gfn, READ) == FAULT
    assert gru.translate(gfn) is None
    assert not gru.port(0).again(gfn, READ)
    assert str(gru.describe(gfn)).endswith("no memslot")


def test_no_dirty_log(scene: Scene) -> None:
    _, hva, gru = furnish(scene)
    for refused in (
        lambda: gru.set_memslot(0, GFN, 2, hva, MEM_LOG_DIRTY_PAGES),
        lambda: gru.get_dirty_log(0),
    ):
        with pytest.raises(MmError, match="keeps n") as error:
            refused()
        assert error.value.errno == errno.EINVAL


def test_a_slot_that_moves_takes_its_translations_along(scene: Scene) -> None:
    _, hva, gru = furnish(scene)
    vcpu = scene.vcpu(gru)
    vcpu.store(GFN, b"x")
    before = gru.spaces[0].asid
    gru.set_memslot(0, 2 * GFN, 2, hva)
    assert gru.translate(GFN) is None
    assert gru.spaces[0].asid != before
    assert vcpu.load(2 * GFN, 1) == b"x"


def test_what_is_known_of_a_page(scene: Scene) -> None:
    _, hva, gru = furnish(scene)
    assert str(gru.describe(GFN)) == f"gfn 0x10: TLB has nothing; hva {hva:#x}"
    scene.vcpu(gru).store(GFN, b"x")
    assert str(gru.describe(GFN)) == f"gfn 0x10: TLB chiplet 0: pfn 0x1 rwx; hva {hva:#x}"
    assert str(gru.describe(0)) == "gfn 0x0: TLB has nothing; no memslot"


def test_an_idle_handle_takes_no_dropin() -> None:
    space = Chiplet(0).join()
    space.asid = 8
    tfh = Tfh()
    assert not tfh.read()
    assert not space.drop_in(tfh, 8, 1, False)
    tfh.miss(1, 8, False)
    assert tfh.state is TfhState.EXCEPTION
    assert not space.drop_in(tfh, 16, 1, False), "its ASID is another now"
    assert tfh.state is TfhState.IDLE


def test_asids_come_back_when_all_were_used() -> None:
    chiplet = Chiplet(0)
    first, second = chiplet.join(), chiplet.join()
    first.asid = chiplet.new_asid()
    second.asid = chiplet.new_asid()
    chiplet._next = first.asid
    assert chiplet.new_asid() not in (first.asid, second.asid)
