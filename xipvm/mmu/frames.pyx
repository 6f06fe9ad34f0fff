"""Host physical memory: one arena of 4 KiB frames and the metadata of every frame.

A pfn is an index into the arena, so a stale translation reads whatever the frame holds now.
Invariants:

* pfn 0 is the shared zero page (``PG_RESERVED``): never handed out, never freed, not counted.
* A frame that belongs to no compound page is free exactly when its refcount is 0; then it has no rmap and its first
  bytes are poison.
* Freed frames are handed out last in, first out, then those of freed compound pages, then never-used ones, ascending.
  The free list is a chain through ``link``: (previous << 32) + next, 0 for none.
* A compound page (Linux: a folio of order 9) is ``HUGE_FRAMES`` frames that begin at a multiple of that. ``head`` of
  all of them is the first one, which has the facts that are true of the whole: refcount, flags, mapping, index, place
  on the LRU. So has each frame its own mapcount, of entries that map it alone, and masks; ``entire_mapcount`` of the
  head counts huge entries. Calls by the pfn of any of its frames mean the page. It is freed as a whole.
* The hugetlb pool is compound pages set apart (PG_HUGETLB): those that nobody has stay compound, with refcount 0, are not
  counted as free frames, and are handed out by ``alloc_huge_page`` only, last in, first out. They are on no LRU list.
* Before bytes of a frame change here, ``before_write`` tells the owner of translated code (``code_hook``).
* Frames up to ``watermark`` are not handed out: they are left for reclaim (reclaim.py), which lowers it at need.
* A frame with a reverse map (``set_rmap``, ``map_anon``) is a page, and on one LRU list unless somebody has isolated it;
  the last reference takes it off. Lists are chains through ``link``: (previous << 32) + next, 0 for none.
* Device frames (pfn >= ``DEVICE_PFN``) are memory of others: metadata but no reference counting.

The file is long because nearly all of it is one extension type: free lists, compound pages and LRU lists are chains
through the same metadata, and every change of a reference keeps them in step.
"""

from errno import EBUSY

from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MADV_DONTNEED, PROT_READ, PROT_WRITE, madvise, mmap, munmap

from xipvm.errors import HostMemoryError, InternalError, MmError, OutOfFrames

cdef extern from "<sys/mman.h>":
    int MAP_NORESERVE

PG_RESERVED = 1 << 0
PG_ANON = 1 << 1
PG_DIRTY = 1 << 2
PG_REFERENCED = 1 << 3
PG_SWAPBACKED = 1 << 4
PG_LRU = 1 << 5  # on an LRU list
PG_DEVICE = 1 << 6
PG_USED = 1 << 7  # was handed out once: its bytes are no longer the arena's zeros
PG_KSM = 1 << 8  # one page for equal pages of several places (ksm.py)
PG_SWAPCACHE = 1 << 9  # a swap slot has, or is to have, the same content (swap.py)
PG_HUGETLB = 1 << 26  # heads: a page of the hugetlb pool
PG_WORKINGSET = 1 << 27  # was in use, active, before it was reclaimed (workingset.py)
PG_ACTIVE = 1 << 28  # with PG_FILE the number of the LRU list, also while isolated
PG_FILE = 1 << 29

LRU_INACTIVE_ANON = 0
LRU_ACTIVE_ANON = 1
LRU_INACTIVE_FILE = 2
LRU_ACTIVE_FILE = 3

POISON_FREE = 0x6B
DEVICE_PFN = 1 << 24
DEVICE_STEP = 1 << 16
ZERO_PFN = 0

HUGE_PAGES = HUGE_FRAMES

cdef enum:
    PAGE = 4096
    RESERVED = 1 << 0
    SWAPBACKED = 1 << 4
    LRU = 1 << 5
    DEVICE = 1 << 6
    USED = 1 << 7
    HUGETLB = 1 << 26
    POISON = 0x6B
    LIST_SHIFT = 28
    FILE_LISTS = 2
    FIRST_DEVICE = 1 << 24
    REGION_STEP = 1 << 16
    MAX_REGIONS = 16
    HEAD_BYTES = 64


cdef class _Window:
    """Exports bytes of the arena, of its metadata or of a device, and keeps their owner open meanwhile."""

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.start, self.size, 0, flags)
        self.owner.views += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.owner.views -= 1


cdef enum:
    NR_ARENAS = 4
    KEPT_BYTES = 64 << 20

