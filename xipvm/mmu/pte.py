"""Bits of a primary page-table entry; pte.pxd has the same numbers for native code.

An entry is empty (0), mapped (``PRESENT``), mapped without any access (``PROTNONE``: PROT_NONE over a page that stays),
or it maps nothing and says why:

=========  ====================  ======================================================================================
marker     ``GUARD``, alone      nothing will be mapped here
marker     ``UFFD_WP``, alone    what will be mapped here is protected as if it had been all the time (uffd_wp.py)
marker     ``POISON``, alone     every access is a SIGBUS
swap       ``SWAP``              a slot in place of the pfn (swap.py); EXCLUSIVE, SOFT_DIRTY and UFFD_WP as they were
device     ``SWAP | DEVICE``     a page that the CPU must not touch (device_private.py): of a device's memory, or with
                                 ``DEVICE_EXCLUSIVE`` a frame that a device is alone with; WRITE as it was, too
migration  ``MIGRATION``         the pfn of the page that is being moved (migrate.py); flags as they were but MAPPED.
                                 It counts neither as a mapping nor as a reference: the mover has one
=========  ====================  ======================================================================================

Where entries may map nothing, ask for MAPPED before anything else. ``ANON`` and ``EXCLUSIVE`` are the page's facts as
the entry sees them: EXCLUSIVE says that this is the only entry that maps the anonymous page, so it may be written in
place.
"""

from __future__ import annotations

from typing import Final

PRESENT: Final = 1 << 0
WRITE: Final = 1 << 1
EXEC: Final = 1 << 2
SPECIAL: Final = 1 << 3
"""The zero page or a device frame: neither refcount nor mapcount."""
PROTNONE: Final = 1 << 4
"""In place of PRESENT: the page is kept, nobody may touch it."""
ACCESSED: Final = 1 << 5
DIRTY: Final = 1 << 6
HUGE: Final = 1 << 7
SOFT_DIRTY: Final = 1 << 8
ANON: Final = 1 << 9
EXCLUSIVE: Final = 1 << 10
GUARD: Final = 1 << 11
"""Alone in an entry: nothing is mapped, and nothing will be (MADV_GUARD_INSTALL)."""

SWAP: Final = 1 << 52
MIGRATION: Final = 1 << 53
UFFD_WP: Final = 1 << 54
"""Write-protected by userfaultfd (uffd_wp.py): never together with WRITE."""
POISON: Final = 1 << 55
"""Alone in an entry: whoever looks gets a SIGBUS (UFFDIO_POISON)."""

DEVICE: Final = 1 << 51
"""With SWAP: not a swap slot, which are numbers below it. In a frame number: a page of a device's own memory."""
DEVICE_EXCLUSIVE: Final = 1 << 50
"""With DEVICE: the frame is the host's."""

MAPPED: Final = PRESENT | PROTNONE
FLAGS: Final = 0xFFF

PFN_SHIFT: Final = 12
PFN_MASK: Final = 0x000F_FFFF_FFFF_F000


def pte_pfn(entry: int) -> int:
    """The frame that a mapped entry names."""
    return (entry & PFN_MASK) >> PFN_SHIFT


def is_marker(entry: int) -> bool:
    """Nothing is mapped, and nothing is named: the entry only says what is to become of the next access."""
    return entry in (GUARD, UFFD_WP, POISON)


def describe(entry: int) -> str:
    """An entry in words, for errors: ``0x12 rw- anon exclusive``."""
    if not entry:
        return "empty"
    if entry & GUARD:
        return "guard"
    if entry == POISON:
        return "poison"
    if entry == UFFD_WP:
        return "write-protected hole"
    if entry & SWAP and entry & DEVICE:
        return f"device {'exclusive' if entry & DEVICE_EXCLUSIVE else 'private'} {pte_pfn(entry):#x}"
    if entry & (SWAP | MIGRATION):
        return f"{'swap' if entry & SWAP else 'migration'} {pte_pfn(entry):#x}"
    rights = "".join(letter if entry & bit else "-" for letter, bit in (("r", PRESENT), ("w", WRITE), ("x", EXEC)))
    names = (
        ("protnone", PROTNONE),
        ("special", SPECIAL),
        ("anon", ANON),
        ("exclusive", EXCLUSIVE),
        ("dirty", DIRTY),
        ("uffd-wp", UFFD_WP),
    )
    return " ".join([f"{pte_pfn(entry):#x}", rights, *(name for name, bit in names if entry & bit)])
