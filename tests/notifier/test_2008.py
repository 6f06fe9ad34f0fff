"""The protocol of 2008: who is told what, what may not sleep, and what there was not yet."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.notifier.world import World, error_of
from xipvm.actors import on_point
from xipvm.errors import BadInput, InternalError, LockError, ProtocolUnsupported
from xipvm.notifier import (
    PROTOCOLS,
    MmuIntervalNotifier,
    MmuNotifier,
    MmuNotifier2008,
    NotifiedMm,
    RangeEvent,
    might_sleep,
    notifiers_of,
)
from xipvm.trace import Event

CLEAR = RangeEvent.CLEAR
PAGE = 4096


class Spy(MmuNotifier2008):
    """Writes down its calls in a list it shares with others; ``inside`` runs in each of them."""

    def __init__(self, name: str, calls: list[str], young: bool = False) -> None:
        self.name = name
        self.calls = calls
        self.young = young
        self.inside: Callable[[str], None] = lambda call: None

    def note(self, call: str) -> None:
        self.calls.append(f"{self.name} {call}")
        self.inside(call.partition(" ")[0])

    def release(self, mm: NotifiedMm) -> None:
        self.note("release")

    def clear_flush_young(self, mm: NotifiedMm, address: int) -> bool:
        self.note(f"young {address:#x}")
        return self.young

    def invalidate_page(self, mm: NotifiedMm, address: int) -> None:
        self.note(f"page {address:#x}")

    def invalidate_range_start(self, mm: NotifiedMm, start: int, end: int) -> None:
        self.note(f"S {start:#x}-{end:#x}")

    def invalidate_range_end(self, mm: NotifiedMm, start: int, end: int) -> None:
        self.note(f"E {start:#x}-{end:#x}")


@pytest.fixture
def mm() -> World:
    return World(protocol="2008")


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def spies(mm: World, calls: list[str]) -> list[Spy]:
    """Two, the second registered last."""
    spies = [Spy("a", calls), Spy("b", calls)]
    for spy in spies:
        mm.notifiers.register(spy)
    return spies


@pytest.fixture
def events(mm: World) -> list[Event]:
    seen: list[Event] = []
    mm.trace.attach(seen.append)
    return seen


def use(mm: World, callback: str) -> None:
    """Have ``callback`` called."""
    notifiers = mm.notifiers
    if callback == "young":
        notifiers.clear_flush_young(0x1000, 0x2000)
    elif callback == "page":
        notifiers.invalidate_page(0x1000)
    elif callback == "release":
        notifiers.release()
    else:
        with notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
            pass


CALLBACKS = ["young", "page", "S", "E", "release"]


# ---- dispatch


def test_a_range_tells_addresses(mm: World, spies: list[Spy], calls: list[str]) -> None:
    with mm.notifiers.invalidate_range(0x1000, 0x3000, CLEAR) as range:
        assert mm.notifiers.open_ranges == (range,)
        calls.append("change")
    assert calls == ["b S 0x1000-0x3000", "a S 0x1000-0x3000", "change", "b E 0x1000-0x3000", "a E 0x1000-0x3000"]


def test_a_page_is_told_when_it_has_changed(mm: World, spies: list[Spy], calls: list[str]) -> None:
    with mm.notifiers.around_entry(0x1000, 0x2000, CLEAR):
        calls.append("change")
        mm.notifiers.invalidate_page(0x1000)
    assert calls == ["change", "b page 0x1000", "a page 0x1000"]
    assert mm.notifiers.open_ranges == ()


def test_young_is_asked_by_page_and_everybody(mm: World, spies: list[Spy], calls: list[str]) -> None:
    spies[1].young = True
    assert mm.notifiers.clear_flush_young(0x1000, 0x3000)
    assert calls == ["b young 0x1000", "a young 0x1000", "b young 0x2000", "a young 0x2000"]
    spies[1].young = False
    assert not mm.notifiers.clear_flush_young(0x1000, 0x2000)


def test_callbacks_that_are_left_out(mm: World, events: list[Event]) -> None:
    mm.notifiers.register(MmuNotifier2008())
    for callback in CALLBACKS:
        use(mm, callback)
    assert [event.kind for event in events] == [
        "mmu_notifier_register",
        "mmu_notifier_invalidate_range_start",
        "mmu_notifier_invalidate_range_end",
        "mmu_notifier_invalidate_range_start",
        "mmu_notifier_invalidate_range_end",
        "mmu_notifier_release",
    ]


def test_the_trace_says_which_protocol_it_was(mm: World, spies: list[Spy], events: list[Event]) -> None:
    """There are no kinds of change, and there is an event that is in no other protocol; what it provokes says so."""
    spies[0].inside = lambda call: void(mm.trace.emit("spte_age", vm="vm0", start=0, end=1))
    with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
        pass
    mm.notifiers.invalidate_page(0x3000)
    start, _, end, _, page, aged = events
    assert start.fields == {"mm": "mm0", "start": 0x1000, "end": 0x2000, "event": None, "range": 1}
    assert end.fields == start.fields
    assert (page.kind, page.fields) == ("mmu_notifier_invalidate_page", {"mm": "mm0", "address": 0x3000})
    assert (aged.cause, mm.trace.cause) == (page.seq, 0)


def void(_: object) -> None:
    """For lambdas."""


def test_without_notifiers_nothing_is_done(mm: World, events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even once somebody was registered: no section is opened, nothing is told."""
    spy = Spy("a", [])
    mm.notifiers.register(spy)
    mm.notifiers.unregister(spy)
    assert mm.notifiers.has_notifiers
    del events[:]
    monkeypatch.setattr(type(mm.notifiers._srcu), "read_lock", lambda self: pytest.fail("a section was opened"))
    for callback in CALLBACKS[:-1]:
        use(mm, callback)
    with mm.notifiers.around_entry(0, PAGE, CLEAR):
        mm.notifiers.invalidate_page(0)
    assert events == []


