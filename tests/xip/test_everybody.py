"""A hole that KVM, the GRU and an RDMA device map at once: a write fills it, and all three see the data next."""

from __future__ import annotations

from pathlib import Path

import pytest

from xipvm.address import PAGE_SIZE
from xipvm.check import Oracle
from xipvm.explore.scripted import ScriptedVcpu
from xipvm.mmu.frames import HostMemory
from xipvm.mmu.mm import Mm
from xipvm.mmu.secondary.gru_2008 import gru_of
from xipvm.mmu.secondary.kvm_2008 import kvm_of
from xipvm.mmu.secondary.odp import OdpUmem
from xipvm.mmu.vma import MAP_PRIVATE, PROT_READ
from xipvm.trace.events import Event
from xipvm.trace.funnel import Trace
from xipvm.xip.filemap import XipFile
from xipvm.xip.open_file import OpenFile
from xipvm.xip.ram import RamVolume
from xipvm.xip.volume import FORMS

DATA = b"new data"


@pytest.mark.parametrize("form", [XipFile, FORMS["modern"]], ids=["sparse page", "dax"])
@pytest.mark.parametrize("protocol", ["modern", "2008"])
def test_all_see_the_data_and_are_told_before_it_is_copied(protocol: str, form: type[XipFile]) -> None:
    host, trace, events = HostMemory(1 << 20), Trace(), list[Event]()
    oracle = Oracle()
    trace.attach(oracle)
    trace.attach(events.append)
    mm = Mm(host, trace, protocol=protocol)
    volume = RamVolume(host, 4)
    file = form(host, trace, volume.file(PAGE_SIZE))
    hva = mm.mmap(PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file)

    kvm, gru = kvm_of(mm, trace, host), gru_of(mm, trace, host)
    guests = []
    for index, mmu in enumerate((kvm, gru)):
        mmu.set_memslot(0, 0, 1, hva)
        vcpu = ScriptedVcpu(mmu.port(0), host, trace, index)
        mmu.vcpus.append(vcpu)
        guests.append(vcpu)
    devices = [OdpUmem(mm, hva, PAGE_SIZE, write=False)] if protocol == "modern" else []  # which interval users need
    views = [lambda vcpu=vcpu: vcpu.load(0) for vcpu in guests] + [
        lambda umem=umem: umem.read(0, 8) for umem in devices
    ]
    assert [view() for view in views] == [bytes(8)] * len(views)

    copied: list[int] = []
    allocated_at = len(events)
    handle = OpenFile(file)
    put = handle.put

    def copy(data: bytes) -> None:
        put(data)
        copied.append(len(events))

    copy(DATA)
    assert [view() for view in views] == [DATA] * len(views)

    said = [event.kind for event in events[allocated_at : copied[0]]]
    alone = protocol == "2008" and form is XipFile  # __xip_unmap tells of the page, truncation and DAX of a range
    told = "mmu_notifier_invalidate_page" if alone else "mmu_notifier_invalidate_range_start"
    assert said.index("xip_allocate") < said.index(told) < said.index("xip_unmapped")
    assert "spte_zap" in said[: said.index("xip_unmapped")]
    assert not oracle.violations
    for umem in devices:
        umem.destroy()
    gru.destroy()
    kvm.destroy()
    mm.exit()
    volume.close()


def test_the_data_comes_behind_the_last_word(tmp_path: Path) -> None:
    """What a mapper sees when nobody maps the hole any more, and before the copy: zeros, of the same block."""
    from xipvm.actors import on_point

    host, trace = HostMemory(1 << 20), Trace()
    mm = Mm(host, trace, protocol="2008")
    volume = RamVolume(host, 4)
    file = XipFile(host, trace, volume.file(PAGE_SIZE))
    hva = mm.mmap(PAGE_SIZE, PROT_READ, MAP_PRIVATE, file=file)
    seen = []
    with on_point(lambda label: seen.append(mm.read(hva, 8)) if label == "mm.xip.write" else None):
        OpenFile(file).put(DATA)
    assert seen == [bytes(8)]
    assert mm.read(hva, 8) == DATA
    mm.exit()
    volume.close()
