"""Registration and dispatch of MMU notifiers: who is told what, in which order, and what errors leave behind."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.notifier.world import World, error_of
from xipvm.actors import on_point
from xipvm.errors import InternalError, MmError
from xipvm.notifier import MmuNotifier, MmuNotifierRange, NotifiedMm, RangeEvent
from xipvm.trace import Event

CLEAR = RangeEvent.CLEAR


class Spy(MmuNotifier):
    """Writes down its calls in a list it shares with others."""

    def __init__(self, name: str, calls: list[str], answer: int = 0) -> None:
        self.name = name
        self.calls = calls
        self.answer = answer
        self.inside: Callable[[str], None] = lambda call: None

    def release(self, mm: NotifiedMm) -> None:
        self.calls.append(f"{self.name} release")
        self.inside("release")

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        self.calls.append(f"{self.name} S{range.id}")
        self.inside("start")
        return self.answer

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        self.calls.append(f"{self.name} E{range.id}")
        self.inside("end")


class Decliner(MmuNotifier):
    """Takes no range that may not block."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        self.calls.append(f"{self.name} S{range.id}")
        return 0 if range.blockable else -errno.EAGAIN


class TlbWithStart(MmuNotifier):
    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        """Has both: not allowed."""

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        return 0


class TlbWithEnd(MmuNotifier):
    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        """Has both: not allowed."""

    def invalidate_range_end(self, range: MmuNotifierRange) -> None:
        """The other one."""


@pytest.fixture
def mm() -> World:
    return World()


@pytest.fixture
def calls() -> list[str]:
    return []


def test_the_most_recently_registered_is_told_first(mm: World, calls: list[str]) -> None:
    for name in "abc":
        mm.notifiers.register(Spy(name, calls))
    with mm.notifiers.invalidate_range(0x1000, 0x3000, CLEAR) as range:
        calls.append("change")
    assert calls == ["c S1", "b S1", "a S1", "change", "c E1", "b E1", "a E1"]
    assert range is not None
    assert (range.mm, range.start, range.end, range.event, range.blockable) == ("mm0", 0x1000, 0x3000, CLEAR, True)
    assert [n.name for n in mm.notifiers] == ["c", "b", "a"]


def test_both_calls_get_the_same_range(mm: World) -> None:
    seen: list[MmuNotifierRange] = []

    class Keeper(MmuNotifier):
        def invalidate_range_start(self, range: MmuNotifierRange) -> int:
            seen.append(range)
            return 0

        def invalidate_range_end(self, range: MmuNotifierRange) -> None:
            seen.append(range)

    mm.notifiers.register(Keeper())
    with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
        pass
    assert seen[0] is seen[1]


def test_nothing_happens_when_nobody_listens(mm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    mm.trace.attach(events.append)
    points: list[str] = []
    made: list[object] = []
    monkeypatch.setattr("xipvm.notifier.registry.MmuNotifierRange", lambda *a: made.append(a))
    with on_point(points.append), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR) as range:
        assert mm.notifiers.open_ranges == ()
    assert range is None
    assert (events, points, made) == ([], [], [])


def test_ranges_nest_and_overlap(mm: World, calls: list[str]) -> None:
    mm.notifiers.register(Spy("a", calls))
    outer = mm.notifiers.invalidate_range_start(0x1000, 0x9000, CLEAR)
    inner = mm.notifiers.invalidate_range_start(0x2000, 0x3000, RangeEvent.UNMAP)
    assert mm.notifiers.open_ranges == (outer, inner)
    mm.notifiers.invalidate_range_end(outer)
    assert mm.notifiers.open_ranges == (inner,)
    mm.notifiers.invalidate_range_end(inner)
    assert mm.notifiers.open_ranges == ()
    assert calls == ["a S1", "a S2", "a E1", "a E2"]


def test_overlap_is_half_open() -> None:
    range = MmuNotifierRange("mm0", 0x2000, 0x4000, CLEAR)
    assert [range.overlaps(a, a + 0x1000) for a in (0x1000, 0x2000, 0x3000, 0x4000)] == [False, True, True, False]


