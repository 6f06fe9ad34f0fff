"""Shadow entries: what their bits say."""

from __future__ import annotations

import pytest

from xipvm.address import Gfn, Pfn
from xipvm.mmu.secondary import spte as s


def make_spte(pfn: Pfn, writable: bool) -> int:
    """The present entry for ``pfn``."""
    return pfn << s.PFN_SHIFT | (s.SPTE_WRITABLE if writable else s.SPTE_READ_ONLY)


@pytest.mark.parametrize(("writable", "rights"), [(False, "rx"), (True, "rwx")])
@pytest.mark.parametrize("pfn", [0, 1, (1 << 40) - 1])
def test_present_entries(pfn: int, writable: bool, rights: str) -> None:
    entry = make_spte(Pfn(pfn), writable)
    assert s.spte_pfn(entry) == pfn
    assert s.spte_rights(entry) == rights
    assert entry & s.SPTE_PRESENT
    assert not entry & s.SPTE_MMIO
    assert bool(entry & s.SPTE_HOST_WRITABLE) == bool(entry & s.SPTE_MMU_WRITABLE) == writable
    assert entry < 1 << 64


def test_mmio_entries_give_no_right_and_are_not_present() -> None:
    entry = s.make_mmio_spte(Gfn(0x9000))
    assert s.spte_rights(entry) == ""
    assert entry == s.SPTE_MMIO | 0x9000 << 12


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (0, "none"),
        (s.make_mmio_spte(Gfn(9)), "mmio"),
        (make_spte(Pfn(0x1A), False), "pfn 0x1a rx accessed"),
        (make_spte(Pfn(0x1A), True), "pfn 0x1a rwx accessed dirty"),
        (s.SPTE_READ, "not present (0x1)"),
    ],
)
def test_description(entry: int, text: str) -> None:
    assert s.describe_spte(entry) == text
