"""What the operations of a storm work on: a machine, the children it has forked, frames that somebody holds.

Targets are chosen where something happens: the page whose fault is being handled, the page that a vCPU executes, pages
that are mapped. What a child has is known by a model of its own (``Child.known``): it keeps what it had when it was
forked, and what it wrote itself, whatever the guest does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from xipvm.address import PAGE_SHIFT, PAGE_SIZE
from xipvm.errors import InternalError, MmError
from xipvm.mmu.host_thread import HostThread
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.pte import MAPPED, SPECIAL, pte_pfn

if TYPE_CHECKING:
    from xipvm.machine import Machine
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.guest import GuestMmu
    from xipvm.mmu.secondary.kvm import Kvm
    from xipvm.mmu.userfaultfd import Userfaultfd
    from xipvm.storm.choices import Choices
    from xipvm.storm.devices import Devices

MAX_CHILDREN: Final = 4
MAX_HELD: Final = 8
MOST_PAGES: Final = 64
"""Of a target that is a range."""


class Child:
    """A forked mm and what it must read."""

    def __init__(self, mm: Mm) -> None:
        self.mm = mm
        self.known: dict[int, bytes] = {}
        """Contents of pages by host address."""

    def may(self, hva: int, prot: int) -> bool:
        """Whether it can access the page as ``prot`` says: it got what the parent had when it was forked."""
        area = self.mm.find_vma(hva)
        return area is not None and bool(area.prot & prot)

    def check(self) -> None:
        """Raises InternalError when a page is not what it was for this mm."""
        for hva, content in self.known.items():
            if self.mm.read(hva, PAGE_SIZE) != content:
                raise InternalError(f"{self.mm.name} sees another content at {hva:#x} than its own")


class Region(NamedTuple):
    """Guest memory: ``size`` bytes from guest physical address ``gpa``, which the host process has at ``hva``."""

    gpa: int
    hva: int
    size: int

    @property
    def end(self) -> int:
        """The first host address behind it."""
        return self.hva + self.size

    def page(self, gfn: int) -> int | None:
        """The host address of guest frame ``gfn``, None unless it is in here."""
        offset = (gfn << PAGE_SHIFT) - self.gpa
        return self.hva + offset if 0 <= offset < self.size else None


class World:
    """The state of a storm. Raises what the operations on ``machine`` raise."""

    def __init__(self, machine: Machine, choices: Choices) -> None:
        self.machine = machine
        self.mm = machine.mm
        self.host = machine.host
        self.kvm: GuestMmu = machine.secondary
        self.ram = Region(machine.board.ram_base, machine.ram, machine.memory_size)
        image = machine.image_memory
        slots = [] if image is None else image.slots
        self.files = [Region(slot.start, slot.hva, slot.end - slot.start) for slot in slots if slot.solid]
        """What the guest has of an image, without sparse files that it shares: those a storm would give blocks."""
        self.choose = choices.choose
        self.children: list[Child] = []
        self.held: list[int] = []
        """Frames that have a reference of ours."""
        self.guest: Kvm | None = None
        """A second VM on the same mm."""
        self.devices: Devices | None = None
        """Those of other kinds on the same mm."""
        self.monitor: Userfaultfd | None = None
        """Who has pages protected by userfaultfd."""
        self.lowered = 0
        """Operations under way that have taken rights or pages away for a moment: host accesses may fail."""
        self.swap_pages = min(machine.memory_size >> PAGE_SHIFT, 1 << 16)
        self.mm.swapon(self.swap_pages)
        self.thread = HostThread(self.mm, "storm")

    def end(self) -> None:
        """Gives back what the storm holds. Children are looked at for the last time. Raises InternalError."""
        self.thread.exit()
        if self.guest is not None:
            self.guest.destroy()
            self.guest = None
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None
        for pfn in self.held:
            self.mm.unpin_frame(pfn)
        self.held.clear()
        if self.devices is not None:
            self.devices.destroy()
            self.devices = None
        children, self.children = self.children, []
        try:
            for child in children:
                child.check()
        finally:
            for child in children:
                child.mm.exit()

    # ---- where

    def _region(self) -> Region:
        """RAM, or now and then a file of the image."""
        if self.files and self.choose(4, "file") == 0:
            return self.files[self.choose(len(self.files), "which")]
        return self.ram

    def _mapped_page(self, region: Region) -> int:
        """A page that is mapped, or any when none is."""
        first = region.hva >> PAGE_SHIFT
        count = region.size >> PAGE_SHIFT
        # Guests keep most of what they use close together: go to a place whose size is chosen, too.
        at = first + self.choose(min(count, 1 << 4 + self.choose(16, "spread")), "page")
        if self.choose(2, "end"):
            at = first + count - 1 - (at - first)
        for start, end in ((at, first + count), (first, at)):
            found = self.mm.pgd.next_present(start, end)
            if found >= 0:
                return found << PAGE_SHIFT
        return at << PAGE_SHIFT

    def page(self) -> int:
        """The host address of a page of RAM, most likely one that matters to the guest just now."""
        return self._page_of(self.ram)

    def any_page(self) -> int:
        """Likewise, of RAM or a file of the image."""
        return self._page_of(self._region())

    def _page_of(self, region: Region) -> int:
        where = self.choose(8, "where")
        vcpu = self.machine.vcpus[self.choose(len(self.machine.vcpus), "vcpu")]
        found: int | None = None
        if where < 3:
            found = region.page(vcpu.missed)
        elif where < 5:
            block = vcpu.engine.last_code
            found = None if block is None else region.page(block >> PAGE_SHIFT)
        return self._mapped_page(region) if found is None else found

    def target(self) -> tuple[int, int]:
        """Bytes ``[start, end)`` of RAM, or of a file of the image: a page, or some around it."""
        region = self._region()
        page = self._page_of(region)
        if self.choose(2, "shape") == 0:
            return page, page + PAGE_SIZE
        before = self.choose(MOST_PAGES // 2, "before")
        behind = self.choose(MOST_PAGES // 2, "behind") + 1
        return max(page - before * PAGE_SIZE, region.hva), min(page + behind * PAGE_SIZE, region.end)

    def huge(self) -> tuple[int, int]:
        """The place of a huge page in RAM: bytes ``[start, end)``, with a page that matters."""
        start = self.page() & -HPAGE_SIZE
        return max(start, self.ram.hva), min(start + HPAGE_SIZE, self.ram.end)

    def area(self) -> tuple[int, int]:
        """As :meth:`target`, but within one area of the mm. Raises MmError EBUSY while the page has been moved away."""
        start, end = self.target()
        found = self.mm.areas_in(start, end)
        if not found:
            raise MmError(errno.EBUSY, f"{start:#x} is away just now")
        return max(start, found[0].start), min(end, found[0].end)

    def frames(self, start: int, end: int) -> list[int]:
        """The arena frames that are mapped in ``[start, end)``, ascending by address."""
        found = dict.fromkeys(
            pte_pfn(entry)
            for _, entry in self.mm.pgd.entries(start >> PAGE_SHIFT, end >> PAGE_SHIFT)
            if entry & MAPPED and not entry & SPECIAL
        )
        return list(found)

    # ---- children

    @contextmanager
    def child(self) -> Iterator[Child]:
        """One of the children, which nobody else uses meanwhile: a process does not end in the middle of a system call.

        Raises MmError ECHILD when there is none.
        """
        if not self.children:
            raise MmError(errno.ECHILD, "no child of the storm is at rest")
        child = self.children.pop(self.choose(len(self.children), "child"))
        try:
            yield child
        finally:
            if not child.mm.dead:
                self.children.append(child)

    @contextmanager
    def adopted(self, child: Child) -> Iterator[None]:
        """A new child joins the others at the end of the context, whatever happens in it."""
        try:
            yield
        finally:
            self.children.append(child)

    def retire(self, child: Child) -> None:
        """A child, which is in use, ends; what it knew must have been right to the last. Raises InternalError."""
        try:
            child.check()
        finally:
            child.mm.exit()
