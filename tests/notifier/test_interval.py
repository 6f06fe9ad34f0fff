"""Interval notifiers: the collision scheme, sequence numbers, what is put off, and failures."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.notifier.world import World, error_of
from xipvm.actors import on_point
from xipvm.errors import InternalError, MmError
from xipvm.notifier import ULONG_MAX, IntervalTree, MmuIntervalNotifier, MmuNotifier, MmuNotifierRange, RangeEvent
from xipvm.trace import Event

CLEAR = RangeEvent.CLEAR


class Watcher(MmuIntervalNotifier):
    """Writes down its calls in a list it shares with others."""

    def __init__(self, name: str = "w", calls: list[str] | None = None) -> None:
        self.name = name
        self.calls = [] if calls is None else calls
        self.declines = False
        self.inside: Callable[[], object] = lambda: None

    def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
        self.calls.append(f"{self.name} {range.start:#x} {cur_seq}")
        self.inside()
        if self.declines:
            return False
        self.set_seq(cur_seq)
        return True


class Listener(MmuNotifier):
    """In the list."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        self.calls.append("S")
        return 0

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        self.calls.append("E")


class Decliner(MmuNotifier):
    """In the list, and cannot."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        return 0 if range.blockable else -errno.EAGAIN


@pytest.fixture
def mm() -> World:
    return World()


def begin(mm: World, start: int, end: int, *, blockable: bool = True) -> MmuNotifierRange | None:
    return mm.notifiers.invalidate_range_start(start, end, CLEAR, blockable=blockable)


def tree_of(mm: World) -> IntervalTree:
    assert mm.notifiers.intervals is not None
    return mm.notifiers.intervals


def watch(mm: World, start: int, length: int, name: str = "w", calls: list[str] | None = None) -> Watcher:
    watcher = Watcher(name, calls)
    mm.notifiers.insert_interval(watcher, start, length)
    return watcher


class TestNumbers:
    def test_at_rest(self, mm: World) -> None:
        watcher = watch(mm, 0x1000, 0x2000)
        assert (watcher.start, watcher.last, watcher.invalidate_seq) == (0x1000, 0x2FFF, 1)
        assert (tree_of(mm).seq, tree_of(mm).active) == (2, 0)
        seq = watcher.read_begin()
        assert not watcher.read_retry(seq)
        assert not watcher.check_retry(seq)

    def test_one_invalidation(self, mm: World) -> None:
        watcher = watch(mm, 0x1000, 0x2000)
        seq = watcher.read_begin()
        range = begin(mm, 0x2000, 0x9000)
        assert watcher.calls == ["w 0x2000 3"]
        assert (tree_of(mm).seq, tree_of(mm).active, watcher.invalidate_seq) == (3, 1, 3)
        assert watcher.read_retry(seq)
        assert watcher.check_retry(seq)
        mm.notifiers.invalidate_range_end(range)
        assert (tree_of(mm).seq, tree_of(mm).active) == (4, 0)
        assert watcher.read_retry(seq)
        assert not watcher.read_retry(watcher.read_begin())

    @pytest.mark.parametrize(("start", "end"), [(0, 0x1000), (0x3000, 0x4000)])
    def test_beside_it(self, mm: World, start: int, end: int) -> None:
        watcher = watch(mm, 0x1000, 0x2000)
        seq = watcher.read_begin()
        range = begin(mm, start, end)
        assert (tree_of(mm).seq, tree_of(mm).active) == (2, 1)
        assert not watcher.read_retry(watcher.read_begin())
        mm.notifiers.invalidate_range_end(range)
        assert (tree_of(mm).seq, tree_of(mm).active) == (2, 0)
        assert not watcher.read_retry(seq)
        assert watcher.calls == []

    @pytest.mark.parametrize(("start", "end"), [(0, 0x1001), (0x2FFF, 0x3000), (0, ULONG_MAX), (0x1800, 0x1801)])
    def test_touching_it(self, mm: World, start: int, end: int) -> None:
        watcher = watch(mm, 0x1000, 0x2000)
        begin(mm, start, end)
        assert watcher.calls == [f"w {start:#x} 3"]

    def test_it_stays_odd_until_the_last_of_all_ends(self, mm: World) -> None:
        """Also a range that touches nobody keeps it up."""
        watcher = watch(mm, 0x1000, 0x1000)
        touching = begin(mm, 0x1000, 0x2000)
        beside = begin(mm, 0x8000, 0x9000)
        mm.notifiers.invalidate_range_end(touching)
        assert (tree_of(mm).seq, tree_of(mm).active) == (3, 1)
        assert error_of(watcher.read_begin) == errno.EDEADLK
        mm.notifiers.invalidate_range_end(beside)
        assert (tree_of(mm).seq, tree_of(mm).active) == (4, 0)

    def test_they_wrap(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        tree_of(mm).seq = ULONG_MAX - 1
        with mm.notifiers.invalidate_range(0, 0x1000, CLEAR):
            assert watcher.invalidate_seq == ULONG_MAX
        assert tree_of(mm).seq == 0
        late = watch(mm, 0, 0x1000, "late")
        assert late.invalidate_seq == ULONG_MAX
        assert not late.read_retry(late.read_begin())
        seq = late.read_begin()
        with mm.notifiers.invalidate_range(0, 0x1000, CLEAR):
            assert late.read_retry(seq)
            assert late.invalidate_seq == 1

    def test_dispatch_is_by_start_before_the_list(self, mm: World) -> None:
        calls: list[str] = []
        mm.notifiers.register(Listener(calls))
        for name, start in (("c", 0x3000), ("a", 0x1000), ("b", 0x1000)):
            watch(mm, start, 0x1000, name, calls)
        with mm.notifiers.invalidate_range(0, 0x9000, CLEAR):
            calls.append("change")
        assert calls == ["a 0x0 3", "b 0x0 3", "c 0x0 3", "S", "change", "E"]

    def test_at_the_end_the_numbers_come_first(self, mm: World) -> None:
        """Who hears E in the list may begin to read an interval."""
        seen: list[int] = []

        class Reader(MmuNotifier):
            def invalidate_range_end(self, range: MmuNotifierRange) -> None:
                seen.append(watcher.read_begin())

        watcher = watch(mm, 0, 0x1000)
        mm.notifiers.register(Reader())
        with mm.notifiers.invalidate_range(0, 0x1000, CLEAR):
            pass
        assert seen == [3]


class TestReaders:
    def test_a_reader_sleeps_until_the_invalidation_is_over(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        range = begin(mm, 0, 0x1000)

        def others(label: str) -> None:
            if label == "notifier.interval.read_begin":
                mm.notifiers.invalidate_range_end(range)

        with on_point(others):
            seq = watcher.read_begin()
        assert tree_of(mm).seq == 4
        assert not watcher.read_retry(seq)

    def test_a_retry_may_be_true_at_once(self, mm: World) -> None:
        """read_begin waits once, not until nothing happens."""
        watcher = watch(mm, 0, 0x1000)
        first = begin(mm, 0, 0x1000)

        def others(label: str) -> None:
            if label == "notifier.interval.read_begin":
                mm.notifiers.invalidate_range_end(first)
                begin(mm, 0, 0x1000)

        with on_point(others):
            seq = watcher.read_begin()
        assert watcher.read_retry(seq)

    def test_not_inside_its_own_invalidation(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        errors: list[int] = []

        def read() -> None:
            watcher.set_seq(tree_of(mm).seq)
            errors.append(error_of(watcher.read_begin))

        watcher.inside = read
        begin(mm, 0, 0x1000)
        assert errors == [errno.EDEADLK]

    def test_an_owner_may_ignore_its_own_range(self, mm: World) -> None:
        class Owner(Watcher):
            def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
                return range.owner is self or super().invalidate(range, cur_seq)

        owner = Owner()
        mm.notifiers.insert_interval(owner, 0, 0x1000)
        seq = owner.read_begin()
        with mm.notifiers.invalidate_range(0, 0x1000, RangeEvent.MIGRATE, owner=owner):
            assert not owner.read_retry(seq)
        with mm.notifiers.invalidate_range(0, 0x1000, RangeEvent.MIGRATE, owner=object()):
            assert owner.read_retry(seq)

    def test_reading_needs_an_inserted_one(self, mm: World) -> None:
        assert error_of(Watcher().read_begin) == errno.EINVAL


class TestInsert:
    @pytest.mark.parametrize(
        ("start", "length", "ok"),
        [(0, 0, False), (0, 1 << 64, True), (1, 1 << 64, False), (ULONG_MAX, 1, True), (ULONG_MAX, 2, False)],
    )
    def test_the_range_has_to_fit(self, mm: World, start: int, length: int, ok: bool) -> None:
        watcher = Watcher()
        if ok:
            mm.notifiers.insert_interval(watcher, start, length)
            assert watcher.last == ULONG_MAX
        else:
            assert error_of(lambda: mm.notifiers.insert_interval(watcher, start, length)) == errno.EOVERFLOW
            assert (watcher.subscribed_to, mm.notifiers.intervals) == (None, None)
            assert not mm.notifiers.has_notifiers

    def test_twice_and_on_a_dead_mm(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        assert error_of(lambda: mm.notifiers.insert_interval(watcher, 0x5000, 1)) == errno.EINVAL
        assert watcher.start == 0
        mm.notifiers.release()
        assert error_of(lambda: mm.notifiers.insert_interval(Watcher(), 0, 1)) == errno.EINVAL

    @pytest.mark.parametrize("cause", ["no memory", "a signal", "an open range"])
    def test_the_first_one_fails_as_register_does(self, mm: World, cause: str) -> None:
        expected = {"no memory": errno.ENOMEM, "a signal": errno.EINTR, "an open range": errno.EDEADLK}[cause]
        mm.notifiers.out_of_memory = lambda: cause == "no memory"
        mm.notifiers.signal_pending = lambda: cause == "a signal"
        range = begin(mm, 0, 0x1000) if cause == "an open range" else None
        watcher = Watcher()
        assert error_of(lambda: mm.notifiers.insert_interval(watcher, 0, 1)) == expected
        assert (watcher.subscribed_to, mm.notifiers.intervals) == (None, None)
        assert not mm.notifiers.has_notifiers
        if cause == "an open range":
            mm.notifiers.invalidate_range_end(range)
        mm.notifiers.out_of_memory = mm.notifiers.signal_pending = lambda: False
        mm.notifiers.insert_interval(watcher, 0, 1)
        mm.notifiers.out_of_memory = mm.notifiers.signal_pending = lambda: True
        mm.notifiers.insert_interval(Watcher(), 0, 1)  # needs neither locks nor memory

    def test_while_a_range_runs_that_touches_nobody(self, mm: World) -> None:
        """The new one counts as being invalidated: it may lie in that range."""
        watch(mm, 0, 0x1000)
        range = begin(mm, 0x5000, 0x6000)
        late = watch(mm, 0x5000, 0x1000, "late")
        assert (tree_of(mm).seq, late.invalidate_seq, len(tree_of(mm))) == (3, 3, 2)
        assert error_of(late.read_begin) == errno.EDEADLK
        mm.notifiers.invalidate_range_end(range)
        assert (tree_of(mm).seq, late.read_begin()) == (4, 3)

    def test_the_same_when_nobody_was_watching(self, mm: World) -> None:
        """A range that was announced to nobody is counted all the same."""
        mm.notifiers.remove_interval(watch(mm, 0, 0x1000))
        range = begin(mm, 0x5000, 0x6000)
        assert range is None
        late = watch(mm, 0x5000, 0x1000)
        assert error_of(late.read_begin) == errno.EDEADLK
        mm.notifiers.invalidate_range_end(range)
        assert late.read_begin() == 3

    def test_while_the_tree_is_frozen(self, mm: World) -> None:
        watch(mm, 0, 0x1000)
        range = begin(mm, 0, 0x1000)
        late, later = watch(mm, 0, 0x1000, "late"), watch(mm, 0, 0x1000, "later")
        assert (late.invalidate_seq, len(tree_of(mm)), tree_of(mm).deferred) == (3, 1, (later, late))
        assert error_of(late.read_begin) == errno.EDEADLK
        second = begin(mm, 0, 0x1000)
        assert late.calls == []
        mm.notifiers.invalidate_range_end(range)
        mm.notifiers.invalidate_range_end(second)
        assert (len(tree_of(mm)), tree_of(mm).deferred) == (3, ())
        seq = late.read_begin()
        begin(mm, 0, 0x1000)
        assert late.calls == ["late 0x0 5"]
        assert late.read_retry(seq)


class TestRemove:
    def test_at_rest(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        mm.notifiers.remove_interval(watcher)
        begin(mm, 0, 0x1000)
        assert watcher.calls == []
        assert error_of(lambda: mm.notifiers.remove_interval(watcher)) == errno.EINVAL
        assert error_of(lambda: World().notifiers.remove_interval(watcher)) == errno.EINVAL

    def test_beside_a_range_that_touches_nobody(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        begin(mm, 0x5000, 0x6000)
        mm.notifiers.remove_interval(watcher)
        assert len(tree_of(mm)) == 0

    def test_it_waits_for_what_runs(self, mm: World) -> None:
        watcher, other = watch(mm, 0, 0x1000), watch(mm, 0x5000, 0x1000)
        range = begin(mm, 0, 0x1000)

        def others(label: str) -> None:
            if label == "notifier.interval.remove":
                assert tree_of(mm).deferred == (other,)
                assert error_of(lambda: mm.notifiers.remove_interval(other)) == errno.EINVAL  # somebody is at it
                mm.notifiers.invalidate_range_end(range)

        with on_point(others):
            mm.notifiers.remove_interval(other)
        assert (other.subscribed_to, len(tree_of(mm))) == (None, 1)
        assert watcher.read_begin() == 3

    def test_it_may_still_be_told_while_it_waits(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        ranges = [begin(mm, 0, 0x1000)]

        def others(label: str) -> None:
            if label == "notifier.interval.remove":
                if len(ranges) == 1:
                    ranges.append(begin(mm, 0, 0x800))
                else:
                    for range in ranges:
                        mm.notifiers.invalidate_range_end(range)

        with on_point(others):
            mm.notifiers.remove_interval(watcher)
        assert watcher.calls == ["w 0x0 3", "w 0x0 3"]
        assert len(tree_of(mm)) == 0

    def test_an_insert_that_was_put_off_is_forgotten(self, mm: World) -> None:
        watch(mm, 0, 0x1000)
        range = begin(mm, 0, 0x1000)
        late = watch(mm, 0, 0x1000, "late")
        mm.notifiers.remove_interval(late)
        assert (tree_of(mm).deferred, late.subscribed_to) == ((), None)
        mm.notifiers.invalidate_range_end(range)
        assert len(tree_of(mm)) == 1

    def test_not_inside_an_invalidation(self, mm: World) -> None:
        watcher = watch(mm, 0, 0x1000)
        errors: list[int] = []
        watcher.inside = lambda: errors.append(error_of(lambda: mm.notifiers.remove_interval(watcher)))
        with mm.notifiers.invalidate_range(0, 0x1000, CLEAR):
            pass
        assert errors == [errno.EDEADLK]
        assert (watcher.subscribed_to, len(tree_of(mm)), tree_of(mm).deferred) == (tree_of(mm), 1, ())
        mm.notifiers.remove_interval(watcher)

    @pytest.mark.parametrize("ended", [False, True])
    def test_an_aborted_wait(self, mm: World, ended: bool) -> None:
        watcher = watch(mm, 0, 0x1000)
        range = begin(mm, 0, 0x1000)

        def abort(label: str) -> None:
            if label == "notifier.interval.remove":
                if ended:
                    mm.notifiers.invalidate_range_end(range)
                raise KeyboardInterrupt

        with on_point(abort), pytest.raises(KeyboardInterrupt):
            mm.notifiers.remove_interval(watcher)
        assert tree_of(mm).deferred == ()
        assert (watcher.subscribed_to is None, len(tree_of(mm))) == (ended, 0 if ended else 1)


class TestNonBlockable:
    def test_one_that_declines_stops_all_behind_it(self, mm: World) -> None:
        calls: list[str] = []
        mm.notifiers.register(Listener(calls))
        for name in "abc":
            watch(mm, 0, 0x1000, name, calls).declines = name == "b"
        assert error_of(lambda: begin(mm, 0, 0x1000, blockable=False)) == errno.EAGAIN
        assert calls == ["a 0x0 3", "b 0x0 3"]
        assert (tree_of(mm).seq, tree_of(mm).active, mm.notifiers.open_ranges) == (4, 0, ())

    def test_declining_what_may_block_is_a_defect(self, mm: World) -> None:
        watch(mm, 0, 0x1000).declines = True
        with pytest.raises(InternalError, match="w declined"):
            begin(mm, 0, 0x1000)
        assert (tree_of(mm).seq, tree_of(mm).active, mm.notifiers.open_ranges) == (4, 0, ())

    def test_when_the_list_declines_the_interval_notifiers_get_their_end(self, mm: World) -> None:
        """Linux forgets it, and the next reader of the interval would never wake."""
        calls: list[str] = []
        mm.notifiers.register(Decliner())
        mm.notifiers.register(Listener(calls))
        watcher = watch(mm, 0, 0x1000, "w", calls)
        seq = watcher.read_begin()
        assert error_of(lambda: begin(mm, 0, 0x1000, blockable=False)) == errno.EAGAIN
        assert calls == ["w 0x0 3", "S", "E"]
        assert (tree_of(mm).seq, tree_of(mm).active) == (4, 0)
        assert watcher.read_retry(seq)
        assert not watcher.read_retry(watcher.read_begin())

    def test_one_that_raises(self, mm: World) -> None:
        calls: list[str] = []
        mm.notifiers.register(Listener(calls))
        watcher = watch(mm, 0, 0x1000, "w", calls)
        watcher.inside = lambda: {}["missing"]
        with pytest.raises(KeyError):
            begin(mm, 0, 0x1000)
        assert calls == ["w 0x0 3"]
        assert (tree_of(mm).seq, tree_of(mm).active, mm.notifiers.open_ranges) == (4, 0, ())


class TestTwoPasses:
    class Device(Watcher):
        """Is told to begin, and waited for later."""

        def invalidate_start(self, range: MmuNotifierRange, cur_seq: int) -> bool | Callable[[], object]:
            done = self.invalidate(range, cur_seq)
            return (lambda: self.calls.append(f"{self.name} waits")) if done else False

    @pytest.fixture
    def calls(self, mm: World) -> list[str]:
        calls: list[str] = []
        mm.notifiers.register(Listener(calls))
        for name in "abc":
            kind = Watcher if name == "b" else self.Device
            self.last = kind(name, calls)
            mm.notifiers.insert_interval(self.last, 0, 0x1000)
        return calls

    def test_all_begin_before_the_first_is_waited_for(self, mm: World, calls: list[str]) -> None:
        begin(mm, 0, 0x1000)
        assert calls == ["a 0x0 3", "b 0x0 3", "c 0x0 3", "c waits", "a waits", "S"]

    @pytest.mark.parametrize("raises", [False, True])
    def test_what_was_begun_is_finished_when_a_later_one_fails(self, mm: World, calls: list[str], raises: bool) -> None:
        self.last.declines = True
        if raises:
            self.last.inside = lambda: {}["missing"]
        with pytest.raises(KeyError if raises else MmError):
            begin(mm, 0, 0x1000, blockable=False)
        assert calls == ["a 0x0 3", "b 0x0 3", "c 0x0 3", "a waits"]
        assert (tree_of(mm).seq, tree_of(mm).active, mm.notifiers.open_ranges) == (4, 0, ())


class TestDeathOfTheMm:
    def test_one_range_over_everything_then_the_list(self, mm: World) -> None:
        calls: list[str] = []

        class Last(Listener):
            def release(self, mm: object) -> None:
                self.calls.append("release")

        seen: list[tuple[RangeEvent, int, bool]] = []

        class Keeper(Watcher):
            def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
                seen.append((range.event, range.end, range.blockable))
                return super().invalidate(range, cur_seq)

        mm.notifiers.register(Last(calls))
        keeper = Keeper("w", calls)
        mm.notifiers.insert_interval(keeper, 0x7000, 0x1000)
        mm.notifiers.release()
        assert calls == ["w 0x0 3", "release"]
        assert seen == [(RangeEvent.RELEASE, ULONG_MAX, True)]
        assert (tree_of(mm).seq, tree_of(mm).active) == (4, 0)
        mm.notifiers.release()
        with mm.notifiers.invalidate_range(0, 0x9000, RangeEvent.UNMAP):
            pass
        assert calls == ["w 0x0 3", "release", "w 0x0 5"]  # it hears of the unmapping, too
        mm.notifiers.remove_interval(keeper)

    def test_one_that_raises_does_not_spare_the_list(self, mm: World) -> None:
        released: list[str] = []

        class Last(MmuNotifier):
            def release(self, mm: object) -> None:
                released.append("release")

        mm.notifiers.register(Last())
        watch(mm, 0, 1).inside = lambda: {}["missing"]
        with pytest.raises(KeyError):
            mm.notifiers.release()
        assert released == ["release"]
        assert (len(mm.notifiers), tree_of(mm).active) == (0, 0)


def test_no_work_without_a_notifier(mm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An mm whose last interval notifier was removed counts its ranges, and nothing else."""
    mm.notifiers.remove_interval(watch(mm, 0, 0x1000))
    events: list[Event] = []
    points: list[str] = []
    made: list[object] = []
    mm.trace.attach(events.append)
    monkeypatch.setattr("xipvm.notifier.registry.MmuNotifierRange", lambda *a: made.append(a))
    with on_point(points.append), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR) as range:
        assert tree_of(mm).active == 1
    assert (range, events, points, made) == (None, [], [], [])
    assert (tree_of(mm).active, tree_of(mm).seq) == (0, 2)


