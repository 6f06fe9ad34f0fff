"""Page tables and host memory that say what their callers touch (footprint.py): subclasses of the native ones.

A write that changes nothing counts as a look. What is not described here makes the step unknown. Resources: entries of
a table by page, and by 2 MiB the table itself; of a host memory ``("data", pfn)``, ``("meta", head)`` of a page, and
as wholes the free list, the LRU lists and the pool of huge pages.
"""

# ruff: noqa: D102  # methods do what those do for which they stand

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

from xipvm.explore import footprint
from xipvm.mmu.frames import DEVICE_PFN, HostMemory
from xipvm.mmu.pte import HUGE, pte_pfn
from xipvm.mmu.tables import Gather, PageTable

_END: Final = 1 << 36
_FREE: Final = "free frames"
_LRU: Final = "lru"
_POOL: Final = "huge pages"
_COUNT: Final = "count"
_FLAGS: Final = "flags"
_ROOT: Final = "root"
_PARTS: Final = (_COUNT, _FLAGS, _ROOT)
"""Of the metadata of a page."""


_present: Final[Any] = vars(PageTable)["present"]


def _of(index: int) -> tuple[str, int]:
    return "table", index >> 9


def _born(thing: object) -> None:
    now = footprint.current()
    if now is not None:
        now.born(thing)


class RecordedTable(PageTable):
    """A page table."""

    def __init__(self, levels: int) -> None:
        _born(self)

    def _look(self, index: int) -> None:
        now = footprint.current()
        if now is not None:
            now.access(self, index, False)
            now.access(self, _of(index), False)

    def _change(self, index: int, old: int, new: int) -> None:
        now = footprint.current()
        if now is not None:
            now.access(self, index, old != new)
            now.access(self, _of(index), old != new and (old | new) & HUGE != 0)

    @property
    def present(self) -> int:  # type: ignore[override]  # as the native one, which cannot be set either
        self._span(0, 1 << 9 * self.levels)
        return int(_present.__get__(self))

    def _span(self, start: int, end: int) -> list[tuple[int, int]]:
        """All of [start, end) is looked at; the entries there."""
        now = footprint.current()
        if now is None:
            return []
        now.access_range(self, start, end, False)
        for table in range(start >> 9, min((end - 1 >> 9) + 1, (start >> 9) + 8)):
            now.access(self, ("table", table), False)
        return super().entries(start, end)

    def get(self, index: int) -> int:
        self._look(index)
        return super().get(index)

    def pte(self, index: int) -> int:
        self._look(index)
        return super().pte(index)

    def set(self, index: int, entry: int) -> int:
        old = super().set(index, entry)
        self._change(index, old, entry)
        return old

    def cmpxchg(self, index: int, old: int, new: int) -> bool:
        done = super().cmpxchg(index, old, new)
        self._change(index, old, new if done else old)
        return done

    def pmd_none(self, index: int) -> bool:
        self._span(index & -512, (index & -512) + 512)
        return super().pmd_none(index)

    def huge(self, index: int) -> int:
        now = footprint.current()
        if now is not None:
            now.access(self, _of(index), False)
        return super().huge(index)

    def next_present(self, start: int, end: int) -> int:
        self._span(start, end)
        return super().next_present(start, end)

    def entries(self, start: int, end: int) -> list[tuple[int, int]]:
        self._span(start, end)
        return super().entries(start, end)

    def _clear(self, start: int, end: int) -> None:
        for index, entry in self._span(start, end):
            self._change(index, entry, 0)

    def zap(self, start: int, end: int, runs: bool = True) -> list[tuple[int, int]]:
        self._clear(start, end)
        return super().zap(start, end, runs)

    def _changing(self, start: int, end: int, act: Callable[[], Any]) -> Any:
        before = dict(self._span(start, end))
        result = act()
        if before:
            for index, entry in super().entries(start, end):
                self._change(index, before.get(index, 0), entry)
        return result

    def clear_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        return int(self._changing(start, end, lambda: PageTable.clear_bits(self, start, end, mask, where)))

    def set_bits(self, start: int, end: int, mask: int, where: int = 0) -> int:
        return int(self._changing(start, end, lambda: PageTable.set_bits(self, start, end, mask, where)))

    def change_bits(self, start: int, end: int, clear: int, set: int, where: int = 0) -> int:
        return int(self._changing(start, end, lambda: PageTable.change_bits(self, start, end, clear, set, where)))

    def protect(self, start: int, end: int, *rest: Any, **named: Any) -> Any:
        return self._changing(start, end, lambda: PageTable.protect(self, start, end, *rest, **named))

    def gup(self, index: int, write: bool) -> Any:
        before = super().pte(index)
        page = super().gup(index, write)
        self._change(index, before, super().pte(index))
        return page

    def map_anon(self, index: int, flags: int, host: HostMemory, mapping: int, offset: int) -> int:
        pfn = super().map_anon(index, flags, host, mapping, offset)
        self._change(index, int(pfn == -1), 1)
        if pfn != -1:
            _frame(host, pfn, _FREE, _LRU)
        return pfn

    def zap_mapped(self, start: int, end: int, gather: Gather, *rest: Any, **named: Any) -> Any:
        host = getattr(gather, "memory", None)
        for index, entry in self._span(start, end):
            self._change(index, entry, 0)
            _frame(host, pte_pfn(entry))
        return super().zap_mapped(start, end, gather, *rest, **named)

    def copy_to(self, child: PageTable, start: int, end: int, host: HostMemory, *rest: Any, **named: Any) -> Any:
        for _, entry in self._span(start, end):
            _frame(host, pte_pfn(entry))
        now = footprint.current()
        if now is not None:
            now.access_range(child, 0, _END, True)
        return self._changing(start, end, lambda: PageTable.copy_to(self, child, start, end, host, *rest, **named))


