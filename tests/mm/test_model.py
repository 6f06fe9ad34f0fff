"""Random sequences of operations against the naive model: a dict of pages for every process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mm.naive import WRITE, Page
from tests.mm.sequences import CHOICES, VERBS, run_many, run_sequence, shrink
from tests.mm.world import BASE, HEAP_PAGES, MOST_PROCESSES, PAGE, PAGES, Operation, World
from xipvm.errors import InternalError
from xipvm.mmu.madvise import MADV_PAGEOUT
from xipvm.mmu.tables import PageTable

SEQUENCES = int(os.environ.get("XIPVM_SEQUENCES", "1000"))
ANON: Operation = ("mmap", 0, 0, PAGES, 0)

operations = st.lists(
    st.tuples(
        st.sampled_from(VERBS),
        st.integers(0, MOST_PROCESSES - 1),
        st.integers(0, PAGES + HEAP_PAGES + 3),
        st.integers(1, 6),
        st.integers(0, CHOICES - 1),
    ),
    max_size=50,
)


@pytest.mark.slow
@given(operations, st.sampled_from((0, 4, 24)))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_what_hypothesis_thinks_of(tmp_path: Path, sequence: list[Operation], swap: int) -> None:
    run_sequence([ANON, *sequence], str(tmp_path), swap=swap)


@pytest.mark.slow
def test_many_sequences(tmp_path: Path) -> None:
    """XIPVM_SEQUENCES says how many; ``python -m tests.mm.sequences`` shows how far it is."""
    run_many(SEQUENCES, 0, 24, str(tmp_path))


@pytest.mark.slow
def test_sequences_with_huge_pages(tmp_path: Path) -> None:
    run_many(max(SEQUENCES // 200, 1), 0, 20, str(tmp_path), huge=True)


# ---- what keeps the model honest: it finds defects


def failing(tmp_path: Path, sequence: list[Operation]) -> bool:
    try:
        run_sequence(sequence, str(tmp_path))
    except (AssertionError, InternalError):
        return True
    return False


def test_a_page_that_changes_behind_the_model_is_found(tmp_path: Path) -> None:
    world = World(str(tmp_path))
    world.run(ANON)
    world.run(("store", 0, 0, 1, 0))
    world.host.write(world.processes[0].mm.pgd.get(BASE) >> 12, 8 * 256, b"x")
    with pytest.raises(AssertionError):
        world.check()


def test_a_wrong_errno_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.mmu.mm.Mm.munmap", lambda mm, addr, length: None)
    assert failing(tmp_path, [("bad_arguments", 0, 0, 1, 0)])


def test_a_translation_that_stays_is_found_and_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.mmu.secondary.kvm.Kvm.invalidate_range_start", lambda kvm, range: 0)
    monkeypatch.setattr("xipvm.mmu.secondary.kvm.Kvm.invalidate_range_end", lambda kvm, range: None)
    sequence: list[Operation] = [ANON, ("load", 0, 4, 2, 0), ("guest_store", 0, 0, 2, 1), ("pread", 0, 0, 1, 0)]
    sequence += [("fork", 0, 0, 1, 0), ("munmap", 0, 0, 1, 0)]
    assert shrink(sequence, lambda shorter: failing(tmp_path, shorter)) == [ANON, sequence[2], sequence[5]]


def test_a_fork_that_forgets_to_protect_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = PageTable.copy_to

    class Careless(PageTable):
        def copy_to(self, child, start, end, host, cow, *rest):  # type: ignore[no-untyped-def]
            return real(self, child, start, end, host, False, *rest)

    monkeypatch.setattr("xipvm.mmu.mm.PageTable", Careless)
    assert failing(tmp_path, [ANON, ("store", 0, 0, 1, 0), ("fork", 0, 0, 1, 0), ("store", 0, 0, 1, 12)])


def test_a_secondary_mmu_that_hides_its_writes_is_caught(tmp_path: Path) -> None:
    """Without PG_DIRTY a clean page of the swap cache is not written again."""
    world = World(str(tmp_path), swap=24)
    mm = world.processes[0].mm
    for op in (ANON, ("store", 0, 0, 1, 0), ("pageout", 0, 0, 1, 0), ("load", 0, 0, 1, 0)):
        world.run(op)
    found = mm.get_user_pages(BASE * PAGE, write=False)
    world.host.write(found.pfn, 0, b"lost")
    mm.madvise(BASE * PAGE, PAGE, MADV_PAGEOUT)
    assert mm.read(BASE * PAGE, 4) != b"lost"


def test_the_model_knows_what_access_is() -> None:
    assert Page(3).allows(WRITE)
    assert not Page(1).allows(WRITE)
    assert not Page(3, guard=True).allows(WRITE)