def test_a_range_ends_when_its_operation_fails(mm: World, calls: list[str]) -> None:
    mm.notifiers.register(Spy("a", calls))
    with pytest.raises(KeyError), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
        raise KeyError
    assert calls == ["a S1", "a E1"]
    assert mm.notifiers.open_ranges == ()


def test_defects_of_the_caller_are_reported(mm: World, calls: list[str]) -> None:
    with pytest.raises(InternalError, match="more unobserved ranges"):
        mm.notifiers.invalidate_range_end(None)
    mm.notifiers.register(Spy("a", calls))
    with pytest.raises(InternalError, match="empty range"):
        mm.notifiers.invalidate_range_start(0x2000, 0x2000, CLEAR)
    range = mm.notifiers.invalidate_range_start(0x2000, 0x3000, CLEAR)
    mm.notifiers.invalidate_range_end(range)
    with pytest.raises(InternalError, match="not open"):
        mm.notifiers.invalidate_range_end(range)
    assert calls == ["a S1", "a E1"]


class TestJoining:
    def test_twice_is_refused(self, mm: World, calls: list[str]) -> None:
        a, other = Spy("a", calls), World("mm1")
        mm.notifiers.register(a)
        assert error_of(lambda: mm.notifiers.register(a)) == errno.EINVAL
        assert error_of(lambda: other.notifiers.register(a)) == errno.EINVAL
        assert list(mm.notifiers) == [a]
        assert list(other.notifiers) == []
        assert a.subscribed_to is mm.notifiers

    def test_a_dead_mm_takes_nobody(self, mm: World, calls: list[str]) -> None:
        mm.notifiers.release()
        a = Spy("a", calls)
        assert error_of(lambda: mm.notifiers.register(a)) == errno.ESRCH
        assert len(mm.notifiers) == 0
        assert a.subscribed_to is None

    def test_the_list_changes_under_all_locks(self, mm: World, calls: list[str]) -> None:
        seen: list[tuple[list[str], bool, bool]] = []
        a = Spy("a", calls)
        mm.trace.attach(lambda event: seen.append((list(mm.locking), mm.mmap_lock.writer, a in tuple(mm.notifiers))))
        mm.notifiers.register(a)
        assert seen == [(["locked", "unlocked"], True, True)]
        assert not mm.mmap_lock.writer

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("cause", ["no memory", "a signal", "mmap_lock", "start", "end"])
    def test_what_fails_leaves_everything_as_it_was(self, mm: World, calls: list[str], first: bool, cause: str) -> None:
        """The kernel's struct is made by the first registration only, so it is the only one that runs out of memory."""
        before = [] if first else [Spy("before", calls)]
        for spy in before:
            mm.notifiers.register(spy)

        late: MmuNotifier = Spy("late", calls)
        expected = {"no memory": errno.ENOMEM, "a signal": errno.EINTR, "mmap_lock": errno.EDEADLK}
        if cause == "no memory":
            mm.notifiers.out_of_memory = lambda: True
        elif cause == "a signal":
            mm.notifiers.signal_pending = lambda: True
        elif cause == "mmap_lock":
            mm.mmap_lock.readers = 1
        else:
            late = {"start": TlbWithStart, "end": TlbWithEnd}[cause]()
        if cause == "no memory" and not first:
            mm.notifiers.register(late)
            return
        events: list[Event] = []
        mm.trace.attach(events.append)
        assert error_of(lambda: mm.notifiers.register(late)) == expected.get(cause, errno.EINVAL)
        assert (list(mm.notifiers), events, calls) == (before, [], [])
        assert (late.subscribed_to, late.users) == (None, 0)
        assert mm.notifiers.has_notifiers is not first
        assert not mm.mmap_lock.writer
        assert mm.locking == ([] if first else ["locked", "unlocked"])

        mm.notifiers.out_of_memory = mm.notifiers.signal_pending = lambda: False
        mm.mmap_lock.readers = 0
        if cause in expected:
            mm.notifiers.register(late)
            assert list(mm.notifiers) == [late, *before]

    def test_once_registered_an_mm_has_notifiers_for_ever(self, mm: World, calls: list[str]) -> None:
        assert not mm.notifiers.has_notifiers
        a = Spy("a", calls)
        mm.notifiers.register(a)
        mm.notifiers.unregister(a)
        assert mm.notifiers.has_notifiers

    @pytest.mark.parametrize("observed", [True, False])
    def test_not_while_a_range_is_open(self, mm: World, calls: list[str], observed: bool) -> None:
        if observed:
            mm.notifiers.register(Spy("first", calls))
        late = Spy("late", calls)
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            assert error_of(lambda: mm.notifiers.register(late)) == errno.EDEADLK
        assert late not in mm.notifiers
        mm.notifiers.register(late)
        assert not any("late" in call for call in calls)

    def test_not_while_a_range_is_open_whose_only_listener_has_left(self, mm: World, calls: list[str]) -> None:
        first, late = Spy("first", calls), Spy("late", calls)
        mm.notifiers.register(first)
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            mm.notifiers.unregister(first)
            assert error_of(lambda: mm.notifiers.register(late)) == errno.EDEADLK
        assert calls == ["first S1", "first release"]

    def test_the_wait_is_a_schedule_point_and_succeeds_when_the_range_ends_there(
        self, mm: World, calls: list[str]
    ) -> None:
        mm.notifiers.register(Spy("first", calls))
        range = mm.notifiers.invalidate_range_start(0x1000, 0x2000, CLEAR)

        def others(label: str) -> None:
            if label == "notifier.register.take_all_locks":
                mm.notifiers.invalidate_range_end(range)

        late = Spy("late", calls)
        with on_point(others):
            mm.notifiers.register(late)
        assert next(iter(mm.notifiers)) is late
        assert calls == ["first S1", "first E1"]

    @pytest.mark.parametrize("where", ["start", "end", "release"])
    def test_not_inside_a_callback(self, mm: World, calls: list[str], where: str) -> None:
        a, late = Spy("a", calls), Spy("late", calls)
        seen: list[int] = []
        a.inside = lambda call: seen.append(error_of(lambda: mm.notifiers.register(late))) if call == where else None
        mm.notifiers.register(a)
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass
        mm.notifiers.unregister(a)
        assert seen == [errno.EDEADLK]
        assert late.subscribed_to is None


