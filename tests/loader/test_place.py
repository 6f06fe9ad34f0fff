from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xipvm import boards
from xipvm.errors import GuestImageError
from xipvm.loader import ElfImage, Placement, board_for, place

Build = Callable[..., bytes]
ARM = boards.get("virt-arm64")
FLASH = ARM.flash[0].base
RAM = ARM.ram_base
MEMORY = 1 << 20
CODE = bytes(range(64))
GUESTS = sorted((Path(__file__).parents[2] / "guests" / "bin").rglob("*.elf"))
UBOOT = Path("/usr/lib/u-boot/qemu_arm64/uboot.elf")


def placed(data: bytes) -> Placement:
    return place(ElfImage(data, "guest.elf"), ARM, MEMORY)


def refused(data: bytes) -> str:
    with pytest.raises(GuestImageError) as caught:
        placed(data)
    return str(caught.value).removeprefix("guest.elf: ")


def test_code_in_flash_is_programmed_and_bss_is_zeroed_ram(build_elf: Build) -> None:
    placement = placed(build_elf({"paddr": RAM, "memsz": 4096, "flags": 6}, {"paddr": FLASH, "data": CODE}))
    assert [(c.where, c.address, bytes(c.data), c.segment) for c in placement.pieces] == [
        ("flash0", FLASH, CODE, 1),
        ("ram", RAM, b"", 0),
    ]
    assert [piece.size for piece in placement.pieces] == [64, 4096]
    assert (placement.board, placement.entry, placement.notes) == ("virt-arm64", FLASH, ())
    assert placement.of("ram") == placement.pieces[1:]


def test_initialised_data_is_stored_in_flash_and_its_bss_nowhere(build_elf: Build) -> None:
    placement = placed(
        build_elf(
            {"paddr": FLASH, "data": CODE},
            {"paddr": FLASH + 64, "vaddr": RAM, "data": b"data", "memsz": 1 << 30, "flags": 6},
            {"paddr": FLASH + 68, "vaddr": RAM + (1 << 30), "memsz": 64, "flags": 6},
        )
    )
    assert [(c.where, c.address, bytes(c.data)) for c in placement.pieces] == [
        ("flash0", FLASH, CODE),
        ("flash0", FLASH + 64, b"data"),
    ]
    assert placement.notes == ()


def test_writable_code_in_flash_gets_a_note(build_elf: Build) -> None:
    placement = placed(build_elf({"paddr": FLASH, "data": CODE, "flags": 7}))
    assert placement.notes == ("segment 0 is writable and lies in flash bank flash0: stores are flash commands",)


def test_bss_in_flash_is_a_linking_mistake(build_elf: Build) -> None:
    assert refused(build_elf({"paddr": FLASH, "data": CODE, "memsz": 100})) == (
        "segment 0 at 0x0 (100 bytes) ends in 36 bytes of zero-initialised data in flash bank flash0, "
        "which cannot be written; link .bss to RAM at 0x40000000"
    )


def test_bss_in_flash_of_an_image_that_relocates_itself(build_elf: Build) -> None:
    placement = placed(build_elf({"paddr": FLASH, "data": CODE, "memsz": 100}, type=3))
    assert [(bytes(piece.data), piece.size) for piece in placement.pieces] == [(CODE, 64)]
    assert placement.notes == (
        "segment 0 ends in 36 bytes of zero-initialised data in flash bank flash0: "
        "it has to move itself to RAM before it uses them",
    )


