# Bits of a primary page-table entry, for native code; pte.py has the same numbers and says what they mean.

cdef enum:
    PTE_PRESENT = 1 << 0
    PTE_WRITE = 1 << 1
    PTE_EXEC = 1 << 2
    PTE_SPECIAL = 1 << 3
    PTE_PROTNONE = 1 << 4
    PTE_ACCESSED = 1 << 5
    PTE_DIRTY = 1 << 6
    PTE_HUGE = 1 << 7
    PTE_SOFT_DIRTY = 1 << 8
    PTE_ANON = 1 << 9
    PTE_EXCLUSIVE = 1 << 10

cdef extern from *:
    """
    #define PTE_SWAP (1ULL << 52)
    #define PTE_MIGRATION (1ULL << 53)
    #define PTE_UFFD_WP (1ULL << 54)
    """
    const unsigned long long PTE_SWAP
    const unsigned long long PTE_MIGRATION
    const unsigned long long PTE_UFFD_WP