# ---- nothing may sleep


@pytest.mark.parametrize("callback", CALLBACKS)
def test_sleeping_is_reported(mm: World, spies: list[Spy], callback: str) -> None:
    def sleep(call: str) -> None:
        if call == callback:
            might_sleep("mutex_lock")

    spies[0].inside = sleep
    with pytest.raises(InternalError, match=r"mutex_lock may sleep, and was called in mmu_notifier_"):
        use(mm, callback)
    might_sleep("the caller, afterwards,")
    assert mm.notifiers.open_ranges == ()


@pytest.mark.parametrize("callback", CALLBACKS)
def test_joining_and_leaving_from_a_callback_is_reported(mm: World, spies: list[Spy], callback: str) -> None:
    def leave(call: str) -> None:
        if call == callback:
            mm.notifiers.unregister(spies[1])

    spies[0].inside = leave
    with pytest.raises(LockError, match="mmu_notifier_unregister"):  # it would sleep, and wait for itself
        use(mm, callback)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_schedule_points_are_allowed(mm: World, spies: list[Spy], callback: str) -> None:
    from xipvm.actors import point

    seen: list[str] = []
    spies[0].inside = lambda call: point(f"spy.{call}")
    with on_point(seen.append):
        use(mm, callback)
    assert f"spy.{callback}" in seen


# ---- errors of callbacks


def test_a_start_that_raises(mm: World, spies: list[Spy], calls: list[str]) -> None:
    """Those before it get their end; it does not, and nothing was changed."""

    def fail(call: str) -> None:
        if call == "S":
            raise RuntimeError("start")

    spies[0].inside = fail
    with pytest.raises(RuntimeError, match="start"), mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
        pytest.fail("the change went on")
    assert calls == ["b S 0x1000-0x2000", "a S 0x1000-0x2000", "b E 0x1000-0x2000"]
    assert mm.notifiers.open_ranges == ()


@pytest.mark.parametrize("callback", ["page", "E", "release"])
def test_an_error_keeps_nobody_from_being_told(mm: World, spies: list[Spy], calls: list[str], callback: str) -> None:
    def fail(call: str) -> None:
        if call == callback:
            raise RuntimeError(call)

    spies[1].inside = fail
    with pytest.raises(RuntimeError, match=callback):
        use(mm, callback)
    assert [call.split()[:2] for call in calls][-2:] == [["b", callback], ["a", callback]]


# ---- joining and leaving


def test_registering(mm: World, calls: list[str]) -> None:
    spy = Spy("a", calls)
    mm.notifiers.register(spy)
    assert (list(mm.notifiers), mm.locking, spy.subscribed_to) == ([spy], ["locked", "unlocked"], mm.notifiers)
    assert error_of(lambda: mm.notifiers.register(spy)) == errno.EINVAL
    assert list(mm.notifiers) == [spy]


