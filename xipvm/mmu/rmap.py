"""Reverse mapping: from a frame to the entries that map it.

A mapped frame names its root by id: the anon_vma of the area that first mapped it, or the address space (page
cache) that it belongs to. The root knows the areas that may map its pages, and a page's ``index`` says where in
each of them. As in Linux an anon_vma is shared by the pieces of a split area; at fork the child's area joins all
anon_vmas of the parent's and gets one of its own for the pages it will copy.

Invariant: if an entry of an area maps an anonymous frame, the frame's root is in the area's ``anon_chain`` and the
area is in the root's ``areas``; for a page-cache frame the root is the area's file; for a page that KSM shares it is a
root of its own, and one of its places leads to the entry.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

from xipvm.address import PAGE_SHIFT
from xipvm.locks.lock import KeyedLocks, RwLock
from xipvm.locks.order import ANON_VMA, PAGE_LOCK
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.pte import MAPPED, pte_pfn

if TYPE_CHECKING:
    from xipvm.mmu.device_private import DeviceMemory
    from xipvm.mmu.file import AddressSpace
    from xipvm.mmu.mm import Mm
    from xipvm.mmu.reclaim import Reclaim
    from xipvm.mmu.swap import Swap
    from xipvm.mmu.vma import Vma


PMD_SHIFT: Final = 21
"""An address without these bits is the number of a page table, and of its lock."""


class AnonVma:
    """A root of anonymous pages. ``areas`` keeps the order in which they joined.

    ``rwsem`` is the lock of the whole family: of the oldest one that it descends from by forks.
    """

    __slots__ = ("areas", "id", "rwsem")

    def __init__(self, id: int, parent: AnonVma | None = None) -> None:
        self.id = id
        self.areas: dict[Vma, None] = {}
        self.rwsem: RwLock = RwLock(f"anon_vma {id}", ANON_VMA) if parent is None else parent.rwsem


class AreaLocks:
    """A context for who changes which areas a walk finds, or where: i_mmap of the file and the anon_vma, for writing.

    Of those that ``area`` has; ``anon`` is False for who changes only what walks from the file's side find.
    """

    __slots__ = ("_locks",)

    def __init__(self, area: Vma, *, anon: bool = True) -> None:
        locks = [] if area.file is None else [area.file.i_mmap.write]
        if anon and area.anon_chain:
            locks.append(area.anon_chain[0].rwsem.write)
        self._locks = locks

    def __enter__(self) -> None:
        taken = 0
        try:
            for lock in self._locks:
                lock.__enter__()
                taken += 1
        except BaseException:
            del self._locks[taken:]
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self._locks):
            lock.__exit__()


class KsmRoot:
    """The root of a page that stands for equal pages of many places (ksm.py): each place has an offset of its own."""

    __slots__ = ("id", "pfn", "places")

    def __init__(self, id: int, pfn: int) -> None:
        self.id = id
        self.pfn = pfn
        self.places: dict[tuple[AnonVma, int], None] = {}
        """Where it was mapped in: an anon_vma and the offset in it. Some may have another page by now."""


class ReverseMap:
    """The roots and the mms of one host memory; :func:`reverse_map` finds it."""

    def __init__(self) -> None:
        self.mms: dict[Mm, None] = {}
        """Every mm that has not exited."""
        self._roots: dict[int, AnonVma] = {}
        self._files: weakref.WeakValueDictionary[int, AddressSpace] = weakref.WeakValueDictionary()
        self._ksm_roots: dict[int, KsmRoot] = {}
        self._last_id = 0
        self.swap: Swap | None = None
        """The swap of this memory, None before the first swapon."""
        self.devices: DeviceMemory | None = None
        """The pages of devices, None while there are none: then no entry stands for one either."""
        self.reclaim: Reclaim | None = None
        """Who makes room in this memory, None where nobody does."""
        self.ksm: object = None
        """What ksm.py knows of this memory."""
        self.thp: object = None
        """What thp.py knows of it."""
        self.sparse_page = 0
        """The page that stands for every hole of files used in place (xip/sparse.py), 0 before there is one.

        It has no root: its entries are found by the files that they are holes of.
        """
        self.thp_always = False
        """Faults make huge pages where nobody asked for them."""
        self.gru: object = None
        """The chiplets of this host, None where nobody uses any."""
        self.page_lock = KeyedLocks("page lock of frame {:#x}", PAGE_LOCK)
        """The locks of its frames."""

    def areas(self, root: int) -> tuple[Vma, ...]:
        """The areas that may map pages of the anon_vma or address space ``root``."""
        found = self._roots.get(root) or self._files.get(root)
        return tuple(found.areas) if found is not None else ()

    # ---- roots

    def add_file(self, file: AddressSpace) -> int:
        """Gives an address space its id. It is forgotten with the object."""
        self._last_id += 1
        self._files[self._last_id] = file
        return self._last_id

    def file(self, root: int) -> AddressSpace | None:
        """The address space with the id ``root``, None if it is none."""
        return self._files.get(root)

    def files(self) -> list[AddressSpace]:
        """Every address space that still exists, oldest first."""
        return [self._files[id] for id in sorted(self._files)]

    def _new_anon_vma(self, parent: AnonVma | None = None) -> AnonVma:
        self._last_id += 1
        root = self._roots[self._last_id] = AnonVma(self._last_id, parent)
        return root

    def new_ksm_root(self, host: HostMemory, pfn: int) -> KsmRoot:
        """A root in place of the anon_vma of ``pfn``, beginning with the places that this leads to."""
        self._last_id += 1
        root = self._ksm_roots[self._last_id] = KsmRoot(self._last_id, pfn)
        root.places[self._roots[host.mapping(pfn)], host.index(pfn)] = None
        host.set_rmap(pfn, root.id, 0)
        return root

    def ksm_root(self, root: int) -> KsmRoot | None:
        """The root with the id ``root`` if it is one of a shared page."""
        return self._ksm_roots.get(root)

    def drop_ksm_root(self, root: KsmRoot) -> None:
        """Its page is gone."""
        del self._ksm_roots[root.id]

    def prepare(self, area: Vma, reuse: AnonVma | None) -> AnonVma:
        """Gives ``area``, which has none, the anon_vma ``reuse`` or a new one.

        A new one also when ``reuse`` is locked: a fault that fills an entry passes no point, and cannot wait.
        """
        if reuse is None or reuse.rwsem.taken:
            reuse = self._new_anon_vma()
        with reuse.rwsem.write:
            area.anon_vma = reuse
            self._join(area, (reuse,))
        return reuse

    def clone(self, source: Vma, target: Vma) -> None:
        """``target`` may map the pages that ``source`` maps: after a split. The anon_vma is locked."""
        target.anon_vma = source.anon_vma
        self._join(target, source.anon_chain)

    def fork(self, source: Vma, target: Vma) -> None:
        """``target`` is ``source`` in a forked mm."""
        if source.anon_vma is not None:
            with source.anon_vma.rwsem.write:
                target.anon_vma = self._new_anon_vma(source.anon_vma)
                self._join(target, (*source.anon_chain, target.anon_vma))

    def _join(self, area: Vma, roots: tuple[AnonVma, ...]) -> None:
        for root in roots:
            root.areas[area] = None
        area.anon_chain += roots

    def enter(self, area: Vma) -> None:
        """``area`` is new: its file may have pages here from now on. i_mmap of the file is locked."""
        if area.file is not None:
            area.file.areas[area] = None

    def leave(self, area: Vma) -> None:
        """``area`` goes away; its entries have gone before. Waits for walks that are under way."""
        self.leave_anon(area)
        file = area.file
        if file is not None:
            with file.i_mmap.write:
                del file.areas[area]
            file.vma_close(area)
            if not file.areas:
                file.unmapped()

    def leave_anon(self, area: Vma) -> None:
        """No anonymous page of ``area`` is left."""
        chain = area.anon_chain
        if not chain:
            return
        with chain[0].rwsem.write:
            for root in chain:
                del root.areas[area]
                if not root.areas:
                    del self._roots[root.id]
            area.anon_chain = ()
            area.anon_vma = None

    # ---- from a frame to its entries

    def walk_lock(self, host: HostMemory, pfn: int) -> AbstractContextManager[object]:
        """A context in which what :meth:`places` finds for ``pfn`` stays: i_mmap or the anon_vma, locked for reading.

        The caller has locked the page, so that its root stays. A page that KSM shares has places under many anon_vmas;
        Linux locks one after the other, and so does the caller (:meth:`place_lock`).
        """
        root = host.mapping(pfn)
        anon = self._roots.get(root)
        if anon is not None:
            return anon.rwsem.read
        file = self._files.get(root)
        return nullcontext() if file is None else file.i_mmap.read

    def place_lock(self, host: HostMemory, pfn: int, area: Vma) -> AbstractContextManager[object]:
        """What is to be locked for a place in ``area`` of ``pfn``, beside :meth:`walk_lock`."""
        if host.mapping(pfn) in self._ksm_roots and area.anon_chain:
            return area.anon_chain[0].rwsem.read
        return nullcontext()

    def places(self, host: HostMemory, pfn: int) -> Iterator[tuple[Vma, int]]:
        """(area, hva) wherever ``pfn`` may be mapped, whether it is or not."""
        root, index = host.mapping(pfn), host.index(pfn)
        shared = self._ksm_roots.get(root)
        if shared is not None:
            yield from dict.fromkeys(_ksm_places(shared))
            return
        for area in self.areas(root):
            hva = area.address_of(index)
            if hva is not None:
                yield area, hva

    def walk(self, host: HostMemory, pfn: int) -> Iterator[tuple[Vma, int]]:
        """(area, hva) of every entry that maps ``pfn`` now."""
        for area, hva in self.places(host, pfn):
            entry = area.mm.pgd.pte(hva >> PAGE_SHIFT)
            if entry & MAPPED and pte_pfn(entry) == pfn:
                yield area, hva


def _ksm_places(root: KsmRoot) -> Iterator[tuple[Vma, int]]:
    for anon_vma, index in tuple(root.places):
        for area in tuple(anon_vma.areas):
            hva = area.address_of(index)
            if hva is not None:
                yield area, hva


def reverse_map(host: HostMemory) -> ReverseMap:
    """The one reverse map of ``host``. It is kept by ``host``, so that both go together."""
    found = host.rmap
    if found is None:
        found = host.rmap = ReverseMap()
    return found
