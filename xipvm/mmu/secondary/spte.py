"""Shadow page-table entries: their bits, and what they say.

An entry maps one gfn. It is 0 (nothing known), *present* (``SPTE_PRESENT``, the frame in bits 12..51, rights in bits
0..2), or *MMIO* (``SPTE_MMIO``, the gfn in bits 12..38, the memslots' generation in bits 39..57: there was no memslot
then, and a device answers). Present and MMIO are never set together. The native walker reads the same numbers.

The walker does not set ``SPTE_ACCESSED``. So a present entry has it from its installation on, and loses it together
with all rights when the page is aged: it is *old* then, and access-tracked, as KVM's are where hardware has no accessed
bit. R and X are saved in bits 54 and 56, W is not: who writes next has to say so. The next access misses and gets them
back (:func:`fast_restored`). Its frame is still named, and it is still removed by an invalidation, with the flush that
this means.

``SPTE_HOST_WRITABLE`` says that the host's entry was writable when this one was made and never changes while it lives.
``SPTE_MMU_WRITABLE`` says that the secondary MMU itself allows writing. W without both of them is a defect. What stands
in (Host, MMU, W):

    1 1 1   writable
    1 1 0   protected, for the dirty log or because it is old: a fault may give W back without mmu_lock
    1 0 0   protected for good, because the page is watched (a guest's page table): no fault may
    0 0 0   the host may only read
"""

from __future__ import annotations

from xipvm.address import Gfn, Pfn

SPTE_READ = 1 << 0
SPTE_WRITE = 1 << 1
SPTE_EXEC = 1 << 2
SPTE_ACCESSED = 1 << 5
SPTE_DIRTY = 1 << 6
SPTE_HUGE = 1 << 7
SPTE_HOST_WRITABLE = 1 << 9
SPTE_MMU_WRITABLE = 1 << 10
SPTE_PRESENT = 1 << 11
SPTE_SAVED_READ = 1 << 54
SPTE_SAVED_EXEC = 1 << 56
SPTE_MMIO = 1 << 62

PFN_SHIFT = 12
PFN_MASK = ((1 << 40) - 1) << PFN_SHIFT
SAVED_SHIFT = 54

MMIO_GEN_SHIFT = 39
MMIO_GEN_BITS = 19
MMIO_GEN_MASK = (1 << MMIO_GEN_BITS) - 1
NO_MMIO_GENERATION = MMIO_GEN_MASK + 1
"""No entry has it: while memslots change, none is trusted."""

# What a fault installs. Executing needs no right of the VMA: KVM asks for none, and the guest has no VMAs.
SPTE_READ_ONLY = SPTE_PRESENT | SPTE_READ | SPTE_EXEC | SPTE_ACCESSED
SPTE_WRITABLE = SPTE_READ_ONLY | SPTE_WRITE | SPTE_DIRTY | SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE

SPTE_AGED = SPTE_ACCESSED | SPTE_READ | SPTE_WRITE | SPTE_EXEC
"""What ageing takes."""
SPTE_SAVED = SPTE_SAVED_READ | SPTE_SAVED_EXEC
"""What it leaves for the next access."""

_RIGHTS = tuple(
    "".join(letter for bit, letter in ((SPTE_READ, "r"), (SPTE_WRITE, "w"), (SPTE_EXEC, "x")) if value & bit)
    for value in range(8)
)


def make_mmio_spte(gfn: Gfn, generation: int = 0) -> int:
    """The entry that sends accesses of ``gfn`` to the device bus, as of ``generation`` of the memslots."""
    return SPTE_MMIO | gfn << PFN_SHIFT | (generation & MMIO_GEN_MASK) << MMIO_GEN_SHIFT


def mmio_generation(spte: int) -> int:
    """The generation of an MMIO entry."""
    return spte >> MMIO_GEN_SHIFT & MMIO_GEN_MASK


def fast_restored(spte: int, right: int, *, small_writes: bool) -> int:
    """A present entry with the right that an access needs, 0 where mmu_lock is needed for that.

    The same entry: it has the right already. ``small_writes``: a huge entry does not become writable.
    """
    if spte & right:
        return spte
    restored = spte
    if not spte & SPTE_ACCESSED:
        restored = spte & ~SPTE_SAVED | spte >> SAVED_SHIFT & (SPTE_READ | SPTE_EXEC) | SPTE_ACCESSED
    if right == SPTE_WRITE:
        if not spte & SPTE_MMU_WRITABLE or (small_writes and spte & SPTE_HUGE):
            return 0
        restored |= SPTE_WRITE
    return restored if restored & right else 0


def spte_pfn(spte: int) -> Pfn:
    """The frame of a present entry."""
    return Pfn((spte & PFN_MASK) >> PFN_SHIFT)


def spte_rights(spte: int) -> str:
    """The letters of the rights that a present entry gives, ``rx`` or ``rwx``; empty when it is not present."""
    return _RIGHTS[spte & 7] if spte & SPTE_PRESENT else ""


def describe_spte(spte: int) -> str:
    """One phrase for a person: ``none``, ``mmio``, ``pfn 0x1a rwx dirty``, or ``pfn 0x1a old``."""
    if spte & SPTE_MMIO:
        return "mmio"
    if not spte & SPTE_PRESENT:
        return "none" if not spte else f"not present ({spte:#x})"
    flags = [
        name for bit, name in ((SPTE_ACCESSED, "accessed"), (SPTE_DIRTY, "dirty"), (SPTE_HUGE, "huge")) if spte & bit
    ]
    return " ".join([f"pfn {spte_pfn(spte):#x}", spte_rights(spte) or "old", *flags])
