"""Scenarios whose guest's code changes while it runs: rewritten by itself, reprogrammed in flash, replaced by the host.

Each guest ends with status 0 if it ran what was there at that time, and with 1 if it ran old code.
"""

from __future__ import annotations

from typing import Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.explore.guests import beside
from xipvm.explore.scene import Scenario, Scene, scenario
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.page_cache import ShmemFile
from xipvm.mmu.vma import MAP_FIXED, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE

_CODE: Final = 2 << 20
"""Where the code that changes is, from the start of RAM."""
_ALIAS: Final = 0x5000_0000
"""Where a second memslot shows the first page of that."""
_SLOT: Final = 9
_EXIT: Final = (
    0x9A9F07E4,  # cset x4, ne
    0xAA0903E0,  # mov  x0, x9
    0xD2A00045,  # movz x5, #0x2, lsl #16         SYS_EXIT: ADP_Stopped_ApplicationExit, status
    0xF28004C5,  # movk x5, #0x26
    0xA9011005,  # stp  x5, x4, [x0, #16]
    0x91004001,  # add  x1, x0, #16
    0x52800300,  # mov  w0, #0x18
    0xD45E0000,  # hlt  #0xf000
    0x14000000,  # b    .
)
_REWRITE: Final = (
    0xD2A8040A,  # movz x10, #0x4020, lsl #16     the function
    0xD2AA000B,  # movz x11, #0x5000, lsl #16     the same page
    0xD2A80209,  # movz x9, #0x4010, lsl #16
    0x52800401,  # mov  w1, #0x52800020           mov w0, #1
    0x72AA5001,
    0xB9000161,  # str  w1, [x11]
    0x52807802,  # mov  w2, #0xd65f03c0           ret
    0x72BACBE2,
    0xB9000562,  # str  w2, [x11, #4]
    0xD5033FDF,  # isb
    0xD63F0140,  # blr  x10
    0x52800801,  # mov  w1, #0x52800040           mov w0, #2
    0x72AA5001,
    0xB9000161,  # str  w1, [x11]
    0xD5033FDF,  # isb
    0xD63F0140,  # blr  x10
    0x7100081F,  # cmp  w0, #2
    *_EXIT,
)
_REPROGRAM: Final = (
    0xD2A0800A,  # movz x10, #0x400, lsl #16      the function, in flash bank 1
    0xD2A80209,  # movz x9, #0x4010, lsl #16
    0xD63F0140,  # blr  x10
    0x52800801,  # mov  w1, #0x00400040           program
    0x72A00801,
    0xB9000141,  # str  w1, [x10]
    0x52800402,  # mov  w2, #0x52800020           mov w0, #1
    0x72AA5002,
    0xB9000142,  # str  w2, [x10]
    0xB9400143,  # 1: ldr w3, [x10]
    0x363FFFE3,  # tbz  w3, #7, 1b
    0x52801FE1,  # mov  w1, #0x00ff00ff           read array
    0x72A01FE1,
    0xB9000141,  # str  w1, [x10]
    0xD5033FDF,  # isb
    0xD63F0140,  # blr  x10
    0x7100041F,  # cmp  w0, #1
    *_EXIT,
)
_FUNCTION: Final = (0x52800060, 0xD65F03C0)  # mov w0, #3; ret
_ENTER: Final = (
    0xD2A8040A,  # movz x10, #0x4020, lsl #16
    0xD2A80209,  # movz x9, #0x4010, lsl #16      the flag
    0xB900013F,  # str  wzr, [x9]
    0xD61F0140,  # br   x10
)
_LOOK: Final = 0x0B050108  # add w8, w8, w5
_NOP: Final = 0xD503201F


def _loop(look: int) -> tuple[int, ...]:
    return (
        0xD2A80306,  # movz x6, #0x4018, lsl #16  pages that nobody has touched
        0xD2800207,  # mov  x7, #16
        0xD2800008,  # mov  x8, #0
        0xB9400125,  # 1: ldr w5, [x9]
        look,
        0xB94000C4,  # ldr  w4, [x6]
        0x914004C6,  # add  x6, x6, #1, lsl #12
        0xF10004E7,  # subs x7, x7, #1
        0x54FFFF61,  # b.ne 1b
        0x7100011F,  # cmp  w8, #0
        *_EXIT,
    )


def _bytes(words: tuple[int, ...]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


@scenario(protocols=("modern",))
def guest_rewrites_its_code(scene: Scene) -> None:
    """The guest writes a function by way of another address, calls it, and does both again; its pages move."""
    machine = scene.machine("virt-arm64", _bytes(_REWRITE))
    machine.secondary.set_memslot(_SLOT, _ALIAS >> PAGE_SHIFT, 1, machine.ram + _CODE)
    beside(scene, machine, "kcompactd", lambda: compact_memory(machine.host, machine.trace), times=1)


@scenario
def guest_reprograms_its_flash(scene: Scene) -> None:
    """The guest calls a function in flash, clears bits of it by programming, and calls it again."""
    machine = scene.machine("virt-arm64", _bytes(_REPROGRAM))
    machine.flash[1].device.place(0, _bytes(_FUNCTION))


@scenario
def guest_code_is_replaced(scene: Scene) -> None:
    """The host maps other code where the guest goes round in a loop, then says so: the old code must not see that.

    It is busy elsewhere before, for about as long as the guest takes to get into the loop.
    """
    machine = scene.machine("virt-arm64", _bytes(_ENTER))
    mm, rights = machine.mm, PROT_READ | PROT_WRITE | PROT_EXEC
    file = ShmemFile(machine.host, machine.trace, "code", 2 * PAGE_SIZE)
    scene.undo(file.close)
    file.pwrite(0, _bytes(_loop(_LOOK)))
    file.pwrite(PAGE_SIZE, _bytes(_loop(_NOP)))
    place = machine.ram + _CODE

    def show(pgoff: int) -> None:
        mm.mmap(PAGE_SIZE, rights, MAP_SHARED | MAP_FIXED, addr=place, file=file, pgoff=pgoff)

    def host() -> None:
        for page in range(32):
            mm.read(machine.ram + (3 << 20) + page * PAGE_SIZE, 1)
        show(1)
        mm.write(machine.ram + (1 << 20), b"\1\0\0\0")

    show(0)
    scene.actor("host", host)


CODE_SCENARIOS: Final[dict[str, Scenario]] = {
    each.name: each for each in list(globals().values()) if isinstance(each, Scenario)
}
"""By name."""
