"""The mark ``interleavings``: what it runs, what a failure says, and how it is seen again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.plugin.conftest import Run
from tests.run.command import inside, xipvm

LOST_UPDATE = """
import pytest
from xipvm.testing import point

@pytest.mark.interleavings(200)
def test_counter(scene):
    count = [0]

    def add():
        read = count[0]
        point("add.read")
        count[0] = read + 1

    scene.actor("one", add)
    scene.actor("two", add)
    scene.afterwards(lambda: check(count[0]))

def check(count):
    assert count == 2, "an update is lost"
"""
MENDED = LOST_UPDATE.replace('point("add.read")', "")

CARELESS = """
import pytest
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.testing import MADV_DONTNEED, PAGE_SIZE

class Careless(Kvm):
    __slots__ = ()
    def mmu_invalidate_retry(self, seq, gfn):
        return ""

@pytest.mark.interleavings(n=200, strategy="{strategy}", preemptions=2)
def test_store_against_dontneed(scene):
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, 3)
    kvm = scene.kvm(mm, hva)
    kvm.__class__ = Careless
    scene.actor("vcpu0", scene.vcpu(kvm).store, 0, b"x")
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)

@pytest.mark.interleavings(50)
def test_the_same_with_a_right_kvm(scene, trace):
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, 3)
    scene.actor("vcpu0", scene.vcpu(scene.kvm(mm, hva)).store, 0, b"x")
    scene.actor("host", mm.madvise, hva, PAGE_SIZE, MADV_DONTNEED)
    scene.afterwards(lambda: trace.every("page_free", at_least=0).after("spte_zap", same="pfn", since="spte_set"))
"""
CAREFUL = ('return ""', "return super().mmu_invalidate_retry(seq, gfn)")


def counterexample(folder: Path) -> Path:
    """The one that was saved."""
    (found,) = (folder / ".xipvm").iterdir()
    return found


@pytest.mark.parametrize("strategy", ["random", "pct", "coverage", "exhaustive"])
def test_a_broken_mmu_is_found_and_told(strategy: str, pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_mine=CARELESS.format(strategy=strategy))
    result = run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.re_match_lines(
        [
            r"I[2457] broken at event #\d+: ",
            r"  I[2457]: ",
            r"  what touched the page, oldest first:",
            r" +0 +#\d+ vcpu0 +spte_set vm=vm0",
            r"the order, where it is not the plain one:",
            r"  at [\w.]+: (vcpu0|host) (goes on|is stopped, (vcpu0|host) goes on)",
            rf"found by run \d+ of 200 \({strategy}.*\); \d+ switch(es)?, \d preemptions?",
            r"again: xipvm replay \.xipvm/test_mine\.py-test_store_against_dontneed\.json",
            r"   or: pytest 'test_mine\.py::test_store_against_dontneed' --xipvm-replay \.xipvm/test_mine",
        ]
    )
    assert "Traceback" not in result.stdout.str()
    saved = json.loads(counterexample(pytester.path).read_text())
    assert saved["scenario"] == "test_mine.py::test_store_against_dontneed"
    assert saved["failure"][:3] in ("I2:", "I4:", "I5:", "I7:")


@pytest.mark.slow
def test_it_is_seen_again_by_either_command(pytester: pytest.Pytester, run: Run) -> None:
    source = CARELESS.format(strategy="random")
    pytester.makepyfile(test_mine=source)
    run()
    file = counterexample(pytester.path)
    again = run("--xipvm-replay", file, "test_mine.py::test_store_against_dontneed")
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["as .xipvm/*.json has it; *", "*Captured xipvm events*", "*  <=="])
    run("--xipvm-replay", file).assert_outcomes(failed=1, skipped=1)  # the other test has nothing to do with it
    told = xipvm("replay", file, cwd=pytester.path)
    assert told.status == 1, told
    assert " broken at event #" in told.out
    pytester.makepyfile(test_mine=source.replace(*CAREFUL))
    mended = xipvm("replay", "--continue", file.relative_to(pytester.path), cwd=pytester.path)
    assert mended.status == 0, mended
    pytester.path.joinpath("test_mine.py").unlink()
    gone = inside("replay", str(file), cwd=pytester.path)
    assert (gone.status, gone.err.count("\n")) == (2, 1)
    assert gone.err.endswith("and there is no test_mine.py\n")


def test_what_was_found_once_is_tried_first(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_mine=LOST_UPDATE)
    run().assert_outcomes(failed=1)
    again = run("--xipvm-runs", 0)  # no search at all
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["found at once: it is the order of .xipvm/test_mine.py-test_counter.json; *"])
    pytester.makepyfile(test_mine=MENDED)
    run().assert_outcomes(passed=1)


def test_a_changed_program_is_a_named_drift(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_mine=LOST_UPDATE)
    run()
    file = counterexample(pytester.path)
    pytester.makepyfile(test_mine=MENDED)
    drifted = run("--xipvm-replay", file)
    drifted.assert_outcomes(failed=1)
    drifted.stdout.fnmatch_lines(["the program has changed: choice * was recorded at *", "--xipvm-continue goes on *"])
    run("--xipvm-replay", file, "--xipvm-continue").assert_outcomes(passed=1)


def test_an_assertion_of_the_test_s_own(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_mine=LOST_UPDATE)
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            '*test_mine.py", line *, in check',
            "AssertionError: an update is lost",
            "assert 1 == 2",
            "the order, where it is not the plain one:",
            "  at add.read: one is stopped, two goes on",
            "found by run *; 3 switches, 1 preemption",
        ]
    )
    assert "explorer.py" not in result.stdout.str()


def test_pytest_s_own_failures_make_a_run_wrong(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from xipvm.testing import point

        @pytest.mark.interleavings(100)
        def test_raises(scene):
            order = []
            for name in "ab":
                scene.actor(name, order.append, name)

            def check():
                with pytest.raises(ValueError):
                    order.index("c" if order == ["a", "b"] else "a")

            scene.afterwards(check)
        """
    )
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["AssertionError: DID NOT RAISE *", "  at start: b goes on", "again: xipvm replay *"])


