"""What a report says besides the events: which steps are missing before the one that came too early, and what is read.

The order that everybody is held to is oracle.py's. For a broken invariant :func:`chain` tells it for the page in
question, step by step, from the event that put the translation there to the one that may only come behind all others; a
step that has happened has its event's number, one that has not says ``missing``. :func:`reads` tells what those who
still translate to a frame find in it: by the events, to whom it belongs; with a reader of host memory, the bytes too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from xipvm.address import PAGE_SHIFT
from xipvm.errors import XipvmError
from xipvm.trace.events import Event

if TYPE_CHECKING:
    from xipvm.check.oracle import Oracle
    from xipvm.check.world import Entry, Vm

POISON: Final = 0x6B
"""What freed frames are filled with (mmu/frames.pyx)."""
SHOWN: Final = 16
"""Bytes of a frame that are shown."""
HOLDERS: Final = 8
"""At most so many who translate to a frame are told of."""

Reader = Callable[[int], bytes]
"""The first bytes of a host frame; raises LookupError or ValueError when there is none of that number."""


class Frames(Protocol):
    """Host memory, as far as a report looks into it."""

    def read(self, pfn: int, offset: int, size: int, /) -> bytes:
        """``size`` bytes of a frame; raises LookupError or ValueError when there is none of that number."""


def reader_of(host: Frames) -> Reader:
    """The reader of ``host``."""
    return lambda pfn: host.read(pfn, 0, SHOWN)


class Step(NamedTuple):
    """Something that has to happen; ``seq`` is the event by which it did, 0 when it did not."""

    seq: int
    what: str

    def __str__(self) -> str:
        return f"{f'#{self.seq}' if self.seq else 'missing':>8}  {self.what}"


class Holder(NamedTuple):
    """Somebody who translates to a frame. ``until``: what makes him forget it."""

    who: str
    where: str
    entry: Entry
    got: str
    until: str


def holders(oracle: Oracle, pfn: int) -> list[Holder]:
    """Everybody who translates to frame ``pfn``, the shadow entries first."""
    world = oracle.world
    found: list[Holder] = []
    for vm in world.vms.values():
        for until, table in (("spte_zap", vm.sptes), *((_chiplet(n), tlb) for n, tlb in vm.chiplets.items())):
            for gfn, entry in table.items():
                if entry.pfn == pfn:
                    where = f"guest frame {gfn:#x}"
                    found.append(Holder(vm.name, where, entry, f"{vm.name} maps {where}", f"{until} of {where}"))
    for vcpu, tlb in world.tlbs.items():
        for gfn, entry in tlb.items():
            if entry.pfn == pfn:
                where, who = f"guest frame {gfn:#x}", f"vcpu{vcpu}"
                found.append(Holder(who, where, entry, f"{who} gets {where} into its TLB", f"tlb_flush of {who}"))
    for process in world.mms.values():
        for until, tlbs in (
            ("primary_tlb_flush", process.tlbs),
            ("mmu_notifier_arch_invalidate_secondary_tlbs", process.devices),
            ("iotlb_drop", process.iotlbs),
        ):
            for who, tlb in tlbs.items():
                for page, entry in tlb.items():
                    if entry.pfn == pfn:
                        where = f"{page << PAGE_SHIFT:#x}"
                        got = f"{who} of {process.name} gets {where} into its TLB"
                        found.append(Holder(who, where, entry, got, f"{until} of {where}"))
    return found


def chain(
    oracle: Oracle, invariant: str, event: Event, hva: int | None, gfn: int | None, pfn: int | None
) -> list[Step]:
    """What has to happen up to ``event``, in order, with what is missing; empty where there is no such order."""
    told = event.fields.get("mm")
    mm = told if isinstance(told, str) else mm_of(oracle, event)
    last = Step(event.seq, event.kind)
    if invariant == "I5" and pfn is not None and pfn not in oracle.world.freed:
        return [*_forgotten(oracle, pfn), last]
    if invariant == "I8" and pfn is not None:
        written = oracle.world.written.get(pfn, 0)
        return [Step(written, "a shadow entry allows writing"), Step(0, f"swap_out of frame {pfn:#x}"), last]
    if invariant == "I12" and gfn is not None:
        steps = [Step(seen.seq, f"vcpu{vcpu} may write") for vcpu, seen in _in_tlbs(oracle, gfn)]
        return [*steps, *(Step(0, f"tlb_flush of vcpu{vcpu}") for vcpu, _ in _in_tlbs(oracle, gfn)), last]
    if invariant == "I13":
        return [Step(0, "mmu_notifier_register"), last]
    if hva is None or mm is None:
        return []
    if invariant in ("I1", "I3", "I10"):
        return [_start(oracle, mm, hva), *_stale(oracle, mm, hva), last]
    if invariant == "I2" and event.kind.startswith(("spte_set", "tlb_dropin")):
        opened = _start(oracle, mm, hva)
        return [opened, Step(0, f"mmu_notifier_invalidate_range_end of {hva:#x}"), last]
    if invariant == "I4":
        changed = _changed(oracle, hva, mm, last.seq)
        fault = Step(event.cause, "the fault begins, and looks the page up")
        if not changed.seq or not event.cause or changed.seq < event.cause:
            return [changed, fault, last]
        return [fault, changed, Step(0, "a lookup behind that, or the fault is given up"), last]
    if invariant == "I7":
        fault, ended = Step(event.cause, "the lookup begins"), Step(oracle.last_range, "an invalidation of it ends")
        return [fault, ended, Step(0, "the lookup is given up, and begins again"), last]
    if invariant == "I11":
        return [Step(0, f"primary_tlb_flush of {hva:#x}"), last]
    return []


def mm_of(oracle: Oracle, event: Event) -> str | None:
    """The address space that the event's VM is a notifier of."""
    vm = oracle.world.vms.get(event.fields.get("vm", ""))
    return None if vm is None else vm.mm


