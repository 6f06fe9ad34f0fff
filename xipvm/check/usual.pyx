"""The oracle's native part: what happens usually, and cannot be wrong.

The rules are oracle.py's and its fellows', in Python. Here is who is asked about an event:

1. The history keeps it.
2. Of ranges whose start has not returned it is seen whether they have now.
3. If its kind is one of ``_USUAL``, the function for it here looks whether everything is as it mostly is: who installs is a
   notifier, no range is open, the primary entry is the same and allows as much... If so it brings the world up to date,
   counts the invariants that were asked, and that is all. It changes nothing before it is sure.
4. Otherwise the rule for the kind is called, ``_on_<kind>`` of the Oracle, with an :class:`Event`.
5. Then those that others registered (``on``).

So each function here says again, for the usual case, what the rule of the same name says for all cases; with
``usual=False`` an oracle does without them and has to come to the same (tests/check/test_usual.py).
"""

from cpython.object cimport PyObject
from libc.stdint cimport uint64_t

from xipvm.check.world cimport MAY_WRITE, Area, Entry, Process, Range, Vm, World, entry_of
from xipvm.trace.emit cimport Layout, Listener, Said, event_of
from xipvm.trace.history cimport History
from xipvm.trace.table cimport Slot

from xipvm.errors import InternalError

cdef extern from "Python.h":
    PyObject *PyDict_GetItem(object dict, object key)
    PyObject *PyTuple_GET_ITEM(object tuple, Py_ssize_t index)

cdef enum:
    SHIFT = 12
    HUGE = 128                      # of a primary entry's flags

cdef enum:
    I1
    I2
    I3
    I4
    I5
    I6
    I10
    I13
    COUNTED

_NAMES = ("I1", "I2", "I3", "I4", "I5", "I6", "I10", "I13")

ctypedef bint (*Usual)(Judge, Said *) except -1


cdef inline uint64_t _number(Said *said, int at) except? 0xFFFFFFFFFFFFFFFF:
    return <uint64_t><object>said.values[at]


cdef inline str _text(Said *said, int at):
    return <str><object>said.values[at]


cdef inline bint _writes(str rights):
    return rights is not None and "w" in rights


# ---- by kind. Fields come by position; _USUAL says which ones are expected where.

cdef bint page_alloc(Judge self, Said *said) except -1:
    cdef uint64_t pfn = _number(said, 0)
    self.world.freed.remove(pfn)
    self.world.written.remove(pfn)
    return True


cdef bint page_free(Judge self, Said *said) except -1:
    cdef World world = self.world
    cdef uint64_t pfn, first, count
    cdef bint new
    runs = <object>said.values[0]
    if world.swapped:
        return False
    for first, count in runs:
        for pfn in range(first, first + count):
            if world.freed.find(pfn) != NULL or world.holders.find(pfn) != NULL:
                return False
    for first, count in runs:
        for pfn in range(first, first + count):
            world.freed.put(pfn, &new).a = said.seq
            if not new:  # it is in there twice
                _take_back(world, runs, said.seq)
                return False
    for first, count in runs:
        self.counts[I5] += count
        for pfn in range(first, first + count):
            world.written.remove(pfn)
    return True


cdef int _take_back(World world, object runs, uint64_t seq) except -1:
    cdef uint64_t pfn, first, count
    cdef Slot *slot
    for first, count in runs:
        for pfn in range(first, first + count):
            slot = world.freed.find(pfn)
            if slot != NULL and slot.a == seq:
                world.freed.remove(pfn)
    return 0


cdef bint pte_set(Judge self, Said *said) except -1:
    cdef uint64_t flags = _number(said, 3)
    if flags & HUGE or self.world.swapped:
        return False
    cdef Process process = self.world.mm(_text(said, 0))
    page = _number(said, 1) >> SHIFT
    cdef PyObject *before = PyDict_GetItem(process.entries, page)
    if before != NULL and (
        <uint64_t><object>PyTuple_GET_ITEM(<object>before, 0) != _number(said, 2)
        or <uint64_t><object>PyTuple_GET_ITEM(<object>before, 1) & ~flags & MAY_WRITE
    ):
        return False
    process.entries[page] = (<object>said.values[2], <object>said.values[3])
    return True


