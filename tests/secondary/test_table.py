"""A secondary MMU of one's own: the example's engine is right in any order, and a mistake in it is told by name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.run.command import DEADLINE, environment
from xipvm.explore import explore, strategy
from xipvm.testing import (
    FAULT,
    MADV_DONTNEED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    READ,
    WRITE,
    BrokenError,
    GuestAccessError,
    Mm,
    Scene,
    TableMmu,
    plain_scene,
    scenario,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_mmu" / "engine.py"
RW = PROT_READ | PROT_WRITE


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("own_mmu_engine", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Engine: Any = load().Engine


class LeavesTheLastPage(Engine):
    def clear_entries(self, first: int, last: int) -> None:
        super().clear_entries(first, last - 1)


class MayAlwaysWrite(Engine):
    def set_entry(self, page: int, pfn: int, *, write: bool) -> None:
        super().set_entry(page, pfn, write=True)


class FlushesNothing(Engine):
    def flush_tlbs(self) -> None:
        pass


def found(engine: Any, protocol: str = "modern") -> str:
    """The invariant that a search finds broken, empty for none."""

    @scenario
    def copies(scene: Scene) -> None:
        mm = scene.mm()
        hva = mm.mmap(2 * PAGE_SIZE, RW)
        mm.write(hva, b"data")
        device = scene.watch(engine(mm, hva, 2))
        device.copy(0, 1)

        def process() -> None:
            mm.mprotect(hva, PAGE_SIZE, PROT_READ)
            mm.madvise(hva, 2 * PAGE_SIZE, MADV_DONTNEED)

        scene.actor("engine", device.copy, 0, 1)
        scene.actor("process", process)

    search = explore(copies, strategy("random", 1), runs=60, protocol=protocol)
    if search.failing is None:
        return ""
    assert search.failing.failure is not None
    return search.failing.failure.what


@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_the_example_is_right(protocol: str) -> None:
    assert found(Engine, protocol) == ""


@pytest.mark.parametrize(
    ("mistake", "invariant"), [(LeavesTheLastPage, "I3"), (MayAlwaysWrite, "I4"), (FlushesNothing, "I10")]
)
def test_a_plausible_mistake_is_told_by_name(mistake: Any, invariant: str) -> None:
    assert found(mistake) == invariant


def test_it_is_short_and_what_the_readme_shows() -> None:
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) < 80
    readme = (EXAMPLE.parents[2] / "README.md").read_text()
    assert f"in {len(lines)} lines" in readme
    shown = next(block for block in re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S) if "set_entry" in block)
    assert shown in EXAMPLE.read_text()


def test_it_runs_by_itself() -> None:
    child = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, env=environment(), timeout=DEADLINE, check=True
    )
    assert child.stdout == "b'first' [0, 1, 2, 3]\n[1, 2, 3] {}\n"


def test_the_protocol_is_not_to_be_overridden() -> None:
    for name in ("fault", "invalidate_range_start", "invalidate_range_end", "release", "clear_flush_young"):
        with pytest.raises(TypeError, match=f"{name}: that is the protocol"):
            type("Mine", (TableMmu,), {name: lambda *_: None})


@pytest.mark.parametrize("name", ["set_entry", "clear_entries", "flush_tlbs", "translate"])
def test_what_is_mandatory_is_abstract(name: str) -> None:
    words = {word: lambda *_, **__: None for word in ("set_entry", "clear_entries", "flush_tlbs", "translate")}
    del words[name]
    scene = plain_scene()
    mm = scene.mm()
    with pytest.raises(TypeError, match=name):
        type("Mine", (TableMmu,), words)(mm, mm.mmap(PAGE_SIZE, RW), 1)
    scene.close()


def furnish(scene: Scene) -> tuple[Mm, int, Any]:
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    return mm, hva, scene.watch(Engine(mm, hva, 2))


def test_ages_and_ends() -> None:
    scene = plain_scene()
    mm, hva, engine = furnish(scene)
    engine.copy(0, 1)
    assert engine.test_young(hva)
    assert mm.notifiers.clear_flush_young(hva, hva + PAGE_SIZE)
    assert (engine.translate(0), engine.tlb) == (None, {})
    assert not mm.notifiers.clear_young(hva, hva + PAGE_SIZE)
    assert not mm.notifiers.test_young(hva)
    assert engine.entry(1, READ)[1], "it was entered for writing"
    with pytest.raises(GuestAccessError, match="engine0 has no page 0x2"):
        engine.entry(2, READ)
    mm.exit()
    assert engine.table == {}
    assert engine.fault(0, WRITE) == FAULT
    assert engine.last_error == "engine0 is closed"
    scene.run()
    scene.close()


def test_an_entry_that_stays_is_not_said_to_be_gone() -> None:
    scene = plain_scene()
    mm = scene.mm()
    hva = mm.mmap(2 * PAGE_SIZE, RW)
    engine = LeavesTheLastPage(mm, hva, 2)
    engine.copy(0, 1)
    with pytest.raises(BrokenError, match=r"I3: .* was not removed"):
        mm.munmap(hva, 2 * PAGE_SIZE)
    scene.close()
