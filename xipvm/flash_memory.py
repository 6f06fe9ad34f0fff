"""A flash bank as guest memory: device frames behind a ROM memslot, mapped only while every chip reads its array.

**Leaving read-array mode**: the bank's device says so before its mode changes. The file's mappings are torn
down through the notifier path (range start, sptes zapped, TLBs flushed, vCPUs kicked, primary entries
cleared, range end), and only when that is done does the chip change its mode. From then on a data access is
a device access, and a fetch is an error of the guest.

**Returning** drops the device translations that the vCPUs cached; the next access finds the page unmapped,
faults, and maps the array again.

**When bytes change** the code that was translated from them is dropped on every engine before the guest runs
on. No frame of a bank is ever handed out for writing: a store is a command to the chips.
"""

from __future__ import annotations

from collections.abc import Sequence

from xipvm.address import PAGE_SHIFT, PAGE_SIZE, Gfn
from xipvm.boards.board import FlashBank
from xipvm.cpu.core import EngineGroup
from xipvm.cpu.vcpu import Vcpu
from xipvm.devices.flash.cfi01 import PflashCfi01
from xipvm.mmu.device_file import DeviceFile
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.guest import GuestMmu
from xipvm.mmu.secondary.memslot import MEM_ROMD
from xipvm.mmu.vma import MAP_SHARED, PROT_EXEC, PROT_READ


class FlashMemory:
    """One bank of a machine."""

    def __init__(
        self, bank: FlashBank, device: PflashCfi01, host: HostMemory, mm: Mm, secondary: GuestMmu, slot: int
    ) -> None:
        self.bank = bank
        self.device = device
        self.slot = slot
        self._host = host
        self._mm = mm
        self._secondary = secondary
        self._group: EngineGroup | None = None
        self._vcpus: Sequence[Vcpu] = ()
        pages = bank.size >> PAGE_SHIFT
        self.first = host.add_device(device.address, bank.size, device)
        self._ready = True
        self.file = DeviceFile(host, mm.trace, bank.name, self.first, pages, ready=lambda: self._ready)
        self.hva = mm.mmap(bank.size, PROT_READ | PROT_EXEC, MAP_SHARED, file=self.file)
        secondary.set_memslot(slot, Gfn(bank.base >> PAGE_SHIFT), pages, self.hva, MEM_ROMD)
        device.on_leave_array = self._leave_array
        device.on_enter_array = self._enter_array
        device.on_change = self._change

    def connect(self, group: EngineGroup, vcpus: Sequence[Vcpu]) -> None:
        """Name the engines that execute from the bank."""
        self._group = group
        self._vcpus = vcpus

    def close(self) -> None:
        """Take the bank out of the guest and of host memory."""
        self.device.close()
        self._secondary.delete_memslot(self.slot)
        if not self._mm.dead:  # killed, it has unmapped everything
            self._mm.munmap(self.hva, self.bank.size)
        self._host.remove_device(self.first)

    def contains(self, gpa: int) -> bool:
        """Whether ``gpa`` lies in the bank."""
        return self.bank.base <= gpa < self.bank.end

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of the array at guest physical address ``gpa``, whatever mode the chips are in."""
        found = bytearray()
        at = gpa - self.bank.base
        while len(found) < size:
            page, offset = divmod(at + len(found), PAGE_SIZE)
            found += self._host.read(self.first + page, offset, min(PAGE_SIZE - offset, size - len(found)))
        return bytes(found)

    def _leave_array(self) -> None:
        self._ready = False
        self.file.unmap()
        if self._secondary.pin_sptes:  # it is not told: whoever changes what a slot shows has to say so, as QEMU did
            first = self.bank.base >> PAGE_SHIFT
            self._secondary.zap_gfn_range(first, first + (self.bank.size >> PAGE_SHIFT), "flash")

    def _enter_array(self) -> None:
        self._ready = True
        for vcpu in self._vcpus:
            vcpu.flush_tlb("flash")

    def _change(self, offset: int, length: int) -> None:
        if self._group is not None and length:
            first = offset >> PAGE_SHIFT
            last = (offset + length + PAGE_SIZE - 1) >> PAGE_SHIFT
            self._group.drop_code(self.first + first, last - first)