def test_second_bank(build_elf: Build) -> None:
    base = ARM.flash[1].base
    assert placed(build_elf({"paddr": base, "data": CODE}, entry=base)).pieces[0].where == "flash1"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"paddr": 0x2000_0000}, "segment 0 at 0x20000000 (64 bytes) lies in no memory of virt-arm64"),
        ({"paddr": RAM + MEMORY}, "segment 0 at 0x40100000 (64 bytes) lies in no memory of virt-arm64"),
        ({"paddr": RAM + MEMORY - 63}, "reaches beyond the 1 MiB of RAM at 0x40000000"),
        ({"paddr": RAM, "memsz": 1 << 60}, "reaches beyond the 1 MiB of RAM at 0x40000000"),
        ({"paddr": (64 << 20) - 8}, "reaches beyond the end of flash bank flash0 at 0x4000000"),
    ],
)
def test_segments_that_fit_nowhere(build_elf: Build, part: dict[str, Any], message: str) -> None:
    assert message in refused(build_elf({"data": CODE, **part}))


def test_segments_may_overlap_in_memory_only_by_what_is_not_stored(build_elf: Build) -> None:
    ram_code = {"paddr": RAM + 32, "vaddr": 0x8000_0000, "data": CODE}
    data = build_elf({"paddr": RAM, "data": CODE[:32], "memsz": 33}, ram_code, entry=RAM)
    assert refused(data) == "segments 0 and 1 overlap at 0x40000020"
    placed(build_elf({"paddr": RAM, "data": CODE[:32]}, ram_code, entry=RAM))


def test_entry_is_translated_to_its_physical_address(build_elf: Build) -> None:
    data = build_elf({"paddr": RAM, "vaddr": 0xFFFF_0000_0000_0000, "data": CODE}, entry=0xFFFF_0000_0000_0010)
    assert placed(data).entry == RAM + 0x10


def test_entry_has_to_be_executable(build_elf: Build) -> None:
    data = {"paddr": RAM, "data": CODE, "flags": 6}
    assert refused(build_elf(data, entry=RAM)) == "starts at 0x40000000, which is in none of its executable segments"
    assert refused(build_elf(data, entry=0x2000_0000)).startswith("starts at 0x20000000")
    assert placed(build_elf(data, entry=FLASH + 0x100)).entry == FLASH + 0x100


def test_nothing_stored(build_elf: Build) -> None:
    data = build_elf({"paddr": FLASH, "vaddr": RAM, "memsz": 64})
    assert refused(data) == "has nothing to load: all of its segments are empty in the file"


def test_the_machine_decides_the_board(build_elf: Build) -> None:
    part = {"paddr": FLASH, "data": CODE}
    assert board_for(ElfImage(build_elf(part))).name == "virt-arm64"
    assert board_for(ElfImage(build_elf(part, machine=243))).name == "virt-riscv64"
    for options, name in (
        ({"machine": 62}, "x86-64"),
        ({"bits": 32}, "32-bit AArch64"),
        ({"machine": 9}, "e_machine 9"),
    ):
        with pytest.raises(GuestImageError, match=f"is for {name}, which no board runs .virt-arm64 runs AArch64"):
            board_for(ElfImage(build_elf(part, **options)))


def test_the_board_has_to_run_the_machine(build_elf: Build) -> None:
    assert refused(build_elf({"paddr": 0, "data": CODE}, machine=243)) == "is for RISC-V; virt-arm64 runs AArch64"
    assert refused(build_elf({"paddr": 0, "data": CODE}, bits=32)) == "is for 32-bit AArch64; virt-arm64 runs AArch64"


@pytest.mark.parametrize("path", GUESTS, ids=lambda path: path.stem)
def test_guests_run_in_place(path: Path) -> None:
    elf = ElfImage.open(path)
    board = board_for(elf)
    placement = place(elf, board, board.default_memory)
    assert placement.entry == board.flash[0].base
    assert placement.of("flash0")[0].address == placement.entry
    assert not any(piece.data.nbytes for piece in placement.of("ram"))


@pytest.mark.skipif(not UBOOT.exists(), reason="needs Debian's u-boot-qemu")
def test_uboot_runs_in_place() -> None:
    elf = ElfImage.open(UBOOT)
    placement = place(elf, board_for(elf), 128 << 20)
    assert [(c.where, c.address) for c in placement.pieces] == [("flash0", 0)]
    assert len(placement.notes) == 1