cdef bint pte_clear(Judge self, Said *said) except -1:
    """All of a range goes, inside an open one, and nobody has it any more."""
    cdef World world = self.world
    cdef Process process = world.mm(_text(said, 0))
    cdef uint64_t start = _number(said, 1) >> SHIFT, end = (_number(said, 2) + 4095) >> SHIFT
    cdef uint64_t count, number, named = 0, asked = 0, places = 0
    cdef Area slot
    cdef bint watched = bool(process.intervals), listened = watched or bool(process.notifiers)
    cdef Vm vm
    cdef Range opened
    if world.swapped:
        return False
    pages = process.mapped(start, end)
    for _, count in <object>said.values[3]:
        named += count
    if named != <uint64_t>len(pages):
        return False
    if listened and pages:
        for opened in world.open.values():
            if opened.start <= start and end <= opened.end and opened.mm == process.name:
                break
        else:
            return False
        watchers = world.watchers(process.name)
        for vm in watchers:
            watched = watched or not vm.gone
        for vm in watchers:
            held = [table for table in (*vm.tables(), *world.tlbs.values()) if table]
            for slot in vm.slots.values():
                for page in pages:
                    number = page
                    if slot.page <= number < slot.page + slot.pages:
                        places += 1
                        if held:
                            gfn = slot.gfn + (number - slot.page)
                            for table in held:
                                if PyDict_GetItem(table, gfn) != NULL:
                                    return False
        asked = len(pages)
        self.counts[I1] += asked if watched else 0
        self.counts[I3] += asked
        self.counts[I10] += places
    if len(pages) == 1:
        process.cleared = pages[0], process.entries[pages[0]][0]
    for page in pages:
        del process.entries[page]
    return True


cdef bint spte_set(Judge self, Said *said) except -1:
    cdef World world = self.world
    cdef Vm vm = world.vm(_text(said, 0))
    cdef bint write = _writes(_text(said, 3)), new
    cdef Process process
    cdef PyObject *entry
    cdef uint64_t pfn = _number(said, 2)
    gfn = <object>said.values[1]
    if vm.gone or world.open or vm.pins or vm.mm is None:
        return False
    page = vm.page_of(gfn)
    process = world.mm(vm.mm)
    if vm.name in process.intervals:
        return False
    if page is not None:
        entry = PyDict_GetItem(process.entries, page)
        if entry == NULL or <uint64_t><object>PyTuple_GET_ITEM(<object>entry, 0) != pfn:
            return False
        if write and not <uint64_t><object>PyTuple_GET_ITEM(<object>entry, 1) & MAY_WRITE:
            return False
        self.counts[I2] += 1
        self.counts[I4] += 1
    self.counts[I13] += 1
    world.hold(vm.sptes, gfn, entry_of(pfn, write, said.seq, True))
    if write:
        world.written.put(pfn, &new).a = said.seq
    return True


cdef bint spte_zap(Judge self, Said *said) except -1:
    cdef Vm vm = self.world.vm(_text(said, 0))
    cdef Range opened
    if vm.huge:
        return False
    for opened in self.returning_list:
        if opened.actor == <str>said.actor and opened.mm == vm.mm:
            _swallow(opened, vm, _number(said, 1), _number(said, 2))
    self.world.release_range(vm.sptes, _number(said, 1), _number(said, 2))
    return True


cdef int _swallow(Range opened, Vm vm, uint64_t start, uint64_t end) except -1:
    cdef uint64_t gfn, page
    cdef Area slot
    cdef PyObject *found
    for slot in vm.slots.values():
        for gfn in range(max(start, slot.gfn), min(end, slot.gfn + slot.pages)):
            page = slot.page + (gfn - slot.gfn)
            if opened.start <= page < opened.end:
                found = PyDict_GetItem(vm.sptes, gfn)
                if found != NULL and (<Entry>found).young:
                    opened.young.add(page)
    return 0


