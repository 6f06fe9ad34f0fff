"""A hash table from page numbers to two numbers each, for what is looked up at every event.

Open addressing with linear probing, at most half full, 24 bytes a slot. Neighbouring pages of a block of 512 are in
neighbouring slots, so that a run of pages is a run of memory; blocks are scattered. Removing closes the gap (nothing is
marked as deleted), and a table that is emptied gives back what it did not need, so that emptying it again is cheap.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memset

cdef enum:
    SMALL = 16


cdef inline uint64_t _home(uint64_t key, uint64_t mask) noexcept:
    return (key + (key >> 9) * <uint64_t>0x9E3779B97F4A7C15) & mask


cdef Slot *_room(uint64_t slots) except NULL:
    cdef Slot *room = <Slot *>malloc(slots * sizeof(Slot))
    if room == NULL:
        raise MemoryError
    memset(room, 0xFF, slots * sizeof(Slot))
    return room


cdef int _ascending(const void *a, const void *b) noexcept nogil:
    cdef uint64_t first = (<uint64_t *>a)[0], second = (<uint64_t *>b)[0]
    return (first > second) - (first < second)


cdef class Table:
    def __cinit__(self):
        self.slots = _room(SMALL)
        self.mask = SMALL - 1

    def __dealloc__(self):
        free(self.slots)

    cdef Slot *find(self, uint64_t key) noexcept:
        cdef uint64_t at = _home(key, self.mask)
        while self.slots[at].key != key:
            if self.slots[at].key == FREE:
                return NULL
            at = at + 1 & self.mask
        return &self.slots[at]

    cdef Slot *put(self, uint64_t key, bint *new) except NULL:
        cdef uint64_t at = _home(key, self.mask)
        while self.slots[at].key != key:
            if self.slots[at].key == FREE:
                break
            at = at + 1 & self.mask
        new[0] = self.slots[at].key == FREE
        if not new[0]:
            return &self.slots[at]
        if 2 * (self.count + 1) > self.mask + 1:
            self._resize(2 * (self.mask + 1))
            at = _home(key, self.mask)
            while self.slots[at].key != FREE:
                at = at + 1 & self.mask
        self.count += 1
        self.slots[at].key = key
        self.slots[at].a = self.slots[at].b = 0
        return &self.slots[at]

    cdef bint remove(self, uint64_t key) noexcept:
        cdef Slot *slot = self.find(key)
        if slot == NULL:
            return False
        cdef uint64_t gap = slot - self.slots, at = gap
        while True:
            at = at + 1 & self.mask
            if self.slots[at].key == FREE:
                break
            # It may move to the gap unless its home lies behind that.
            if (at - _home(self.slots[at].key, self.mask) & self.mask) >= (at - gap & self.mask):
                self.slots[gap] = self.slots[at]
                gap = at
        self.slots[gap].key = FREE
        self.count -= 1
        return True

    cdef int clear(self) except -1:
        cdef uint64_t slots = SMALL
        while slots < 2 * self.count:
            slots *= 2
        cdef Slot *room
        if slots <= self.mask:
            room = _room(slots)
            free(self.slots)
            self.slots = room
            self.mask = slots - 1
        else:
            memset(self.slots, 0xFF, slots * sizeof(Slot))
        self.count = 0
        return 0

    cdef uint64_t *within(self, uint64_t start, uint64_t end, uint64_t *found) except? NULL:
        cdef uint64_t at, key, count = 0
        found[0] = 0
        if start >= end or not self.count:
            return NULL
        cdef uint64_t most = end - start if end - start < self.count else self.count
        cdef uint64_t *keys = <uint64_t *>malloc(most * sizeof(uint64_t))
        if keys == NULL:
            raise MemoryError
        if end - start <= self.count:
            for key in range(start, end):
                if self.find(key) != NULL:
                    keys[count] = key
                    count += 1
        else:
            while 16 * self.count < self.mask + 1 and self.mask + 1 > SMALL:  # looking through it is to be worth it
                self._resize((self.mask + 1) // 4 if self.mask + 1 > 4 * SMALL else SMALL)
            for at in range(self.mask + 1):
                key = self.slots[at].key
                if start <= key < end and key != FREE:
                    keys[count] = key
                    count += 1
            qsort(keys, count, sizeof(uint64_t), _ascending)
        found[0] = count
        return keys

    def __len__(self):
        return self.count

    def __contains__(self, key):
        return self.find(key) != NULL

    def __iter__(self):
        """The keys, ascending."""
        return iter(self.keys())

    def keys(self, uint64_t start=0, uint64_t end=0xFFFFFFFFFFFFFFFF):
        """Those of ``[start, end)``, ascending."""
        cdef uint64_t found, at
        cdef uint64_t *keys = self.within(start, end, &found)
        try:
            return [keys[at] for at in range(found)]
        finally:
            free(keys)

    def pop(self, uint64_t key):
        """The two numbers of ``key``, which is there no longer; None when it was not."""
        cdef Slot *slot = self.find(key)
        if slot == NULL:
            return None
        found = slot.a, slot.b
        self.remove(key)
        return found

    def get(self, uint64_t key):
        """The two numbers of ``key``, None when it is not there."""
        cdef Slot *slot = self.find(key)
        return None if slot == NULL else (slot.a, slot.b)

    def set(self, uint64_t key, uint64_t a, uint64_t b=0):
        """Give ``key`` these numbers."""
        cdef bint new
        cdef Slot *slot = self.put(key, &new)
        slot.a = a
        slot.b = b

    cdef int _resize(self, uint64_t slots) except -1:
        cdef Slot *room = _room(slots)
        cdef uint64_t at, to
        for at in range(self.mask + 1):
            if self.slots[at].key != FREE:
                to = _home(self.slots[at].key, slots - 1)
                while room[to].key != FREE:
                    to = to + 1 & slots - 1
                room[to] = self.slots[at]
        free(self.slots)
        self.slots = room
        self.mask = slots - 1
        return 0
