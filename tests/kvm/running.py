"""Machines whose guest is a few AArch64 instructions in flash, run in slices between which the host does things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.asm import a64, words
from xipvm.console import Console
from xipvm.machine import Machine
from xipvm.mmu.secondary.kvm import Kvm
from xipvm.mmu.vma import PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.result import RunResult
from xipvm.trace import Trace

PAGE = 4096
RWX = PROT_READ | PROT_WRITE | PROT_EXEC
RAM = 0x4000_0000
CTRL = RAM + (1 << 20)
"""Words that guest and host tell each other things by."""
FAILED = CTRL + 0xF00
"""Not 0: what a guest found wrong."""
REGION = 0xC000_0000
"""Where tests put memslots of their own."""
SLOT = 10


class Code:
    """Instructions with labels: ``code.label("again"); ...; code.to(a64.cbnz, 3, "again")``."""

    def __init__(self, *insns: int | list[int]) -> None:
        self._insns: list[int | tuple[Callable[..., int], tuple[Any, ...], str]] = []
        self._labels: dict[str, int] = {}
        self.add(*insns)

    def add(self, *insns: int | list[int]) -> Code:
        for insn in insns:
            self._insns += insn if isinstance(insn, list) else [insn]
        return self

    def label(self, name: str) -> Code:
        self._labels[name] = len(self._insns)
        return self

    def to(self, encode: Callable[..., int], *operands: Any) -> Code:
        """A branch: the last operand is a label."""
        self._insns.append((encode, operands[:-1], operands[-1]))
        return self

    def off(self) -> Code:
        """SYSTEM_OFF."""
        return self.add(a64.mov(0, 0x8400_0008), a64.hvc(), a64.b(0))

    def fail_unless(self, found: int, wanted: int, scratch: int = 15) -> Code:
        """Ends with what is in register ``found``, and 1 << 63, in FAILED, unless ``wanted`` holds the same."""
        name = f"fine{len(self._insns)}"
        self.add(a64.eor_reg(scratch, found, wanted)).to(a64.cbz, scratch, name)
        self.add(a64.mov(scratch, FAILED), a64.str(found, scratch, 8), a64.movz(found, 0x8000, 48))
        self.add(a64.str(found, scratch)).off()
        return self.label(name)

    def address(self, name: str) -> int:
        return 4 * self._labels[name]

    def bytes(self) -> bytes:
        done = []
        for at, insn in enumerate(self._insns):
            if isinstance(insn, tuple):
                encode, operands, label = insn
                insn = encode(*operands, 4 * (self._labels[label] - at))
            done.append(insn)
        return words(*done)


class Running:
    """A machine and what tests do with it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.mm = machine.mm
        assert isinstance(machine.secondary, Kvm)
        self.kvm = machine.secondary
        self.slots = SLOT

    def slot(self, pages: int, gpa: int = REGION, *, flags: int = 0, hva: int | None = None) -> int:
        """Anonymous memory of the host at ``gpa``; its hva. ``self.slots`` is the number of the next slot."""
        if hva is None:
            hva = self.mm.mmap(pages * PAGE, RWX)
        self.kvm.set_memslot(self.slots, gpa // PAGE, pages, hva, flags)
        self.slots += 1
        return hva

    @contextmanager
    def without(self, *slots: int) -> Iterator[None]:
        """These memslots are not there meanwhile."""
        gone = [slot for slot in self.kvm.memslots if slot.id in slots]
        for slot in gone:
            self.kvm.delete_memslot(slot.id)
        yield
        for slot in gone:
            self.kvm.set_memslot(slot.id, slot.gfn, slot.pages, slot.hva, slot.flags)

    def slice(self, instructions: int = 2_000) -> None:
        """Some instructions of the guest, which has not ended behind them."""
        result = self.machine.run(max_instructions=instructions)
        assert result.reason == "limit", (result.reason, self.failed(), result.report and result.report.render())

    def finish(self, instructions: int = 2_000_000) -> None:
        """The rest; the guest ends by itself, and has found nothing wrong."""
        result = self.end(instructions)
        assert (result.reason, result.status) == ("exit", 0), result.report and result.report.render()
        assert not self.failed(), self.failed()

    def end(self, instructions: int = 2_000_000) -> RunResult:
        return self.machine.run(max_instructions=instructions)

    def failed(self) -> list[int]:
        """What the guest found wrong."""
        return [self.get(FAILED + 8)] if self.get(FAILED) else []

    def get(self, gpa: int) -> int:
        data = self.machine.read_physical(gpa, 8)
        assert data is not None
        return int.from_bytes(data, "little")

    def put(self, gpa: int, value: int) -> None:
        self.machine.write_ram(gpa, value.to_bytes(8, "little"))

    def peek(self, hva: int) -> int:
        return int.from_bytes(self.mm.read(hva, 8), "little")

    def poke(self, hva: int, value: int) -> None:
        self.mm.write(hva, value.to_bytes(8, "little"))


@contextmanager
def running(code: Code, **options: Any) -> Iterator[Running]:
    """A machine that begins with ``code``."""
    options = {"board": "virt-arm64", "memory": 8 << 20, "console": Console(), "trace": Trace()} | options
    with Machine(**options) as machine:
        machine.flash[0].device.place(0, code.bytes())
        yield Running(machine)


def adr(rd: int, offset: int) -> int:
    """ADR."""
    return 0x1000_0000 | (offset & 3) << 29 | (offset >> 2 & 0x7FFFF) << 5 | rd


def start_others(code: Code, cpus: int, entry: str) -> Code:
    """PSCI CPU_ON of the other CPUs, at ``entry`` with their number in x0. ``code`` begins with this."""
    for cpu in range(1, cpus):
        code.add(a64.mov(0, 0xC400_0003), a64.movz(1, cpu)).to(adr, 2, entry)
        code.add(a64.movz(3, cpu), a64.hvc())
    return code
