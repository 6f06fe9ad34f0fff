from libc.stdint cimport uint64_t

from xipvm.mmu.frames cimport HostMemory

cdef class PageTable:
    """Radix tree over page numbers: 512 u64 a table, 3 levels (27-bit index) or 4 (36-bit)."""
    cdef uint64_t *root
    cdef readonly int levels
    cdef readonly uint64_t present      # leaf entries that are not zero (a huge entry counts one)
    cdef readonly uint64_t tables       # tables allocated, the root included
    cdef public uint64_t mmio_generation    # MMIO entries (spte.py) of another one say nothing to a walker
    # pointer to the leaf entry of `index`, NULL when no table is there. *level is 1 (4 KiB) or 2 (2 MiB entry).
    # Through the pointer bits may be changed, but zero may not become non-zero nor the reverse: use store().
    cdef uint64_t *lookup(self, uint64_t index, int *level) noexcept
    cdef uint64_t *ensure(self, uint64_t index) except NULL # allocates tables on the way; then store(), same rule
    cdef uint64_t load(self, uint64_t index) noexcept       # 0 when empty
    cdef uint64_t store(self, uint64_t index, uint64_t entry) except? 0     # returns the old entry
    cdef uint64_t *pmd(self, uint64_t index) except? NULL   # the level-2 entry over `index`, NULL without a table for it
    cdef int check_range(self, uint64_t start, uint64_t end) except -1

cdef class Gather:
    """Frames taken out of a page table whose last reference must wait for the primary TLB flush."""
    cdef HostMemory host
    cdef uint64_t *pfns
    cdef readonly uint64_t count
    cdef uint64_t capacity
    cdef public list swaps      # swap slots that lost an entry, None as long as there are none
    cdef int add(self, uint64_t pfn) except -1
