"""The plugin's fixtures, and that whoever does not use them pays nothing."""

from __future__ import annotations

import os
import tomllib

import pytest

from tests.plugin.conftest import Run
from tests.run.command import ROOT, guest


def test_nothing_of_xipvm_is_imported_for_who_does_not_use_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_mine():
            assert {name for name in sys.modules if name.partition(".")[0] == "xipvm"} == {
                "xipvm", "xipvm.pytest_plugin"
            }
            for name in ("numpy", "greenlet", "unicorn", "click", "rich"):
                assert name not in sys.modules
        """
    )
    options = ("-p", "xipvm.pytest_plugin", "-p", "no:hypothesispytest")
    pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)


@pytest.mark.slow
def test_installing_is_enough(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = pytester.mkdir("site") / "xipvm-0.dist-info"
    installed.mkdir()
    installed.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: xipvm\nVersion: 0\n")
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["pytest11"].items()]
    installed.joinpath("entry_points.txt").write_text("\n".join(["[pytest11]", *lines, ""]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(installed.parent)]))
    pytester.makepyfile("def test_mine(mm, trace, scene, explore, machine): pass")
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(passed=1)


def test_an_mm_is_judged_and_scanned(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        from xipvm.mmu.secondary.kvm import Kvm
        from xipvm.testing import MADV_DONTNEED, PAGE_SIZE, READ

        class Deaf(Kvm):
            def invalidate_range_start(self, range):
                return 0
            def invalidate_range_end(self, range):
                pass

        def test_right(mm, trace):
            hva = mm.mmap(PAGE_SIZE, 3)
            mm.write(hva, b"x")
            mm.munmap(hva, PAGE_SIZE)
            assert trace.count("page_free") == 1

        def test_told_by_the_oracle(mm):
            hva = mm.mmap(PAGE_SIZE, 3)
            kvm = Deaf(mm, mm.trace, mm.host)
            kvm.set_memslot(0, 0, 1, hva)
            mm.write(hva, b"x")
            kvm.fault(0, READ)
            mm.madvise(hva, PAGE_SIZE, MADV_DONTNEED)

        def test_told_by_the_scan(mm):
            hva = mm.mmap(PAGE_SIZE, 3)
            mm.write(hva, b"x")
            mm.host.get(mm.get_user_pages(hva, write=False).pfn)

        def test_what_fails_by_itself_is_not_scanned(mm):
            mm.host.get(mm.alloc_frame(True))
            assert False, "mine"
        """
    )
    result = run()
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines_random(
        [
            "E*BrokenError: I3: the entry of *",
            "E*I3 broken at event #*",
            "E*spte_set vm=vm0 gfn=0x0 *",
            "E*InternalError: *",
            "E*AssertionError: mine",
        ]
    )


def test_a_scene_without_the_mark_runs_in_the_plain_order(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        from xipvm.testing import PAGE_SIZE, point

        said = []

        def test_mine(scene, trace):
            mm = scene.mm()
            def speak(name):
                said.append(name)
                point("here")
                said.append(name)
            scene.actor("one", speak, 1)
            scene.actor("two", speak, 2)
            scene.actor("host", mm.mmap, PAGE_SIZE, 3)
            scene.afterwards(lambda: trace.every("vma_map", actor="host"))

        def test_it_did():
            assert said == [1, 1, 2, 2]
        """
    )
    run().assert_outcomes(passed=2)


def test_machines_are_judged_and_closed(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        f"""
        HELLO = {str(guest("hello", "arm64"))!r}
        made = []

        def test_two(machine, trace):
            for _ in range(2):
                made.append(machine(HELLO))
                assert made[-1].run().status == 0
            assert trace.count("machine_end") == 2
            trace.every("tlb_insert").after("spte_set", same="gfn")

        def test_closed():
            assert [each._closed for each in made] == [True, True]

        def test_told_by_the_oracle(machine):
            wrong = machine(HELLO)
            wrong.run()
            wrong.trace.emit("page_free", pages=[(1, 1)])
            wrong.trace.emit("page_free", pages=[(1, 1)])
        """
    )
    result = run()
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["E*I5 broken at event #*"])


def test_explore_searches_any_scenario(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        import pytest
        from xipvm.testing import Scene, point, scenario

        @scenario
        def right(scene):
            scene.actor("a", point, "here")

        def racing(scene):
            count = [0]
            def add():
                read = count[0]
                point("add.read")
                count[0] = read + 1
            scene.actor("one", add)
            scene.actor("two", add)
            def check():
                assert count == [2]
            scene.afterwards(check)

        def test_right(explore):
            assert explore(right, runs=7).runs == 7
            search = explore("fault-against-munmap", strategy="exhaustive", preemptions=0)
            assert search.complete
            assert search.checks["I4"] > 0

        def test_racing(explore):
            explore(right, runs=1)
            explore(racing)
        """
    )
    result = run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "AssertionError: assert [[]1] == [[]2]",
            "again: xipvm replay .xipvm/*-racing.json",
            "   or: pytest '*::test_racing' --xipvm-replay *",
        ]
    )
    (file,) = (pytester.path / ".xipvm").iterdir()
    again = run("--xipvm-replay", file)
    again.assert_outcomes(failed=1, skipped=1)


