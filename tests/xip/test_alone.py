"""Faults of XIP files go a shorter way where nobody can come between: to the same end, with the same events."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xipvm.actors import on_point
from xipvm.address import PAGE_SIZE
from xipvm.errors import MmError
from xipvm.locks import checking
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.vma import MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xip.dax import DaxFile
from xipvm.xip.filemap import XipFile
from xipvm.xip.host_file import HostInode
from xipvm.xip.open_file import OpenFile

PAGES = 5
Operation = tuple[str, int, int]


def happened(path: Path, protocol: str, form: type[XipFile], operations: list[Operation], *, watched: bool) -> Any:
    """Events and results of ``operations``; ``watched``: somebody is at every point, and locks are checked."""
    with path.open("wb") as file:
        file.seek(3 * PAGE_SIZE)
        file.write(b"fourth")
        file.truncate(PAGES * PAGE_SIZE)
    events: list[Event] = []
    results: list[object] = []
    with ExitStack() as stack:
        host = HostMemory(4 << 20)
        trace = Trace()
        trace.attach(events.append)
        mm = Mm(host, trace, protocol=protocol)
        inode = HostInode(host, str(path))
        stack.callback(inode.close)
        stack.callback(mm.exit)
        file_ = form(host, trace, inode)
        opened = OpenFile(file_)
        maps = [
            mm.mmap(PAGES * PAGE_SIZE, PROT_READ | PROT_WRITE, flags, file=file_) for flags in (MAP_PRIVATE, MAP_SHARED)
        ]
        if watched:
            stack.enter_context(checking())
            stack.enter_context(on_point(lambda label: None))
        for name, where, page in operations:
            hva = maps[where] + page * PAGE_SIZE
            try:
                if name == "load":
                    results.append(mm.read(hva, 8))
                elif name == "store":
                    mm.write(hva, b"%8d" % len(events))
                elif name == "write":
                    opened.lseek(page * PAGE_SIZE)
                    opened.put(b"written")
                elif name == "hole":
                    file_.punch_hole(page, 1)
                else:
                    file_.truncate(page * PAGE_SIZE + 100)
            except MmError as error:
                results.append(error.errno)
    return events, results


@pytest.mark.parametrize(("protocol", "form"), [("2008", XipFile), ("modern", XipFile), ("modern", DaxFile)])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["load", "load", "store", "store", "write", "hole", "truncate"]),
            st.integers(0, 1),
            st.integers(0, PAGES - 1),
        ),
        max_size=14,
    )
)
def test_who_is_alone_sees_what_others_see(
    tmp_path: Path, protocol: str, form: type[XipFile], operations: list[Operation]
) -> None:
    path = tmp_path / "file"
    alone = happened(path, protocol, form, operations, watched=False)
    assert happened(path, protocol, form, operations, watched=True) == alone
