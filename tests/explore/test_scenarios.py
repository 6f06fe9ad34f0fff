"""The scenarios that come with xipvm: nothing is found in a right system, and what is broken is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run.command import inside
from xipvm.address import PAGE_SIZE
from xipvm.errors import BadInput
from xipvm.explore import Scene, explore, run_once, scenario, shrink, strategy
from xipvm.explore.files import Counterexample
from xipvm.explore.find import KNOWN
from xipvm.explore.guests import GUEST_SCENARIOS
from xipvm.explore.scenarios import SCENARIOS

ABOUT = {
    "a-device-that-follows-the-host-s-tlbs": "I3",
    "a-snapshot-is-taken": "I15",
    "block-pinned-while-it-is-freed": "I5",
    "hole-filled-while-its-mapping-is-protected": "I16",
    "hole-filled-twice": "I16",
    "hole-of-a-file-system-that-turns-read-only": "I16",
    "blocks-that-cannot-be-read": "I16",
    "reads-of-all-lengths": "I18",
}
"""What is asked in a scenario whose devices, if there are any, translate nothing."""


@pytest.mark.parametrize("how", ["random", "pct", "coverage", "exhaustive"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_right_system_stays_right(name: str, how: str) -> None:
    search = explore(SCENARIOS[name], strategy(how, 1, preemptions=1), runs=40)
    assert search.failing is None, search.failing.failure.render()  # type: ignore[union-attr]
    assert sum(search.checks.values()) > search.runs
    assert search.checks[ABOUT.get(name, "I4")] > 0


BROKEN = """
from xipvm.address import PAGE_SIZE
from xipvm.explore import Scene, scenario
from xipvm.mmu.secondary.kvm import Kvm


class Careless(Kvm):
    __slots__ = ()

    def mmu_invalidate_retry(self, seq, gfn):
        return ""


@scenario
def careless(scene: Scene) -> None:
    '''A KVM that does not look whether an invalidation came between.'''
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, 3)
    kvm = scene.kvm(mm, hva)
    kvm.__class__ = Careless
    vcpu = scene.vcpu(kvm)
    scene.actor("vcpu0", vcpu.store, 0, b"x")
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, 4)
"""


def test_a_user_s_broken_mmu_is_found_shrunk_saved_and_replayed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    outcome = inside("explore", "mine.py:careless", "--runs", 200, cwd=tmp_path)
    assert outcome.status == 1, outcome
    assert any(f"{name} broken" in outcome.out for name in ("I2", "I4", "I7"))
    assert outcome.out.endswith("xipvm replay careless.xipvm.json\n")
    again = inside("replay", "careless.xipvm.json", cwd=tmp_path)
    assert again.status == 1
    assert " broken at event #" in again.out
    (tmp_path / "mine.py").write_text(BROKEN.replace('return ""', "return super().mmu_invalidate_retry(seq, gfn)"))
    fixed = inside("replay", "--continue", "careless.xipvm.json", cwd=tmp_path)
    assert fixed.status == 0, fixed
    assert "nothing is wrong" in fixed.out


def test_the_list_of_scenarios(tmp_path: Path) -> None:
    outcome = inside("explore", cwd=tmp_path)
    assert outcome.status == 0
    assert [line.split()[0] for line in outcome.out.splitlines()] == list(KNOWN)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("explore", "nothing"), "no scenario is called 'nothing' ('xipvm explore' lists them"),
        (
            ("explore", "fault-against-munma"),
            "no scenario is called 'fault-against-munma'; did you mean fault-against-munmap",
        ),
        (
            ("explore", "mine.py:careless", "--preemptions", "1"),
            "--preemptions and --no-reduction are for --strategy exhaustive",
        ),
        (("explore", "nothing.py:x"), "nothing.py: No such file"),
        (("explore", "bad.py:x"), "bad.py: SyntaxError"),
        (("explore", "mine.py:x"), "mine.py has no scenario 'x'; it has careless"),
        (("explore", "mine.py"), "mine.py: which scenario? Write mine.py:NAME, NAME being one of careless"),
        (("replay", "nothing"), "nothing: No such file or directory"),
        (("replay", "bad.py"), "bad.py: not a counterexample"),
        (("replay", "old.json"), "old.json: version 0; this program reads 1"),
        (("replay", "torn.json"), "torn.json: not a counterexample"),
    ],
)
def test_bad_input(argv: tuple[str, ...], line: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def\n")
    (tmp_path / "mine.py").write_text(BROKEN)
    (tmp_path / "old.json").write_text('{"xipvm": "counterexample", "version": 0}')
    (tmp_path / "torn.json").write_text('{"xipvm": "counterexample", "version": 1, "choices": [[1]]}')
    outcome = inside(*argv, cwd=tmp_path)
    assert outcome.status == 2, outcome
    assert outcome.err.startswith(f"xipvm: {line}"), outcome.err
    assert outcome.err.count("\n") == 1


def test_a_counterexample_survives_the_file(tmp_path: Path) -> None:
    run = run_once(SCENARIOS["fault-against-cow"], lambda question: question.n - 1)
    before = Counterexample("fault-against-cow", "I0: none", run.choices)
    before.save(tmp_path / "x.json")
    assert Counterexample.load(tmp_path / "x.json") == before
    with pytest.raises(BadInput, match="No such file"):
        before.save(tmp_path / "nowhere" / "x.json")


def test_a_run_that_is_right_cannot_be_shrunk() -> None:
    with pytest.raises(BadInput):
        shrink(SCENARIOS["fault-against-cow"], run_once(SCENARIOS["fault-against-cow"], lambda question: 0))


def test_counts_that_stay_up_are_an_error() -> None:
    @scenario
    def forgetful(scene: Scene) -> None:
        mm = scene.mm()
        hva = mm.mmap(PAGE_SIZE, 3)
        kvm = scene.kvm(mm, hva)
        scene.actor("host", kvm._invalidate_begin)

    run = run_once(forgetful, lambda question: 0)
    assert run.failure is not None
    assert "is left with 1 invalidations in progress" in run.failure.message


@pytest.mark.parametrize("name", GUEST_SCENARIOS)
def test_real_guests_survive(name: str) -> None:
    search = explore(GUEST_SCENARIOS[name], strategy("random", 5), runs=15)
    assert search.failing is None, search.failing.failure.render()  # type: ignore[union-attr]
    assert search.distinct > 1


def test_a_real_guest_loses_a_count_when_its_writes_are_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xipvm.mmu.secondary.kvm.KvmBase._zap", lambda self, start, end: None)
    search = explore(GUEST_SCENARIOS["guest-against-fork"], strategy("random", 5), runs=30)
    assert search.failing is not None
    assert search.failing.failure is not None
    assert search.failing.failure.what == "I3"
