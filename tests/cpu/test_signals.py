"""Signals kick the vCPU that runs; what it was doing is done once, and Python has its handlers back afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.asm import a64, rv64, words
from tests.cpu.conftest import CODE, DATA, DEVICE, OK, PAGE, RX, Box
from xipvm.cpu import core

FAR = 3600.0
"""A tick that does not come by itself."""


@pytest.fixture(autouse=True)
def nothing_pending() -> Iterator[None]:
    core.take_signals()
    yield
    core.take_signals()


@pytest.fixture
def looping(isa: int, counted: bool, make_box: Callable[..., Box]) -> Box:
    """A loop that writes its count to a device."""
    box = make_box(isa, counted=counted)
    box.page(CODE, box.store_loop(), RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 200)):
        box.set_x(n, value)
    return box


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_a_signal_in_a_callback_leaves_at_the_next_block_and_nothing_is_lost(looping: Box, number: int) -> None:
    looping.on_write = lambda value: signal.raise_signal(number) if value % 50 == 0 else None
    stops = []
    with core.SignalGuard(FAR):
        pc = CODE
        while True:
            assert looping.engine.run(pc) == OK
            pc = looping.pc()
            if not looping.engine.kick:
                break
            assert looping.engine.kick == core.KICK_SIGNAL
            assert core.take_signals() == {number}
            stops.append(looping.x(2))
            looping.engine.kick = 0
    assert stops == [50, 100, 150, 200]
    assert [value for _, _, value in looping.written] == list(range(1, 201))


def test_a_signal_in_a_miss_before_a_store_does_not_repeat_the_store(
    isa: int, counted: bool, make_box: Callable[..., Box]
) -> None:
    """The stop is pending while the access goes on."""
    box = make_box(isa, counted=counted)
    if box.arm:
        code = words(a64.str(2, 1, 0, 4), a64.add(3, 3, 1), a64.b(4), a64.WFI)
    else:
        code = words(rv64.sw(2, 1, 0), rv64.addi(3, 3, 1), rv64.jal(0, 4), rv64.WFI)
    box.page(CODE, code, RX)
    box.set_x(1, DEVICE)
    box.set_x(3, 0)

    def miss(gva: int, access: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return core.MMIO

    box.engine.on_miss = miss
    with core.SignalGuard(FAR):
        assert box.engine.run(CODE) == OK
        assert (box.pc(), box.x(3), len(box.written)) == (CODE + 12, 1, 1)
        box.engine.kick = 0
        assert box.engine.run(box.pc()) == OK
    assert len(box.written) == 1


def test_an_atomic_addition_is_done_once(counted: bool, make_box: Callable[..., Box]) -> None:
    box = make_box(core.RISCV64, counted=counted)
    box.page(CODE, words(rv64.amoadd_d(5, 1, 4), rv64.addi(3, 3, 1), rv64.jal(0, 4), rv64.WFI), RX)
    pfn = box.host.alloc()
    for n, value in ((1, DATA), (3, 0), (4, 1)):
        box.set_x(n, value)

    def miss(gva: int, access: int) -> int:
        box.page(DATA, rights=3 if access == core.WRITE else 1, pfn=pfn)
        signal.raise_signal(signal.SIGALRM)
        return core.RETRY_WALK

    box.engine.on_miss = miss
    with core.SignalGuard(FAR):
        assert box.engine.run(CODE) == OK
        box.engine.kick = 0
        assert box.engine.run(box.pc()) == OK
    assert box.x(3) == 1
    assert box.host.read(pfn, 0, 8) == (1).to_bytes(8, "little")


def test_ticks_end_an_endless_loop(isa: int, counted: bool, make_box: Callable[..., Box]) -> None:
    box = make_box(isa, counted=counted)
    box.page(CODE, words(a64.b(0)) if box.arm else words(rv64.jal(0, 0)), RX)
    with core.SignalGuard(0.001):
        for _ in range(5):
            assert box.engine.run(CODE) == OK
            assert box.engine.kick == core.KICK_SIGNAL
            assert core.take_signals() == {signal.SIGALRM}
            box.engine.kick = 0
    assert box.pc() == CODE


def test_the_next_tick_can_be_brought_forward_and_never_put_off() -> None:
    """A guest that sets its timers again and again must not keep the host from looking at its input."""
    core.tick_in(0.5)  # nothing, outside
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with core.SignalGuard(FAR):
        for asked, at_most in ((500.0, 500.0), (FAR, 500.0), (900.0, 500.0), (200.0, 200.0)):
            core.tick_in(asked)
            left, interval = signal.getitimer(signal.ITIMER_REAL)
            assert 0 < left <= at_most
            assert interval == FAR


def test_the_engine_that_runs_is_the_one_that_is_kicked(isa: int, counted: bool, make_box: Callable[..., Box]) -> None:
    """One engine runs inside a callback of another; a signal afterwards is the outer one's again."""
    box = make_box(isa, engines=2, counted=counted)
    outer, inner = box.engines
    box.page(CODE, box.store_loop(), RX)
    box.page(CODE + PAGE, box.answer(5), RX)
    for n, value in ((1, DEVICE), (2, 0), (3, 100)):
        box.set_x(n, value, outer)

    def write(value: int) -> None:
        if value == 10:
            assert inner.run(CODE + PAGE) == OK
        elif value == 20:
            signal.raise_signal(signal.SIGINT)

    box.on_write = write
    with core.SignalGuard(FAR):
        assert outer.run(CODE) == OK
    assert box.x(2, inner) == 5
    assert (outer.kick, inner.kick) == (core.KICK_SIGNAL, 0)
    assert box.x(2, outer) == 20


def test_signals_while_nothing_runs_are_kept() -> None:
    with core.SignalGuard(FAR):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert core.take_signals() == {signal.SIGINT, signal.SIGTERM}
        assert core.take_signals() == set()


def interrupted_and_failing() -> None:
    signal.raise_signal(signal.SIGINT)
    raise RuntimeError("inside")


def test_handlers_come_back() -> None:
    """Python's own handler is called again, and no tick is left ticking; also after an exception inside."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, lambda n, frame: seen.append(n)) for number in numbers}
    try:
        with pytest.raises(RuntimeError, match="inside"), core.SignalGuard(FAR):
            interrupted_and_failing()
        assert seen == []
        assert core.take_signals() == {signal.SIGINT}
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        for number in numbers:
            signal.raise_signal(number)
        assert seen == list(numbers)
        assert core.take_signals() == set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