def _frame(host: Any, pfn: int, *wholes: str) -> None:
    """Metadata of ``pfn`` change, and the lists ``wholes``."""
    now = footprint.current()
    if now is None:
        return
    if host is None:
        now.dont_know("frames of an unknown memory")
        return
    if wholes:
        now.access(host, ("data", pfn), True)
    try:
        pfn = HostMemory.compound_head(host, pfn)
    except IndexError:  # what is no frame, as the slot of a swap entry
        return
    for part in _PARTS:
        now.access(host, (part, pfn), True)
    for each in wholes:
        now.access(host, each, True)


class RecordedMemory(HostMemory):
    """The host's memory."""

    def __init__(self, size_bytes: int, **named: Any) -> None:
        _born(self)

    def _meta(self, part: str, pfn: int, write: bool) -> None:
        now = footprint.current()
        if now is not None:
            now.access(self, (part, HostMemory.compound_head(self, pfn)), write)

    def _data(self, pfn: int, write: bool) -> None:
        now = footprint.current()
        if now is not None:
            if pfn >= DEVICE_PFN:  # others see the same bytes through a memoryview
                now.access(footprint.VIEWS, "", write)
            now.access(self, ("data", pfn), write)

    def _whole(self, what: str, write: bool) -> None:
        now = footprint.current()
        if now is not None:
            now.access(self, what, write)

    def alloc(self, zero: bool = True) -> Any:
        self._whole(_FREE, True)
        pfn = super().alloc(zero)
        _frame(self, pfn, _FREE)
        return pfn

    def alloc_huge(self, zero: bool = True) -> Any:
        pfn = super().alloc_huge(zero)
        now = footprint.current()
        if now is not None:
            _frame(self, pfn, _FREE)
            for each in range(512):
                now.access(self, ("data", pfn + each), True)
        return pfn

    def _put(self, pfn: int, act: Callable[[], Any]) -> Any:
        head = HostMemory.compound_head(self, pfn)
        self._meta(_COUNT, pfn, True)
        freed = act()
        now = footprint.current()
        if freed and now is not None:
            _frame(self, pfn, _FREE, _LRU)
            if head != pfn or freed not in (True, [(pfn, 1)]):
                now.dont_know("a compound page is freed")
        return freed

    def put(self, pfn: int) -> bool:
        return bool(self._put(pfn, lambda: HostMemory.put(self, pfn)))

    def put_page(self, pfn: int) -> list[tuple[int, int]]:
        freed: list[tuple[int, int]] = self._put(pfn, lambda: HostMemory.put_page(self, pfn))
        return freed

    def get(self, pfn: int) -> None:
        self._meta(_COUNT, pfn, True)
        super().get(pfn)

    def pin(self, pfn: int) -> None:
        self._meta(_COUNT, pfn, True)
        super().pin(pfn)

    def unpin(self, pfn: int) -> list[tuple[int, int]]:
        freed: list[tuple[int, int]] = self._put(pfn, lambda: HostMemory.unpin(self, pfn))
        return freed

    def set_flags(self, pfn: int, mask: int) -> None:
        before = HostMemory.flags(self, pfn)
        super().set_flags(pfn, mask)
        self._meta(_FLAGS, pfn, before != HostMemory.flags(self, pfn))

    def clear_flags(self, pfn: int, mask: int) -> None:
        before = HostMemory.flags(self, pfn)
        super().clear_flags(pfn, mask)
        self._meta(_FLAGS, pfn, before != HostMemory.flags(self, pfn))

    def set_rmap(self, pfn: int, mapping: int, index: int) -> None:
        self._meta(_ROOT, pfn, True)
        self._meta(_FLAGS, pfn, True)
        self._whole(_LRU, True)
        super().set_rmap(pfn, mapping, index)

    def lru_move(self, pfn: int, list: int) -> None:
        self._meta(_FLAGS, pfn, True)
        self._whole(_LRU, True)
        super().lru_move(pfn, list)

    def lru_isolate(self, pfn: int) -> bool:
        self._meta(_FLAGS, pfn, True)
        self._whole(_LRU, True)
        return super().lru_isolate(pfn)

    def read(self, pfn: int, offset: int, size: int) -> bytes:
        self._data(pfn, False)
        return super().read(pfn, offset, size)

    def write(self, pfn: int, offset: int, data: Any) -> None:
        same = (
            HostMemory.read(self, pfn, offset, len(data)) == bytes(data) if footprint.current() is not None else False
        )
        self._data(pfn, not same)
        super().write(pfn, offset, data)

    def copy(self, source: int, target: int) -> None:
        self._data(source, False)
        self._data(target, True)
        super().copy(source, target)

    def touch(self, pfn: int) -> None:
        self._data(pfn, True)
        super().touch(pfn)


