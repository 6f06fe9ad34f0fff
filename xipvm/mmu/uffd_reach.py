"""How far a userfaultfd reaches: what becomes of a registered area when the address space changes, and who is told.

=============  ==================  ========================================================================
operation      feature             with it, and without
=============  ==================  ========================================================================
fork           EVENT_FORK          the child's area has a userfaultfd of its own; it has none
mremap, moved  EVENT_REMAP         the moved area stays registered; it is not, and nothing in it is protected
munmap         EVENT_UNMAP         told, once for the whole range; nobody is told
madvise        EVENT_REMOVE        told before DONTNEED, FREE and REMOVE; nobody is told
=============  ==================  ========================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from xipvm.mmu.uffd_message import UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UffdMsg
from xipvm.mmu.vma import VM_UFFD, Vma

if TYPE_CHECKING:
    from xipvm.mmu.userfaultfd import Userfaultfd

UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6


def inherit(area: Vma, twin: Vma, heirs: dict[Userfaultfd, Userfaultfd]) -> None:
    """``twin`` is ``area``, which is registered, in a forked mm. ``heirs``: the child's userfaultfds so far."""
    uffd = area.uffd
    assert uffd is not None
    if not uffd.features & UFFD_FEATURE_EVENT_FORK:
        _leave(twin)
        return
    if uffd not in heirs:
        heirs[uffd] = uffd.child_of(twin.mm)
    twin.uffd = heirs[uffd]


def move_along(area: Vma, new: Vma, start: int, length: int) -> None:
    """``length`` bytes of ``area``, which is registered, from ``start`` on move to ``new``."""
    uffd = area.uffd
    assert uffd is not None
    if not uffd.features & UFFD_FEATURE_EVENT_REMAP:
        _leave(new)
        return
    new.uffd = uffd
    area.mm.uffd_reports.add(uffd, UffdMsg(UFFD_EVENT_REMAP, new.start, start=start, end=start + length))


def _leave(area: Vma) -> None:
    area.flags &= ~VM_UFFD
    area.set_prot(area.prot)


def unmapping(area: Vma, start: int, end: int) -> None:
    """``area``, which is registered, goes, with everything in ``[start, end)``."""
    uffd = area.uffd
    assert uffd is not None
    if uffd.features & UFFD_FEATURE_EVENT_UNMAP:
        area.mm.uffd_reports.add(uffd, UffdMsg(UFFD_EVENT_UNMAP, start=start, end=end))


def removing(pieces: list[tuple[Vma, int, int]]) -> None:
    """The content of each piece is about to go. No lock is held; everything has to be looked at again afterwards."""
    told = [(area.uffd, start, end) for area, start, end in pieces if area.uffd is not None]
    for uffd, start, end in told:
        if uffd.features & UFFD_FEATURE_EVENT_REMOVE:
            uffd.mm.uffd_reports.tell(uffd, UffdMsg(UFFD_EVENT_REMOVE, start=start, end=end))
