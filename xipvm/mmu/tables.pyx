"""Page tables: radix trees of 512 × u64 tables, for the primary and the secondary MMUs alike.

The tree knows three things about an entry: zero is empty, bit 7 marks a 2 MiB entry (stored at level 2),
bits 12..51 are a pfn. The rest is the owner's business, except for the operations that are fused here because
they run once a page: ``gup``, ``map_anon``, ``zap_mapped``, ``protect`` and ``copy_to`` know the primary PTE's bits (pte.py).

Invariants:

* Tables come from one pool, 4 KiB aligned, all zero when handed out; ``fill`` counts the non-zero entries of each.
* A table whose last entry goes is freed at once (the root excepted), so walks cost what is mapped,
  not what is addressable.
* An intermediate entry is (table number << 12) | 1.
* A huge entry is one entry: it counts once, and an operation on a part of the pages that it maps is refused
  (InternalError: whoever calls splits it first), except for those that only look and for ``zap`` and the changes of
  bits, which take it as a whole.

The file is long because nearly all of it is one extension type: operations are fused with the walk of the tables, so
that none calls anything per page, and that needs the type's C fields and functions.
"""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap

from xipvm.errors import InternalError, OutOfFrames

from xipvm.mmu.frames cimport FrameMeta, HostMemory, folio_of
from xipvm.mmu.pte cimport (
    PTE_ACCESSED,
    PTE_ANON,
    PTE_DIRTY,
    PTE_EXCLUSIVE,
    PTE_MIGRATION,
    PTE_PRESENT,
    PTE_PROTNONE,
    PTE_SPECIAL,
    PTE_SWAP,
    PTE_UFFD_WP,
    PTE_WRITE,
    PTE_EXEC,
)

cdef extern from "<sys/mman.h>":
    int MAP_NORESERVE

cdef extern from "<endian.h>":
    uint64_t le64toh(uint64_t)

cdef extern from *:
    int ctz "__builtin_ctzll"(uint64_t)  # of what is not 0
    void prefetch "__builtin_prefetch"(uint64_t *, int)

cdef enum:
    ENTRIES = 512
    MAX_LEVELS = 4
    POOL_TABLES = 1 << 20  # 4 GiB of address space: leaf tables for 2 TiB

    HUGE = 1 << 7  # in primary and secondary entries

    WORD = 64               # pages that a word of a bitmap is for
    AHEAD = 64              # bytes of a bitmap: a leaf table. By themselves processors fetch no further than a page

    # frame flags, see frames.pyx
    PG_ANON = 1 << 1
    PG_DIRTY = 1 << 2
    PG_REFERENCED = 1 << 3
    PG_SWAPBACKED = 1 << 4
    PG_HUGETLB = 1 << 26

cdef uint64_t PFN_MASK = 0x000FFFFFFFFFF000
cdef uint64_t NO_REGION = ~<uint64_t>0
cdef uint64_t MMIO = <uint64_t>1 << 62

# ---- the pool of tables ----

cdef uint64_t *pool = NULL
cdef uint16_t *pool_fill = NULL
cdef uint32_t pool_next = 1
cdef uint32_t pool_free = 0     # first free table; word 0 of a free table is the next one


