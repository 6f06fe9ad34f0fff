from libc.stdint cimport uint64_t

cdef enum:
    FREE = 0xFFFFFFFFFFFFFFFF       # is no key

cdef struct Slot:
    uint64_t key
    uint64_t a
    uint64_t b

cdef class Table:
    """Two numbers by page number. A pointer to a slot is good until the next ``put`` or ``remove``."""
    cdef Slot *slots
    cdef uint64_t mask              # number of slots less one
    cdef readonly uint64_t count
    cdef Slot *find(self, uint64_t key) noexcept                # NULL when it is not there
    cdef Slot *put(self, uint64_t key, bint *new) except NULL   # a and b are 0 when it is new
    cdef bint remove(self, uint64_t key) noexcept
    cdef int clear(self) except -1
    cdef int _resize(self, uint64_t slots) except -1
    # The keys of [start, end), ascending. The caller frees what it gets; NULL for none, and *found is 0 then.
    cdef uint64_t *within(self, uint64_t start, uint64_t end, uint64_t *found) except? NULL
