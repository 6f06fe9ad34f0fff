"""Host physical memory: one arena of 4 KiB frames, their metadata, and device frames beside it."""

from collections.abc import Callable
from typing import Any, Literal

import numpy

from xipvm.address import Pfn
from xipvm.mmu.rmap import ReverseMap

PG_RESERVED: int
PG_ANON: int
PG_DIRTY: int
PG_REFERENCED: int
PG_SWAPBACKED: int
PG_LRU: int
PG_DEVICE: int
PG_USED: int
PG_KSM: int
PG_SWAPCACHE: int
PG_HUGETLB: int
PG_WORKINGSET: int
PG_ACTIVE: int
PG_FILE: int
LRU_INACTIVE_ANON: int
LRU_ACTIVE_ANON: int
LRU_INACTIVE_FILE: int
LRU_ACTIVE_FILE: int
HUGE_PAGES: int
POISON_FREE: int
DEVICE_PFN: int
DEVICE_STEP: int
ZERO_PFN: Pfn

class HostMemory:
    """An arena of ``size_bytes`` (whole pages, at most 64 GiB), backed by anonymous memory, lazily.

    ``poison``: a freed frame is filled with ``POISON_FREE`` in its first 64 bytes ("head") or wholly ("frame").
    A pfn that is no frame raises IndexError everywhere; a broken reference count InternalError.
    """

    nr_frames: int
    free_frames: int
    watermark: int
    """So many frames are not handed out; 0 at first. Whoever sets it has to make room when there is no other left."""
    huge_pages: int
    """Pages of the hugetlb pool."""
    free_huge_pages: int
    """Those of them that nobody has."""
    reserved_huge_pages: int
    """Those of the free ones that are promised to mappings (hugetlb_pool.py)."""
    rmap: ReverseMap | None
    def __init__(self, size_bytes: int, *, poison: Literal["head", "frame"] = "head") -> None:
        """Raises HostMemoryError when the size is impossible or the host refuses it."""

    def close(self) -> None:
        """Gives the memory back. BufferError while a ``view`` or ``meta_view`` is in use. Idempotent."""

    def alloc(self, zero: bool = True) -> Pfn:
        """A frame with refcount 1, zeroed if asked. Raises OutOfFrames when no more than ``watermark`` are free."""

    def alloc_huge(self, zero: bool = True) -> Pfn:
        """A compound page, ``HUGE_PAGES`` aligned frames, with refcount 1; its first frame. Raises OutOfFrames."""

    def put(self, pfn: int) -> bool:
        """Drops a reference; True when that freed the page. No effect on the zero page and device frames."""

    def put_page(self, pfn: int) -> list[tuple[int, int]]:
        """As :meth:`put`; the run of frames that it freed, [] for none. A compound page goes as a whole."""

    def get(self, pfn: int) -> None:
        """Takes a reference. No effect on the zero page and device frames."""

    def pin(self, pfn: int) -> None:
        """Holds the frame whatever becomes of the entries that map it. Unlike :meth:`get` it counts device frames, too:
        who frees blocks of a device waits for those (xip/dax.py)."""

    def unpin(self, pfn: int) -> list[tuple[int, int]]:
        """Lets go of a frame that was pinned; what that freed, as with :meth:`put_page`."""

    def refcount(self, pfn: int) -> int:
        """References to the page, or pins of a device frame."""
    def mapcount(self, pfn: int) -> int:
        """Entries that map the frame, huge ones included."""

    def add_mapcount(self, pfn: int, delta: int) -> None:
        """Entries that map this frame alone come or go."""

    def compound_head(self, pfn: int) -> Pfn:
        """The first frame of the compound page that ``pfn`` belongs to; ``pfn`` when it belongs to none."""

    def is_compound(self, pfn: int) -> bool: ...
    def total_mapcount(self, pfn: int) -> int:
        """Entries that map the page or a part of it; a huge one counts once."""

    def entire_mapcount(self, pfn: int) -> int:
        """Huge entries that map the compound page. InternalError for another page, as all of the following."""

    def add_entire_mapcount(self, pfn: int, delta: int) -> None: ...
    def split_mapping(self, pfn: int) -> None:
        """One huge entry became ``HUGE_PAGES`` small ones: mapcounts and references follow."""

    def split_compound(self, pfn: int, cached: bool = False) -> None:
        """Makes ``HUGE_PAGES`` pages of a compound one that nobody maps.

        Only the caller may refer to it and, if ``cached``, its page cache, once for each frame. Flags, root and place
        in it are handed down; the caller has a reference to every page then.
        """

    def partially_mapped(self) -> list[Pfn]:
        """Heads of compound pages of which a part is not mapped any more."""

    def reserve_huge_pages(self, count: int) -> None:
        """Moves frames for ``count`` more pages of 2 MiB to the hugetlb pool. Raises OutOfFrames, and none went."""

    def unreserve_huge_pages(self, count: int) -> None:
        """Takes ``count`` pages out of the pool. Raises MmError EBUSY when not so many are free and unreserved."""

    def alloc_huge_page(self, zero: bool = True) -> Pfn:
        """A page of the pool with refcount 1; its first frame. The last reference puts it back. Raises OutOfFrames."""

    def flags(self, pfn: int) -> int: ...
    def set_flags(self, pfn: int, mask: int) -> None: ...
    def clear_flags(self, pfn: int, mask: int) -> None: ...
    def mapping(self, pfn: int) -> int:
        """Id of the anon_vma or address space that the frame belongs to, 0 = none."""

    def index(self, pfn: int) -> int:
        """Page offset inside the mapping."""

    def set_rmap(self, pfn: int, mapping: int, index: int) -> None:
        """Makes the frame a page of ``mapping``, on the inactive list if it is on none; 0: no page any more."""

    def lru_move(self, pfn: int, list: int) -> None:
        """Makes the page, which somebody refers to, the newest of an LRU list."""

    def lru_isolate(self, pfn: int) -> bool:
        """Takes the page off its list; False when it is on none. :meth:`lru_move` puts it back."""

    def lru_tail(self, list: int) -> int:
        """The oldest page of a list, 0 when it is empty."""

    def lru_count(self, list: int) -> int: ...
    def lru_pages(self, list: int) -> list[int]:
        """All pages of a list, newest first."""

    def read(self, pfn: int, offset: int, size: int) -> bytes:
        """Bytes inside one frame; IndexError when they leave it."""

    def write(self, pfn: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Stores inside one frame, after telling the code hook. InternalError for the zero page."""

    def copy(self, source: int, target: int) -> None:
        """Copies a whole frame, after telling the code hook of ``target``."""

    def touch(self, pfn: int) -> None:
        """Tells the code hook that bytes of the frame are about to change."""

    def view(self, pfn: int) -> memoryview:
        """The frame's 4096 bytes, writable; ``touch`` first when they will be written."""

    def address(self, pfn: int) -> int:
        """Host pointer of the frame."""

    @property
    def arena_address(self) -> int:
        """Host pointer of pfn 0."""

    def meta_view(self) -> numpy.ndarray[Any, Any]:
        """The arena's metadata as a structured array, one record a frame; shared, not copied."""

    def add_device(self, address: int, size: int, keep: object) -> Pfn:
        """Makes ``size`` bytes at host pointer ``address`` device frames; ``keep`` stays referenced. First pfn.

        Regions begin at multiples of ``DEVICE_STEP`` from ``DEVICE_PFN`` up. HostMemoryError after 16 of them.
        """

    def remove_device(self, first: int) -> None:
        """Takes the region away that begins at pfn ``first``."""

    def is_device(self, pfn: int) -> bool: ...
    def watch_code(self, callback: Callable[[int], None] | None) -> None:
        """``callback(pfn)`` before bytes of a frame change that an engine may have executed; None ends it."""
