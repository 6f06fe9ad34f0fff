"""The recorded scenarios with a GRU and an SVA device beside KVM.

What the guest sees they see, at rest their view is the host's, and they change nothing of what was recorded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xipvm.address import Gfn
from xipvm.conform import report, world
from xipvm.conform.guest import Access, Vcpu
from xipvm.conform.report import PASS, replay
from xipvm.conform.scenario import find, load
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.secondary import at_rest
from xipvm.mmu.secondary.gru import Gru
from xipvm.mmu.secondary.memslot import MEM_LOG_DIRTY_PAGES
from xipvm.mmu.secondary.sva import Sva

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [Path(path).stem for path in find([str(GOLDEN)])]


class Beside:
    """A GRU with the memslots of a VM, and a device on the process's page table."""

    def __init__(self, vm: world.Vm, host: world.World) -> None:
        self.kvm = vm.kvm
        self.gru = Gru.of(host.mm)
        self.sva = Sva(host.mm)
        self.user = ScriptedVcpu(self.gru.port(0), host.host, host.trace, 100)
        self.gru.vcpus.append(self.user)
        self.accesses = 0
        set_memslot, delete_memslot = self.kvm.set_memslot, self.kvm.delete_memslot

        def set_both(slot: int, gfn: int, pages: int, hva: int, flags: int = 0) -> None:
            set_memslot(slot, gfn, pages, hva, flags)
            self.gru.set_memslot(slot, gfn, pages, hva, flags & ~MEM_LOG_DIRTY_PAGES)

        def delete_both(slot: int) -> None:
            delete_memslot(slot)
            self.gru.delete_memslot(slot)

        self.kvm.set_memslot, self.kvm.delete_memslot = set_both, delete_both  # type: ignore[method-assign]

    def access(self, gfn: int, value: int | None, found: int | None) -> None:
        slot = self.kvm.memslots.find(gfn)
        assert slot is not None
        hva = slot.hva_of(Gfn(gfn))
        self.accesses += 1
        if value is not None:
            self.user.store(gfn, value.to_bytes(8, "little"))
            self.sva.store(hva, value.to_bytes(8, "little"))
            found = value
        assert int.from_bytes(self.user.load(gfn), "little") == found
        assert int.from_bytes(self.sva.load(hva, 8), "little") == found

    def check(self) -> None:
        assert [at_rest.difference(mmu) for mmu in (self.gru, self.sva)] == ["", ""]
        assert self.gru.range_active == 0


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[Beside]:
    found: list[Beside] = []
    make, close, access, execute = world.Vm.__init__, world.Vm.close, Vcpu._until_done, report.execute

    def made(self: world.Vm, host: world.World, *arguments: Any, **named: Any) -> None:
        make(self, host, *arguments, **named)
        if not found:
            found.append(Beside(self, host))

    def closed(self: world.Vm) -> None:
        if found and found[0].kvm is self.kvm:
            found[0].gru.destroy()
            found[0].sva.destroy()
        close(self)

    def accessed(self: Vcpu, gfn: int, value: int | None) -> Access:
        done = access(self, gfn, value)
        if done.exit == "ok" and found and found[0].kvm is self.kvm:
            found[0].access(gfn, value, done.value)
        return done

    def executed(*arguments: Any) -> Any:
        result = execute(*arguments)
        for each in found:
            each.check()
        return result

    monkeypatch.setattr(world.Vm, "__init__", made)
    monkeypatch.setattr(world.Vm, "close", closed)
    monkeypatch.setattr(Vcpu, "_until_done", accessed)
    monkeypatch.setattr(report, "execute", executed)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_view_is_the_host_s(name: str, beside: list[Beside]) -> None:
    found = replay(load(str(GOLDEN / f"{name}.json")))
    assert found.verdict == PASS, [str(difference) for step in found.steps for difference in step.differences]
    assert beside[0].accesses or name in ("munmap_never_populated", "munmap_guest_untouched")
