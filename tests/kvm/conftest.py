"""A world of one host mm, VMs on it and vCPUs that remember what they were told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from xipvm.actors import on_point
from xipvm.locks import nothing_held
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.base import FAULT, MMIO, READ, RETRY_WALK, WRITE
from xipvm.mmu.secondary.kvm import KvmBase
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.trace import Event, Trace

PAGE = 4096
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
RW = PROT_READ | PROT_WRITE
MADV_DONTNEED = 4


class Vcpu:
    """Keeps every translation that it was given until it is flushed, as a TLB may."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log
        self.tlb: dict[int, tuple[int, bool]] = {}

    def flush_tlb(self, reason: str) -> None:
        self.log.append(f"{self.name} flush {reason}")
        self.tlb.clear()

    def kick(self, reason: str) -> None:
        self.log.append(f"{self.name} kick {reason}")


class World:
    """``log`` gets the kinds of trace events that ``watch`` names, and what vCPUs are told, in order."""

    def __init__(self, *, pin_sptes: bool = False, protocol: str = "modern") -> None:
        self.trace = Trace()
        self.host = HostMemory(16 << 20, poison="frame")
        self.mm = Mm(self.host, self.trace, protocol=protocol)
        self.pin_sptes = pin_sptes
        self.log: list[str] = []
        self.events: list[Event] = []
        self.vms: list[KvmBase] = []
        self.kvm = self.add_vm("vm0")
        self.vcpu = self.add_vcpu(self.kvm, "vcpu0")

    def add_vm(self, name: str) -> KvmBase:
        vm = kvm_of(self.mm, self.trace, self.host, name=name, pin_sptes=self.pin_sptes)
        self.vms.append(vm)
        return vm

    def add_vcpu(self, vm: KvmBase, name: str) -> Vcpu:
        vcpu = Vcpu(name, self.log)
        vm.vcpus.append(vcpu)
        return vcpu

    def ram(self, pages: int, prot: int = RW) -> int:
        """Anonymous memory of the host."""
        return self.mm.mmap(pages * PAGE, prot)

    def slot(self, pages: int, gfn: int = 0, *, slot: int = 0, flags: int = 0, vm: KvmBase | None = None) -> int:
        """A memslot with anonymous memory behind it; its hva."""
        hva = self.ram(pages)
        (vm or self.kvm).set_memslot(slot, gfn, pages, hva, flags)
        return hva

    def drop(self, hva: int, pages: int = 1) -> None:
        self.mm.madvise(hva, pages * PAGE, MADV_DONTNEED)

    def access(self, gfn: int, access: int, vm: KvmBase | None = None) -> int | str:
        """What a walker does: the frame that it ends up with, or "mmio" or "fault"."""
        vm = vm or self.kvm
        for _ in range(100):
            mapped = vm.translate(gfn)
            if mapped is not None and (mapped[1] or access != WRITE):
                for vcpu in vm.vcpus:
                    vcpu.tlb[gfn] = mapped
                return mapped[0]
            result = vm.fault(gfn, access)
            if result != RETRY_WALK:
                return {MMIO: "mmio", FAULT: "fault"}[result]
        raise AssertionError(f"access to gfn {gfn:#x} was retried for ever")

    def read(self, gfn: int, size: int = 8, vm: KvmBase | None = None) -> bytes:
        pfn = self.access(gfn, READ, vm)
        assert isinstance(pfn, int), pfn
        return self.host.read(pfn, 0, size)

    def write(self, gfn: int, data: bytes, vm: KvmBase | None = None) -> None:
        pfn = self.access(gfn, WRITE, vm)
        assert isinstance(pfn, int), pfn
        self.host.write(pfn, 0, data)

    @contextmanager
    def watching(self, *kinds: str) -> Iterator[list[str]]:
        """Trace events of ``kinds`` go into the log; ``events`` gets all."""

        def sink(event: Event) -> None:
            self.events.append(event)
            if event.kind in kinds:
                self.log.append(event.kind)

        del self.log[:], self.events[:]
        self.trace.attach(sink)
        try:
            yield self.log
        finally:
            self.trace.detach(sink)

    def retries(self) -> list[tuple[int, str]]:
        """(gfn, reason) of the faults that were given up while watching."""
        return [(e.fields["gfn"], e.fields["reason"]) for e in self.events if e.kind == "kvm_retry"]

    def fault_with(self, label: str, action: Callable[[], object], gfn: int, access: int = READ) -> int:
        """One fault during which ``action`` runs, once, at the point ``label``."""
        pending = [action]

        def hook(at: str) -> None:
            if at == label and pending:
                pending.pop()()

        with on_point(hook):
            result = self.kvm.fault(gfn, access)
        assert not pending, f"the fault did not pass {label}"
        return result


@pytest.fixture(autouse=True)
def _checked_locks(checked_locks: None) -> Iterator[None]:
    """In all tests here, which leave no lock behind."""
    yield
    nothing_held("at the end of the test")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_world() -> type[World]:
    return World
