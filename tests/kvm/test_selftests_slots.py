"""What KVM's selftests assert of memslots, with a guest that runs: moved, deleted, stressed, handed to and fro.

set_memory_region_test, memslot_modification_stress_test, memslot_perf_test, pre_fault_memory_test, kvm_page_table_test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.asm import a64
from tests.kvm.running import CTRL, FAILED, PAGE, REGION, Code, Running, running
from xipvm.actors import on_point
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES, MEM_READONLY

MMIO_VALUE = 0xBEEF


class Answers:
    """A device that answers every read with one value."""

    name = "answers"

    def __init__(self) -> None:
        self.reads = 0

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return MMIO_VALUE if not offset % 8 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def watching(last: int) -> Code:
    """Reads REGION again and again, counts in CTRL what it sees (0, 1, 2, MMIO_VALUE, else), and ends by ``last``."""
    code = Code(a64.mov(20, REGION), a64.mov(21, CTRL), a64.movz(10, last))
    code.label("again").add(a64.ldr(1, 20))
    for at, value in enumerate((0, 1, 2, MMIO_VALUE)):
        code.add(a64.movz(2, value), a64.eor_reg(3, 1, 2)).to(a64.cbnz, 3, f"not{at}")
        code.add(a64.ldr(4, 21, 8 * at), a64.add(4, 4, 1), a64.str(4, 21, 8 * at)).to(a64.b, "counted")
        code.label(f"not{at}")
    code.add(a64.ldr(4, 21, 32), a64.add(4, 4, 1), a64.str(4, 21, 32))
    code.label("counted").add(a64.eor_reg(3, 1, 10)).to(a64.cbnz, 3, "again")
    return code.off()


def seen(guest: Running) -> list[int]:
    """How often the guest saw 0, 1, 2, the MMIO value, anything else."""
    return [guest.get(CTRL + 8 * at) for at in range(5)]


@pytest.mark.parametrize("device", [False, True])
def test_move_in_use_region(device: bool) -> None:
    """The guest may see 0, 1 or the MMIO value, and never 2, which is written where it looked before."""
    with running(watching(1)) as guest:
        answers = Answers()
        if device:
            guest.machine.bus.map(REGION - PAGE, 4 * PAGE, answers)
        hva = guest.slot(2)
        slot = guest.slots - 1
        guest.slice()
        assert seen(guest)[1:] == [0, 0, 0, 0]
        assert seen(guest)[0] > 10
        midway: list[int] = []

        def hook(label: str) -> None:
            if label == "kvm.memslot.invalid":
                before = seen(guest)[0]
                guest.slice(200)  # by what its TLB has
                midway.append(seen(guest)[0] - before)

        with on_point(hook):
            guest.kvm.set_memslot(slot, REGION // PAGE - 1, 2, hva)
        assert len(midway) == 1
        assert midway[0] > 1
        guest.poke(hva, 2)
        guest.slice()
        guest.poke(hva, 1)
        guest.slice()
        assert seen(guest)[1:3] == [0, 0]
        guest.kvm.set_memslot(slot, REGION // PAGE, 2, hva)
        guest.finish()
        zero, one, two, mmio, other = seen(guest)
        assert (one, two, mmio, other) == (1, 0, 0, 0)
        assert zero > 30
        assert answers.reads == 0  # the slot's second page was there all the time


def test_delete_in_use_region() -> None:
    """Without its memslot the region is the device's; with a new one it is fresh memory."""
    with running(watching(1)) as guest:
        answers = Answers()
        guest.machine.bus.map(REGION, 4 * PAGE, answers)
        hva = guest.slot(2)
        guest.poke(hva, 2)
        guest.slice()
        guest.kvm.delete_memslot(guest.slots - 1)
        guest.slice()
        assert answers.reads > 10
        before = seen(guest)
        assert before[0] == before[1] == before[4] == 0
        assert before[3] > 10
        hva = guest.slot(2)
        guest.slice()
        after = seen(guest)
        assert after[0] > 10  # a fresh page, not what was there
        assert after[2] == before[2]
        assert after[3] - before[3] <= 1  # one was read, and not counted yet
        guest.poke(hva, 1)
        guest.finish()


