"""Flash that is read in place while its chips leave and enter array mode."""

from __future__ import annotations

from typing import Final

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.boards.board import FlashBank
from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.devices.flash.image import FlashImage
from xipvm.explore.scenarios.faults import expect
from xipvm.explore.scene import Scene, scenario
from xipvm.explore.scripted import GuestAccessError, ScriptedVcpu

_BANK: Final = FlashBank("flash", 0, 4 * PAGE_SIZE, sector=4 * PAGE_SIZE)
_GFN: Final = _BANK.base >> PAGE_SHIFT
_OLD: Final = 0xFFFF_FFF0
_NEW: Final = 0x5A5A_5A50
_PROGRAM: Final = 0x0040_0040
_READ_ARRAY: Final = 0x00FF_00FF


@scenario
def fault_against_flash_mode(scene: Scene) -> None:
    """A word of flash is programmed while two vCPUs read it in place: in another mode nobody reads cells."""
    from xipvm.flash_memory import FlashMemory  # which knows engines

    mm = scene.mm()
    kvm = scene.kvm(mm)
    image = FlashImage.erased(_BANK.size)
    scene.undo(image.close)
    device = PflashCfi01(0, image, size=_BANK.size, sector=_BANK.sector, trace=scene.trace)
    device.place(0, _OLD.to_bytes(4, "little"))
    memory = FlashMemory(_BANK, device, scene.host, mm, kvm, slot=0)
    scene.undo(memory.close)
    first, second = scene.vcpu(kvm), scene.vcpu(kvm)
    first.load(_GFN)

    def program() -> None:
        device.write(0, 4, _PROGRAM)
        device.write(0, 4, _NEW)
        device.write(0, 4, _READ_ARRAY)

    scene.actor("vcpu0", _read, first, device)
    scene.actor("vcpu1", _read, second, device)
    scene.actor("flash0", program)
    scene.afterwards(lambda: expect(mm, memory.hva, _NEW.to_bytes(4, "little")))


def _read(vcpu: ScriptedVcpu, device: PflashCfi01) -> None:
    try:
        seen = int.from_bytes(vcpu.load(_GFN, 4), "little")
    except GuestAccessError:  # MMIO: the chips answer, not the cells
        return
    if not device.array_mode:
        raise AssertionError(f"vcpu{vcpu.index} read {seen:#x} from cells that the chips did not show")
    if seen not in (_OLD, _NEW):
        raise AssertionError(f"vcpu{vcpu.index} read {seen:#x}, which was never there")
