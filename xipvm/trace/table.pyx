"""A hash table from page numbers to two numbers each, for what is looked up at every event.

Open addressing, at most half full, 24 bytes a slot. Eight neighbouring pages are in neighbouring slots, and such groups
are scattered: longer ones that overlap would stand far from their homes. Keys that want the same slots stand in the order
of their homes ("Robin Hood": who is farther from home goes first), so that looking for what is not there and closing the
gap of what is removed both end at the next key that stands nearer to its home. A table that is emptied gives back what
it did not need, so that emptying it again is cheap.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memset

cdef enum:
    SMALL = 16


cdef inline uint64_t _home(uint64_t key, uint64_t mask) noexcept:
    return (((key >> 3) * <uint64_t>0x9E3779B97F4A7C15 >> 32) << 3 | key & 7) & mask


cdef inline uint64_t _steps(Slot *slots, uint64_t at, uint64_t mask) noexcept:
    """How far from its home the key in ``at`` stands."""
    return at - _home(slots[at].key, mask) & mask


cdef Slot *_insert(Slot *slots, uint64_t mask, uint64_t key) noexcept:
    """A slot for ``key``, which is not there yet. There is place."""
    cdef uint64_t at = _home(key, mask), steps = 0, end
    while slots[at].key != FREE and _steps(slots, at, mask) >= steps:
        at = at + 1 & mask
        steps += 1
    end = at
    while slots[end].key != FREE:
        end = end + 1 & mask
    while end != at:  # those from here on move by one
        slots[end] = slots[end - 1 & mask]
        end = end - 1 & mask
    slots[at].key = key
    slots[at].a = slots[at].b = 0
    return &slots[at]


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
        cdef uint64_t at = _home(key, self.mask), steps = 0
        while self.slots[at].key != key:
            if self.slots[at].key == FREE or _steps(self.slots, at, self.mask) < steps:
                return NULL
            at = at + 1 & self.mask
            steps += 1
        return &self.slots[at]

    cdef Slot *put(self, uint64_t key, bint *new) except NULL:
        cdef Slot *found = self.find(key)
        new[0] = found == NULL
        if found != NULL:
            return found
        if 2 * (self.count + 1) > self.mask + 1:
            self._resize(2 * (self.mask + 1))
        self.count += 1
        return _insert(self.slots, self.mask, key)

    cdef bint remove(self, uint64_t key) noexcept:
        cdef Slot *slot = self.find(key)
        if slot == NULL:
            return False
        cdef uint64_t gap = slot - self.slots, at
        while True:
            at = gap + 1 & self.mask
            if self.slots[at].key == FREE or _steps(self.slots, at, self.mask) == 0:
                break
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
        cdef Slot *to
        cdef uint64_t at
        for at in range(self.mask + 1):
            if self.slots[at].key != FREE:
                to = _insert(room, slots - 1, self.slots[at].key)
                to.a = self.slots[at].a
                to.b = self.slots[at].b
        free(self.slots)
        self.slots = room
        self.mask = slots - 1
        return 0