def test_delete_the_slot_of_the_code() -> None:
    """The guest cannot go on, and that is an end, not a hang."""
    with running(watching(1)) as guest:
        guest.slot(2)
        guest.slice()
        with guest.without(0):
            result = guest.end(100_000)
        assert result.reason == "crash"
        assert result.report is not None


def test_no_memslots_at_all() -> None:
    with running(watching(1)) as guest:
        with guest.without(*(slot.id for slot in guest.kvm.memslots)):
            result = guest.end(100_000)
        assert result.reason == "crash"
        assert result.report is not None
        assert "no memory at guest physical page" in result.report.render()


def counting(pages: int, rounds: int, base: int = CTRL + PAGE) -> Code:
    """``rounds`` times, adds 1 to the first word of each of ``pages`` pages; checks them in the end."""
    code = Code(a64.mov(21, rounds))
    code.label("round").add(a64.mov(20, base), a64.mov(22, pages))
    code.label("page").add(a64.ldr(1, 20), a64.add(1, 1, 1), a64.str(1, 20), a64.mov(2, PAGE), a64.add_reg(20, 20, 2))
    code.add(a64.subs(22, 22, 1)).to(a64.cbnz, 22, "page")
    code.add(a64.subs(21, 21, 1)).to(a64.cbnz, 21, "round")
    code.add(a64.mov(20, base), a64.mov(22, pages), a64.mov(3, rounds))
    code.label("check").add(a64.ldr(1, 20)).fail_unless(1, 3)
    code.add(a64.mov(2, PAGE), a64.add_reg(20, 20, 2), a64.subs(22, 22, 1)).to(a64.cbnz, 22, "check")
    return code.off()


