"""Young pages and TLBs that follow the host's: who is asked, what the answer is, and that none may sleep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.notifier.world import World
from xipvm.actors import point
from xipvm.errors import InternalError
from xipvm.notifier import (
    ULONG_MAX,
    MmuIntervalNotifier,
    MmuNotifier,
    MmuNotifierRange,
    RangeEvent,
    atomic,
    might_sleep,
)
from xipvm.trace import Event

HOOKS = ["clear_flush_young", "clear_young", "test_young"]


class Spy(MmuNotifier):
    """Answers all questions with ``young``."""

    def __init__(self, name: str, young: bool, calls: list[str]) -> None:
        self.name, self.young, self.calls = name, young, calls

    def clear_flush_young(self, start: int, end: int) -> bool:
        self.calls.append(f"{self.name} {start:#x} {end:#x}")
        return self.young

    def clear_young(self, start: int, end: int) -> bool:
        self.calls.append(f"{self.name} {start:#x} {end:#x}")
        return self.young

    def test_young(self, address: int) -> bool:
        self.calls.append(f"{self.name} {address:#x}")
        return self.young


class Tlb(MmuNotifier):
    """Walks the primary page table."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        self.calls.append(f"flush {start:#x} {end:#x}")


class Sleepy(MmuNotifier):
    """Sleeps where it must not."""

    def sleep(self) -> bool:
        point("atomic.other_cpus_run")  # allowed
        might_sleep("kmalloc")
        return True

    def clear_flush_young(self, start: int, end: int) -> bool:
        return self.sleep()

    def clear_young(self, start: int, end: int) -> bool:
        return self.sleep()

    def test_young(self, address: int) -> bool:
        return self.sleep()

    def arch_invalidate_secondary_tlbs(self, start: int, end: int) -> None:
        self.sleep()


def ask(mm: World, hook: str) -> bool:
    range = (0x1000,) if hook == "test_young" else (0x1000, 0x3000)
    answer = getattr(mm.notifiers, hook)(*range)
    assert isinstance(answer, bool)
    return answer


@given(st.sampled_from(HOOKS), st.lists(st.booleans(), max_size=5))
def test_the_answer_is_the_or_of_all(hook: str, answers: list[bool]) -> None:
    """Clearing asks everybody, since everybody has to clear; testing stops at the first."""
    mm, calls = World(), list[str]()
    for number, young in enumerate(answers):
        mm.notifiers.register(Spy(str(number), young, calls))
    assert ask(mm, hook) is any(answers)
    order = list(reversed(range(len(answers))))
    if hook == "test_young":
        first = next((at for at, number in enumerate(order) if answers[number]), len(order))
        order = order[: first + 1]
    where = "0x1000" if hook == "test_young" else "0x1000 0x3000"
    assert calls == [f"{number} {where}" for number in order]


def test_only_who_has_the_hook_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    mm, calls = World(), list[str]()
    events: list[Event] = []

    def called(*_: object) -> None:
        raise AssertionError("the base was called")

    for name in [*HOOKS, "arch_invalidate_secondary_tlbs"]:
        monkeypatch.setattr(MmuNotifier, name, called)
    mm.notifiers.register(MmuNotifier())
    mm.trace.attach(events.append)
    assert not any(ask(mm, hook) for hook in HOOKS)
    mm.notifiers.arch_invalidate_secondary_tlbs(0x1000, 0x2000)
    assert events == []
    mm.notifiers.register(Tlb(calls))
    mm.notifiers.register(Spy("a", True, calls))
    assert all(ask(mm, hook) for hook in HOOKS)
    mm.notifiers.arch_invalidate_secondary_tlbs(0x1000, ULONG_MAX)
    assert calls == ["a 0x1000 0x3000", "a 0x1000 0x3000", "a 0x1000", f"flush 0x1000 {ULONG_MAX:#x}"]


def test_they_are_not_called_after_leaving() -> None:
    mm, calls = World(), list[str]()
    spy, tlb = Spy("a", True, calls), Tlb(calls)
    mm.notifiers.register(spy)
    mm.notifiers.register(tlb)
    mm.notifiers.unregister(spy)
    mm.notifiers.release()
    assert not any(ask(mm, hook) for hook in HOOKS)
    mm.notifiers.arch_invalidate_secondary_tlbs(0, ULONG_MAX)
    assert calls == []


@pytest.mark.parametrize("hook", [*HOOKS, "arch_invalidate_secondary_tlbs"])
def test_none_may_sleep(hook: str) -> None:
    mm = World()
    mm.notifiers.register(Sleepy())
    args = (0x1000,) if hook == "test_young" else (0x1000, 0x2000)
    with pytest.raises(InternalError, match=f"kmalloc may sleep, and was called in {hook}"):
        getattr(mm.notifiers, hook)(*args)
    might_sleep("afterwards")  # the section is closed
    mm.notifiers.register(MmuNotifier())  # and nothing is thought to run


@pytest.mark.parametrize("blockable", [True, False])
def test_a_range_that_may_not_block(blockable: bool) -> None:
    class Blocking(MmuNotifier):
        def invalidate_range_start(self, range: MmuNotifierRange) -> int:
            might_sleep("mutex_lock")
            return 0

    class Watcher(MmuIntervalNotifier):
        def invalidate(self, range: MmuNotifierRange, cur_seq: int) -> bool:
            might_sleep("down_read")
            return super().invalidate(range, cur_seq)

    for sleeper, what in ((Blocking(), "mutex_lock"), (Watcher(), "down_read")):
        mm = World()
        if isinstance(sleeper, Watcher):
            mm.notifiers.insert_interval(sleeper, 0, 0x1000)
        else:
            mm.notifiers.register(sleeper)
        range = mm.notifiers.invalidate_range(0, 0x1000, RangeEvent.UNMAP, blockable=blockable)
        if blockable:
            with range:
                pass
        else:
            with pytest.raises(InternalError, match=f"{what} may sleep, and was called in a range that may not"), range:
                pass
        assert mm.notifiers.open_ranges == ()


@pytest.mark.parametrize(
    "call", ["register", "unregister", "get", "synchronize", "release", "insert", "remove", "start", "read_begin"]
)
def test_what_sleeps_is_refused_in_atomic_context(call: str) -> None:
    mm, linked, watcher = World(), MmuNotifier(), MmuIntervalNotifier()
    mm.notifiers.register(linked)
    mm.notifiers.insert_interval(watcher, 0, 0x1000)
    calls = {
        "register": lambda: mm.notifiers.register(MmuNotifier()),
        "unregister": lambda: mm.notifiers.unregister(linked),
        "get": lambda: mm.notifiers.get(Tlb),
        "synchronize": mm.notifiers.synchronize,
        "release": mm.notifiers.release,
        "insert": lambda: mm.notifiers.insert_interval(MmuIntervalNotifier(), 0, 1),
        "remove": lambda: mm.notifiers.remove_interval(watcher),
        "start": lambda: mm.notifiers.invalidate_range_start(0, 0x1000, RangeEvent.CLEAR),
        "read_begin": watcher.read_begin,
    }
    with atomic("a spinlock"), pytest.raises(InternalError, match="may sleep, and was called in a spinlock"):
        calls[call]()
    assert list(mm.notifiers) == [linked]
    assert mm.notifiers.open_ranges == ()
    assert watcher.subscribed_to is mm.notifiers.intervals
    calls[call]() if call not in ("get", "start") else None


def test_trace() -> None:
    mm, calls = World(), list[str]()
    mm.notifiers.register(Spy("a", True, calls))
    mm.notifiers.register(Tlb(calls))
    events: list[Event] = []
    mm.trace.attach(events.append)
    for hook in HOOKS:
        ask(mm, hook)
    mm.notifiers.arch_invalidate_secondary_tlbs(0x1000, 0x2000)
    span = {"mm": "mm0", "start": 0x1000, "end": 0x3000}
    assert [(e.kind.removeprefix("mmu_notifier_"), e.fields) for e in events] == [
        ("clear_flush_young", {**span, "young": True}),
        ("clear_young", {**span, "young": True}),
        ("test_young", {"mm": "mm0", "address": 0x1000, "young": True}),
        ("arch_invalidate_secondary_tlbs", {**span, "end": 0x2000}),
    ]
