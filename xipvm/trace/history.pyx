"""What happened lately, and what happened to each page: kept in memory for reports.

A log of records in the order of events. With every ``limit`` events (or as many as it has kept, if that is more) it is
sorted out: the last ``limit`` stay as they are; of the older ones stay, for every page, the last ``each`` and beyond
these the last of each kind, so that who mapped a page is known however often it was used since. An event of many pages stays
for any of them. Of those over more than ``WIDE`` pages the last ``WIDE_KEPT`` stay.

So memory is bounded by the pages that were touched, never by the length of a run, and an event costs a few stores: sorting
out looks at each record once, and comes the later the more there are.
"""

from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc

from xipvm.trace.emit cimport ADDRESS, GFN, HVA, MAX_FIELDS, NO_PAGE, PFN, RUNS, START, Layout, Listener, Said, Space
from xipvm.trace.table cimport Slot, Table

from xipvm.trace.events import Event

cdef enum:
    WIDE = 512
    WIDE_KEPT = 256
    MOST = WIDE + MAX_FIELDS
    IS_WIDE = -2
    SHIFT = 12


cdef class History(Listener):
    """A sink that remembers the last ``limit`` events, and with ``each`` so many of every page at least."""

    def __cinit__(self, uint64_t limit=4096, *, uint64_t each=0):
        self.limit = max(limit, 1)
        self.each = each
        self.mms = {}
        self.forgotten = Table()
        self.kept = Table()
        self.full = 2 * self.limit

    def __dealloc__(self):
        cdef uint64_t at
        for at in range(self.count):
            _drop(&self.records[at])
        free(self.records)

    cdef int hear(self, Said *said) except -1:
        return self.keep(said)

    cdef int keep(self, Said *said) except -1:
        """Remember ``said``."""
        cdef Layout layout = <Layout>said.layout
        cdef Record *more
        cdef int at
        if self.count == self.full:
            self._sort_out()
        if self.count == self.room:
            more = <Record *>realloc(self.records, (2 * self.room + 64) * sizeof(Record))
            if more == NULL:
                raise MemoryError
            self.records = more
            self.room = 2 * self.room + 64
        cdef Record *record = &self.records[self.count]
        record.layout = said.layout
        record.seq = said.seq
        record.cause = said.cause
        record.time = said.time
        record.actor = said.actor
        Py_INCREF(<object>said.time)
        Py_INCREF(<object>said.actor)
        if layout.count <= INLINE:
            for at in range(layout.count):
                record.values[at] = said.values[at]
                Py_INCREF(<object>said.values[at])
        else:
            values = tuple([<object>said.values[at] for at in range(layout.count)])
            Py_INCREF(values)
            record.values[0] = <PyObject *>values
        self.count += 1
        return 0

    cdef int _sort_out(self) except -1:
        """Forget what is neither among the last ones nor wanted for a page."""
        cdef uint64_t at = self.count, to, wide = 0
        cdef uint64_t sure = self.count - self.limit    # from here on everything stays
        cdef bint stays
        cdef int wanted
        cdef Record *record
        while at:
            at -= 1
            record = &self.records[at]
            stays = at >= sure
            if self.each:
                wanted = self._wanted(record)
                if wanted == IS_WIDE:
                    wide += 1
                    wanted = wide <= WIDE_KEPT
                stays = stays or wanted
            if not stays:
                self._forget(record)
                _drop(record)
                record.layout = NULL
        self.kept.clear()
        to = 0
        for at in range(self.count):
            if self.records[at].layout != NULL:
                self.records[to] = self.records[at]
                to += 1
        self.count = to
        self.full = 2 * to if to > self.limit else 2 * self.limit
        return 0

    cdef int _wanted(self, Record *record) except -1:
        """Whether a page of it wants it kept; all of them have it then, if it is. Or IS_WIDE."""
        cdef uint64_t bit = <uint64_t>1 << ((<Layout>record.layout).number & 63)
        cdef Span spans[MOST]
        cdef int at, count = self._spans(record, spans)
        cdef uint64_t page
        cdef bint wanted = False, new
        cdef Slot *slot
        if count == IS_WIDE:
            return IS_WIDE
        for at in range(count):
            for page in range(spans[at].first, spans[at].end):
                slot = self.kept.put(page, &new)
                if slot.a < self.each or not slot.b & bit:
                    slot.a += 1
                    slot.b |= bit
                    wanted = True
        return wanted

    cdef int _forget(self, Record *record) except -1:
        cdef Span spans[MOST]
        cdef int at, count
        cdef uint64_t page
        cdef bint new
        if not self.each:
            return 0
        count = self._spans(record, spans)
        if count == IS_WIDE:
            self.wide += 1
        for at in range(count):
            for page in range(spans[at].first, spans[at].end):
                self.forgotten.put(page, &new).a += 1
        return 0

    cdef int _spans(self, Record *record, Span *spans) except -1:
        """The pages that an event names, as keys that are made of space, address space and number; or IS_WIDE."""
        cdef Layout layout = <Layout>record.layout
        cdef uint64_t first, end, pages = 0, base
        cdef int at, count = 0
        for at in range(layout.count):
            if layout.roles[at] == NO_PAGE:
                continue
            base = _key(layout.spaces[at], 0, 0)
            if layout.spaces[at] == HVA and layout.mm >= 0:
                base = _key(HVA, self._number(_value(record, layout.mm)), 0)
            if layout.roles[at] == RUNS:
                for run in _value(record, at):
                    first, end = run[0], run[1]
                    pages += end
                    if pages > WIDE or count == MOST:
                        return IS_WIDE
                    spans[count].first = base + first
                    spans[count].end = base + first + end
                    count += 1
                continue
            if not _bounds(record, layout, at, &first, &end):
                continue
            pages += end - first
            if pages > WIDE or count == MOST:
                return IS_WIDE
            spans[count].first = base + first
            spans[count].end = base + end
            count += 1
        return count

    cdef uint64_t _number(self, object mm) except? 0:
        cdef object number = self.mms.get(mm)
        if number is None:
            number = self.mms[mm] = len(self.mms) & 0xFF
        return number

    @property
    def events(self):
        """The last ``limit`` events, oldest first."""
        cdef uint64_t at
        cdef uint64_t first = self.count - self.limit if self.count > self.limit else 0
        return [_event(&self.records[at]) for at in range(first, self.count)]

    @property
    def kept_records(self):
        """How many events are remembered in all."""
        return self.count

    def recall(self, uint64_t seq):
        """Event number ``seq``, None when it is not remembered any more."""
        cdef uint64_t low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) // 2
            if self.records[middle].seq < seq:
                low = middle + 1
            else:
                high = middle
        return _event(&self.records[low]) if low < self.count and self.records[low].seq == seq else None

    def since(self, uint64_t seq):
        """What is remembered of the events behind ``seq``, oldest first."""
        cdef uint64_t at = self.count
        found = []
        while at and self.records[at - 1].seq > seq:
            at -= 1
            found.append(_event(&self.records[at]))
        return found[::-1]

    def touching(self, *, pfn=None, gfn=None, hva=None, mm=None, uint64_t last=16, bint kinds=False):
        """The last ``last`` remembered events that name host frame ``pfn``, guest frame ``gfn`` or address ``hva``.

        Oldest first. An event that names any of them counts, by a range or a run too; at ``hva`` those of other
        address spaces than ``mm`` do not, if that is given. With ``kinds`` the last of each kind is there as well.
        """
        cdef uint64_t at = self.count
        cdef uint64_t wanted[4]
        cdef bint sought[4]
        for at in range(4):
            sought[at] = False
        sought[<int>HVA], sought[<int>GFN], sought[<int>PFN] = hva is not None, gfn is not None, pfn is not None
        wanted[<int>HVA] = 0 if hva is None else hva >> SHIFT
        wanted[<int>GFN] = gfn or 0
        wanted[<int>PFN] = pfn or 0
        found = []
        seen = set()
        cdef uint64_t first = 0 if self.each or self.count < self.limit else self.count - self.limit
        at = self.count
        while at > first and (kinds or <uint64_t>len(found) < last):
            at -= 1
            if _touches(&self.records[at], sought, wanted, mm):
                number = (<Layout>self.records[at].layout).number
                if <uint64_t>len(found) < last or number not in seen:
                    seen.add(number)
                    found.append(_event(&self.records[at]))
        return found[::-1]

    def earlier(self, *, pfn=None, gfn=None, hva=None, mm=None):
        """How many events of that page were forgotten, at least: the most for any of the three that is given."""
        total = 0
        for space, page in ((HVA, None if hva is None else hva >> SHIFT), (GFN, gfn), (PFN, pfn)):
            if page is not None:
                known = self.forgotten.get(_key(<Space>space, self.mms.get(mm, 0) if space == HVA else 0, page))
                total = max(total, known[0] if known else 0)
        return total


