"""What is particular to KVM, or to the kernel that was recorded: how often it faults, what it prefetches, the order.

A secondary MMU that does other things here is right all the same; the comparison is for whoever wants to know how close
the model comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from xipvm.conform.compare import Difference, Names, Taken, changes, fits, show, touched_page
from xipvm.conform.world import World, hva
from xipvm.mmu.secondary.memslot import GFN_LIMIT
from xipvm.mmu.secondary.spte import SPTE_HUGE, SPTE_PRESENT, SPTE_WRITE

_VM_OWN_SPTES: Final = 8
"""4 KiB entries of the recorded VM's own memory, which go with all others."""


def compare_detail(world: World, names: Names, taken: Taken) -> list[Difference]:
    """Where ``taken`` is not what its step says in ``detail``. These differences are no errors."""
    detail = taken.step.detail
    vm = world.vms.get(taken.step.args.get("vm", "vm1"))
    got: dict[str, Any] = {name: taken.observed.get(name) for name in ("faulted", "value")}
    if vm is not None:
        got["faults"] = len(vm.vcpu.faults)
        got["fault_access"] = vm.vcpu.faults
        got["flush_requests"] = vm.vcpu.flushes
        got["spte_delta"] = _spte_delta(taken)
        got["prefetched"] = _other_sptes(taken)
    got["order"] = _order(world, taken)
    want = dict(detail)
    if "prefetched" in want:
        want["prefetched"] = [{name: one[name] for name in ("gfn", "perm", "level")} for one in want["prefetched"]]
    if "order" in want:
        want["order"] = list(_known_tokens(want["order"]))
    if "spte_delta" in want and _goes_whole(taken):
        want["spte_delta"] = {**want["spte_delta"], "4k": want["spte_delta"].get("4k", 0) + _VM_OWN_SPTES}
        want["spte_delta"] = {size: count for size, count in want["spte_delta"].items() if count}
    found = [
        Difference(f"detail {name}", show(want[name]), show(got[name]))
        for name in want
        if name in got and want[name] != got[name]
    ]
    return found + list(_around(world, names, taken))


def _goes_whole(taken: Taken) -> bool:
    """The entries of all memslots go, the recorded VM's own included."""
    return taken.step.op in ("memslot_delete", "memslot_move", "exit", "vm_close", "clear_refs")


def _spte_delta(taken: Taken) -> dict[str, int]:
    sizes = [{"4k": 0, "2m": 0}, {"4k": 0, "2m": 0}]
    for count, sptes in zip(sizes, taken.sptes, strict=True):
        for spte in sptes.values():
            count["2m" if spte & SPTE_HUGE else "4k"] += 1
    return {size: sizes[1][size] - sizes[0][size] for size in sizes[0] if sizes[1][size] != sizes[0][size]}


def _other_sptes(taken: Taken) -> list[dict[str, Any]]:
    before, after = taken.sptes
    return [
        {"gfn": gfn, "perm": "rw" if spte & SPTE_WRITE else "r", "level": 2 if spte & SPTE_HUGE else 1}
        for gfn, spte in after.items()
        if before.get(gfn) != spte and gfn != taken.step.args.get("gfn")
    ]


def present_sptes(world: World) -> dict[int, int]:
    """The present entries of vm1, by gfn."""
    vm = world.vms.get("vm1")
    if vm is None:
        return {}
    return {gfn: spte for gfn, spte in vm.kvm.sptes.entries(0, GFN_LIMIT) if spte & SPTE_PRESENT}


def _around(world: World, names: Names, taken: Taken) -> Iterator[Difference]:
    expected = taken.step.detail.get("primary_around")
    if expected is None:
        return
    touched = touched_page(world, taken.step)
    changed = {str(page): cells for page, cells in changes(taken).items() if page != touched}
    if changed.keys() != expected.keys() or not all(
        fits(names, word, cell)
        for page, words in expected.items()
        for word, cell in zip(words, changed[page], strict=True)
    ):
        got = {page: [names.name(cell) for cell in cells] for page, cells in changed.items()}
        yield Difference("detail primary_around", show(expected), show(got))


_TOKENS: Final = {
    "primary_tlb_flush": "tlb",
    "kvm_page_fault": "fault",
    "spte_set": "spte",
    "spte_set_huge": "spte",
    "spte_restore": "spte",
    "uffd_pagefault": "uffd",
    "mmu_notifier_clear_flush_young": "cfy",
    "mmu_notifier_release": "release",
}


def _order(world: World, taken: Taken) -> list[str]:
    """The events of a step as tokens, as far as the trace has them at the same places: calls, flushes, faults.

    The trace has one event for a range, the recording one for each VM that is told of it.
    """
    listeners = sum(vm.probe.subscribed_to is not None for vm in world.vms.values())
    tokens = []
    for event in taken.events:
        if event.kind == "mmu_notifier_invalidate_range_start":
            tokens += ["inv-alt" if event.fields["start"] >= hva("alt", 0) else "inv"] * max(listeners, 1)
        elif event.kind in _TOKENS:
            tokens.append(_TOKENS[event.kind])
    return tokens


def _known_tokens(order: list[Any]) -> Iterator[str]:
    for token in order:
        if isinstance(token, dict):
            for _ in range(token["times"]):
                yield from _known_tokens(token["of"])
        elif token in ("inv", "inv-alt", *_TOKENS.values()):
            yield token
