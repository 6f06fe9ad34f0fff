"""Files that are used in place, against the same file behind a page cache: reads and faults, ns a page."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.harness import Bench, Figure, compare
from xipvm.address import PAGE_SIZE
from xipvm.mmu.file import AddressSpace
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.host_file import HostFile
from xipvm.mmu.madvise import MADV_NOHUGEPAGE
from xipvm.mmu.mm import Mm
from xipvm.mmu.vma import MAP_PRIVATE, PROT_READ
from xipvm.trace.funnel import Trace
from xipvm.xip.buffer import Bytes
from xipvm.xip.filemap import XipFile
from xipvm.xip.host_file import HostInode
from xipvm.xip.volume import FORMS

_PAGES: Final = 4096
_NS: Final = 1e9
_FORMS: Final = {"2008": "filemap_xip", "modern": "DAX"}


class _World:
    """The file at ``path`` as two files of the model, each in an mm of its own, of ``protocol``."""

    def __init__(self, path: Path, protocol: str, stack: ExitStack) -> None:
        self.host = HostMemory((_PAGES + 2048) * PAGE_SIZE)
        stack.callback(self.host.close)
        trace = Trace()
        inode = HostInode(self.host, str(path), read_only=True)
        stack.callback(inode.close)
        self.in_place: XipFile = FORMS[protocol](self.host, trace, inode)
        self.cached = HostFile(self.host, trace, str(path))
        stack.callback(self.cached.close)
        self.mm = Mm(self.host, trace, protocol=protocol)
        stack.callback(self.mm.exit)


def _read_in_place(world: _World) -> float:
    buffer = Bytes()
    began = time.perf_counter()
    world.in_place.read(buffer, _PAGES * PAGE_SIZE, 0)
    return time.perf_counter() - began


def _read_cached(world: _World) -> float:
    buffer = Bytes()
    began = time.perf_counter()
    for page in range(_PAGES):
        buffer.put(page * PAGE_SIZE, world.cached.pread(page * PAGE_SIZE, PAGE_SIZE))
    return time.perf_counter() - began


def _fault(world: _World, file: AddressSpace, *, small: bool = False) -> float:
    mm, size = world.mm, _PAGES * PAGE_SIZE
    hva = mm.mmap(size, PROT_READ, MAP_PRIVATE, file=file)
    if small:
        mm.madvise(hva, size, MADV_NOHUGEPAGE)
    began = time.perf_counter()
    for at in range(hva, hva + size, PAGE_SIZE):
        mm.get_user_pages(at, write=False)
    seconds = time.perf_counter() - began
    mm.munmap(hva, size)
    return seconds


def xip(bench: Bench) -> Iterator[Figure]:
    """Reads and faults of a file used in place, against the same file in the page cache, ns a page."""
    path = bench.folder / "file"
    path.write_bytes(random.Random(1).randbytes(_PAGES * PAGE_SIZE))
    os.sync()
    for protocol, form in _FORMS.items():
        with ExitStack() as stack:
            world = _World(path, protocol, stack)
            _read_cached(world)  # it is in the page cache from now on
            pairs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
                "read": (partial(_read_in_place, world), partial(_read_cached, world)),
                "fault": (partial(_fault, world, world.in_place), partial(_fault, world, world.cached)),
            }
            if protocol == "modern":
                small = partial(_fault, world, world.in_place, small=True)
                pairs["fault, no huge entries"] = small, partial(_fault, world, world.cached)
            for name, (ours, theirs) in pairs.items():
                times = bench.rounds(ours=ours, theirs=theirs)
                each = {who: [seconds / _PAGES * _NS for seconds in samples] for who, samples in times.items()}
                peer = "file in the page cache" + (", faulted around" if name.startswith("fault") else "")
                yield compare(f"{name}, {form} / page cache", each["ours"], peer, each["theirs"], unit="ns")
