"""The walker: what it returns for each entry, and that it walks again after every handler."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cpu.conftest import CODE, DATA, DEVICE, EXCEPTION, OK, PAGE, RW, RWX, RX, Box, R
from xipvm.cpu import core
from xipvm.errors import InternalError
from xipvm.mmu.secondary.spte import PFN_SHIFT, SPTE_HUGE, SPTE_MMIO, SPTE_PRESENT


@pytest.fixture
def loader(box: Box) -> Box:
    """Code that loads x2 from x1, which holds DATA."""
    box.page(CODE, box.load(), RX)
    box.set_x(1, DATA)
    return box


@pytest.fixture
def storer(box: Box) -> Box:
    """Code that stores the low word of x2 at x1, which holds DATA."""
    box.page(CODE, box.store_word(), RX)
    box.set_x(1, DATA)
    return box


def frame_with(box: Box, value: int) -> int:
    pfn = box.host.alloc()
    box.host.write(pfn, 0, value.to_bytes(8, "little"))
    return pfn


def test_a_handler_that_changes_the_table_again_is_not_believed(loader: Box) -> None:
    """Walk, handle, walk again: an invalidation that came while the handler slept must not be undone by its pfn."""
    stale, fresh = frame_with(loader, 1), frame_with(loader, 2)

    def miss(gva: int, access: int) -> int:
        loader.page(DATA, rights=RWX, pfn=stale)  # the lookup
        loader.page(DATA, rights=RWX, pfn=fresh)  # what another actor made of it before we return
        return core.RETRY_WALK

    loader.engine.on_miss = miss
    inserted: list[tuple[int, int, int]] = []
    loader.engine.record_inserts(True)
    loader.engine.on_insert = lambda *what: inserted.append(what)
    assert loader.engine.run(CODE) == OK
    assert loader.x(2) == 2
    assert stale not in [pfn for _, pfn, _ in inserted]


def test_a_write_to_a_read_only_page_goes_to_the_frame_that_the_handler_put_there(storer: Box) -> None:
    """Copy on write: the entry that was found before must not come back with more rights."""
    shared = storer.page(DATA, b"shared", R)
    copies: list[int] = []

    def miss(gva: int, access: int) -> int:
        copies.append(storer.page(DATA, b"shared"))
        return core.RETRY_WALK

    storer.engine.on_miss = miss
    storer.set_x(2, 0x11223344)
    assert storer.engine.run(CODE) == OK
    assert storer.host.read(shared, 0, 6) == b"shared"
    assert [storer.host.read(pfn, 0, 6) for pfn in copies] == [b"\x44\x33\x22\x11ed"]


def test_a_handler_whose_entry_is_zapped_at_once_is_asked_again(loader: Box) -> None:
    asked = []

    def miss(gva: int, access: int) -> int:
        asked.append((gva, access))
        loader.page(DATA, rights=R, pfn=frame_with(loader, len(asked)))
        if len(asked) < 3:
            loader.unmap(DATA)
        return core.RETRY_WALK

    loader.engine.on_miss = miss
    assert loader.engine.run(CODE) == OK
    assert loader.x(2) == 3
    assert asked == [(DATA, core.READ)] * 3


def test_a_handler_that_never_gets_further_is_an_error(loader: Box) -> None:
    asked = []

    def miss(gva: int, access: int) -> int:
        asked.append(gva)
        return core.RETRY_WALK

    loader.engine.on_miss = miss
    with pytest.raises(InternalError, match=r"walk of 0x20000 .* never got further"):
        loader.engine.run(CODE)
    assert len(asked) == 4096
    loader.engine.kick = 0
    loader.page(DATA, rights=R, pfn=frame_with(loader, 5))
    assert loader.engine.run(CODE) == OK
    assert loader.x(2) == 5


def test_a_fault_names_page_and_access(box: Box) -> None:
    box.page(CODE, box.load(), RX)
    box.set_x(1, DATA + 0x123 * 8)
    assert box.engine.run(CODE) == EXCEPTION
    assert (box.engine.faulted, box.engine.fault_address, box.engine.fault_access) == (True, DATA, core.READ)
    assert box.pc() == CODE
    assert box.engine.run(DATA + 0x40) == EXCEPTION
    assert (box.engine.fault_address, box.engine.fault_access, box.pc()) == (DATA, core.FETCH, DATA + 0x40)
    box.page(DATA, rights=R)
    assert box.engine.run(CODE) == OK
    assert not box.engine.faulted


@pytest.mark.parametrize(("rights", "answers"), [(R, 1), (RX, 1), (RW, 0), (RWX, 0)])
def test_a_write_needs_the_write_bit(storer: Box, rights: int, answers: int) -> None:
    storer.page(DATA, rights=rights)
    assert storer.engine.run(CODE) == (EXCEPTION if answers else OK)
    assert storer.misses == [(DATA, core.WRITE)] * answers


@pytest.mark.parametrize(("rights", "answers"), [(R, 1), (RW, 1), (RX, 0), (RWX, 0)])
def test_a_fetch_needs_the_exec_bit(box: Box, rights: int, answers: int) -> None:
    box.page(CODE, box.answer(1), rights)
    assert box.engine.run(CODE) == (EXCEPTION if answers else OK)
    assert box.misses == [(CODE, core.FETCH)] * answers


def test_an_entry_that_is_not_present_gives_nothing(loader: Box) -> None:
    loader.sptes.set(DATA >> 12, frame_with(loader, 1) << PFN_SHIFT | RWX)
    assert loader.engine.run(CODE) == EXCEPTION


def test_a_huge_entry_maps_512_frames(make_box: Callable[..., Box], isa: int) -> None:
    box = make_box(isa, frames=1200)
    base = next(pfn for pfn in iter(box.host.alloc, None) if pfn % 512 == 0)
    frames = [base, *(box.host.alloc() for _ in range(511))]
    assert frames[-1] == base + 511
    box.host.write(frames[300], 8, (0x5555).to_bytes(8, "little"))
    box.host.write(frames[7], 0, box.load())
    huge = 0x40000000
    box.sptes.set(huge >> 12, base << PFN_SHIFT | SPTE_PRESENT | SPTE_HUGE | RWX)
    box.set_x(1, huge + 300 * PAGE + 8)
    assert box.engine.run(huge + 7 * PAGE) == OK
    assert box.x(2) == 0x5555


def test_a_pfn_that_is_no_frame_is_a_fault(loader: Box) -> None:
    loader.sptes.set(DATA >> 12, 1 << 35 | SPTE_PRESENT | RWX)
    assert loader.engine.run(CODE) == EXCEPTION
    assert loader.engine.fault_address == DATA


def test_an_address_beyond_the_table_asks_the_handler(loader: Box) -> None:
    far = 1 << 45 | DATA
    loader.set_x(1, far)
    assert loader.engine.run(CODE) == EXCEPTION
    assert loader.misses == [(far, core.READ)]


class TestMmio:
    def test_an_entry_sends_loads_and_stores_to_the_device(self, storer: Box) -> None:
        storer.sptes.set(DATA >> 12, SPTE_MMIO | DATA)
        storer.set_x(1, DATA + 0x18)
        storer.set_x(2, 0xABCD)
        assert storer.engine.run(CODE) == OK
        assert storer.written == [(DATA + 0x18, 4, 0xABCD)]
        assert storer.misses == []

    def test_a_fetch_from_an_entry_is_a_fault(self, box: Box) -> None:
        box.sptes.set(DATA >> 12, SPTE_MMIO | DATA)
        assert box.engine.run(DATA) == EXCEPTION
        assert box.engine.fault_access == core.FETCH

    def test_an_answer_is_good_for_its_kind_of_access_only(self, storer: Box) -> None:
        """A ROM answers loads from its array and stores as a device: each kind is asked for by itself."""
        storer.set_x(1, DEVICE)
        storer.engine.run(CODE)
        storer.engine.run(CODE)
        assert storer.misses == [(DEVICE, core.WRITE)]
        storer.page(CODE + PAGE, storer.load(), RX)
        storer.page(DEVICE, rights=R, pfn=frame_with(storer, 9))
        assert storer.engine.run(CODE + PAGE) == OK
        assert storer.x(2) == 9

    def test_the_answer_to_a_fetch_may_not_be_a_device(self, box: Box) -> None:
        assert box.engine.run(DEVICE) == EXCEPTION
        assert box.misses == [(DEVICE, core.FETCH)]

    def test_a_64_bit_load_is_put_together_from_two_reads(self, loader: Box) -> None:
        loader.set_x(1, DEVICE + 8)
        seen = []

        def read(gpa: int, size: int) -> int:
            seen.append((gpa, size))
            return gpa & 0xFF

        loader.on_read = read
        assert loader.engine.run(CODE) == OK
        assert seen == [(DEVICE + 8, 4), (DEVICE + 12, 4)]
        assert loader.x(2) == 12 << 32 | 8


class TestRecording:
    @pytest.fixture
    def log(self, box: Box) -> list[tuple[int, int, int]]:
        inserted: list[tuple[int, int, int]] = []
        box.engine.record_inserts(True)
        box.engine.on_insert = lambda *what: inserted.append(what)
        return inserted

    def test_a_translation_is_recorded_once_between_flushes(self, box: Box, log: list[tuple[int, int, int]]) -> None:
        """Fills repeat for reasons of the TLB's size; what is recorded is the first hand-out."""
        code = box.page(CODE, box.load(), RX)
        box.set_x(1, DATA)
        data = box.page(DATA, rights=R)
        for n in range(600):  # more than the TLB holds
            box.page(DATA + PAGE * n, rights=R, pfn=data)
        for _ in range(2):
            for n in range(600):
                box.set_x(1, DATA + PAGE * n)
                assert box.engine.run(CODE) == OK
        pages = [(DATA >> 12) + n for n in range(600)]
        assert sorted(log) == sorted([(CODE >> 12, code, 5), *((gfn, data, 1) for gfn in pages)])

        log.clear()
        box.engine.flush_tlb("test")
        box.set_x(1, DATA)
        box.engine.run(CODE)
        assert sorted(log) == sorted([(CODE >> 12, code, 5), (DATA >> 12, data, 1)])

    def test_more_rights_are_recorded_again(self, box: Box, log: list[tuple[int, int, int]]) -> None:
        box.page(CODE, box.load(), RX)
        box.page(CODE + PAGE, box.store_word(), RX)
        data = box.page(DATA, rights=R)
        box.set_x(1, DATA)
        box.engine.run(CODE)
        box.page(DATA, rights=RW, pfn=data)
        box.engine.run(CODE + PAGE)
        box.engine.run(CODE)
        assert [entry for entry in log if entry[1] == data] == [(DATA >> 12, data, 1), (DATA >> 12, data, 3)]

    def test_a_revocation_makes_the_next_hand_out_one_to_be_recorded(
        self, box: Box, log: list[tuple[int, int, int]]
    ) -> None:
        """Writing to code and running it again: X went with the write, and W with the run."""
        box.page(CODE, box.store_word(), RX)
        code = box.page(DATA, box.answer(1))
        box.set_x(1, DATA + 0x100)
        for pc in (DATA, CODE, DATA, CODE):
            box.engine.run(pc)
            while box.engine.stopped:
                box.engine.kick = 0
                box.engine.run(box.pc())
        gfn = DATA >> 12
        assert [entry for entry in log if entry[1] == code] == [(gfn, code, 5), (gfn, code, 3)] * 2

    def test_code_that_was_dropped_is_recorded_when_it_is_handed_out_again(
        self, box: Box, log: list[tuple[int, int, int]]
    ) -> None:
        code = box.page(CODE, box.answer(1), RX)
        box.engine.run(CODE)
        box.host.write(code, 0, box.answer(2))
        box.engine.run(CODE)
        assert log == [(CODE >> 12, code, 5)] * 2

    def test_a_load_from_a_writable_page_takes_write_along(self, box: Box, log: list[tuple[int, int, int]]) -> None:
        box.page(CODE, box.load(), RX)
        data = box.page(DATA, rights=RWX)
        box.set_x(1, DATA)
        box.engine.run(CODE)
        assert log[-1] == (DATA >> 12, data, 3)

    def test_nothing_is_recorded_when_an_engine_is_released(self, isa: int, make_box: Callable[..., Box]) -> None:
        """Unmapping looks up guest address 0, where this guest has its code."""
        box = make_box(isa)
        box.page(0, box.answer(1), RX)
        assert box.engine.run(0) == OK
        log: list[object] = []
        box.engine.record_inserts(True)
        box.engine.on_insert = lambda *what: log.append(what)
        box.engine.flush_tlb("test")
        box.engine.release()
        assert log == []