class TestLeaving:
    def test_release_comes_first_and_nothing_afterwards(self, mm: World, calls: list[str]) -> None:
        a, b = Spy("a", calls), Spy("b", calls)
        mm.notifiers.register(a)
        mm.notifiers.register(b)
        a.inside = lambda call: calls.append(f"linked {a in tuple(mm.notifiers)}")
        mm.notifiers.unregister(a)
        assert a.users == 0
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass
        assert calls == ["a release", "linked True", "b S1", "b E1"]
        assert list(mm.notifiers) == [b]
        mm.notifiers.register(a)  # it is free for a new subscription
        assert list(mm.notifiers) == [a, b]

    def test_a_stranger_is_refused(self, mm: World, calls: list[str]) -> None:
        a, elsewhere = Spy("a", calls), World("mm1")
        assert error_of(lambda: mm.notifiers.unregister(a)) == errno.EINVAL
        elsewhere.notifiers.register(a)
        assert error_of(lambda: mm.notifiers.unregister(a)) == errno.EINVAL
        assert list(elsewhere.notifiers) == [a]
        elsewhere.notifiers.unregister(a)
        assert error_of(lambda: elsewhere.notifiers.unregister(a)) == errno.EINVAL
        assert calls == ["a release"]

    def test_a_range_is_cut_off_from_its_end(self, mm: World, calls: list[str]) -> None:
        a, b = Spy("a", calls), Spy("b", calls)
        mm.notifiers.register(a)
        mm.notifiers.register(b)
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            mm.notifiers.unregister(a)
        assert calls == ["b S1", "a S1", "a release", "b E1"]

    @pytest.mark.parametrize("where", ["start", "end"])
    def test_not_inside_a_callback(self, mm: World, calls: list[str], where: str) -> None:
        a, b = Spy("a", calls), Spy("b", calls)
        seen: list[int] = []
        b.inside = lambda call: seen.append(error_of(lambda: mm.notifiers.unregister(a))) if call == where else None
        mm.notifiers.register(a)
        mm.notifiers.register(b)
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass
        assert seen == [errno.EDEADLK]
        assert calls == ["b S1", "a S1", "b E1", "a E1"]

    def test_an_exception_in_release_does_not_keep_it_linked(self, mm: World, calls: list[str]) -> None:
        a = Spy("a", calls)
        mm.notifiers.register(a)

        def fail(call: str) -> None:
            raise KeyError(call)

        a.inside = fail
        with pytest.raises(KeyError):
            mm.notifiers.unregister(a)
        assert len(mm.notifiers) == 0
        assert a.subscribed_to is None


