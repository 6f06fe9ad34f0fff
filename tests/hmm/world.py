"""A host with an mm and devices that mirror it; everything is judged by the oracle, and counted at the end."""

from __future__ import annotations

from typing import Any

from xipvm.address import PAGE_SIZE
from xipvm.check import Oracle
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.dmirror import Dmirror
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace

RW = PROT_READ | PROT_WRITE


class World:
    """What the tests have. ``coherent``: what kind of memory the devices have."""

    def __init__(self, coherent: bool = False) -> None:
        self.trace = Trace()
        self.oracle = Oracle()
        self.trace.attach(self.oracle)
        self.host = HostMemory(16 << 20, poison="frame")
        self.mm = Mm(self.host, self.trace)
        self.coherent = coherent
        self.devices: list[Dmirror] = []
        self.children: list[Mm] = []

    def device(self, mm: Mm | None = None, **how: Any) -> Dmirror:
        made = Dmirror(mm or self.mm, name=f"dmirror{len(self.devices)}", coherent=self.coherent, **how)
        self.devices.append(made)
        return made

    def fork(self) -> Mm:
        child = self.mm.fork()
        self.children.append(child)
        return child

    def map(self, pages: int, prot: int = RW, flags: int = MAP_PRIVATE | MAP_ANONYMOUS, **how: Any) -> int:
        return self.mm.mmap(pages * PAGE_SIZE, prot, flags, **how)

    def end(self) -> None:
        verify(self.host)
        for device in reversed(self.devices):
            device.destroy()
        for child in self.children:
            child.exit()
        self.mm.exit()
        verify(self.host)
        self.oracle.finish()
        assert self.oracle.violations == [], "\n".join(violation.render() for violation in self.oracle.violations)
        self.host.close()


def words(first: int, count: int, step: int = 1) -> bytes:
    """32-bit numbers that count up, or down."""
    return b"".join(((first + step * at) & 0xFFFF_FFFF).to_bytes(4, "little") for at in range(count))
