"""What the events so far say of the world: primary entries, shadow entries, TLBs, ranges that are open.

This is state only; oracle.py asks it and judges, and usual.pyx keeps it where nothing can be wrong. It is native because every
event reads or changes some of it. Tables are dictionaries, so that rules are plain Python. Page numbers throughout: a page of
an mm is its hva >> 12.

All of it is bounded by the memory that was touched and by what is there at a time (address spaces, VMs, vCPUs): of
address spaces and VMs that are gone ``GONE`` are known, so that who goes on using them is found out.
"""

cimport cython
from libc.stdint cimport uint64_t

from xipvm.trace.table cimport Slot, Table

WRITE = MAY_WRITE
GONE = 1024


cdef class Numbers(Table):
    """A number by page number: what of a dictionary's ways the rules need."""

    def __getitem__(self, uint64_t key):
        cdef Slot *slot = self.find(key)
        if slot == NULL:
            raise KeyError(key)
        return slot.a

    def __setitem__(self, uint64_t key, uint64_t value):
        cdef bint new
        self.put(key, &new).a = value

    def get(self, uint64_t key, default=None):
        """The number of ``key``."""
        cdef Slot *slot = self.find(key)
        return default if slot == NULL else slot.a

    def pop(self, uint64_t key, default=None):
        """The number of ``key``, which is there no longer."""
        cdef Slot *slot = self.find(key)
        if slot == NULL:
            return default
        found = slot.a
        self.remove(key)
        return found


cdef class Area:
    """A memslot: guest frames ``[gfn, gfn + pages)`` are the host's pages from ``page`` on."""

    def __init__(self, gfn, pages, page):
        self.gfn = gfn
        self.pages = pages
        self.page = page


cdef class Range:
    """A range that was announced and has not ended. Pages, half-open.

    ``returned``: every notifier has been told. ``inside``: until then, what its start has caused, by way of others
    too, its own event first. ``cause``: what its operation is done for, as all of that operation's events say.
    """

    def __init__(self, id, mm, start, end, actor, seq, cause):
        self.id = id
        self.mm = mm
        self.start = start
        self.end = end
        self.actor = actor
        self.seq = seq
        self.cause = cause
        self.inside = set()
        self.young = set()
        self.owed = []


@cython.freelist(256)
cdef class Entry:
    """A translation that somebody holds, since event ``seq``."""

    def __init__(self, pfn, write, seq, young=True):
        self.pfn = pfn
        self.write = write
        self.seq = seq
        self.young = young

    def __eq__(self, other):
        if not isinstance(other, Entry):
            return NotImplemented
        return (self.pfn, self.write, self.seq, self.young) == (other.pfn, other.write, other.seq, other.young)

    def __repr__(self):
        return f"Entry(pfn={self.pfn:#x}, write={self.write}, seq={self.seq}, young={self.young})"


cdef Entry entry_of(uint64_t pfn, bint write, uint64_t seq, bint young):
    cdef Entry made = Entry.__new__(Entry)
    made.pfn = pfn
    made.write = write
    made.seq = seq
    made.young = young
    return made


cdef class Vm:
    """A secondary MMU with shadow entries by guest frame."""

    def __init__(self, name):
        self.name = name
        self.slots = {}
        self.sptes = {}
        self.chiplets = {}
        self.huge = {}
        self.pins = {}

    def tables(self):
        """All of its entries by guest frame: the shadow entries, and those of each of its TLBs."""
        return (self.sptes, *self.chiplets.values())

    def zapped(self, start, end):
        """What goes when ``[start, end)`` is removed: huge entries go as a whole."""
        for first in [first for first, pages in self.huge.items() if first < end and start < first + pages]:
            pages = self.huge.pop(first)
            start, end = min(start, first), max(end, first + pages)
        return start, end

    def gfns(self, uint64_t page):
        """Where the guest sees the host's ``page``."""
        cdef Area slot
        found = []
        for slot in self.slots.values():
            if slot.page <= page < slot.page + slot.pages:
                found.append(slot.gfn + (page - slot.page))
        return found

    def page(self, uint64_t gfn):
        """The host's page behind ``gfn``."""
        return self.page_of(gfn)

    cdef object page_of(self, uint64_t gfn):
        cdef Area slot
        for slot in self.slots.values():
            if slot.gfn <= gfn < slot.gfn + slot.pages:
                return slot.page + (gfn - slot.gfn)
        return None