cdef void _drop(Record *record) noexcept:
    cdef Layout layout = <Layout>record.layout
    cdef int at
    for at in range(layout.count if layout.count <= INLINE else 1):
        Py_XDECREF(record.values[at])
    Py_XDECREF(record.time)
    Py_XDECREF(record.actor)


cdef inline uint64_t _key(Space space, uint64_t mm, uint64_t page) noexcept:
    return <uint64_t>space << 60 | mm << 52 | (page & (<uint64_t>1 << 52) - 1)


cdef inline object _value(Record *record, int at):
    if (<Layout>record.layout).count > INLINE:
        return (<tuple>record.values[0])[at]
    return <object>record.values[at]


cdef bint _bounds(Record *record, Layout layout, int at, uint64_t *first, uint64_t *end) except? False:
    """Whether field ``at``, which is no runs, names pages ``[first, end)``."""
    value = _value(record, at)
    if value is None:
        return False
    try:
        first[0] = value
        end[0] = _value(record, at + 1) if layout.roles[at] == START else 0
    except OverflowError:  # there is no such page
        return False
    if layout.roles[at] == START:
        if end[0] <= first[0]:
            return False
        if layout.bytes[at]:
            first[0] >>= SHIFT
            end[0] = (end[0] - 1 >> SHIFT) + 1
        return True
    if layout.roles[at] == ADDRESS:
        first[0] >>= SHIFT
    end[0] = first[0] + 1
    if layout.length >= 0 and layout.spaces[at] != PFN:
        end[0] = first[0] + <uint64_t>_value(record, layout.length)
    return True


cdef bint _touches(Record *record, bint *sought, uint64_t *wanted, object mm) except -1:
    """Whether it names one of the pages ``wanted``, by space, of those spaces that are ``sought``."""
    cdef Layout layout = <Layout>record.layout
    cdef uint64_t first, end, page
    cdef int at
    for at in range(layout.count):
        if layout.roles[at] == NO_PAGE or not sought[<int>layout.spaces[at]]:
            continue
        if layout.spaces[at] == HVA and mm is not None and layout.mm >= 0 and _value(record, layout.mm) != mm:
            continue
        page = wanted[<int>layout.spaces[at]]
        if layout.roles[at] == RUNS:
            for run in _value(record, at):
                if run[0] <= page < run[0] + run[1]:
                    return True
        elif _bounds(record, layout, at, &first, &end) and first <= page < end:
            return True
    return False


cdef object _event(Record *record):
    cdef Layout layout = <Layout>record.layout
    fields = {}
    cdef int at
    for at in range(layout.count):
        fields[layout.names[at]] = _value(record, at)
    return Event(record.seq, <object>record.time, <object>record.actor, record.cause, layout.name, fields)