class TestDeathOfTheMm:
    def test_all_are_released_while_linked_and_then_unlinked(self, mm: World, calls: list[str]) -> None:
        a, b = Spy("a", calls), Spy("b", calls)
        mm.notifiers.register(a)
        mm.notifiers.register(b)
        for spy in (a, b):
            spy.inside = lambda call: calls.append(f"{len(mm.notifiers)} linked")
        mm.notifiers.release()
        mm.notifiers.release()
        with mm.notifiers.invalidate_range(0, 0x1000, RangeEvent.UNMAP) as range:
            pass
        assert range is None
        assert calls == ["b release", "2 linked", "a release", "2 linked"]

    def test_unregister_afterwards_succeeds_without_a_second_release(self, mm: World, calls: list[str]) -> None:
        a = Spy("a", calls)
        mm.notifiers.register(a)
        mm.notifiers.release()
        assert a.subscribed_to is mm.notifiers
        mm.notifiers.unregister(a)
        assert a.subscribed_to is None
        assert calls == ["a release"]

    def test_ranges_still_reach_a_notifier_that_is_being_released(self, mm: World, calls: list[str]) -> None:
        """A truncate of a file goes on through another path while the mm exits."""
        a = Spy("a", calls)

        def truncate(call: str) -> None:
            if call == "release":
                with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
                    pass

        a.inside = truncate
        mm.notifiers.register(a)
        mm.notifiers.release()
        assert calls == ["a release", "a S1", "a E1"]

    def test_an_open_range_ends_silently_after_the_release(self, mm: World, calls: list[str]) -> None:
        mm.notifiers.register(Spy("a", calls))
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            mm.notifiers.release()
        assert calls == ["a S1", "a release"]
        assert mm.notifiers.open_ranges == ()

    def test_exit_racing_with_unregister_releases_twice(self, mm: World, calls: list[str]) -> None:
        a = Spy("a", calls)
        mm.notifiers.register(a)

        def exit_mm(label: str) -> None:
            if label == "notifier.unregister.released":
                mm.notifiers.release()

        with on_point(exit_mm):
            mm.notifiers.unregister(a)
        assert calls == ["a release", "a release"]
        assert len(mm.notifiers) == 0
        assert a.subscribed_to is None

    def test_unregister_racing_with_exit(self, mm: World, calls: list[str]) -> None:
        a, b = Spy("a", calls), Spy("b", calls)
        mm.notifiers.register(a)
        mm.notifiers.register(b)

        def leave(label: str) -> None:
            if label == "notifier.release.called" and a.subscribed_to is not None:
                mm.notifiers.unregister(a)

        with on_point(leave):
            mm.notifiers.release()
        assert calls == ["b release", "a release"]

    @pytest.mark.parametrize("how", ["unregister", "release"])
    def test_nothing_runs_any_more_afterwards(self, mm: World, calls: list[str], how: str) -> None:
        """A walk that had begun when the notifier was unlinked is waited for."""
        a = Spy("a", calls)
        mm.notifiers.register(a)
        walks: list[int] = []

        def others(label: str) -> None:
            if label in ("notifier.unregister.released", "notifier.release.called"):
                walks.append(mm.notifiers._srcu.read_lock())
            elif label == "notifier.synchronize":
                assert list(mm.notifiers) == []
                calls.append("walk ends")
                mm.notifiers._srcu.read_unlock(walks.pop())

        with on_point(others):
            if how == "unregister":
                mm.notifiers.unregister(a)
            else:
                mm.notifiers.release()
        assert calls == ["a release", "walk ends"]

    def test_not_inside_a_callback(self, mm: World, calls: list[str]) -> None:
        a = Spy("a", calls)
        seen: list[int] = []
        a.inside = lambda call: seen.append(error_of(mm.notifiers.release))
        mm.notifiers.register(a)
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass
        assert seen == [errno.EDEADLK, errno.EDEADLK]
        a.inside = lambda call: None
        mm.notifiers.release()
        assert calls == ["a S1", "a E1", "a release"]

    def test_one_that_raises_does_not_spare_the_others(self, mm: World, calls: list[str]) -> None:
        a, b = Spy("a", calls), Spy("b", calls)

        def fail(call: str) -> None:
            raise KeyError(call)

        b.inside = fail
        mm.notifiers.register(a)
        mm.notifiers.register(b)
        with pytest.raises(KeyError):
            mm.notifiers.release()
        assert calls == ["b release", "a release"]
        assert len(mm.notifiers) == 0