cdef bint tlb_insert(Judge self, Said *said) except -1:
    cdef World world = self.world
    cdef Vm vm
    cdef uint64_t pfn = _number(said, 2)
    cdef bint write = _writes(_text(said, 3)), known = False
    cdef PyObject *found
    gfn = <object>said.values[1]
    for vm in world.vms.values():
        found = PyDict_GetItem(vm.sptes, gfn)
        if found != NULL and (<Entry>found).pfn == pfn and ((<Entry>found).write or not write):
            known = True
            break
    if not known:
        return False
    cdef PyObject *tlb = PyDict_GetItem(world.tlbs, <object>said.values[0])
    if tlb == NULL:
        return False
    found = PyDict_GetItem(<object>tlb, gfn)
    if found != NULL and (<Entry>found).pfn == pfn and (<Entry>found).write:
        write = True
    self.counts[I10] += 1
    world.hold(<dict>tlb, gfn, entry_of(pfn, write, said.seq, True))
    return True


cdef bint tlb_flush(Judge self, Said *said) except -1:
    cdef PyObject *tlb = PyDict_GetItem(self.world.tlbs, <object>said.values[0])
    if tlb != NULL:
        self.world.release_all(<dict>tlb)
    return True


cdef bint host_tlb_insert(Judge self, Said *said) except -1:
    cdef Process process = self.world.mm(_text(said, 0))
    tlb = process.tlbs.get(<object>said.values[4])
    if tlb is None:
        return False
    page = _number(said, 1) >> SHIFT
    self.world.hold(tlb, page, entry_of(_number(said, 2), _text(said, 3) == "rw", said.seq, True))
    return True


cdef bint primary_tlb_flush(Judge self, Said *said) except -1:
    cdef Process process = self.world.mm(_text(said, 0))
    for tlb in process.tlbs.values():
        self.world.release_range(tlb, _number(said, 1) >> SHIFT, (_number(said, 2) + 4095) >> SHIFT)
    return True


cdef bint range_start(Judge self, Said *said) except -1:
    cdef World world = self.world
    name = <object>said.values[0], <object>said.values[4]
    if name in world.open:
        return False
    cdef Range opened = Range(
        name[1],
        name[0],
        _number(said, 1) >> SHIFT,
        (_number(said, 2) + 4095) >> SHIFT,
        <object>said.actor,
        said.seq,
        said.cause,
    )
    opened.inside.add(said.seq)
    self.counts[I6] += 1
    self.last_range = said.seq
    world.open[name] = opened
    self.returning_list.append(opened)
    return True


cdef bint range_end(Judge self, Said *said) except -1:
    cdef World world = self.world
    name = <object>said.values[0], <object>said.values[4]
    cdef PyObject *found = PyDict_GetItem(world.open, name)
    if found == NULL or (<Range>found).owed:
        return False
    opened = <Range>found
    del world.open[name]
    self.counts[I6] += 1
    self.last_range = said.seq
    if self.returning_list and opened in self.returning_list:
        self.returning_list.remove(opened)
    return True


cdef class _Way:
    """What is done about a kind of event."""

    cdef Usual usual                # NULL for none
    cdef object rule                # None for none
    cdef list further               # (handler, since_range)


cdef Usual _usual_for(str kind, tuple names) except? NULL:
    cdef Usual found = NULL
    expected = names
    if kind == "page_alloc":
        found, expected = page_alloc, ("pfn",)
    elif kind == "page_free":
        found, expected = page_free, ("pages",)
    elif kind == "pte_set":
        found, expected = pte_set, ("mm", "hva", "pfn", "flags")
    elif kind == "pte_clear":
        found, expected = pte_clear, ("mm", "start", "end", "pages")
    elif kind == "spte_set":
        found, expected = spte_set, ("vm", "gfn", "pfn", "rights")
    elif kind == "spte_zap":
        found, expected = spte_zap, ("vm", "start", "end", "pages")
    elif kind == "tlb_insert":
        found, expected = tlb_insert, ("vcpu", "gfn", "pfn", "rights")
    elif kind == "tlb_flush":
        found, expected = tlb_flush, ("vcpu", "reason")
    elif kind == "host_tlb_insert":
        found, expected = host_tlb_insert, ("mm", "hva", "pfn", "rights", "thread")
    elif kind == "primary_tlb_flush":
        found, expected = primary_tlb_flush, ("mm", "start", "end")
    elif kind == "mmu_notifier_invalidate_range_start":
        found, expected = range_start, ("mm", "start", "end", "event", "range")
    elif kind == "mmu_notifier_invalidate_range_end":
        found, expected = range_end, ("mm", "start", "end", "event", "range")
    if names[: len(expected)] != expected:
        raise InternalError(f"event {kind} has fields {names}; the oracle expects {expected}")
    return found


