"""Guests of a few instructions: firmware calls, interrupts that a guest raises itself, HTIF words, restarts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.asm import a64, join, rv64, words
from tests.loader.conftest import R, W, X, write_elf
from xipvm.devices.flash.files import ImageOption
from xipvm.errors import FlashImageError, GuestImageError, XipvmError
from xipvm.machine import Machine
from xipvm.mmu.frames import HostMemory
from xipvm.report import CrashReport, crash_report
from xipvm.trace import Event, Trace
from xipvm.trace.recorder import Recorder

ARM_RAM, RISCV_RAM = 0x4010_0000, 0x8000_0000
FINISHER, PASS, RESET = 0x0010_0000, 0x5555, 0x7777


def guest(path: Path, base: int, code: bytes, machine: int, symbols: dict[str, int] | None = None) -> Path:
    part = {"paddr": base, "data": code, "flags": R | W | X}
    named = {name: (address, 8) for name, address in (symbols or {}).items()}
    path.write_bytes(write_elf(part, entry=base, machine=machine, symbols=named))
    return path


def constant(rd: int, value: int) -> list[int]:
    """RISC-V: any number below 2**40, ten bits at a time."""
    code = [rv64.addi(rd, 0, value >> 30 & 0x3FF)]
    for shift in (20, 10, 0):
        code += [rv64.slli(rd, rd, 10), rv64.addi(rd, rd, value >> shift & 0x3FF)]
    return code


def finish(value: int) -> list[int]:
    """RISC-V: ``value`` to the test finisher, and nothing after it."""
    return [*constant(5, FINISHER), *constant(6, value), rv64.sw(6, 5, 0), rv64.jal(0, 0)]


def test_a_suspended_cpu_waits_for_its_interrupt(tmp_path: Path) -> None:
    """And goes on behind the call: PSTATE masks the interrupt."""
    ticks, timer = 16_000, 27
    code = [
        *a64.mov(1, 0x0800_0000), a64.movz(2, 1), a64.str(2, 1, 0, 4), *a64.mov(3, 1 << timer), a64.str(3, 1, 0x100, 4),
        *a64.mov(1, 0x0801_0000), a64.movz(2, 0xFF), a64.str(2, 1, 4, 4), a64.movz(2, 1), a64.str(2, 1, 0, 4),
        *a64.mov(0, ticks), a64.msr((3, 3, 14, 3, 0), 0), a64.movz(0, 1), a64.msr((3, 3, 14, 3, 1), 0),
        *a64.mov(0, 0xC400_0001), a64.movz(1, 0), a64.hvc(),  # CPU_SUSPEND, standby
        a64.mrs(9, a64.CNTVCT_EL0), *a64.mov(0, 0x8400_0008), a64.hvc(), a64.b(0),  # SYSTEM_OFF
    ]  # fmt: skip
    with Machine(guest=guest(tmp_path / "suspend.elf", ARM_RAM, words(*code), 183)) as machine:
        result = machine.run(max_instructions=10_000)
        assert (result.reason, result.status) == ("exit", 0)
        assert ticks <= dict(machine.vcpus[0].isa.registers())["x9"] < ticks + 10


@pytest.mark.parametrize("unmask_first", [True, False])
def test_a_hart_that_interrupts_itself_is_interrupted_at_once(tmp_path: Path, unmask_first: bool) -> None:
    """No event is waiting that would have it leave its loop."""
    ssip, mie = 1 << 1, 1 << 3
    steps = [rv64.csrrs(0, rv64.MSTATUS, 9), rv64.csrrs(0, rv64.MIP, 8)]
    code = [
        *constant(7, RISCV_RAM + 0x100), rv64.csrrw(0, rv64.MTVEC, 7),
        *constant(8, ssip), rv64.csrrw(0, 0x304, 8), *constant(9, mie),
        *(steps if unmask_first else reversed(steps)),
        rv64.addi(15, 15, 1), rv64.jal(0, -4),
    ]  # fmt: skip
    elf = guest(tmp_path / "ssip.elf", RISCV_RAM, join(*code).ljust(0x100, b"\0") + join(*finish(PASS)), 243)
    with Machine(guest=elf) as machine:
        result = machine.run(max_instructions=1000)
    assert (result.reason, result.status) == ("exit", 0)
    assert result.summary.instructions == len(code) - 2 + len(finish(PASS))  # none of the loop


def test_what_a_hart_wrote_to_mip_is_gone_after_a_reset(tmp_path: Path) -> None:
    """The first time mip reads 0, SSIP is set and the machine restarted; the second time it has to read 0 again."""
    flag, data = 16, 0x200
    code = [
        *constant(10, RISCV_RAM + data), rv64.lw(11, 10, 0),  # RAM beyond the file keeps its contents over a reset
        rv64.csrrs(flag, rv64.MIP, 0), rv64.addi(12, 0, 2), rv64.csrrs(0, rv64.MIP, 12),
        rv64.addi(13, 11, 1), rv64.sw(13, 10, 0), rv64.bne(11, 0, 4 + 4 * len(finish(RESET))),
        *finish(RESET), rv64.add(17, flag, 0), *finish(PASS),
    ]  # fmt: skip
    with Machine(guest=guest(tmp_path / "reset.elf", RISCV_RAM, join(*code), 243)) as machine:
        assert machine.run(max_instructions=1000).reason == "exit"
        registers = dict(machine.vcpus[0].isa.registers())
        assert (registers["a1"], registers["a7"]) == (1, 0)  # the second time, and mip as it was then


def test_the_page_of_tohost_holds_what_the_elf_has_there(tmp_path: Path) -> None:
    """The word beside it is the status; it is in the file, in a page that a device has taken out of RAM."""
    page = 0x1000
    code = [
        *constant(10, RISCV_RAM + page), rv64.ld(11, 10, 8), rv64.sd(11, 10, 0), rv64.jal(0, 0),
    ]  # fmt: skip
    data = join(*code).ljust(page, b"\0") + bytes(8) + (7 << 1 | 1).to_bytes(8, "little")
    with Machine(guest=guest(tmp_path / "htif.elf", RISCV_RAM, data, 243, {"tohost": RISCV_RAM + page})) as machine:
        result = machine.run(max_instructions=1000)
    assert (result.reason, result.status) == ("exit", 7)


@pytest.mark.parametrize(
    ("symbols", "what"),
    [
        ({"tohost": 0x2000_0000}, "tohost at 0x20000000 is no aligned"),
        ({"tohost": RISCV_RAM + 0x1004}, "tohost at 0x80001004 is no aligned"),
        ({"tohost": RISCV_RAM + 0x1000, "fromhost": 0x1000}, "fromhost at 0x1000 is no aligned"),
        ({"tohost": RISCV_RAM + 0x1000, "fromhost": RISCV_RAM + 0x10_0000}, "too far apart"),
    ],
)
def test_htif_words_where_no_word_can_be_are_an_error_of_the_file(
    tmp_path: Path, symbols: dict[str, int], what: str
) -> None:
    elf = guest(tmp_path / "words.elf", RISCV_RAM, join(*finish(PASS)), 243, symbols)
    with pytest.raises(GuestImageError, match=what):
        Machine(guest=elf)


def test_a_machine_that_cannot_be_built_gives_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, although the exception's traceback still holds it."""
    made: list[HostMemory] = []

    def make(size: int) -> HostMemory:
        made.append(HostMemory(size))
        return made[-1]

    monkeypatch.setattr("xipvm.machine.HostMemory", make)
    elf = guest(tmp_path / "flash.elf", 0x2000_0000, join(*finish(PASS)), 243)
    image = tmp_path / "flash.img"
    image.write_bytes(b"\xff" * (32 << 20))
    with pytest.raises(FlashImageError, match="readonly") as failure:
        Machine(guest=elf, memory=1 << 20, flash=[ImageOption(str(image), readonly=True)])
    assert failure.tb is not None
    assert [host.nr_frames for host in made] == [0]
    with Machine(guest=elf, memory=1 << 20, flash=[ImageOption(str(image))]) as machine:  # it is not locked any more
        assert made[1].nr_frames
        assert machine.run(max_instructions=1000).reason == "exit"


