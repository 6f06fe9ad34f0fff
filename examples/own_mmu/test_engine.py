"""The engine against everything that can happen to its process meanwhile, in many orders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine import Engine

from xipvm.testing import MADV_DONTNEED, MADV_PAGEOUT, PAGE_SIZE, PROT_READ, PROT_WRITE, HostThread, Mm, Scene

OPERATIONS: dict[str, Callable[[Mm, int], object]] = {
    "munmap": lambda mm, hva: mm.munmap(hva, 2 * PAGE_SIZE),
    "dontneed": lambda mm, hva: mm.madvise(hva, 2 * PAGE_SIZE, MADV_DONTNEED),
    "mprotect": lambda mm, hva: mm.mprotect(hva, 2 * PAGE_SIZE, PROT_READ),
    "pageout": lambda mm, hva: mm.madvise(hva, 2 * PAGE_SIZE, MADV_PAGEOUT),
    "exit": lambda mm, hva: mm.exit(),
}


@pytest.mark.interleavings(100)
@pytest.mark.parametrize("name", OPERATIONS)
def test_copy_against(name: str, scene: Scene) -> None:
    mm = scene.mm()
    mm.swapon(8)
    hva = mm.mmap(2 * PAGE_SIZE, PROT_READ | PROT_WRITE)
    engine = scene.watch(Engine(mm, hva, 2))
    mm.write(hva, b"data")
    engine.copy(0, 1)
    scene.actor("engine", engine.copy, 1, 0)
    scene.actor("process", OPERATIONS[name], mm, hva)


@pytest.mark.interleavings(100)
def test_copy_against_cow(scene: Scene) -> None:
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, PROT_READ | PROT_WRITE)
    engine = scene.watch(Engine(mm, hva, 2))
    mm.write(hva, b"data")
    engine.copy(0, 1)

    def process() -> None:
        child = mm.fork("child")
        scene.undo(child.exit)
        before = child.read(hva, 4)
        HostThread(mm).store(hva, b"mine")
        assert child.read(hva, 4) == before

    scene.actor("engine", engine.copy, 1, 0)
    scene.actor("process", process)
