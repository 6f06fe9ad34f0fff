"""Versions, sizes and initial state that the native core builds on."""

from __future__ import annotations

import ctypes
import importlib.metadata

import pytest
from unicorn import arm64_const as arm
from unicorn import riscv_const as riscv
from unicorn import unicorn_const as uc
from unicorn.unicorn_py3.unicorn import Uc, UcError, uc_version

from tests.asm import a64, rv64, words
from tests.canary.conftest import CODE, DATA, PAGE, READ, R, Raw, W, X


def test_version_is_the_pinned_one() -> None:
    """Every other canary was observed in this release. Move the pin in pyproject.toml only when all of them pass."""
    assert importlib.metadata.version("unicorn") == "2.1.4"
    assert uc_version()[2] == 0x020104FF  # what the core compares with


def test_arm64_pages_have_1_kib_unless_set_before_anything_else() -> None:
    """The walker answers in 4 KiB pages: with 1 KiB ones a fill masked to 4 KiB would map the wrong bytes."""
    engine = Raw(uc.UC_ARCH_ARM64)
    assert engine.uc.ctl_get_page_size() == 1024
    engine.code(words(a64.ldr(0, 1), a64.ldr(0, 1, 1024), a64.ldr(0, 1, 2048), a64.ldr(0, 1, 3072), a64.WFI))
    engine.map(DATA)
    engine[1] = DATA
    assert engine.run() == uc.UC_ERR_OK
    assert [a for a, access in engine.fills if access == READ] == [DATA, DATA + 1024, DATA + 2048, DATA + 3072]

    with pytest.raises(UcError):
        engine.uc.ctl_set_page_size(PAGE)  # the engine is initialised by now
    assert Raw(uc.UC_ARCH_ARM64, page_size=PAGE).uc.ctl_get_page_size() == PAGE


def test_riscv_pages_have_4_kib_and_cannot_be_set() -> None:
    """The core sets the page size on AArch64 only."""
    engine = Uc(uc.UC_ARCH_RISCV, uc.UC_MODE_RISCV64)
    assert engine.ctl_get_page_size() == PAGE
    with pytest.raises(UcError):
        engine.ctl_set_page_size(PAGE)


def test_an_arm64_engine_starts_in_el1_with_interrupts_masked(arm64: Raw) -> None:
    """Arm64.reset sets PSTATE to this; the flags that the engine derives from it are right from the start."""
    assert arm64.uc.reg_read(arm.UC_ARM64_REG_PSTATE) & 0x3CF == 0x3C5
    arm64.code(words(a64.mrs(0, a64.CURRENTEL), a64.WFI))
    assert arm64.run() == uc.UC_ERR_OK
    assert arm64[0] == 1 << 2


def test_a_riscv_engine_starts_in_machine_mode(riscv64: Raw) -> None:
    """Riscv64.reset starts harts in M mode."""
    assert riscv64.uc.reg_read(riscv.UC_RISCV_REG_PRIV) == 3


def test_the_mmio_window_may_have_512_gib(raw: Raw) -> None:
    """One window at 1 << 45 holds every guest physical address; devices come and go without mapping calls."""
    base, size = 1 << 45, 1 << 39
    seen = []

    def read(_engine: Uc, offset: int, n: int, _user: object) -> int:
        seen.append((offset, n))
        return 7

    raw.uc.mmio_map(base, size, read, None, None, None)
    raw.code(words(a64.ldr(2, 1, 8, 4), a64.WFI) if raw.arm else words(rv64.lw(2, 1, 8), rv64.WFI))
    far = 0x7F_FFFF_F000  # the last page of the window
    raw.table[far // PAGE] = ((base + far) // PAGE, R | W)
    raw[1] = far
    assert raw.run() == uc.UC_ERR_OK
    assert seen == [(far + 8, 4)]
    assert raw[2] == 7


def test_without_exits_in_exits_mode_nothing_ends_a_run_at_its_until(raw: Raw) -> None:
    """Engines run with ``until`` 0 in exits mode: in the default mode address 0 would be an end and no guest code."""
    code = (
        words(a64.add(0, 0, 1), a64.add(0, 0, 1), a64.WFI)
        if raw.arm
        else words(rv64.addi(10, 10, 1), rv64.addi(10, 10, 1), rv64.WFI)
    )
    raw.code(code)
    raw.uc.emu_start(CODE, CODE + 4)
    assert raw.pc == CODE + 12
    assert raw[0 if raw.arm else 10] == 2


def test_unmapping_looks_the_address_up_through_the_fill_hook(raw: Raw) -> None:
    """Engine.release has the walker answer nothing before it unmaps: the physical address arrives as a virtual one."""
    raw.map(DATA, rights=R | X)
    raw.code(words(a64.WFI if raw.arm else rv64.WFI))
    raw.run()
    raw.fills.clear()
    raw.uc.mem_map(0x4000_0000, PAGE)
    raw.uc.mem_unmap(0x4000_0000, PAGE)
    assert [address for address, _ in raw.fills] == [0x4000_0000]


@pytest.mark.parametrize("arch", [uc.UC_ARCH_ARM64, uc.UC_ARCH_RISCV], ids=["arm64", "riscv64"])
def test_the_place_of_two_bytes_of_the_engine_s_state(arch: int) -> None:
    """Engine.stop_at_blocks sets ``no_exit_request``, which no call does; "initialised" beside it shows the place."""
    engine = Uc(arch, uc.UC_MODE_ARM if arch == uc.UC_ARCH_ARM64 else uc.UC_MODE_RISCV64)

    def state() -> bytes:
        assert engine._uch.value is not None
        return ctypes.string_at(engine._uch.value + 2034, 2)

    assert state() == b"\0\0"
    engine.mem_map(0, PAGE)
    assert state() == b"\0\1"
