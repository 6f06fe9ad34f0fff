"""Pages that belong to larger ones: pins are references to the whole, and recalls go by page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xpmem.world import Node
from xipvm.address import PAGE_SIZE
from xipvm.check import Oracle
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.huge_pmd import HPAGE_SIZE
from xipvm.mmu.madvise import MADV_DONTNEED, MADV_HUGEPAGE
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.xpmem import Xpmem
from xipvm.mmu.verify import verify
from xipvm.mmu.vma import MAP_ANONYMOUS, MAP_HUGETLB, MAP_PRIVATE, PROT_READ, PROT_WRITE
from xipvm.trace.funnel import Trace
from xipvm.xpmem.link import ActorLink
from xipvm.xpmem.node import XpmemNode

RW = PROT_READ | PROT_WRITE


@pytest.fixture(params=["hugetlb", "thp"])
def huge(request: pytest.FixtureRequest) -> Iterator[tuple[Mm, int, Xpmem, Node]]:
    """A huge page at the returned address, all of it attached by a node."""
    trace, oracle = Trace(), Oracle()
    trace.attach(oracle)
    host = HostMemory(16 << 20)
    mm = Mm(host, trace)
    if request.param == "hugetlb":
        host.reserve_huge_pages(2)
        hva = mm.mmap(HPAGE_SIZE, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    else:
        hva = (mm.mmap(2 * HPAGE_SIZE, RW) + HPAGE_SIZE - 1) & -HPAGE_SIZE
        mm.madvise(hva, HPAGE_SIZE, MADV_HUGEPAGE)
    owner = Xpmem(mm)
    owner.register()
    owner.make("memory", hva, HPAGE_SIZE)
    owner_end, node_end = ActorLink.pair("owner", "node0")
    remote = owner.connect(owner_end)
    node = XpmemNode(node_end, "node0", memory=mm)
    owner_end.serve, node_end.serve = (lambda: owner.serve(remote)), node.serve
    node.hello()
    yield mm, hva, owner, Node(remote, node, owner_end, node_end)
    owner.destroy()
    mm.exit()
    assert oracle.violations == []
    assert host.free_frames
    verify(host)
    host.close()


def test_one_page_of_a_huge_one(huge: tuple[Mm, int, Xpmem, Node]) -> None:
    mm, hva, owner, node = huge
    at = node.attach(0, HPAGE_SIZE)
    node.node.store(at, 5 * PAGE_SIZE, b"five")
    assert mm.pgd.huge(hva >> 12)
    assert mm.read(hva + 5 * PAGE_SIZE, 4) == b"five"
    node.node.load(at, 6 * PAGE_SIZE, 1)
    verify(mm.host, held=owner.pins())
    mm.madvise(hva, HPAGE_SIZE, MADV_DONTNEED)
    assert owner.pins() == {}
    assert node.node.recalls == 2
    assert node.node.load(at, 5 * PAGE_SIZE, 4) == bytes(4)


def test_a_copy_after_a_fork(huge: tuple[Mm, int, Xpmem, Node]) -> None:
    mm, hva, owner, node = huge
    at = node.attach(0, HPAGE_SIZE)
    node.node.store(at, 0, b"both")
    child = mm.fork("child")
    node.node.store(at, PAGE_SIZE, b"mine")
    assert child.read(hva, 4) == b"both"
    assert child.read(hva + PAGE_SIZE, 4) == bytes(4)
    assert mm.read(hva, 4) == b"both"
    verify(mm.host, held=owner.pins())
    child.exit()
