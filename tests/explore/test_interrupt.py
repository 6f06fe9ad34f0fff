"""What is found beside broken invariants, and what a search says that is ended by Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.run.command import DEADLINE, XIPVM, environment, inside, wait_for
from xipvm.explore.shards import SHARD_RUNS

HEAD = """
from xipvm.actors import point
from xipvm.address import PAGE_SIZE
from xipvm.explore import Scene, scenario
from xipvm.locks import LockClass, RwLock, atomic, might_sleep

runs = 0
first, second = (RwLock(name, LockClass(name)) for name in ("first", "second"))


def both(one, other):
    with one.write:
        point("between")
        with other.write:
            pass

"""
SEEDED = {
    "lock order": (
        """
@scenario
def mine(scene):
    scene.actor("a", both, first, second)
    scene.actor("b", both, second, first)
""",
        ("lock: ", "deadlock: "),
    ),
    "sleeping in atomic context": (
        """
def careless():
    with atomic("a callback"):
        might_sleep("waiting for a device")

@scenario
def mine(scene):
    scene.actor("a", careless)
""",
        ("lock: ",),
    ),
    "a lock is left taken": (
        """
@scenario
def mine(scene):
    scene.actor("a", first.write.__enter__)
    scene.undo(lambda: first.write.__exit__(None, None, None))
""",
        ("lock: ",),
    ),
    "a range is left open": (
        """
from xipvm.notifier import RangeEvent

@scenario
def mine(scene):
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, 3)
    scene.kvm(mm, hva)
    scene.actor("a", mm.notifiers.invalidate_range_start, hva, hva + PAGE_SIZE, RangeEvent.CLEAR)
""",
        ("I6 ",),
    ),
    "a reference is left over": (
        """
@scenario
def mine(scene):
    mm = scene.mm()
    hva = mm.mmap(PAGE_SIZE, 3)
    scene.actor("a", lambda: scene.host.get(mm.get_user_pages(hva, write=True).pfn))
""",
        ("InternalError: ",),
    ),
    "two wait for each other": (
        """
from xipvm.actors import wait

@scenario
def mine(scene):
    scene.actor("a", wait, "the other", lambda: False)
    scene.actor("b", wait, "the other", lambda: False)
""",
        ("deadlock: ",),
    ),
}


@pytest.mark.parametrize("what", SEEDED)
def test_a_seeded_mistake_is_reported_shrunk_and_saved(what: str, tmp_path: Path) -> None:
    body, expected = SEEDED[what]
    (tmp_path / "mine.py").write_text(HEAD + body)
    outcome = inside("explore", "mine.py:mine", "--runs", 50, "--quiet", cwd=tmp_path)
    assert outcome.status == 1, outcome
    told = outcome.out.splitlines()[1]
    assert told.startswith(expected), told
    assert "xipvm replay mine.xipvm.json" in outcome.out
    again = inside("replay", "mine.xipvm.json", cwd=tmp_path)
    assert again.status == 1
    assert again.out.splitlines()[0] == told


STOPPED = """
@scenario
def mine(scene):
    global runs
    runs += 1
    if runs > 7:
        raise KeyboardInterrupt
"""


def test_ctrl_c_says_how_far_it_got_and_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + STOPPED)
    outcome = inside(
        "explore", "mine.py:mine", "--runs", 100, "--seed", 3, "--strategy", "pct", "--protocol", "2008", "--quiet",
        cwd=tmp_path,
    )  # fmt: skip
    assert outcome.status == 130
    assert outcome.out.splitlines() == [
        "mine.py:mine: pct: interrupted after 7 runs; none of them is wrong",
        "other runs: xipvm explore mine.py:mine --strategy pct --runs 93 --seed 4 --protocol 2008",
    ]


def test_ctrl_c_of_an_exhaustive_search(tmp_path: Path) -> None:
    actors = "    scene.actor('a', both, first, second)\n    scene.actor('b', both, first, second)\n"
    (tmp_path / "mine.py").write_text(HEAD + STOPPED.replace("7", "3") + actors)
    outcome = inside("explore", "mine.py:mine", "--strategy", "exhaustive", "--no-reduction", "--quiet", cwd=tmp_path)
    assert outcome.status == 130
    assert outcome.out.startswith("mine.py:mine: exhaustive: interrupted after 3 runs; none of them is wrong\n")
    assert "from the start" in outcome.out


COUNTED = """
@scenario
def mine(scene):
    with open("runs", "ab", buffering=0) as file:
        file.write(b"x")
    scene.actor("a", both, first, second)
"""


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_ends_worker_processes_in_the_middle_of_their_shards(tmp_path: Path) -> None:
    """It goes to all of them, wherever they are, and is no error of theirs."""
    (tmp_path / "mine.py").write_text(HEAD + COUNTED)
    command = [*XIPVM, "explore", "mine.py:mine", "--runs", "1000000", "--jobs", "2"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as child:
        try:
            wait_for((tmp_path / "runs").exists, child)
            os.killpg(child.pid, signal.SIGINT)
            out, err = child.communicate(timeout=DEADLINE)
        finally:
            child.kill()
    assert (child.returncode, err) == (130, b"")
    assert out.startswith(b"mine.py:mine: random: interrupted ")
    assert (tmp_path / "runs").stat().st_size < SHARD_RUNS
