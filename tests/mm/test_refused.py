"""What cannot be done on the stack of somebody who has locked what it needs: it is refused, and has done nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from xipvm.actors import on_point, on_wait, point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import DeadlockError
from xipvm.mmu.device_private import device_private_page
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_DONTNEED
from xipvm.mmu.migrate import migrate_page
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.verify import verify
from xipvm.trace.funnel import Trace


def refuse(what: str, ready: Callable[[], bool]) -> None:
    raise DeadlockError(what)


class World:
    """An mm with a page in a device's memory and another that is not, and a child that shares both."""

    def __init__(self) -> None:
        self.host = HostMemory(64 * PAGE_SIZE)
        self.mm = Mm(self.host, Trace())
        self.device = Dmirror(self.mm, pages=4)
        self.away = self.mm.mmap(2 * PAGE_SIZE, 7)
        self.here = self.away + PAGE_SIZE
        self.mm.write(self.away, b"away".ljust(PAGE_SIZE) + b"here")
        self.device.migrate_to_dev(self.away, 1)
        self.child = self.mm.fork()

    @property
    def page_counts(self) -> tuple[int, int]:
        page = device_private_page(self.mm, self.mm.pgd.get(self.away >> PAGE_SHIFT))
        assert page is not None
        return page.refcount, page.mapcount

    def while_it_moves(self, act: Callable[[], object]) -> bool:
        """Does ``act`` in the middle of a walk that takes the other page out of all places; whether it was refused."""
        refused: list[bool] = []

        def once(label: str) -> None:
            if not refused and "range" in label:
                refused.append(False)
                try:
                    act()
                except DeadlockError:
                    refused[0] = True

        with on_point(once), on_wait(refuse):
            migrate_page(self.host, self.mm.trace, pte_pfn(self.mm.pgd.get(self.here >> PAGE_SHIFT)))
        return refused == [True]

    def check(self) -> None:
        verify(self.host)
        assert self.page_counts == (2, 2)
        assert self.child.read(self.here, 4) == self.mm.read(self.here, 4) == b"here"
        assert self.mm.read(self.away, 4) == self.child.read(self.away, 4) == b"away"  # it moves, and that ends
        verify(self.host)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.device.destroy()
    world.child.exit()
    world.mm.exit()
    world.host.close()


def test_a_child_does_not_end_half_way(world: World) -> None:
    assert world.while_it_moves(world.child.exit)
    assert not world.child.dead
    world.check()


def test_pages_are_not_unmapped_half_way(world: World) -> None:
    areas = [(area.start, area.end) for area in world.child.vmas]
    assert world.while_it_moves(lambda: world.child.munmap(world.away, 2 * PAGE_SIZE))
    assert [(area.start, area.end) for area in world.child.vmas] == areas
    world.check()


def test_no_child_is_born_half_way(world: World) -> None:
    mms = list(world.mm.rmap.mms)
    assert world.while_it_moves(world.child.fork)
    assert list(world.mm.rmap.mms) == mms
    world.check()


def test_pages_that_went_before_the_refusal_are_free(world: World) -> None:
    mm, free = world.mm, world.host.free_frames
    area = mm.mmap(2 * HPAGE_SIZE, 7)
    for hva in (area, area + HPAGE_SIZE):
        mm.write(hva, b"x")
    mm.mprotect(area + HPAGE_SIZE, HPAGE_SIZE, 3)

    def drop(label: str) -> None:
        if label == "test":
            with pytest.raises(DeadlockError):
                mm.madvise(area, 2 * HPAGE_SIZE, MADV_DONTNEED)

    with mm.ptl(area + HPAGE_SIZE >> PMD_SHIFT), on_point(drop), on_wait(refuse):
        point("test")
    assert world.host.free_frames == free - 1
    verify(world.host)
    mm.munmap(area, 2 * HPAGE_SIZE)
    assert world.host.free_frames == free


@contextmanager
def at_every_point(look: Callable[[], None]) -> Iterator[list[str]]:
    labels: list[str] = []

    def see(label: str) -> None:
        labels.append(label)
        look()

    with on_point(see):
        yield labels


def test_an_entry_of_a_device_page_goes_with_its_reference(world: World) -> None:
    """Else a CPU that wants the page elsewhere would find it held by somebody, again and again."""
    seen: list[tuple[int, int]] = []
    mirror = Dmirror(world.child, pages=1, name="other")  # somebody to be told: there are points
    with at_every_point(lambda: seen.append(world.page_counts)) as labels:
        world.child.madvise(world.away, PAGE_SIZE, MADV_DONTNEED)
    assert labels
    assert set(seen) == {(2, 2), (1, 1)}
    mirror.destroy()