# Arenas that nobody has, zeroed again: the next one of that size is at the same address, so that an engine that has it
# mapped need not map it anew (cpu/core.pyx). Only the GIL guards them.
cdef void *arenas[NR_ARENAS]
cdef size_t arena_sizes[NR_ARENAS]


cdef void *_take_arena(size_t size) noexcept:
    cdef int i
    cdef void *base
    for i in range(NR_ARENAS):
        if arenas[i] != NULL and arena_sizes[i] == size:
            base = arenas[i]
            arenas[i] = NULL
            return base
    return NULL


cdef void _put_arena(void *base, size_t size) noexcept:
    cdef int i
    if size <= KEPT_BYTES and madvise(base, size, MADV_DONTNEED) == 0:
        for i in range(NR_ARENAS):
            if arenas[i] == NULL:
                arenas[i] = base
                arena_sizes[i] = size
                return
    munmap(base, size)


cdef class HostMemory:
    def __cinit__(self, size_bytes, *, str poison="head"):
        if size_bytes <= 0 or size_bytes % PAGE or size_bytes // PAGE < 2 or size_bytes // PAGE > FIRST_DEVICE:
            raise HostMemoryError(size_bytes, f"host memory of {size_bytes} bytes: give 2 pages to 64 GiB, whole pages")
        if poison not in ("head", "frame"):
            raise ValueError(f"poison is 'head' or 'frame', not {poison!r}")
        self.poison_bytes = HEAD_BYTES if poison == "head" else PAGE
        self._keep = {}
        self.nr_frames = size_bytes // PAGE
        # Anonymous: the kernel supplies its pages in half the time that a memfd's take.
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        cdef void *base = _take_arena(size_bytes)
        if base == NULL:
            base = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, flags, -1, 0)
        if base == MAP_FAILED:
            raise HostMemoryError(size_bytes, f"cannot map {size_bytes} bytes of host memory")
        self.base = <uint8_t *>base
        self.meta = <FrameMeta *>calloc(self.nr_frames, sizeof(FrameMeta))
        if self.meta == NULL:
            raise HostMemoryError(size_bytes, f"no memory for the metadata of {self.nr_frames} frames")
        self.meta[0].refcount = 1
        self.meta[0].flags = RESERVED
        self.fresh = 1
        self.free_frames = self.nr_frames - 1

    def __dealloc__(self):
        self._release()

    cdef void _release(self) noexcept:
        cdef int i
        for i in range(self.nr_regions):
            free(self.regions[i].meta)
        self.nr_regions = 0
        if self.base != NULL:
            _put_arena(self.base, self.nr_frames * PAGE)
            self.base = NULL
        free(self.meta)
        self.meta = NULL
        self.nr_frames = 0
        self.free_frames = 0

    def close(self):
        if self.views:
            raise BufferError(f"{self.views} views of host memory are still in use")
        self._release()
        self._keep = {}

    # ---- native interface ----

    cdef FrameMeta *meta_of(self, uint64_t pfn) noexcept:
        cdef int i
        cdef FrameMeta *meta
        if pfn < self.nr_frames:
            return &self.meta[pfn]
        for i in range(self.nr_regions):
            if pfn - self.regions[i].first < self.regions[i].count:
                meta = &self.regions[i].meta[pfn - self.regions[i].first]
                meta.flags |= DEVICE    # here, so that a large region takes memory only for what is used of it
                return meta
        return NULL

    cdef uint8_t *bytes_of(self, uint64_t pfn) noexcept:
        cdef int i
        if pfn < self.nr_frames:
            return self.base + pfn * PAGE
        for i in range(self.nr_regions):
            if pfn - self.regions[i].first < self.regions[i].count:
                return self.regions[i].base + (pfn - self.regions[i].first) * PAGE
        return NULL

    cdef int64_t alloc_frame(self, bint zero) noexcept:
        if self.free_frames <= self.watermark:
            return -1
        cdef uint64_t pfn = self.free_head
        cdef uint64_t i
        if pfn == 0 and self.free_blocks:
            pfn = self.free_blocks
            self.free_blocks = self.meta[pfn].link
            for i in range(<uint64_t>HUGE_FRAMES):
                self._push_free(pfn + HUGE_FRAMES - 1 - i)
        if pfn:
            self._unlink_free(pfn)
        else:
            pfn = self.fresh
            self.fresh += 1
        self.free_frames -= 1
        self._prepare(pfn, zero)
        self.meta[pfn].refcount = 1
        return <int64_t>pfn

    cdef int64_t alloc_block(self, bint zero) noexcept:
        cdef uint64_t pfn = self.free_blocks
        cdef uint64_t i
        if self.free_frames < self.watermark + HUGE_FRAMES:
            return -1
        if pfn:
            self.free_blocks = self.meta[pfn].link
        else:
            pfn = (self.fresh + HUGE_FRAMES - 1) & ~<uint64_t>(HUGE_FRAMES - 1)
            if pfn + HUGE_FRAMES <= self.nr_frames:
                for i in range(pfn - self.fresh):
                    self._push_free(pfn - 1 - i)
                self.fresh = pfn + HUGE_FRAMES
            else:
                pfn = self._find_block()
                if pfn == 0:
                    return -1
        self.free_frames -= HUGE_FRAMES
        for i in range(<uint64_t>HUGE_FRAMES):
            self._prepare(pfn + i, zero)
            self.meta[pfn + i].head = <uint32_t>pfn
        self.meta[pfn].refcount = 1
        return <int64_t>pfn

    cdef uint64_t _find_block(self) noexcept:
        """Takes an aligned run of freed frames out of the free list; 0 if there is none."""
        cdef uint64_t first = HUGE_FRAMES
        cdef uint64_t i
        while first + HUGE_FRAMES <= self.fresh:
            i = 0
            while i < <uint64_t>HUGE_FRAMES and self.meta[first + i].refcount == 0 and self.meta[first + i].head == 0:
                i += 1
            if i == HUGE_FRAMES:
                for i in range(<uint64_t>HUGE_FRAMES):
                    self._unlink_free(first + i)
                return first
            first += HUGE_FRAMES
        return 0

    cdef void _push_free(self, uint64_t pfn) noexcept:
        self.meta[pfn].link = self.free_head
        if self.free_head:
            self.meta[self.free_head].link |= pfn << 32
        self.free_head = pfn

    cdef void _unlink_free(self, uint64_t pfn) noexcept:
        cdef uint64_t previous = self.meta[pfn].link >> 32
        cdef uint64_t next = self.meta[pfn].link & <uint64_t>0xFFFFFFFF
        if previous:
            self.meta[previous].link = (self.meta[previous].link >> 32 << 32) | next
        else:
            self.free_head = next
        if next:
            self.meta[next].link = (self.meta[next].link & <uint64_t>0xFFFFFFFF) | previous << 32

    cdef void _prepare(self, uint64_t pfn, bint zero) noexcept:
        """A frame that was free is to be used."""
        cdef FrameMeta *meta = &self.meta[pfn]
        meta.link = 0
        meta.turns = 0
        if meta.flags & USED:
            # Nobody should have executed a free frame; a defective secondary MMU may have.
            if meta.x_mask | meta.code_mask:
                self.before_write(pfn)
            if zero:
                memset(self.base + pfn * PAGE, 0, PAGE)
        meta.flags = USED

    cdef void _retire(self, uint64_t pfn) noexcept:
        """A frame is free from now on."""
        cdef FrameMeta *meta = &self.meta[pfn]
        if meta.x_mask | meta.code_mask:
            self.before_write(pfn)
        memset(self.base + pfn * PAGE, POISON, self.poison_bytes)
        meta.flags = USED
        meta.mapping = 0
        meta.index = 0
        meta.head = 0

    cdef uint64_t put_frame(self, uint64_t pfn) noexcept:
        if pfn >= self.nr_frames:
            return 0
        cdef FrameMeta *meta = folio_of(self.meta, pfn)
        cdef uint64_t i
        cdef bint pooled
        if meta.flags & RESERVED or meta.refcount <= 0:
            return 0
        meta.refcount -= 1
        if meta.refcount:
            return 0
        pfn = meta - self.meta
        if meta.flags & LRU:
            self.lru_del(pfn)
        if not meta.head:
            self._retire(pfn)
            self._push_free(pfn)
            self.free_frames += 1
            return 1
        pooled = meta.flags & HUGETLB
        for i in range(<uint64_t>HUGE_FRAMES):
            self._retire(pfn + i)
        if pooled:
            self._enter_pool(pfn)
            return HUGE_FRAMES
        meta.link = self.free_blocks
        self.free_blocks = pfn
        self.free_frames += HUGE_FRAMES
        return HUGE_FRAMES

    cdef void _enter_pool(self, uint64_t pfn) noexcept:
        """The frames from ``pfn`` on, which are retired, are a free page of the pool."""
        cdef uint64_t i
        for i in range(<uint64_t>HUGE_FRAMES):
            self.meta[pfn + i].head = <uint32_t>pfn
        self.meta[pfn].flags |= HUGETLB
        self.meta[pfn].link = self.pool_head
        self.pool_head = pfn
        self.free_huge_pages += 1

    cdef uint64_t _leave_pool(self) noexcept:
        """The free page that came last, which there is."""
        cdef uint64_t pfn = self.pool_head
        self.pool_head = self.meta[pfn].link
        self.free_huge_pages -= 1
        return pfn

    cdef void before_write(self, uint64_t pfn) noexcept:
        cdef FrameMeta *meta = self.meta_of(pfn)
        if meta != NULL and meta.x_mask | meta.code_mask and self.code_hook != NULL:
            self.code_hook(self.code_ctx, pfn)

    # The lists: newest first. Only arena frames, and never pfn 0, are on one.

    cdef void lru_add(self, uint64_t pfn, int list) noexcept:
        cdef FrameMeta *meta = &self.meta[pfn]
        cdef LruList *pages = &self.lists[list]
        meta.flags = (meta.flags & ~(<uint32_t>3 << LIST_SHIFT)) | (<uint32_t>list << LIST_SHIFT) | LRU
        meta.link = pages.head
        if pages.head:
            self.meta[pages.head].link |= pfn << 32
        else:
            pages.tail = <uint32_t>pfn
        pages.head = <uint32_t>pfn
        pages.count += 1

    cdef void lru_del(self, uint64_t pfn) noexcept:
        cdef FrameMeta *meta = &self.meta[pfn]
        cdef LruList *pages = &self.lists[(meta.flags >> LIST_SHIFT) & 3]
        cdef uint64_t previous = meta.link >> 32
        cdef uint64_t next = meta.link & <uint64_t>0xFFFFFFFF
        if previous:
            self.meta[previous].link = (self.meta[previous].link >> 32 << 32) | next
        else:
            pages.head = <uint32_t>next
        if next:
            self.meta[next].link = (self.meta[next].link & <uint64_t>0xFFFFFFFF) | previous << 32
        else:
            pages.tail = <uint32_t>previous
        pages.count -= 1
        meta.link = 0
        meta.flags &= ~<uint32_t>LRU

    cdef FrameMeta *_checked(self, uint64_t pfn) except NULL:
        cdef FrameMeta *meta = self.meta_of(pfn)
        if meta == NULL:
            raise IndexError(f"pfn {pfn:#x} is no frame")
        return meta

    cdef FrameMeta *_folio(self, uint64_t pfn) except NULL:
        cdef FrameMeta *meta = self._checked(pfn)
        return &self.meta[meta.head] if meta.head else meta

    cdef FrameMeta *_compound(self, uint64_t pfn) except NULL:
        cdef FrameMeta *meta = self._folio(pfn)
        if not meta.head:
            raise InternalError(f"frame {pfn:#x} belongs to no compound page")
        return meta

    # ---- allocation and reference counting ----

    def alloc(self, bint zero=True):
        cdef int64_t pfn = self.alloc_frame(zero)
        if pfn < 0:
            raise OutOfFrames(f"no frame to spare of {self.nr_frames}")
        return pfn

    def alloc_huge(self, bint zero=True):
        cdef int64_t pfn = self.alloc_block(zero)
        if pfn < 0:
            raise OutOfFrames(f"no {HUGE_FRAMES} aligned frames to spare of {self.nr_frames}")
        return pfn

    def put(self, uint64_t pfn):
        cdef FrameMeta *meta = self._folio(pfn)
        if meta.flags & (RESERVED | DEVICE):
            return False
        if meta.refcount <= 0:
            raise InternalError(f"put of the free frame {pfn:#x}")
        return self.put_frame(pfn) != 0

    def put_page(self, uint64_t pfn):
        cdef FrameMeta *meta = self._checked(pfn)
        cdef uint64_t head = meta.head
        if not self.put(pfn):
            return []
        return [(head, HUGE_FRAMES)] if head else [(pfn, 1)]

    def get(self, uint64_t pfn):
        cdef FrameMeta *meta = self._folio(pfn)
        if meta.flags & (RESERVED | DEVICE):
            return
        if meta.refcount <= 0:
            raise InternalError(f"get of the free frame {pfn:#x}")
        meta.refcount += 1

    def pin(self, uint64_t pfn):
        cdef FrameMeta *meta = self._folio(pfn)
        if meta.flags & DEVICE:
            meta.refcount += 1
        else:
            self.get(pfn)

    def unpin(self, uint64_t pfn):
        cdef FrameMeta *meta = self._folio(pfn)
        if not meta.flags & DEVICE:
            return self.put_page(pfn)
        if meta.refcount <= 0:
            raise InternalError(f"frame {pfn:#x} is unpinned, and was not pinned")
        meta.refcount -= 1
        return []

    def refcount(self, uint64_t pfn):
        return self._folio(pfn).refcount

    def mapcount(self, uint64_t pfn):
        cdef FrameMeta *meta = self._checked(pfn)
        return meta.mapcount + (self.meta[meta.head].entire_mapcount if meta.head else 0)

    # ---- flags and reverse mapping ----

    def flags(self, uint64_t pfn):
        return self._folio(pfn).flags

    def set_flags(self, uint64_t pfn, uint32_t mask):
        self._folio(pfn).flags |= mask

    def clear_flags(self, uint64_t pfn, uint32_t mask):
        self._folio(pfn).flags &= ~mask

    def mapping(self, uint64_t pfn):
        return self._folio(pfn).mapping

    def index(self, uint64_t pfn):
        cdef FrameMeta *meta = self._checked(pfn)
        return self.meta[meta.head].index + (pfn - meta.head) if meta.head else meta.index

    def set_rmap(self, uint64_t pfn, uint32_t mapping, uint64_t index):
        cdef FrameMeta *meta = self._folio(pfn)
        meta.mapping = mapping
        meta.index = index if not meta.head or mapping == 0 else index - (pfn - meta.head)
        if meta.head:
            pfn = meta.head
        if meta.flags & (RESERVED | DEVICE):
            return
        if mapping == 0:
            if meta.flags & LRU:
                self.lru_del(pfn)
        elif not meta.flags & (LRU | HUGETLB):
            self.lru_add(pfn, 0 if meta.flags & SWAPBACKED else FILE_LISTS)

    def add_mapcount(self, uint64_t pfn, int32_t delta):
        cdef FrameMeta *meta = self._checked(pfn)
        if meta.flags & (RESERVED | DEVICE):
            return
        if meta.mapcount + delta < 0:
            raise InternalError(f"mapcount of frame {pfn:#x} would be {meta.mapcount + delta}")
        meta.mapcount += delta
        if meta.head:
            self.meta[meta.head].large_mapcount += delta

    # ---- compound pages ----

    def compound_head(self, uint64_t pfn):
        cdef FrameMeta *meta = self._checked(pfn)
        return meta.head if meta.head else pfn

    def is_compound(self, uint64_t pfn):
        return self._checked(pfn).head != 0

    def total_mapcount(self, uint64_t pfn):
        cdef FrameMeta *meta = self._folio(pfn)
        return meta.large_mapcount if meta.head else meta.mapcount

    def entire_mapcount(self, uint64_t pfn):
        return self._compound(pfn).entire_mapcount

    def add_entire_mapcount(self, uint64_t pfn, int32_t delta):
        cdef FrameMeta *meta = self._compound(pfn)
        if meta.flags & RESERVED:
            return
        if meta.entire_mapcount + delta < 0:
            raise InternalError(f"entire mapcount of frame {pfn:#x} would be {meta.entire_mapcount + delta}")
        meta.entire_mapcount += delta
        meta.large_mapcount += delta

    def split_mapping(self, uint64_t pfn):
        cdef FrameMeta *meta = self._compound(pfn)
        cdef uint64_t i
        if meta.flags & RESERVED:
            return
        if meta.entire_mapcount <= 0:
            raise InternalError(f"no huge entry maps frame {pfn:#x}")
        for i in range(<uint64_t>HUGE_FRAMES):
            self.meta[meta.head + i].mapcount += 1
        meta.entire_mapcount -= 1
        meta.large_mapcount += HUGE_FRAMES - 1
        meta.refcount += HUGE_FRAMES - 1

    def split_compound(self, uint64_t pfn, bint cached=False):
        cdef FrameMeta *meta = self._compound(pfn)
        cdef uint64_t head = meta.head
        cdef uint64_t i
        cdef FrameMeta *page
        if meta.large_mapcount or meta.refcount != 1 + (HUGE_FRAMES if cached else 0):
            raise InternalError(f"compound page {head:#x} is in use: refcount {meta.refcount}, "
                                f"mapcount {meta.large_mapcount}")
        for i in range(<uint64_t>HUGE_FRAMES):
            page = &self.meta[head + i]
            page.head = 0
            page.refcount = 2 if cached else 1
            if i:
                page.flags = meta.flags & ~<uint32_t>LRU
                page.mapping = meta.mapping
                page.index = meta.index + i if meta.mapping else 0
                if page.mapping:
                    self.lru_add(head + i, <int>((meta.flags >> LIST_SHIFT) & 3))

    def partially_mapped(self):
        cdef uint64_t head = HUGE_FRAMES
        cdef uint64_t i
        cdef FrameMeta *meta
        found = []
        while head + HUGE_FRAMES <= self.fresh:
            meta = &self.meta[head]
            if meta.head and meta.large_mapcount and not meta.entire_mapcount:
                for i in range(<uint64_t>HUGE_FRAMES):
                    if self.meta[head + i].mapcount == 0:
                        found.append(head)
                        break
            head += HUGE_FRAMES
        return found

    # ---- the hugetlb pool ----

    def reserve_huge_pages(self, uint64_t count):
        cdef uint64_t done
        cdef int64_t pfn
        for done in range(count):
            pfn = self.alloc_block(False)
            if pfn < 0:
                self.unreserve_huge_pages(done)
                raise OutOfFrames(f"no frames for {count} huge pages: {done} can be had")
            self.meta[pfn].flags |= HUGETLB
            self.put_frame(pfn)
            self.huge_pages += 1

    def unreserve_huge_pages(self, uint64_t count):
        cdef uint64_t pfn
        cdef uint64_t i
        if <int64_t>count > <int64_t>self.free_huge_pages - self.reserved_huge_pages:
            raise MmError(EBUSY, f"{count} huge pages: {self.free_huge_pages} of {self.huge_pages} are free, "
                                 f"{self.reserved_huge_pages} of these reserved")
        while count:
            pfn = self._leave_pool()
            for i in range(<uint64_t>HUGE_FRAMES):
                self.meta[pfn + i].head = 0
            self.meta[pfn].flags = USED
            self.meta[pfn].link = self.free_blocks
            self.free_blocks = pfn
            self.free_frames += HUGE_FRAMES
            self.huge_pages -= 1
            count -= 1

    def alloc_huge_page(self, bint zero=True):
        cdef uint64_t pfn
        cdef uint64_t i
        if self.free_huge_pages == 0:
            raise OutOfFrames(f"none of {self.huge_pages} huge pages is free")
        pfn = self._leave_pool()
        for i in range(<uint64_t>HUGE_FRAMES):
            self._prepare(pfn + i, zero)
        self.meta[pfn].flags |= HUGETLB
        self.meta[pfn].refcount = 1
        return pfn

    # ---- LRU lists ----

    def lru_move(self, uint64_t pfn, int list):
        if not 0 <= list < 4:
            raise ValueError(f"there is no LRU list {list}")
        cdef FrameMeta *meta = self._folio(pfn)
        if meta.flags & (RESERVED | DEVICE) or meta.refcount <= 0:
            raise InternalError(f"frame {pfn:#x} is no page for an LRU list")
        if meta.head:
            pfn = meta.head
        if meta.flags & LRU:
            self.lru_del(pfn)
        self.lru_add(pfn, list)

    def lru_isolate(self, uint64_t pfn):
        cdef FrameMeta *meta = self._folio(pfn)
        if not meta.flags & LRU:
            return False
        self.lru_del(meta.head if meta.head else pfn)
        return True

    def lru_tail(self, int list):
        return self.lists[list & 3].tail

    def lru_count(self, int list):
        return self.lists[list & 3].count

    def lru_pages(self, int list):
        cdef uint64_t pfn = self.lists[list & 3].head
        pages = []
        while pfn and <uint64_t>len(pages) <= self.nr_frames:
            pages.append(pfn)
            pfn = self.meta[pfn].link & <uint64_t>0xFFFFFFFF
        return pages

    # ---- bytes ----

    cdef uint8_t *_span(self, uint64_t pfn, Py_ssize_t offset, Py_ssize_t size) except NULL:
        cdef uint8_t *start = self.bytes_of(pfn)
        if start == NULL:
            raise IndexError(f"pfn {pfn:#x} is no frame")
        if offset < 0 or size < 0 or offset > PAGE - size:
            raise IndexError(f"{size} bytes at offset {offset} leave the frame")
        return start + offset

    def read(self, uint64_t pfn, Py_ssize_t offset, Py_ssize_t size):
        return self._span(pfn, offset, size)[:size]

    def write(self, uint64_t pfn, Py_ssize_t offset, const uint8_t[::1] data not None):
        cdef uint8_t *start = self._span(pfn, offset, data.shape[0])
        if pfn == 0:
            raise InternalError("write to the zero page")
        if data.shape[0]:
            self.before_write(pfn)
            memcpy(start, &data[0], data.shape[0])

    def copy(self, uint64_t source, uint64_t target):
        cdef uint8_t *to = self._span(target, 0, PAGE)
        if target == 0:
            raise InternalError("write to the zero page")
        self.before_write(target)
        memcpy(to, self._span(source, 0, PAGE), PAGE)

    def touch(self, uint64_t pfn):
        self._checked(pfn)
        self.before_write(pfn)

    cdef _Window _window(self, void *start, Py_ssize_t size):
        cdef _Window window = _Window.__new__(_Window)
        window.owner = self
        window.start = start
        window.size = size
        return window

    def view(self, uint64_t pfn):
        return memoryview(self._window(self._span(pfn, 0, PAGE), PAGE))

    def address(self, uint64_t pfn):
        return <size_t>self._span(pfn, 0, 0)

    @property
    def arena_address(self):
        return <size_t>self.base

    def meta_view(self):
        import numpy

        fields = numpy.dtype(
            [("refcount", "i4"), ("mapcount", "i4"), ("flags", "u4"), ("mapping", "u4"), ("index", "u8"),
             ("w_mask", "u4"), ("x_mask", "u4"), ("code_mask", "u4"), ("turns", "u4"), ("link", "u8"),
             ("head", "u4"), ("entire_mapcount", "i4"), ("large_mapcount", "i4")],
            align=True,
        )
        return numpy.frombuffer(self._window(self.meta, self.nr_frames * sizeof(FrameMeta)), dtype=fields)

    # ---- device frames ----

    def add_device(self, size_t address, uint64_t size, object keep):
        if size == 0 or size % PAGE or address % PAGE:
            raise ValueError(f"device memory of {size} bytes at {address:#x} is not whole pages")
        if self.nr_regions == MAX_REGIONS:
            raise HostMemoryError(size, f"no more than {MAX_REGIONS} device regions")
        cdef uint64_t first = FIRST_DEVICE
        cdef DeviceRegion *region
        if self.nr_regions:
            region = &self.regions[self.nr_regions - 1]
            first = (region.first + region.count + REGION_STEP - 1) // REGION_STEP * REGION_STEP
        region = &self.regions[self.nr_regions]
        region.first = first
        region.count = size // PAGE
        region.base = <uint8_t *>address
        region.meta = <FrameMeta *>calloc(region.count, sizeof(FrameMeta))
        if region.meta == NULL:
            raise MemoryError
        self._keep[first] = keep
        self.nr_regions += 1
        return first

    def remove_device(self, uint64_t first):
        cdef int i
        for i in range(self.nr_regions):
            if self.regions[i].first == first:
                free(self.regions[i].meta)
                self.nr_regions -= 1
                while i < self.nr_regions:
                    self.regions[i] = self.regions[i + 1]
                    i += 1
                del self._keep[first]
                return
        raise IndexError(f"no device region begins at pfn {first:#x}")

    def is_device(self, uint64_t pfn):
        return (self._checked(pfn).flags & DEVICE) != 0

    def watch_code(self, callback):
        """Python's way to the code hook, for machines without a native engine; None takes it away."""
        self._keep["watch"] = callback
        self.code_ctx = <void *>callback
        if callback is None:
            self.code_hook = NULL
        else:
            self.code_hook = _call_watcher


cdef void _call_watcher(void *ctx, uint64_t pfn) noexcept:
    (<object>ctx)(pfn)