class TestFailures:
    def test_a_start_that_raises_undoes_those_before_it(self, mm: World, calls: list[str]) -> None:
        spies = [Spy(name, calls) for name in "abc"]
        for spy in spies:
            mm.notifiers.register(spy)

        def fail(call: str) -> None:
            if call == "start":
                raise KeyError(call)

        spies[1].inside = fail
        with pytest.raises(KeyError), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            calls.append("change")
        assert calls == ["c S1", "b S1", "c E1"]
        assert mm.notifiers.open_ranges == ()
        spies[1].inside = lambda call: None
        with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass
        assert calls[3:] == ["c S2", "b S2", "a S2", "c E2", "b E2", "a E2"]

    def test_an_end_that_raises_still_tells_the_others(self, mm: World, calls: list[str]) -> None:
        a, b = Spy("a", calls), Spy("b", calls)

        def fail(call: str) -> None:
            if call == "end":
                raise KeyError(call)

        b.inside = fail
        mm.notifiers.register(a)
        mm.notifiers.register(b)
        with pytest.raises(KeyError), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass
        assert calls == ["b S1", "a S1", "b E1", "a E1"]
        assert mm.notifiers.open_ranges == ()

    def test_an_actor_aborted_between_start_and_change_leaves_nothing_open(self, mm: World, calls: list[str]) -> None:
        def abort(label: str) -> None:
            if label == "notifier.range_start.done":
                raise KeyboardInterrupt

        mm.notifiers.register(Spy("a", calls))
        with on_point(abort), pytest.raises(KeyboardInterrupt), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            calls.append("change")
        assert calls == ["a S1", "a E1"]
        assert mm.notifiers.open_ranges == ()

    def test_one_that_cannot_block_stops_the_range_after_all_were_told(self, mm: World, calls: list[str]) -> None:
        mm.notifiers.register(Spy("a", calls))
        mm.notifiers.register(Decliner("b", calls))
        mm.notifiers.register(Spy("c", calls))

        def reap() -> None:
            with mm.notifiers.invalidate_range(0x1000, 0x2000, RangeEvent.UNMAP, blockable=False):
                calls.append("change")

        assert error_of(reap) == errno.EAGAIN
        assert calls == ["c S1", "b S1", "a S1", "c E1", "a E1"]
        assert mm.notifiers.open_ranges == ()

    def test_whoever_declines_must_not_want_an_end(self, mm: World, calls: list[str]) -> None:
        """It could not know which ends are not its own."""
        mm.notifiers.register(Spy("a", calls, answer=-errno.EAGAIN))
        mm.notifiers.register(Spy("b", calls))
        with pytest.raises(InternalError, match="would be told of its end"):
            mm.notifiers.invalidate_range_start(0x1000, 0x2000, CLEAR, blockable=False)
        assert calls == ["b S1", "a S1", "b E1"]
        assert mm.notifiers.open_ranges == ()

    @pytest.mark.parametrize(("answer", "blockable"), [(-errno.EAGAIN, True), (-errno.EINVAL, False), (1, True)])
    def test_other_answers_are_defects(self, mm: World, calls: list[str], answer: int, blockable: bool) -> None:
        mm.notifiers.register(Spy("a", calls, answer))
        mm.notifiers.register(Spy("b", calls))
        with pytest.raises(InternalError, match=f"a returned {answer}"):
            mm.notifiers.invalidate_range_start(0x1000, 0x2000, CLEAR, blockable=blockable)
        assert calls == ["b S1", "a S1", "b E1"]


