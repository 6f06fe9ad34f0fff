"""Faults of shadow paging: tables that are written unseen, and shadow entries that nobody finds."""

from __future__ import annotations

from collections.abc import Iterator

from xipvm.mmu.secondary.shadow import ShadowPaging
from xipvm.mmu.secondary.shadow_table import GfnTable, Root
from xipvm.mutants.mutant import mutant, replaced

_SEEN = ("I10", "AssertionError")


@mutant("shadow-table-not-protected", "S1", "AssertionError")
def shadow_table_not_protected() -> Iterator[None]:
    """A page of the guest's tables that entries are made of can be written like any other."""
    with replaced(ShadowPaging, "_watch", lambda self, gfn: None):
        yield


@mutant("shadow-unsync-not-synced", "S2", "AssertionError")
def shadow_unsync_not_synced() -> Iterator[None]:
    """The guest's flush instruction leaves the entries of tables that it has written as they are."""
    with replaced(ShadowPaging, "guest_flush", lambda self: None):
        yield


@mutant("shadow-sync-leaves-tlbs", "S2 (flush)", "AssertionError")
def shadow_sync_leaves_tlbs() -> Iterator[None]:
    """A table is watched again, but TLBs may still have it writable."""
    watch = ShadowPaging._watch

    def unflushed(self: ShadowPaging, gfn: int) -> None:
        dirty = self.tlbs_dirty
        watch(self, gfn)
        self.tlbs_dirty = dirty

    with replaced(ShadowPaging, "_watch", unflushed):
        yield


@mutant("shadow-rmap-forgets-the-second", "M22", *_SEEN)
def shadow_rmap_forgets_the_second() -> Iterator[None]:
    """The reverse map has one virtual address of a guest frame, and no others."""
    link = GfnTable.link

    def first_only(self: GfnTable, root: Root, index: int, gfn: int) -> None:
        if gfn not in self.rmap:
            link(self, root, index, gfn)

    with replaced(GfnTable, "link", first_only):
        yield


@mutant("shadow-roots-not-obsolete", "17 (roots)", *_SEEN)
def shadow_roots_not_obsolete() -> Iterator[None]:
    """A memslot goes, and vCPUs go on with the roots that they had."""
    with replaced(ShadowPaging, "_obsolete_roots", lambda self: None):
        yield


@mutant("shadow-tables-not-read-again", "S3", "AssertionError")
def shadow_tables_not_read_again() -> Iterator[None]:
    """A fault does not look whether the guest's tables are what it has read, once they are watched."""
    with replaced(ShadowPaging, "_unchanged", lambda self, walk: True):
        yield
