"""The classes of locks, and the order in which one actor may take them.

The order of the host's locks is the one that Linux 6.12 documents at the head of mm/rmap.c and mm/filemap.c, that of
KVM's the one of Documentation/virt/kvm/locking.rst:

* from the file's side: i_rwsem, then invalidate_lock, then the page;
* sb_writers, which keeps changes out of a frozen file system, outside i_rwsem; its level for faults, sb_pagefaults,
  inside mmap_lock and outside invalidate_lock (include/linux/fs.h);
* mmap_lock inside i_rwsem (a write copies from user memory), outside invalidate_lock (a fault takes it);
* xip_sparse_mutex inside mmap_lock and i_rwsem, outside the locks that find the areas of a file (mm/filemap_xip.c);
* the lock of a DAX entry likewise: a file without a page cache locks that as others do the page (fs/dax.c);
* the page lock outside all rmap locks: whoever unmaps a page holds it, and walks the reverse map;
* i_mmap_rwsem outside anon_vma, that of hugetlbfs outside that of others (mm_take_all_locks, and pmd sharing);
* the mutex of a device that watches a range inside rmap locks, for unmapping tells it; nothing sleeps inside it but the
  wait for the device's hardware;
* page table locks inside rmap locks: a walk looks at entries;
* KVM's slots_lock outside mmap_lock, for memslots of KVM's own are mapped under it; slots_arch_lock inside slots_lock;
* the refresh_lock of a gfn_to_pfn cache outside mmap_lock, for a refresh looks pages up; gpc_lock, of the list of
  caches, and a cache's own lock inside all that an invalidation is announced under;
* mmu_notifier_mm->lock, of the list of notifiers, inside all that mm_take_all_locks takes;
* mmu_lock inside the page table lock: the young hooks are called there. Nothing is taken inside mmu_lock.

SRCU read sections have no place: anything may be taken in them, and they may be entered anywhere.
"""

from __future__ import annotations

from typing import Final


class LockClass:
    """All locks of a kind. ``rank``: those with a lower one are taken first; None where only use tells the order.

    ``spins``: who holds it must not sleep; who waits for it does not. ``lenient``: see lock.py.
    """

    __slots__ = ("lenient", "name", "rank", "spins")

    def __init__(self, name: str, rank: int | None = None, *, spins: bool = False, lenient: bool = False) -> None:
        self.name = name
        self.rank = rank
        self.spins = spins
        self.lenient = lenient

    def __repr__(self) -> str:
        return f"<lock class {self.name}>"


SLOTS_LOCK: Final = LockClass("slots_lock", 10)
SLOTS_ARCH_LOCK: Final = LockClass("slots_arch_lock", 11)
GPC_REFRESH_LOCK: Final = LockClass("gpc refresh_lock", 12)
SB_WRITERS: Final = LockClass("sb_writers", 18)
INODE_LOCK: Final = LockClass("i_rwsem", 20, lenient=True)
MMAP_LOCK: Final = LockClass("mmap_lock", 30)
SB_PAGEFAULTS: Final = LockClass("sb_pagefaults", 35)
INVALIDATE_LOCK: Final = LockClass("invalidate_lock", 40, lenient=True)
DAX_ENTRY: Final = LockClass("dax entry", 44, lenient=True)
XIP_SPARSE: Final = LockClass("xip_sparse_mutex", 45, lenient=True)
PAGE_LOCK: Final = LockClass("page lock", 50, lenient=True)
HUGETLB_I_MMAP: Final = LockClass("hugetlb i_mmap_rwsem", 60, lenient=True)
I_MMAP: Final = LockClass("i_mmap_rwsem", 61, lenient=True)
ANON_VMA: Final = LockClass("anon_vma", 70, lenient=True)
DEVICE_MUTEX: Final = LockClass("device mutex", 75)
PTL: Final = LockClass("page table lock", 80, spins=True, lenient=True)
NOTIFIER_LOCK: Final = LockClass("mmu_notifier_mm->lock", 90, spins=True, lenient=True)
GPC_LIST_LOCK: Final = LockClass("gpc_lock", 96, spins=True, lenient=True)
GPC_LOCK: Final = LockClass("gpc->lock", 97, spins=True, lenient=True)
MMU_LOCK: Final = LockClass("mmu_lock", 100, spins=True, lenient=True)