def test_trace(mm: World, calls: list[str]) -> None:
    events: list[Event] = []
    mm.trace.attach(events.append)
    a = Spy("a", calls)
    a.inside = lambda call: mm.trace.emit("page_alloc", pfn=1) and None
    mm.notifiers.register(a)
    with mm.notifiers.invalidate_range(0x1000, 0x3000, RangeEvent.PROTECTION_VMA):
        mm.trace.emit("primary_tlb_flush", mm="mm0", start=0x1000, end=0x3000)
    mm.notifiers.unregister(a)
    assert [(e.seq, e.cause, e.kind.removeprefix("mmu_notifier_")) for e in events] == [
        (1, 0, "register"),
        (2, 0, "invalidate_range_start"),
        (3, 2, "page_alloc"),
        (4, 0, "primary_tlb_flush"),
        (5, 0, "invalidate_range_end"),
        (6, 5, "page_alloc"),
        (7, 0, "release"),
        (8, 7, "page_alloc"),
        (9, 0, "unregister"),
    ]
    whole = {"mm": "mm0", "start": 0x1000, "end": 0x3000, "event": "PROTECTION_VMA", "range": 1}
    assert events[1].fields == whole
    assert events[4].fields == whole
    assert events[0].fields == {"mm": "mm0", "notifier": "a", "protocol": "modern"}


@given(st.data())
def test_every_notifier_sees_pairs_whatever_happens(data: st.DataObject) -> None:
    """Random starts, ends in any order, joins, leaves and a death: a start for each end, and no call when unlinked."""
    mm = World()
    started: dict[str, set[int]] = {}
    linked: set[str] = set()

    class Checker(MmuNotifier):
        def __init__(self, name: str) -> None:
            self.name = name

        def release(self, mm: NotifiedMm) -> None:
            assert self.name in linked
            linked.discard(self.name)

        def invalidate_range_start(self, range: MmuNotifierRange) -> int:
            assert self.name in linked
            started.setdefault(self.name, set()).add(range.id)
            return 0

        def invalidate_range_end(self, range: MmuNotifierRange) -> None:
            assert self.name in linked
            started[self.name].remove(range.id)

    notifiers = [Checker(name) for name in "abc"]
    open: list[MmuNotifierRange | None] = []
    dead = False
    steps = data.draw(st.lists(st.sampled_from(["start", "end", "join", "leave", "die"]), max_size=40))
    for step in steps:
        if step == "start":
            open.append(mm.notifiers.invalidate_range_start(0x1000, 0x2000, CLEAR))
        elif step == "end" and open:
            mm.notifiers.invalidate_range_end(open.pop(data.draw(st.integers(0, len(open) - 1))))
        elif step == "join":
            notifier = data.draw(st.sampled_from(notifiers))
            allowed = not open and not dead and notifier.subscribed_to is None
            try:
                mm.notifiers.register(notifier)
            except MmError:
                assert not allowed
            else:
                assert allowed
                linked.add(notifier.name)
        elif step == "leave":
            notifier = data.draw(st.sampled_from(notifiers))
            if notifier.subscribed_to is not None:
                mm.notifiers.unregister(notifier)
                started.pop(notifier.name, None)
                assert notifier.name not in linked
        elif step == "die":
            dead = True
            mm.notifiers.release()
            started.clear()
            assert not linked
        assert {n.name for n in mm.notifiers} == linked
    while open:
        mm.notifiers.invalidate_range_end(open.pop())
    assert not any(started.values())