cdef int open_pool() except -1:
    global pool, pool_fill
    cdef void *tables = mmap(NULL, <size_t>POOL_TABLES * 4096, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    cdef void *fill = mmap(NULL, POOL_TABLES * sizeof(uint16_t), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if tables == MAP_FAILED or fill == MAP_FAILED:
        raise MemoryError("no address space for page tables")
    pool = <uint64_t *>tables
    pool_fill = <uint16_t *>fill
    return 0


cdef uint64_t *alloc_table() except NULL:
    global pool_next, pool_free
    cdef uint64_t *table
    if pool == NULL:
        open_pool()
    if pool_free:
        table = pool + <uint64_t>pool_free * ENTRIES
        pool_free = <uint32_t>table[0]
        table[0] = 0
    elif pool_next < POOL_TABLES:
        table = pool + <uint64_t>pool_next * ENTRIES
        pool_next += 1
    else:
        raise MemoryError("page table pool is used up")
    return table


cdef inline uint32_t number_of(uint64_t *table) noexcept:
    return <uint32_t>((table - pool) // ENTRIES)


cdef inline uint16_t *fill_of(uint64_t *table) noexcept:
    return &pool_fill[(table - pool) // ENTRIES]


cdef inline uint64_t *child_of(uint64_t entry) noexcept:
    return pool + (entry >> 12) * ENTRIES


cdef inline bint is_leaf(uint64_t entry, int level) noexcept:
    return level == 1 or (level == 2 and entry & HUGE)


cdef void free_table(uint64_t *table) noexcept:
    """The table's entries are all zero."""
    global pool_free
    table[0] = pool_free
    pool_free = number_of(table)


cdef void free_tree(uint64_t *table, int level) noexcept:
    cdef int i
    if level > 1:
        for i in range(ENTRIES):
            if table[i] and not is_leaf(table[i], level):
                free_tree(child_of(table[i]), level - 1)
    memset(table, 0, ENTRIES * 8)
    fill_of(table)[0] = 0
    free_table(table)


# ---- runs of page numbers, built while walking ----

cdef struct Runs:
    uint64_t *pairs
    Py_ssize_t count
    Py_ssize_t capacity
    bint wanted


cdef inline int add_run(Runs *runs, uint64_t first, uint64_t count) except -1:
    """Appends to the last run where the numbers adjoin it at either end; a run is a set, not an order."""
    cdef uint64_t *last
    cdef void *more
    if runs.count:
        last = runs.pairs + 2 * (runs.count - 1)
        if first == last[0] + last[1]:
            last[1] += count
            return 0
        if first + count == last[0]:
            last[0] = first
            last[1] += count
            return 0
    if runs.count == runs.capacity:
        runs.capacity = 16 if runs.capacity == 0 else 2 * runs.capacity
        more = realloc(runs.pairs, runs.capacity * 2 * sizeof(uint64_t))
        if more == NULL:
            raise MemoryError
        runs.pairs = <uint64_t *>more
    runs.pairs[2 * runs.count] = first
    runs.pairs[2 * runs.count + 1] = count
    runs.count += 1
    return 0


cdef list take_runs(Runs *runs):
    cdef Py_ssize_t i
    cdef list result = [(runs.pairs[2 * i], runs.pairs[2 * i + 1]) for i in range(runs.count)]
    free(runs.pairs)
    runs.pairs = NULL
    return result


# ---- operations on the leaf entries of a range ----

cdef enum Verb:
    ZAP             # clear; runs collect pfns
    ZAP_MAPPED      # clear primary PTEs; frames go into the gather
    BITS            # entry = (entry & keep) | add where (entry & need) == need
    PROTECT         # likewise on mapped primary PTEs, and WRITE where all bits of `upgrade` are there
    COPY            # primary PTEs into another table, as fork does
    FIND            # stop at the first non-zero entry

cdef struct Pass:
    Verb verb
    uint64_t start
    uint64_t end
    Runs runs
    uint64_t keep
    uint64_t add
    uint64_t need
    uint64_t upgrade
    uint64_t changed
    uint64_t flushes    # changed entries that a TLB may hold
    uint64_t found
    bint keep_anon
    bint keep_markers
    bint cow


cdef struct Cursor:
    uint64_t region         # the entries are those of pages [ENTRIES * region, ENTRIES * (region + 1))
    uint64_t within         # the bits of a page that select one of them; 0 where a huge entry is all, or nothing is
    uint64_t *entries
    uint64_t none           # what is found where nothing is mapped: 0


@cython.final
cdef class Segments:
    """Ranges of pages whose mapped entries all have the same flags; nothing is mapped between them."""

    cdef list done
    cdef uint64_t start
    cdef uint64_t end
    cdef uint64_t flags

    def __cinit__(self):
        self.done = []

    cdef int add(self, uint64_t page, uint64_t flags) except -1:
        cdef uint64_t end = page + (ENTRIES if flags & HUGE else 1)
        flags &= 0xFFF & ~(PTE_ACCESSED | PTE_DIRTY)
        if self.end and flags == self.flags:
            self.end = end
            return 0
        self.take()
        self.start, self.end, self.flags = page, end, flags
        return 0

    cdef list take(self):
        if self.end:
            self.done.append((self.start, self.end, self.flags))
            self.end = 0
        return self.done


@cython.final
@cython.freelist(16)
cdef class GupPage:
    """What get_user_pages found: the frame, and whether the primary entry allows writing."""

    cdef readonly uint64_t pfn
    cdef readonly bint writable

    def __init__(self, uint64_t pfn, bint writable):
        self.pfn = pfn
        self.writable = writable

    def __eq__(self, other):
        return (
            isinstance(other, GupPage)
            and self.pfn == (<GupPage>other).pfn
            and self.writable == (<GupPage>other).writable
        )

    def __hash__(self):
        return hash((self.pfn, self.writable))

    def __repr__(self):
        return f"GupPage(pfn={self.pfn:#x}, writable={bool(self.writable)})"


cdef class PageTable:
    def __cinit__(self, int levels):
        if not 2 <= levels <= MAX_LEVELS:
            raise ValueError(f"a page table has 2 to {MAX_LEVELS} levels, not {levels}")
        self.levels = levels
        self.root = alloc_table()
        self.tables = 1

    def __dealloc__(self):
        if self.root != NULL:
            free_tree(self.root, self.levels)
            self.root = NULL

    # ---- one entry ----

    cdef uint64_t *lookup(self, uint64_t index, int *level) noexcept:
        cdef uint64_t *table = self.root
        cdef int at = self.levels
        cdef uint64_t *slot
        if index >> (9 * at):
            return NULL
        while True:
            slot = table + ((index >> (9 * (at - 1))) & (ENTRIES - 1))
            if at == 1:
                level[0] = 1
                return slot
            if slot[0] == 0:
                return NULL
            if at == 2 and slot[0] & HUGE:
                level[0] = 2
                return slot
            table = child_of(slot[0])
            at -= 1

    cdef uint64_t load(self, uint64_t index) noexcept:
        cdef int level
        cdef uint64_t *slot = self.lookup(index, &level)
        return 0 if slot == NULL else slot[0]

    cdef uint64_t *ensure(self, uint64_t index) except NULL:
        cdef uint64_t *table = self.root
        cdef uint64_t *child
        cdef uint64_t *slot
        cdef int at = self.levels
        if index >> (9 * at):
            raise IndexError(f"page {index:#x} is beyond a table of {self.levels} levels")
        while True:
            slot = table + ((index >> (9 * (at - 1))) & (ENTRIES - 1))
            if at == 1:
                return slot
            if slot[0] == 0:
                child = alloc_table()
                slot[0] = (<uint64_t>number_of(child) << 12) | 1
                fill_of(table)[0] += 1
                self.tables += 1
                table = child
            elif at == 2 and slot[0] & HUGE:
                raise InternalError(f"page {index:#x} lies in a huge entry: split it first")
            else:
                table = child_of(slot[0])
            at -= 1

    cdef uint64_t store(self, uint64_t index, uint64_t entry) except? 0:
        cdef uint64_t *path[MAX_LEVELS + 1]
        cdef uint64_t *slot
        cdef uint64_t *child
        cdef uint64_t old
        cdef int at = self.levels
        cdef int leaf = 2 if entry & HUGE else 1
        if index >> (9 * at):
            raise IndexError(f"page {index:#x} is beyond a table of {self.levels} levels")
        if leaf == 2 and index & (ENTRIES - 1):
            raise InternalError(f"page {index:#x} cannot begin a huge entry")
        path[at] = self.root
        while True:
            slot = path[at] + ((index >> (9 * (at - 1))) & (ENTRIES - 1))
            if at == leaf:
                if at == 2 and slot[0] and not slot[0] & HUGE:
                    raise InternalError(f"page {index:#x}: small pages are mapped where a huge entry should go")
                break
            if slot[0] == 0:
                if entry == 0:
                    return 0
                child = alloc_table()
                slot[0] = (<uint64_t>number_of(child) << 12) | 1
                fill_of(path[at])[0] += 1
                self.tables += 1
                path[at - 1] = child
            elif at == 2 and slot[0] & HUGE:
                if entry or index & (ENTRIES - 1):
                    raise InternalError(f"page {index:#x} lies in a huge entry: split it first")
                break
            else:
                path[at - 1] = child_of(slot[0])
            at -= 1
        old = slot[0]
        slot[0] = entry
        if old == 0 and entry:
            fill_of(path[at])[0] += 1
            self.present += 1
        elif old and entry == 0:
            self.present -= 1
            fill_of(path[at])[0] -= 1
            while at < self.levels and fill_of(path[at])[0] == 0:
                free_table(path[at])
                self.tables -= 1
                at += 1
                path[at][(index >> (9 * (at - 1))) & (ENTRIES - 1)] = 0
                fill_of(path[at])[0] -= 1
        return old

    def get(self, uint64_t index):
        return self.load(index)

    def pte(self, uint64_t index):
        cdef int level
        cdef uint64_t *slot = self.lookup(index, &level)
        if slot == NULL:
            return 0
        return slot[0] + ((index & (ENTRIES - 1)) << 12) if level == 2 else slot[0]

    def set(self, uint64_t index, uint64_t entry):
        return self.store(index, entry)

    def cmpxchg(self, uint64_t index, uint64_t old, uint64_t new):
        if self.load(index) != old:
            return False
        self.store(index, new)
        return True

    # ---- tables and huge entries ----

    cdef uint64_t *pmd(self, uint64_t index) except? NULL:
        cdef uint64_t *table = self.root
        cdef uint64_t entry
        cdef int at = self.levels
        if index >> (9 * at):
            raise IndexError(f"page {index:#x} is beyond a table of {self.levels} levels")
        while at > 2:
            entry = table[(index >> (9 * (at - 1))) & (ENTRIES - 1)]
            if entry == 0:
                return NULL
            table = child_of(entry)
            at -= 1
        return table + ((index >> 9) & (ENTRIES - 1))

    def pmd_none(self, uint64_t index):
        cdef uint64_t *slot = self.pmd(index)
        return slot == NULL or slot[0] == 0

    def huge(self, uint64_t index):
        cdef uint64_t *slot = self.pmd(index)
        return slot[0] if slot != NULL and slot[0] & HUGE else 0

    def split_huge(self, uint64_t index, uint64_t first, uint64_t step=1):
        cdef uint64_t *slot = self.pmd(index)
        cdef uint64_t *table
        cdef uint64_t i
        if slot == NULL or not slot[0] & HUGE:
            raise InternalError(f"page {index:#x} lies in no huge entry")
        if first == 0 or first & HUGE:
            raise InternalError(f"page {index:#x}: {first:#x} is no small entry")
        table = alloc_table()
        for i in range(<uint64_t>ENTRIES):
            table[i] = first + ((i * step) << 12)
        fill_of(table)[0] = ENTRIES
        slot[0] = (<uint64_t>number_of(table) << 12) | 1
        self.tables += 1
        self.present += ENTRIES - 1

    def detach(self, uint64_t index):
        cdef uint64_t *slot = self.pmd(index)
        cdef uint64_t *table
        cdef list entries
        cdef uint64_t i
        if slot == NULL or slot[0] == 0:
            return []
        if slot[0] & HUGE:
            raise InternalError(f"page {index:#x} lies in a huge entry: there is no table")
        table = child_of(slot[0])
        entries = [table[i] for i in range(<uint64_t>ENTRIES)]
        self.zap(index & ~<uint64_t>(ENTRIES - 1), (index | (ENTRIES - 1)) + 1, False)
        return entries

    def attach(self, uint64_t index, list entries not None):
        cdef uint64_t first = index & ~<uint64_t>(ENTRIES - 1)
        cdef uint64_t i
        if len(entries) not in (0, ENTRIES):
            raise InternalError(f"{len(entries)} entries are no table")
        if not self.pmd_none(index):
            raise InternalError(f"page {index:#x}: there is a table already")
        for i in range(<uint64_t>len(entries)):
            if entries[i]:
                self.store(first + i, entries[i])

    # ---- ranges ----

    cdef int check_range(self, uint64_t start, uint64_t end) except -1:
        if start > end or end > <uint64_t>1 << (9 * self.levels):
            raise IndexError(f"[{start:#x}, {end:#x}) is no range of a table of {self.levels} levels")
        return 0

    def next_present(self, uint64_t start, uint64_t end):
        cdef Pass todo
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end = FIND, start, end
        run_pass(self, &todo, None, None, None)
        return <int64_t>todo.found if todo.changed else -1

    def entries(self, uint64_t start, uint64_t end):
        cdef Pass todo
        cdef int level
        cdef uint64_t entry
        cdef list result = []
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end = FIND, start, end
        self.check_range(start, end)
        while todo.start < end:
            todo.changed = 0
            run_pass(self, &todo, None, None, None)
            if not todo.changed:
                break
            entry = self.lookup(todo.found, &level)[0]
            if level == 2:
                result.append((todo.found & ~<uint64_t>(ENTRIES - 1), entry))
                todo.start = (todo.found | (ENTRIES - 1)) + 1
            else:
                result.append((todo.found, entry))
                todo.start = todo.found + 1
        return result

    def zap(self, uint64_t start, uint64_t end, bint runs=True):
        cdef Pass todo
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end, todo.runs.wanted = ZAP, start, end, runs
        run_pass(self, &todo, None, None, None)
        return take_runs(&todo.runs)

    def clear_bits(self, uint64_t start, uint64_t end, uint64_t mask, uint64_t where=0):
        return self.change_bits(start, end, mask, 0, where)

    def clear_bits_of(self, uint64_t first, const uint8_t[::1] bitmap, uint64_t mask, uint64_t where=0):
        cdef uint64_t changed = 0, page, word
        cdef uint64_t *slot
        cdef Cursor here, ahead
        cdef Py_ssize_t at, i, size = bitmap.shape[0]
        self.check_range(first, first)
        if mask == 0:
            return 0
        here.region = ahead.region = NO_REGION
        for at in range(0, size, 8):
            if at + AHEAD < size and word_at(&bitmap[at + AHEAD], size - at - AHEAD):
                slot = seek(self, &ahead, first + 8 * (at + AHEAD))
                for i in range(0, WORD, 8):
                    prefetch(slot + (i & ahead.within), 1)
            word = word_at(&bitmap[at], size - at)
            while word:
                page = first + 8 * at + ctz(word)
                slot = seek(self, &here, page)
                if ~word == 0 and here.within and page & here.within <= ENTRIES - WORD:
                    if clear_word(slot, mask, mask | where):
                        changed += WORD
                        break
                if slot[0] & where == where and slot[0] & mask:
                    slot[0] &= ~mask
                    changed += 1
                word &= word - 1
        return changed

    def set_bits(self, uint64_t start, uint64_t end, uint64_t mask, uint64_t where=0):
        return self.change_bits(start, end, 0, mask, where)

    def change_bits(self, uint64_t start, uint64_t end, uint64_t clear, uint64_t set, uint64_t where=0):
        cdef Pass todo
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end = BITS, start, end
        todo.keep, todo.add, todo.need = ~clear, set, where
        run_pass(self, &todo, None, None, None)
        return todo.changed

    def table_view(self, uint64_t index):
        import numpy

        cdef uint64_t *table = self.root
        cdef uint64_t entry
        cdef int at = self.levels
        while at > 1:
            entry = table[(index >> (9 * (at - 1))) & (ENTRIES - 1)]
            if entry == 0 or (at == 2 and entry & HUGE):
                return None
            table = child_of(entry)
            at -= 1
        return numpy.asarray(<uint64_t[:ENTRIES]>table)

    # ---- primary PTEs, fused ----

    def gup(self, uint64_t index, bint write):
        cdef int level
        cdef uint64_t entry
        cdef uint64_t *slot = self.lookup(index, &level)
        cdef GupPage page
        if slot == NULL:
            return None
        entry = slot[0]
        if not entry & PTE_PRESENT or (write and not entry & PTE_WRITE):
            return None
        slot[0] = entry | PTE_ACCESSED | (PTE_DIRTY if write else 0)
        page = GupPage.__new__(GupPage)
        page.pfn = ((entry & PFN_MASK) >> 12) + (index & (ENTRIES - 1) if level == 2 else 0)
        page.writable = entry & PTE_WRITE != 0
        return page

    def map_anon(self, uint64_t index, uint64_t flags, HostMemory host not None, uint32_t mapping, uint64_t offset):
        cdef int64_t pfn
        cdef FrameMeta *meta
        cdef uint64_t *slot = self.ensure(index)
        if slot[0]:
            return -1
        pfn = host.alloc_frame(True)
        if pfn < 0:
            raise OutOfFrames(f"no frame to spare of {host.nr_frames}")
        meta = &host.meta[pfn]
        meta.mapcount = 1
        meta.flags |= PG_ANON | PG_SWAPBACKED
        meta.mapping = mapping
        meta.index = offset
        host.lru_add(pfn, 0)
        slot[0] = (<uint64_t>pfn << 12) | flags | PTE_ANON | PTE_EXCLUSIVE
        fill_of(slot)[0] += 1
        self.present += 1
        return pfn

    def zap_mapped(self, uint64_t start, uint64_t end, Gather gather not None, bint runs=True, bint keep_anon=False,
                   bint keep_markers=False):
        cdef Pass todo
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end = ZAP_MAPPED, start, end
        todo.runs.wanted, todo.keep_anon, todo.keep_markers = runs, keep_anon, keep_markers
        run_pass(self, &todo, gather, None, None)
        return todo.changed, take_runs(&todo.runs)

    def protect(self, uint64_t start, uint64_t end, uint64_t rights, uint64_t upgrade=0, bint segments=False):
        cdef Pass todo
        cdef Segments parts = Segments() if segments else None
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end = PROTECT, start, end
        todo.keep, todo.add = ~<uint64_t>(PTE_PRESENT | PTE_PROTNONE | PTE_WRITE | PTE_EXEC), rights
        todo.upgrade = upgrade
        run_pass(self, &todo, None, None, parts)
        return todo.flushes, parts.take() if segments and todo.changed else []

    def copy_to(self, PageTable child not None, uint64_t start, uint64_t end, HostMemory host not None, bint cow,
                bint segments=False, list swaps=None):
        cdef Pass todo
        cdef Segments parts = Segments() if segments else None
        cdef Gather frames = Gather(host)
        frames.swaps = swaps
        memset(&todo, 0, sizeof(todo))
        todo.verb, todo.start, todo.end, todo.cow = COPY, start, end, cow
        run_pass(self, &todo, frames, child, parts)
        return parts.take() if segments and todo.changed else []


cdef inline uint64_t word_at(const uint8_t *bitmap, Py_ssize_t left) noexcept:
    """The next 64 bits of a bitmap that has ``left`` bytes left; zeros behind its end."""
    cdef uint64_t word = 0
    if left >= 8:
        memcpy(&word, bitmap, 8)
    else:
        memcpy(&word, bitmap, left)
    return le64toh(word)


cdef inline uint64_t *seek(PageTable tree, Cursor *cursor, uint64_t page) noexcept:
    """The entry of ``page``. Walks when the cursor leaves a leaf table."""
    cdef int level
    if page // ENTRIES != cursor.region:
        cursor.region = page // ENTRIES
        cursor.entries = tree.lookup(page & ~<uint64_t>(ENTRIES - 1), &level)
        cursor.within = ENTRIES - 1 if cursor.entries != NULL and level == 1 else 0
        if cursor.entries == NULL:
            cursor.none = 0
            cursor.entries = &cursor.none
    return cursor.entries + (page & cursor.within)


cdef inline bint clear_word(uint64_t *entries, uint64_t mask, uint64_t need) noexcept:
    """Clears ``mask`` in WORD entries, if all of them have ``need``. Compilers make vectors of both loops."""
    cdef uint64_t i, common = need
    for i in range(WORD):
        common &= entries[i]
    if common != need:
        return False
    for i in range(WORD):
        entries[i] &= ~mask
    return True


cdef int run_pass(PageTable tree, Pass *todo, Gather gather, PageTable child, Segments parts) except -1:
    tree.check_range(todo.start, todo.end)
    if todo.start < todo.end:
        try:
            walk(tree, tree.root, tree.levels, 0, todo, gather, child, parts)
        except BaseException:
            free(todo.runs.pairs)
            raise
    return 0


cdef int walk(PageTable tree, uint64_t *table, int level, uint64_t base, Pass *todo, Gather gather, PageTable child,
              Segments parts) except -1:
    """``todo`` on the entries of ``table``, whose first one is page ``base``, inside [todo.start, todo.end)."""
    cdef int shift = 9 * (level - 1)
    cdef uint64_t i = 0
    cdef uint64_t stop = ENTRIES
    cdef uint64_t entry
    cdef uint64_t page
    cdef uint64_t *lower
    cdef uint64_t left = fill_of(table)[0]  # behind the last entry there is nothing to look for
    if base < todo.start:
        i = (todo.start - base) >> shift
    if todo.end - base < <uint64_t>ENTRIES << shift:
        stop = (todo.end - base + (<uint64_t>1 << shift) - 1) >> shift
    while i < stop and left:
        entry = table[i]
        if entry:
            left -= 1
            page = base + (i << shift)
            if is_leaf(entry, level):
                leaf(tree, table, i, level, page, todo, gather, child, parts)
            else:
                lower = child_of(entry)
                walk(tree, lower, level - 1, page, todo, gather, child, parts)
                if fill_of(lower)[0] == 0:
                    free_table(lower)
                    tree.tables -= 1
                    table[i] = 0
                    fill_of(table)[0] -= 1
            if todo.verb == FIND and todo.changed:
                return 0
        i += 1
    return 0


cdef inline void count_mapping(HostMemory host, uint64_t pfn, FrameMeta *folio, int level, int32_t delta) noexcept:
    """An entry of ``level`` that maps ``pfn`` comes or goes."""
    if not folio.head:
        folio.mapcount += delta
        return
    folio.large_mapcount += delta
    if level == 2:
        folio.entire_mapcount += delta
    else:
        host.meta[pfn].mapcount += delta


cdef inline int leaf(PageTable tree, uint64_t *table, uint64_t i, int level, uint64_t page, Pass *todo,
                     Gather gather, PageTable child, Segments parts) except -1:
    cdef uint64_t entry = table[i]
    cdef uint64_t pfn = (entry & PFN_MASK) >> 12
    cdef uint64_t new
    cdef FrameMeta *meta
    if todo.verb == FIND:
        todo.found = page if page > todo.start else todo.start
        todo.changed = 1
        return 0
    if todo.verb == BITS:
        if entry & todo.need == todo.need and ((entry & todo.keep) | todo.add) != entry:
            table[i] = (entry & todo.keep) | todo.add
            todo.changed += 1
        return 0
    if level == 2 and todo.verb != ZAP and (page < todo.start or page + ENTRIES > todo.end):
        raise InternalError(f"page {page:#x}: a huge entry is not worked on in part, split it first")
    if todo.verb == PROTECT:
        if not entry & (PTE_PRESENT | PTE_PROTNONE):
            if entry & PTE_MIGRATION:  # a fault will raise what it may
                table[i] = entry & ~<uint64_t>PTE_WRITE
            return 0
        new = (entry & todo.keep) | todo.add
        if todo.upgrade and new & todo.upgrade == todo.upgrade:
            new |= PTE_WRITE
        if entry & PTE_UFFD_WP:  # whoever protected it decides
            new &= ~<uint64_t>PTE_WRITE
        if parts is not None:
            parts.add(page, new)
        if new != entry:
            table[i] = new
            todo.changed += 1
            if entry & PTE_PRESENT:
                todo.flushes += 1
        return 0
    if todo.verb == COPY:
        if level == 2 and not entry & (PTE_ANON | PTE_SPECIAL) and not gather.host.meta[pfn].flags & PG_HUGETLB:
            return 0  # of a page cache: a fault will map it
        if not entry & (PTE_PRESENT | PTE_PROTNONE):
            if entry & (PTE_SWAP | PTE_MIGRATION) and todo.cow:
                table[i] = entry = entry & ~<uint64_t>(PTE_WRITE | PTE_EXCLUSIVE)
            if entry & PTE_SWAP and gather.swaps is not None:
                gather.swaps.append(pfn)
            child.store(page, entry)
            return 0
        if todo.cow:
            new = entry & ~<uint64_t>(PTE_WRITE | PTE_EXCLUSIVE)
            if parts is not None:
                parts.add(page, new)
            if new != entry:
                table[i] = entry = new
                todo.changed += 1
        child.store(page, entry & ~<uint64_t>PTE_ACCESSED)
        if not entry & PTE_SPECIAL:
            meta = folio_of(gather.host.meta, pfn)
            meta.refcount += 1
            count_mapping(gather.host, pfn, meta, level, 1)
        return 0
    if todo.verb == ZAP_MAPPED:
        if not entry & (PTE_PRESENT | PTE_PROTNONE):
            if todo.keep_markers and not entry & (PTE_SWAP | PTE_MIGRATION):
                return 0
            if todo.keep_anon and entry & (PTE_SWAP | PTE_ANON):
                return 0
            if entry & PTE_SWAP:
                if gather.swaps is None:
                    gather.swaps = []
                gather.swaps.append(pfn)
            table[i] = 0
            fill_of(table)[0] -= 1
            tree.present -= 1
            return 0
        if todo.keep_anon and entry & PTE_ANON:
            return 0
        if not entry & PTE_SPECIAL:
            gather.add(pfn)
            meta = folio_of(gather.host.meta, pfn)
            count_mapping(gather.host, pfn, meta, level, -1)
            if not entry & PTE_ANON:
                if entry & PTE_DIRTY:
                    meta.flags |= PG_DIRTY
                if entry & PTE_ACCESSED:
                    meta.flags |= PG_REFERENCED
    table[i] = 0
    fill_of(table)[0] -= 1
    tree.present -= 1
    todo.changed += 1
    if todo.runs.wanted and not entry & MMIO:
        add_run(&todo.runs, pfn, ENTRIES if level == 2 else 1)
    return 0


cdef class Gather:
    def __cinit__(self, HostMemory host not None):
        self.host = host

    def __dealloc__(self):
        free(self.pfns)

    cdef int add(self, uint64_t pfn) except -1:
        cdef void *more
        if pfn >= self.host.nr_frames:
            raise InternalError(f"pfn {pfn:#x} is not a frame of the arena")
        if self.count == self.capacity:
            more = realloc(self.pfns, (64 if self.capacity == 0 else 2 * self.capacity) * sizeof(uint64_t))
            if more == NULL:
                raise MemoryError
            self.pfns = <uint64_t *>more
            self.capacity = 64 if self.capacity == 0 else 2 * self.capacity
        self.pfns[self.count] = pfn
        self.count += 1
        return 0

    def add_page(self, uint64_t pfn):
        self.add(pfn)

    def pages(self):
        cdef uint64_t i
        return [self.pfns[i] for i in range(self.count)]

    def free_all(self, bint runs=True):
        """Last gathered first, so that frames come back in the order in which they had been handed out."""
        cdef Runs freed
        cdef uint64_t pfn, count
        memset(&freed, 0, sizeof(freed))
        while self.count:
            self.count -= 1
            pfn = self.pfns[self.count]
            if folio_of(self.host.meta, pfn).refcount <= 0:
                free(freed.pairs)
                raise InternalError(f"put of the free frame {pfn:#x}")
            count = self.host.put_frame(pfn)
            if count and runs:
                add_run(&freed, pfn & ~(count - 1), count)
        return take_runs(&freed)
