"""A machine made of what the last one had is as one made of nothing: the same run gives the same events."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from xipvm.boards import virt_arm64, virt_riscv64
from xipvm.cpu import core
from xipvm.devices.flash import mapping
from xipvm.explore import explore, replay, run_once, strategy
from xipvm.explore.choices import Choice
from xipvm.explore.find import KNOWN
from xipvm.trace.events import Event

SCENARIOS = (
    "guest-against-fork",
    "guest-against-flash-unmap",
    "guest-against-migrate",
    "guest-reprograms-its-flash",
    "guest-rewrites-its-code",
)


def nothing_is_kept() -> None:
    gc.collect()  # machines that nobody has closed give their engines back
    core.drain_pool()
    mapping.drop_kept()
    for board in (virt_arm64, virt_riscv64):
        board.device_tree.cache_clear()


def events(name: str, choices: list[Choice]) -> list[Event]:
    seen: list[Event] = []
    run = replay(KNOWN[name], choices, sinks=[seen.append])
    assert run.failure is None
    return seen


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_run_gives_the_same_events(name: str) -> None:
    by = strategy("random", "reset")
    by.begin()
    choices = run_once(KNOWN[name], by.pick).choices
    nothing_is_kept()
    anew = events(name, choices)
    for other in SCENARIOS:  # which leave what they have written, executed and mapped
        assert explore(KNOWN[other], strategy("random", 1), runs=3).failing is None
    assert core.pooled() > 0
    assert events(name, choices) == anew
    assert len(anew) > 20


SEARCHES = """
from xipvm.cpu import core
from xipvm.explore import explore, strategy
from xipvm.explore.find import KNOWN
for _ in range(3):
    assert explore(KNOWN["guest-against-fork"], strategy("random"), runs=6).failing is None
    print(core.pooled())
"""


def test_a_machine_is_made_of_what_the_last_one_had() -> None:
    # in a process of its own: machines that other tests left to the collector give their engines back at any time
    done = subprocess.run([sys.executable, "-c", SEARCHES], capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())
    assert later == [first, first]
    assert 0 < first <= 2