cdef class Judge(Listener):
    """Who is asked about an event, in order. ``rules``: the Oracle's, by kind; functions of oracle, event and fields."""

    cdef readonly uint64_t events
    cdef readonly World world
    cdef readonly History history
    cdef list returning_list
    cdef public list _changes
    cdef public uint64_t last_range
    cdef dict checked
    cdef uint64_t counts[8]          # see _NAMES
    cdef dict rules
    cdef dict further               # what others registered, by kind
    cdef bint fast
    cdef list ways                  # of _Way, by the layout's number; None for what has not been said yet

    def __init__(self, rules, names, history, usual):
        self.world = World()
        self.history = history
        self.returning_list = []
        self._changes = []
        self.checked = dict.fromkeys(names, 0)
        self.rules = rules
        self.further = {}
        self.fast = usual
        self.ways = []

    @property
    def checks(self):
        """How often each invariant was asked. May be added to."""
        cdef int at
        for at in range(COUNTED):
            if self.counts[at]:
                self.checked[_NAMES[at]] += self.counts[at]
                self.counts[at] = 0
        return self.checked

    @property
    def _returning(self):
        return self.returning_list

    def on(self, kind, handler, *, since_range=False):
        """Call ``handler(event, fields)`` at every event of ``kind``, behind the oracle's own rules for it.

        With ``since_range`` only when a range has started or ended, or in 2008 a page was told of, in any mm, behind
        the event that caused this one.
        """
        self.further.setdefault(kind, []).append((handler, since_range))
        self.ways = []

    cdef int hear(self, Said *said) except -1:
        cdef Layout layout = <Layout>said.layout
        cdef _Way way
        cdef Py_ssize_t at
        self.events += 1
        self.history.keep(said)
        event = None
        if self.returning_list:
            self._see_returns(said)
        if self._changes:
            event = event_of(said)
            self._see_told(event)
        way = self.ways[layout.number] if layout.number < <int>len(self.ways) else None
        if way is None:
            way = self._way(layout)
        if way.rule is not None and (way.usual == NULL or not way.usual(self, said)):
            if event is None:
                event = event_of(said)
            way.rule(self, event, event[5])
        if way.further is not None:
            for at in range(len(way.further)):
                handler, since_range = way.further[at]
                if not since_range or said.cause < self.last_range:
                    if event is None:
                        event = event_of(said)
                    handler(event, event[5])
        return 0

    cdef int _see_returns(self, Said *said) except -1:
        """What an actor says is caused by its start until that has returned."""
        cdef Range opened
        for opened in tuple(self.returning_list):
            if <str>said.actor != opened.actor:
                continue
            if said.cause in opened.inside:
                opened.inside.add(said.seq)
            else:
                opened.returned = True
                self.returning_list.remove(opened)
                if opened.owed:
                    self._paid(opened, event_of(said))
        return 0

    cdef _Way _way(self, Layout layout):
        """What is done about this kind, from now on."""
        cdef _Way way = _Way.__new__(_Way)
        way.rule = self.rules.get(layout.name)
        if self.fast and way.rule is not None:
            way.usual = _usual_for(layout.name, layout.names)
        way.further = self.further.get(layout.name)
        while len(self.ways) <= layout.number:
            self.ways.append(None)
        self.ways[layout.number] = way
        return way