def _forgotten(oracle: Oracle, pfn: int) -> list[Step]:
    """Whoever got frame ``pfn`` has to be made to forget it."""
    found = holders(oracle, pfn)[:HOLDERS]
    got = sorted(Step(holder.entry.seq, f"{holder.got} (frame {pfn:#x})") for holder in found)
    return [*got, *dict.fromkeys(Step(0, holder.until) for holder in found)]


def _places(oracle: Oracle, mm: str, hva: int) -> list[tuple[Vm, int]]:
    world = oracle.world
    return [(vm, gfn) for vm in world.watchers(mm) for gfn in vm.gfns(hva >> PAGE_SHIFT)]


def _in_tlbs(oracle: Oracle, gfn: int) -> list[tuple[int, Entry]]:
    return [(vcpu, tlb[gfn]) for vcpu, tlb in oracle.world.tlbs.items() if gfn in tlb]


def _stale(oracle: Oracle, mm: str, hva: int) -> list[Step]:
    """Shadow entries of a page that changes have to go, then TLBs have to be flushed of them."""
    zaps: list[Step] = []
    flushes: list[Step] = []
    for vm, gfn in _places(oracle, mm, hva):
        zapped = next((e.seq for e in reversed(oracle.history.touching(gfn=gfn, last=64)) if _removes(e, vm.name)), 0)
        spte = vm.sptes.get(gfn)
        if spte is not None or zapped:
            zaps.append(Step(0 if spte is not None else zapped, f"spte_zap of guest frame {gfn:#x} by {vm.name}"))
        chiplets = (n for n, tlb in vm.chiplets.items() if gfn in tlb)
        zaps += [Step(0, f"{_chiplet(n)} of guest frame {gfn:#x} by {vm.name}") for n in chiplets]
        flushes += [Step(0, f"tlb_flush of vcpu{vcpu}") for vcpu, _ in _in_tlbs(oracle, gfn)]
    return [*zaps, *dict.fromkeys(flushes)]


def _chiplet(number: int) -> str:
    return f"tlb_invalidate on chiplet {number}"


def _removes(event: Event, vm: str) -> bool:
    return event.kind == "spte_zap" and event.fields["vm"] == vm


def _start(oracle: Oracle, mm: str, hva: int) -> Step:
    covering = oracle.world.covering(mm, hva >> PAGE_SHIFT)
    return Step(covering[-1].seq if covering else 0, f"mmu_notifier_invalidate_range_start over {hva:#x} of {mm}")


def _changed(oracle: Oracle, hva: int, mm: str, before: int) -> Step:
    kinds = ("pte_set", "pte_clear", "pte_nonpresent", "pte_protect", "pte_move")
    for event in reversed(oracle.history.touching(hva=hva, mm=mm, last=64)):
        if event.kind in kinds and event.seq < before:
            return Step(event.seq, f"{event.kind} of {hva:#x} in {mm}")
    return Step(0, f"pte_set of {hva:#x} in {mm}")


def reads(oracle: Oracle, event: Event, pfn: int, reader: Reader | None) -> list[str]:
    """What those who translate to frame ``pfn`` find in it when ``event`` has happened."""
    found = [f"{holder.who} at {holder.where}" for holder in holders(oracle, pfn)[:HOLDERS]]
    kind, fields = event.kind, event.fields
    if kind in ("spte_set", "tlb_insert") and fields.get("pfn") == pfn:
        who = fields["vm"] if kind == "spte_set" else f"vcpu{fields['vcpu']}"
        found.append(f"{who} at guest frame {fields['gfn']:#x}")
    if not found:
        return []
    lines = [f"{who} reads frame {pfn:#x}" for who in dict.fromkeys(found)]
    lines.append(f"frame {pfn:#x} {belongs(oracle, pfn, event)}")
    if reader is not None:
        try:
            data = reader(pfn)[:SHOWN]
        except (LookupError, ValueError, XipvmError):
            return lines
        poisoned = ", the poison of freed frames" if data == bytes([POISON]) * len(data) else ""
        lines.append(f"it holds {data.hex(' ')}{poisoned}")
    return lines


def belongs(oracle: Oracle, pfn: int, event: Event | None = None) -> str:
    """Whose frame ``pfn`` is, as far as events tell; ``event``: the one that is being judged."""
    freed_now = event.fields["pages"] if event is not None and event.kind == "page_free" else []
    if event is not None and any(first <= pfn < first + count for first, count in freed_now):
        return f"is free from #{event.seq} on"
    freed = oracle.world.freed.get(pfn)
    if freed is not None:
        return f"is free since #{freed}"
    owners = [
        f"{page << PAGE_SHIFT:#x} of {process.name}"
        for process in oracle.world.mms.values()
        for page, (mapped, _) in process.entries.items()
        if mapped == pfn
    ]
    more = f" and {len(owners) - HOLDERS} more" if len(owners) > HOLDERS else ""
    return f"is mapped at {', '.join(owners[:HOLDERS])}{more}" if owners else "is in nobody's page table"
