"""An exception in a callback comes out of ``run`` as it is, and the engine goes on afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from tests.asm import a64, rv64, words
from tests.cpu.conftest import CODE, DATA, DEVICE, OK, PAGE, RX, Box
from xipvm.cpu import core


class BoomError(Exception):
    """What callbacks raise."""


class Stop(BaseException):
    """No Exception: as KeyboardInterrupt, or what unwinds a greenlet."""


def raiser(error: BaseException) -> Callable[..., NoReturn]:
    def callback(*args: object) -> NoReturn:
        raise error

    return callback


def runs_on(box: Box) -> None:
    """The engine does as it is told."""
    box.page(CODE + 8 * PAGE, box.answer(42), RX)
    box.engine.kick = 0
    assert box.engine.run(CODE + 8 * PAGE) == OK
    assert box.x(2) == 42


def raises_it(box: Box, error: BaseException, pc: int = CODE) -> None:
    with pytest.raises(type(error)) as caught:
        box.engine.run(pc)
    assert caught.value is error


@pytest.fixture(params=[BoomError, Stop, KeyboardInterrupt])
def error(request: pytest.FixtureRequest) -> BaseException:
    made: BaseException = request.param("from a callback")
    return made


@pytest.fixture
def either(isa: int, counted: bool, make_box: Callable[..., Box]) -> Box:
    """Each kind of engine on both clocks."""
    return make_box(isa, counted=counted)


def test_in_a_miss(either: Box, error: BaseException) -> None:
    either.page(CODE, either.load(), RX)
    either.set_x(1, DATA)
    either.engine.on_miss = raiser(error)
    raises_it(either, error)
    assert either.pc() == CODE
    runs_on(either)


def test_in_a_fetch_miss(either: Box, error: BaseException) -> None:
    either.engine.on_miss = raiser(error)
    raises_it(either, error)
    assert either.pc() == CODE
    runs_on(either)


def test_in_a_device_read(either: Box, error: BaseException) -> None:
    either.page(CODE, either.load(), RX)
    either.set_x(1, DEVICE)
    either.engine.on_read = raiser(error)
    raises_it(either, error)
    runs_on(either)


def test_in_a_device_write(either: Box, error: BaseException) -> None:
    either.page(CODE, either.store_loop(), RX)
    either.set_x(1, DEVICE)
    either.set_x(2, 0)
    either.set_x(3, 1000)
    either.engine.on_write = raiser(error)
    raises_it(either, error)
    assert either.x(2) == 1  # left at the next block
    runs_on(either)


def test_only_the_first_of_a_block_is_raised(either: Box) -> None:
    """The block runs to its end; later callbacks may fail for reasons that the first one gave them."""
    insns = [a64.str(2, 1, 0, 4)] * 2 if either.arm else [rv64.sw(2, 1, 0)] * 2
    either.page(CODE, words(*insns, a64.b(4) if either.arm else rv64.jal(0, 4)) + either.answer(1), RX)
    either.set_x(1, DEVICE)
    errors = [BoomError("first"), BoomError("second")]
    raised = iter(errors)

    def write(gpa: int, size: int, value: int) -> None:
        raise next(raised)

    either.engine.on_write = write
    raises_it(either, errors[0])
    assert list(raised) == []
    runs_on(either)


def test_a_value_that_is_no_number(either: Box) -> None:
    either.page(CODE, either.load(), RX)
    either.set_x(1, DEVICE)
    either.engine.on_read = lambda gpa, size: "text"  # type: ignore[assignment,return-value]
    with pytest.raises(TypeError):
        either.engine.run(CODE)
    either.engine.on_read = lambda gpa, size: -1
    either.engine.kick = 0
    with pytest.raises(OverflowError):
        either.engine.run(CODE)
    runs_on(either)


@pytest.mark.parametrize(
    "insn",
    [
        pytest.param(a64.mrs(2, (3, 3, 14, 2, 1)), id="mrs"),
        pytest.param(a64.msr((3, 3, 14, 2, 1), 2), id="msr"),
        pytest.param(0xD5087800, id="at s1e1r"),
    ],
)
@pytest.mark.parametrize("on_clock", [True, False], ids=["counted", "uncounted"])
def test_in_a_system_register_access(
    make_box: Callable[..., Box], error: BaseException, insn: int, on_clock: bool
) -> None:
    box = make_box(core.ARM64, counted=on_clock)
    box.page(CODE, words(insn, a64.b(4), a64.WFI), RX)
    box.engine.on_sysreg = raiser(error)
    raises_it(box, error)
    runs_on(box)


@pytest.mark.parametrize("on_clock", [True, False], ids=["counted", "uncounted"])
def test_in_a_hooked_instruction(make_box: Callable[..., Box], error: BaseException, on_clock: bool) -> None:
    box = make_box(core.RISCV64, counted=on_clock)
    box.page(CODE, words(rv64.csrrs(2, rv64.CYCLE, 0), rv64.jal(0, 4), rv64.WFI), RX)
    box.engine.on_insn = raiser(error)
    raises_it(box, error)
    runs_on(box)


def test_in_the_recording_of_a_translation(either: Box, error: BaseException) -> None:
    either.page(CODE, either.store_loop(), RX)
    either.page(DATA)
    either.set_x(1, DATA)
    either.set_x(3, 1000)
    either.engine.record_inserts(True)
    either.engine.on_insert = raiser(error)
    raises_it(either, error)
    either.engine.record_inserts(False)
    runs_on(either)


def test_in_the_recording_of_dropped_code(either: Box, error: BaseException) -> None:
    either.page(CODE, either.store_loop(), RX)
    pfn = either.page(DATA, either.answer(1))
    assert either.engine.run(DATA) == OK
    either.set_x(1, DATA + 0x100)
    either.set_x(3, 1000)
    either.engine.on_drop = raiser(error)
    raises_it(either, error)
    either.engine.on_drop = None
    assert either.group.executed(pfn, 1) == 0
    runs_on(either)


def test_an_exception_that_python_handles_elsewhere_is_not_raised_again(box: Box) -> None:
    """An engine's error is taken out when it is raised, so the next run begins without it."""
    box.page(CODE, box.load(), RX)
    box.set_x(1, DATA)
    box.engine.on_miss = raiser(BoomError())
    with pytest.raises(BoomError):
        box.engine.run(CODE)
    assert box.engine.error is None
    box.engine.kick = 0
    box.page(DATA)
    assert box.engine.run(CODE) == OK
