from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    HUGE_FRAMES = 512           # frames of a compound page, naturally aligned

cdef struct FrameMeta:          # one a frame, 64 bytes
    int32_t refcount
    int32_t mapcount
    uint32_t flags              # PG_* of frames.pyx
    uint32_t mapping            # rmap root: id of the anon_vma or address space, 0 = none
    uint64_t index              # page offset inside the mapping
    uint32_t w_mask             # engines whose TLB may hold a writable entry
    uint32_t x_mask             # engines whose TLB may hold an executable entry
    uint32_t code_mask          # engines that may hold code translated from the frame's bytes
    uint32_t turns              # how often it went from executable to writable
    uint64_t link               # free list, or LRU list
    uint32_t head               # first frame of the compound page that the frame belongs to, 0 for a page of its own
    int32_t entire_mapcount     # heads: entries that map the compound page as a whole
    int32_t large_mapcount      # heads: these, and those that map one frame of it

cdef inline FrameMeta *folio_of(FrameMeta *metas, uint64_t pfn) noexcept:
    """Where the facts about the page are that the arena frame ``pfn`` belongs to."""
    cdef FrameMeta *meta = &metas[pfn]
    return &metas[meta.head] if meta.head else meta

ctypedef void (*code_hook_t)(void *ctx, uint64_t pfn) noexcept

cdef struct DeviceRegion:
    uint64_t first              # pfn
    uint64_t count              # frames
    uint8_t *base
    FrameMeta *meta

cdef struct LruList:
    uint32_t head               # pfn, 0 for none
    uint32_t tail
    uint64_t count

cdef class _Window

cdef class HostMemory:
    cdef uint8_t *base
    cdef FrameMeta *meta
    cdef readonly uint64_t nr_frames
    cdef DeviceRegion regions[16]
    cdef int nr_regions
    cdef code_hook_t code_hook  # called before bytes of a frame with x_mask or code_mask change
    cdef void *code_ctx
    cdef uint64_t free_head             # freed frames, 0 for none
    cdef uint64_t free_blocks           # freed compound pages, 0 for none
    cdef uint64_t pool_head             # free pages of the hugetlb pool, 0 for none
    cdef readonly uint64_t huge_pages           # in the pool
    cdef readonly uint64_t free_huge_pages      # of these, with refcount 0
    cdef public int64_t reserved_huge_pages     # of these, promised to mappings
    cdef uint64_t fresh                 # this frame and all behind it were never handed out
    cdef readonly uint64_t free_frames
    cdef public uint64_t watermark      # alloc_frame fails rather than leave fewer free
    cdef LruList lists[4]
    cdef int poison_bytes
    cdef object _keep
    cdef object __weakref__
    cdef int views              # exported buffers: close() refuses while there are any
    cdef public object rmap     # the reverse map over these frames, see rmap.py
    # NULL for a pfn that is neither an arena frame nor a device frame
    cdef FrameMeta *meta_of(self, uint64_t pfn) noexcept
    cdef uint8_t *bytes_of(self, uint64_t pfn) noexcept
    # -1 when no frame can be spared; it comes with refcount 1, zeroed if asked
    cdef int64_t alloc_frame(self, bint zero) noexcept
    cdef int64_t alloc_block(self, bint zero) noexcept      # likewise a compound page
    cdef uint64_t put_frame(self, uint64_t pfn) noexcept    # how many frames that freed: 0, 1, or a compound page
    cdef void _push_free(self, uint64_t pfn) noexcept
    cdef void _unlink_free(self, uint64_t pfn) noexcept
    cdef void _prepare(self, uint64_t pfn, bint zero) noexcept
    cdef void _retire(self, uint64_t pfn) noexcept
    cdef uint64_t _find_block(self) noexcept
    cdef void _enter_pool(self, uint64_t pfn) noexcept
    cdef uint64_t _leave_pool(self) noexcept
    cdef void before_write(self, uint64_t pfn) noexcept     # host or DMA is about to change bytes
    cdef void lru_add(self, uint64_t pfn, int list) noexcept    # it is on none
    cdef void lru_del(self, uint64_t pfn) noexcept              # it is on one
    cdef void _release(self) noexcept
    cdef FrameMeta *_checked(self, uint64_t pfn) except NULL
    cdef FrameMeta *_folio(self, uint64_t pfn) except NULL
    cdef FrameMeta *_compound(self, uint64_t pfn) except NULL
    cdef uint8_t *_span(self, uint64_t pfn, Py_ssize_t offset, Py_ssize_t size) except NULL
    cdef _Window _window(self, void *start, Py_ssize_t size)

cdef class _Window:
    cdef HostMemory owner
    cdef void *start
    cdef Py_ssize_t size
