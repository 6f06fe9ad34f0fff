"""What can be said in a trace: the event record and the schema of its kinds.

An :class:`Event` has a sequence number, a virtual time, an actor, a cause and named fields. ``KINDS``
declares which fields a kind has, in which order and of which type; the recorder embeds the schema in
every file, so old files stay readable when a kind gains a field. Adding a kind is one line below.

Types of fields, and what a value of each may be:

==========  ==============================================================================
``str``     text or None
``bool``    True or False
``int``     a signed 64-bit number, shown in decimal
``hex``     an unsigned 64-bit number (flags, masks, syndromes), shown in hexadecimal
``prot``    Linux ``PROT_*`` bits (READ 1, WRITE 2, EXEC 4), shown as ``rwx``
``npages``  a length in pages; it stretches the ``gfn`` and ``hva`` of its kind to a range
``hva``     a host virtual byte address
``gva``     a guest virtual byte address
``gpa``     a guest physical byte address
``gfn``     a guest frame number
``pfn``     a host frame number
``pfns``    runs of host frames: ``list[tuple[first, count]]``
``gfns``    runs of guest frames, likewise
==========  ==============================================================================

A ``?`` behind a numeric type allows None. Fields named ``start`` and ``end`` of one type are a
half-open range. Values that follow from the host (wall clock, host pointers, TLB fill counts) have
no place in an event: two equal runs give equal traces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from xipvm.address import PAGE_SHIFT

Runs = list[tuple[int, int]]


class Event(NamedTuple):
    """One thing that happened. ``fields`` follows ``KINDS[kind]`` and must not be changed."""

    seq: int
    """Position in the trace, from 1."""
    time: int
    """Virtual time in ns."""
    actor: str
    """Who did it: ``host``, ``vcpu0``, ``flash0``."""
    cause: int
    """``seq`` of the event that provoked this one, 0 for none."""
    kind: str
    fields: dict[str, Any]


class Field(NamedTuple):
    """A field of a kind: its name, its type (see the module's table) and whether a number may be None."""

    name: str
    type: str
    optional: bool = False


class Kind(NamedTuple):
    """The declaration of one kind of event."""

    name: str
    fields: tuple[Field, ...]
    doc: str = ""

    @property
    def spec(self) -> str:
        """The fields as :func:`parse_kind` reads them."""
        return " ".join(f"{name}:{type_}{'?' if optional else ''}" for name, type_, optional in self.fields)


RUN_TYPES = frozenset({"pfns", "gfns"})
NUMBER_TYPES = frozenset({"int", "hex", "prot", "npages", "hva", "gva", "gpa", "gfn", "pfn"})
TYPES = RUN_TYPES | NUMBER_TYPES | {"str", "bool"}

_ADDRESS_TYPES = frozenset({"hva", "gva", "gpa"})
_PAGE_TYPES = frozenset({"gfn", "pfn"})

KINDS: dict[str, Kind] = {}


def parse_kind(name: str, spec: str, doc: str = "") -> Kind:
    """The :class:`Kind` that ``spec`` spells: ``"mm:str hva:hva old:pfn?"``. Raises ValueError."""
    fields = []
    for word in spec.split():
        field, _, type_ = word.partition(":")
        base = type_.removesuffix("?")
        if base not in TYPES or (type_ != base and base not in NUMBER_TYPES):
            raise ValueError(f"event kind {name}: {word!r} has no type of {', '.join(sorted(TYPES))}")
        fields.append(Field(field, base, type_ != base))
    if len({field.name for field in fields}) != len(fields):
        raise ValueError(f"event kind {name}: a field is declared twice")
    return Kind(name, tuple(fields), doc)


def define(name: str, spec: str, doc: str) -> None:
    """Declare a kind. Recorders that are already open do not learn of it."""
    if name in KINDS:
        raise ValueError(f"event kind {name} is declared twice")
    KINDS[name] = parse_kind(name, spec, doc)


def spans(kind: Kind, fields: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The pages that an event names: ``(space, first, end)``, page numbers, half-open.

    ``space`` is ``hva``, ``gva``, ``gpa``, ``gfn`` or ``pfn``. An empty range names none.
    """
    length = next((fields[f.name] for f in kind.fields if f.type == "npages"), None)
    start_type = next((f.type for f in kind.fields if f.name == "start"), "")
    for name, type_, _ in kind.fields:
        value = fields[name]
        if value is None:
            continue
        if type_ in RUN_TYPES:
            for first, count in value:
                yield type_[:-1], first, first + count
        elif type_ not in _ADDRESS_TYPES and type_ not in _PAGE_TYPES:
            continue
        elif name == "start" and "end" in fields:
            end = fields["end"]
            if end > value:
                shift = PAGE_SHIFT if type_ in _ADDRESS_TYPES else 0
                yield type_, value >> shift, ((end - 1) >> shift) + 1
        elif name == "end" and start_type == type_:
            continue
        else:
            first = value >> PAGE_SHIFT if type_ in _ADDRESS_TYPES else value
            yield type_, first, first + (length if length is not None and type_ in ("gfn", "hva") else 1)


# The machine.
define("machine_start", "board:str memory:int smp:int clock:str guest:str", "the first event of a run")
define("machine_reset", "board:str", "the machine restarts as from power-on; flash keeps its contents")
define("machine_end", "reason:str status:int", "the last event of a run; status is the exit status")
define("storm", "operation:str where:str", "a storm does something, between two instructions or at a schedule point")
define("storm_refused", "operation:str error:str", "what a storm wanted to do was not possible just then")
define("guest_exception", "vcpu:int vector:hex pc:gva cause:hex address:gva?", "a vCPU took an exception or trap")
define("guest_interrupt", "vcpu:int irq:int", "a vCPU took an interrupt")

# The host: frames, page tables, VMAs. Pages are host frames throughout.
define("page_alloc", "pfn:pfn", "a frame left the free list")
define("page_alloc_huge", "pages:pfns", "the frames of a compound page left the free list")
define("page_free", "pages:pfns", "frames went back to the free list and may be reused from here on")
define("pte_set", "mm:str hva:hva pfn:pfn flags:hex", "a primary page-table entry was written; flags are its low bits")
define("pte_clear", "mm:str start:hva end:hva pages:pfns", "primary entries were cleared; pages are what they mapped")
define(
    "pte_protect",
    "mm:str start:hva end:hva flags:hex",
    "every mapped entry of the range has these flags now, same pages",
)
define("pte_guard", "mm:str start:hva end:hva on:bool", "guard markers were put in the empty entries, or taken away")
define(
    "pte_move",
    "mm:str start:hva end:hva to:hva length:npages pages:pfns",
    "the entries of the range are at `to` now; pages are what they map",
)
define("pte_copy", "mm:str child:str start:hva end:hva", "the child got the parent's mapped entries of the range")
define("pte_nonpresent", "mm:str hva:hva entry:str value:hex", "an entry says where its page is: swap, migration")
define(
    "pmd_split",
    "mm:str start:hva end:hva pfn:pfn flags:hex",
    "small entries with these flags map what a huge one did: `pfn` and those behind it, or the zero page",
)
define("pmd_collapse", "mm:str start:hva end:hva pfn:pfn", "a compound page took the place of the pages of the range")
define("page_split", "pfn:pfn split:bool", "a compound page was to be split, and was unless somebody had it")
define(
    "page_migrate", "old:pfn new:pfn moved:bool", "a page was to move to another frame, and did unless it was in use"
)
define("ksm_merge", "mm:str hva:hva old:pfn new:pfn root:int", "KSM merged a page; old is new: it is the shared one")
define("swap_out", "pfn:pfn slot:hex", "an unmapped page was written to its swap slot")
define("swap_in", "pfn:pfn slot:hex", "a new frame was filled from a swap slot")
define("swap_error", "slot:hex errno:int", "a swap slot could not be read or written")
define("kswapd_wake", "free:int low:int", "an allocation came to the low watermark; all in frames")
define("kswapd_sleep", "free:int high:int reclaimed:int", "kswapd has done what it could")
define("direct_reclaim", "free:int min:int reclaimed:int", "an allocation came to min, and reclaimed by itself")
define("workingset_refault", "pfn:pfn distance:int active:bool", "a reclaimed page came back; active: too soon")
define("oom_kill", "mm:str badness:int rss:int swap:int pinned:int", "the OOM killer chose; counts are pages")
define("oom_reap", "mm:str pages:int left:int", "the OOM reaper freed pages, and left areas alone")
define("uffd_pagefault", "mm:str hva:hva access:str reason:str", "a fault waits for its monitor; missing, minor, wp")
define("uffd_event", "mm:str event:str start:hva end:hva to:hva?", "a monitor is told: fork, remap, remove, unmap")
define("uffd_register", "mm:str start:hva end:hva mode:str", "faults of the range are told to a userfaultfd")
define("uffd_unregister", "mm:str start:hva end:hva", "they no longer are")
define("uffd_fill", "mm:str start:hva end:hva how:str", "a monitor fills entries: copy, zeropage, continue, poison")
define("uffd_writeprotect", "mm:str start:hva end:hva on:bool", "a monitor protects pages, or lifts that")
define("uffd_move", "mm:str start:hva end:hva to:hva", "a monitor moves pages")
define("pagemap_scan", "mm:str start:hva end:hva wp:bool", "PAGEMAP_SCAN; wp: what it finds is protected again")
define("mm_fault", "mm:str hva:hva access:str result:str", "the host's fault handler ran; access: read, write, fetch")
define("primary_tlb_flush", "mm:str start:hva end:hva", "host CPUs lost their translations of the range")
define("vma_map", "mm:str start:hva end:hva prot:prot kind:str", "a VMA appeared")
define("vma_unmap", "mm:str start:hva end:hva", "VMAs of the range went away")
define("vma_protect", "mm:str start:hva end:hva prot:prot", "VMAs of the range changed protection")
define("vma_remap", "mm:str start:hva end:hva to:hva pages:npages", "mremap of the range; to is the wish at first")
define("mm_madvise", "mm:str start:hva end:hva advice:str", "madvise; advice without its MADV_")
define("mm_mlock", "mm:str start:hva end:hva on:bool", "mlock, or munlock")
define("mm_clear_soft_dirty", "mm:str", "clear_refs 4")
define("mm_fork", "mm:str child:str", "an mm was duplicated")
define("mm_exit", "mm:str", "an mm is torn down")
define("mm_cow", "mm:str hva:hva old:pfn new:pfn", "a write to a shared page got a copy")
define("host_access", "mm:str hva:hva access:str thread:str", "a host thread touched memory")
define("host_tlb_insert", "mm:str hva:hva pfn:pfn rights:str thread:str", "a host thread got a translation")
define("host_tlb_drop", "mm:str hva:hva? thread:str", "it dropped one that it faulted on; without hva, all: it ended")
define(
    "device_tlb_insert", "mm:str hva:hva pfn:pfn rights:str device:str", "a device that follows the host's TLBs got one"
)

# XIP files. `pgoff`, `first` and `end` are pages of the file. `file` is the image and the inode, `fs.ext2:12`, with
# `.1` behind it where another file had that inode before.
define("xip_sparse_page", "pfn:pfn", "from now on this page of zeros is what a hole is mapped as")
define(
    "xip_file",
    "file:str name:str image:str volume:str inode:int generation:int base:hex",
    "which file of an image is about to be mapped; volume: its UUID or checksum; base: the frame of its first block",
)
define("xip_map", "file:str mm:str start:hva end:hva pgoff:int", "an XIP file is about to be mapped")
define("xip_allocate", "file:str pgoff:int pfn:pfn", "a hole got a block, of zeros")
define("xip_unmapped", "file:str pgoff:int", "nobody maps the page as a hole any more")
define("xip_read", "file:str pos:int count:int result:int stored:int", "a read; result as read(2)'s, an error below 0")
define("dax_entry", "file:str pgoff:int pfn:pfn", "what a page of a DAX file is mapped as: its block, or the zero page")
define("xip_allocate_huge", "file:str pgoff:int count:int pfn:pfn", "so many holes got blocks of zeros, one piece")
define("xip_unmapped_huge", "file:str pgoff:int count:int", "nobody maps so many pages as holes any more")
define(
    "dax_entry_huge",
    "file:str pgoff:int count:int pfn:pfn hole:bool",
    "so many pages of a DAX file have one entry: their blocks, from `pfn` on, or the huge zero page",
)
define(
    "xip_free",
    "file:str first:int end:int pages:pfns",
    "these pages of it are holes now; their blocks, `pages`, may be another file's",
)
define("device_tlb_drop", "mm:str start:hva end:hva device:str", "a device forgot its translations of the range")
define("iotlb_insert", "mm:str hva:hva pfn:pfn rights:str device:str", "an IOMMU walked the host's table for a device")
define("iotlb_drop", "mm:str start:hva end:hva device:str", "its TLB has forgotten what the device had of the range")
define("page_request", "mm:str hva:hva access:str device:str", "it asks the host for a page; access: read, write")

# Notifiers. `range` pairs an end with its start.
define("mmu_notifier_register", "mm:str notifier:str protocol:str", "a notifier joined the mm's list")
define("mmu_notifier_unregister", "mm:str notifier:str", "a notifier left the mm's list")
define("mmu_notifier_release", "mm:str notifier:str", "a notifier was told that the mm goes away")
define("mmu_notifier_invalidate_range_start", "mm:str start:hva end:hva event:str range:int", "S of a range")
define("mmu_notifier_invalidate_range_end", "mm:str start:hva end:hva event:str range:int", "E of a range")
define("mmu_notifier_invalidate_page", "mm:str address:hva", "2008: an entry was cleared and flushed")
define("mmu_notifier_clear_flush_young", "mm:str start:hva end:hva young:bool", "young: a secondary MMU used the pages")
define("mmu_notifier_clear_young", "mm:str start:hva end:hva young:bool", "likewise, no TLB was flushed for it")
define("mmu_notifier_test_young", "mm:str address:hva young:bool", "likewise, and nothing was cleared")
define("mmu_notifier_arch_invalidate_secondary_tlbs", "mm:str start:hva end:hva", "TLBs that follow the host's lost it")
define("mmu_notifier_put", "mm:str notifier:str", "the last user gave a notifier back; it left the mm's list")
define("mmu_interval_notifier_insert", "mm:str notifier:str start:hva end:hva", "somebody watches the range")
define("mmu_interval_notifier_remove", "mm:str notifier:str", "a range is watched no longer")
define(
    "mmu_interval_notifier_invalidate",
    "mm:str notifier:str seq:int range:int owned:bool",
    "a watched range was touched; owned: by somebody's own doing, who may ignore it",
)
define("mmu_interval_read_begin", "mm:str notifier:str seq:int", "a lookup in a watched range begins")
define("mmu_interval_read_retry", "mm:str notifier:str seq:int retry:bool", "it asks whether what it has found counts")

# The secondary MMU. `rights` is r, rw or rx; `start` and `end` are guest frames, `pages` host frames.
define("kvm_page_fault", "vm:str gfn:gfn access:str", "a guest access missed in the sptes; access: read, write, fetch")
define("kvm_retry", "vm:str gfn:gfn reason:str", "a fault was given up because an invalidation came between")
define("spte_lookup", "vm:str gfn:gfn", "a fault begins its lookup: what it installs must not be older")
define("spte_set", "vm:str gfn:gfn pfn:pfn rights:str", "a shadow entry was installed or changed")
define(
    "spte_set_huge",
    "vm:str gfn:gfn pages:npages pfn:pfn rights:str",
    "a shadow entry was installed that maps so many guest frames",
)
define(
    "spte_restore",
    "vm:str gfn:gfn pages:npages pfn:pfn rights:str",
    "a shadow entry got rights back that dirty logging or ageing had taken; nothing was looked up for it",
)
define("spte_zap", "vm:str start:gfn end:gfn pages:pfns", "shadow entries were removed; pages are what they mapped")
define("spte_protect", "vm:str start:gfn end:gfn", "shadow entries of the range lost the right to write")
define(
    "shadow_set",
    "vm:str root:int gva:gva gfn:gfn rights:str",
    "shadow paging: a root maps a virtual page, by the entry of that guest frame",
)
define("shadow_zap", "vm:str root:int gva:gva gfn:gfn", "shadow paging: it does so no more")
define("shadow_unsync", "vm:str gfn:gfn", "shadow paging: the guest may write to last-level tables, until it flushes")
define("shadow_sync", "vm:str gfn:gfn", "shadow paging: it flushed, and entries are compared with those tables")
define("shadow_root_gone", "vm:str root:int", "shadow paging: no vCPU finds that root any more")
define("spte_age", "vm:str start:gfn end:gfn", "shadow entries of the range lost all rights until the next access")
define(
    "tlb_miss", "vm:str gfn:gfn access:str", "an access missed where there is only a TLB; access: read, write, fetch"
)
define("tlb_dropin", "vm:str chiplet:int gfn:gfn pfn:pfn rights:str", "a chiplet's TLB was given an entry")
define("tlb_retry", "vm:str gfn:gfn reason:str", "it was not: a range is open, or an invalidation came between")
define("tlb_invalidate", "vm:str chiplet:int start:gfn end:gfn pages:pfns", "a chiplet's TLB has forgotten the range")
define("tlb_insert", "vcpu:int gfn:gfn pfn:pfn rights:str", "a vCPU got a translation, the first time since its flush")
define("tlb_flush", "vcpu:int reason:str", "a vCPU lost all its translations")
define("kvm_kick", "vcpu:int reason:str", "a vCPU was made to leave the guest")
define("memslot_set", "vm:str slot:int gfn:gfn pages:npages hva:hva flags:hex", "a memslot was created or moved")
define("memslot_delete", "vm:str slot:int", "a memslot went away")
define("dirty_log", "vm:str slot:int", "a memslot's dirty log was handed out; what it does not name was not written")
define("code_drop", "pfn:pfn vcpus:hex", "translated code of a frame was dropped; vcpus is the mask of who had it")
define("page_pin", "vm:str gfn:gfn pfn:pfn", "a secondary MMU holds a reference to the frame behind a page of its")
define("page_unpin", "vm:str gfn:gfn pfn:pfn", "it gave that back; the frame may be freed next")
define(
    "xpmem_recall",
    "vm:str start:gfn end:gfn node:str wait:bool",
    "a remote node is asked to drop pages; wait: whoever needs that waits for the answer",
)
define("xpmem_fence", "vm:str node:str reason:str", "a remote node was cut off; it reaches nothing any more")

# Flash.
define("flash_mode", "bank:int chip:int mode:str array:bool", "a chip changed mode; array: reads give its cells")
define("flash_program", "bank:int offset:hex size:int", "cells were programmed")
define("flash_erase", "bank:int offset:hex size:int", "a sector was erased")
define("flash_error", "bank:int offset:hex what:str", "a command failed or was refused")
