"""The recorded scenarios on shadow paging: as they were recorded, and by two virtual addresses for every page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xipvm.address import PAGE_SHIFT
from xipvm.conform import report, world
from xipvm.conform.guest import Access, Vcpu
from xipvm.conform.report import PASS, replay
from xipvm.conform.scenario import find, load
from xipvm.mmu.secondary import at_rest
from xipvm.mmu.secondary.base import READ, RETRY_WALK
from xipvm.mmu.secondary.guest_walk import GuestWalk, ReadEntry
from xipvm.mmu.secondary.shadow import KvmShadow, ShadowPaging
from xipvm.mmu.secondary.spte import SPTE_PRESENT, spte_pfn

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [Path(path).stem for path in find([str(GOLDEN)])]
ALIAS = 1 << 34
ROLE = (1, 0, 0, 1, 0)


class Identity:
    """The guest's tables: each page at its own address, and at one further up. They are nowhere in memory."""

    def walk_guest(self, gva: int, access: int, read: ReadEntry) -> GuestWalk:
        return GuestWalk(gpa=gva % ALIAS, rights=7, entries=[(0, 0)])

    def sends_to_device(self, gfn: int, access: int) -> bool:
        return False


@pytest.fixture
def accesses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was compared: guest frames."""
    compared: list[int] = []
    vms: list[KvmShadow] = []
    access, execute = Vcpu._until_done, report.execute

    def made(*arguments: Any, **named: Any) -> KvmShadow:
        vms.append(KvmShadow(*arguments, **named))
        return vms[-1]

    def accessed(self: Vcpu, gfn: int, value: int | None) -> Access:
        done = access(self, gfn, value)
        if done.exit == "ok":
            compared.append(gfn)
            wanted = done.value if value is None else value
            if self.kvm.max_level == 1:  # shadow entries are small, and made of small ones
                for gva in (gfn << PAGE_SHIFT, ALIAS | gfn << PAGE_SHIFT):
                    assert by_address(self, gva) == wanted
        return done

    def executed(*arguments: Any) -> Any:
        result = execute(*arguments)
        assert [at_rest.difference(kvm) for kvm in vms] == [""] * len(vms)
        return result

    monkeypatch.setattr(world, "Kvm", made)
    monkeypatch.setattr(Vcpu, "_until_done", accessed)
    monkeypatch.setattr(report, "execute", executed)
    monkeypatch.setattr(ShadowPaging, "_watch_tables", lambda self, root, walk, index: None)
    monkeypatch.setattr(ShadowPaging, "_unchanged", lambda self, walk: True)
    return compared


def by_address(vcpu: Vcpu, gva: int) -> int:
    """What the guest reads at ``gva``, by the root's own entry."""
    kvm = vcpu.kvm
    assert isinstance(kvm, KvmShadow)
    assert kvm.roots is not None
    for _ in range(2):
        spte = kvm.roots[ROLE][0].get(gva >> PAGE_SHIFT) if ROLE in kvm.roots else 0
        if spte & SPTE_PRESENT:
            return int.from_bytes(vcpu.host.read(spte_pfn(spte), 0, 8), "little")
        assert kvm.fault_gva(Identity(), ROLE, gva, READ) == RETRY_WALK
    raise AssertionError(f"no entry for {gva:#x}")


@pytest.mark.parametrize("name", NAMES)
def test_by_every_address_it_is_what_was_recorded(name: str, accesses: list[int]) -> None:
    found = replay(load(str(GOLDEN / f"{name}.json")))
    assert found.verdict == PASS, [str(difference) for step in found.steps for difference in step.differences]
    assert accesses or name in ("munmap_never_populated", "munmap_guest_untouched")
