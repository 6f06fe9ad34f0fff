from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from xipvm.errors import GuestImageError
from xipvm.loader import ElfImage
from xipvm.loader.elf import rwx

Build = Callable[..., bytes]
GUESTS = sorted((Path(__file__).parents[2] / "guests" / "bin").rglob("*.elf"))
CODE = bytes(range(64))


def refused(data: bytes) -> str:
    with pytest.raises(GuestImageError) as caught:
        ElfImage(data, "guest.elf")
    line = str(caught.value)
    assert line.startswith("guest.elf: ")
    assert "\n" not in line
    return line.removeprefix("guest.elf: ")


@pytest.mark.parametrize("bits", [32, 64])
def test_header_segments_and_symbols(build_elf: Build, bits: int) -> None:
    elf = ElfImage(
        build_elf(
            {"paddr": 0x1000, "data": CODE},
            {"paddr": 0x9000, "type": 7, "data": b"not loaded"},
            {"paddr": 0x2000, "vaddr": 0x40000000, "data": b"data", "memsz": 100, "flags": 6},
            {"paddr": 0x3000, "data": b""},
            entry=0x1004, bits=bits, symbols={"main": (0x1004, 8), "_start": (0x1000, 4), "tail": (0x1020, 0)},
        )
    )  # fmt: skip
    assert (elf.bits, elf.machine, elf.entry, elf.position_independent) == (bits, 183, 0x1004, False)
    assert [(s.number, s.vaddr, s.paddr, bytes(s.data), s.memsz, rwx(s.flags)) for s in elf.segments] == [
        (0, 0x1000, 0x1000, CODE, 64, "r-x"),
        (2, 0x40000000, 0x2000, b"data", 100, "rw-"),
    ]
    assert [symbol.name for symbol in elf.symbols] == ["_start", "main", "tail"]
    assert elf.address_of("main") == 0x1004
    with pytest.raises(KeyError):
        elf.address_of("nothing")


def test_describe_names_what_covers_an_address(build_elf: Build) -> None:
    symbols = {"_start": (0x1000, 4), "main": (0x1008, 8), "tail": (0x1020, 0)}
    elf = ElfImage(build_elf({"paddr": 0x1000, "data": CODE}, entry=0x1000, symbols=symbols))
    described = {address: elf.describe(address) for address in (0xFFF, 0x1000, 0x1003, 0x1004, 0x100C, 0x1010, 0x103F)}
    assert described == {
        0xFFF: None, 0x1000: "_start", 0x1003: "_start+0x3", 0x1004: None, 0x100C: "main+0x4", 0x1010: None,
        0x103F: "tail+0x1f",
    }  # fmt: skip
    assert elf.describe(0x1040) is None  # `tail` has no size and does not reach beyond its segment


def test_a_file_without_symbols_has_none(build_elf: Build) -> None:
    elf = ElfImage(build_elf({"paddr": 0, "data": CODE}))
    assert elf.symbols == ()
    assert elf.describe(0) is None


def test_damaged_symbols_are_no_symbols(build_elf: Build) -> None:
    data = build_elf({"paddr": 0x1000, "data": CODE}, entry=0x1000, symbols={"main": (0x1000, 8)})
    for size in range(64 + 56 + len(CODE), len(data)):
        assert ElfImage(data[:size]).symbols == ()


