"""A guest with processes of its own, on two stages of translation: beside QEMU, and while the host takes pages away."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from xipvm.console import Console
from xipvm.machine import Machine
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace

BIN = Path(__file__).resolve().parents[2] / "guests" / "bin"
ISAS = ("arm64", "riscv64")
GUESTS = ("paging", "processes", "rights")
#: Where QEMU 7.2 has page faults and the architecture access faults.
DIFFERENT = b"  tables out of reach, level 1"
FLASH = {"arm64": (0, 64 << 20), "riscv64": (0x2000_0000, 32 << 20)}
QEMU = {
    "arm64": ["qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57", "-semihosting"],
    "riscv64": ["qemu-system-riscv64", "-M", "virt", "-bios", "none"],
}


def elf_of(guest: str, isa: str) -> Path:
    return BIN / isa / f"{guest}-{isa}.elf"


def run(guest: str, isa: str, **options: object) -> bytes:
    out = io.BytesIO()
    with Machine(guest=elf_of(guest, isa), console=Console(out), **options) as machine:  # type: ignore[arg-type]
        result = machine.run(max_instructions=100_000_000)
    assert (result.status, result.reason) == (0, "exit")
    return out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("guest", GUESTS)
@pytest.mark.parametrize("isa", ISAS)
def test_qemu_prints_the_same(isa: str, guest: str, tmp_path: Path) -> None:
    if shutil.which(QEMU[isa][0]) is None:
        pytest.skip(f"{QEMU[isa][0]} is not installed")
    image = tmp_path / "flash"
    base, size = FLASH[isa]
    with image.open("wb") as flash, elf_of(guest, isa).open("rb") as file:
        flash.truncate(size)
        for segment in ELFFile(file).iter_segments("PT_LOAD"):
            if segment["p_filesz"]:
                flash.seek(segment["p_paddr"] - base)
                flash.write(segment.data())
    drive = f"if=pflash,unit=0,format=raw,file={image}"
    command = [*QEMU[isa], "-m", "128", "-nic", "none", "-nographic", "-drive", drive]
    said = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120)
    assert _comparable(said.stdout, isa) == _comparable(run(guest, isa), isa)


def _comparable(output: bytes, isa: str) -> list[bytes]:
    return [line for line in output.splitlines() if isa == "arm64" or not line.startswith(DIFFERENT)]


@pytest.mark.parametrize("isa", ISAS)
def test_all_entries_and_accesses(isa: str) -> None:
    """What is expected was compared with QEMU, see above."""
    expected = Path(__file__).with_name("expected") / f"rights-{isa}.txt"
    assert run("rights", isa).decode().replace("\r", "") == expected.read_text()


@pytest.mark.parametrize("isa", ISAS)
def test_a_tlb_alone_will_do(isa: str) -> None:
    assert run("processes", isa, secondary="gru").endswith(b"processes: 3762e5b6 ok\r\n")


@pytest.mark.parametrize("isa", ISAS)
def test_two_runs_leave_the_same_trace(isa: str) -> None:
    def events() -> list[tuple[int, str, str, dict[str, object]]]:
        seen: list[tuple[int, str, str, dict[str, object]]] = []

        def sink(event: Event) -> None:
            seen.append((event.time, event.actor, event.kind, event.fields))

        trace = Trace()
        trace.attach(sink)
        run("processes", isa, trace=trace)
        return seen

    assert events() == events()


@pytest.mark.parametrize("isa", ISAS)
def test_what_a_process_may_not_do_is_its_own_fault(isa: str) -> None:
    """Page faults are the guest's: the trace has them, with the address, and no run ends by them."""
    faults: list[int] = []

    def sink(event: Event) -> None:
        if event.kind == "guest_exception":
            faults.append(event.fields["address"])

    trace = Trace()
    trace.attach(sink)
    run("processes", isa, trace=trace)
    assert 0 in faults  # a null pointer
    assert 0x3F_FFFE_EFF8 in faults  # below a stack
