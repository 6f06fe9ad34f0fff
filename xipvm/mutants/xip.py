"""The bugs of mm/filemap_xip.c as it was in July 2008, B1 to B11, each of them a switch.

DAX has none of them; those that can be put into it at all are put into both forms.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from xipvm.actors import point
from xipvm.address import PAGE_SHIFT, PAGE_SIZE, page_up
from xipvm.errors import InternalError, MmError
from xipvm.mmu import remap_file_pages
from xipvm.mmu.file import FaultResult, VmFault
from xipvm.mmu.mm import Mm
from xipvm.mmu.pte import MAPPED, pte_pfn
from xipvm.mmu.rmap import PMD_SHIFT
from xipvm.mutants.mutant import mutant, replaced
from xipvm.xip.dax import DaxFile
from xipvm.xip.filemap import XipFile
from xipvm.xip.ram import RamInode
from xipvm.xip.sparse import sparse_page

if TYPE_CHECKING:
    from xipvm.mmu.vma import Vma
    from xipvm.xip.buffer import UserBuffer


@mutant("xip-read-takes-the-whole-length-for-each-page", "B1", "I18")
def read_takes_the_whole_length() -> Iterator[None]:
    """Each page of a read is cut to what was asked for in all, not to what is left of that."""

    def chunk(count: int, done: int, offset: int, left: int) -> int:
        return min(PAGE_SIZE - offset, count, left)

    with replaced(XipFile, "_chunk", staticmethod(chunk)):
        yield


@mutant("xip-read-of-nothing-in-a-hole-fails", "B2", "I18")
def read_of_nothing_fails() -> Iterator[None]:
    """A read of no bytes looks one page up, and says so when that is a hole."""
    read_pages = XipFile._read_pages

    def read(self: XipFile, buffer: UserBuffer, count: int, pos: int) -> tuple[int, int, MmError | None]:
        if not count and pos < self.size and self.inode.find(pos >> PAGE_SHIFT) is None:
            return 0, 0, MmError(errno.ENODATA, f"read of {self.name}")
        return read_pages(self, buffer, count, pos)

    with replaced(XipFile, "_read_pages", read):
        yield


@mutant("xip-hole-mapped-behind-its-filling", "B3", "I16", "AssertionError", protocol="2008")
def hole_mapped_behind_its_filling() -> Iterator[None]:
    """A fault that has found a hole maps the sparse page later, without looking again."""

    def look_again(self: XipFile, pgoff: int, found: int | None) -> int | None:
        return None if found is None else self.inode.find(pgoff)

    with replaced(XipFile, "_look_again", look_again):
        yield


@mutant("xip-nonlinear-areas-keep-the-hole", "B4", "I16", "AssertionError", protocol="2008")
def nonlinear_areas_keep_the_hole() -> Iterator[None]:
    """What remap_file_pages has mapped is not among the areas in which __xip_unmap looks."""
    nonlinear: WeakKeyDictionary[Mm, set[int]] = WeakKeyDictionary()
    remap = remap_file_pages.remap_file_pages
    unmap = XipFile._unmap_sparse

    def remapped(mm: Mm, addr: int, size: int, pgoff: int) -> None:
        remap(mm, addr, size, pgoff)
        nonlinear.setdefault(mm, set()).update(range(addr, addr + size, PAGE_SIZE))

    def unmapped(self: XipFile, area: Vma, hva: int, sparse: int) -> None:
        if hva not in nonlinear.get(area.mm, ()):
            unmap(self, area, hva, sparse)

    from xipvm.explore.scenarios import xip as scenarios

    with ExitStack() as stack:
        stack.enter_context(replaced(remap_file_pages, "remap_file_pages", remapped))
        stack.enter_context(replaced(scenarios, "remap_file_pages", remapped))
        stack.enter_context(replaced(XipFile, "_unmap_sparse", unmapped))
        yield


@mutant("xip-entries-looked-at-without-their-lock", "B5", "I16", protocol="2008")
def entries_looked_at_without_their_lock() -> Iterator[None]:
    """__xip_unmap takes an entry for empty that mprotect, which holds its lock, has cleared for a moment."""
    mprotect = Mm.mprotect

    def protected(self: Mm, addr: int, length: int, prot: int) -> None:
        sparse = sparse_page(self.host)
        held = {}
        for page in range(addr >> PAGE_SHIFT, (addr + length) >> PAGE_SHIFT):
            entry = self.pgd.get(page)
            if entry & MAPPED and pte_pfn(entry) == sparse:
                held[page] = entry
        if held:
            with self.ptl(addr >> PMD_SHIFT):
                for page in held:
                    self.pgd.set(page, 0)  # ptep_modify_prot_start
                point("mutant.modify_prot")
                for page, entry in held.items():
                    self.pgd.set(page, entry)
        mprotect(self, addr, length, prot)

    with replaced(Mm, "mprotect", protected), replaced(XipFile, "_settle", lambda self, area, hva: None):
        yield


@mutant("xip-io-error-is-out-of-memory", "B6", "AssertionError")
def io_error_is_out_of_memory() -> Iterator[None]:
    """Whatever the file system cannot do for a fault counts as a lack of memory."""
    fault = XipFile.fault

    def failing(self: XipFile, area: Vma, pgoff: int, write: bool) -> FaultResult:
        try:
            self.inode.find(pgoff)
        except MmError:
            return 0, VmFault.OOM
        return fault(self, area, pgoff, write)

    from xipvm.xip.dax import DaxFile

    dax_fault = DaxFile.fault

    def dax_failing(self: DaxFile, area: Vma, pgoff: int, write: bool) -> FaultResult:
        pfn, result = dax_fault(self, area, pgoff, write)
        return pfn, VmFault.OOM if result == VmFault.SIGBUS and pgoff < page_up(self.size) >> PAGE_SHIFT else result

    with (
        replaced(XipFile, "fault", failing),
        replaced(XipFile, "_failed", lambda self, pgoff, error: VmFault.OOM),
        replaced(DaxFile, "fault", dax_failing),
    ):
        yield


@mutant("xip-two-faults-on-a-page-are-a-bug", "B7", "InternalError", protocol="2008")
def two_faults_are_a_bug() -> Iterator[None]:
    """That an entry is there already when a fault comes to fill it counts as impossible (BUG_ON)."""
    insert = XipFile._insert

    def inserted(self: XipFile, area: Vma, hva: int, pfn: int | None, write: bool) -> VmFault:
        if area.mm.pgd.get(hva >> PAGE_SHIFT):
            raise InternalError("BUG: vm_insert_mixed says -EBUSY")
        return insert(self, area, hva, pfn, write)

    with replaced(XipFile, "_insert", inserted):
        yield


@mutant("xip-fault-does-not-see-truncation", "B8", "I4", "I5", "AssertionError", protocol="2008")
def fault_does_not_see_truncation() -> Iterator[None]:
    """A fault looks at size and block once, when it begins, and nothing keeps the file from being cut behind that."""

    def fault(self: XipFile, area: Vma, pgoff: int, write: bool) -> FaultResult:
        with area.mm.mmap_lock.read:
            result = self._fault(area, pgoff, write)
        return 0, self._thawed() if result is VmFault.RETRY else result

    with (
        replaced(XipFile, "fault", fault),
        replaced(XipFile, "_still_there", lambda self, pgoff: True),
        replaced(XipFile, "_look_again", lambda self, pgoff, found: self.inode.find(pgoff) if found is None else found),
    ):
        yield


@mutant("xip-two-create-a-block", "B9", "AssertionError")
def two_create_a_block() -> Iterator[None]:
    """Nothing keeps two who fill the same hole from each allocating a block: what one stored is lost."""

    def create(self: XipFile, pgoff: int) -> int:
        with nullcontext():
            return self.inode.get_xip_mem(pgoff, create=True)

    with replaced(XipFile, "_create", create), replaced(RamInode, "_found_meanwhile", lambda self, pgoff: False):
        yield


@mutant("xip-sparse-page-becomes-writable", "B10", "I17", protocol="2008")
def sparse_page_becomes_writable() -> Iterator[None]:
    """A store to a hole that is mapped shared, on what has turned read-only, makes the sparse page writable."""

    def page_mkwrite(self: XipFile, pgoff: int, pfn: int) -> VmFault:
        return VmFault.OK

    with replaced(XipFile, "page_mkwrite", page_mkwrite):
        yield


@mutant("xip-partial-copy-not-counted", "B11", "I18")
def partial_copy_not_counted() -> Iterator[None]:
    """Of a page that could be copied only in part, nothing counts."""

    def counted(copied: int, length: int) -> int:
        return copied if copied == length else 0

    with replaced(XipFile, "_counted", staticmethod(counted)):
        yield


@mutant("dax-blocks-freed-under-a-pin", "D6", "AssertionError", protocol="modern")
def blocks_freed_under_a_pin() -> Iterator[None]:
    """Truncation does not wait for who has a page of the file pinned, and writes to it."""
    with replaced(DaxFile, "_busy", lambda self, first, end: False):
        yield