@pytest.mark.parametrize("path", GUESTS, ids=lambda path: path.stem)
def test_agrees_with_pyelftools(path: Path) -> None:
    elf = ElfImage.open(path)
    with path.open("rb") as file:
        peer = ELFFile(file)
        loads = [s for s in peer.iter_segments("PT_LOAD") if s["p_memsz"]]
        assert [(s.vaddr, s.paddr, s.flags, bytes(s.data), s.memsz) for s in elf.segments] == [
            (s["p_vaddr"], s["p_paddr"], s["p_flags"], s.data(), s["p_memsz"]) for s in loads
        ]
        assert (elf.entry, elf.machine) == (peer["e_entry"], {"EM_AARCH64": 183, "EM_RISCV": 243}[peer["e_machine"]])
        table = peer.get_section_by_name(".symtab")
        expected = {
            (s.name, s["st_value"], s["st_size"])
            for s in table.iter_symbols()
            if s["st_info"]["type"] in ("STT_FUNC", "STT_OBJECT", "STT_NOTYPE")
            and s["st_shndx"] != "SHN_UNDEF"
            and s.name
            and not s.name.startswith("$")
        }
        assert {(s.name, s.address, s.size) for s in elf.symbols} == expected


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"\x7fELG", "is not an ELF file"),
        (4, b"\x03", "has an unknown ELF class 3"),
        (5, b"\x02", "is big-endian; guests are little-endian"),
        (5, b"\x07", "has no known byte order"),
        (16, b"\x01", "is an unlinked object file, not an executable"),
        (16, b"\x04", "is a core dump, not an executable"),
        (16, b"\x07", "is of ELF type 7, not an executable"),
        (20, b"\x05", "has an unknown ELF version 5"),
        (32, b"\xff" * 8, "is cut short: its 2 program headers at 0xffffffffffffffff lie beyond its end"),
        (54, b"\x20", "has program headers of 32 bytes, not 56"),
        (56, b"\x00", "has no program headers, so nothing to load"),
        (56, b"\xff\xff", "is cut short: its 65535 program headers at 0x40 lie beyond its end"),
        (64, b"\x03", "is dynamically linked: it needs an interpreter that no board has"),
        (64 + 8, b"\xff" * 8, "is cut short: segment 0 ends at 0x1000000000000003f of 0xf8"),
        (64 + 16, b"\xff" * 8, "segment 0 of 0x40 bytes reaches beyond the address space"),
        (64 + 32, b"\x41", "segment 0 is larger in the file (0x41) than in memory (0x40)"),
        (64 + 40, b"\xff" * 8, "segment 0 of 0xffffffffffffffff bytes reaches beyond the address space"),
        (64 + 24, b"\xf0\x1f", "segments 0 and 1 overlap at physical address 0x2000"),
        (64 + 16, b"\xf0\x1f", "segments 0 and 1 overlap at virtual address 0x2000"),
    ],
)
def test_what_is_wrong_is_named(build_elf: Build, offset: int, value: bytes, message: str) -> None:
    data = bytearray(build_elf({"paddr": 0x1000, "data": CODE}, {"paddr": 0x2000, "data": CODE[:8]}, entry=0x1000))
    data[offset : offset + len(value)] = value
    assert refused(bytes(data)) == message


def test_nothing_to_load(build_elf: Build) -> None:
    assert refused(build_elf({"paddr": 0, "type": 4, "data": CODE})) == "has no loadable segment"
    assert refused(build_elf({"paddr": 0})) == "has no loadable segment"


def test_32_bit_segments_may_not_wrap_at_4_gib(build_elf: Build) -> None:
    data = build_elf({"paddr": 0xFFFF_FFF0, "data": CODE}, bits=32)
    assert refused(data) == "segment 0 of 0x40 bytes reaches beyond the address space"


def test_cut_anywhere(build_elf: Build) -> None:
    data = build_elf({"paddr": 0x1000, "data": CODE}, {"paddr": 0x2000, "data": CODE})
    lines = {refused(data[:size]).split(":")[0].split(" ends")[0] for size in range(len(data))}
    assert lines == {"is empty", "is not an ELF file", "is cut short"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", (1 << 30) + 1)
    for name, message in (
        ("nothing", "No such file or directory"),
        (".", "Is a directory"),
        ("fifo", "is not a regular file"),
        ("huge", "is larger than 1 GiB"),
    ):
        with pytest.raises(GuestImageError, match=message):
            ElfImage.open(tmp_path / name)
    with pytest.raises(GuestImageError, match="is not a regular file"):
        ElfImage.open("/dev/zero")


def test_open_reads_a_file(build_elf: Build, tmp_path: Path) -> None:
    (tmp_path / "guest").write_bytes(build_elf({"paddr": 0, "data": struct.pack("<I", 0xD503201F)}))
    elf = ElfImage.open(tmp_path / "guest")
    assert elf.path == str(tmp_path / "guest")
    assert bytes(elf.segments[0].data) == b"\x1f\x20\x03\xd5"
