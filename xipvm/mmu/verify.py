"""A full scan of the primary MMU that finds what its bookkeeping should say, and compares: Linux's CONFIG_DEBUG_VM.

Slow by design (everything mapped is visited); for tests, the explorer and hunting defects. Between two operations all
of it holds; in the middle of one only its own writer knows what does. Metadata of frames is looked at as a copy: a
profiler that keeps this code's stack would keep a view of the host's memory, which then cannot be closed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT
from xipvm.errors import InternalError
from xipvm.mmu.device_private import device_private_page, exclusive_pfn, is_device_slot
from xipvm.mmu.frames import (
    HUGE_PAGES,
    LRU_ACTIVE_FILE,
    PG_ACTIVE,
    PG_ANON,
    PG_FILE,
    PG_HUGETLB,
    PG_KSM,
    PG_LRU,
    PG_RESERVED,
    PG_SWAPCACHE,
    ZERO_PFN,
    HostMemory,
)
from xipvm.mmu.hugetlb import WP_MARKER, reserved_by
from xipvm.mmu.hugetlb_file import HugetlbFile
from xipvm.mmu.page_cache import PageCache
from xipvm.mmu.pte import (
    ANON,
    DEVICE,
    DEVICE_EXCLUSIVE,
    DIRTY,
    EXCLUSIVE,
    HUGE,
    MAPPED,
    PFN_SHIFT,
    PRESENT,
    SPECIAL,
    SWAP,
    UFFD_WP,
    WRITE,
    describe,
    is_marker,
    pte_pfn,
)
from xipvm.mmu.rmap import reverse_map
from xipvm.mmu.thp import thp_of
from xipvm.mmu.vma import PROT_WRITE, VM_HUGETLB, VM_UFFD_WP

if TYPE_CHECKING:
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.swap import Swap
    from xipvm.mmu.vma import Vma


_ZEROS: Final = bytes(4096)


def verify(host: HostMemory, *, held: Mapping[int, int] | None = None) -> None:
    """Checks every mm over ``host``. ``held`` are references of others than entries and page caches, by pfn.

    Raises InternalError that lists what is wrong.
    """
    wrong: list[str] = []
    rmap = reverse_map(host)
    mappings: defaultdict[int, set[tuple[Vma, int]]] = defaultdict(set)
    slots: Counter[int] = Counter()
    for mm in rmap.mms:
        wrong.extend(_areas(mm))
        wrong.extend(_entries(mm, mappings, slots))
    references: Counter[int] = Counter()
    for pfn, count in (held or {}).items():
        references[host.compound_head(pfn)] += count
    slots.update(slot for file in rmap.files() if isinstance(file, PageCache) for slot in file.swapped.values())
    wrong.extend(_devices(host, slots, references))
    wrong.extend(_swap(host, rmap.swap, slots, references))
    wrong.extend(_pool(host, references))
    zero = thp_of(host).zero_pfn
    if zero:
        references[zero] += 1
    if rmap.sparse_page:
        references[rmap.sparse_page] += 1
    for pfn, found in list(mappings.items()):
        references[host.compound_head(pfn)] += len(found)
        expected = found | _huge_places(host, mappings, pfn)
        if pfn != rmap.sparse_page and set(rmap.walk(host, pfn)) != expected:
            finds = len(list(rmap.walk(host, pfn)))
            wrong.append(f"frame {pfn:#x}: the reverse map finds {finds} of {len(expected)} entries")
    for file in rmap.files():
        if isinstance(file, PageCache):
            for pgoff, pfn in file.pages.items():
                references[host.compound_head(pfn)] += 1
                if pgoff in file.swapped:
                    wrong.append(f"page {pgoff:#x} of {file!r} is in memory and in swap")
                if (host.mapping(pfn), host.index(pfn)) != (file.id, pgoff):
                    wrong.append(f"frame {pfn:#x}: is page {pgoff:#x} of {file!r}, but does not know it")
    wrong.extend(_frames(host, mappings, references))
    wrong.extend(_lru(host))
    if wrong:
        raise InternalError("\n".join(wrong))


def _huge_places(host: HostMemory, mappings: Mapping[int, set[tuple[Vma, int]]], pfn: int) -> set[tuple[Vma, int]]:
    """Where ``pfn`` is mapped by huge entries of the compound page that it belongs to."""
    head = host.compound_head(pfn)
    by = (pfn - head) << PAGE_SHIFT
    return {(area, hva + by) for area, hva in mappings.get(head, ()) if area.mm.pgd.huge(hva >> PAGE_SHIFT)}


def _of_device(area: Vma, hva: int, entry: int) -> list[str]:
    """What is wrong with an entry that stands for a page which the CPU must not touch."""
    page = device_private_page(area.mm, entry)
    if page is None:
        place = area.mm.host.mapping(exclusive_pfn(entry)), area.mm.host.index(exclusive_pfn(entry))
    else:
        place = page.mapping, page.index
    wrong = []
    if place[0] not in [root.id for root in area.anon_chain] or place[1] != area.page_offset(hva):
        wrong.append("stands for a page whose root does not lead back")
    if entry & WRITE and not area.prot & PROT_WRITE:
        wrong.append("is writable")
    return wrong


def _devices(host: HostMemory, slots: Counter[int], references: Counter[int]) -> list[str]:
    """Takes the pages of devices out of ``slots``, checks them, and adds the frames that devices are alone with."""
    devices, wrong = reverse_map(host).devices, []
    for slot in [slot for slot in slots if is_device_slot(slot)]:
        if devices is None or slot not in devices.pages:
            references[slot & ~(DEVICE | DEVICE_EXCLUSIVE) >> PFN_SHIFT] += slots.pop(slot)
    pages = {} if devices is None else devices.pages
    free = {page.pfn for pagemap in {page.pagemap for page in pages.values()} for page in pagemap.free}
    for pfn, page in pages.items():
        found = slots.pop(pfn, 0)
        if (page.refcount, page.mapcount) != (found, found):
            counts = f"refcount {page.refcount}, mapcount {page.mapcount}"
            wrong.append(f"device page {pfn:#x}: {counts}, found {found} entries")
        if not page.refcount and pfn not in free:
            wrong.append(f"device page {pfn:#x} is lost")
    return wrong


def _swap(host: HostMemory, swap: Swap | None, slots: Counter[int], references: Counter[int]) -> list[str]:
    """Checks what is in use of the swap, and adds what the swap cache refers to."""
    if swap is None:
        return ["there are swap entries, but no swap"] if slots else []
    wrong = [
        f"swap slot {slot:#x}: {swap.counts.get(slot, 'unused')} entries, found {slots[slot]}"
        for slot in {**swap.counts, **slots}
        if swap.counts.get(slot) != slots[slot]
    ]
    for slot, count in swap.counts.items():
        if not count and slot not in swap.cache:
            wrong.append(f"swap slot {slot:#x} is lost")
    if sum(len(area.used) for area in swap.areas.values()) != len(swap.counts):
        wrong.append("the areas of the swap use other slots than are counted")
    for slot, pfn in swap.cache.items():
        references[pfn] += 1
        if swap.slots.get(pfn) != slot or slot not in swap.counts or not host.flags(pfn) & PG_SWAPCACHE:
            wrong.append(f"frame {pfn:#x} is cached for swap slot {slot:#x}, but does not know it")
    return wrong


def _pool(host: HostMemory, references: Counter[int]) -> list[str]:
    """Checks what the hugetlb pool has promised, and adds what the files refer to."""
    rmap = reverse_map(host)
    promised, wrong = sum(reserved_by(area) for mm in rmap.mms for area in mm.vmas), []
    for file in rmap.files():
        if isinstance(file, HugetlbFile):
            promised += len(file.reserved - file.pages.keys())
            for pgoff, pfn in file.pages.items():
                references[pfn] += 1
                if pgoff not in file.reserved or (host.mapping(pfn), host.index(pfn)) != (file.id, pgoff):
                    wrong.append(f"frame {pfn:#x}: is page {pgoff:#x} of {file!r}, but does not know it")
    if host.reserved_huge_pages != promised or promised > host.free_huge_pages:
        wrong.append(f"{host.reserved_huge_pages} of {host.free_huge_pages} huge pages are promised, found {promised}")
    meta = host.meta_view().copy()
    heads = meta[(meta["flags"] & PG_HUGETLB) != 0]
    free = int((heads["refcount"] == 0).sum())
    if (len(heads), free) != (host.huge_pages, host.free_huge_pages):
        wrong.append(f"{len(heads)} pages in the hugetlb pool, {free} free, counted {host.free_huge_pages}")
    return wrong


def _areas(mm: Mm) -> list[str]:
    wrong = []
    for lower, upper in zip(mm.vmas, mm.vmas[1:], strict=False):
        if lower.end > upper.start:
            wrong.append(f"{lower!r} overlaps {upper!r}")
    for area in mm.vmas:
        if not area.start < area.end:
            wrong.append(f"{area!r} is empty")
        if area.file is not None and area not in area.file.areas:
            wrong.append(f"{area!r} is unknown to its file")
        if (area.anon_vma is None) != (not area.anon_chain) or len(set(area.anon_chain)) != len(area.anon_chain):
            wrong.append(f"{area!r} has a broken chain of anon_vmas")
        wrong.extend(f"{area!r} is unknown to anon_vma {root.id}" for root in area.anon_chain if area not in root.areas)
    return wrong


def _entries(mm: Mm, mappings: defaultdict[int, set[tuple[Vma, int]]], slots: Counter[int]) -> list[str]:
    """Checks the entries of ``mm`` against its areas and collects what they map, and what they have in swap."""
    wrong = []
    for page, entry in mm.pgd.entries(0, 1 << 36):
        hva = page << PAGE_SHIFT
        area = mm.find_vma(hva)
        if area is None:
            wrong.append(f"{mm.name}: entry at {hva:#x} ({describe(entry)}) lies in no area")
            continue
        if entry & UFFD_WP and not area.flags & VM_UFFD_WP:
            wrong.append(f"{mm.name}: entry at {hva:#x} ({describe(entry)}) is protected for nobody")
        if not entry & MAPPED:
            if entry & SWAP and entry & DEVICE:
                wrong.extend(
                    f"{mm.name}: entry at {hva:#x} ({describe(entry)}) {why}" for why in _of_device(area, hva, entry)
                )
                slots[pte_pfn(entry)] += 1
            elif entry & SWAP:
                slots[pte_pfn(entry)] += 1
            elif not is_marker(entry) and not (entry == WP_MARKER and area.flags & VM_HUGETLB):
                wrong.append(f"{mm.name}: entry at {hva:#x} ({describe(entry)}) is none that stays")
            continue
        pfn = pte_pfn(entry)
        if not entry & SPECIAL:
            mappings[pfn].add((area, hva))
        wrong.extend(f"{mm.name}: entry at {hva:#x} ({describe(entry)}) {fault}" for fault in _entry(area, hva, entry))
    return wrong


def _entry(area: Vma, hva: int, entry: int) -> list[str]:
    host, pfn, wrong = area.mm.host, pte_pfn(entry), []
    if entry & MAPPED != area.rights & MAPPED:
        wrong.append(f"does not fit {area!r}")
    if entry & WRITE and (not entry & PRESENT or not area.prot & PROT_WRITE):
        wrong.append("is writable")
    if entry & WRITE and entry & UFFD_WP:
        wrong.append("is writable and protected")
    if entry & WRITE and area.shared and area.file is not None and area.file.tracks_writes and not entry & DIRTY:
        wrong.append("is writable, but its file was not told")
    if bool(area.flags & VM_HUGETLB) != bool(entry & HUGE and host.flags(pfn) & PG_HUGETLB):
        wrong.append("is a page of the hugetlb pool or not, wrongly")
    compound = not host.is_device(pfn) and (host.compound_head(pfn) != pfn or not host.is_compound(pfn))
    if entry & HUGE and (pfn % HUGE_PAGES or compound):
        wrong.append("is huge, but maps no compound page")
    zero = thp_of(host).zero_pfn if entry & HUGE else ZERO_PFN
    if bool(entry & SPECIAL) != (pfn == zero or host.is_device(pfn)):
        wrong.append("is special or not, wrongly")
    if entry & ANON:
        if not host.flags(pfn) & PG_ANON:
            wrong.append("maps a page as anonymous that is not")
        if host.flags(pfn) & PG_KSM:
            if entry & (WRITE | EXCLUSIVE):
                wrong.append("maps a page that KSM shares as its own")
        elif host.mapping(pfn) not in [root.id for root in area.anon_chain] or host.index(pfn) != area.page_offset(hva):
            wrong.append("maps a page whose root does not lead back")
        mapcount = host.total_mapcount(pfn) if entry & HUGE else host.mapcount(pfn)
        if entry & EXCLUSIVE and mapcount != 1:
            wrong.append(f"is exclusive, with mapcount {mapcount}")
        if entry & WRITE and not entry & EXCLUSIVE:
            wrong.append("is a writable entry of a shared page")
        if entry & ANON and area.shared:
            wrong.append("maps a private page in a shared area")
    elif not entry & SPECIAL and pfn == area.mm.rmap.sparse_page:
        if area.file is None or not area.file.mixed or entry & (WRITE | DIRTY):
            wrong.append("maps the page that stands for holes, and must not so")
    elif not entry & SPECIAL:
        if not isinstance(area.file, PageCache | HugetlbFile) or area.file.pages.get(area.page_offset(hva)) != pfn:
            wrong.append("maps a page that is not in the page cache there")
        if entry & WRITE and not area.shared:
            wrong.append("is a writable private entry of a page-cache page")
    return wrong


def _frames(host: HostMemory, mappings: Mapping[int, set[tuple[Vma, int]]], references: Mapping[int, int]) -> list[str]:
    wrong = []
    meta = host.meta_view().copy()
    counts, mapcounts, heads = meta["refcount"].tolist(), meta["mapcount"].tolist(), meta["head"].tolist()
    idle = (meta["refcount"] == 0) & (meta["head"] == 0)
    busy = (~(idle & (meta["mapcount"] == 0))).nonzero()[0].tolist()
    for pfn in sorted({*busy, *mappings, *references} - {ZERO_PFN}):  # of all others nothing is said, rightly
        if counts[pfn] != references.get(pfn, 0):
            wrong.append(f"frame {pfn:#x}: refcount {counts[pfn]}, found {references.get(pfn, 0)}")
        huge = sum(bool(area.mm.pgd.get(hva >> PAGE_SHIFT) & HUGE) for area, hva in mappings.get(pfn, ()))
        small = len(mappings.get(pfn, ())) - huge
        if mapcounts[pfn] != small or (heads[pfn] == pfn and host.entire_mapcount(pfn) != huge):
            wrong.append(f"frame {pfn:#x}: mapcount {host.mapcount(pfn)}, found {small} and {huge} huge entries")
        if heads[pfn] == pfn:
            parts = sum(mapcounts[pfn : pfn + HUGE_PAGES]) + host.entire_mapcount(pfn)
            if host.total_mapcount(pfn) != parts:
                wrong.append(f"frame {pfn:#x}: total mapcount {host.total_mapcount(pfn)}, its parts have {parts}")
            if set(heads[pfn : pfn + HUGE_PAGES]) != {pfn} or pfn % HUGE_PAGES:
                wrong.append(f"frame {pfn:#x}: is the head of a compound page that is not whole")
    free = int(idle[1:].sum())
    if free != host.free_frames:
        wrong.append(f"{free} frames have no reference, {host.free_frames} are free")
    if not host.flags(ZERO_PFN) & PG_RESERVED or host.read(ZERO_PFN, 0, 4096) != _ZEROS:
        wrong.append("the zero page is not what it should be")
    return wrong


def _lru(host: HostMemory) -> list[str]:
    """Every page is on exactly one LRU list, the one that its flags name, and nothing else is on any."""
    wrong = []
    meta = host.meta_view().copy()
    flags, mappings, links = meta["flags"].tolist(), meta["mapping"].tolist(), meta["link"].tolist()
    listed: Counter[int] = Counter()
    for number in range(LRU_ACTIVE_FILE + 1):
        pages = host.lru_pages(number)
        listed.update(pages)
        if len(pages) != host.lru_count(number) or host.lru_tail(number) != (pages[-1] if pages else 0):
            wrong.append(f"LRU list {number} has {len(pages)} pages, counted {host.lru_count(number)}")
        for previous, pfn in zip([0, *pages], pages, strict=False):
            if links[pfn] >> 32 != previous:
                wrong.append(f"frame {pfn:#x}: stands behind {previous:#x} on LRU list {number}, but does not know it")
            if bool(flags[pfn] & PG_ACTIVE) + 2 * bool(flags[pfn] & PG_FILE) != number:
                wrong.append(f"frame {pfn:#x}: is on LRU list {number}, its flags are {flags[pfn]:#x}")
    named = ((meta["mapping"] != 0) | ((meta["flags"] & PG_LRU) != 0)).nonzero()[0].tolist()
    for pfn in sorted({*named, *listed} - {ZERO_PFN}):
        expected = 1 if mappings[pfn] and not flags[pfn] & PG_HUGETLB else 0
        if listed[pfn] != expected or bool(flags[pfn] & PG_LRU) != bool(expected):
            wrong.append(f"frame {pfn:#x}: is {listed[pfn]} times on LRU lists, not {expected}")
    return wrong
