"""Which locks the operations of an mm take, and what they keep apart. Their order is in :mod:`xipvm.locks.order`.

=====================  =================================================================================================
mmap_lock, write       whoever changes the list of areas or one of them: mmap, munmap, mprotect, mremap, mlock, brk,
                       fork, clear_refs, the end of the mm, a notifier that joins. munmap goes on as a reader once its
                       areas are unlinked. Also who replaces a page table by a huge page (collapse)
mmap_lock, read        madvise, KSM for the page that it merges, and faults while they notify or ask a file
sb_writers             of a file system: who changes it, faults at a level of their own; shut while it is frozen
i_rwsem                of a file: who writes to it, truncates it or punches holes
invalidate_lock        of a disk file: a page is read in (read); pages are taken out (write)
page lock              migration, reclaim and KSM (only if it is free), write-back, a page that leaves its cache, a
                       compound page, by its first frame, that is split. A fault that finds the page of a file or of the
                       swap cache locked waits, and looks again
i_mmap_rwsem, read     truncation, write-back and unmapping walk the areas of a file, their ranges included
i_mmap_rwsem, write    an area appears or goes, is split or merged
anon_vma, read         migration, reclaim and KSM walk the areas of an anonymous page, their ranges included
anon_vma, write        as i_mmap_rwsem; the first page of an area, and fork
page table lock        an entry is looked at again and changed, with the flush: COW, unmapping, KSM, write-back, ageing.
                       What changes a whole range of entries passes no point meanwhile, and only waits for others' locks
=====================  =================================================================================================

A fault that only fills an entry passes no point, so it looks whether there is a writer and takes nothing. While a file
reads a page in, mmap_lock is not held (Linux drops it, too): who comes back from there looks at everything again.
Truncation and write-back come from the file's side and take no mmap_lock. mm_take_all_locks takes every rmap lock of an
mm (all_locks.py).
"""
