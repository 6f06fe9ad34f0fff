"""The naive model of host memory: a dict of pages for every process; nothing is shared, merged, copied late or cached.

A page is what its owner sees. A private page that was written has content of its own, and fork copies it at once; any
other shows what its file holds. There are no frames, no entries, no reference counts: nothing here can be stale. A call
returns the errno that Linux documents, 0 when it succeeds, and after an error nothing has changed but where Linux says
that a part is done.

What is not determined stays open: a page given away by MADV_FREE holds its old content or zeros (``maybe_zero``), and
which pages are one area, which decides about EFAULT of mremap, the caller has to say.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

PAGE = 4096
Words = tuple[int, int, int]
"""What a page holds: a word at its start, one in its middle, one at its end."""
OFFSETS = (0, PAGE // 2, PAGE - 8)
EMPTY: Words = (0, 0, 0)

READ, WRITE = 1, 2


def replaced(words: Words, slot: int, word: int) -> Words:
    changed = list(words)
    changed[slot] = word
    return changed[0], changed[1], changed[2]


@dataclass(eq=False)
class NaiveFile:
    """A file, or shared anonymous memory: zeros where nothing was written."""

    size: int
    writable: bool = True
    pages: dict[int, Words] = field(default_factory=dict)

    def words(self, pgoff: int) -> Words:
        return self.pages.get(pgoff, EMPTY)

    def has_page(self, pgoff: int) -> bool:
        return pgoff * PAGE < self.size

    def has_word(self, pgoff: int, slot: int) -> bool:
        return pgoff * PAGE + OFFSETS[slot] + 8 <= self.size

    def put(self, pgoff: int, slot: int, word: int) -> None:
        self.pages[pgoff] = replaced(self.words(pgoff), slot, word)

    def punch(self, pgoff: int, count: int) -> None:
        for hole in range(pgoff, pgoff + count):
            self.pages.pop(hole, None)

    def truncate(self, size: int) -> None:
        self.size = size
        for pgoff in list(self.pages):
            if not self.has_page(pgoff):
                del self.pages[pgoff]
                continue
            for slot in range(len(OFFSETS)):
                if not self.has_word(pgoff, slot):
                    self.put(pgoff, slot, 0)

    def read(self, offset: int, size: int) -> bytes:
        """As pread."""
        data = bytearray(self.size)
        for pgoff, words in self.pages.items():
            for at, word in zip(OFFSETS, words, strict=True):
                if pgoff * PAGE + at + 8 <= self.size:
                    data[pgoff * PAGE + at : pgoff * PAGE + at + 8] = word.to_bytes(8, "little")
        return bytes(data[offset : offset + size])


@dataclass
class Page:
    """One page of a process. ``own``: its private content, None where it shows its file, or zeros without one."""

    prot: int
    file: NaiveFile | None = None
    pgoff: int = 0
    shared: bool = False
    own: Words | None = None
    guard: bool = False
    locked: bool = False
    dontfork: bool = False
    maybe_zero: bool = False
    """It was given away: ``own`` or zeros."""
    soft_dirty: bool = False
    """Was written since soft-dirty bits were cleared, and nothing has taken its entry away since."""

    @property
    def no_page(self) -> bool:
        """Every access is a signal."""
        return self.guard or (self.file is not None and self.own is None and not self.file.has_page(self.pgoff))

    @property
    def value(self) -> Words:
        if self.own is not None:
            return self.own
        return EMPTY if self.file is None else self.file.words(self.pgoff)

    def allows(self, access: int) -> bool:
        return not self.no_page and self.prot != 0 and (access == READ or bool(self.prot & WRITE))

    def has_room(self, slot: int) -> bool:
        """A store to the word is not one behind the end of the file, which may be lost or not."""
        return self.file is None or not self.shared or self.file.has_word(self.pgoff, slot)

    def drop(self) -> None:
        self.own, self.maybe_zero, self.soft_dirty = None, False, False

    def write(self, slot: int, word: int) -> None:
        assert not self.maybe_zero, "somebody has to look first"
        self.soft_dirty = True
        if self.shared:
            assert self.file is not None
            self.file.put(self.pgoff, slot, word)
        else:
            self.own = replaced(self.value, slot, word)

    def fault_in_for_write(self) -> None:
        """As by a write that changes nothing."""
        if not self.shared and self.own is None:
            self.own = self.value


@dataclass
class Slot:
    """A memslot: guest frames ``[gfn, gfn + pages)`` show the pages from ``page`` on."""

    gfn: int
    pages: int
    page: int
    readonly: bool = False


@dataclass
class NaiveProcess:
    """An address space: its pages by page number, and the memslots of its VM."""

    start_brk: int
    end_brk: int
    pages: dict[int, Page] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)

    def mapped(self, pages: Iterable[int]) -> list[Page]:
        return [self.pages[page] for page in pages if page in self.pages]

    def hole(self, pages: Iterable[int]) -> bool:
        return any(page not in self.pages for page in pages)

    # ---- areas

    def mmap(self, first: int, count: int, like: Page, *, noreplace: bool = False) -> int:
        """Maps ``count`` pages as ``like``, the first one."""
        if like.file is not None and like.shared and like.prot & WRITE and not like.file.writable:
            return errno.EACCES
        if noreplace and self.mapped(range(first, first + count)):
            return errno.EEXIST
        for at in range(count):
            self.pages[first + at] = replace(like, pgoff=like.pgoff + at)
        return 0

    def munmap(self, pages: range) -> int:
        if not pages:
            return errno.EINVAL
        for page in pages:
            self.pages.pop(page, None)
        return 0

    def brk(self, addr: int) -> int:
        """Returns the end of the heap, in bytes."""
        old, new = -(-self.end_brk // PAGE), -(-addr // PAGE)
        if addr < self.start_brk or (new > old and self.mapped(range(old, new))):
            return self.end_brk
        if new > old:
            self.mmap(old, new - old, Page(READ | WRITE))
        elif new < old:
            self.munmap(range(new, old))
        self.end_brk = addr
        return addr

    def mprotect(self, pages: range, prot: int) -> int:
        if self.hole(pages):
            return errno.ENOMEM
        mapped = self.mapped(pages)
        if prot & WRITE and any(page.shared and page.file is not None and not page.file.writable for page in mapped):
            return errno.EACCES
        for page in mapped:
            page.prot = prot
        return 0

    def move(self, source: range, to: int, new_count: int, *, keep: bool, unlock: Iterable[int] = ()) -> None:
        """mremap, when it succeeds. ``unlock``: the pages of the area that DONTUNMAP leaves behind."""
        moved = [self.pages[page] for page in source]
        last = moved[-1]
        for page in source:
            if keep:
                self.pages[page] = replace(self.pages[page], own=None, guard=False, maybe_zero=False, soft_dirty=False)
            else:
                del self.pages[page]
        for at in range(new_count):
            if at < len(moved):
                self.pages[to + at] = moved[at]
            else:
                more = replace(last, own=None, guard=False, maybe_zero=False, soft_dirty=False)
                self.pages[to + at] = replace(more, pgoff=last.pgoff + at - len(moved) + 1)
        for page in unlock:
            if page in self.pages and not to <= page < to + new_count:
                self.pages[page].locked = False
        self.populate_locked(range(to + len(moved), to + new_count))

    # ---- advice

    def dontneed(self, pages: range) -> int:
        error = self._refused(pages)
        for page in self.mapped(pages) if not error else ():
            page.drop()
        return error

    def _refused(self, pages: range, *, locked: bool = True, files: bool = False) -> int:
        mapped = self.mapped(pages)
        if any((locked and page.locked) or (files and page.file is not None) for page in mapped):
            return errno.EINVAL
        return errno.ENOMEM if self.hole(pages) else 0

    def free(self, pages: range) -> int:
        error = self._refused(pages, files=True)
        for page in self.mapped(pages) if not error else ():
            page.maybe_zero = page.own is not None
        return error

    def cold(self, pages: range) -> int:
        """Also PAGEOUT: what pages hold stays."""
        return self._refused(pages)

    def flag(self, pages: range) -> int:
        """Advice that changes what areas are: MERGEABLE, UNMERGEABLE, WILLNEED."""
        return self._refused(pages, locked=False)

    def dontfork(self, pages: range, on: bool) -> int:
        error = self._refused(pages, locked=False)
        for page in self.mapped(pages) if not error else ():
            page.dontfork = on
        return error

    def guard(self, pages: range, on: bool) -> int:
        error = self._refused(pages, locked=on)
        for page in self.mapped(pages) if not error else ():
            page.guard = on
            if on:
                page.drop()
        return error

    def populate(self, pages: range, access: int) -> int:
        if self.hole(pages):
            return errno.ENOMEM
        mapped = self.mapped(pages)
        if any(not page.prot or (access == WRITE and not page.prot & WRITE) for page in mapped):
            return errno.EINVAL
        for page in mapped:
            if page.no_page:
                return errno.EFAULT
            if access == WRITE:
                page.fault_in_for_write()
        return 0

    def remove(self, pages: range, everybody: Iterable[Page]) -> int:
        error = self._refused(pages)
        if error:
            return error
        for page in self.mapped(pages):
            if page.file is None:
                return errno.EINVAL
            if not page.shared or not page.file.writable:
                return errno.EACCES
        for page in self.mapped(pages):
            assert page.file is not None
            page.file.punch(page.pgoff, 1)
        for page in everybody:
            page.soft_dirty &= page.own is not None
        return 0

    def mlock(self, pages: range, on: bool) -> int:
        if self.hole(pages):
            return errno.ENOMEM
        for page in self.mapped(pages):
            page.locked = on
        return self.populate_locked(pages) if on else 0

    def populate_locked(self, pages: range) -> int:
        for page in self.mapped(pages):
            if page.locked and not page.allows(READ):
                return errno.ENOMEM
            if page.locked and page.prot & WRITE:
                page.fault_in_for_write()
        return 0

    def msync(self, pages: range, *, invalidate: bool) -> int:
        if self.hole(pages):
            return errno.ENOMEM
        return errno.EBUSY if invalidate and any(page.locked for page in self.mapped(pages)) else 0

    # ---- accesses

    def at(self, page: int) -> Page | None:
        return self.pages.get(page)

    def access(self, page: int, access: int) -> int:
        found = self.pages.get(page)
        return 0 if found is not None and found.allows(access) else errno.EFAULT

    def forced(self, page: int) -> int:
        """A write through /proc/pid/mem."""
        found = self.pages.get(page)
        allowed = found is not None and not found.no_page and (found.prot & WRITE or not found.shared)
        return 0 if allowed else errno.EIO

    def guest(self, gfn: int, access: int) -> tuple[str, int]:
        """What becomes of a guest's access, and the page that it reaches."""
        for slot in self.slots.values():
            if slot.gfn <= gfn < slot.gfn + slot.pages:
                page = slot.page + gfn - slot.gfn
                if slot.readonly and access == WRITE:
                    return "mmio", page
                return "fault" if self.access(page, access) else "ok", page
        return "fault", -1

    # ---- processes

    def fork(self) -> NaiveProcess:
        child = NaiveProcess(self.start_brk, self.end_brk)
        for page, mapped in self.pages.items():
            if not mapped.dontfork:
                child.pages[page] = replace(mapped, locked=False, soft_dirty=False)
        return child


def truncate(file: NaiveFile, size: int, mapped: Iterator[Page]) -> None:
    """``mapped``: every page of any process."""
    shrinks = size < file.size
    file.truncate(size)
    for page in mapped if shrinks else ():
        if page.file is file and not file.has_page(page.pgoff):
            page.drop()
