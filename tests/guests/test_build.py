"""The committed guests are what their sources give, and lie where a guest executed in place has to lie."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from elftools.elf.constants import P_FLAGS
from elftools.elf.elffile import ELFFile

GUESTS = Path(__file__).resolve().parents[2] / "guests"
BANK = {"arm64": range(64 << 20), "riscv64": range(0x20000000, 0x20000000 + (32 << 20))}
RAM = {"arm64": range(0x40000000, 0x48000000), "riscv64": range(0x80000000, 0x88000000)}


def load_build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("guests_build", GUESTS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_build_script()
ELFS = sorted(path.relative_to(GUESTS / "bin") for path in (GUESTS / "bin").rglob("*.elf"))


@pytest.mark.slow
def test_rebuild_is_byte_identical() -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip(f"the guests' compiler is missing: {sys.executable} -m pip install {build.ZIGLANG}")
    assert build.check(build.GUESTS, build.ISAS) == []


def test_one_elf_for_each_guest_and_isa() -> None:
    expected = {f"{isa.name}/{guest.name}-{isa.name}.elf" for guest in build.GUESTS for isa in build.ISAS}
    assert {str(elf) for elf in ELFS} == expected


def test_a_missing_compiler_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build.BuildError, match=f"pip install {build.ZIGLANG}"):
        build.build(build.GUESTS, build.ISAS, tmp_path)


@pytest.mark.parametrize("name", ELFS, ids=lambda path: path.stem)
def test_layout(name: Path) -> None:
    bank, ram = BANK[name.parent.name], RAM[name.parent.name]
    with (GUESTS / "bin" / name).open("rb") as file:
        elf = ELFFile(file)
        assert elf["e_entry"] == bank.start, "reset enters at the first byte of flash"
        for segment in elf.iter_segments("PT_LOAD"):
            assert segment["p_flags"] & (P_FLAGS.PF_W | P_FLAGS.PF_X) != P_FLAGS.PF_W | P_FLAGS.PF_X
            last = segment["p_filesz"] - 1
            # A kernel in the upper half has all of physical memory there.
            vaddr = segment["p_vaddr"] & 0x3F_FFFF_FFFF
            if segment["p_filesz"]:
                assert segment["p_paddr"] in bank
                assert segment["p_paddr"] + last in bank
            else:
                assert segment["p_paddr"] == vaddr
            assert vaddr in (bank if segment["p_paddr"] == vaddr and last >= 0 else ram)
            if vaddr in bank:
                assert not segment["p_flags"] & P_FLAGS.PF_W
        assert elf.get_section_by_name(".symtab").get_symbol_by_name("main")


@pytest.mark.parametrize("name", ELFS, ids=lambda path: path.stem)
def test_no_trace_of_the_building_host(name: Path) -> None:
    content = (GUESTS / "bin" / name).read_bytes()
    assert b"/home" not in content
    assert b"/tmp" not in content
    assert str(GUESTS).encode() not in content