def test_trace(mm: World) -> None:
    events: list[Event] = []
    mm.trace.attach(events.append)
    watcher = watch(mm, 0x1000, 0x1000)
    with mm.notifiers.invalidate_range(0x1000, 0x3000, CLEAR):
        pass
    mm.notifiers.remove_interval(watcher)
    assert [(e.kind, e.cause) for e in events] == [
        ("mmu_interval_notifier_insert", 0),
        ("mmu_notifier_invalidate_range_start", 0),
        ("mmu_interval_notifier_invalidate", 2),
        ("mmu_notifier_invalidate_range_end", 0),
        ("mmu_interval_notifier_remove", 0),
    ]
    assert events[0].fields == {"mm": "mm0", "notifier": "w", "start": 0x1000, "end": 0x2000}
    assert events[2].fields == {"mm": "mm0", "notifier": "w", "seq": 3, "range": 1, "owned": False}


SPANS = st.tuples(st.integers(0, 7), st.integers(1, 4)).map(lambda t: (t[0], t[0] + t[1]))


class Intervals(RuleBasedStateMachine):
    """Against a model without numbers: it knows what happened since no range was open, and since each read began."""

    def __init__(self) -> None:
        super().__init__()
        self.mm = World()
        self.calls: list[str] = []
        self.open: list[MmuNotifierRange | None] = []
        self.used = False
        self.watchers: dict[str, Watcher] = {}
        self.busy: set[str] = set()  # touched, or inserted while a range was open, since none was
        self.waiting: set[str] = set()  # of those, not in the tree yet
        self.frozen = False
        self.reads: list[tuple[str, int, list[bool]]] = []  # who, what it got, whether it was touched since
        self.names = 0

    def touched_by(self, span: tuple[int, int]) -> list[str]:
        hit = [n for n, w in self.watchers.items() if n not in self.waiting and w.start < span[1] and span[0] <= w.last]
        return sorted(hit, key=lambda name: self.watchers[name].start)

    def touch(self, name: str) -> None:
        self.busy.add(name)
        self.frozen = True
        for reader, _, touched in self.reads:
            if reader == name:
                touched[0] = True

    def settle(self) -> None:
        if not self.open:
            self.busy.clear()
            self.waiting.clear()
            self.frozen = False

    @rule(span=SPANS)
    def start(self, span: tuple[int, int]) -> None:
        self.calls.clear()
        self.open.append(begin(self.mm, *span))
        hit = self.touched_by(span)
        assert sorted(call.split()[0] for call in self.calls) == sorted(hit)
        for name in hit:
            self.touch(name)

    @rule(span=SPANS, data=st.data())
    def start_what_is_declined(self, span: tuple[int, int], data: st.DataObject) -> None:
        hit = self.touched_by(span)
        if not hit:
            return
        decliner = data.draw(st.sampled_from(hit))
        self.calls.clear()
        self.watchers[decliner].declines = True
        assert error_of(lambda: begin(self.mm, *span, blockable=False)) == errno.EAGAIN
        self.watchers[decliner].declines = False
        told = [call.split()[0] for call in self.calls]
        assert told[-1] == decliner
        assert set(told) <= set(hit)
        for name in told[:-1]:
            self.touch(name)
        self.frozen = True
        self.settle()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        range = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.mm.notifiers.invalidate_range_end(range)
        self.settle()

    @rule(span=SPANS)
    def insert(self, span: tuple[int, int]) -> None:
        self.names += 1
        watcher = Watcher(f"w{self.names}", self.calls)
        try:
            self.mm.notifiers.insert_interval(watcher, span[0], span[1] - span[0])
        except MmError:
            assert not self.used
            assert self.open
            return
        assert self.used or not self.open
        self.used = True
        self.watchers[watcher.name] = watcher
        if self.open:
            self.busy.add(watcher.name)
            if self.frozen:
                self.waiting.add(watcher.name)
            self.frozen = True

    @precondition(lambda self: self.watchers)
    @rule(data=st.data(), patient=st.booleans())
    def remove(self, data: st.DataObject, patient: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.watchers)))
        waits = self.frozen and name not in self.waiting

        def others(label: str) -> None:
            assert waits
            if patient and label == "notifier.interval.remove":
                self.end(data)

        with on_point(others):
            try:
                self.mm.notifiers.remove_interval(self.watchers[name])
            except MmError as error:
                if error.errno != errno.EDEADLK or patient or not waits:
                    raise
                return
        assert patient or not waits
        del self.watchers[name]
        self.busy.discard(name)
        self.waiting.discard(name)
        self.reads = [read for read in self.reads if read[0] != name]

    @precondition(lambda self: self.watchers)
    @rule(data=st.data(), patient=st.booleans())
    def read(self, data: st.DataObject, patient: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.watchers)))
        waits = name in self.busy

        def others(label: str) -> None:
            assert waits
            if patient and label == "notifier.interval.read_begin":
                self.end(data)

        with on_point(others):
            try:
                seq = self.watchers[name].read_begin()
            except MmError as error:
                if error.errno != errno.EDEADLK or patient or not waits:
                    raise
                return
        assert name not in self.busy  # nothing that touches it runs
        self.reads.append((name, seq, [False]))

    @invariant()
    def retry_says_whether_it_was_touched(self) -> None:
        for name, seq, touched in self.reads:
            assert self.watchers[name].read_retry(seq) is touched[0]
            assert self.watchers[name].check_retry(seq) is touched[0]

    @invariant()
    def numbers_are_odd_where_they_have_to(self) -> None:
        tree = self.mm.notifiers.intervals
        if tree is not None:
            assert tree.invalidating is self.frozen
            assert tree.active == len(self.open)
            assert all(w.invalidate_seq & 1 for w in self.watchers.values())
            assert len(tree) == len(self.watchers) - len(self.waiting)


TestIntervals = Intervals.TestCase
TestIntervals.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