cdef class Process:
    """An mm: its entries by page, flags as in ``pte_set``; and the TLBs of its threads."""

    def __init__(self, name, protocol="modern"):
        self.name = name
        self.protocol = protocol
        self.entries = {}
        self.notifiers = set()
        self.intervals = set()
        self.tlbs = {}
        self.devices = {}
        self.iotlbs = {}
        self.aged = set()
        self.cleared = (-1, 0)

    def mapped(self, start, end):
        """The pages of ``[start, end)`` that have an entry, in no order."""
        if end - start > len(self.entries):
            return [page for page in self.entries if start <= page < end]
        return [page for page in range(start, end) if page in self.entries]

    @property
    def idle(self):
        """Nothing is left of it but its name."""
        held = self.entries or any(self.tlbs.values()) or any(self.devices.values()) or any(self.iotlbs.values())
        return self.dead and not held


cdef class World:
    """Everything that the events have said. Names that were never announced come into being when they are used."""

    def __init__(self):
        self.mms = {}
        self.vms = {}
        self.tlbs = {}
        self.open = {}
        self.swapped = {}
        self.freed = Numbers()
        self.written = Numbers()
        self.holders = Numbers()

    cpdef Process mm(self, str name):
        """The mm ``name``."""
        found = self.mms.get(name)
        if found is None:
            if len(self.mms) > GONE:
                _forget(self.mms, [name for name, process in self.mms.items() if process.idle])
            found = self.mms[name] = Process(name)
        return <Process>found

    cpdef Vm vm(self, str name):
        """The secondary MMU ``name``."""
        found = self.vms.get(name)
        if found is None:
            if len(self.vms) > GONE:
                gone = [name for name, vm in self.vms.items() if vm.gone and not any(vm.tables())]
                _forget(self.vms, gone)
            found = self.vms[name] = Vm(name)
        return <Vm>found

    def covering(self, str mm, uint64_t page):
        """The open ranges that contain ``page``."""
        cdef Range opened
        found = []
        for opened in self.open.values():
            if opened.start <= page < opened.end and opened.mm == mm:
                found.append(opened)
        return found

    def watchers(self, str mm):
        """The secondary MMUs that are notifiers of ``mm``."""
        cdef Vm vm
        return [vm for vm in self.vms.values() if vm.mm is not None and vm.mm == mm]

    cpdef int hold(self, dict table, object key, Entry entry) except -1:
        """``table[key] = entry``."""
        cdef bint new
        before = table.get(key)
        if before is not None:
            self.drop((<Entry>before).pfn)
        table[key] = entry
        self.holders.put(entry.pfn, &new).a += 1
        return 0

    cpdef int release(self, dict table, object key) except -1:
        """``del table[key]``, if it is there."""
        before = table.pop(key, None)
        if before is not None:
            self.drop((<Entry>before).pfn)
        return 0

    cpdef int release_range(self, dict table, uint64_t start, uint64_t end) except -1:
        """:meth:`release` of ``[start, end)``."""
        cdef uint64_t key
        if not table or end <= start:
            return 0
        if end - start > <uint64_t>len(table):
            for found in [found for found in table if start <= <uint64_t>found < end]:
                self.release(table, found)
        else:
            for key in range(start, end):
                self.release(table, key)
        return 0

    cpdef int release_all(self, dict table) except -1:
        """:meth:`release` of everything."""
        for entry in table.values():
            self.drop((<Entry>entry).pfn)
        table.clear()
        return 0

    cdef int drop(self, uint64_t pfn) except -1:
        cdef Slot *slot = self.holders.find(pfn)
        slot.a -= 1
        if not slot.a:
            self.holders.remove(pfn)
        return 0

    def who_holds(self, pfn):
        """Everybody who translates to ``pfn``, in words."""
        found = [
            f"{vm.name} maps guest frame {gfn:#x} to it since #{entry.seq}"
            for vm in self.vms.values()
            for table in vm.tables()
            for gfn, entry in table.items()
            if entry.pfn == pfn
        ]
        found += [
            f"vcpu{vcpu} has guest frame {gfn:#x} in its TLB since #{entry.seq}"
            for vcpu, tlb in self.tlbs.items()
            for gfn, entry in tlb.items()
            if entry.pfn == pfn
        ]
        found += [
            f"{device} on {process.name} has {page << 12:#x} in its TLB since #{entry.seq}"
            for process in self.mms.values()
            for device, tlb in (*process.devices.items(), *process.iotlbs.items())
            for page, entry in tlb.items()
            if entry.pfn == pfn
        ]
        found += [
            f"{thread} of {process.name} has {page << 12:#x} in its TLB since #{entry.seq}"
            for process in self.mms.values()
            for thread, tlb in process.tlbs.items()
            for page, entry in tlb.items()
            if entry.pfn == pfn
        ]
        return found


cdef int _forget(dict known, list gone) except -1:
    """Drop the older half of those that are gone."""
    for name in gone[: (len(gone) + 1) // 2]:
        del known[name]
    return 0
