"""Each rule of locking has a mistake here that it reports, with both stacks, and an innocent neighbour."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from xipvm.actors import on_point, on_wait, point
from xipvm.errors import (
    AtomicSleepError,
    DeadlockError,
    InternalError,
    LockError,
    LockLeakError,
    LockOrderError,
    MmError,
    RecursiveLockError,
)
from xipvm.locks import KeyedLocks, LockClass, RwLock, atomic, checking, might_sleep, nothing_held, order, sleep_until
from xipvm.locks.order import ANON_VMA, I_MMAP, MMAP_LOCK, PTL
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.notifier import MmuNotifier, MmuNotifierRange, RangeEvent
from xipvm.scheduler import Scheduler
from xipvm.trace.funnel import Trace

A, B, C = LockClass("a"), LockClass("b"), LockClass("c")


def take_ab(a: RwLock, b: RwLock) -> None:
    with a.read, b.write:
        pass


def take_ba(a: RwLock, b: RwLock) -> None:
    with b.write, a.write:
        pass


def test_a_free_lock_is_just_taken() -> None:
    lock = RwLock("lock", A)
    with lock.read, lock.read:  # nobody looks
        assert (lock.readers, lock.writer) == (2, 0)
    with lock.write:
        lock.downgrade()
        assert (lock.readers, lock.writer) == (1, 0)
    assert not lock.taken
    with pytest.raises(InternalError, match="by a reader, and has none"):
        lock.read.__exit__()
    with pytest.raises(InternalError, match="by a writer, and has none"):
        lock.write.__exit__()


class TestOrder:
    def test_the_table(self) -> None:
        mmap_lock, i_mmap = RwLock("mmap_lock of mm0", MMAP_LOCK), RwLock("i_mmap of f", I_MMAP)
        with checking() as checker:
            with mmap_lock.read, i_mmap.write:
                pass
            with pytest.raises(LockOrderError, match="but mmap_lock comes before i_mmap_rwsem") as caught:  # noqa: SIM117
                with i_mmap.read, mmap_lock.read:
                    pass
            assert checker.orders.keys() == {(MMAP_LOCK, I_MMAP)}
        assert (caught.value.held, caught.value.taken, caught.value.rule) == ("i_mmap_rwsem", "mmap_lock", "order")
        assert not i_mmap.taken
        assert not mmap_lock.taken

    def test_the_table_needs_nothing_to_have_been_seen(self) -> None:
        """Every pair of ranks, the wrong way round."""
        ranked = [cls for cls in vars(order).values() if isinstance(cls, LockClass)]
        assert len(ranked) > 8
        for first in ranked:
            for second in ranked:
                one, two = RwLock("one", first), RwLock("two", second)
                wrong = first.rank is not None and second.rank is not None and first.rank > second.rank
                with checking():
                    if wrong:
                        with pytest.raises((LockOrderError, AtomicSleepError)), one.write, two.write:
                            pass
                    elif first is not second:
                        with one.write, two.write:
                            pass
                assert not one.taken
                assert not two.taken

    def test_the_order_is_the_documented_one(self) -> None:
        ranked = sorted(
            (cls for cls in vars(order).values() if isinstance(cls, LockClass)), key=lambda cls: cls.rank or 0
        )
        text = (Path(__file__).parents[2] / "docs" / "locks.md").read_text()
        places = [text.index(cls.name, text.index("From the outermost")) for cls in ranked if "hugetlb" not in cls.name]
        assert places == sorted(places)
        assert len({cls.rank for cls in ranked}) == len(ranked)

    def test_what_was_seen_with_the_stack_of_when(self) -> None:
        a, b = RwLock("one a", A), RwLock("one b", B)
        with checking():
            take_ab(a, b)
            take_ab(RwLock("other a", A), RwLock("other b", B))
            with pytest.raises(LockOrderError, match="but a → b was seen") as caught:
                take_ba(a, b)
        assert "in take_ab" in caught.value.first
        assert "in take_ba" in caught.value.second
        assert "take_ab" in caught.value.report()
        assert "take_ba" in caught.value.report()
        assert (caught.value.held, caught.value.taken, caught.value.actor) == ("b", "a", "host")

    def test_a_circle_of_three(self) -> None:
        a, b, c = RwLock("a", A), RwLock("b", B), RwLock("c", C)
        with checking():
            take_ab(a, b)
            take_ab(b, c)
            with pytest.raises(LockOrderError, match="a → b → c was seen"):
                take_ab(c, a)

    def test_other_contexts_know_nothing_of_it(self) -> None:
        a, b = RwLock("a", A), RwLock("b", B)
        with checking():
            take_ab(a, b)
        with checking():
            take_ba(a, b)
        take_ab(a, b)

    def test_two_of_a_class_need_an_order(self) -> None:
        one, two = RwLock("one", ANON_VMA), RwLock("two", ANON_VMA)
        with checking():
            with one.write, two.nested:
                pass
            with pytest.raises(LockOrderError, match="two is taken while one is held, and nothing orders the two"):
                take_ab(one, two)

    def test_actors_have_orders_in_common_and_locks_of_their_own(self) -> None:
        a, b = RwLock("a", A), RwLock("b", B)
        scheduler = Scheduler(lambda n, label: n - 1)

        def hold_a() -> None:
            with a.read:
                point("held")

        def hold_b() -> None:
            with b.read:
                point("held")

        scheduler.spawn("a", hold_a)
        scheduler.spawn("b", hold_b)
        with checking() as checker:
            scheduler.run()
            assert checker.orders == {}
            take_ab(a, b)
            scheduler = Scheduler()
            scheduler.spawn("second", take_ba, a, b)
            with pytest.raises(LockOrderError, match="second: a is taken while b is held"):
                scheduler.run()

    def test_what_a_point_hook_does_is_another_actor_s(self) -> None:
        a, b = RwLock("a", A), RwLock("b", B)

        def hook(label: str) -> None:
            with a.read:
                pass

        with checking() as checker, on_point(hook):
            take_ab(a, b)
            with b.write:
                point("held")
            assert checker.orders.keys() == {(A, B)}


class TestRecursion:
    @pytest.mark.parametrize(("first", "second"), [("read", "read"), ("read", "write"), ("write", "read")])
    def test_a_lock_is_not_taken_twice(self, first: str, second: str) -> None:
        lock = RwLock("lock", A)
        with checking(), pytest.raises(RecursiveLockError) as caught:  # noqa: SIM117
            with getattr(lock, first), getattr(lock, second):
                pass
        assert str(caught.value).startswith(f"host takes lock ({second}), which it holds ({first})")
        assert caught.value.errno == errno.EDEADLK
        assert isinstance(caught.value, (LockError, MmError))
        assert "test_a_lock_is_not_taken_twice" in caught.value.first
        assert "test_a_lock_is_not_taken_twice" in caught.value.second
        assert not lock.taken

    def test_by_number(self) -> None:
        locks = KeyedLocks("page lock {:#x}", A)
        with checking():
            with locks(5), locks(6, nest=True):
                assert locks.held.keys() == {5, 6}
            with pytest.raises(RecursiveLockError, match="host takes page lock 0x5"), locks(5), locks(5):
                pass
            assert locks.held == {}

    def test_another_actor_waits_instead(self) -> None:
        locks, log = KeyedLocks("page lock {:#x}", A), list[str]()

        def use(name: str) -> None:
            with locks(5):
                log.append(name)
                point("held")
                log.append(name)

        scheduler = Scheduler(lambda n, label: n - 1)
        scheduler.spawn("one", use, "one")
        scheduler.spawn("two", use, "two")
        with checking():
            scheduler.run()
        assert log == ["two", "two", "one", "one"]

    def test_unregister_inside_a_callback(self, mm: Mm) -> None:
        """It would wait for the read section that it is called in."""
        caught: list[RecursiveLockError] = []

        class Leaver(MmuNotifier):
            def invalidate_range_start(self, range: MmuNotifierRange) -> int:
                with pytest.raises(RecursiveLockError) as error:
                    mm.notifiers.unregister(self)
                caught.append(error.value)
                return 0

        leaver = Leaver()
        with checking():
            mm.notifiers.register(leaver)
            with mm.notifiers.invalidate_range(0, 4096, RangeEvent.CLEAR):
                pass
            mm.notifiers.unregister(leaver)
        assert "mmu_notifier_unregister: host is itself in" in str(caught[0])
        assert "invalidate_range_start" in caught[0].first
        assert "unregister" in caught[0].second

    def test_two_that_unregister_in_each_other_s_callbacks_deadlock(self, mm: Mm) -> None:
        """Neither is in a section of its own: only a schedule shows it, and the scheduler says who waits."""
        other = Mm(mm.host, mm.trace, name="other")

        class Leaver(MmuNotifier):
            def __init__(self, target: Mm) -> None:
                self.target = target
                self.peer: MmuNotifier | None = None

            def invalidate_range_start(self, range: MmuNotifierRange) -> int:
                point("inside")
                if self.peer is not None:
                    self.target.notifiers.unregister(self.peer)
                return 0

        here, there = Leaver(other), Leaver(mm)
        here.peer, there.peer = there, here
        mm.notifiers.register(here)
        other.notifiers.register(there)

        def change(mm: Mm) -> None:
            with mm.notifiers.invalidate_range(0, 4096, RangeEvent.CLEAR):
                pass

        scheduler = Scheduler(lambda n, label: int(label == "inside"))
        scheduler.spawn("one", change, mm)
        scheduler.spawn("two", change, other)
        with checking(), pytest.raises(DeadlockError) as caught:
            scheduler.run()
        assert [(name, what) for name, what, _ in caught.value.waiting] == [
            ("one", "mmu_notifier_unregister"),
            ("two", "mmu_notifier_unregister"),
        ]
        assert mm.notifiers.open_ranges == other.notifiers.open_ranges == ()


class TestAtomicity:
    def sleeps(self) -> None:
        might_sleep("mutex_lock")

    def test_under_a_spinlock(self) -> None:
        ptl = KeyedLocks("page table lock {:#x}", PTL)
        with checking(), ptl(7), pytest.raises(AtomicSleepError) as caught:
            self.sleeps()
        assert str(caught.value) == "mutex_lock may sleep, and was called in page table lock 0x7"
        assert caught.value.why == "page table lock 0x7"
        assert "test_under_a_spinlock" in caught.value.first
        assert "in TestAtomicity.sleeps" in caught.value.second

    def test_a_sleeping_lock_under_a_spinlock(self) -> None:
        ptl, anon = KeyedLocks("page table lock {:#x}", PTL), RwLock("anon_vma 3", ANON_VMA)
        with checking(), ptl(7):  # noqa: SIM117
            with pytest.raises(AtomicSleepError, match="taking anon_vma 3 may sleep"), anon.read:
                pass

    def test_a_spinlock_under_a_spinlock(self) -> None:
        ptl = KeyedLocks("page table lock {:#x}", PTL)
        with checking(), ptl(7), RwLock("mmu_lock", order.MMU_LOCK).write:
            point("other CPUs run on")

    def test_in_an_atomic_section(self) -> None:
        with checking(), atomic("an SRCU callback"), pytest.raises(AtomicSleepError) as caught:
            sleep_until("an event", lambda: True)
        assert "test_in_an_atomic_section" in caught.value.first
        with atomic("an SRCU callback"), pytest.raises(AtomicSleepError) as caught:
            might_sleep("kmalloc")  # always, but without the first stack
        assert caught.value.first == ""
        assert "test_in_an_atomic_section" in caught.value.second
        might_sleep("afterwards")

    def test_sections_belong_to_actors(self) -> None:
        log: list[str] = []

        def in_atomic() -> None:
            with atomic("rcu"):
                point("inside")
                log.append("still inside")

        def sleeper() -> None:
            might_sleep("mutex_lock")
            log.append("slept")

        scheduler = Scheduler(lambda n, label: int(label == "inside"))
        scheduler.spawn("atomic", in_atomic)
        scheduler.spawn("sleeper", sleeper)
        with checking():
            scheduler.run()
        assert log == ["slept", "still inside"]

    def test_a_notifier_that_sleeps_in_a_range_that_may_not_block(self, mm: Mm) -> None:
        lock = RwLock("umem_mutex", LockClass("umem_mutex"))

        class Sleeper(MmuNotifier):
            def invalidate_range_start(self, range: MmuNotifierRange) -> int:
                with lock.write:
                    return 0

        mm.notifiers.register(Sleeper())
        with checking():
            mm.notifiers.invalidate_range_end(mm.notifiers.invalidate_range_start(0, 4096, RangeEvent.CLEAR))
            with pytest.raises(AtomicSleepError, match="in a range that may not block") as caught:
                mm.notifiers.invalidate_range_start(0, 4096, RangeEvent.CLEAR, blockable=False)
        assert "taking umem_mutex" in str(caught.value)
        assert mm.notifiers.open_ranges == ()

    def test_a_young_hook_is_called_under_the_page_table_lock(self, mm: Mm) -> None:
        """Its caller says it is atomic; whoever has forgotten that is told by the lock."""
        ptl = mm.ptl(3)
        with checking(), ptl, pytest.raises(AtomicSleepError, match="page table lock 0x3 of mm0"):
            mm.notifiers.register(MmuNotifier())


class TestLeaks:
    def test_nothing_is_held(self) -> None:
        lock = RwLock("lock", A)
        nothing_held("nobody looks")
        with checking():
            nothing_held("at the end")
            with lock.read, pytest.raises(LockLeakError, match=r"host holds lock \(read\) in the guest") as caught:
                nothing_held("in the guest")
            nothing_held("at the end")
        assert caught.value.held == ("lock (read)",)
        assert "test_nothing_is_held" in caught.value.first

    def test_an_atomic_section_is_one_too(self) -> None:
        with checking(), atomic("rcu"), pytest.raises(InternalError, match="host is in rcu at the end"):
            nothing_held("at the end")

    def test_a_downgraded_lock_is_held_for_reading(self) -> None:
        lock = RwLock("lock", A)
        with checking(), lock.write:
            lock.downgrade()
            with pytest.raises(LockLeakError) as caught:
                nothing_held("now")
        assert caught.value.held == ("lock (read)",)


class TestWaiting:
    def test_a_lenient_lock_keeps_out_only_who_can_wait(self) -> None:
        lock = RwLock("lock", LockClass("lock", lenient=True))
        with lock.write, lock.write, lock.read:
            assert (lock.writer, lock.readers) == (2, 1)
        assert not lock.taken
        log: list[str] = []

        def use(name: str) -> None:
            with lock.write:
                log.append(name)
                point("held")
                log.append(name)

        scheduler = Scheduler(lambda n, label: n - 1)
        scheduler.spawn("one", use, "one")
        scheduler.spawn("two", use, "two")
        scheduler.run()
        assert log == ["two", "two", "one", "one"]

    def test_lenient_ones_by_number(self) -> None:
        locks = KeyedLocks("page lock {:#x}", LockClass("lock", lenient=True))
        with locks(1):
            assert not locks.wait(1)
            locks.wait_range(0, 5)
            with locks(1):
                pass
            assert not locks.free(1)
            assert locks.attempt(1) is None
        assert locks.wait(1)
        taken = locks.attempt(1)
        assert taken is not None
        taken.drop()
        with pytest.raises(InternalError, match="was not held"):
            taken.drop()
        assert locks.held == {}

    def test_a_range_of_numbers(self) -> None:
        locks, log = KeyedLocks("lock {:#x}", A), list[str]()

        def hold() -> None:
            with locks(4):
                point("held")
                log.append("dropped")

        def wait(first: int, end: int) -> None:
            locks.wait_range(first, end)
            log.append(f"{first}..{end}")

        scheduler = Scheduler(lambda n, label: int(label == "held"))
        scheduler.spawn("holder", hold)
        scheduler.spawn("beside", wait, 5, 9)
        scheduler.spawn("over", wait, 0, 5)
        scheduler.run()
        assert log.index("5..9") < log.index("dropped") < log.index("0..5")


def test_who_has_to_wait_is_handed_to_the_scheduler() -> None:
    lock = RwLock("lock", A)
    log: list[str] = []
    writing = lock.write

    def release(what: str, ready: Callable[[], bool]) -> None:
        log.append(what)
        assert not ready()
        writing.__exit__()
        assert ready()

    writing.__enter__()
    with on_wait(release), lock.read:
        assert (lock.readers, lock.writer) == (1, False)
        lock.readers += 1  # another reader
        lock.readers -= 1
    writing.__enter__()
    with on_wait(release), lock.write:
        assert lock.writer
    assert log == ["read of lock", "write of lock"]


def test_without_a_scheduler_waiting_is_an_error() -> None:
    lock = RwLock("lock", A)
    with lock.read, pytest.raises(MmError, match="1 readers") as raised, lock.write:
        pass
    assert raised.value.errno == errno.EDEADLK
    with lock.write, pytest.raises(MmError, match="its writer"), lock.read:
        pass
    with lock.write:
        lock.downgrade()
        with lock.read:
            assert lock.readers == 2
    assert (lock.readers, lock.writer) == (0, False)


@pytest.fixture
def mm() -> Mm:
    return Mm(HostMemory(1 << 20), Trace())
