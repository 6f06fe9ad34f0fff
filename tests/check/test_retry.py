"""I7 and I15: lookups that an invalidation has overtaken, by the events that say so, and what merely looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xipvm.check import Oracle
from xipvm.explore import Scene, explore, strategy
from xipvm.explore.mirror import PAGES, Mirror, Odp
from xipvm.explore.scenarios import SCENARIOS
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.pageout import pageout
from xipvm.mutants import planted
from xipvm.testing import PAGE_SIZE, TraceLog, open_scene
from xipvm.trace import Trace

HVA = 0x7000_0000
PFN = 0x20


class Story:
    """Page 0 of mm0 maps PFN, and is guest frame 0 of vm0 and page 0 of ``odp``, who watches two pages."""

    def __init__(self, protocol: str = "modern") -> None:
        self.trace = Trace()
        self.oracle = Oracle(("I2", "I7", "I15"))
        self.trace.attach(self.oracle)
        self.emit = self.trace.emit
        self.emit("mmu_notifier_register", mm="mm0", notifier="vm0", protocol=protocol)
        self.emit("memslot_set", vm="vm0", slot=0, gfn=0, pages=1024, hva=HVA, flags=0)
        self.emit("mmu_interval_notifier_insert", mm="mm0", notifier="odp", start=HVA, end=HVA + 2 * PAGE_SIZE)
        self.emit("memslot_set", vm="odp", slot=0, gfn=0, pages=2, hva=HVA, flags=0)
        self.emit("pte_set", mm="mm0", hva=HVA, pfn=PFN, flags=3)
        self.trace.actor = "vcpu0"

    def by(self, actor: str, kind: str, **fields: Any) -> int:
        self.trace.actor = actor
        seq = self.emit(kind, **fields)
        self.trace.actor = "vcpu0"
        return seq

    def start(self, id: int = 1, page: int = 0, *, cause: int = 0) -> int:
        start = HVA + page * PAGE_SIZE
        with self.trace.because(cause):
            return self.by(
                "host", "mmu_notifier_invalidate_range_start",
                mm="mm0", start=start, end=start + PAGE_SIZE, event="CLEAR", range=id,
            )  # fmt: skip

    def returned(self) -> None:
        self.by("host", "host_access", mm="mm0", hva=0, access="read", thread="t")

    def end(self, id: int = 1, page: int = 0, *, cause: int = 0) -> int:
        start = HVA + page * PAGE_SIZE
        with self.trace.because(cause):
            return self.by(
                "host", "mmu_notifier_invalidate_range_end",
                mm="mm0", start=start, end=start + PAGE_SIZE, event="CLEAR", range=id,
            )  # fmt: skip

    def range(self, id: int = 1, page: int = 0) -> None:
        self.start(id, page)
        self.returned()
        self.end(id, page)

    def install(self, cause: int = 0, vm: str = "vm0", actor: str = "vcpu0") -> None:
        with self.trace.because(cause):
            self.by(actor, "spte_set", vm=vm, gfn=0, pfn=PFN, rights="r")

    def fault(self) -> int:
        return self.by("vcpu0", "kvm_page_fault", vm="vm0", gfn=0, access="read")

    def read_begin(self, seq: int = 1, actor: str = "vcpu0") -> None:
        self.by(actor, "mmu_interval_read_begin", mm="mm0", notifier="odp", seq=seq)

    def read_retry(self, seq: int = 1, *, retry: bool = False, actor: str = "vcpu0") -> None:
        self.by(actor, "mmu_interval_read_retry", mm="mm0", notifier="odp", seq=seq, retry=retry)

    def interval_told(self, *, owned: bool = False) -> None:
        self.by("host", "mmu_interval_notifier_invalidate", mm="mm0", notifier="odp", seq=3, range=1, owned=owned)

    def broken(self) -> list[str]:
        return [violation.invariant for violation in self.oracle.violations]


@pytest.fixture
def story() -> Story:
    return Story()


class TestI7:
    def test_a_range_that_came_and_went(self, story: Story) -> None:
        fault = story.fault()
        story.range()
        story.install(fault)
        assert story.broken() == ["I7"]
        assert story.oracle.violations[0].message.endswith(f"since its lookup began at #{fault}")
        assert story.oracle.checks["I7"] == 1

    def test_a_range_that_was_open_before_and_has_ended(self, story: Story) -> None:
        story.start()
        story.returned()
        fault = story.fault()
        story.end()
        story.install(fault)
        assert story.broken() == ["I7"]

    def test_a_huge_entry_over_a_page_that_was_touched(self, story: Story) -> None:
        fault = story.fault()
        story.range(page=5)
        with story.trace.because(fault):
            story.emit("spte_set_huge", vm="vm0", gfn=0, pages=512, pfn=PFN, rights="r")
        assert story.broken() == ["I7"]

    def test_a_driver_says_when_it_began(self, story: Story) -> None:
        story.emit("spte_lookup", vm="vm0", gfn=0)
        story.range()
        story.install()
        assert story.broken() == ["I7"]

    def test_who_watches_a_range_began_at_read_begin(self, story: Story) -> None:
        story.read_begin()
        story.range(page=1)
        story.install(vm="odp")
        assert story.broken() == []
        story.range()
        story.install(vm="odp")
        assert story.broken() == ["I7"]

    @pytest.mark.parametrize("between", [
        lambda story: story.range(page=1),  # another page
        lambda story: story.start(),  # has not returned: it will remove what is installed now
        lambda story: None,
    ])  # fmt: skip
    def test_what_does_not_count(self, story: Story, between: Callable[[Story], object]) -> None:
        story.range(9)  # before it
        fault = story.fault()
        between(story)
        story.install(fault)
        assert story.broken() == []

    def test_a_range_that_was_declined(self, story: Story) -> None:
        fault = story.fault()
        started = story.start()
        story.end(cause=started)
        story.install(fault)
        assert story.broken() == []

    def test_a_fault_that_began_anew(self, story: Story) -> None:
        for begin in (lambda: story.emit("spte_lookup", vm="vm0", gfn=0), story.read_begin):
            begin()
            story.range()
            begin()
            story.install(vm="odp" if begin == story.read_begin else "vm0")
        assert story.broken() == []

    def test_of_who_does_not_say_when_it_began(self, story: Story) -> None:
        advice = story.by("host", "mm_madvise", mm="mm0", start=0, end=PAGE_SIZE, advice="DONTNEED")
        story.range()
        story.install(advice)
        story.install()
        assert story.broken() == []

    def test_in_2008_a_page_counts_when_all_have_been_told(self) -> None:
        story = Story("2008")
        first = story.fault()
        told = story.by("host", "mmu_notifier_invalidate_page", mm="mm0", address=HVA)
        story.install(first)  # the callback is still to come
        with story.trace.because(told):
            story.by("host", "spte_zap", vm="vm0", start=0, end=1, pages=[(PFN, 1)])
        second = story.fault()
        story.by("host", "pte_set", mm="mm0", hva=HVA, pfn=PFN, flags=3)
        assert story.broken() == []
        story.install(second)
        assert story.broken() == []
        story.install(first)
        assert story.broken() == ["I7"]


class TestI15:
    def test_a_range_that_came_and_went(self, story: Story) -> None:
        story.read_begin()
        story.range()
        story.read_retry()
        assert story.broken() == ["I15"]
        assert story.oracle.checks["I15"] == 1

    def test_a_range_that_is_open(self, story: Story) -> None:
        story.read_begin()
        story.start(page=1)
        story.returned()
        story.read_retry()
        assert story.broken() == ["I15"]

    def test_a_range_that_was_open_before(self, story: Story) -> None:
        story.start()
        story.returned()
        story.read_begin()
        story.read_retry()
        assert story.broken() == ["I15"]

    @pytest.mark.parametrize("between", [
        lambda story: story.range(page=2),  # beside it
        lambda story: story.start(),  # has not returned: the callback may not have the lock yet
        lambda story: story.read_begin(3, "other"),
        lambda story: None,
    ])  # fmt: skip
    def test_what_does_not_count(self, story: Story, between: Callable[[Story], object]) -> None:
        story.range(9)
        story.read_begin()
        between(story)
        story.read_retry()
        assert story.broken() == []

    def test_it_said_that_it_is_worthless(self, story: Story) -> None:
        story.read_begin()
        story.range()
        story.read_retry(retry=True)
        story.read_retry(5)  # of another lookup
        story.read_retry(actor="other")
        assert story.broken() == []

    def test_who_did_it_may_ignore_it(self, story: Story) -> None:
        story.read_begin()
        story.start()
        story.interval_told(owned=True)
        story.returned()
        story.read_retry()
        story.end()
        story.read_retry()
        story.install(vm="odp")
        assert story.broken() == []

    def test_who_watches_no_longer(self, story: Story) -> None:
        story.read_begin()
        story.emit("mmu_interval_notifier_remove", mm="mm0", notifier="odp")
        story.range()
        story.read_retry()
        assert story.broken() == []


# ---- the same from real drivers


@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_a_mirror_in_both_protocols(protocol: str) -> None:
    with open_scene(protocol=protocol) as scene:
        log = TraceLog()
        scene.trace.attach(log)
        mm = scene.mm()
        mm.swapon(8)
        hva = mm.mmap(PAGES * PAGE_SIZE, 3)
        mirror = scene.watch(Mirror(mm, hva, PAGES))
        queue = scene.vcpu(mirror)
        queue.store(0, b"x")
        pageout(mm, hva, hva + PAGE_SIZE)  # somebody asks for its use, then the page goes
        assert queue.load(0, 1) == b"x"
        mm.madvise(hva, PAGES * PAGE_SIZE, MADV_DONTNEED)
        assert mirror.table == {}
        assert queue.load(0, 1) == b"\0"
        assert log.count("spte_zap") >= 2
    assert scene.oracle.checks["I7"] > 0
    assert mirror.closed
    assert mirror.invalidations == 0
    mirror.destroy()


def test_who_watches_a_range_is_judged() -> None:
    with open_scene() as scene:
        mm = scene.mm()
        hva = mm.mmap(PAGES * PAGE_SIZE, 3)
        odp = scene.watch(Odp(mm, hva, PAGES))
        queue = scene.vcpu(odp)
        queue.store(0, b"x")
        mm.munmap(hva, PAGE_SIZE)
        assert odp.table == {}
        queue.store(1, b"x")
    assert {name: scene.oracle.checks[name] > 0 for name in ("I1", "I2", "I3", "I4", "I7", "I10", "I15")} == {
        "I1": True, "I2": True, "I3": True, "I4": True, "I7": True, "I10": True, "I15": True,
    }  # fmt: skip
    odp.destroy()
    assert odp.gone


def _searched(scenario: str, mutant: str, *invariants: str) -> str:
    with planted(mutant):
        found = explore(SCENARIOS[scenario], strategy("random"), runs=400, invariants=invariants)
    return "" if found.failing is None or found.failing.failure is None else found.failing.failure.what


@pytest.mark.parametrize(
    ("scenario", "mutant", "invariant"),
    [
        ("a-cold-fault-against-dontneed", "same-entry-taken-for-no-change", "I7"),
        ("a-mirror-against-dontneed", "mirror-asks-for-open-ranges-only", "I7"),
        ("a-watched-page-is-given-up", "interval-lookup-never-worthless", "I7"),
        ("a-watched-page-is-given-up", "interval-number-not-set", "I15"),
        ("a-snapshot-is-taken", "interval-number-not-set-by-who-only-looks", "I15"),
        ("a-watched-page-is-given-up", "interval-lookup-begins-at-once", "I15"),
    ],
)
def test_a_fault_is_seen_by_it_alone(scenario: str, mutant: str, invariant: str) -> None:
    assert _searched(scenario, mutant, invariant) == invariant


def test_what_does_not_watch_does_not_count_as_young() -> None:
    """Who watches a range is not asked for its use, so nobody can be told of it."""

    def furnish(scene: Scene) -> None:
        mm = scene.mm()
        hva = mm.mmap(PAGE_SIZE, 3)
        mm.swapon(8)
        kvm = scene.kvm(mm, hva)
        odp = scene.watch(Odp(mm, hva, 1))
        scene.vcpu(odp).store(0, b"x")
        scene.vcpu(kvm).load(0)
        scene.actor("host", pageout, mm, hva, hva + PAGE_SIZE)

    assert explore(furnish, strategy("exhaustive"), runs=20).failing is None