def test_what_fails_before_anything_runs_is_an_ordinary_failure(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.interleavings(10)
        def test_mine(scene):
            wrong = 1
            assert wrong == 2

        @pytest.mark.interleavings(10)
        def test_skipped(scene):
            pytest.skip("not today")
        """
    )
    result = run()
    result.assert_outcomes(failed=1, skipped=1)
    result.stdout.fnmatch_lines([">*assert wrong == 2", "E*assert 1 == 2"])
    assert "interleaving" not in "".join(result.stdout.lines[result.stdout.lines.index("E       assert 1 == 2") :])
    assert not (pytester.path / ".xipvm").exists()


def test_how_many_runs_there_are(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from xipvm.actors import access
        from xipvm.testing import point

        runs = []

        def twice(what):
            access(what, write=True)
            point("here")
            access(what, write=True)

        @pytest.fixture(params=[1, 2])
        def each(request):
            return request.param

        @pytest.mark.interleavings(30)
        def test_random(scene, each, tmp_path):
            runs.append(each)

        @pytest.mark.interleavings(1000, strategy="exhaustive", preemptions=None)
        def test_exhaustive(scene):
            runs.append(0)
            for name in "ab":
                scene.actor(name, twice, "a register")

        @pytest.mark.interleavings(1000, strategy="exhaustive", preemptions=None)
        def test_exhaustive_of_what_is_the_same(scene):
            runs.append(3)
            for name in "ab":
                scene.actor(name, twice, name)

        def test_counts():
            # Two actors of two steps: choose(4, 2) orders, all the same if they touch nothing in common
            assert [runs.count(number) for number in (0, 1, 2, 3)] == [6, 30, 30, 1]
        """
    )
    result = run("--junitxml=log.xml")
    result.assert_outcomes(passed=5)
    log = (pytester.path / "log.xml").read_text()
    assert 'name="xipvm" value="all of 6 runs, ' in log
    assert 'name="xipvm" value="all of 1 runs, ' in log
    assert log.count('value="30 runs, ') == 2
    fewer = run("--xipvm-runs", 5, "-k", "random")
    fewer.assert_outcomes(passed=2, deselected=3)


@pytest.mark.parametrize(
    ("mark", "arguments", "line"),
    [
        ("interleavings(5)", "", "a test with the mark interleavings takes the fixture `scene`*"),
        ("interleavings(5, how='x')", "scene", "the mark interleavings takes n, strategy, preemptions, seed, *"),
        ("interleavings(5, strategy='x')", "scene", "*BadInput: no strategy is called 'x'; known are random, *"),
        ("interleavings(5, invariants=['I0'])", "scene", "*BadInput: no invariant is called 'I0'; known are I1, *"),
        ("interleavings(5, protocol='1999')", "scene", "*BadInput: no notifier protocol is called '1999'*"),
    ],
)
def test_bad_use(mark: str, arguments: str, line: str, pytester: pytest.Pytester, run: Run) -> None:
    body = "scene.mm()" if "1999" in mark else "pass"
    pytester.makepyfile(f"import pytest\n@pytest.mark.{mark}\ndef test_mine({arguments}):\n    {body}\n")
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([line])


def test_hypothesis_and_the_mark_exclude_each_other(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from hypothesis import HealthCheck, given, settings, strategies

        @pytest.mark.interleavings(5)
        @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(number=strategies.integers())
        def test_mine(scene, number): ...
        """
    )
    result = run()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["@given and the mark interleavings exclude each other*"])


def test_the_directory_of_counterexamples(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makeini("[pytest]\nxipvm_counterexamples = tests/orders\n")
    pytester.makepyfile(test_mine=LOST_UPDATE)
    result = run()
    result.stdout.fnmatch_lines(["again: xipvm replay tests/orders/test_mine.py-test_counter.json"])
    assert (pytester.path / "tests" / "orders" / "test_mine.py-test_counter.json").is_file()


def test_only_what_failed_runs_again(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_mine=CARELESS.format(strategy="random"))
    run().assert_outcomes(passed=1, failed=1)
    again = run("--lf")
    again.assert_outcomes(failed=1)  # and the file's other test is not even collected
    run("-k", "right").assert_outcomes(passed=1, deselected=1)


@pytest.mark.slow
def test_in_several_processes(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(test_mine=CARELESS.format(strategy="random"), test_other=LOST_UPDATE)
    result = run("-n", 2)
    result.assert_outcomes(passed=1, failed=2)
    assert sorted(path.name for path in (pytester.path / ".xipvm").iterdir()) == [
        "test_mine.py-test_store_against_dontneed.json",
        "test_other.py-test_counter.json",
    ]
    result.stdout.fnmatch_lines(["again: xipvm replay .xipvm/test_mine.py-test_store_against_dontneed.json"])


def test_the_mark_is_declared(run: Run) -> None:
    result = run("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.interleavings(n=1000, strategy='random', *"])