class RecordedGather(Gather):
    """Frames of one operation."""

    memory: HostMemory

    def __init__(self, host: HostMemory) -> None:
        self.memory = host
        _born(self)

    def free_all(self, runs: bool = True) -> list[tuple[int, int]]:
        now = footprint.current()
        if now is not None:
            for pfn in self.pages():
                _frame(self.memory, pfn, _FREE, _LRU)
                if HostMemory.is_compound(self.memory, pfn):
                    now.dont_know("a compound page is freed")
        return super().free_all(runs)


_LOOKS: Final[dict[type, dict[str, Callable[[Any, Any], None]]]] = {
    RecordedMemory: {
        **dict.fromkeys(
            ("refcount", "mapcount", "total_mapcount", "entire_mapcount"),
            lambda self, pfn: self._meta(_COUNT, pfn, False),
        ),
        **dict.fromkeys(
            ("add_mapcount", "add_entire_mapcount"),
            lambda self, pfn: self._meta(_COUNT, pfn, True),
        ),
        **dict.fromkeys(("mapping", "index"), lambda self, pfn: self._meta(_ROOT, pfn, False)),
        **dict.fromkeys(
            ("flags", "compound_head", "is_compound"),
            lambda self, pfn: self._meta(_FLAGS, pfn, False),
        ),
        "lru_tail": lambda self, _: self._whole(_LRU, False),
        "lru_count": lambda self, _: self._whole(_LRU, False),
        "lru_pages": lambda self, _: self._whole(_LRU, False),
        "is_device": lambda self, pfn: None,
    },
    RecordedTable: {},
    RecordedGather: {"add_page": lambda self, pfn: None, "pages": lambda self, _: None},
}
"""What methods touch, by their first argument."""
_FIELDS: Final[dict[type, dict[str, str]]] = {
    RecordedMemory: {
        "free_frames": _FREE,
        "watermark": "watermark",
        "huge_pages": _POOL,
        "free_huge_pages": _POOL,
        "reserved_huge_pages": _POOL,
        "nr_frames": "size",
        "rmap": "rmap",
    },
    RecordedTable: {"levels": "levels", "mmio_generation": "generation"},
    RecordedGather: {"count": "own", "swaps": "own"},
}
"""Attributes of natives, and the resource that they are a part of; others are not described."""


def _described(native: Any, look: Callable[[Any, Any], None]) -> Any:
    @wraps(native)
    def call(self: Any, *arguments: Any) -> Any:
        if footprint.current() is not None:
            look(self, arguments[0] if arguments else 0)
        return native(self, *arguments)

    return call


def _not_described(name: str, native: Any) -> Any:
    @wraps(native)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        now = footprint.current()
        if now is not None:
            now.dont_know(f"{type(self).__name__}.{name}")
        return native(self, *arguments, **named)

    return call


def _field(name: str, native: Any, part: str | None) -> property:
    def read(self: Any) -> Any:
        now = footprint.current()
        if now is not None:
            now.dont_know(f"{type(self).__name__}.{name}") if part is None else now.access(self, part, False)
        return native.__get__(self)

    def write(self: Any, value: Any) -> None:
        now = footprint.current()
        if now is not None:
            now.dont_know(f"{type(self).__name__}.{name}") if part is None else now.access(self, part, True)
        native.__set__(self, value)

    return property(read, write)


def _complete(kind: type, base: type) -> None:
    """Gives ``kind`` all that ``base`` has and it does not describe itself."""
    for name, native in vars(base).items():
        if name.startswith("__") or name in vars(kind):
            continue
        if not callable(native):
            setattr(kind, name, _field(name, native, _FIELDS[kind].get(name)))
        elif name in _LOOKS[kind]:
            setattr(kind, name, _described(native, _LOOKS[kind][name]))
        else:
            setattr(kind, name, _not_described(name, native))


_REPLACED: Final = {PageTable: RecordedTable, HostMemory: RecordedMemory, Gather: RecordedGather}
for _native, _recorded in _REPLACED.items():
    _complete(_recorded, _native)


@contextmanager
def replaced(packages: tuple[str, ...]) -> Iterator[set[type]]:
    """In the modules of ``packages`` and in scenes the natives are recorded ones; those."""
    changed: list[tuple[dict[str, Any], str, type]] = []
    for name, module in list(sys.modules.items()):
        if module is None or not name.startswith((*packages, "xipvm.explore.scene")):
            continue
        for at, value in vars(module).items():
            if isinstance(value, type) and value in _REPLACED and value.__module__ != name:
                changed.append((vars(module), at, value))
    try:
        for names, at, value in changed:
            names[at] = _REPLACED[value]
        yield set(_REPLACED.values())
    finally:
        for names, at, value in changed:
            names[at] = value
