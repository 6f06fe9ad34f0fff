"""What the oracle remembers is bounded by the memory that is touched, not by how long a run is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xipvm.check import Oracle
from xipvm.check.oracle import EACH
from xipvm.check.world import GONE
from xipvm.trace import Trace
from xipvm.trace.history import History

HVA, GFN, PAGE = 0x7000_0000, 0x40, 0x1000
LIMIT = 100
"""Of the last events; what is sorted out is twice that at least."""
_KINDS = 14
"""Of events that one page sees here; the last of each is kept."""


def told(history: int = LIMIT) -> tuple[Trace, Oracle]:
    trace, oracle = Trace(), Oracle(history=history)
    trace.attach(oracle)
    trace.emit("mmu_notifier_register", mm="mm0", notifier="vm0", protocol="modern")
    trace.emit("memslot_set", vm="vm0", slot=0, gfn=GFN, pages=64, hva=HVA, flags=0)
    return trace, oracle


def life(trace: Trace, page: int, pfn: int, *, uses: int = 1) -> None:
    """A page from its fault to its end."""
    hva, gfn = HVA + page * PAGE, GFN + page
    trace.emit("kvm_page_fault", vm="vm0", gfn=gfn, access="write")
    trace.emit("page_alloc", pfn=pfn)
    trace.emit("pte_set", mm="mm0", hva=hva, pfn=pfn, flags=3)
    trace.emit("spte_set", vm="vm0", gfn=gfn, pfn=pfn, rights="rw")
    for _ in range(uses):
        trace.emit("tlb_insert", vcpu=0, gfn=gfn, pfn=pfn, rights="rw")
        trace.emit("tlb_flush", vcpu=0, reason="time")
    number = trace.seq
    end = hva + PAGE
    start = trace.emit("mmu_notifier_invalidate_range_start", mm="mm0", start=hva, end=end, event="CLEAR", range=number)
    with trace.because(start):
        trace.emit("spte_zap", vm="vm0", start=gfn, end=gfn + 1, pages=[(pfn, 1)])
    trace.emit("pte_clear", mm="mm0", start=hva, end=end, pages=[(pfn, 1)])
    trace.emit("primary_tlb_flush", mm="mm0", start=hva, end=end)
    trace.emit("page_free", pages=[(pfn, 1)])
    trace.emit("mmu_notifier_invalidate_range_end", mm="mm0", start=hva, end=end, event="CLEAR", range=number)


def most(pages: int) -> int:
    """Records that ``pages`` pages may take: each at its address, its guest frame and its frame."""
    return 2 * max(LIMIT, 3 * pages * (EACH + _KINDS))


@pytest.mark.parametrize("pages", [1, 8])
def test_a_long_run_over_few_pages(pages: int) -> None:
    trace, oracle = told()
    for number in range(3000):
        life(trace, number % pages, 0x20 + number % pages)
    assert oracle.violations == []
    assert oracle.events > 30_000
    assert oracle.history.kept_records < most(pages) < oracle.events / 4
    world = oracle.world
    assert (len(world.freed), len(world.written), len(world.holders), len(world.open)) == (pages, 0, 0, 0)


def test_the_more_is_touched_the_more_is_kept() -> None:
    trace, oracle = told()
    for page in range(64):
        for _ in range(40):
            life(trace, page, 0x20 + page)
    kept = oracle.history.kept_records
    assert 64 * EACH < kept < most(64) < oracle.events


def test_who_mapped_a_page_is_known_however_often_it_was_used() -> None:
    trace, oracle = told()
    gfn, pfn = GFN, 0x20
    trace.emit("page_alloc", pfn=pfn)
    trace.emit("pte_set", mm="mm0", hva=HVA, pfn=pfn, flags=3)
    mapped = trace.emit("spte_set", vm="vm0", gfn=gfn, pfn=pfn, rights="rw")
    for _ in range(5000):
        trace.emit("tlb_insert", vcpu=0, gfn=gfn, pfn=pfn, rights="rw")
        trace.emit("tlb_flush", vcpu=0, reason="time")
    trace.emit("page_free", pages=[(pfn, 1)])
    [violation] = oracle.violations
    seqs = [event.seq for event in violation.history]
    assert seqs[:4] == [2, mapped - 2, mapped - 1, mapped]
    assert len(seqs) < EACH + 8
    assert violation.earlier + len(seqs) == 5000 + 5
    text = violation.render()
    assert f"... {violation.earlier} more events, of which none is the last of its kind\n" in text
    assert f" #{mapped} host   spte_set " in text


def test_wide_events_are_not_kept_for_every_page() -> None:
    history = History(LIMIT, each=EACH)
    trace = Trace()
    trace.attach(history)
    for _ in range(2000):
        trace.emit("primary_tlb_flush", mm="mm0", start=0, end=1 << 40)
    assert history.kept_records <= 2 * (LIMIT + 256)
    assert history.wide > 1000
    assert len(history.touching(hva=HVA)) == 16


def test_address_spaces_vms_and_threads_come_and_go() -> None:
    trace, oracle = told()
    world = oracle.world
    for number in range(3 * GONE):
        mm = f"child{number}"
        trace.emit("mm_fork", mm="mm0", child=mm)
        trace.emit("mmu_notifier_register", mm=mm, notifier=f"guest{number}", protocol="modern")
        trace.emit("pte_set", mm=mm, hva=HVA, pfn=0x20, flags=1)
        trace.emit("host_tlb_insert", mm="mm0", hva=HVA, pfn=0x20, rights="r", thread=f"thread{number}")
        trace.emit("host_tlb_drop", mm="mm0", hva=None, thread=f"thread{number}")
        trace.emit("mmu_notifier_unregister", mm=mm, notifier=f"guest{number}")
        trace.emit("mm_exit", mm=mm)
        trace.emit("pte_clear", mm=mm, start=HVA, end=HVA + PAGE, pages=[(0x20, 1)])
    assert oracle.violations == []
    assert len(world.mms) <= GONE + 2
    assert len(world.vms) <= GONE + 2
    assert world.mms["mm0"].tlbs == {}
    assert f"guest{3 * GONE - 1}" in world.vms, "the last ones are known: they may still do wrong"


def test_nothing_else_of_it_grows() -> None:
    """Whatever the oracle and its rules refer to has as many elements after ten times as long a run."""

    def sizes(rounds: int) -> dict[str, int]:
        trace, oracle = told()
        for number in range(rounds):
            life(trace, number % 4, 0x20 + number % 4)
        return dict(_sizes(oracle))

    short, long = sizes(400), sizes(4000)
    grown = {name: (short[name], long[name]) for name in long if long[name] > 2 * short.get(name, 0) + 8}
    assert grown == {}


def _sizes(oracle: Oracle) -> Iterator[tuple[str, int]]:
    owners = [("oracle", oracle), *((type(rule).__name__, rule) for rule in oracle._rules)]
    for owner, rule in owners:
        for name, value in vars(rule).items():
            if hasattr(value, "__len__"):
                yield f"{owner}.{name}", 0 if getattr(value, "maxlen", None) else len(value)
    for name, process in oracle.world.mms.items():
        for part in ("entries", "tlbs", "devices", "iotlbs", "aged", "notifiers", "intervals"):
            yield f"{name}.{part}", len(getattr(process, part))
    for name, vm in oracle.world.vms.items():
        for part in ("slots", "sptes", "chiplets", "huge", "pins"):
            yield f"{name}.{part}", len(getattr(vm, part))
    yield "history", oracle.history.kept_records
