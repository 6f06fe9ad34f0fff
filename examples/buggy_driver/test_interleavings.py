"""The same driver, in every order: each test furnishes a scene, and is run in many interleavings."""

from __future__ import annotations

from types import ModuleType

import pytest

from xipvm.testing import MADV_DONTNEED, PAGE_SIZE, PROT_READ, PROT_WRITE, WRITE, Scene

PAGES = 4


def furnish(scene: Scene, driver: ModuleType):
    """A process with a buffer that it has written to, and a mirror of it."""
    mm = scene.mm()
    hva = mm.mmap(PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE)
    mm.write(hva, b"hello   ")
    return mm, hva, scene.watch(driver.Mirror(mm, hva, PAGES))


@pytest.mark.interleavings(500)
def test_prefault_against_dontneed(scene: Scene, driver: ModuleType) -> None:
    """The process gives a page back while the driver looks it up."""
    mm, hva, mirror = furnish(scene, driver)
    scene.actor("ioctl", mirror.prefault, 0, 1, WRITE)
    scene.actor("process", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)


@pytest.mark.interleavings(500)
def test_prefetch_against_dontneed(scene: Scene, driver: ModuleType) -> None:
    """The process gives a page back while a queue loads its TLB."""
    mm, hva, mirror = furnish(scene, driver)
    queue = mirror.queue()
    queue.write(0, b"x")
    scene.actor("queue0", queue.prefetch, 0)
    scene.actor("process", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)


@pytest.mark.interleavings(500)
def test_prefault_against_close(scene: Scene, driver: ModuleType) -> None:
    """The mirror is closed while the driver looks a page up."""
    _, _, mirror = furnish(scene, driver)
    scene.actor("ioctl", mirror.prefault, 0, 1)
    scene.actor("close", mirror.destroy)


@pytest.mark.interleavings(500, strategy="pct")
def test_a_job_while_dirty_pages_are_collected(scene: Scene, driver: ModuleType) -> None:
    """What a queue wrote is dirty at the end, or was collected. The author got this one right."""
    _, _, mirror = furnish(scene, driver)
    queue = mirror.queue()
    queue.write(0, b"first   ")
    collected: set[int] = set()

    def job() -> None:
        for page in range(1, PAGES):
            queue.copy(0, page)

    scene.actor("queue0", job)
    scene.actor("daemon", lambda: collected.update(mirror.collect_dirty()))
    scene.afterwards(lambda: expect(collected | mirror.collect_dirty(), set(range(PAGES))))


def expect(found: set[int], wanted: set[int]) -> None:
    """Raises AssertionError when they differ."""
    assert found == wanted