@pytest.mark.slow
def test_a_state_machine_of_hypothesis(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(STATE_MACHINE)
    run().assert_outcomes(passed=1)
    pytester.makepyfile(test_deaf=STATE_MACHINE.replace("invalidate_range_start", "not_called"))
    result = run("test_deaf.py")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*BrokenError: I3: *", "*state.device_writes(*", "*state.give_back(*"])


STATE_MACHINE = '''
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from xipvm.testing import MADV_DONTNEED, PAGE_SIZE, READ, RETRY_WALK, WRITE, DeviceMmu, plain_scene

PAGES = 4
pages = st.integers(0, PAGES - 1)


class Mirror(DeviceMmu):
    """The least that there can be: what is faulted in is entered, what is invalidated is removed."""

    def __init__(self, mm):
        super().__init__(mm)
        self.table = {}
        mm.notifiers.register(self)

    def fault(self, page, access):
        found = self.mm.get_user_pages(self.hva_of(page), write=access == WRITE)
        self.table[page] = found.pfn, access == WRITE
        self.installed(page, found.pfn, write=access == WRITE)
        return RETRY_WALK

    def translate(self, page):
        return self.table.get(page)

    def invalidate_range_start(self, range):
        for first, last in self.pages_in(range.start, range.end):
            for page in [page for page in self.table if first <= page < last]:
                del self.table[page]
            self.zapped(first, last)
        self.flush_remote_tlbs("invalidate")
        return 0

    def release(self, mm):
        self.table.clear()
        self.zapped(0, PAGES)


class Buffer(RuleBasedStateMachine):
    """A buffer, and what each of its pages holds."""

    def __init__(self):
        super().__init__()
        self.scene = plain_scene()
        self.mm = self.scene.mm()
        self.hva = self.mm.mmap(PAGES * PAGE_SIZE, 3)
        self.mirror = self.scene.watch(Mirror(self.mm))
        self.mirror.map_window(self.hva, PAGES)
        self.device = self.scene.vcpu(self.mirror)
        self.holds = dict.fromkeys(range(PAGES), bytes(1))

    @rule(page=pages, data=st.binary(min_size=1, max_size=1))
    def device_writes(self, page, data):
        self.device.store(page, data)
        self.holds[page] = data

    @rule(page=pages)
    def process_reads(self, page):
        assert self.mm.read(self.hva + page * PAGE_SIZE, 1) == self.holds[page]

    @rule(page=pages)
    def give_back(self, page):
        self.mm.madvise(self.hva + page * PAGE_SIZE, PAGE_SIZE, MADV_DONTNEED)
        self.holds[page] = bytes(1)

    def teardown(self):
        try:
            self.scene.run()
        finally:
            self.scene.close()


TestBuffer = Buffer.TestCase
TestBuffer.settings = settings(max_examples=20, deadline=None)
'''
