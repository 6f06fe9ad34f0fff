"""Scenarios with a real guest: its instructions run in place from flash while the host changes its mind.

The guest counts to 64 in a word of its RAM and ends with status 0 if the word says so then. Its vCPU is an actor,
switched inside its page faults and after each quantum of instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from xipvm.address import PAGE_SIZE
from xipvm.explore.scene import Scenario, Scene, scenario
from xipvm.machine import Machine
from xipvm.mmu.madvise import MADV_MERGEABLE
from xipvm.mmu.migrate import compact_memory
from xipvm.mmu.vma import PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.mmu.zap import unmap_mapping_range

COUNTER: Final = 1 << 20
"""Where the word is, from the start of RAM, on virt-arm64; twice as far on virt-riscv64."""

ARM64: Final = (
    0xD2A80200,  # movz x0, #0x4010, lsl #16      the counter
    0xD2800801,  # mov  x1, #64
    0xF9400002,  # 1: ldr x2, [x0]
    0x91000442,  # add  x2, x2, #1
    0xF9000002,  # str  x2, [x0]
    0xF1000421,  # subs x1, x1, #1
    0x54FFFF81,  # b.ne 1b
    0xF101005F,  # cmp  x2, #64
    0x9A9F07E4,  # cset x4, ne
    0xD2A00045,  # movz x5, #0x2, lsl #16         SYS_EXIT: ADP_Stopped_ApplicationExit, status
    0xF28004C5,  # movk x5, #0x26
    0xA9011005,  # stp  x5, x4, [x0, #16]
    0x52800300,  # mov  w0, #0x18
    0xD2A80201,  # movz x1, #0x4010, lsl #16
    0x91004021,  # add  x1, x1, #16
    0xD45E0000,  # hlt  #0xf000
    0x14000000,  # b    .
)
RISCV64: Final = (
    0x40100513,  # li   a0, 0x401
    0x01551513,  # slli a0, a0, 21                the counter, at 0x80200000
    0x04000593,  # li   a1, 64
    0x00053603,  # 1: ld a2, 0(a0)
    0x00160613,  # addi a2, a2, 1
    0x00C53023,  # sd   a2, 0(a0)
    0xFFF58593,  # addi a1, a1, -1
    0xFE0598E3,  # bnez a1, 1b
    0x001006B7,  # lui  a3, 0x100                 the finisher
    0x00005737,  # lui  a4, 0x5
    0x55570713,  # addi a4, a4, 0x555
    0x04000793,  # li   a5, 64
    0x00F60663,  # beq  a2, a5, 2f
    0x00013737,  # lui  a4, 0x13
    0x33370713,  # addi a4, a4, 0x333
    0x00E6A023,  # 2: sw a4, 0(a3)
    0x0000006F,  # j    .
)
CODE: Final = {"virt-arm64": ARM64, "virt-riscv64": RISCV64}


def counting(scene: Scene, board: str = "virt-arm64") -> tuple[Machine, int]:
    """A machine whose guest counts, and the hva of its counter."""
    code = b"".join(word.to_bytes(4, "little") for word in CODE[board])
    machine = scene.machine(board, code, memory=4 << 20)
    return machine, machine.ram + COUNTER * (2 if board == "virt-riscv64" else 1)


def beside(scene: Scene, machine: Machine, name: str, operation: Callable[[], object], times: int = 2) -> None:
    """``operation``, so many times, beside the guest."""

    def act() -> None:
        for _ in range(times):
            operation()

    scene.actor(name, act)


@scenario
def guest_against_mprotect(scene: Scene) -> None:
    """The page that the guest counts in becomes read-only for the host, and writable again."""
    machine, hva = counting(scene)
    all_rights = PROT_READ | PROT_WRITE | PROT_EXEC

    def protect() -> None:
        machine.mm.mprotect(hva, PAGE_SIZE, PROT_READ)
        machine.mm.mprotect(hva, PAGE_SIZE, all_rights)

    scene.guest_may_fail = True  # it may write while the host may not
    beside(scene, machine, "host", protect)


@scenario(protocols=("modern",))
def guest_against_migrate(scene: Scene) -> None:
    """The page that the guest counts in moves from frame to frame."""
    machine, _ = counting(scene)
    beside(scene, machine, "kcompactd", lambda: compact_memory(machine.host, machine.trace))


@scenario
def guest_against_fork(scene: Scene) -> None:
    """The host forks; the guest's next write is a copy, and the child goes."""
    machine, hva = counting(scene)

    def fork() -> None:
        child = machine.mm.fork()
        child.write(hva, b"child's!")
        child.exit()

    beside(scene, machine, "host", fork)


@scenario(protocols=("modern",))
def guest_against_ksm(scene: Scene) -> None:
    """KSM looks for pages that are equal to the guest's."""
    machine, hva = counting(scene)
    machine.mm.madvise(machine.ram, machine.memory_size, MADV_MERGEABLE)
    twin = machine.mm.mmap(PAGE_SIZE, PROT_READ | PROT_WRITE)
    machine.mm.write(twin, bytes(8))
    machine.mm.write(hva, bytes(8))
    machine.mm.madvise(twin, PAGE_SIZE, MADV_MERGEABLE)
    beside(scene, machine, "ksmd", machine.mm.ksm_scan, times=3)


@scenario
def guest_against_flash_unmap(scene: Scene) -> None:
    """The flash that the guest executes in place is unmapped under it; it faults its code in again."""
    machine, _ = counting(scene, "virt-riscv64")
    beside(scene, machine, "host", lambda: unmap_mapping_range(machine.flash[0].file, 0, 1))


GUEST_SCENARIOS: Final[dict[str, Scenario]] = {
    each.name: each for each in list(globals().values()) if isinstance(each, Scenario)
}
"""By name."""
