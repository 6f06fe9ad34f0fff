"""Engines without a machine: host frames, a shadow table, and code that tests put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.asm import a64, rv64, words
from xipvm.cpu import core
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.secondary.spte import PFN_SHIFT, SPTE_EXEC, SPTE_PRESENT, SPTE_READ, SPTE_WRITE
from xipvm.mmu.tables import PageTable

PAGE = 4096
R, W, X = SPTE_READ, SPTE_WRITE, SPTE_EXEC
RW, RX, RWX = R | W, R | X, R | W | X
#: Where tests put code, data and a device, as guest addresses.
CODE, DATA, DEVICE = 0x10000, 0x20000, 0x900000

OK, EXCEPTION, INVALID = 0, 21, 10


class Box:
    """Engines of one kind over one host memory and one shadow table.

    A miss is a FAULT unless a test sets ``on_miss`` or ``misses``; pages of ``devices`` answer as MMIO, and what is
    written there goes into ``written``, what is read comes from ``on_read``.
    """

    def __init__(self, isa: int, *, engines: int = 1, counted: bool = True, frames: int = 64) -> None:
        self.isa = isa
        self.arm = isa == core.ARM64
        self.host = HostMemory(frames * PAGE, poison="frame")
        self.group = core.EngineGroup(self.host)
        self.sptes = PageTable(3)
        self.devices = {DEVICE}
        self.written: list[tuple[int, int, int]] = []
        self.on_write: Callable[[int], None] | None = None
        self.on_read: Callable[[int, int], int] = lambda gpa, size: 0
        self.misses: list[tuple[int, int]] = []
        self.engines: list[core.Engine] = []
        for _ in range(engines):
            self.add_engine(counted)

    def add_engine(self, counted: bool = True) -> None:
        """One more engine."""
        engine = core.take_engine(self.isa, counted)
        engine.bind(self.group, self.sptes)
        engine.on_miss = self._miss
        engine.on_read = lambda gpa, size: self.on_read(gpa, size)
        engine.on_write = self._write
        self.engines.append(engine)

    def _miss(self, gva: int, access: int) -> int:
        self.misses.append((gva, access))
        return core.MMIO if gva in self.devices else core.FAULT

    def _write(self, gpa: int, size: int, value: int) -> None:
        self.written.append((gpa, size, value))
        if self.on_write is not None:
            self.on_write(value)

    def close(self) -> None:
        """Gives the engines and the memory back."""
        self.group.close()
        self.host.close()

    @property
    def engine(self) -> core.Engine:
        """The first engine."""
        return self.engines[0]

    def page(self, gva: int, data: bytes = b"", rights: int = RWX, pfn: int | None = None) -> int:
        """Maps the page at ``gva`` to ``pfn`` or to a new frame with ``data`` in it; returns the pfn."""
        if pfn is None:
            pfn = self.host.alloc()
        if data:
            self.host.write(pfn, 0, data)
        self.sptes.set(gva >> 12, pfn << PFN_SHIFT | SPTE_PRESENT | rights)
        return pfn

    def unmap(self, gva: int, *, flush: bool = True) -> None:
        """Takes the page away, as a zap and a remote flush do."""
        self.sptes.set(gva >> 12, 0)
        if flush:
            for engine in self.engines:
                engine.flush_tlb("test")

    def pc(self, engine: core.Engine | None = None) -> int:
        """The program counter."""
        return (engine or self.engine).reg(core.ARM64_PC if self.arm else core.RISCV_PC)

    def set_pc(self, value: int, engine: core.Engine | None = None) -> None:
        """Sets the program counter."""
        (engine or self.engine).set_reg(core.ARM64_PC if self.arm else core.RISCV_PC, value)

    def x(self, n: int, engine: core.Engine | None = None) -> int:
        """General register ``n`` (AArch64: 0..28)."""
        return (engine or self.engine).reg((core.ARM64_X0 if self.arm else core.RISCV_X0) + n)

    def set_x(self, n: int, value: int, engine: core.Engine | None = None) -> None:
        """Sets general register ``n``."""
        (engine or self.engine).set_reg((core.ARM64_X0 if self.arm else core.RISCV_X0) + n, value)

    # Code that is the same in both languages. Registers: x1 address, x2 value, x3 counter.

    def answer(self, value: int) -> bytes:
        """x2 := value; wait."""
        return words(a64.movz(2, value), a64.WFI) if self.arm else words(rv64.addi(2, 0, value), rv64.WFI)

    def answer_insn(self, value: int) -> int:
        """The first instruction of ``answer``."""
        return int.from_bytes(self.answer(value)[:4], "little")

    def store_word(self) -> bytes:
        """[x1] := low word of x2; make code visible; wait."""
        if self.arm:
            return words(a64.str(2, 1, 0, 4), a64.ISB, a64.WFI)
        return words(rv64.sw(2, 1, 0), rv64.FENCE_I, rv64.WFI)

    def load(self) -> bytes:
        """x2 := [x1]; wait."""
        return words(a64.ldr(2, 1), a64.WFI) if self.arm else words(rv64.ld(2, 1, 0), rv64.WFI)

    def store_loop(self) -> bytes:
        """A block that jumps to itself: x2 += 1, [x1] := x2 (word), x3 -= 1 until it is 0; wait."""
        if self.arm:
            return words(a64.add(2, 2, 1), a64.str(2, 1, 0, 4), a64.subs(3, 3, 1), a64.cbnz(3, -12), a64.WFI)
        return words(rv64.addi(2, 2, 1), rv64.sw(2, 1, 0), rv64.addi(3, 3, -1), rv64.bne(3, 0, -12), rv64.WFI)


@pytest.fixture
def make_box() -> Iterator[Callable[..., Box]]:
    """Makes boxes and closes them."""
    boxes: list[Box] = []

    def make(isa: int, **options: Any) -> Box:
        boxes.append(Box(isa, **options))
        return boxes[-1]

    yield make
    for box in boxes:
        box.close()


@pytest.fixture(params=[core.ARM64, core.RISCV64], ids=["arm64", "riscv64"])
def isa(request: pytest.FixtureRequest) -> int:
    """Each kind of engine."""
    return int(request.param)


@pytest.fixture(params=[True, False], ids=["counted", "uncounted"])
def counted(request: pytest.FixtureRequest) -> bool:
    """Both clocks."""
    return bool(request.param)


@pytest.fixture
def box(isa: int, make_box: Callable[..., Box]) -> Box:
    """One counted engine of each kind."""
    return make_box(isa)


@pytest.fixture
def pair(isa: int, make_box: Callable[..., Box]) -> Box:
    """Two counted engines."""
    return make_box(isa, engines=2)
