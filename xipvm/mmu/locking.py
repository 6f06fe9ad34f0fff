"""Which locks the operations of an mm take, and what they keep apart.

====================  ==================================================================================================
mmap_lock, write      whoever changes the list of areas or one of them: mmap, munmap, mprotect, mremap, mlock, brk,
                      fork, clear_refs, the end of the mm, a notifier that joins. munmap goes on as a reader once its
                      areas are unlinked
mmap_lock, read       madvise, and faults while they notify or ask a file
====================  ==================================================================================================

A fault that only fills an entry passes no point, so it looks whether there is a writer and takes nothing. While a file
reads a page in, mmap_lock is not held (Linux drops it, too): who comes back from there looks at everything again.
Truncation and write-back come from the file's side and take no mmap_lock.
"""
