"""Files of an image as guest memory: a guest executed in place out of a file system, and files mapped beside it.

A page of the guest's flash segments is the page of its file, mapped privately: what the guest stores there is its own,
and the image stays as it is. That takes segments whose place in the file and in memory agree modulo 4 KiB; the pages of
others are copied to memory of the host, and counted as such. The flash banks that the guest would have been programmed
into are not there then: this memory takes no commands.

A file that is mapped (``PATH@ADDRESS``) is memory of the guest, page by page as far as the file goes; with
``shared=on`` its stores are the file's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xipvm.address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Gfn, page_up
from xipvm.errors import BadInput, MmError, XipImageError
from xipvm.loader.elf import ElfImage
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED, PROT_EXEC, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.xip.open_file import OpenFile
from xipvm.xip.volume import Volume, naming, open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from xipvm.image_option import FileMapping, ImageChoice
    from xipvm.loader.place import Placement
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.secondary.guest import GuestMmu
    from xipvm.xip.filemap import XipFile

FIRST_SLOT = 1 << 10
"""Memslots of lower numbers are flash's and RAM's."""
_LARGEST_GUEST = 1 << 30
_ALL = PROT_READ | PROT_WRITE | PROT_EXEC
_ZERO = bytes(PAGE_SIZE)


class MappedFile(NamedTuple):
    """A memslot: guest physical bytes ``[start, end)``, which the host process has at ``hva``."""

    start: int
    end: int
    hva: int
    file: XipFile | None
    """What is mapped there; None for pages that were copied."""
    pgoff: int
    """The page of ``file`` that is the first one."""
    shared: bool
    """The guest's stores are the file's."""

    @property
    def pages(self) -> int:
        """How many there are."""
        return (self.end - self.start) >> PAGE_SHIFT

    @property
    def solid(self) -> bool:
        """No store needs a block of the file system: the file gets none of them, or has no holes."""
        if self.file is None or not self.shared:
            return True
        inode = self.file.inode
        return all(inode.find(self.pgoff + page) is not None for page in range(self.pages))


def open_guest(choice: ImageChoice, guest: str) -> ElfImage:
    """The ELF that is the file ``guest`` of an image. Raises XipImageError and GuestImageError."""
    host = HostMemory(1 << 20)
    try:
        with open_volume(host, choice.path, read_only=True) as volume:
            file = OpenFile(_open(volume, host, Trace(), guest))
            if file.file.size > _LARGEST_GUEST:
                raise XipImageError(choice.path, f"{guest} is no guest: it has {file.file.size} bytes")
            return ElfImage(file.get(file.file.size), f"{choice.path}:{guest}")
    except MmError as error:
        raise XipImageError(choice.path, str(error)) from None
    finally:
        host.close()


def banks_replaced(placement: Placement | None) -> set[str]:
    """The flash banks that a guest would be programmed into, and in whose place it is mapped."""
    return set() if placement is None else {piece.where for piece in placement.pieces} - {"ram"}


class ImageMemory:
    """What of the image is guest memory. ``in_place`` and ``copied`` count the guest's own pages."""

    def __init__(
        self, choice: ImageChoice, mappings: Sequence[FileMapping], host: HostMemory, trace: Trace, protocol: str
    ) -> None:
        """Opens the image: to write only if a file is mapped shared. Raises XipImageError."""
        self.choice = choice
        self.mappings = mappings
        self.host = host
        self.trace = trace
        self.protocol = protocol
        read_only = choice.readonly or not any(mapping.shared for mapping in mappings)
        self.volume: Volume = open_volume(host, choice.path, read_only=read_only, snapshot=choice.snapshot)
        self.in_place = self.copied = 0
        self.slots: list[MappedFile] = []

    def close(self) -> None:
        """Put the image away; nothing maps it any more."""
        self.volume.close()

    def connect(
        self,
        mm: Mm,
        secondary: GuestMmu,
        guest: str | None,
        placement: Placement | None,
        taken: Sequence[tuple[int, int, str]],
    ) -> None:
        """Maps everything into ``mm``, and there into the guest, beside what is ``taken``: (first byte, end, by what).

        Raises XipImageError, and BadInput for a mapping that is in the way of something.
        """
        try:
            if guest is not None and placement is not None:
                file = _open(self.volume, self.host, self.trace, guest, self.protocol)
                self._map_guest(mm, secondary, file, placement)
            for mapping in self.mappings:
                self._map_file(mm, secondary, mapping, taken)
        except MmError as error:
            raise XipImageError(self.choice.path, str(error)) from None

    def read(self, mm: Mm, gpa: int, size: int) -> bytes | None:
        """Bytes at ``gpa`` as the guest reads them, None where this is not all of that memory."""
        for slot in self.slots:
            if slot.start <= gpa and gpa + size <= slot.end:
                return mm.read(slot.hva + gpa - slot.start, size)
        return None

    def contents(self, mm: Mm) -> Iterator[tuple[int, bytes]]:
        """(gpa, bytes) of every page that is not all zero. What nobody has mapped is read, and stays unmapped."""
        for slot in self.slots:
            for page in range(slot.pages):
                content = self._page(mm, slot, page)
                if content != _ZERO:
                    yield slot.start + (page << PAGE_SHIFT), content

    def _page(self, mm: Mm, slot: MappedFile, page: int) -> bytes:
        hva = slot.hva + (page << PAGE_SHIFT)
        if mm.pgd.pte(hva >> PAGE_SHIFT):
            return mm.read(hva, PAGE_SIZE)
        pfn = None if slot.file is None else slot.file.inode.find(slot.pgoff + page)
        return _ZERO if pfn is None else self.host.read(pfn, 0, PAGE_SIZE)

    def _map_guest(self, mm: Mm, secondary: GuestMmu, file: XipFile, placement: Placement) -> None:
        wanted: dict[int, int | None] = {}
        for piece in placement.pieces:
            if piece.where == "ram":
                continue
            page = piece.address >> PAGE_SHIFT
            aligned = (piece.offset - piece.address) % PAGE_SIZE == 0
            for n in range((page_up(piece.address + piece.size) >> PAGE_SHIFT) - page):
                pgoff = (piece.offset >> PAGE_SHIFT) + n if aligned else None
                if wanted.setdefault(page + n, pgoff) != pgoff:
                    wanted[page + n] = None  # two segments share the page, and do not lie so in the file
        at = min(wanted, default=0)
        end = max(wanted, default=-1) + 1
        while at < end:
            run = at
            while run < end and run in wanted and _continues(wanted, at, run):
                run += 1
            if run == at:
                at += 1
                continue
            pgoff = wanted[at]
            size = (run - at) << PAGE_SHIFT
            mapped = None if pgoff is None else file
            if pgoff is None:
                hva = mm.mmap(size, _ALL, MAP_PRIVATE | MAP_ANONYMOUS)
                for piece in placement.pieces:
                    lo, hi = max(piece.address, at << PAGE_SHIFT), min(piece.address + piece.size, run << PAGE_SHIFT)
                    if piece.where != "ram" and lo < hi:
                        data = bytes(piece.data[lo - piece.address : hi - piece.address])
                        mm.write(hva + lo - (at << PAGE_SHIFT), data)
                self.copied += run - at
            else:
                hva = mm.mmap(size, _ALL, MAP_PRIVATE, file=file, pgoff=pgoff)
                self.in_place += run - at
            self._add_slot(secondary, at, run - at, hva, mapped, pgoff or 0)
            at = run

    def _map_file(
        self, mm: Mm, secondary: GuestMmu, mapping: FileMapping, taken: Sequence[tuple[int, int, str]]
    ) -> None:
        file = _open(self.volume, self.host, self.trace, mapping.path, self.protocol)
        if not file.size:
            raise XipImageError(self.choice.path, f"{mapping.path} is empty: there is nothing to map")
        if mapping.shared and not file.writable:
            readonly = "is not written with readonly=on; leave that away, or say snapshot=on instead"
            why = readonly if self.choice.readonly else f"is {self.volume.kind}, which is never written; map it without"
            raise BadInput(f"{mapping.path} cannot have shared=on: {self.choice.path} {why}")
        size = page_up(file.size)
        limit = GFN_LIMIT << PAGE_SHIFT
        if mapping.address + size > limit:
            raise BadInput(f"{mapping.path} cannot be at {mapping.address:#x}: guest memory ends at {limit:#x}")
        own = [(slot.start, slot.end, "another file of the image") for slot in self.slots]
        for first, end, what in [*taken, *own]:
            if first < mapping.address + size and mapping.address < end:
                raise BadInput(f"{mapping.path} cannot be at {mapping.address:#x}: {what} is at {first:#x} to {end:#x}")
        hva = mm.mmap(size, _ALL, MAP_SHARED if mapping.shared else MAP_PRIVATE, file=file)
        gfn = mapping.address >> PAGE_SHIFT
        self._add_slot(secondary, gfn, size >> PAGE_SHIFT, hva, file, shared=mapping.shared)

    def _add_slot(
        self,
        secondary: GuestMmu,
        gfn: int,
        pages: int,
        hva: int,
        file: XipFile | None,
        pgoff: int = 0,
        *,
        shared: bool = False,
    ) -> None:
        secondary.set_memslot(FIRST_SLOT + len(self.slots), Gfn(gfn), pages, hva, 0)
        start, end = gfn << PAGE_SHIFT, (gfn + pages) << PAGE_SHIFT
        self.slots.append(MappedFile(start, end, hva & PAGE_MASK, file, pgoff, shared))


def _continues(wanted: dict[int, int | None], first: int, page: int) -> bool:
    """Whether ``page`` can be in one mapping with the pages from ``first`` on."""
    begin, here = wanted[first], wanted[page]
    return here is None if begin is None else here == begin + page - first


def _open(volume: Volume, host: HostMemory, trace: Trace, path: str, protocol: str = "modern") -> XipFile:
    with naming(path):
        return volume.file(host, trace, volume.lookup(path), protocol)