@pytest.mark.parametrize("address", [0x1000_0100, 0x1000_00FE])
def test_an_access_beyond_a_device_in_its_page_is_the_guest_s_crash(tmp_path: Path, address: int) -> None:
    """The UART has 256 bytes."""
    code = [*constant(10, address), rv64.lw(11, 10, 0), rv64.jal(0, 0)]
    with Machine(guest=guest(tmp_path / "beyond.elf", RISCV_RAM, join(*code), 243)) as machine:
        result = machine.run(max_instructions=1000)
    assert result.reason == "crash"
    assert result.report is not None
    assert "no device there" in result.report.message


def test_a_trace_that_begins_late_tells_what_is_held_already(tmp_path: Path) -> None:
    elf = guest(tmp_path / "loop.elf", RISCV_RAM, join(rv64.addi(10, 10, 1), rv64.jal(0, -4)), 243)
    with Machine(guest=elf) as machine:
        machine.run(max_instructions=100)
        events: list[Event] = []
        machine.trace.attach(events.append)
        machine.run(max_instructions=100)
    told = [event.fields["gfn"] for event in events if event.kind == "tlb_insert"]
    assert told == [RISCV_RAM >> 12]


def test_a_negative_exit_status_is_one_in_the_result_and_in_a_trace(tmp_path: Path) -> None:
    block = ARM_RAM + 0x100
    code = [*a64.mov(0, 0x18), *a64.mov(1, block), a64.HLT_SEMIHOST, a64.b(0)]  # SYS_EXIT
    data = words(*code).ljust(0x100, b"\0") + (0x20026).to_bytes(8, "little") + b"\xff" * 8
    trace = Trace()
    with (
        Recorder(tmp_path / "exit.xtrace") as recorder,
        Machine(guest=guest(tmp_path / "exit.elf", ARM_RAM, data, 183), trace=trace) as machine,
    ):
        trace.attach(recorder)
        assert machine.run(max_instructions=1000).status == -1
        trace.detach(recorder)


