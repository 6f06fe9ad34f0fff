"""The engine by itself, through its own Python package: a virtual TLB that a dictionary fills."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
from unicorn import arm64_const as arm
from unicorn import riscv_const as riscv
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import Uc, UcError

PAGE = 4096
R, W, X = uc.UC_PROT_READ, uc.UC_PROT_WRITE, uc.UC_PROT_EXEC
READ, WRITE, FETCH = uc.UC_MEM_READ, uc.UC_MEM_WRITE, uc.UC_MEM_FETCH
#: Where tests put code and data; a virtual page is mapped to the physical one of the same number unless they say else.
CODE, DATA = 0x10000, 0x20000
RAM = 0x400000


class Raw:
    """One engine as the core uses it: 4 KiB pages, virtual TLB, exits mode without exits, memory of our own.

    ``table`` maps virtual pages to (physical page, rights); ``fills`` is what the fill hook was asked for.
    """

    def __init__(self, arch: int, *, page_size: int | None = None) -> None:
        self.arm = arch == uc.UC_ARCH_ARM64
        self.uc = Uc(arch, uc.UC_MODE_ARM if self.arm else uc.UC_MODE_RISCV64)
        if self.arm:
            if page_size is not None:
                self.uc.ctl_set_page_size(page_size)
            self.uc.ctl_set_cpu_model(arm.UC_CPU_ARM64_A57)
        self.uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL)
        self.uc.ctl_exits_enabled(True)
        self.ram = (ctypes.c_uint8 * RAM)()
        self.uc.mem_map_ptr(0, RAM, uc.UC_PROT_ALL, ctypes.addressof(self.ram))
        self.table: dict[int, tuple[int, int]] = {}
        self.fills: list[tuple[int, int]] = []
        self.on_fill: Callable[[int, int], None] | None = None
        self.uc.hook_add(uc.UC_HOOK_TLB_FILL, self._fill)
        self.interrupts: list[int] = []
        self.uc.hook_add(uc.UC_HOOK_INTR, self._interrupt)

    def _fill(self, _uc: Uc, address: int, access: int, entry: Any, _user: object) -> bool:
        self.fills.append((address, access))
        if self.on_fill is not None:
            self.on_fill(address, access)
        found = self.table.get(address // PAGE)
        if found is None:
            return False
        page, entry.perms = found
        entry.paddr = page * PAGE + address % PAGE
        return True

    def _interrupt(self, engine: Uc, number: int, _user: object) -> None:
        self.interrupts.append(number)
        engine.emu_stop()

    def map(self, va: int, pa: int | None = None, rights: int = R | W) -> None:
        """One page."""
        self.table[va // PAGE] = ((va if pa is None else pa) // PAGE, rights)

    def code(self, data: bytes, va: int = CODE, pa: int | None = None) -> None:
        """Code at ``va``, read and execute."""
        pa = va if pa is None else pa
        self.poke(pa, data)
        for offset in range(0, len(data), PAGE):
            self.map(va + offset, pa + offset, R | X)

    def poke(self, pa: int, data: bytes) -> None:
        """Store as the host does, behind the engine's back."""
        self.ram[pa : pa + len(data)] = list(data)

    def peek(self, pa: int, size: int = 8) -> int:
        """What memory holds."""
        return int.from_bytes(bytes(self.ram[pa : pa + size]), "little")

    def run(self, pc: int = CODE) -> int:
        """Runs from ``pc``; returns the engine's error code."""
        try:
            self.uc.emu_start(pc, 0)
        except UcError as error:
            return int(error.errno)
        return int(uc.UC_ERR_OK)

    def flush_tlb(self) -> None:
        """Drops all of the TLB."""
        self.uc.ctl(uc.UC_CTL_TLB_FLUSH, uc.UC_CTL_IO_WRITE)

    @property
    def pc(self) -> int:
        """The program counter."""
        return int(self.uc.reg_read(arm.UC_ARM64_REG_PC if self.arm else riscv.UC_RISCV_REG_PC))

    def __getitem__(self, n: int) -> int:
        """General register ``n``."""
        return int(self.uc.reg_read((arm.UC_ARM64_REG_X0 if self.arm else riscv.UC_RISCV_REG_X0) + n))

    def __setitem__(self, n: int, value: int) -> None:
        self.uc.reg_write((arm.UC_ARM64_REG_X0 if self.arm else riscv.UC_RISCV_REG_X0) + n, value)


@pytest.fixture
def arm64() -> Raw:
    """An AArch64 engine."""
    return Raw(uc.UC_ARCH_ARM64, page_size=PAGE)


@pytest.fixture
def riscv64() -> Raw:
    """An RV64 engine."""
    return Raw(uc.UC_ARCH_RISCV)


@pytest.fixture(params=["arm64", "riscv64"])
def raw(request: pytest.FixtureRequest) -> Raw:
    """An engine of each kind."""
    return Raw(uc.UC_ARCH_ARM64, page_size=PAGE) if request.param == "arm64" else Raw(uc.UC_ARCH_RISCV)
