"""One notifier for each mm and class: shared by its users, freed when the last gave it back and nobody runs in it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from tests.notifier.world import World, error_of
from xipvm.actors import on_point
from xipvm.errors import InternalError, MmError
from xipvm.notifier import MmuNotifier, MmuNotifierRange, NotifiedMm, RangeEvent, might_sleep
from xipvm.notifier.registry import UINT_MAX


class Iommu(MmuNotifier):
    """Made by get; writes down its life."""

    log: ClassVar[list[str]] = []
    made: ClassVar[int] = 0
    fail: ClassVar[int] = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.inside: Callable[[], object] = lambda: None

    @classmethod
    def alloc_notifier(cls, mm: NotifiedMm) -> Any:
        might_sleep("alloc_notifier")
        if cls.fail:
            raise MmError(cls.fail, "alloc_notifier")
        Iommu.made += 1
        return cls(f"{cls.__name__} {Iommu.made}")

    def free_notifier(self) -> None:
        self.log.append(f"free {self.name}")

    def release(self, mm: NotifiedMm) -> None:
        self.log.append(f"release {self.name}")

    def invalidate_range_start(self, range: MmuNotifierRange) -> int:
        self.log.append(f"start {self.name}")
        self.inside()
        return 0


class Other(Iommu):
    """Another class, hence other ops."""


@pytest.fixture
def mm(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(Iommu, "log", [])
    monkeypatch.setattr(Iommu, "made", 0)
    return World()


def change(mm: World) -> None:
    with mm.notifiers.invalidate_range(0x1000, 0x2000, RangeEvent.CLEAR):
        pass


def test_one_for_each_class_and_mm(mm: World) -> None:
    one = mm.notifiers.get(Iommu)
    assert mm.notifiers.get(Iommu) is one
    assert one.users == 2
    assert mm.notifiers.get(Other) is not one
    assert World("mm1").notifiers.get(Iommu) is not one
    assert [n.name for n in mm.notifiers] == ["Other 2", "Iommu 1"]


def test_the_last_put_unlinks_without_release(mm: World) -> None:
    one = mm.notifiers.get(Iommu)
    mm.notifiers.get(Iommu)
    mm.notifiers.put(one)
    assert list(mm.notifiers) == [one]
    mm.notifiers.put(one)
    assert list(mm.notifiers) == []
    change(mm)
    mm.notifiers.synchronize()
    assert Iommu.log == ["free Iommu 1"]
    with pytest.raises(InternalError, match="more often"):
        mm.notifiers.put(one)


def test_it_is_freed_when_its_callbacks_have_returned(mm: World) -> None:
    """put may be called by a callback; what runs in the notifier then goes on, and a get makes a second one."""
    one = mm.notifiers.get(Iommu)

    def inside() -> None:
        mm.notifiers.put(one)
        assert one.subscribed_to is mm.notifiers
        Iommu.log.append("callback goes on")
        assert error_of(mm.notifiers.synchronize) == errno.EDEADLK

    one.inside = inside
    mm.notifiers.invalidate_range_start(0x1000, 0x2000, RangeEvent.CLEAR)
    assert Iommu.log == ["start Iommu 1", "callback goes on", "free Iommu 1"]
    assert one.subscribed_to is None


def test_get_waits_for_what_runs_and_makes_a_second_one(mm: World) -> None:
    one = mm.notifiers.get(Iommu)
    section = mm.notifiers._srcu.read_lock()  # a callback that runs on another CPU
    mm.notifiers.put(one)

    def others(label: str) -> None:
        assert Iommu.log == []
        mm.notifiers._srcu.read_unlock(section)

    with on_point(others):
        two = mm.notifiers.get(Iommu)
    assert Iommu.log == ["free Iommu 1"]
    assert list(mm.notifiers) == [two]


def test_both_live_when_nobody_waits_for_the_first(mm: World) -> None:
    one = mm.notifiers.get(Iommu)
    mm.notifiers.put(one)
    two = mm.notifiers.get(Iommu)
    assert two is not one
    assert Iommu.log == []
    assert (one.subscribed_to, two.subscribed_to) == (mm.notifiers, mm.notifiers)
    assert error_of(lambda: mm.notifiers.register(one)) == errno.EINVAL
    assert error_of(lambda: mm.notifiers.unregister(one)) == errno.EINVAL
    change(mm)
    assert Iommu.log == ["start Iommu 2", "free Iommu 1"]
    assert list(mm.notifiers) == [two]


def test_too_many_users(mm: World) -> None:
    one = mm.notifiers.get(Iommu)
    one.users = UINT_MAX
    assert error_of(lambda: mm.notifiers.get(Iommu)) == errno.EOVERFLOW
    assert one.users == UINT_MAX
    mm.notifiers.put(one)
    assert mm.notifiers.get(Iommu) is one


def test_alloc_may_fail(mm: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Iommu, "fail", errno.ENOSPC)
    assert error_of(lambda: mm.notifiers.get(Iommu)) == errno.ENOSPC
    assert not mm.notifiers.has_notifiers
    assert not mm.mmap_lock.writer


def test_what_was_allocated_is_freed_when_it_cannot_register(mm: World) -> None:
    mm.notifiers.signal_pending = lambda: True
    assert error_of(lambda: mm.notifiers.get(Iommu)) == errno.EINTR
    assert Iommu.log == ["free Iommu 1"]
    assert list(mm.notifiers) == []


def test_mmap_lock_is_held_all_the_time(mm: World) -> None:
    """Else two users could both find none, and make one each."""
    errors: list[int] = []

    class Curious(Iommu):
        @classmethod
        def alloc_notifier(cls, mm: Any) -> Any:
            errors.append(error_of(lambda: mm.notifiers.get(Other)))
            return cls("curious")

    mm.notifiers.get(Curious)
    assert errors == [errno.EDEADLK]
    assert len(mm.notifiers) == 1


def test_put_after_the_mm_died(mm: World) -> None:
    one = mm.notifiers.get(Iommu)
    mm.notifiers.release()
    assert error_of(lambda: mm.notifiers.get(Iommu)) == errno.ESRCH
    mm.notifiers.put(one)
    mm.notifiers.synchronize()
    assert Iommu.log == ["release Iommu 1", "free Iommu 2", "free Iommu 1"]


def test_put_in_release(mm: World) -> None:
    class Leaving(Iommu):
        def release(self, mm: Any) -> None:
            super().release(mm)
            mm.notifiers.put(self)

    mm.notifiers.get(Leaving)
    mm.notifiers.release()
    mm.notifiers.synchronize()
    assert Iommu.log == ["release Leaving 1", "free Leaving 1"]


def test_free_may_not_sleep(mm: World) -> None:
    class Sleepy(Iommu):
        def free_notifier(self) -> None:
            might_sleep("flush_work")

    mm.notifiers.put(mm.notifiers.get(Sleepy))
    with pytest.raises(InternalError, match="flush_work may sleep"):
        mm.notifiers.synchronize()
    mm.notifiers.synchronize()  # it is not freed twice


def test_one_that_was_registered_is_found_and_counted(mm: World) -> None:
    one = Iommu("mine")
    mm.notifiers.register(one)
    assert mm.notifiers.get(Iommu) is one
    assert one.users == 2