def test_a_signal_that_comes_too_late_is_not_the_next_run_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest has crashed already. Python gets the signal, as it would without a machine."""

    def interrupted_report(*arguments: Any) -> CrashReport:
        signal.raise_signal(signal.SIGINT)
        return crash_report(*arguments)

    monkeypatch.setattr("xipvm.report.crash_report", interrupted_report)
    crash = guest(tmp_path / "crash.elf", ARM_RAM, words(a64.UDF), 183)
    with Machine(guest=crash) as machine, pytest.raises(KeyboardInterrupt):
        machine.run(max_instructions=1000)
    with Machine(guest=guest(tmp_path / "loop.elf", ARM_RAM, words(a64.b(0)), 183)) as machine:
        assert machine.run(max_instructions=1000).reason == "limit"


def test_a_table_entry_made_later_is_found(tmp_path: Path) -> None:
    """RISC-V, S mode: 4 GiB is mapped to RAM after satp was written, which needs no write to any register."""
    root, elsewhere, rwxad = RISCV_RAM + 0x2000, 4 << 30, 0xCF
    entry = RISCV_RAM >> 12 << 10 | rwxad
    code = [
        *constant(7, 8 << 36 | root >> 36), rv64.slli(7, 7, 24), *constant(8, root >> 12), rv64.add(7, 7, 8),
        rv64.csrrw(0, rv64.SATP, 7),
        *constant(9, root), *constant(10, entry), rv64.sd(10, 9, 8 * (elsewhere >> 30)),
        rv64.addi(11, 0, 0x1F), rv64.csrrw(0, 0x3A0, 11), rv64.addi(12, 0, -1), rv64.csrrw(0, 0x3B0, 12),  # pmp: all
        *constant(13, RISCV_RAM + 0x400), rv64.csrrw(0, rv64.MEPC, 13),
        *constant(14, 1 << 11), rv64.csrrs(0, rv64.MSTATUS, 14), rv64.MRET,
    ]  # fmt: skip
    supervisor = [*constant(17, elsewhere), rv64.lw(18, 17, 0), rv64.jal(0, 0)]
    table = bytearray(4096)
    table[16:24] = entry.to_bytes(8, "little")
    data = join(*code).ljust(0x400, b"\0") + join(*supervisor).ljust(0x1C00, b"\0") + table
    with Machine(guest=guest(tmp_path / "sv39.elf", RISCV_RAM, data, 243)) as machine:
        result = machine.run(max_instructions=1000)
        registers = dict(machine.vcpus[0].isa.registers())
    assert result.report is None, result.report.render()
    assert result.reason == "limit"
    assert registers["s2"] == int.from_bytes(data[:4], "little")


def test_ttbr1_maps_the_upper_half(tmp_path: Path) -> None:
    """The lower half is mapped to itself by 1 GiB blocks, and so is the upper one, by the same table."""
    root = ARM_RAM + 0x1000
    code = [
        *a64.mov(1, root), a64.msr((3, 0, 2, 0, 0), 1), a64.msr((3, 0, 2, 0, 1), 1),
        *a64.mov(1, 25 | 25 << 16 | 2 << 30), a64.msr((3, 0, 2, 0, 2), 1),
        a64.mrs(1, a64.SCTLR_EL1), a64.movz(2, 1), 0xAA020021, a64.msr(a64.SCTLR_EL1, 1), a64.ISB,  # orr x1, x1, x2
        *a64.mov(3, 0xFFFF_FF80_0000_0000 | root), a64.ldr(4, 3, 8), a64.b(0),
    ]  # fmt: skip
    table = b"".join((n << 30 | 0x401).to_bytes(8, "little") for n in range(512))
    data = words(*code).ljust(0x1000, b"\0") + table
    with Machine(guest=guest(tmp_path / "ttbr1.elf", ARM_RAM, data, 183)) as machine:
        result = machine.run(max_instructions=1000)
        registers = dict(machine.vcpus[0].isa.registers())
    assert result.reason == "limit"
    assert registers["x4"] == 1 << 30 | 0x401


@pytest.mark.parametrize("machine", [183, 243])
@pytest.mark.parametrize("translated", [False, True])
def test_a_jump_to_the_end_of_all_addresses(tmp_path: Path, machine: int, translated: bool) -> None:
    """What is shown of it does not go beyond."""
    if machine == 183:
        on = [a64.mrs(1, a64.SCTLR_EL1), a64.movz(2, 1), 0xAA020021, a64.msr(a64.SCTLR_EL1, 1)] if translated else []
        tables = [*a64.mov(1, ARM_RAM + 0x1000), a64.msr((3, 0, 2, 0, 0), 1), *a64.mov(1, 25 | 25 << 16 | 2 << 30)]
        far = [a64.movz(5, 0), a64.sub(5, 5, 8)]
        data = words(*tables, a64.msr((3, 0, 2, 0, 2), 1), *far, *on, a64.ISB, a64.br(5)).ljust(0x1000, b"\0")
        data += b"".join((n << 30 | 0x401).to_bytes(8, "little") for n in range(512))
        elf = guest(tmp_path / "far.elf", ARM_RAM, data, machine)
    else:
        satp = [rv64.addi(7, 0, 8), rv64.slli(7, 7, 60), rv64.csrrw(0, rv64.SATP, 7)] if translated else []
        data = join(*satp, rv64.addi(5, 0, -8), rv64.jalr(0, 5, 0))
        elf = guest(tmp_path / "far.elf", RISCV_RAM, data, machine)
    with Machine(guest=elf) as running:
        result = running.run(max_instructions=1000)
    assert isinstance(result.report, CrashReport)
    assert result.report.pc == 0xFFFF_FFFF_FFFF_FFF8
    assert "0xfffffffffffffff8" in result.report.render()


@pytest.mark.parametrize(("insn", "cause"), [(0x0062_B02F, 6), (0x1002_B02F, 4)], ids=["amoadd.d", "lr.d"])
def test_a_misaligned_atomic_traps_where_it_is(tmp_path: Path, insn: int, cause: int) -> None:
    """mepc is the instruction, mtval the address; the engine itself reports neither."""
    code = [*constant(7, RISCV_RAM + 0x100), rv64.csrrw(0, rv64.MTVEC, 7), *constant(5, RISCV_RAM + 0x203), insn]
    elf = guest(tmp_path / "mis.elf", RISCV_RAM, join(*code).ljust(0x100, b"\0") + join(*finish(PASS)), 243)
    with Machine(guest=elf) as machine:
        assert machine.run(max_instructions=1000).reason == "exit"
        registers = dict(machine.vcpus[0].isa.registers())
    assert (registers["mcause"], registers["mtval"]) == (cause, RISCV_RAM + 0x203)
    assert registers["mepc"] == RISCV_RAM + 4 * (len(code) - 1)


def test_a_machine_that_is_closed_says_so() -> None:
    machine = Machine(guest=Path(__file__).parents[2] / "guests/bin/arm64/hello-arm64.elf")
    machine.close()
    machine.close()
    with pytest.raises(XipvmError, match="make another machine"):
        machine.run()
    with pytest.raises(XipvmError, match="closed"):
        machine.cpu_on(0, 0, 0)


def test_a_machine_is_not_closed_or_run_by_its_own_trace() -> None:
    with Machine(guest=Path(__file__).parents[2] / "guests/bin/arm64/hello-arm64.elf") as machine:
        for misuse in (machine.close, machine.run):

            def sink(event: Event, misuse: Any = misuse) -> None:
                machine.trace.detach(sink)
                misuse()

            machine.trace.attach(sink)
            with pytest.raises(XipvmError, match="runs"):
                machine.run(max_instructions=100)
        assert machine.run().status == 0


def test_a_guest_that_has_ended_runs_again_after_a_reset() -> None:
    with Machine(guest=Path(__file__).parents[2] / "guests/bin/arm64/hello-arm64.elf") as machine:
        assert machine.run().status == 0
        with pytest.raises(XipvmError, match="has ended"):
            machine.run()
        machine.request_reset()
        assert machine.run().reason == "exit"