@pytest.mark.parametrize(
    ("fault", "error"), [("out_of_memory", errno.ENOMEM), ("signal_pending", errno.EINTR), ("dead", errno.ESRCH)]
)
def test_registering_that_fails_changes_nothing(mm: World, calls: list[str], fault: str, error: int) -> None:
    if fault == "dead":
        mm.notifiers.release()
    else:
        setattr(mm.notifiers, fault, lambda: True)
    spy = Spy("a", calls)
    assert error_of(lambda: mm.notifiers.register(spy)) == error
    assert (list(mm.notifiers), mm.notifiers.has_notifiers, spy.subscribed_to, spy.users) == ([], False, None, 0)
    assert not mm.mmap_lock.writer


def test_registering_waits_for_ranges(mm: World, spies: list[Spy]) -> None:
    with mm.notifiers.invalidate_range(0x1000, 0x2000, CLEAR):
        assert error_of(lambda: mm.notifiers.register(Spy("c", []))) == errno.EDEADLK
    assert list(mm.notifiers) == spies[::-1]


def test_each_protocol_has_its_notifiers(mm: World) -> None:
    for world, wrong in ((mm, MmuNotifier()), (World(), MmuNotifier2008())):
        with pytest.raises(ProtocolUnsupported):
            world.notifiers.register(wrong)
        assert (list(world.notifiers), wrong.subscribed_to, world.notifiers.has_notifiers) == ([], None, False)


def test_unregistering_unlinks_first(mm: World, spies: list[Spy], calls: list[str]) -> None:
    """What was a mistake: a change while it releases does not reach it."""
    spies[1].inside = lambda call: mm.notifiers.invalidate_page(0x1000) if call == "release" else None
    mm.notifiers.unregister(spies[1])
    assert calls == ["b release", "a page 0x1000"]
    assert list(mm.notifiers) == [spies[0]]
    assert error_of(lambda: mm.notifiers.unregister(spies[1])) == errno.EINVAL


def test_the_end_of_the_mm_unlinks_first(mm: World, spies: list[Spy], calls: list[str]) -> None:
    seen: list[int] = []
    for spy in spies:
        spy.inside = lambda call: seen.append(len(mm.notifiers))
    mm.notifiers.release()
    assert (calls, seen) == (["b release", "a release"], [1, 0])
    mm.notifiers.release()
    assert calls == ["b release", "a release"]
    mm.notifiers.unregister(spies[0])  # is late, and not told again
    assert calls == ["b release", "a release"]
    assert mm.notifiers.has_notifiers


def test_unregistering_while_the_mm_ends(mm: World, spies: list[Spy], calls: list[str]) -> None:
    """Between two releases: each is called once."""
    pending = [lambda: mm.notifiers.unregister(spies[0])]

    def hook(label: str) -> None:
        if label == "notifier.release.called" and pending:
            pending.pop()()

    with on_point(hook):
        mm.notifiers.release()
    assert calls == ["b release", "a release"]


# ---- what there was not


@pytest.mark.parametrize(
    "call",
    [
        lambda n: n.get(MmuNotifier),
        lambda n: n.put(MmuNotifier()),
        lambda n: n.insert_interval(MmuIntervalNotifier(), 0, PAGE),
        lambda n: n.clear_young(0, PAGE),
        lambda n: n.test_young(0),
        lambda n: n.invalidate_range(0, PAGE, CLEAR, blockable=False),
        lambda n: n.invalidate_range_start(0, PAGE, CLEAR, blockable=False),
        lambda n: n.invalidate_range(0, PAGE, RangeEvent.MIGRATE, owner=object()),
        lambda n: n.needs_modern("KSM"),
    ],
)
def test_what_came_later(mm: World, spies: list[Spy], calls: list[str], call: Callable[[object], object]) -> None:
    with pytest.raises(ProtocolUnsupported, match="the 2008 notifier protocol has no such thing") as caught:
        call(mm.notifiers)
    assert caught.value.protocol == "2008"
    assert (calls, list(mm.notifiers), mm.notifiers.intervals) == ([], spies[::-1], None)
    with mm.notifiers.invalidate_range(0, PAGE, CLEAR):  # nothing was counted either
        pass
    mm.notifiers.register(Spy("c", calls))


def test_tlbs_that_follow_the_hosts_do_not_exist(mm: World, spies: list[Spy], calls: list[str]) -> None:
    """Who flushes the host's TLB must not have to know."""
    mm.notifiers.arch_invalidate_secondary_tlbs(0, PAGE)
    assert calls == []


def test_protocols_by_name(mm: World) -> None:
    assert PROTOCOLS == ("modern", "2008")
    assert [notifiers_of(mm, protocol).protocol for protocol in PROTOCOLS] == ["modern", "2008"]
    with pytest.raises(BadInput, match="known are modern, 2008"):
        notifiers_of(mm, "2012")