def test_memslot_modification_stress() -> None:
    """A slot comes and goes all the time; KVM_RUN never fails, and the guest computes what it computes."""
    with running(counting(40, 60)) as guest:
        hva = guest.mm.mmap(PAGE, 3)
        while (result := guest.end(500)).reason == "limit":
            guest.kvm.set_memslot(99, REGION // PAGE, 1, hva)
            guest.kvm.delete_memslot(99)
        assert (result.reason, result.status, guest.failed()) == ("exit", 0, [])
        assert guest.kvm.memslots.generation > 60


def handing(pages: int) -> Code:
    """Waits for CTRL to be odd; every page of REGION has to hold it then, and gets it plus 1; so does CTRL.

    0xfff ends it.
    """
    code = Code(a64.mov(21, CTRL), a64.movz(10, 0xFFF), a64.mov(11, REGION), a64.mov(12, PAGE))
    code.label("wait").add(a64.ldr(1, 21), a64.eor_reg(2, 1, 10)).to(a64.cbz, 2, "end").to(a64.tbz, 1, 0, "wait")
    code.add(a64.add(20, 11, 0), a64.mov(22, pages), a64.add(3, 1, 1))
    code.label("page").add(a64.ldr(2, 20)).fail_unless(2, 1)
    code.add(a64.str(3, 20), a64.add_reg(20, 20, 12), a64.subs(22, 22, 1)).to(a64.cbnz, 22, "page")
    code.add(a64.str(3, 21)).to(a64.b, "wait").label("end")
    return code.off()


PHASES: dict[str, Callable[[Running, int, int], object]] = {
    "rw": lambda guest, hva, number: None,
    "unmap": lambda guest, hva, number: guest.mm.madvise(hva, 32 * PAGE, 4),
    "unmap chunked": lambda guest, hva, number: [
        guest.mm.madvise(hva + at * PAGE, 8 * PAGE, 4) for at in range(0, 32, 8)
    ],
    "move active": lambda guest, hva, number: [
        guest.kvm.set_memslot(guest.slots - 1, (REGION >> 12) + offset, 32, hva) for offset in (0x100, 0)
    ],
    "move inactive": lambda guest, hva, number: guest.kvm.set_memslot(
        98, (REGION >> 12) + 0x1000 * (1 + number % 2), 1, hva
    ),
    "flags": lambda guest, hva, number: guest.kvm.set_memslot(
        guest.slots - 1, REGION >> 12, 32, hva, MEM_LOG_DIRTY_PAGES * (number % 2)
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_values_are_handed_to_and_fro(phase: str) -> None:
    """memslot_perf_test: what the host puts into each page the guest finds, and the other way round, in each phase."""
    with running(handing(32)) as guest:
        hva = guest.slot(32)
        for number in range(1, 21):
            PHASES[phase](guest, hva, number)
            value = 2 * number + 1
            for page in range(32):
                guest.poke(hva + page * PAGE, value)
            guest.put(CTRL, value)
            guest.slice(1_000)
            assert [guest.peek(hva + page * PAGE) for page in range(32)] == [value + 1] * 32
            assert guest.get(CTRL) == value + 1
        guest.put(CTRL, 0xFFF)
        guest.finish()


@pytest.mark.parametrize("thp", ["never", "always"])
def test_page_table_stages(thp: str) -> None:
    """kvm_page_table_test: before, create, update (logging), adjust (no logging): right values in every stage."""
    pages = 2 * HPAGE_SIZE // PAGE
    with running(handing(pages), memory=16 << 20, thp=thp, host_memory=64 << 20) as guest:
        hva = -(-guest.mm.mmap(2 * HPAGE_SIZE + HPAGE_SIZE, 7) // HPAGE_SIZE) * HPAGE_SIZE
        guest.slot(pages, hva=hva)
        sizes = []
        for number, flags in enumerate([0, 0, MEM_LOG_DIRTY_PAGES, MEM_LOG_DIRTY_PAGES, 0, 0]):
            guest.kvm.set_memslot(guest.slots - 1, REGION // PAGE, pages, hva, flags)
            value = 2 * number + 1
            for page in range(pages):
                guest.poke(hva + page * PAGE, value)
            guest.put(CTRL, value)
            guest.slice(pages * 12)
            assert guest.get(CTRL) == value + 1
            assert all(guest.peek(hva + page * PAGE) == value + 1 for page in range(0, pages, 37))
            sizes.append(len(guest.kvm.sptes.entries(REGION >> 12, (REGION >> 12) + pages)))
        huge = 2 if thp == "always" else pages
        assert sizes == [huge, huge, pages, pages, huge, huge]
        guest.put(CTRL, 0xFFF)
        guest.finish()


def test_pre_fault_memory() -> None:
    with running(handing(32)) as guest:
        hva = guest.slot(32)
        for page in range(32):
            guest.poke(hva + page * PAGE, 1)
        assert guest.kvm.pre_fault_memory(REGION, 32 * PAGE) == (REGION + 32 * PAGE, 0)
        faults: list[int] = []
        guest.machine.trace.attach(
            lambda event: (
                event.kind == "kvm_page_fault"
                and event.fields["gfn"] >= REGION // PAGE
                and faults.append(event.fields["gfn"])
            )
        )
        guest.put(CTRL, 1)
        guest.slice()
        assert guest.get(CTRL) == 2
        assert faults == []


def test_read_only_slot() -> None:
    """Reads are memory; a write goes to the device, and leaves memory as it was."""
    code = Code(a64.mov(20, REGION), a64.ldr(1, 20), a64.add(2, 1, 1), a64.str(2, 20), a64.ldr(3, 20)).fail_unless(3, 1)
    with running(code.off()) as guest:
        written: list[int] = []
        answers = Answers()
        answers.write = lambda offset, size, value: written.append(value)  # type: ignore[method-assign]
        guest.machine.bus.map(REGION, PAGE, answers)
        hva = guest.slot(1, flags=MEM_READONLY)
        guest.poke(hva, 41)
        guest.finish()
        assert guest.peek(hva) == 41
        assert written[0] == 42
        assert answers.reads == 0
        assert not guest.get(FAILED)
