"""What the guest's clocks say: never less than before, and the same whether a trace is recorded or not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.asm import join, rv64
from tests.loader.conftest import R, W, X, write_elf
from xipvm.devices.pl031 import EPOCH, SECOND
from xipvm.machine import Machine
from xipvm.trace import Trace

RAM, RTC, FINISHER, NOWHERE = 0x8000_0000, 0x0010_1000, 0x0010_0000, 0x7000_0000
HANDLER, LOG, FRESH = RAM + 0x1000, RAM + 0x2000, RAM + 0x100000
PASS, EM_RISCV = 0x5555, 243
ROUNDS = 12
TIME_STEP = 100
"""ns of one count of the time CSR."""

#: x20: RTC, x21: where to log, x22: a page that was never touched, x23: 4096, x24: an address without memory.
LOG_BOTH = [
    rv64.lw(10, 20, 0),
    rv64.csrrs(11, rv64.TIME, 0),
    rv64.sd(10, 21, 0),
    rv64.sd(11, 21, 8),
    rv64.addi(21, 21, 16),
]
GO_ON = [rv64.csrrs(12, rv64.MEPC, 0), rv64.addi(12, 12, 4), rv64.csrrw(0, rv64.MEPC, 12), rv64.MRET]
TOUCH = [rv64.sd(0, 22, 0), rv64.add(22, 22, 23)]
LOG_RTC = [rv64.lw(10, 20, 0), rv64.sd(10, 21, 0)]
FAULT = [rv64.ld(5, 24, 0)]


def constant(rd: int, value: int) -> list[int]:
    code = [rv64.addi(rd, 0, value >> 30 & 0x3FF)]
    for shift in (20, 10, 0):
        code += [rv64.slli(rd, rd, 10), rv64.addi(rd, rd, value >> shift & 0x3FF)]
    return code


def clocks(path: Path, body: list[int], handler: list[int], trace: Trace) -> list[tuple[int, int]]:
    """Runs ``body`` in a loop, as one block, with ``handler`` for its fault; the (RTC, time) that were logged."""
    setup = [*constant(7, HANDLER), rv64.csrrw(0, rv64.MTVEC, 7)]
    for register, value in ((20, RTC), (21, LOG), (22, FRESH), (23, 4096), (24, NOWHERE), (25, ROUNDS)):
        setup += constant(register, value)
    body = [*body, rv64.addi(25, 25, -1)]
    end = [*constant(5, FINISHER), *constant(6, PASS), rv64.sw(6, 5, 0), rv64.jal(0, 0)]
    code = join(*setup, rv64.jal(0, 4), *body, rv64.beq(25, 0, 8), rv64.jal(0, -4 * (len(body) + 1)), *end)
    part = {"paddr": RAM, "data": code.ljust(HANDLER - RAM, b"\0") + join(*handler), "flags": R | W | X}
    path.write_bytes(write_elf(part, entry=RAM, machine=EM_RISCV))
    with Machine(guest=path, trace=trace) as machine:
        result = machine.run(max_instructions=100_000)
        assert (result.reason, result.status) == ("exit", 0)
        raw = machine.read_physical(LOG, 16 * ROUNDS)
    assert raw is not None
    return list(struct.iter_unpack("<QQ", raw))


@pytest.mark.parametrize("behind", [0, 10, 300])
def test_a_trace_does_not_change_the_clocks(tmp_path: Path, behind: int) -> None:
    """Events fall into blocks that a fault then cuts short."""
    body = [*TOUCH, *FAULT, *[rv64.NOP] * behind]
    events: list[object] = []
    recorded = Trace()
    recorded.attach(events.append)
    plain = clocks(tmp_path / "plain.elf", body, [*LOG_BOTH, *GO_ON], Trace())
    traced = clocks(tmp_path / "traced.elf", body, [*LOG_BOTH, *GO_ON], recorded)
    assert plain == traced
    assert len(events) > ROUNDS
    assert plain == sorted(plain)


@pytest.mark.parametrize("behind", [0, 10, 450])
def test_the_time_csr_does_not_fall_behind_a_device(tmp_path: Path, behind: int) -> None:
    """A device shows the time of its whole block; the CSR is read behind a fault that cut that block short."""
    handler = [rv64.csrrs(11, rv64.TIME, 0), rv64.sd(11, 21, 8), rv64.addi(21, 21, 16), *GO_ON]
    logged = clocks(tmp_path / "clocks.elf", [*LOG_RTC, *FAULT, *[rv64.NOP] * behind], handler, Trace())
    for rtc, time in logged:
        shown = (rtc - EPOCH * SECOND) % (1 << 32)
        assert shown < (time + 1) * TIME_STEP
    assert logged == sorted(logged)
